"""Texts: prompts as a model reads them, announced one by one."""

from __future__ import annotations

import pytest

from phatgoose.errors import TaskError
from phatgoose.routing.compose import compose
from phatgoose.routing.export.shares import (
    ANSWER_TOKENS,
    neutral_texts,
    passing,
    prompt_texts,
    read_texts,
)


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_a_decoder_reads_the_models_own_answer(base, kind, pool):
    model = compose(pool, base, k=2)
    texts = prompt_texts(["to be", "or not to be"])
    inputs = read_texts(model, base.tokenizer, texts)
    for each, text in zip(inputs, texts.examples, strict=True):
        assert each["input_ids"][0].tolist() == base.tokenizer(text.input)["input_ids"]
        assert ("decoder_input_ids" in each) is (kind == "t5")
    if kind == "t5":
        start = model.config.decoder_start_token_id
        for each in inputs:
            answer = each["decoder_input_ids"][0]
            assert answer[0] == start
            assert 1 <= len(answer) <= ANSWER_TOKENS
    assert list(passing(model, texts, inputs)) == inputs


def test_an_empty_prompt_is_refused_and_neutral_text_is_there():
    with pytest.raises(TaskError, match="empty"):
        prompt_texts(["a", ""])
    assert all(each.input for each in neutral_texts().examples)
