"""KL-regularized preference learning: one functional core, on exact bandits and language models."""

import logging

__version__ = "0.1.0.dev0"

# transformers says at import that it lacks torch, which here it does without.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)
