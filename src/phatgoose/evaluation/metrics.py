"""Metrics: how well an answer matches the accepted ones, from 0 to 1.

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

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
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
    """One way to score answers: `name` is its key in METRICS, `label` its name in tables.

    `measure` returns the s statistics of a prediction against the accepted answers. `combine` takes
    summed statistics [..., s] and the number of examples in each sum, and returns scores [...] in
    [0, 1]. Only `measure` may need a package of the extra 'metrics'.
    """

    name: str
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
    return np.asarray(totals[..., 0] / n)


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
    ours, theirs = _squad_words(prediction), _squad_words(reference)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def _rouge_l(prediction: str, reference: str) -> float:
    """The F-measure of the longest common subsequence of words (rouge-score).

    It sees lower-cased words of a-z and 0-9 alone: answers in other scripts score 0.
    """
    score: float = _rouge_scorer().score(reference, prediction)["rougeL"].fmeasure
    return score


@cache
def _rouge_scorer() -> Any:
    scorers = _imported("rouge-l", "rouge_score.rouge_scorer")  # with nltk and sklearn: seconds
    # As `evaluate.load("rouge")` has it, which the released code calls.
    return scorers.RougeScorer(["rougeL"], use_stemmer=False)


@cache
def _bleu() -> Any:
    # For its counts only, which the order doesn't change.
    return _imported("bleu", "sacrebleu.metrics.bleu").BLEU(effective_order=True)


def _imported(name: str, module: str) -> Any:
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
    ngrams, sys_len, ref_len = counts[..., :-2], counts[..., -2], counts[..., -1]
    matches, totals = ngrams[..., :MAX_NGRAM_ORDER], ngrams[..., MAX_NGRAM_ORDER:]
    halved = 0.5 ** (matches == 0).cumsum(axis=-1)  # the k-th order without a match has 1/2^k
    precisions = np.where(matches > 0, matches, halved) / np.maximum(totals, 1)
    brevity = np.exp(np.minimum(0, 1 - ref_len / np.maximum(sys_len, 1)))
    scores = brevity * np.exp(np.log(precisions).mean(axis=-1))
    return np.where(matches.any(axis=-1) & totals.all(axis=-1), scores, 0.0)


METRICS: dict[str, Metric] = {
    each.name: each
    for each in (
        Metric("accuracy", "rank classification accuracy", _best(str.__eq__), _mean),
        Metric("exact-match", "exact match", _best(_identical_stripped), _mean),
        # One measure under two names: SQuAD's own, beside F1, and the same rule on other tasks.
        Metric("normalised-exact-match", "normalised exact match", _best(_squad_exact), _mean),
        Metric("squad-exact-match", "SQuAD exact match", _best(_squad_exact), _mean),
        Metric("squad-f1", "SQuAD F1", _best(_squad_f1), _mean),
        Metric("rouge-l", "ROUGE-L", _best(_rouge_l), _mean),
        Metric("bleu", "BLEU", _bleu_counts, _corpus_bleu),
    )
}
