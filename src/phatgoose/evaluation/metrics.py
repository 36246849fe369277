"""Metrics: how well an answer matches the accepted ones, from 0 to 1; intervals of scores.

A metric turns every example into a few numbers. A set's score depends on their sums only:

    statistics = np.array([metric.measure(answer, accepted) for answer, accepted in rows])
    score      = metric.combine(statistics.sum(0), n)       # statistics [n, s], score []
    resampled  = metric.combine(weights @ statistics, n)    # weights [b, n], rows sum to n -> [b]

so a bootstrap is one matrix product, even for corpus BLEU, which is no mean over examples.

They follow the paper's released code (src/data/metrics.py, which calls the `evaluate` library)
except that it rounds scores to 3 decimals, compares generated answers with the white space around
them, takes the middle of 1000 random resamples as ROUGE-L instead of the mean, and has the BLEU of
tensorflow/nmt, without smoothing and with the shortest reference's length.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from statistics import NormalDist
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError

Array = NDArray[Any]
Measure = Callable[[str, Sequence[str]], tuple[float, ...]]

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
MAX_NGRAM_ORDER = 4  # of BLEU


@dataclass(frozen=True)
class Metric:
    """One way to score answers; `label` is its name in tables.

    `measure` returns the s statistics of a prediction against the accepted answers. `combine` takes
    summed statistics [..., s] and the number of examples in each sum, and returns scores [...] in
    [0, 1]. Only `measure` may need a package of the extra 'metrics'.
    """

    label: str
    measure: Measure
    combine: Callable[[Array, Array | int], Array]


def metric(name: str) -> Metric:
    """The metric called `name`. Raises EvaluationError if none is."""
    if name not in METRICS:
        raise EvaluationError(f"Metric {name!r} is unknown; known are {', '.join(METRICS)}.")
    return METRICS[name]


def _best(score: Callable[[str, str], float]) -> Measure:
    """The measure whose one statistic is the highest `score` over the accepted answers."""

    def measure(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
        return (max(float(score(prediction, answer)) for answer in references),)

    return measure


def _mean(totals: Array, n: Array | int) -> Array:
    return totals[..., 0] / n


def _identical_stripped(prediction: str, reference: str) -> float:
    # The released code compares raw: a reference with a blank at its end can't be matched there.
    return prediction.strip() == reference.strip()


def _squad_words(text: str) -> list[str]:
    """The words that SQuAD compares: `normalize_answer` of evaluate-v1.1.py (Rajpurkar et al.
    2016).
    """
    # Punctuation goes before articles, so "the-end" is the one word "theend".
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def _squad_exact(prediction: str, reference: str) -> float:
    """`exact_match_score` of evaluate-v1.1.py."""
    return _squad_words(prediction) == _squad_words(reference)


def _squad_f1(prediction: str, reference: str) -> float:
    """`f1_score` of evaluate-v1.1.py: 0 for two texts without words, where SQuAD v2.0 gives 1."""
    ours = _squad_words(prediction)
    theirs = _squad_words(reference)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def _rouge_l(prediction: str, reference: str) -> float:
    """The F-measure of the longest common subsequence of words (rouge-score).

    It sees lower-cased words of a-z and 0-9 alone: answers in other scripts score 0.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    scorers = _imported("rouge-l", "rouge_score.rouge_scorer")  # with nltk and sklearn: seconds
    # As `evaluate.load("rouge")` has it, which the released code calls.
    return scorers.RougeScorer(["rougeL"], use_stemmer=False)


@cache
def _bleu() -> Any:
    # For its counts only, which the order doesn't change.
    return _imported("bleu", "sacrebleu.metrics.bleu").BLEU(effective_order=True)


def _imported(name: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise EvaluationError(
            f"Metric {name!r} needs {module.partition('.')[0].replace('_', '-')}: pip install "
            f"'phatgoose[metrics]'."
        ) from error


def _bleu_counts(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    """Matches and totals of n-grams, 1 to 4, then the lengths of answer and closest reference."""
    score = _bleu().sentence_score(prediction, references)
    return (*score.counts, *score.totals, score.sys_len, score.ref_len)


def _corpus_bleu(counts: Array, n: Array | int) -> Array:
    """`sacrebleu.corpus_bleu` / 100 of the sums: counts [..., 10] -> [...]; `n` plays no part.

    Smoothed as by default there ("exp"), without effective order: a set without a single 4-gram,
    such as answers of up to three words, scores 0 even if they are right. Examples are counted a
    whole number of times.
    """
    matches = counts[..., :MAX_NGRAM_ORDER]
    totals = counts[..., MAX_NGRAM_ORDER:-2]
    sys_len = counts[..., -2]
    ref_len = counts[..., -1]
    halved = 0.5 ** (matches == 0).cumsum(axis=-1)  # the k-th order without a match has 1/2^k
    precisions = np.where(matches > 0, matches, halved) / np.maximum(totals, 1)
    brevity = np.exp(np.minimum(0, 1 - ref_len / np.maximum(sys_len, 1)))
    scores = brevity * np.exp(np.log(precisions).mean(axis=-1))
    is_defined = matches.any(axis=-1) & totals.all(axis=-1)
    return np.where(is_defined, scores, 0.0)


METRICS = {
    "accuracy": Metric("rank classification accuracy", _best(str.__eq__), _mean),
    "exact-match": Metric("exact match", _best(_identical_stripped), _mean),
    # One measure under two names: SQuAD's own, beside F1, and the same rule on other tasks.
    "normalised-exact-match": Metric("normalised exact match", _best(_squad_exact), _mean),
    "squad-exact-match": Metric("SQuAD exact match", _best(_squad_exact), _mean),
    "squad-f1": Metric("SQuAD F1", _best(_squad_f1), _mean),
    "rouge-l": Metric("ROUGE-L", _best(_rouge_l), _mean),
    "bleu": Metric("BLEU", _bleu_counts, _corpus_bleu),
}


# Intervals: how far a score moves with other examples or other datasets.
#
# Shares of right answers have Wilson's interval, everything else one by resampling per-example
# statistics (`evaluation.metrics`). Models scored on the same examples share their resamples, so
# their differences are compared in pairs. Examples made of one row of a dataset, in several
# templates, are not independent: rows are drawn, and Wilson's interval counts the effective number.

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # standard errors to each side of a normal mean
REPLICATES = 2000
TINY = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, replicates: Array, confidence: float = CONFIDENCE) -> Estimate:
        """`value` with the middle `confidence` of its bootstrap `replicates`."""
        outside = 100 * (1 - confidence) / 2
        low, high = np.percentile(replicates, [outside, 100 - outside])
        return cls(float(value), float(low), float(high))

    @property
    def in_per_cent(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.0f}, {100 * self.high:.0f}]"

    @property
    def in_points(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True, eq=False)
class Sample:
    """One model's answers to one dataset, as statistics per metric and example.

    `statistics[m]` is [n, s_m] for `metrics[m]`. `rows` [n] numbers the rows that the examples were
    made of, from 0; None if each has its own.
    """

    metrics: tuple[str, ...]
    statistics: tuple[Array, ...]
    rows: Array | None = None

    @classmethod
    def of(
        cls,
        metrics: Sequence[str],
        marks: Sequence[Sequence[Sequence[float]]],
        rows: Sequence[int | None] | None = None,
    ) -> Sample:
        """The sample of examples with `marks` (example, metric, statistic), made of `rows`."""
        statistics = []
        for index in range(len(metrics)):
            statistics.append(np.array([example[index] for example in marks], float))
        rows = rows or ()
        numbers = None
        if None not in rows and len(set(rows)) < len(rows):
            _, numbers = np.unique(np.array(rows), return_inverse=True)
        return cls(tuple(metrics), tuple(statistics), numbers)

    @property
    def n(self) -> int:
        return len(self.statistics[0])

    @property
    def by_metric(self) -> dict[str, float]:
        scores = self._scores(np.ones((1, self.n)))
        return {name: float(score[0]) for name, score in zip(self.metrics, scores, strict=True)}

    @property
    def score(self) -> float:
        """The mean over the metrics."""
        return float(self.replicates(np.ones((1, self.n)))[0])

    def replicates(self, weights: Array) -> Array:
        """The score with examples counted `weights` [B, n] times, whole numbers for BLEU: [B]."""
        return np.asarray(np.mean(self._scores(weights), axis=0))

    def _scores(self, weights: Array) -> list[Array]:
        counted = weights.sum(axis=1)
        return [
            metric(name).combine(weights @ rows, counted)
            for name, rows in zip(self.metrics, self.statistics, strict=True)
        ]

    def estimate(self, seed: int = 0) -> Estimate:
        draws = self.draws(np.random.default_rng(seed), REPLICATES)
        return Estimate.of(self.score, self.replicates(draws))

    def draws(self, generator: np.random.Generator, replicates: int) -> Array:
        """How often each draw with replacement has each example (or row), [replicates, n]."""
        count = self.n if self.rows is None else int(self.rows.max()) + 1
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=replicates)
        if self.rows is not None:
            # A row brings all its examples, so if rows differ in size, draws differ in number.
            drawn = drawn[:, self.rows]
        return np.asarray(drawn, float)

    @property
    def independent(self) -> float:
        """The number of independent examples with the same information on the first statistic.

        n if each example has its own row, else p(1-p) over the variance of the mean p of values
        from 0 to 1, estimated over rows (Kish 1965), and n at most. The number of rows if all
        values are equal, or if there is one row.
        """
        if self.rows is None:
            return float(self.n)
        count = int(self.rows.max()) + 1
        values = self.statistics[0][:, 0]
        share = values.mean()
        of_rows = np.bincount(self.rows, values - share)
        variance = count / max(count - 1, 1) * np.square(of_rows).sum() / self.n**2
        spread = share * (1 - share)
        if count == 1 or not spread:
            return float(count)
        if variance > TINY:
            return float(min(spread / variance, self.n))
        # All rows have the same mean: their variance is 0 but for rounding.
        return float(self.n)


@dataclass(frozen=True)
class SharedMeans:
    """Models' means over the same datasets, each dataset as much as any other.

    `drawn` [replicates] are a model's means in resamples of datasets and, within them, of examples.
    All models share these, so their differences are intervals in pairs.
    """

    value: Mapping[str, float]
    drawn: Mapping[str, Array]

    @classmethod
    def of(
        cls, samples: Mapping[str, Sequence[Sample]], replicates: int = REPLICATES
    ) -> SharedMeans:
        """The means of models, whose samples are of the same datasets and examples."""
        first, *_ = samples.values()
        shape = (replicates, len(first))
        generator = np.random.default_rng(0)
        slots = generator.integers(len(first), size=shape)  # which dataset is at each
        scores = {model: np.zeros(shape) for model in samples}
        for dataset, sample in enumerate(first):
            here = slots == dataset
            if not here.any():
                continue
            # All models get the same weights: their differences are intervals in pairs.
            weights = sample.draws(generator, int(here.sum()))
            for model, of_model in samples.items():
                scores[model][here] = of_model[dataset].replicates(weights)
        value = {}
        drawn = {}
        for model, of_model in samples.items():
            value[model] = sum(sample.score for sample in of_model) / len(of_model)
            drawn[model] = scores[model].mean(axis=1)
        return cls(value, drawn)

    def estimate(self, model: str) -> Estimate:
        return Estimate.of(self.value[model], self.drawn[model])

    def gain(self, model: str, over: str, confidence: float = CONFIDENCE) -> Estimate:
        """The difference of two models' means, with its interval in pairs."""
        value = self.value[model] - self.value[over]
        return Estimate.of(value, self.drawn[model] - self.drawn[over], confidence)


def wilson(right: float, n: float) -> Estimate:
    """The share `right` of `n`, with Wilson's interval (1927) without continuity correction."""
    share = right / n
    narrowed = 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / narrowed
    half = Z / narrowed * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # Exact at the ends, where rounding could leave the range.
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == n else centre + half
    return Estimate(share, low, high)
