"""What the service needs of those who compute answers: models here (`local`), or engines.

R stands for what answers prompts of a pool by one routing: a model, or what chooses for an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, Self, TypeVar

from ...config import Routing, Serving
from ...experts.pool import Pool
from ...routing.choice import Chosen
from ...routing.routers.prompt import PromptChooser
from .protocol import AnyRequest
from .replies import Reply
from .requests import Frame, PreparedRequest
from .settings import ServedModel
from .turns import Turns


class Runner(Protocol):
    """What answers prompts of a pool by one routing."""

    @property
    def frame(self) -> Frame: ...

    @property
    def chooser(self) -> PromptChooser | None:
        """None where experts are chosen for every token."""

    def choose(self, prepared: PreparedRequest) -> list[Chosen]:
        """The experts for a request's prompts, where they aren't chosen for every token."""


R = TypeVar("R", bound=Runner)
Seen = list[tuple[str, int, int]]  # the files of a pool or a model with their sizes and times


class Served(Protocol[R]):
    """A model that is served, and what it takes to route in it otherwise."""

    settings: ServedModel
    seen: Seen
    routing: Routing
    runner: R

    @property
    def pool(self) -> Pool:
        """Raises RoutingError for a model that isn't served as a pool."""

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of its experts; none for a base alone."""

    @property
    def bases(self) -> tuple[str, ...]:
        """The names of its base: the pool's, then those of engines."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """An example prompt by expert."""

    def usual(self, pool: Pool) -> str:
        """The router "auto" of these experts."""

    def composed(self, pool: Pool, routing: Routing, others: Sequence[R] = ()) -> R:
        """What answers by another routing; it shares what it can with `others`."""

    def reopened(self, others: Iterable[Self]) -> Self:
        """The model as its place has it now."""


class State(NamedTuple):
    """Whether a backend works, how many answers wait for it and are computed, how engines are."""

    is_well: bool
    waiting: int
    running: int
    upstreams: Sequence[str] = ()


class Backend(Protocol[R]):
    """Who computes the answers of `models`; its methods are called in the event loop."""

    models: Mapping[str, Served[R]]
    upstream: bool = False  # another program computes
    choosing: Turns  # in which experts are chosen for prompts

    @property
    def limits(self) -> Serving: ...

    @property
    def state(self) -> State: ...

    def start(self) -> None: ...

    async def close(self) -> None: ...

    def check(self, request: AnyRequest, model: Served[R]) -> None:
        """Raise ApiError for what can't be answered."""

    async def begin(
        self, prepared: PreparedRequest, runner: R
    ) -> tuple[Reply, list[Chosen] | None]:
        """The answers, begun, and each prompt's experts, None by token. Raises ApiError."""

    def applied(self, chosen: Chosen) -> Chosen:
        """What becomes of a choice: an engine may apply a part of it."""
        return chosen

    async def take(self, models: Mapping[str, Served[R]]) -> None:
        """Serve these models from now on. Raises PhatgooseError where that can't be."""
        self.models = models
