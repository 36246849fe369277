"""Answers that rows share: where one expert alone serves an input, it has answered already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from ...routing.composition import composition_if_any
from ...routing.routers.per_input.prompt_reader import PromptReader
from ..answers import Answer, Questions
from ..evaluate import EvaluationSet, TaskScore, task_score

__all__ = ["SharedAnswers", "may_share"]


def may_share(settings: Mapping[str, Any]) -> bool:
    """True for a row whose `settings` say that its router chooses for whole inputs."""
    return "input_k" in settings


@dataclass(frozen=True)
class SharedAnswers:
    """What single experts answered: by expert and dataset, the results as they are stored."""

    results: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def score(
        self, model: PreTrainedModel, dataset: EvaluationSet, questions: Questions
    ) -> TaskScore | None:
        """The score of a routed model that leaves each input to one expert, who has answered it.

        None for other models, and where an expert's answers aren't known. What differs from scoring
        the model itself is which inputs shared a batch, hence no more than rounding.
        """
        parts = composition_if_any(model)
        lookup = parts.lookup if parts else None
        # More experts an input are scored by the model, which then reads the inputs itself.
        if not self.results or not isinstance(lookup, PromptReader) or lookup.k > 1:
            return None
        chosen = lookup.find(questions.prompts, dataset.examples).lone()
        if parts is None or chosen is None:
            return None
        names = [parts.experts[z] for z in chosen.tolist()]
        held = {name: self.results.get(name, {}).get(dataset.name) for name in set(names)}
        if None in held.values():
            return None
        results = [held[name] or {} for name in names]
        texts = [result["answers"][i] for i, result in enumerate(results)]
        ties = sum(i in result["tied"] for i, result in enumerate(results))
        found = task_score(dataset, [Answer(text) for text in texts])
        return replace(found, ties=ties, cuts=questions.cuts)
