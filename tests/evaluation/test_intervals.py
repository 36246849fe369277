"""Intervals by resampling beside sums written out, known cases, and what all models must share."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from phatgoose.evaluation.intervals import (
    CONFIDENCE,
    Sample,
    dataset_replicates,
    wilson_interval,
)
from phatgoose.evaluation.metrics import METRICS

ROWS = [
    ("the cat sat on the mat", ["the cat sat on the mat"]),
    ("a dog ran over the hill", ["the dog ran up the hill", "a dog"]),
    ("no", ["yes", "no idea at all"]),
    ("birds sing in the old tree", ["birds sing in an old tree", "a tree of birds"]),
]


def sample_of(metrics, rows=ROWS) -> Sample:
    marks = [[METRICS[name].measure(*row) for name in metrics] for row in rows]
    return Sample.of(metrics, marks)


def matches(*values: float) -> Sample:
    """Answers that are right (1) or wrong (0)."""
    return Sample.of(["accuracy"], [[(value,)] for value in values])


def bleu_of(rows) -> float:
    most = max(len(references) for _, references in rows)
    streams = [[refs[i] if i < len(refs) else None for _, refs in rows] for i in range(most)]
    return sacrebleu.corpus_bleu([answer for answer, _ in rows], streams).score / 100


def weights_of(draws, n: int) -> np.ndarray:
    return np.array([np.bincount(draw, minlength=n) for draw in draws], float)


# One dataset


def test_the_score_is_the_mean_over_the_metrics():
    names = ["rouge-l", "bleu", "squad-f1"]
    sample = sample_of(names)
    assert list(sample.by_metric) == names
    for name in ("rouge-l", "squad-f1"):
        mean = sum(METRICS[name].measure(*row)[0] for row in ROWS) / 4
        assert sample.by_metric[name] == pytest.approx(mean, abs=1e-12)
    assert sample.by_metric["bleu"] == pytest.approx(bleu_of(ROWS), abs=1e-12)
    assert sample.score == pytest.approx(sum(sample.by_metric.values()) / 3, abs=1e-12)
    assert isinstance(sample.score, float)


@settings(derandomize=True, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=5))
@pytest.mark.parametrize("metrics", [["bleu"], ["rouge-l", "bleu"], ["accuracy"]], ids="+".join)
def test_a_replicate_is_the_score_of_the_examples_drawn(metrics, draws):
    got = sample_of(metrics).replicates(weights_of(draws, 4))
    wanted = [sample_of(metrics, [ROWS[i] for i in draw]).score for draw in draws]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


def test_the_interval_is_that_of_a_bootstrap_written_out():
    values = np.random.default_rng(1).random(40)
    interval = matches(*values).interval()
    generator = np.random.default_rng(7)
    means = [generator.choice(values, 40).mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02)
    normal = 1.96 * values.std() / math.sqrt(40)
    assert interval.high - interval.low == pytest.approx(2 * normal, rel=0.1)


def test_an_interval_follows_its_seed_and_holds_the_score():
    for sample in (sample_of(["bleu"]), sample_of(["rouge-l", "squad-f1"]), matches(1, 0, 0, 1)):
        assert sample.interval() == sample.interval(seed=0)
        assert 0 <= sample.interval().low <= sample.score <= sample.interval().high <= 1
    values = np.random.default_rng(1).random(40)
    assert matches(*values).interval(1) != matches(*values).interval(2)


def in_rows(values, rows) -> Sample:
    return Sample.of(["accuracy"], [[(value,)] for value in values], rows)


def test_rows_are_drawn_with_all_of_their_examples():
    values = np.random.default_rng(1).random(60)
    rows = [i // 5 for i in range(60)]
    interval = in_rows(values + np.repeat(np.arange(12), 5), rows).interval()
    generator = np.random.default_rng(7)
    by_row = (values + np.repeat(np.arange(12), 5)).reshape(12, 5)
    means = [by_row[generator.integers(12, size=12)].mean() for _ in range(4000)]
    wanted = np.percentile(means, [2.5, 97.5])
    assert (interval.low, interval.high) == pytest.approx(tuple(wanted), rel=0.03)


def test_rows_of_several_sizes_count_by_their_examples():
    sample = in_rows([1, 1, 1, 0], [7, 7, 7, 3])
    weights = sample.draws(np.random.default_rng(0), 200)
    assert {tuple(row) for row in weights} == {(1, 1, 1, 1), (2, 2, 2, 0), (0, 0, 0, 2)}
    assert sample.replicates(np.array([(1, 1, 1, 1), (2, 2, 2, 0), (0, 0, 0, 2)])) == pytest.approx(
        [3 / 4, 1, 0], abs=1e-12
    )


@pytest.mark.parametrize("rows", [None, [4, 2, 9], [None, None, None], [1, None, 1]], ids=str)
def test_examples_with_rows_of_their_own_are_drawn_one_by_one(rows):
    sample, plain = in_rows([1, 0, 0.5], rows), matches(1, 0, 0.5)
    assert sample.rows is None
    assert sample.independent == 3
    assert sample.interval() == plain.interval()


def test_answers_alike_in_all_templates_count_once_a_row():
    right = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1, 1] * 4)
    sample = in_rows(np.repeat(right, 6), np.repeat(np.arange(40), 6).tolist())
    assert sample.independent == pytest.approx(39, abs=1e-9)
    assert in_rows(np.ones(12), np.repeat(np.arange(4), 3).tolist()).independent == 4


def test_intervals_of_rows_in_many_templates_cover_the_truth():
    """Where rows decide much, intervals over examples would cover it in two thirds of the cases."""
    generator, covered, narrow = np.random.default_rng(3), 0, 0
    numbers = np.repeat(np.arange(80), 10).tolist()
    for _ in range(300):
        share = 1 / (1 + np.exp(-2 * generator.standard_normal(80)))  # each row's, 0.5 on average
        values = (generator.random((80, 10)) < share[:, None]).astype(float).reshape(-1)
        sample = in_rows(values, numbers)
        known = wilson_interval(sample.score * sample.independent, sample.independent)
        alone = wilson_interval(values.sum(), 800)
        covered += known.low <= 0.5 <= known.high
        narrow += alone.low <= 0.5 <= alone.high
    assert covered / 300 > 0.92
    assert narrow / 300 < 0.75


# Several datasets


def scored(*means: float, n: int = 200, seed: int = 0) -> list[Sample]:
    """A dataset for each of the means, of n examples with such a share of right answers."""
    generator = np.random.default_rng(seed)
    return [matches(*(generator.random(n) < mean).astype(float)) for mean in means]


def test_a_lead_on_every_example_is_the_same_in_every_resample():
    marks = [np.random.default_rng(d).random(30) / 2 for d in range(4)]
    lower = [matches(*row) for row in marks]
    higher = [matches(*(row + 0.25)) for row in marks]
    replicates = dataset_replicates({"lower": lower, "higher": higher})
    np.testing.assert_allclose(replicates["higher"] - replicates["lower"], 0.25, atol=1e-12)


def test_certain_datasets_are_resampled_by_datasets_alone():
    scores = (0.0, 0.25, 1.0)
    samples = [matches(*[score] * 5) for score in scores]
    replicates = dataset_replicates({"one": samples}, replicates=27000)["one"]
    values, counts = np.unique(replicates.round(9), return_counts=True)
    means = [sum(draw) / 3 for draw in np.stack(np.meshgrid(*[scores] * 3)).reshape(3, 27).T]
    wanted, shares = np.unique(np.round(means, 9), return_counts=True)
    np.testing.assert_allclose(values, wanted, atol=1e-9)
    np.testing.assert_allclose(counts, 1000 * shares, atol=5 * np.sqrt(27000 / 4))


def test_both_datasets_and_examples_vary():
    samples = scored(0.2, 0.4, 0.6, 0.8, n=25)
    scores = np.array([sample.score for sample in samples])
    replicates = dataset_replicates({"one": samples}, replicates=8000)["one"]
    of_examples = np.mean(scores * (1 - scores)) / 25
    expected = math.sqrt((scores.var() + of_examples) / 4)
    assert replicates.mean() == pytest.approx(scores.mean(), abs=0.01)
    assert replicates.std() == pytest.approx(expected, rel=0.05)


def test_a_dataset_drawn_twice_draws_its_examples_anew():
    """With one dataset in two slots half of the variance would remain if its draws were shared."""
    same = scored(0.5, n=25)[0]
    two = dataset_replicates({"one": [same, same]}, replicates=8000)["one"]
    one = dataset_replicates({"one": [same]}, replicates=8000)["one"]
    assert two.std() == pytest.approx(one.std() / math.sqrt(2), rel=0.05)


# Shares of right answers


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_that_of_scipy(counts):
    found = wilson_interval(*counts)
    wanted = binomtest(*counts).proportion_ci(CONFIDENCE, method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9, abs=1e-12)
