"""Tokens become text again, one piece for each."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from batched import TOKENIZER
from phatgoose.base import UNFINISHED, Detokeniser, texts_of


@given(st.text(max_size=30), st.text(max_size=10))
@settings(max_examples=25)
def test_pieces_make_the_text_that_all_tokens_make(text, before):
    detokeniser = Detokeniser(TOKENIZER, TOKENIZER(before)["input_ids"])
    pieces = [detokeniser.add(token) for token in TOKENIZER(text)["input_ids"]]
    assert "".join(pieces) + detokeniser.rest() == text


def test_bytes_that_are_no_text_are_given_up():
    detokeniser = Detokeniser(TOKENIZER)
    (lead,) = TOKENIZER("é")["input_ids"][:1]
    pieces = [detokeniser.add(lead) for _ in range(40)]
    assert "\ufffd" in "".join(pieces)
    assert detokeniser.rest().strip("\ufffd") == ""


def test_each_token_keeps_the_space_before_its_word():
    """With a tokenizer like T5's and Llama-2's, whose tokens say where a word begins."""
    fast = Tokenizer(WordLevel({"</s>": 0, "▁A": 1, "▁her": 2, "on": 3, "▁is": 4}, "</s>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    assert texts_of(tokenizer, [1, 2, 3, 4, 0]) == ("A", " her", "on", " is", "</s>")


@given(st.text(st.sampled_from("ab .é😀"), max_size=8))
@settings(max_examples=25)
def test_the_last_token_of_a_character_shows_it(text):
    texts = texts_of(TOKENIZER, TOKENIZER(text)["input_ids"])
    assert "".join(each for each in texts if each != UNFINISHED) == text
