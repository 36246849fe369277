"""The frame of lookups that go by what the base alone makes of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....base.sites import Site
from ....errors import RoutingError
from ....tasks.prompt_passes import PromptReading, read_prompts
from ....tasks.task import Example
from ...watching import unwatched
from ..mixtures import NOBODY, Mixtures
from .prompt_reader import PromptReader

__all__ = ["BaseReader", "routed_sites"]


class BaseReader(PromptReader):
    """A lookup that scores experts by activations of the base.

    Every prompt passes through the model once with no expert at work, before it passes with its
    experts. Subclasses say in `reading` what is taken from that pass; it gives a score for each
    expert.
    """

    def reading(self, model: PreTrainedModel) -> PromptReading:
        """What reads the passes of one call; it finds scores [texts, pool_size]."""
        raise NotImplementedError

    def mixed(self, scores: Tensor) -> Mixtures:
        """The experts for `scores` [texts, pool_size]: as `Mixtures.best` has it."""
        return Mixtures.best(scores, self.k, self.temperature)

    def find(
        self, prompts: Sequence[Sequence[int]], examples: Sequence[Example] | None = None
    ) -> Mixtures:
        """The experts of each prompt. Raises RoutingError when not attached."""
        return self.mixed(self.scores(prompts))

    def scores(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, pool_size]."""
        return self._read_alone(prompts, self.reading(self._attached))

    @property
    def _attached(self) -> PreTrainedModel:
        if self._model is None:
            raise RoutingError(f"Router {self.name} reads prompts with a model; compose one.")
        return self._model

    def _read_alone(self, prompts: Sequence[Sequence[int]], reading: PromptReading) -> Tensor:
        """What `reading` finds in each prompt, read by the base without any expert."""
        with self._base_alone(), unwatched():
            return read_prompts(self._attached, prompts, reading)

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """No expert acts in the passes of this thread while the context is open."""
        mixtures, announced = self._turn.mixtures, self._turn.announced
        self.serve(Mixtures.alone(torch.tensor([NOBODY])))
        try:
            yield
        finally:
            self._turn.mixtures, self._turn.announced = mixtures, announced


def routed_sites(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Site]:
    """The sites of these names of a routed `model`."""
    layers: Mapping[str, Any] = {name: model.get_submodule(name) for name in names}
    return {name: layer.site for name, layer in layers.items()}
