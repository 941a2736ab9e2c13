"""Asking a labelling page by plain HTTP."""

import http.client
import json


def request(port, path, content=None, *, method="POST", **headers):
    """(status, headers, body) of a request; ``content`` is JSON, or bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
    given = {"Content-Type": "application/json"} if method == "POST" else {}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        connection.request(method, path, body, given)
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()
    finally:
        connection.close()


def post(port, path, content, **headers):
    """The JSON of a question that is answered."""
    status, _, body = request(port, path, content, **headers)
    assert status == 200, (status, body)
    return json.loads(body)
