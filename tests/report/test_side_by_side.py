"""Answers side by side: what a page holds, what it refuses, and that a model's words stay words."""

import base64
import hashlib
import html.parser
import json
import re

import pytest

from jax_klrlhf import report
from jax_klrlhf.report import page

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


class Page(html.parser.HTMLParser):
    """Elements of a page, as a browser finds them; a script ends at its first end tag."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.tags, self.policy, self._in = [], [], None, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "script":
            self._in = given
            self.scripts.append((given, ""))
        assert not any(name.startswith("on") for name in given)

    def handle_endtag(self, tag):
        if tag == "script":
            self._in = None

    def handle_data(self, data):
        if self._in is not None:
            given, text = self.scripts[-1]
            self.scripts[-1] = (given, text + data)


def data_of(text):
    return json.loads(next(s for given, s in Page(text).scripts if given.get("id") == "data"))


def test_what_a_model_says_is_data_and_the_policy_runs_our_scripts_alone(tmp_path):
    records = [
        {"prompt": EVIL, "policy": EVIL, "text": EVIL + "<!--\u2028\ud800", "gold": 1.0},
        {"prompt": [{"role": "user", "content": EVIL}], "policy": "b", "text": "fine"},
    ]
    text = report.side_by_side(
        records, tmp_path / "a" / "page.html", title=EVIL, note=EVIL
    ).read_text()
    found = Page(text)
    runs = [script for given, script in found.scripts if given.get("type") != "application/json"]
    assert len(found.scripts) == 2
    assert len(runs) == 1
    assert "img" not in found.tags
    hashes = set(re.findall(r"'sha256-([^']+)'", found.policy))
    assert hashes == {base64.b64encode(hashlib.sha256(runs[0].encode()).digest()).decode()}
    assert found.policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in found.policy.split("script-src")[1].split(";")[0]
    held = data_of(text)
    assert held["prompts"] == [EVIL, f"user: {EVIL}"]
    assert held["answers"][0]["text"] == EVIL + "<!--\u2028?"
    assert "http://" not in text
    assert "https://" not in text


def test_a_page_has_each_answer_with_its_numbers(tmp_path):
    records = [
        {"prompt": "p", "policy": "pi0", "text": "one", "kl": 0.0, "length": 1, "gold": None},
        {"prompt": "q", "policy": "pi0", "text": "two", "gold": 2.0, "proxy": float("nan")},
        {
            "prompt": "p", "policy": "online", "text": "a b", "tokens": ["a", " b"],
            "token_kl": [0.25, 1.0],
        },
    ]  # fmt: skip
    held = data_of(report.side_by_side(iter(records), tmp_path / "page.html").read_text())
    assert held["policies"] == ["pi0", "online"]
    assert held["numbers"][:3] == ["gold", "proxy", "kl"]
    assert [a["prompt"] for a in held["answers"]] == [0, 1, 0]
    assert held["answers"][0]["numbers"] == {"kl": 0.0, "length": 1.0}
    assert held["answers"][1]["numbers"] == {"gold": 2.0, "proxy": None}
    assert held["answers"][2]["numbers"] == {"tokens": 2, "kl": 1.25}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": 3}, "record 1: 'text' is 3"),
        ({"prompt": 7}, "record 1: 'prompt' is 7"),
        ({"gold": "high"}, "record 1: 'gold' is 'high'"),
        ({"tokens": ["x"], "token_kl": [1.0]}, "do not add up"),
        ({"tokens": ["a", "b"], "token_kl": [1.0]}, "has 1 numbers"),
        ({"policy": None}, "'policy' is None"),
    ],
)
def test_a_bad_record_is_named(tmp_path, changed, message):
    good = {"prompt": "p", "policy": "a", "text": "ab"}
    with pytest.raises(ValueError, match=re.escape(message)):
        report.side_by_side([good, good | changed], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_nothing_to_show_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no answer"):
        report.side_by_side([], tmp_path / "page.html")


def test_pieces_add_up_whatever_bytes_the_tokens_are():
    text = "héllo wörld ☃ \U0001f600!"
    data = text.encode()
    decode = lambda ids: bytes(ids).decode("utf-8", "replace")  # noqa: E731
    found = report.pieces(decode, list(data))
    assert len(found) == len(data)
    assert "".join(found) == text
    at = data.index("☃".encode())
    assert found[at : at + 3] == ["", "", "☃"]
    # An answer that was cut in the middle of a character still adds up to what its decoder says.
    cut = list(data[: at + 2])
    assert "".join(report.pieces(decode, cut)) == decode(cut)
    # Words that lose their space in front, as SentencePiece has them at the beginning of a text.
    words = ["a", "b", "c"]
    assert report.pieces(lambda ids: " ".join(words[i] for i in ids), [0, 1, 2]) == [
        "a", " b", " c",
    ]  # fmt: skip


def test_data_in_a_page_are_what_was_put_there():
    for value in ("<!-- <script>", "&lt;", "\u2028", "é", {"a": [1, None, 0.5]}):
        text = page.embed(value)
        assert json.loads(text) == value
        assert not set(text) & set("<>&\u2028")
