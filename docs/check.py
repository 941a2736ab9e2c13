"""Whether the built documentation works: every link inside of it, and its pages in a browser.

Sphinx calls :func:`links` and :func:`browse` when it has built (``make docs``); by hand
``python docs/check.py docs/_build/html``. The browser is headless Chromium by way of playwright
(``pip install playwright``), its own or the system's; without one, that part is left out, and said.
"""

import functools
import html.parser
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

NARROW = 390
"""Pixels of a telephone's screen."""
TYPESET = ("concepts/objective.html", "tutorials/01_theory.html", "api/jax_klrlhf.core.gibbs.html")
"""Pages that must have formulas; on every page those that there are must be typeset."""
SOUGHT = {
    "ellipsoid": "core.ellipsoid",
    "most_uncertain": "core.pairs",
    "label": "howto/label",
    "iterate": "training.rounds",
    "goodhart": "gallery/goodhart",
}
"""What is looked for, and part of the address of one page that must be found."""
_WRONG = """async () => {
    if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
    const pictures = [...document.images].filter(x => x.complete && !x.naturalWidth);
    const formulas = [...document.querySelectorAll("article .math")];
    const errors = document.querySelectorAll("mjx-merror, [data-mjx-error]");
    return {
        pictures: pictures.map(x => x.src),
        seen: document.querySelectorAll("article img").length,
        formulas: formulas.length,
        plain: formulas.filter(x => !x.querySelector("mjx-container")).map(x => x.textContent),
        errors: [...errors].map(x => x.getAttribute("data-mjx-error") ?? x.textContent),
    };
}"""


class _Page(html.parser.HTMLParser):
    """Where a page points to, and what can be pointed at in it."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)


def links(folder: Path) -> list[str]:
    """Links and pictures that lead to no file, or to no place in it; one line each."""
    folder = folder.resolve()
    pages = {
        path: _Page(path.read_text(encoding="utf-8"))
        for path in folder.rglob("*.html")
        if "_static" not in path.relative_to(folder).parts  # the theme's templates
    }
    wrong = []
    for path, page in sorted(pages.items()):
        for link in dict.fromkeys(page.links):
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            address, anchor = urldefrag(link)
            address = address.partition("?")[0]
            target = (path.parent / unquote(address)).resolve() if address else path
            if target.is_dir():
                target = target / "index.html"
            if not target.is_file():
                wrong.append(f"{path.relative_to(folder)}: {link} leads to no file")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                wrong.append(f"{path.relative_to(folder)}: {link} leads to no place in that page")
    return wrong


class NoBrowser(Exception):
    """Why there is none."""


def browse(folder: Path) -> list[str]:
    """What does not work in a browser; one line each.

    Raises:
        NoBrowser: where there is none.
    """
    try:
        from playwright import sync_api as playwright
    except ImportError:
        raise NoBrowser("playwright is not installed (pip install playwright)") from None
    system = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as run, _served(folder) as root:
        try:
            browser = run.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            raise NoBrowser(str(error).splitlines()[0]) from None
        wrong: list[str] = []
        try:
            _visit(browser.new_page(), root, pages_of(folder), wrong)
        finally:
            browser.close()
    return wrong


def pages_of(folder: Path) -> list[str]:
    """Every page but those of source code, which all are made alike: of them the first."""
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*.html"))]
    found = [path for path in found if "_static" not in path.parts]
    sources = [path for path in found if "_modules" in path.parts]
    return [path.as_posix() for path in found if path not in sources[1:]]


def _visit(page: Any, root: str, pages: list[str], wrong: list[str]) -> None:
    at = [""]

    def complain(text: str) -> None:
        wrong.append(f"{at[0]}: {text}")

    page.on("pageerror", lambda error: complain(f"a script fails: {error}"))
    page.on("console", lambda said: said.type == "error" and complain(f"console: {said.text}"))
    page.on(
        "request",
        lambda asked: (
            asked.url.startswith((root, "data:", "blob:")) or complain(f"asks {asked.url}")
        ),
    )
    for name in pages:
        at[0] = name
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(f"{root}/{name}", wait_until="load")
        seen = page.evaluate(_WRONG)
        for source in seen["pictures"]:
            complain(f"no picture at {source}")
        for text in seen["plain"]:
            complain(f"a formula is not typeset: {text.strip()[:80]}")
        for text in seen["errors"]:
            complain(f"a formula has an error: {text.strip()[:80]}")
        if name in TYPESET and not seen["formulas"]:
            complain("there is no formula")
        if name == "index.html" and not seen["seen"]:
            complain("the front page has no picture")
        for width in (NARROW, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                complain(f"{wide} pixels wide on a screen of {width}")
    for words, place in SOUGHT.items():
        at[0] = f"search.html?q={words}"
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(f"{root}/{at[0]}")
        try:
            page.wait_for_selector("#search-results ul.search li a", timeout=20_000)
            page.wait_for_timeout(300)
        except Exception:
            complain("nothing is found")
            continue
        found = page.locator("#search-results ul.search li a").evaluate_all(
            "all => all.map(x => x.getAttribute('href'))"
        )
        if not any(place in link for link in found):
            complain(f"{place} is not among the {len(found)} pages found")


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The folder on the loopback address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *given: object) -> None:
            """Say nothing."""

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def main(arguments: list[str]) -> int:
    """Check a folder; 1 where something is wrong."""
    folder = Path(arguments[0] if arguments else "docs/_build/html").resolve()
    wrong = links(folder)
    try:
        wrong += browse(folder)
    except NoBrowser as reason:
        print(f"not looked at in a browser: {reason}")
    print("\n".join(wrong) or f"{folder}: nothing wrong found")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
