"""The frame of lookups that go by what the base alone makes of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....base.sites import Site
from ....config import Formatting
from ....errors import RoutingError
from ....tasks.encoding import Encoder
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

    def find(self, examples: Sequence[Example], formatting: Formatting | None = None) -> Mixtures:
        """The experts of each example, read as `formatting` has it; choices play no part."""
        return self.mixed(self.scores_of_examples(examples, formatting))

    def of_prompts(self, texts: Sequence[str]) -> Mixtures:
        """The experts of each prompt. Raises RoutingError when not attached."""
        return self.mixed(self.scores(texts))

    def of_tokens(self, prompts: Sequence[list[int]]) -> Mixtures:
        """The same of prompts given by their tokens, special ones included."""
        return self.mixed(self._scores_of(prompts))

    def scores(self, texts: Sequence[str], formatting: Formatting | None = None) -> Tensor:
        """The score of each prompt and expert, float32 [texts, pool_size]."""
        encoder = self._encoder(formatting)
        return self._scores_of([encoder.prompt(text) for text in texts])

    def scores_of_examples(
        self, examples: Sequence[Example], formatting: Formatting | None = None
    ) -> Tensor:
        """The same of examples, read as `formatting` has it."""
        encoder = self._encoder(formatting)
        return self._scores_of(
            [encoder.fitted(example.input, example.passage).tokens for example in examples]
        )

    def _encoder(self, formatting: Formatting | None) -> Encoder:
        return Encoder.for_model(self._attached, self.tokenizer, formatting)

    @property
    def _attached(self) -> PreTrainedModel:
        if self._model is None:
            raise RoutingError(f"Router {self.name} reads prompts with a model; compose one.")
        return self._model

    def _scores_of(self, prompts: Sequence[list[int]]) -> Tensor:
        return self._read_alone(prompts, self.reading(self._attached))

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
