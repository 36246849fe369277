"""Metrics beside hand-computed scores, the libraries' own, what all share, and intervals."""

import math
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import binomtest

from phatgoose.evaluation.metrics import CONFIDENCE, METRICS, Sample, SharedMeans, wilson

Row = tuple[str, Sequence[str]]

WORDS = ("the", "cat", "Cat", "sat", "on", "a", "mat", "mat.", "猫", "élan", "42", "—", "")
texts = st.text(max_size=30) | st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
rows = st.tuples(texts, st.lists(texts, min_size=1, max_size=3))
corpora = st.lists(rows, min_size=1, max_size=6)


def sample_of(names: Sequence[str], corpus: Sequence[Row]) -> Sample:
    return Sample.of(names, [[METRICS[name].measure(*row) for name in names] for row in corpus])


def score(name: str, *corpus: Row) -> float:
    return sample_of([name], corpus).score


# What all metrics share


@pytest.mark.parametrize(
    "names", [*([name] for name in METRICS), ["rouge-l", "bleu"]], ids="+".join
)
@settings(max_examples=40)
@given(corpora, st.data())
def test_a_replicate_is_the_score_of_the_examples_drawn(names, corpus, data):
    """Also where some are drawn twice and others not: what a bootstrap is made of."""
    each = st.integers(0, len(corpus) - 1)
    draw = data.draw(st.lists(each, min_size=len(corpus), max_size=len(corpus)))
    weights = np.stack([np.ones(len(corpus)), np.bincount(draw, minlength=len(corpus))])
    wanted = [sample_of(names, rows).score for rows in (corpus, [corpus[i] for i in draw])]
    got = sample_of(names, corpus).replicates(weights)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


# Accuracy and exact match


@pytest.mark.parametrize(
    ("prediction", "references", "accuracy", "exact", "normalised"),
    [
        ("Yes", ["No", "Yes"], 1, 1, 1),
        (" Yes\n", ["Yes"], 0, 1, 1),
        ("The Beatles!", ["beatles"], 0, 0, 1),
        ("theatre", ["atre"], 0, 0, 0),  # an article is a word, not a beginning
        ("U.S.", ["us"], 0, 0, 1),
        ("the-end", ["the end"], 0, 0, 0),  # punctuation goes first, and joins
        ("", [""], 1, 1, 1),
        ("e\u0301", ["é"], 0, 0, 0),  # not composed to one form
        ("\u3000猫", ["猫"], 0, 1, 1),
    ],
)
def test_exact_matches(prediction, references, accuracy, exact, normalised):
    assert score("accuracy", (prediction, references)) == accuracy
    assert score("exact-match", (prediction, references)) == exact
    assert score("normalised-exact-match", (prediction, references)) == normalised
    assert score("squad-exact-match", (prediction, references)) == normalised


# SQuAD F1


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("the big cat", ["The cat"], 2 / 3),  # precision 1/2, recall 1
        ("cat cat dog", ["cat cat cat"], 2 / 3),  # repeated words count as often as both have them
        ("a b c d", ["x", "b c", "b"], 0.8),  # "a" is an article: 2 of 3 words, both found
        ("", [""], 0),
        ("the", ["the"], 0),
    ],
)
def test_squad_f1(prediction, references, expected):
    assert score("squad-f1", (prediction, references)) == pytest.approx(expected, abs=1e-12)


# The libraries' own


@given(corpora)
def test_rouge_l_is_the_mean_of_the_librarys_best(corpus):
    library = RougeScorer(["rougeL"])
    best = [library.score_multi(refs, prediction)["rougeL"].fmeasure for prediction, refs in corpus]
    assert score("rouge-l", *corpus) == pytest.approx(sum(best) / len(best), abs=1e-12)


@given(corpora)
def test_bleu_of_sums_is_sacrebleus_of_the_corpus(corpus):
    """It wants its references transposed, None where an example has fewer."""
    streams = [*zip_longest(*(references for _, references in corpus))]
    wanted = sacrebleu.corpus_bleu([prediction for prediction, _ in corpus], streams).score / 100
    assert score("bleu", *corpus) == pytest.approx(wanted, abs=1e-9)


# Intervals


def matches(values: Sequence[float], rows: Sequence[int] | None = None) -> Sample:
    """Answers that are right (1) or wrong (0)."""
    return Sample.of(["accuracy"], [[(value,)] for value in values], rows)


def test_the_interval_is_that_of_a_bootstrap_written_out():
    values = np.random.default_rng(1).random(40)
    interval = matches(values).estimate()
    generator = np.random.default_rng(7)
    means = [generator.choice(values, 40).mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02)
    normal = 1.96 * values.std() / math.sqrt(40)
    assert interval.high - interval.low == pytest.approx(2 * normal, rel=0.1)


def test_rows_of_several_sizes_count_by_their_examples():
    sample, draws = matches([1, 1, 1, 0], [7, 7, 7, 3]), [(1, 1, 1, 1), (2, 2, 2, 0), (0, 0, 0, 2)]
    weights = sample.draws(np.random.default_rng(0), 200)
    assert {tuple(row) for row in weights} == set(draws)
    np.testing.assert_allclose(sample.replicates(np.array(draws)), [3 / 4, 1, 0], atol=1e-12)


def test_intervals_of_rows_in_many_templates_cover_the_truth():
    """Where rows decide much, intervals over examples would cover it in two thirds of the cases."""
    generator, covered, narrow = np.random.default_rng(3), 0, 0
    numbers = np.repeat(np.arange(80), 10).tolist()
    for _ in range(300):
        share = 1 / (1 + np.exp(-2 * generator.standard_normal(80)))  # each row's, 0.5 on average
        values = (generator.random((80, 10)) < share[:, None]).astype(float).reshape(-1)
        sample = matches(values, numbers)
        known = wilson(sample.score * sample.independent, sample.independent)
        alone = wilson(values.sum(), 800)
        covered += known.low <= 0.5 <= known.high
        narrow += alone.low <= 0.5 <= alone.high
    assert covered / 300 > 0.92
    assert narrow / 300 < 0.75


def test_a_lead_on_every_example_is_the_same_in_every_resample():
    marks = [np.random.default_rng(d).random(30) / 2 for d in range(4)]
    lower = [matches(row) for row in marks]
    higher = [matches(row + 0.25) for row in marks]
    replicates = SharedMeans.of({"lower": lower, "higher": higher}).drawn
    np.testing.assert_allclose(replicates["higher"] - replicates["lower"], 0.25, atol=1e-12)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_that_of_scipy(counts):
    ours, theirs = wilson(*counts), binomtest(*counts).proportion_ci(CONFIDENCE, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-12)
