"""Prompt statistics: what a reader makes of prompts, and how an expert shares it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from discriminants import states_of
from phatgoose.experts.expert import Expert
from phatgoose.experts.statistics import prompt_statistics_of
from routed_models import TOPICS
from tiny import make_adapter, small_reader


@pytest.mark.parametrize("lengths", [(1, 2, 1, 9), (40, 1, 3, 60, 2, 60, 55, 60, 60, 1)])
def test_prompts_are_read_as_each_alone(lengths):
    words = " ".join(TOPICS).split()
    texts = [" ".join((words * 30)[i : i + 4 * n]) for i, n in enumerate(lengths)]
    read = small_reader().states(texts)  # in more than one batch, where they are longer
    for row, text in enumerate(texts):
        wanted = states_of(text)
        assert (read[row] - wanted).norm() <= 1e-5 * wanted.norm()


def test_of_a_long_prompt_all_tokens_count_and_of_a_huge_one_both_ends():
    reader = small_reader()
    pieces = [f"{topic} " * 90 for topic in TOPICS]
    alone = reader.states(pieces)
    huge_text, both_ends = "a " * 8192 + "q" * 9999 + " b" * 8192, "a " * 4096 + " b" * 4096
    whole, huge, cut = reader.states(["".join(pieces), huge_text, both_ends])
    apart = (whole - torch.stack([alone.mean(dim=0), alone[0], alone[-1]])).flatten(1).norm(dim=1)
    assert apart[0] < 0.2 * whole.norm() < apart[1:].min() / 2
    assert torch.equal(huge, cut)


def test_an_expert_reads_its_own_prompts_or_others_and_says_who_read_how_many(llama, tmp_path):
    reader = small_reader()
    adapter = make_adapter(llama, tmp_path / "adapter")
    (adapter / "prompts.txt").write_text("\n".join(TOPICS))
    expert = Expert.from_peft(adapter, {}, name="one", base=llama)
    expert = replace(expert, source=adapter)
    for prompts, texts in (((), list(TOPICS)), (TOPICS[:3], TOPICS[:3])):
        saved = expert.with_prompts_read(reader, prompts).save(tmp_path / f"{len(texts)}")
        read = Expert.load(saved.directory)
        wanted = prompt_statistics_of(torch.stack([states_of(text).float() for text in texts]))
        for part, values in wanted.items():
            torch.testing.assert_close(read.prompt_statistics[part], values, atol=1e-3, rtol=1e-3)
        assert (read.info.reader, read.info.prompts_read) == (reader.reference, len(texts))
        assert read.info.measured_in is None
        assert json.loads((saved.directory / "phatgoose.json").read_text())["reader"] == {
            "id": "minilm",
            "first": 1,
            "last": 1,
            "revision": None,
            "fingerprint": reader.reference.fingerprint,
        }


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 20), st.integers(0, 99))
def test_the_covariance_that_is_shared_has_the_true_variances(prompts, size, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(prompts, 2, size, generator=generator) * torch.arange(1, size + 1)
    shared = prompt_statistics_of(values, rank)
    factor, rest = shared["whole.factor"].double(), shared["whole.rest"].double()
    covariance = factor.transpose(1, 2) @ factor + torch.diag_embed(rest)  # as docs/format.md says
    for block in range(2):
        wanted = torch.cov(values[:, block].double().T, correction=0).reshape(size, size)
        error = covariance[block] - wanted
        assert error.diagonal().abs().max() <= 1e-4 * wanted.diagonal().max() + 1e-9
        # What is lost is what the weaker directions add off the diagonal.
        strengths = torch.linalg.eigvalsh(wanted).flip(0).clamp(min=0)
        assert error.norm() <= 2 * strengths[rank:].sum() + 1e-4 * wanted.norm() + 1e-9
