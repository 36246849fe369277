"""A pool's own check: prompts are really left out, and planted faults are named."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.analysis.confusions import LeftOut, _alike, _findings, confusions, without
from phatgoose.errors import PoolError
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import prompt_statistics_of
from phatgoose.reader import Reader
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


def test_likeness_is_the_mean_cosine_with_the_others():
    states = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    for row, likeness in enumerate(_alike(states)):
        others = [other for other in range(4) if other != row]
        cosines = [
            torch.cosine_similarity(states[row].flatten(), states[other].flatten(), dim=0)
            for other in others
        ]
        torch.testing.assert_close(likeness, torch.stack(cosines).mean())


def test_a_prompt_like_its_experts_others_is_not_called_mislabelled():
    names = ("translate", "recipes")
    rows = [LeftOut(name, f"{name} {n}", name) for name in names for n in range(5)]
    leads = {z: torch.full((5, 2), -1.0) for z in range(2)}
    leads[0][3, 1] = 0.6
    for z in range(2):
        leads[z][:, z] = 0
    strange = {z: torch.zeros(5) for z in range(2)}
    (found,) = _findings(names, rows, leads, strange)
    assert (found.kind, found.experts) == ("mislabelled", names)
    assert "'translate 3'" in found.message
    alike = {z: torch.full((5,), 0.3) for z in range(2)}
    assert list(_findings(names, rows, leads, alike)) == []


def test_each_prompt_is_read_once_and_none_that_was_read_before(topics, monkeypatch):
    texts = []
    states = Reader.states

    def counted(self, new):
        texts.extend(new)
        return states(self, new)

    monkeypatch.setattr(Reader, "states", counted)
    first = confusions(Pool(tuple(topics)))
    prompts = {prompt for expert in topics for prompt in expert.prompts}
    assert prompts <= set(texts)
    assert len(texts) == len(set(texts))
    read = [expert.with_prompts_read(small_reader()) for expert in topics]
    texts.clear()
    assert confusions(Pool(tuple(read))) == first
    assert not prompts & set(texts)


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


def test_what_would_help_is_said_where_nothing_is_wrong_enough(topics, tmp_path):
    few = [having(e, tmp_path / f"few {e.name}", e.prompts[:4]) for e in topics]
    two_more = [*topics[0].prompts[:2], *(f"{TOPICS[1]} {n}" for n in range(2))]
    checked = confusions(Pool((having(topics[0], tmp_path / "mixed", two_more), *few[1:])))
    (note,) = [note for note in checked.notes if "would help" in note]
    assert note == "Two more prompts for e0 would help: 2 of its 4 go to e1."
    assert note in checked.table.markdown()


def test_the_summary_names_the_first_warnings(topics, tmp_path):
    twin = having(topics[1], tmp_path / "twin", topics[0].prompts)
    checked = confusions(Pool((topics[0], twin, *topics[2:])))
    assert "twins e0 and e1" in checked.summary
    assert confusions(Pool(tuple(topics))).summary.endswith("warnings: 0")


def test_without_prompts_it_says_what_to_run(pool_of):
    with pytest.raises(PoolError, match="phatgoose stats EXPERT --prompts"):
        confusions(pool_of("llama"))
