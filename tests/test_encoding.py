"""Prompts and targets as tokens, cut where asked, and batches within their budget."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tokenizer
from phatgoose.config import Formatting
from phatgoose.encoding import Encoder, batches_of_tokens, pad_left, pad_right, position_ids
from phatgoose.errors import TaskError

EOS = 1
CHAT = (
    "{% for message in messages %}<u>{{ message.content }}</u>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
CAUSAL, T5 = False, True


def make_encoder(
    is_encoder_decoder: bool = CAUSAL, *, template: str | None = None, **formatting: object
) -> Encoder:
    tokenizer = make_tokenizer(final_eos=is_encoder_decoder)
    tokenizer.chat_template = template
    return Encoder(
        tokenizer, is_encoder_decoder=is_encoder_decoder, formatting=Formatting(**formatting)
    )


def text_of(encoder: Encoder, tokens: list[int]) -> str:
    return encoder.tokenizer.decode(tokens)


@pytest.fixture(params=[CAUSAL, T5], ids=["causal", "t5"])
def encoder(request):
    return make_encoder(request.param)


@pytest.mark.parametrize("text", ["Is it so?", "ends in a space ", "äöü €", ""])
def test_a_prompt_has_the_same_tokens_whatever_answer_follows(encoder, text):
    prompts = [encoder.pair(text, target).prompt for target in ("yes", " no", "e", "é")]
    assert prompts == [encoder.prompt(text)] * 4


def test_a_target_ends_with_the_end_of_sequence_and_has_it_once(encoder):
    target = encoder.target("Is it so?", "yes")
    assert target[-1] == EOS
    assert target.count(EOS) == 1


def test_a_pair_knows_its_length(encoder):
    pair = encoder.pair("abc", "de")
    assert pair.length == len(encoder.prompt("abc")) + len(encoder.target("abc", "de"))


def test_a_causal_target_is_set_off_by_a_space():
    encoder = make_encoder(CAUSAL)
    pair = encoder.pair("Answer:", "yes")
    assert text_of(encoder, pair.prompt + pair.target) == "Answer: yes</s>"


@pytest.mark.parametrize("ending", [" ", "\n"])
def test_a_prompt_that_ends_in_white_space_is_followed_at_once(ending):
    encoder = make_encoder(CAUSAL)
    pair = encoder.pair("Answer:" + ending, "yes")
    assert text_of(encoder, pair.prompt + pair.target) == f"Answer:{ending}yes</s>"


def test_t5_reads_its_prompt_with_a_final_end_of_sequence_and_its_target_without_a_space():
    encoder = make_encoder(T5)
    pair = encoder.pair("Answer:", "yes")
    assert text_of(encoder, pair.prompt) == "Answer:</s>"
    assert text_of(encoder, pair.target) == "yes</s>"


def test_long_inputs_are_cut_on_the_right():
    encoder = make_encoder(CAUSAL, max_input_tokens=4)
    assert text_of(encoder, encoder.prompt("abcdefgh")) == "abcd"


def test_cutting_a_t5_input_keeps_its_final_end_of_sequence():
    encoder = make_encoder(T5, max_input_tokens=4)
    assert text_of(encoder, encoder.prompt("abcdefgh")) == "abc</s>"


@pytest.mark.parametrize("is_encoder_decoder", [CAUSAL, T5])
def test_inputs_that_just_fit_stay_whole(is_encoder_decoder):
    whole = make_encoder(is_encoder_decoder).prompt("abcdef")
    exact = make_encoder(is_encoder_decoder, max_input_tokens=len(whole))
    assert exact.prompt("abcdef") == whole


@pytest.mark.parametrize("text", ["abcd", "abcdef"])
def test_cutting_a_target_warns_and_keeps_the_end_of_sequence(text):
    encoder = make_encoder(T5, max_target_tokens=4)
    told = rf"A target of {len(text) + 1} tokens was cut to 4 .*'{text}'"
    with pytest.warns(UserWarning, match=told):
        target = encoder.target("x", text)
    assert text_of(encoder, target) == "abc</s>"


def test_a_target_that_just_fits_does_not_warn():
    encoder = make_encoder(T5, max_target_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text_of(encoder, encoder.target("x", "abc")) == "abc</s>"


def test_a_chat_template_wraps_the_input_when_asked_for():
    encoder = make_encoder(template=CHAT, chat=True)
    pair = encoder.pair("hello", "hi")
    assert text_of(encoder, pair.prompt) == "<u>hello</u><a>"
    assert text_of(encoder, pair.target) == "hi</s>"


def test_a_chat_template_is_left_alone_when_not_asked_for():
    encoder = make_encoder(template=CHAT)
    assert text_of(encoder, encoder.prompt("hello")) == "hello"


def test_cutting_a_chat_input_cuts_the_text_and_not_the_template():
    encoder = make_encoder(template=CHAT, chat=True, max_input_tokens=3)
    assert text_of(encoder, encoder.prompt("hello")) == "<u>hel</u><a>"


def test_chat_without_a_template_is_refused():
    with pytest.raises(TaskError, match="no chat template"):
        make_encoder(chat=True)


def test_a_tokenizer_without_an_end_of_sequence_is_refused():
    tokenizer = make_tokenizer(final_eos=False)
    tokenizer.eos_token = None
    with pytest.raises(TaskError, match="no end-of-sequence token"):
        Encoder(tokenizer, is_encoder_decoder=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 120))
def test_batches_visit_each_row_once_within_the_budget(lengths, budget):
    batches = list(batches_of_tokens(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1


def test_batches_hold_rows_of_similar_length_longest_first():
    assert list(batches_of_tokens([1, 9, 2, 10], 20)) == [[3, 1], [2, 0]]


def test_rows_are_padded_on_the_side_that_was_asked_for():
    assert pad_left([[5], [6, 7]], 0).tolist() == [[0, 5], [6, 7]]
    assert pad_right([[5], [6, 7]], 0).tolist() == [[5, 0], [6, 7]]


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    positions = position_ids(mask)
    assert positions[0, 2:].tolist() == [0, 1]
    assert positions[1, :3].tolist() == [0, 1, 2]
    assert positions[2].tolist() == [0, 1, 2, 3]
    assert (positions >= 0).all()
