"""Prompt statistics: what the base makes of prompts, and how an expert shares it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.experts.statistics import prompt_states, readings_of
from phatgoose.tasks.batching import read_prompts

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 8]]


@pytest.mark.parametrize("budget", [1, 1024])
def test_prompts_are_read_as_each_alone(base, budget, monkeypatch):
    monkeypatch.setattr("phatgoose.tasks.batching.BATCH_TOKENS", budget)
    read = read_prompts(base.model.eval(), PROMPTS, prompt_states(base.model))
    stack = base.model
    if stack.config.is_encoder_decoder:
        stack = stack.get_encoder()
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            output = stack(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        states = torch.cat(output.hidden_states[1:-1])  # [blocks, tokens, d]; the last is normed
        torch.testing.assert_close(read[row][:-1], states.mean(dim=1), atol=1e-5, rtol=1e-4)
        assert read.shape[1] == len(states) + 1


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 20), st.integers(0, 99))
def test_the_covariance_that_is_shared_has_the_true_variances(prompts, size, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(prompts, 2, size, generator=generator) * torch.arange(1, size + 1)
    shared = readings_of(values, rank)
    factor, rest = shared["whole.factor"].double(), shared["whole.rest"].double()
    covariance = factor.transpose(1, 2) @ factor + torch.diag_embed(rest)  # as docs/format.md says
    for block in range(2):
        wanted = torch.cov(values[:, block].double().T, correction=0).reshape(size, size)
        error = covariance[block] - wanted
        assert error.diagonal().abs().max() <= 1e-4 * wanted.diagonal().max() + 1e-9
        # What is lost is what the weaker directions add off the diagonal.
        strengths = torch.linalg.eigvalsh(wanted).flip(0).clamp(min=0)
        assert error.norm() <= 2 * strengths[rank:].sum() + 1e-4 * wanted.norm() + 1e-9
