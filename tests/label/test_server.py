"""The page's server: who may ask, what is refused, and that nothing of a model runs."""

import json
import re

import pytest

from jax_klrlhf import label, labelling
from jax_klrlhf.errors import InputError
from jax_klrlhf.labelling import pair_of
from tests.label.asking import post, request

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
ASK = {"annotator": "Ana"}


@pytest.fixture
def session(tmp_path):
    asked = [pair_of(EVIL, EVIL + "a", f"b {n}")[0] for n in range(3)]
    labelling.write_pairs(tmp_path, asked)
    session = label.Session(tmp_path)
    yield session
    session.close()


@pytest.fixture
def served(session):
    with label.serve(session) as served:
        yield served


def test_a_pair_is_asked_answered_and_kept_by_plain_requests(served, session):
    first = post(served.port, "/api/next", ASK)
    assert first["prompt"] == EVIL
    assert {first["left"], first["right"]} > {EVIL + "a"}
    said = {**ASK, "ask": first["ask"], "answer": "left", "seconds": 2.5}
    assert post(served.port, "/api/answer", said)["new"] is True
    assert post(served.port, "/api/answer", said)["new"] is False
    (kept,) = labelling.read_labels(session.folder)
    assert getattr(kept.pair, kept.answer) == first["left"]
    assert kept.seconds == 2.5
    assert post(served.port, "/api/next", ASK)["progress"] == {
        "own": 1, "all": 1, "left": 2, "asked": 3,
    }  # fmt: skip
    assert post(served.port, "/api/taught", {})["labels"] == 1


def test_the_page_holds_nothing_of_a_model_and_runs_its_own_script_alone(served):
    status, headers, body = request(served.port, "/", method="GET")
    text = body.decode()
    assert status == 200
    assert EVIL not in text
    assert "owned" not in text
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in rules["script-src"]
    assert rules["connect-src"] == "'self'"
    assert "innerHTML" not in text
    assert "insertAdjacentHTML" not in text
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Python" not in headers["Server"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"Host": "evil.example"}, 403),  # a name made to point here
        ({"Host": "localhost.evil.example:80"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Content_Type": "text/plain"}, 415),  # what a form of another site may send
        ({"Content_Type": None}, 415),
        ({"Content_Length": "99999999"}, 413),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "x"}, 411),
    ],
)
def test_other_sites_and_odd_requests_are_refused(served, session, change, status):
    first = post(served.port, "/api/next", ASK)
    said = {**ASK, "ask": first["ask"], "answer": "left"}
    assert request(served.port, "/api/answer", said, **change)[0] == status
    assert not session.labels.all


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/api/next", b"{", 400),
        ("/api/next", b"[" * 30000, 400),
        ("/api/next", [], 400),
        ("/api/next", {}, 409),
        ("/api/next", {"annotator": 3}, 409),
        ("/api/next", {"annotator": "a\nb"}, 409),
        ("/api/answer", {**ASK, "ask": "../x.0", "answer": "left"}, 409),
        ("/api/answer", {**ASK, "ask": "x.\u00b2", "answer": "left"}, 409),
        ("/api/../etc", {}, 404),
        ("/", {}, 404),
    ],
)
def test_a_bad_question_is_one_line(served, path, content, status):
    found, _, body = request(served.port, path, content)
    assert found == status
    assert set(json.loads(body)) == {"error"}
    assert request(served.port, "/labels.jsonl", method="GET")[0] == 404


def test_with_a_token_nothing_is_had_without_it(session):
    with label.serve(session, token=True) as served:
        assert served.url.endswith(f"/#token={served.token}")
        right = f"Bearer {served.token}"
        for wrong in (None, "", served.token, right + "x", right[:-1], "Bearer ", "Bearer \xe9"):
            given = {"Authorization": wrong}
            for path in ("/api/next", "/api/answer", "/api/taught"):
                assert request(served.port, path, ASK, **given)[0] == 401
        # By whatever name, as through a notebook's proxy.
        found = post(served.port, "/api/next", ASK, Authorization=right, Host="proxy.example")
        assert found["ask"]
        assert served.token not in request(served.port, "/", method="GET")[2].decode()
    assert label.serve.__doc__
    with pytest.raises(ValueError, match="guessed"):
        label.serve(session, token="short")


def test_another_address_than_the_loopback_is_never_served_without_a_token(session):
    with label.serve(session, host="0.0.0.0", token=False) as served:
        assert served.token is not None
        assert request(served.port, "/api/next", ASK)[0] == 401
    with label.serve(session) as served:
        assert served.token is None
        assert served.url.startswith("http://127.0.0.1:")
        with pytest.raises(InputError, match="cannot be listened on"):
            label.serve(session, port=served.port)


def test_a_label_that_cannot_be_written_is_not_confirmed(served, session, monkeypatch):
    first = post(served.port, "/api/next", ASK)

    def full(label):
        raise InputError("labels.jsonl: cannot be written (No space left on device); make room.")

    monkeypatch.setattr(session.labels, "add", full)
    said = {**ASK, "ask": first["ask"], "answer": "left"}
    status, _, body = request(served.port, "/api/answer", said)
    assert status == 500
    assert "make room" in json.loads(body)["error"]
    monkeypatch.undo()
    # The same pair is shown again, and its answer taken.
    assert post(served.port, "/api/next", ASK)["ask"] == first["ask"]
    assert post(served.port, "/api/answer", said)["new"]
