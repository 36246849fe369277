"""A pool's own check: prompts are really left out, and planted faults are named."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.analysis.confusions import confusions, without
from phatgoose.errors import PoolError
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import prompt_statistics_of
from routed_models import TOPICS
from tiny import small_reader


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(1, 9), st.integers(0, 99), st.data())
def test_leaving_one_out_subtracts_it_from_the_sums(count, size, seed, data):
    class Kept:
        def with_statistics(self, prompt_statistics, prompts_read):
            assert prompts_read == count - 1
            return prompt_statistics

    row = data.draw(st.integers(0, count - 1))
    states = torch.randn(count, 2, size, generator=torch.Generator().manual_seed(seed))
    all_of_them = prompt_statistics_of(states, rank=5)
    left = without(Kept(), states, row)
    mean = (count * all_of_them["whole.mean"] - states[row]) / (count - 1)
    squares = all_of_them["whole.factor"].square().sum(dim=1) + all_of_them["whole.rest"]
    sums = count * (squares + all_of_them["whole.mean"].square()) - states[row].square()
    variances = left["whole.factor"].square().sum(dim=1) + left["whole.rest"]
    torch.testing.assert_close(left["whole.mean"], mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(variances, sums / (count - 1) - mean.square(), atol=1e-4, rtol=1e-4)


def having(expert, folder, prompts):
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return replace(expert, source=folder).with_prompts_read(small_reader(), prompts)


@pytest.fixture
def topics(pool_of, tmp_path):
    experts = zip(pool_of("llama").experts, TOPICS, strict=True)
    return [
        having(expert, tmp_path / expert.name, [f"{topic} " * n for n in range(1, 7)])
        for expert, topic in experts
    ]


def test_every_prompt_is_judged_once_and_a_mislabelled_one_is_named(topics, tmp_path):
    clean = confusions(Pool(tuple(topics)))
    assert len(clean.prompts) == 24
    assert len({(row.owner, row.prompt) for row in clean.prompts}) == 24
    moved = [*topics[0].prompts[:5], f"{TOPICS[2]} {TOPICS[2]} {TOPICS[2]}"]
    spoiled = [having(topics[0], tmp_path / "spoiled", moved), *topics[1:]]
    found = confusions(Pool(tuple(spoiled))).findings
    assert ("mislabelled", ("e0", "e2")) in {(f.kind, f.experts) for f in found}


def test_twins_are_named(topics, tmp_path):
    twin = having(topics[1], tmp_path / "twin", topics[0].prompts)
    found = confusions(Pool((topics[0], twin, *topics[2:]))).findings
    assert ("twins", ("e0", "e1")) in {(f.kind, f.experts) for f in found}


def test_without_prompts_it_says_what_to_run(pool_of):
    with pytest.raises(PoolError, match="phatgoose stats EXPERT --prompts"):
        confusions(pool_of("llama"))
