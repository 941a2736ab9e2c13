"""The same prompts answered by several policies, side by side, as a page to read.

A page is filtered by words and by policy, ordered by a stated rule (as given, at random, by the
difference of two policies in a number, by proxy above gold), and each answer's tokens are coloured
by their KL. It is one file without a network (:mod:`.page`).
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax_klrlhf.report import page

KNOWN = ("prompt", "policy", "text", "tokens", "token_kl")
"""Keys of a record that are not numbers of an answer."""


def side_by_side(
    answers: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "Answers side by side",
    note: str = "",
) -> Path:
    """Write the page and return its path.

    Args:
        answers: records, one for each answer:

            - ``prompt``: text, or a chat: a list of ``{"role", "content"}``;
            - ``policy``: its name; policies stand in the order of their first appearance;
            - ``text``: what it said; several answers of one policy to one prompt stand below each
              other;
            - ``gold``, ``proxy``: rewards, ``kl``: KL(policy || pi0) of the answer, in nats, and
              any other key whose value is a number: shown, and answers are ordered by it. All
              optional; None where there is none;
            - ``tokens``: the answer in pieces that add up to its text, as
              :func:`pieces` makes them, or their count;
            - ``token_kl``: the KL of each of the pieces, in nats, for the colour.
        path: of the HTML file.
        title: above the page.
        note: a paragraph below the title: where the answers come from, say.

    Raises:
        ValueError: naming the record and the key that is missing or of the wrong type or length.
        InputError: where the file cannot be written.

    Example::

        side_by_side(
            [
                {"prompt": "Hello", "policy": "pi0", "text": "Hi.", "gold": 0.1},
                {"prompt": "Hello", "policy": "online", "text": "Hello!", "gold": 0.7, "kl": 1.2,
                 "tokens": ["Hello", "!"], "token_kl": [1.0, 0.2]},
            ],
            "answers.html",
        )
    """
    prompts: dict[str, int] = {}
    policies: dict[str, None] = {}
    numbers: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for number, record in enumerate(answers):
        found = _record(number, record)
        policies.setdefault(found["policy"])
        numbers.update(dict.fromkeys(found["numbers"]))
        found["prompt"] = prompts.setdefault(found["prompt"], len(prompts))
        rows.append(found)
    if not rows:
        raise ValueError("side_by_side: no answer; give at least one record.")
    # The names that everybody looks for first.
    first = [name for name in ("gold", "proxy", "reward", "kl") if name in numbers]
    data = {
        "note": note,
        "title": title,
        "prompts": list(prompts),
        "policies": list(policies),
        "numbers": [*first, *(name for name in numbers if name not in first)],
        "answers": rows,
    }
    body = '<main id="page"><noscript>This page needs JavaScript.</noscript></main>'
    text = page.document(
        title,
        body,
        data=data,
        scripts=[page.asset("side_by_side.js")],
        styles=[page.asset("side_by_side.css")],
    )
    return page.write(path, text)


def words(prompt: Any) -> str:
    """A prompt as text: itself, a chat as ``role: content`` lines, token ids as numbers.

    >>> words([{"role": "user", "content": "Hello"}])
    'user: Hello'
    """
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], Mapping):
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    return " ".join(map(str, prompt))


def pieces(decode: Any, ids: Any) -> list[str]:
    """What each token adds to the text: as many pieces as ids, which add up to ``decode(ids)``.

    A character that several tokens make up belongs to the last of them. ``decode(ids) -> text`` is
    asked for a few tokens at a time (the way of vLLM's incremental detokenization): a decoder that
    looks at neighbours alone, as all in use do, is read right.
    """
    ids = [int(token) for token in ids]
    found: list[str] = []
    begin = read = 0
    for number in range(1, len(ids) + 1):
        before, now = decode(ids[begin:read]), decode(ids[begin:number])
        last = number == len(ids)
        if len(now) > len(before) and (last or not now.endswith("\ufffd")):
            found.append(now[len(before) :])
            begin, read = read, number
        else:
            found.append("")
    return found


def _record(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    where = f"side_by_side: record {number}"
    for name in ("prompt", "policy", "text"):
        if name not in record:
            raise ValueError(f"{where}: no {name!r}; it has {', '.join(map(str, record))}.")
    for name in ("policy", "text"):
        if not isinstance(record[name], str):
            raise ValueError(f"{where}: {name!r} is {record[name]!r}; it must be text.")
    try:
        prompt = words(record["prompt"])
    except (TypeError, KeyError, IndexError):
        raise ValueError(
            f"{where}: 'prompt' is {record['prompt']!r}; it must be text or a list of messages."
        ) from None
    numbers = {}
    for name, value in record.items():
        if name in KNOWN or value is None:
            continue
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {name!r} is {value!r}; it must be a number.") from None
        numbers[str(name)] = value if math.isfinite(value) else None
    tokens, kl = record.get("tokens"), record.get("token_kl")
    found = {"policy": record["policy"], "prompt": prompt, "text": record["text"]}
    if tokens is not None and not isinstance(tokens, int):
        tokens = [str(piece) for piece in tokens]
        if "".join(tokens) == record["text"]:
            found["tokens"] = tokens
        elif kl is not None:
            raise ValueError(f"{where}: its 'tokens' do not add up to its 'text'.")
        numbers.setdefault("tokens", len(tokens))
    elif tokens is not None:
        numbers.setdefault("tokens", tokens)
    if kl is not None:
        kl = [float(value) for value in kl]
        if "tokens" not in found or len(kl) != len(found["tokens"]):
            raise ValueError(
                f"{where}: 'token_kl' has {len(kl)} numbers; it must have one to each of 'tokens'."
            )
        found["token_kl"] = [round(value, 4) if math.isfinite(value) else None for value in kl]
        numbers.setdefault("kl", sum(kl) if math.isfinite(sum(kl)) else None)
    return found | {"numbers": numbers}
