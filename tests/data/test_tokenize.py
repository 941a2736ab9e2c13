"""The rules of tokenizing, one property each, and every trap that peers fell into."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from jax_klrlhf.columns import Columns
from jax_klrlhf.data import rows, tokenize
from jax_klrlhf.data.batch import collate
from jax_klrlhf.data.buckets import Shape
from jax_klrlhf.data.examples import parse
from jax_klrlhf.errors import InputError

# Letters and single spaces: what every tokenizer here can write back exactly.
words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
sentences = st.lists(words, min_size=1, max_size=12).map(" ".join)
continuations = sentences.map(lambda text: " " + text)


def encode(encoder, *records, max_prompt_length=10_000, max_response_length=10_000):
    examples = [
        parse(record, columns=Columns(), where=f"record {number}")
        for number, record in enumerate(records)
    ]
    return list(
        rows.encode(
            encoder,
            examples,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
        )
    )


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# The rules


@given(prompt=sentences, response=continuations)
def test_begin_stands_once_and_end_once(encoder, prompt, response):
    ids, answer = encoder.prompt(prompt), encoder.response(response)
    if encoder.begin is None:
        assert encoder.tokenizer.bos_token_id not in ids or encoder.tokenizer.bos_token_id is None
    else:
        assert ids[0] == encoder.begin
        assert ids.count(encoder.begin) == 1
        assert encoder.begin not in answer
    assert answer[-1] == encoder.end
    assert answer.count(encoder.end) == 1


@given(prompt=sentences, response=continuations)
def test_prompt_and_response_together_read_as_the_text(encoder, prompt, response):
    # Would fail with a space invented before the response, or one lost.
    ids = encoder.prompt(prompt) + encoder.response(response)
    assert encoder.decode(ids) == prompt + response


@given(text=st.text(max_size=40))
def test_byte_level_tokens_write_back_any_text(byte_level, text):
    encoder = tokenize.encoder(byte_level)
    assert encoder.decode(encoder.response(text)) == text


@given(prompt=sentences, chosen=continuations, rejected=continuations, length=st.integers(2, 30))
def test_cut_prompt_is_the_end_of_the_prompt(encoder, prompt, chosen, rejected, length):
    (row,) = encode(encoder, pair(prompt, chosen, rejected), max_prompt_length=length)
    if isinstance(row, rows.Dropped):
        assert chosen == rejected
        return
    whole = encoder.prompt(prompt)
    assert len(row.prompt) == min(length, len(whole))
    body = row.prompt if encoder.begin is None else row.prompt[1:]
    assert body == whole[len(whole) - len(body) :]
    assert row.prompt[0] == (whole[0] if encoder.begin is not None else body[0])
    assert row.lost[0] == len(whole) - len(row.prompt)


@given(chosen=continuations, rejected=continuations, length=st.integers(1, 30))
def test_cut_response_is_its_beginning_and_has_no_end_token(encoder, chosen, rejected, length):
    (row,) = encode(encoder, pair("a b", chosen, rejected), max_response_length=length)
    whole = [encoder.response(chosen), encoder.response(rejected)]
    if isinstance(row, rows.Dropped):
        assert whole[0][:length] == whole[1][:length]
        return
    for kept, full in zip(row.responses, whole, strict=True):
        assert kept == full[:length]
        assert (encoder.end in kept) == (len(full) <= length)


@given(shared=sentences, chosen=sentences, rejected=sentences)
def test_implicit_prompt_and_response_are_the_tokens_of_the_whole_text(
    encoder, shared, chosen, rejected
):
    texts = [shared + " " + chosen, shared + " " + rejected]
    (row,) = encode(encoder, {"chosen": texts[0], "rejected": texts[1]})
    whole = [[*encoder.prompt(text), encoder.end] for text in texts]
    if isinstance(row, rows.Dropped):
        # One text is the other, or its beginning: nothing but the end token is left of it.
        shorter = min(whole, key=len)
        assert any(shorter[:-1] == ids[: len(shorter) - 1] for ids in whole if ids is not shorter)
        return
    for response, ids in zip(row.responses, whole, strict=True):
        assert row.prompt + response == ids
    assert row.responses[0][0] != row.responses[1][0]  # the prefix is the longest


@given(
    prompt=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    responses=st.lists(
        st.lists(st.integers(3, 300), min_size=1, max_size=8), min_size=2, max_size=4, unique_by=str
    ),
)
def test_ids_are_accepted_as_they_are(byte_level, prompt, responses):
    encoder = tokenize.encoder(byte_level)
    scores = [-float(k) for k in range(len(responses))]
    (row,) = encode(encoder, {"prompt": prompt, "responses": responses, "scores": scores})
    assert isinstance(row, rows.Row)
    assert row.prompt == prompt
    assert row.responses == responses


@given(
    left=st.lists(st.integers(0, 3), max_size=8),
    others=st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=3),
)
def test_common_prefix_against_counting_one_by_one(left, others):
    table = [left, *others]
    length = 0
    while all(len(row) > length for row in table) and len({row[length] for row in table}) == 1:
        length += 1
    assert rows.common_prefix(table) == length


# The traps of peers, by name


def test_trap_begin_token_put_before_each_response(byte_level):
    encoder = tokenize.encoder(byte_level)
    assert byte_level(" yes")["input_ids"][0] == encoder.begin  # the trap is there to fall into
    (row,) = encode(encoder, pair("is it?", " yes", " no"))
    assert all(encoder.begin not in response for response in row.responses)


def test_trap_begin_token_doubled(byte_level):
    encoder = tokenize.encoder(byte_level, control_tokens=True)
    (row,) = encode(encoder, pair("<s>is it?", " yes", " no"))
    assert row.prompt == encoder.prompt("is it?")
    (row,) = encode(encoder, {"chosen": "<s>is it? yes", "rejected": "<s>is it? no"})
    assert row.prompt.count(encoder.begin) == 1


def test_trap_mask_from_pad_drops_the_end_token_where_pad_is_end(no_begin):
    assert no_begin.pad_token_id == no_begin.eos_token_id
    encoder = tokenize.encoder(no_begin)
    (row,) = encode(encoder, pair("is it?", " yes of course it is", " no"))
    batch = collate(
        [row],
        Shape(1, 16, 2, 16),
        numbers=np.zeros(1, np.int32),
        weight=np.ones(1, np.float32),
        pad=no_begin.pad_token_id,
    )
    kept = np.asarray(batch.responses.mask)
    for k in range(2):
        assert batch.responses.ids[0, k][kept[0, k]].tolist() == row.responses[k]
        assert batch.responses.ids[0, k][kept[0, k]][-1] == encoder.end


def test_trap_no_end_token_appended(encoder):
    (row,) = encode(encoder, pair("is it", " yes", " no"))
    assert [response[-1] for response in row.responses] == [encoder.end] * 2


def test_trap_end_token_doubled(encoder):
    encoder = tokenize.encoder(encoder.tokenizer, control_tokens=True)
    (row,) = encode(encoder, pair("is it", " yes</s>", " no"))
    assert row.responses[0] == encoder.response(" yes")


def test_trap_prompt_cut_at_its_end(byte_level):
    encoder = tokenize.encoder(byte_level)
    (row,) = encode(encoder, pair("one two three four", " a", " b"), max_prompt_length=3)
    assert row.prompt[0] == encoder.begin
    assert "one two three four".endswith(encoder.decode(row.prompt))


def test_trap_tokens_merged_across_the_boundary_trl_2054(byte_level):
    # The characters that both texts begin with end in the middle of a token of each: encoding
    # that common text alone gives tokens that neither text has.
    encoder = tokenize.encoder(byte_level)
    chosen, rejected = "The capital of France", "The capital of four"
    common = "The capital of f"
    shared = encoder.prompt("The capital of F")
    assert shared != encoder.prompt(chosen)[: len(shared)]
    (row,) = encode(encoder, {"chosen": chosen, "rejected": rejected})
    assert encoder.decode(row.prompt) in common
    assert encoder.decode(row.prompt + row.responses[0]) == chosen
    assert row.prompt + row.responses[0] == [*encoder.prompt(chosen), encoder.end]
    assert row.prompt + row.responses[1] == [*encoder.prompt(rejected), encoder.end]


@pytest.mark.parametrize(
    "record",
    [
        pair("is it?", "", " no"),
        {"chosen": "is it?", "rejected": "is it? no"},  # nothing after the implicit prompt
        pair([5, 6], [], [7]),
        pair([{"role": "user", "content": "is it?"}], "", "no"),
    ],
)
def test_trap_response_that_is_gone_is_kept(byte_level, record):
    (dropped,) = encode(tokenize.encoder(byte_level), record)
    assert dropped == rows.Dropped("empty response", "record 0")


def test_trap_space_invented_before_a_response(sentence_piece):
    encoder = tokenize.encoder(sentence_piece)
    naive = sentence_piece("sea", add_special_tokens=False)["input_ids"]
    assert encoder.response("sea") != [*naive, encoder.end]
    ids = encoder.prompt("a poem about the ") + encoder.response("sea")
    assert encoder.decode(ids) == "a poem about the sea"


def test_trap_response_of_an_end_token_alone_is_kept(byte_level):
    encoder = tokenize.encoder(byte_level, control_tokens=True)
    (dropped,) = encode(encoder, pair("is it?", " yes", "</s>"))
    assert dropped == rows.Dropped("empty response", "record 0")


# Identical responses and empty prompts


def test_identical_responses_are_dropped_before_and_after_the_cut(byte_level):
    encoder = tokenize.encoder(byte_level)
    items = encode(
        encoder,
        pair("is it?", " yes", " yes"),
        pair("is it?", " one two three", " one two four"),
        pair("is it?", " yes", " no"),
        max_response_length=2,
    )
    assert [getattr(item, "reason", None) for item in items] == [
        "identical responses",
        "identical responses after the cut",
        None,
    ]
    assert items[2].number == 2  # dropped examples are counted


def test_empty_prompt_is_dropped_where_there_is_no_begin_token(byte_level, no_begin):
    record = pair("", "yes", "no")
    assert encode(tokenize.encoder(byte_level), record)[0].prompt == [1]
    (dropped,) = encode(tokenize.encoder(no_begin), record)
    assert dropped.reason == "empty prompt"


# Chat


MESSAGES = [{"role": "user", "content": "is it?"}]


def test_chat_prompt_is_what_transformers_tokenizes(byte_level):
    encoder = tokenize.encoder(byte_level)
    theirs = byte_level.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert encoder.chat_prompt(MESSAGES) == theirs
    (row,) = encode(encoder, pair(MESSAGES, "yes", "no"))
    assert row.prompt == theirs
    full = [*MESSAGES, {"role": "assistant", "content": "yes"}]
    whole = byte_level.apply_chat_template(full)["input_ids"]
    assert row.prompt + row.responses[0] == whole[: len(row.prompt + row.responses[0])]
    assert row.responses[0] == encoder.response("yes")  # closed once, by the template's own token
    assert byte_level.decode(whole[len(row.prompt + row.responses[0]) :]).strip() == ""


def test_chat_of_every_shape_gives_the_same_row(byte_level):
    encoder = tokenize.encoder(byte_level)

    def reply(text):
        return [{"role": "assistant", "content": text}]

    items = encode(
        encoder,
        pair(MESSAGES, reply("yes"), reply("no")),
        pair(MESSAGES, "yes", "no"),
        pair("is it?", reply("yes"), reply("no")),
        pair(MESSAGES, MESSAGES + reply("yes"), MESSAGES + reply("no")),
        {"chosen": MESSAGES + reply("yes"), "rejected": MESSAGES + reply("no")},
    )
    assert len({(str(item.prompt), str(item.responses)) for item in items}) == 1


def test_chat_template_that_does_not_close_the_turn_gets_the_end_token(byte_level):
    import copy

    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoder = tokenize.encoder(tokenizer)
    (row,) = encode(encoder, pair(MESSAGES, "yes", "no"))
    assert row.prompt.count(encoder.begin) == 1  # trap: the template writes one already
    assert row.responses[0] == encoder.response(" yes")


def test_chat_without_template_names_the_remedy(sentence_piece):
    with pytest.raises(InputError, match=r"record 0: .*no chat template.*chat_template"):
        encode(tokenize.encoder(sentence_piece), pair(MESSAGES, "yes", "no"))


def test_chat_template_that_rewrites_the_prompt_is_refused(byte_level):
    import copy

    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}think: {% endif %}{% for m in messages %}{{ m['content'] }}"
        "{% endfor %}"
    )
    with pytest.raises(InputError, match=r"record 0.*generation prompt"):
        encode(tokenize.encoder(tokenizer), pair(MESSAGES, "yes", "no"))


# Input errors


def test_id_outside_the_vocabulary_is_refused(byte_level):
    size = len(byte_level)
    with pytest.raises(InputError, match=rf"record 0: token id {size} is outside .*{size} tokens"):
        encode(tokenize.encoder(byte_level), pair([1, size], [3], [4]))


def test_tokenizer_without_end_token_is_refused(byte_level):
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    with pytest.raises(InputError, match=r"no end token.*eos_token"):
        tokenize.encoder(bare)


def test_no_tokenizer_at_a_path_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing-here.*tokenizer.json"):
        tokenize.load(tmp_path / "nothing-here")


def test_lengths_below_one_token_are_refused(byte_level):
    with pytest.raises(InputError, match="at least 1 token"):
        encode(tokenize.encoder(byte_level), pair("a", "b", "c"), max_prompt_length=0)


# A tokenizer of one's own


def test_trained_tokenizer_is_the_same_again_and_loads_from_its_folder(tmp_path):
    texts = ["hello world, hello sea", "the sea, the sea"] * 4
    made = tokenize.train_tokenizer(texts, vocab_size=280, folder=tmp_path / "a")
    again = tokenize.train_tokenizer(texts, vocab_size=280, folder=tmp_path / "b")
    loaded = tokenize.load(tmp_path / "a")
    prints = {tokenize.encoder(t).fingerprint() for t in (made, again, loaded)}
    assert len(prints) == 1
    other = tokenize.train_tokenizer(texts, vocab_size=270, folder=tmp_path / "c")
    assert tokenize.encoder(other).fingerprint() not in prints
    assert len(other) == 270
    assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)


def test_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(InputError, match="258 is below 259"):
        tokenize.train_tokenizer(["a"], vocab_size=258, folder=tmp_path)


def test_chat_template_changes_the_fingerprint(byte_level):
    import copy

    other = copy.deepcopy(byte_level)
    other.chat_template = "{{ messages[0]['content'] }}"
    one, two = tokenize.encoder(byte_level), tokenize.encoder(other)
    assert one.fingerprint() != two.fingerprint()


def test_real_tokenizer_reads_as_the_text(stories_model):
    encoder = tokenize.encoder(tokenize.load(stories_model))
    assert (encoder.begin, encoder.end) == (1, 2)
    ids = encoder.prompt("Once upon a time ") + encoder.response("there was a dog.")
    assert encoder.decode(ids) == "Once upon a time there was a dog."
