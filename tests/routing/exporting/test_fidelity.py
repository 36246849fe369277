"""Fidelity: the differences that are told are those of the logits."""

from __future__ import annotations

import pytest
import torch

from phatgoose.base.sites import replaced
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.export.export import fidelity
from phatgoose.routing.export.shares import prompt_texts
from tiny import logits_of


def test_differences_are_means_over_all_tokens_and_the_vocabulary(llama, llama_pool):
    model = compose(llama_pool, llama, k=2)
    base = {site: layer.base for site, layer in composition_of(model).layers.items()}
    texts = prompt_texts(["to be", "or not to be"])
    told = fidelity(model, llama.tokenizer, base, texts)
    wanted, got = [], []
    for text in texts.examples:
        ids = torch.tensor([llama.tokenizer(text.input)["input_ids"]])
        wanted.append(logits_of(model, ids)[0])
        with replaced(model, base):
            got.append(logits_of(model, ids)[0])
    one, other = torch.cat(wanted), torch.cat(got)
    assert told.texts == "the prompt"
    assert told.tokens == len(one)
    assert told.difference == pytest.approx(float((one - other).abs().mean()), rel=1e-5)
    assert told.agreement == pytest.approx(
        float((one.argmax(-1) == other.argmax(-1)).float().mean())
    )
    layers = composition_of(model).layers
    same = fidelity(model, llama.tokenizer, layers, texts)
    assert (same.difference, same.agreement) == (0, 1)
