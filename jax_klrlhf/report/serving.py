"""Pages that are served, by the standard library: one page, and functions from JSON to JSON.

Who may ask. On the loopback address, every program of this machine may; a page of another site may
not: a request must name a loopback host (so that no name made to point here gets through), carry
JSON (which other sites' pages may not send) and come from this page's own origin. On any other
address, and where a token is asked for, every question needs it. The token stands behind the ``#``
of the page's address, so that no server, log or other site is sent it. There is no encryption:
across a network that is not yours, go through ``ssh -L``.
"""

import contextlib
import http.server
import ipaddress
import json
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from jax_klrlhf.errors import InputError

LARGEST = 64 * 1024
"""Bytes of a request."""
PATIENCE = 30.0
"""Seconds for a request to arrive whole."""
SHORTEST = 16
"""Characters of a token."""


class Refused(ValueError):
    """What a page asked for is not to be had; the reason is one line."""


@dataclass(frozen=True)
class Served:
    """A page that is being served; a context that ends with it."""

    url: str
    """With the token, where there is one."""
    port: int
    token: str | None
    _server: http.server.ThreadingHTTPServer
    _thread: threading.Thread

    def close(self) -> None:
        """Stop. What was confirmed is kept."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def start(
    api: dict[str, Callable[[dict[str, Any]], Any]],
    text: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | bool | None = None,
) -> Served:
    """Serve a page and functions from JSON to JSON, by this module's rules, in a thread of its own.

    The page is had by whoever can reach the address: what a token shall guard, it asks for.

    Args:
        api: by path, functions of a JSON object; they raise :class:`Refused`, or ``InputError``.
        text: the page.
        host: address to listen on.
        port: 0 takes a free one.
        token: what every question must carry: True makes one; on another address than the loopback
            one is made in any case.

    Raises:
        ValueError: for a token that could be guessed.
        InputError: where the address cannot be had.
    """
    if isinstance(token, str) and len(token) < SHORTEST:
        raise ValueError(f"a token of {len(token)} characters can be guessed; give {SHORTEST}.")
    near = _loopback(host)
    if not isinstance(token, str):
        token = secrets.token_urlsafe(24) if token or not near else None
    server = listen(api, text, host=host, port=port, token=token)
    port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="page", daemon=True)
    thread.start()
    name = host if near else socket.gethostname()
    where = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    return Served(where + ("" if token is None else f"#token={token}"), port, token, server, thread)


def listen(
    api: dict[str, Callable[[dict[str, Any]], Any]],
    text: str,
    *,
    host: str,
    port: int,
    token: str | None,
) -> http.server.ThreadingHTTPServer:
    """A server of one page and of functions from JSON to JSON, by the rules of this module.

    Raises:
        InputError: where the address cannot be had.
    """

    class Handler(_Handler):
        rules = (api, text, token, host)

    kind = type("Server", (http.server.ThreadingHTTPServer,), {
        "address_family": socket.AF_INET6 if ":" in host else socket.AF_INET,
        "daemon_threads": True,
    })  # fmt: skip
    try:
        return kind((host, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{host}, port {port}: cannot be listened on ({reason}); give another --port, or 0 for "
            "any that is free."
        ) from None


class _Handler(http.server.BaseHTTPRequestHandler):
    rules: tuple[Any, ...]
    server_version, sys_version = "klrlhf", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        """The page; it holds nothing that a token would guard."""
        if self.path.partition("?")[0] != "/":
            return self._fail(404, "there is no such page")
        if not self._here():
            return self._fail(403, "this page is asked for by another name than this machine's")
        return self._send(200, self.rules[1].encode(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        """A function from JSON to JSON."""
        api, _, token, _ = self.rules
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            return self._fail(411, "a request says how long it is")
        if int(length) > LARGEST:
            return self._fail(413, f"a request has at most {LARGEST} bytes")
        body = self.rfile.read(int(length))
        if token is not None:
            given = self.headers.get("Authorization", "")
            # Bytes, so that other characters than ASCII are compared too.
            if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return self._fail(401, "open the page by the address with its token")
        elif not self._here():
            return self._fail(403, "this page is asked for by another name than this machine's")
        elif not self._own():
            return self._fail(403, "a page of another site asked")
        if self.headers.get_content_type() != "application/json":
            return self._fail(415, "a request is JSON")
        function = api.get(self.path)
        if function is None:
            return self._fail(404, "there is no such question")
        try:
            given = json.loads(body)
            if not isinstance(given, dict):
                raise ValueError
        except (ValueError, RecursionError):
            return self._fail(400, "a request is a JSON object")
        try:
            found = function(given)
        except Refused as error:
            return self._fail(409, str(error))
        except InputError as error:
            return self._fail(500, str(error))
        return self._json(200, found)

    def _here(self) -> bool:
        """Whether the request names this machine's loopback, or there is a token to be shown."""
        _, _, token, host = self.rules
        if token is not None:
            return True
        name = urlsplit("//" + self.headers.get("Host", "")).hostname
        return name is not None and (name == host or _loopback(name))

    def _own(self) -> bool:
        """Whether it comes from this page, or from no page."""
        origin = self.headers.get("Origin")
        if self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return False
        return origin is None or urlsplit(origin).netloc == self.headers.get("Host")

    def _json(self, status: int, found: Any) -> None:
        self._send(status, json.dumps(found).encode(), "application/json")

    def _fail(self, status: int, reason: str) -> None:
        self.close_connection = True
        self._json(status, {"error": reason})

    def _send(self, status: int, content: bytes, kind: str) -> None:
        with contextlib.suppress(ConnectionError):  # The reader has gone.
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            if self.rules[2] is None:
                # With a token a notebook may frame it; without, nobody makes others click here.
                self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what people say is not for a log."""


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
