"""Prompts and targets as tokens, cut if asked, and what is said of cuts."""

import logging
import warnings
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from phatgoose.config import Formatting
from phatgoose.errors import BaseModelError, TaskError
from phatgoose.tasks.encoding import Cuts, Encoder, said_in_tokens
from phatgoose.tasks.task import Chat
from tiny import make_tokenizer, with_added

CHAT = (
    "{% for message in messages %}<u>{{ message.content }}</u>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
ROLES = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"
CAUSAL, T5 = False, True


@cache
def tokenizer_of(is_encoder_decoder: bool, template: str | None) -> PreTrainedTokenizerFast:
    """Made once: each tokenizer has a process of its own for its template."""
    tokenizer = make_tokenizer(final_eos=is_encoder_decoder)
    tokenizer.chat_template = template
    return tokenizer


def make_encoder(
    is_encoder_decoder: bool = CAUSAL,
    *,
    template: str | None = CHAT,
    positions: int | None = None,
    **formatting: object,
) -> Encoder:
    return Encoder(
        tokenizer_of(is_encoder_decoder, template),
        is_encoder_decoder=is_encoder_decoder,
        formatting=Formatting(**formatting),
        positions=positions,
    )


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's first tokenizers: a text begins with a space whatever stands there, and a space
    is a part of the word after it."""
    letters = {letter: -9.0 for letter in "abcdefghijklmnopqrstuvwxyzA:\n"}
    words = {"▁": -4.0, "▁yes": -5.0, "yes": -5.5, "▁no": -5.0, "no": -5.5}
    scores = {"<unk>": -99.0, "<s>": 0.0, "</s>": 0.0, **letters, **words}
    inner = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def byte_pairs() -> PreTrainedTokenizerFast:
    """As GPT-2's: a space is a part of the word after it, and two line breaks are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("e", "s"), ("y", "es"), ("Ġ", "yes"), ("Ċ", "Ċ")]
    vocabulary = {"</s>": 0} | {letter: 1 + i for i, letter in enumerate(alphabet)}
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def text_of(encoder: Encoder, tokens: list[int]) -> str:
    return encoder.tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("truncation", "kept"), [("middle", "ahij"), ("left", "ghij"), ("right", "abcd")]
)
@pytest.mark.parametrize("is_encoder_decoder", [CAUSAL, T5])
def test_what_the_tokenizer_adds_survives_a_cut(is_encoder_decoder, truncation, kept):
    tokenizer = with_added(["<bos>"], ["</s>"])
    formatting = Formatting(max_input_tokens=6 if is_encoder_decoder else 5, truncation=truncation)
    encoder = Encoder(tokenizer, is_encoder_decoder=is_encoder_decoder, formatting=formatting)
    end = "</s>" if is_encoder_decoder else ""
    assert text_of(encoder, encoder.prompt("abcdefghij")) == f"<bos>{kept}{end}"


@pytest.mark.parametrize("make", [sentencepiece, byte_pairs])
@pytest.mark.parametrize(
    "text", ["A: is it", "A:\n", "A:\nis it\n", "A: ", "A:  ", "it is so " * 9]
)
@pytest.mark.parametrize("target", ["yes", "no, yes"])
def test_prompt_and_target_are_tokenised_as_the_text_of_both(make, text, target):
    tokenizer = make()
    encoder = Encoder(tokenizer, is_encoder_decoder=False)
    pair = encoder.pair(text, target)
    joined = text + target if text[-1:].isspace() else f"{text} {target}"
    assert pair.prompt + pair.target[:-1] == tokenizer(joined)["input_ids"]
    assert encoder.pair(text, "something else").prompt == pair.prompt == encoder.prompt(text)
    following = joined[len(text) :]
    assert encoder.continuation(text, following) == pair.target[:-1]


@pytest.mark.parametrize(
    ("encoder", "target", "wanted", "cut", "target_cut"),
    [  # a causal model's answer takes positions of its input: a space and </s> too
        (make_encoder(positions=12), "yes", "aghijkl yes</s>", 7, None),
        (make_encoder(T5, positions=9), "yes", "abghijkl</s>yes</s>", 9, None),
        (make_encoder(positions=8), "0123456789", "l 01234</s>", 1, 7),
        # a template is never cut, and isn't counted where no position is short
        (make_encoder(positions=18, chat=True), "y", "<u>ahijkl</u><a>y</s>", 6, None),
        (make_encoder(chat=True, max_input_tokens=4), "y", "<u>ajkl</u><a>y</s>", 4, None),
    ],
    ids=["causal", "t5", "target", "chat", "asked"],
)
def test_what_exceeds_the_base_s_positions_is_cut(encoder, target, wanted, cut, target_cut):
    pair = encoder.pair("abcdefghijkl", target)
    assert text_of(encoder, pair.prompt) + text_of(encoder, pair.target) == wanted
    assert (pair.cut, pair.target_cut) == (cut, target_cut)


SAID = Chat(
    [("system", "brief"), ("user", "abcdefghijkl"), ("assistant", "no"), ("user", "uvwxyz")]
)


@pytest.mark.parametrize(
    ("formatting", "wanted", "cut"),
    [
        ({}, "<s>brief<u>abcdefghijkl<a>no<u>uvwxyz<a>", None),
        # both longest turns lose their middle
        ({"max_input_tokens": 17}, "<s>brief<u>aijkl<a>no<u>uwxyz<a>", 17),
        (
            {"max_input_tokens": 17, "truncation": "right"},
            "<s>brief<u>abcde<a>no<u>uvwxy<a>",
            17,
        ),
    ],
)
def test_a_chat_is_read_through_the_base_s_template_whatever_the_formatting(
    formatting, wanted, cut
):
    encoder = make_encoder(template=ROLES, **formatting)
    pair = encoder.pair(SAID, "yes")
    assert (text_of(encoder, pair.prompt), pair.cut) == (wanted, cut)
    assert text_of(encoder, pair.target) == "yes</s>"
    assert text_of(encoder, encoder.prompt(str(SAID))).startswith("bri")


@given(st.text("aé日😀 ", min_size=1, max_size=60), st.sampled_from(["left", "middle", "right"]))
def test_what_was_cut_inside_a_character_still_fits(text, truncation):
    """A token is a byte here, and a broken character is read again as three."""
    encoder = make_encoder(positions=36, chat=True, truncation=truncation)
    for asked in (text, Chat([("user", text), ("assistant", "ok"), ("user", text[::-1])])):
        assert encoder.pair(asked, "y").length <= 36


CHATML = (
    "{% if messages[0].role != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
INST = (  # no system prompts, and turns that alternate
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
TURNS = [("user", "5 + 6 = ?"), ("assistant", "11, I say\n\nnot 12"), ("user", "And 5 + 7 = ?")]


@pytest.mark.parametrize("is_encoder_decoder", [CAUSAL, T5])
@pytest.mark.parametrize("template", [CHAT, ROLES, CHATML, INST])
@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (TURNS[:1], "5 + 6 = ?"),
        (TURNS, "And 5 + 7 = ?"),
        ([("user", "Of two paragraphs:\n\n日本 and é")], "Of two paragraphs:\n\n日本 and é"),
        ([("system", "Be short."), *TURNS], "And 5 + 7 = ?"),
    ],
)
def test_of_the_tokens_of_a_chat_the_last_message_is_read(
    is_encoder_decoder, template, turns, said
):
    if template == INST and turns[0][0] == "system":
        pytest.skip("no system prompts")
    tokens = make_encoder(is_encoder_decoder, template=template).prompt(Chat(turns))
    assert said_in_tokens(tokenizer_of(is_encoder_decoder, template), tokens) == said


@pytest.mark.parametrize("make", [sentencepiece, byte_pairs])
def test_tokens_of_a_chat_are_read_whatever_the_tokenizer_adds(make):
    tokenizer = make()
    tokenizer.chat_template = INST.replace("[INST]", "</s>I:").replace("[/INST]", "A:")
    turns = [("user", "no"), ("assistant", "yes"), ("user", "is it so")]
    tokens = Encoder(tokenizer, is_encoder_decoder=False).prompt(Chat(turns))
    assert said_in_tokens(tokenizer, tokens).strip() == "is it so"


@pytest.mark.parametrize(
    "template", [None, CHAT, CHATML, "{% for m in messages %}{{ m.content }}{% endfor %}"]
)
@pytest.mark.parametrize("is_encoder_decoder", [CAUSAL, T5])
def test_of_other_tokens_the_text_is_read(is_encoder_decoder, template):
    tokenizer = tokenizer_of(is_encoder_decoder, template)
    text = "Is <u> a tag?\n\nYes, 日本"
    tokens = tokenizer(text)["input_ids"]
    assert said_in_tokens(tokenizer, tokens) == text
    assert said_in_tokens(tokenizer, [0, *tokens, 1, 1]) == text  # without special ones
    assert said_in_tokens(tokenizer, []) == ""


def test_a_template_that_tells_messages_by_nothing_leaves_all_that_was_said():
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    encoder = make_encoder(template=template)
    tokens = encoder.prompt(Chat(TURNS))
    assert said_in_tokens(encoder.tokenizer, tokens) == text_of(encoder, tokens)


def test_another_template_is_read_from_then_on():
    tokenizer = make_tokenizer(final_eos=False)
    for template in (CHAT, CHATML):
        tokenizer.chat_template = template
        tokens = Encoder(tokenizer, is_encoder_decoder=False).prompt(Chat(TURNS))
        assert said_in_tokens(tokenizer, tokens) == "And 5 + 7 = ?"


def test_a_target_needs_an_end_of_text():
    tokenizer = make_tokenizer(final_eos=False)
    tokenizer.eos_token = None
    with pytest.raises(BaseModelError, match="whose end of text a target needs"):
        Encoder(tokenizer, is_encoder_decoder=False).target("a", "b")


def test_bases_that_can_t_read_a_text_are_refused():
    for text, chat in ((SAID, False), ("Hello", True)):
        with pytest.raises(BaseModelError, match="no default chat template"):
            make_encoder(template=None, chat=chat).pair(text, "yes")
    for kind, template in ((CAUSAL, "{{ 1 }}"), (CAUSAL, "{{ messages[0].content }}"), (T5, CHAT)):
        with pytest.raises(BaseModelError, match="no chat template to write prompts in; give some"):
            make_encoder(kind, template=template).around_message()
    encoder = make_encoder(template=" <u> {{ messages[0].content }} \n</u> \n<a>")
    start, line = encoder.around_message()
    assert (text_of(encoder, start), line) == (" <u>", "</u>")
    with pytest.raises(TaskError, match="has 8 positions, and the answer takes 8 of them"):
        make_encoder(positions=8).fitted("abc", followed_by=8)


@pytest.mark.parametrize(
    ("cuts", "logged", "warned"),
    [
        (Cuts([512] * 12 + [None] * 388), "it: 12 of 400 inputs cut to 512 tokens", None),
        (Cuts([512] * 40 + [None] * 360), None, "it: 40 of 400 inputs cut to 512 tokens"),
        (Cuts(), None, None),
        (Cuts([None], targets=[8, 8]), None, "it: 2 of 2 targets cut to 8"),
    ],
)
def test_what_was_cut_is_logged_and_from_a_tenth_on_warned_of(cuts, logged, warned, caplog):
    with caplog.at_level(logging.INFO, "phatgoose"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cuts.report("it")
    for texts, wanted in ((caplog.messages, logged), ([str(w.message) for w in told], warned)):
        assert [text[: len(wanted or "")] for text in texts] == ([wanted] if wanted else [])
