"""Readings: what the base makes of prompts, and how an expert shares it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from changed_experts import make
from phatgoose.errors import ExpertError
from phatgoose.experts.expert import Expert
from phatgoose.experts.statistics import PLACES, RANK, PromptStates, readings_of
from phatgoose.tasks.prompt_passes import read_prompts

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 8]]


def made_readings(blocks: int = 2, size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Readings of five random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return readings_of(torch.randn(5, len(PLACES), blocks, size, generator=generator))


def covariance(readings, place: str) -> torch.Tensor:
    """The covariance that readings share of a place, as docs/format.md has it, [blocks, d, d]."""
    factor = readings[f"{place}.factor"].double()
    return factor.transpose(1, 2) @ factor + torch.diag_embed(readings[f"{place}.rest"].double())


def read_by(model) -> torch.Tensor:
    return read_prompts(model.eval(), PROMPTS, PromptStates(model))


@pytest.mark.parametrize("budget", [1, 8, 1024])
def test_prompts_are_read_as_each_alone(base, budget, monkeypatch):
    monkeypatch.setattr("phatgoose.tasks.prompt_passes.BATCH_TOKENS", budget)
    read = read_by(base.model)
    stack = base.model
    if stack.config.is_encoder_decoder:
        stack = stack.get_encoder()
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            output = stack(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        states = torch.cat(output.hidden_states[1:-1])  # [blocks, tokens, d]; the last is normed
        wanted = torch.stack([states[:, -1], states.mean(dim=1)])
        torch.testing.assert_close(read[row][:, :-1], wanted, atol=1e-5, rtol=1e-4)
        assert read.shape[2] == len(states) + 1


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 20), st.integers(0, 99))
def test_the_covariance_that_is_shared_has_the_true_variances(prompts, size, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(prompts, 2, size, generator=generator) * torch.arange(1, size + 1)
    shared = covariance(readings_of(torch.stack([values, -values], dim=1), rank), "whole")
    for block in range(2):
        wanted = torch.cov(values[:, block].double().T, correction=0).reshape(size, size)
        error = shared[block] - wanted
        assert error.diagonal().abs().max() <= 1e-4 * wanted.diagonal().max() + 1e-9
        # What is lost is what the weaker directions add off the diagonal.
        strengths = torch.linalg.eigvalsh(wanted).flip(0).clamp(min=0)
        assert error.norm() <= 2 * strengths[rank:].sum() + 1e-4 * wanted.norm() + 1e-9


def test_readings_are_saved_and_checked(adapter, tmp_path):
    readings = made_readings()
    assert readings["end.factor"].shape == (2, RANK, 3)
    made = make(adapter, readings=readings)
    for expert in (made.save(tmp_path / "saved"), Expert.load(tmp_path / "saved")):
        assert expert.readings.keys() == readings.keys()
        assert all(torch.equal(expert.readings[part], readings[part]) for part in readings)
    assert not make(adapter).readings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"end.mean": torch.zeros(2, 4)}, "last, float32"),
        ({"end.factor": torch.zeros(2, 3)}, "end.factor has shape"),
        ({"end.mean": torch.tensor(1.0)}, r"end.mean has shape \(\), wanted 2 dimensions"),
        ({"whole.rest": torch.tensor(1.0)}, r"whole.rest has shape \(\), wanted 2 dimensions"),
        ({"whole.rest": torch.zeros(1, 3)}, "wanted 2 dimensions, 2 blocks first"),
        ({"whole.rest": -torch.ones(2, 3)}, "whole.rest has variances below 0"),
        ({"whole.mean": torch.full((2, 3), torch.nan)}, "whole.mean is not finite"),
        ({"start.mean": torch.zeros(2, 3)}, "wanted end.mean"),
    ],
)
def test_wrong_readings_are_refused(adapter, change, words):
    with pytest.raises(ExpertError, match=words):
        make(adapter, readings=made_readings() | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"end.rest": torch.zeros(3, 3)}, r"readings: end\.rest has shape \(3, 3\)"),
        ({"end.mean": torch.tensor(0.0)}, r"readings: end\.mean has shape \(\)"),
    ],
)
def test_readings_of_a_file_are_checked_too(adapter, tmp_path, change, words):
    sound = make(adapter, readings=made_readings())
    broken = replace(sound, readings=made_readings() | change)
    with pytest.raises(ExpertError, match=words):
        broken.save(tmp_path / "broken")
