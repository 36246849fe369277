"""Batches: padded or packed within their budget, logits of targets only, and greedy answers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from architectures import make_tiny
from phatgoose.tasks.batching import (
    BranchedText,
    batches_of_tokens,
    can_pack,
    continued,
    end_tokens,
    pack_rows,
    packed_batches,
)
from tiny import logits_of, make_model


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 120), st.sampled_from([None, 9]))
def test_batches_visit_each_row_once_within_the_budget(lengths, budget, padding):
    batches = list(batches_of_tokens(lengths, budget, padding))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1
        every = [lengths[index] for index in batch]
        assert padding is None or max(every) <= 2 * min(every) + padding


TEXTS = (
    BranchedText([5, 6, 7], [[8, 9], [10], []]),
    BranchedText([11]),
    BranchedText([12, 13], [[14, 15, 16]]),
    BranchedText([17, 18, 19, 20, 21]),
)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 300))
def test_every_text_is_in_one_batch_and_none_exceeds_the_budget(lengths, budget):
    batches = list(packed_batches(lengths, budget))
    visited = [index for rows in batches for row in rows for index in row]
    assert sorted(visited) == list(range(len(lengths)))
    for rows in batches:
        assert all(rows)
        columns = max(sum(lengths[index] for index in row) for row in rows)
        assert len(rows) * columns <= budget or len(rows) == len(rows[0]) == 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_logits_are_those_of_each_text_alone(kind, implementation):
    model = make_model(kind)
    model.set_attn_implementation(implementation)
    packed = pack_rows([[TEXTS[0], TEXTS[1]], [TEXTS[2], TEXTS[3]]], 0, torch.float32)
    with torch.no_grad():
        logits = model(**packed.inputs, use_cache=False).logits.flatten(0, 1)
        for text, start in zip(TEXTS, packed.starts.tolist(), strict=True):
            stem = len(text.stem)
            at = start + stem
            for branch in text.branches or [[]]:
                alone = model(torch.tensor([[*text.stem, *branch]])).logits[0]
                together = torch.cat([logits[start : start + stem], logits[at : at + len(branch)]])
                torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
                at += len(branch)


def test_models_are_packed_only_where_every_layer_obeys_the_mask():
    assert all(can_pack(make_model(kind)) for kind in ("llama", "gpt2", "qwen2"))
    assert not can_pack(make_model("t5"))
    assert not can_pack(make_tiny("mistral", sliding_window=4))
    assert can_pack(make_tiny("mistral", sliding_window=None))
    other = make_model("llama")
    other.config._attn_implementation = "flex_attention"
    assert not can_pack(other)


PENALTIES = {"repetition_penalty": 1.3, "suppress_tokens": [0, *range(3, 100)], "num_beams": 3}
PENALTIES |= {"stop_strings": ["a"], "guidance_scale": 2.0, "do_sample": True, "max_length": 4}
PENALTIES |= {"min_new_tokens": 9, "forced_eos_token_id": 150, "return_dict_in_generate": True}


def by_argmax(base, ids, tokens):
    """The likeliest token after all before it, again and again, until one ends the answer."""
    answer = [0] if base.is_encoder_decoder else ids[0].tolist()
    for _ in range(tokens):
        given = {"decoder_input_ids": torch.tensor([answer])} if base.is_encoder_decoder else {}
        logits = logits_of(base.model, ids if given else torch.tensor([answer]), **given)
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == 1:
            break
    return answer[1 if base.is_encoder_decoder else ids.shape[1] :]


@pytest.mark.parametrize("ends", [1, [1], None])
def test_greedy_takes_the_likeliest_token_whatever_the_base_would_have(base, ends):
    ids = torch.tensor([base.tokenizer("to be or not")["input_ids"]])
    wanted = by_argmax(base, ids, 20)
    base.model.generation_config = GenerationConfig(**PENALTIES, eos_token_id=ends)
    before = base.model.generation_config.to_dict()
    answer = continued(base.model, base.tokenizer, ids, torch.ones_like(ids), 20)
    assert answer[0].tolist() == wanted
    assert base.model.generation_config.to_dict() == before


def test_an_answer_ends_where_the_base_says_or_else_its_tokenizer(llama):
    llama.model.generation_config.eos_token_id = None
    assert end_tokens(llama.model, llama.tokenizer) == [1]
    llama.model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(llama.model, llama.tokenizer) == [5, 6]
