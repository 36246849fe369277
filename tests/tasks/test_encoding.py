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
from phatgoose.errors import TaskError
from phatgoose.sites import Positions
from phatgoose.tasks.encoding import Cut, Cuts, Encoder
from phatgoose.tasks.task import Chat
from tiny import make_tokenizer, with_added

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


@pytest.fixture(params=[CAUSAL, T5], ids=["causal", "t5"])
def encoder(request):
    return make_encoder(request.param)


@pytest.mark.parametrize("text", ["Is it so?", "ends in a space ", "äöü €", ""])
def test_a_prompt_has_the_same_tokens_whatever_answer_follows(encoder, text):
    prompts = [encoder.pair(text, target).prompt for target in ("yes", " no", "e", "é")]
    assert prompts == [encoder.prompt(text)] * 4


KEPT = {"middle": "ahij", "left": "ghij", "right": "abcd"}  # of "abcdefghij", to four tokens
each_cut = pytest.mark.parametrize("truncation", KEPT)


@each_cut
@pytest.mark.parametrize("is_encoder_decoder", [CAUSAL, T5])
def test_what_the_tokenizer_adds_survives_a_cut(is_encoder_decoder, truncation):
    tokenizer = with_added(["<bos>"], ["</s>"])
    formatting = Formatting(max_input_tokens=6 if is_encoder_decoder else 5, truncation=truncation)
    encoder = Encoder(tokenizer, is_encoder_decoder=is_encoder_decoder, formatting=formatting)
    end = "</s>" if is_encoder_decoder else ""
    assert text_of(encoder, encoder.prompt("abcdefghij")) == f"<bos>{KEPT[truncation]}{end}"


def test_a_chat_template_wraps_the_input_and_is_never_cut():
    pair = make_encoder(template=CHAT, chat=True).pair("hello", "hi")
    short = make_encoder(template=CHAT, chat=True, max_input_tokens=4)
    wrapped = ("<u>hello</u><a>", "hi</s>", "<u>hllo</u><a>")
    found = [pair.prompt, pair.target, short.prompt("hello")]
    assert tuple(text_of(short, tokens) for tokens in found) == wrapped


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
    assert encoder.pair(text, "something else").prompt == pair.prompt
    following = joined[len(text) :]
    assert encoder.continuation(text, following) == pair.target[:-1]


@cache
def chatting(final_eos: bool) -> PreTrainedTokenizerFast:
    """Made once: each tokenizer has a process of its own for its template."""
    tokenizer = make_tokenizer(final_eos=final_eos)
    tokenizer.chat_template = CHAT
    return tokenizer


def placed(
    positions: Positions, *, is_encoder_decoder: bool = CAUSAL, **formatting: object
) -> Encoder:
    return Encoder(
        chatting(is_encoder_decoder),
        is_encoder_decoder=is_encoder_decoder,
        formatting=Formatting(**formatting),
        positions=positions,
    )


@pytest.mark.parametrize(
    ("encoder", "target", "wanted", "cut", "target_cut"),
    [  # a causal model's answer takes positions of its input: a space and </s> too
        (placed(Positions(12, 12)), "yes", "aghijkl yes</s>", Cut(7, 5), None),
        (
            placed(Positions(9, 6), is_encoder_decoder=T5),
            "yes",
            "abghijkl</s>yes</s>",
            Cut(9, 4),
            None,
        ),
        (placed(Positions(8, 8)), "0123456789", "l 01234</s>", Cut(1, 11), Cut(7, 5)),
        (placed(Positions(18, 18), chat=True), "y", "<u>ahijkl</u><a>y</s>", Cut(6, 6), None),
    ],
    ids=["causal", "t5", "target", "chat"],
)
def test_what_exceeds_the_base_s_positions_is_cut(encoder, target, wanted, cut, target_cut):
    pair = encoder.pair("abcdefghijkl", target)
    assert text_of(encoder, pair.prompt) + text_of(encoder, pair.target) == wanted
    assert pair.cut == cut
    assert pair.target_cut == target_cut


SAID = Chat(
    [("system", "brief"), ("user", "abcdefghijkl"), ("assistant", "no"), ("user", "uvwxyz")]
)
ROLES = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"


@pytest.mark.parametrize(
    ("encoder", "wanted", "cut"),
    [
        (make_encoder(template=ROLES), "<s>brief<u>abcdefghijkl<a>no<u>uvwxyz<a>", None),
        (
            make_encoder(template=ROLES, max_input_tokens=17),
            "<s>brief<u>aijkl<a>no<u>uwxyz<a>",  # both longest turns lose their middle
            Cut(17, 8),
        ),
        (
            make_encoder(template=ROLES, max_input_tokens=17, truncation="right"),
            "<s>brief<u>abcde<a>no<u>uvwxy<a>",
            Cut(17, 8),
        ),
    ],
)
def test_a_chat_is_read_through_the_base_s_template_whatever_the_formatting(encoder, wanted, cut):
    pair = encoder.pair(SAID, "yes")
    assert text_of(encoder, pair.prompt) == wanted
    assert text_of(encoder, pair.target) == "yes</s>"
    assert pair.cut == cut
    plain = encoder.pair(str(SAID), "yes")
    assert text_of(encoder, plain.prompt).startswith("<u>" if encoder.formatting.chat else "bri")


@given(st.text("aé日😀 ", min_size=1, max_size=60), st.sampled_from(["left", "middle", "right"]))
def test_what_was_cut_inside_a_character_still_fits(text, truncation):
    """A token is a byte here, and a broken character is read again as three."""
    encoder = placed(Positions(36, 36), chat=True, truncation=truncation)
    for asked in (text, Chat([("user", text), ("assistant", "ok"), ("user", text[::-1])])):
        assert encoder.pair(asked, "y").length <= 36


def test_bases_that_can_t_read_a_text_are_refused():
    with pytest.raises(
        TaskError, match=r"no chat template; .* \|\|\| {{ messages\[-1\].content }}"
    ):
        make_encoder().pair(SAID, "yes")
    with pytest.raises(TaskError, match="no chat template"):
        make_encoder(chat=True).pair("Hello", "yes")
    with pytest.raises(TaskError, match="has 8 positions, and the answer takes 8 of them"):
        placed(Positions(8, 8)).fitted("abc", followed_by=8)


def some(cut: int, inputs: int) -> Cuts:
    return Cuts([Cut(512, 80 + i) for i in range(cut)] + [None] * (inputs - cut))


@pytest.mark.parametrize(
    ("cuts", "logged", "warned"),
    [
        (some(12, 400), "it: 12 of 400 inputs (3 %) cut to 512 tokens, by 86 in the median", None),
        (some(40, 400), None, "it: 40 of 400 inputs (10 %) cut to 512 tokens, by 100 in the m"),
        (some(0, 400), None, None),
        (Cuts(), None, None),
        (
            Cuts([None] * 100, targets=[Cut(8, 3), Cut(8, 5), *[None] * 98]),
            None,
            "it: 2 of 100 targets (2 %) cut to 8 tokens, by 4 in the median.",
        ),
    ],
)
def test_what_was_cut_is_logged_and_from_a_tenth_on_warned_of(cuts, logged, warned, caplog):
    with caplog.at_level(logging.INFO, "phatgoose"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cuts.report("it")
    for found, wanted in ((caplog.messages, logged), ([str(w.message) for w in told], warned)):
        assert [text[: len(wanted or "")] for text in found] == ([wanted] if wanted else [])
