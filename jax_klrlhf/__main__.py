"""``python -m jax_klrlhf``: the same as ``klrlhf``."""

import sys

from jax_klrlhf.cli import main

sys.exit(main())
