"""phatgoose: independently trained PEFT experts, routed per token and per module into one model.

    expert = pg.train_expert("smollm2", pg.load_task("reviews.jsonl"), out="experts/reviews")
    pool   = pg.Pool.open("experts/")
    model  = pg.compose(pool, router="phatgoose", k=2)      # still a PreTrainedModel
    result = pg.evaluate(model, [pg.load_task("unseen.jsonl")])

The names, in the order of the story:
    load_task      a dataset as a task                          phatgoose.tasks
    train_expert   a LoRA expert with gates and statistics      phatgoose.training
    train_gates    gates for a LoRA adapter that exists         phatgoose.gates
    Expert         one expert directory                         phatgoose.expert
    Pool           many of them                                 phatgoose.pool
    compose        a routed model                               phatgoose.routed
    detach         the base model again                         phatgoose.routed
    save, load     a routed model to and from a folder          phatgoose.saving, storage
    evaluate       zero-shot scores                             phatgoose.evaluation
    compare        many methods on whole suites                 phatgoose.comparison
    analyse        where the tokens go, and why                 phatgoose.analysis

Importing this package loads neither torch nor transformers; using a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .analysis import analyse
    from .comparison import compare
    from .evaluation import evaluate
    from .expert import Expert
    from .gates import train_gates
    from .pool import Pool
    from .routed import compose, detach
    from .saving import save
    from .storage import load
    from .tasks import load_task
    from .training import train_expert

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
    "Expert": "expert",
    "Pool": "pool",
    "analyse": "analysis",
    "compare": "comparison",
    "compose": "routed",
    "detach": "routed",
    "evaluate": "evaluation",
    "load": "storage",
    "load_task": "tasks",
    "save": "saving",
    "train_expert": "training",
    "train_gates": "gates",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'phatgoose' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
