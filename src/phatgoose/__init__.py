"""phatgoose: independently trained PEFT experts, routed per token and per module into one model.

    expert = pg.train_expert("smollm2", pg.load_task("reviews.jsonl"), out="experts/reviews")
    pool   = pg.Pool.open("experts/")
    model  = pg.compose(pool, router="phatgoose", k=2)      # still a PreTrainedModel
    result = pg.evaluate(model, [pg.load_task("unseen.jsonl")])

The names, in the order of the story:
    load_task      a dataset as a task                          phatgoose.tasks
    train_expert   a LoRA expert with gates and statistics      phatgoose.training
    train_gates    gates for a LoRA adapter that exists         phatgoose.training
    Expert         one expert directory                         phatgoose.experts
    Pool           many of them                                 phatgoose.experts
    compose        a routed model                               phatgoose.routing
    detach         the base model again                         phatgoose.routing
    save, load     a routed model to and from a folder          phatgoose.routing.saved
    evaluate       zero-shot scores                             phatgoose.evaluation
    compare        many methods on whole suites                 phatgoose.evaluation
    analyse        where the tokens go, and why                 phatgoose.analysis

Importing this package loads neither torch nor transformers; using a name does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .analysis.analyse import analyse
    from .evaluation.comparison.compare import compare
    from .evaluation.evaluate import evaluate
    from .experts.expert import Expert
    from .experts.pool import Pool
    from .routing.compose import compose, detach
    from .routing.saved.load import load
    from .routing.saved.save import save
    from .tasks.loading import load_task
    from .training.train_expert import train_expert, train_gates

__all__ = [
    "Expert",
    "Pool",
    "analyse",
    "compare",
    "compose",
    "detach",
    "evaluate",
    "load",
    "load_task",
    "save",
    "train_expert",
    "train_gates",
]

_HOMES = {
    "Expert": "experts.expert",
    "Pool": "experts.pool",
    "analyse": "analysis.analyse",
    "compare": "evaluation.comparison.compare",
    "compose": "routing.compose",
    "detach": "routing.compose",
    "evaluate": "evaluation.evaluate",
    "load": "routing.saved.load",
    "load_task": "tasks.loading",
    "save": "routing.saved.save",
    "train_expert": "training.train_expert",
    "train_gates": "training.train_expert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'phatgoose' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


# transformers has no entry points: who would have AutoModelForCausalLM.from_pretrained read saved
# routed models registers with it. That is done when it is loaded, since we don't load it here.

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def _register() -> None:
    importlib.import_module(".routing.saved.auto", __name__).register()


class _WhenLoaded(MetaPathFinder):
    """Finds nothing of its own; what others find of transformers' auto classes registers us."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _AUTO_CLASSES in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenLoaded())
