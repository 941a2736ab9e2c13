"""Texts to a batch, by the rules of :mod:`jax_klrlhf.data.tokenize`: for scripts and experiments.

A raw tokenizer would put its begin token before each response, and no end token after it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jax_klrlhf.columns import Columns
from jax_klrlhf.data import rows, tokenize
from jax_klrlhf.data.batch import collate
from jax_klrlhf.data.buckets import Shape
from jax_klrlhf.data.examples import Content, parse
from jax_klrlhf.errors import InputError
from jax_klrlhf.models.batch import Batch


def batch_of_texts(
    tokenizer: PreTrainedTokenizerBase | tokenize.Encoder,
    prompts: Sequence[Content],
    responses: Sequence[Sequence[Content]],
    *,
    scores: Sequence[Sequence[float]] | None = None,
    label: Sequence[float] | None = None,
    weight: Sequence[float] | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    multiple: int = 8,
) -> Batch:
    """Prompts ``[B, P]`` with their responses ``[B, K, C]``, in the order given.

    Args:
        tokenizer: of the model, or its :class:`tokenize.Encoder`.
        prompts: B texts, chats (lists of messages), or rows of token ids.
        responses: for each prompt up to K texts, assistant messages, or rows of ids; where there
            are fewer than K the others have length 0. None at all makes a batch of prompts.
        scores: one for each response, higher is better; by default 1 and 0 of a pair, else 0.
        label: probability that the first response is preferred to the second; 1 by default.
        weight: of each prompt; 1 by default.
        max_prompt_length: tokens; a longer prompt loses its beginning. No cut by default.
        max_response_length: tokens; a longer response loses its end, and its end token.
        multiple: P and C are the longest lengths, rounded up to multiples of this.

    Nothing is dropped: responses may be equal, or nothing but their end token. Raises
    :class:`InputError` naming the prompt or response that cannot be tokenized, and ValueError where
    the lengths of the arguments differ.

        batch = data.batch_of_texts(tokenizer, ["2 + 2 ="], [[" 4", " five"]])
        batch.responses.ids.shape        # (1, 2, 8)
    """
    encoder = tokenizer
    if not isinstance(encoder, tokenize.Encoder):
        encoder = tokenize.encoder(encoder)
    size = len(prompts)
    given = {"responses": responses, "scores": scores, "label": label, "weight": weight}
    for name, values in given.items():
        if values is not None and len(values) != size:
            raise ValueError(f"{name} has {len(values)} entries for {size} prompts: one each")
    if not size:
        raise ValueError("no prompt: give at least one")
    examples = []
    for number, (prompt, some) in enumerate(zip(prompts, responses, strict=True)):
        record = {"prompt": prompt}
        if len(some):
            # Ranks that keep the order; what the scores are is said below.
            record |= {"responses": list(some), "ranks": list(range(len(some)))}
        examples.append(parse(record, columns=Columns(), where=f"prompt {number}"))
    count = max(map(len, responses))
    made = []
    for number, (prompt, some, _) in enumerate(rows.assemble(encoder, examples)):
        if not prompt:
            raise InputError(f"prompt {number}: empty, and the tokenizer has no begin token")
        usual = [1.0, 0.0] if count == 2 else [0.0] * count
        worth = usual[: len(some)] if scores is None else [float(s) for s in scores[number]]
        if len(worth) != len(some):
            raise ValueError(f"prompt {number} has {len(some)} responses, {len(worth)} scores")
        made.append(
            rows.Row(
                prompt=rows.cut_prompt(
                    prompt, max_prompt_length or len(prompt), begin=encoder.begin
                ),
                responses=[rows.cut_response(r, max_response_length or len(r)) for r in some],
                scores=worth,
                label=1.0 if label is None else float(label[number]),
                weight=1.0 if weight is None else float(weight[number]),
                number=number,
            )
        )
    pad: Any = encoder.tokenizer.pad_token_id or 0
    whole = lambda longest: max(-(-longest // multiple), 1) * multiple  # noqa: E731
    return collate(
        made,
        Shape(
            size,
            whole(max(len(row.prompt) for row in made)),
            count,
            whole(max((len(r) for row in made for r in row.responses), default=0)),
        ),
        numbers=np.arange(size),
        weight=np.ones(size, np.float32),
        pad=pad,
    )
