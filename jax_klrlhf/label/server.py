"""The labelling page: a page of this library's own, served by :mod:`jax_klrlhf.report.serving`.

Why not Gradio: a page that takes keys, shows text as text under a policy that runs nothing but its
own script, and is tested by plain requests is two hundred lines; Gradio would bring fifty packages,
fonts of another host, and Markdown that reads a model's answer as HTML.
"""

from typing import Any

from jax_klrlhf.label.session import Session
from jax_klrlhf.report import page, serving
from jax_klrlhf.report.serving import Refused, Served


def serve(
    session: Session,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | bool | None = None,
) -> Served:
    """Serve a session, in a thread of its own.

    Args:
        session: what is labelled.
        host: address to listen on.
        port: 0 takes a free one.
        token: what every request must carry: True makes one; on another address than the loopback
            one is made in any case.

    Raises:
        ValueError: for a token that could be guessed.
        InputError: where the address cannot be had.
    """
    text = page.document(
        "Which answer is better?",
        page.asset("label.html", package="jax_klrlhf.label"),
        scripts=[page.asset("common.js"), page.asset("label.js", package="jax_klrlhf.label")],
        styles=[page.asset("label.css", package="jax_klrlhf.label")],
        connect="'self'",
    )
    api = {
        "/api/next": lambda given: _next(session, given),
        "/api/answer": lambda given: _answer(session, given),
        "/api/taught": lambda given: session.teaching(),
    }
    return serving.start(api, text, host=host, port=port, token=token)


def _next(session: Session, given: dict[str, Any]) -> dict[str, Any]:
    annotator = _text(given, "annotator")
    ask = session.next(annotator)
    shown = {"ask": None} if ask is None else ask.shown()
    return shown | {"progress": session.progress(annotator)}


def _answer(session: Session, given: dict[str, Any]) -> dict[str, Any]:
    seconds = given.get("seconds")
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e6:
        seconds = None
    label, new = session.answer(
        _text(given, "annotator"), _text(given, "ask"), _text(given, "answer"), seconds=seconds
    )
    return {"new": new, "time": label.time}


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise Refused(f"{name!r} is missing, or no text")
    return value
