"""At which tokens a response ends.

A chat model's turn often ends with another token than its tokenizer's ``eos_token`` (Llama 3:
``<|eot_id|>``, Gemma: ``<end_of_turn>``, Qwen's base tokenizer: ``<|im_end|>``), and a sampler that
waits for the latter writes to the limit. Three places know: the tokenizer, the model's
``generation_config.json``, and the chat template, which writes the token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_klrlhf.errors import InputError

PROBE = "Quokka"
"""A reply in whose rendering the closing token is looked for."""


def stop_tokens(
    tokenizer: Any, generation: Mapping[str, Any] | None = None, *, chat: bool = True
) -> tuple[int, ...]:
    """Ids that end a response: ``stop`` of :func:`~jax_klrlhf.models.sampling.generate`.

    The union, in this order and without repetition, of

    - the tokenizer's ``eos_token_id``;
    - ``eos_token_id`` of ``generation`` (one id or a list), at which transformers' ``generate``
      stops: :attr:`Loaded.generation <jax_klrlhf.models.pretrained.Loaded>`;
    - with ``chat``, the special token that the chat template writes right after a reply, where the
      tokenizer has a template and the template such a token (:func:`closing_token`).

    Raises ``InputError`` where an id in ``generation`` is none.
    """
    found: list[int] = []
    if getattr(tokenizer, "eos_token_id", None) is not None:
        found.append(tokenizer.eos_token_id)
    listed = (generation or {}).get("eos_token_id")
    for token in listed if isinstance(listed, list | tuple) else [listed]:
        if token is None:
            continue
        if type(token) is not int or token < 0:
            raise InputError(f"generation_config.json: eos_token_id has {token!r}, which is no id")
        found.append(token)
    closing = closing_token(tokenizer) if chat else None
    if closing is not None:
        found.append(closing)
    return tuple(dict.fromkeys(found))


def closing_token(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right after an assistant's reply.

    None without a template, or where it closes a turn with plain text or with nothing.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # jinja2's and the template's own: it has no such turn to close.
        return None
    _, reply, after = text.rpartition(PROBE)
    if not reply:
        return None
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    return next((i for word, i in _longest_first(special) if after.startswith(word)), None)


def read_stop(tokenizer: Any, words: Sequence[str]) -> tuple[int, ...]:
    """Ids of stop tokens that a user named: each an id, or a token of the
    vocabulary that is no number.

    Raises ``InputError`` naming the word that is neither.
    """
    vocabulary, found = tokenizer.get_vocab(), []
    for word in words:
        if word.isdecimal() and int(word) < len(tokenizer):
            found.append(int(word))
        elif word in vocabulary:
            found.append(vocabulary[word])
        else:
            raise InputError(
                f"stop: {word!r} is neither a token of the vocabulary nor an id below "
                f"{len(tokenizer)}"
            )
    return tuple(dict.fromkeys(found))


def _longest_first(words: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(words.items(), key=lambda item: -len(item[0]))
