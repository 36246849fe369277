"""A comparison written down by hand."""

from phatgoose.evaluation.evaluate import TaskScore
from phatgoose.evaluation.metrics import Sample
from phatgoose.evaluation.results import Comparison

SUITES = {"one": ("a", "b"), "two": ("b", "c")}
RIGHT = {  # which answers are right, by row and dataset; rouge-l + bleu for dataset c
    "base": {"a": (0, 0, 0, 1), "b": (1, 0, 0, 0, 0, 1), "c": (0.1, 0.2)},
    "phatgoose": {"a": (1, 1, 0, 1), "b": (1, 1, 1, 0, 0, 1), "c": (0.9, 0.4)},
    "twin": {"a": (1, 1, 0, 1), "b": (1, 1, 1, 0, 0, 1), "c": (0.9, 0.4)},
    "my|own": {"a": (1, 1, 1, 1), "b": (0, 0, 0, 0, 0, 0), "c": (0.5, 0.5)},
}
EXPERTS = {
    "e0": {"a": (1, 0, 0, 0), "b": (1, 1, 1, 1, 1, 0), "c": (0.0, 0.0)},
    "e1": {"a": (1, 1, 1, 0), "b": (0, 0, 1, 1, 1, 0), "c": (0.25, 0.5)},
}
SETTINGS = {"base": {"id": "tiny"}, "dtype": "float32", "experts": ["e0", "e1"], "limit": 6}
SETTINGS |= {"seed": 3, "k": 2, "kernel": "gather", "code": "0.1.0+abc", "machine": "a chip"}
MATCHES = [4, 3, 2, 1, 4, 3, 2, 1, 4, 4]  # the counts of an answer that is its reference
MISSES = [0, 0, 0, 0, 4, 3, 2, 1, 4, 4]


def result(task: str, marks: tuple[float, ...]) -> TaskScore:
    if task != "c":
        sample = Sample.of(["accuracy"], [[[mark]] for mark in marks])
        return TaskScore(task, "accuracy", 0.0, 1.0, sample, 2, 1.5)
    sample = Sample.of(["rouge-l", "bleu"], [[[marks[0]], MATCHES], [[marks[1]], MISSES]])
    return TaskScore(task, "ROUGE-L + BLEU", 0.1, 0.9, sample, 0, 1.5)


def results(marks: dict[str, tuple[float, ...]]) -> dict[str, TaskScore]:
    return {task: result(task, row) for task, row in marks.items()}


def made_comparison() -> Comparison:
    """Four rows and two derived ones on two suites that share dataset b."""
    rows = {name: results(marks) for name, marks in RIGHT.items()}
    experts = {name: results(marks) for name, marks in EXPERTS.items()}
    choices = {
        "best-individual": dict.fromkeys("abc", "e1"),
        "oracle": {"a": "e1", "b": "e0", "c": "e1"},
    }
    for name, chosen in choices.items():
        rows[name] = {task: experts[expert][task] for task, expert in chosen.items()}
    labels = {"base": "Base model", "phatgoose": "PHATGOOSE", "twin": "twin", "my|own": "my|own"}
    labels |= {"best-individual": "Best Individual", "oracle": "Oracle"}
    notes = ("Retrieval was left out.",)
    return Comparison(SUITES, labels, rows, experts, choices, notes, SETTINGS)
