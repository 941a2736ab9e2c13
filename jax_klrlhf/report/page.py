"""Pages that stand by themselves: one HTML file, no network, what a model says shown as text.

A page is a document of this library's own, a block of data, and scripts of this library's own. The
data are JSON that no script tag can end; scripts put them on the page by ``textContent`` alone; the
page's security policy lets nothing run but these scripts, by their hash, and nothing be fetched. A
``<script>`` in an answer is eight characters of text.
"""

import base64
import hashlib
import html
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jax_klrlhf.errors import InputError
from jax_klrlhf.results import plain

HERE = "jax_klrlhf.report"


def asset(name: str, *, package: str = HERE) -> str:
    """A script or a style that lies beside this module."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def policy(scripts: Sequence[str], *, connect: str = "'none'") -> str:
    """The content security policy of a page with these scripts in it.

    ``connect`` is where they may ask for something: nowhere, or ``'self'`` where it is served.
    """
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def document(
    title: str,
    body: str,
    *,
    data: Any = None,
    scripts: Sequence[str] = (),
    styles: Sequence[str] = (),
    head: str = "",
    connect: str = "'none'",
) -> str:
    """A whole page.

    Args:
        title: any text.
        body: HTML of this library's own, in which nothing of a user's stands unescaped.
        data: whatever JSON holds, for the scripts: the element ``data``.
        scripts: run in this order, at the end of the body.
        styles: after the common one.
        head: further HTML of this library's own.
        connect: see :func:`policy`.
    """
    block = (
        "" if data is None else f'<script type="application/json" id="data">{embed(data)}</script>'
    )
    run = "".join(f"<script>{script}</script>" for script in scripts)
    rules = policy(scripts, connect=connect)
    style = "\n".join([asset("common.css"), *styles])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{rules}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{html.escape(title)}</title>\n{head}<style>\n{style}\n</style>\n</head>\n"
        f"<body>\n{body}\n{block}\n{run}\n</body>\n</html>\n"
    )


def embed(data: Any) -> str:
    """JSON that can stand inside of a script element: no tag, no comment can begin in it.

    >>> embed({"said": "</script><b>"})
    '{"said": "\\\\u003c/script\\\\u003e\\\\u003cb\\\\u003e"}'
    """
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    # Half of a surrogate pair, which JSON can hold, and UTF-8 can't.
    return text.encode("utf-8", "replace").decode("utf-8")


def write(path: str | Path, text: str) -> Path:
    """Write a page in one step: a reader sees the old one or the new.

    Raises:
        InputError: where it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another.") from None
    return path


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
