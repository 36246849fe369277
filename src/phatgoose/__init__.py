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
    save, load     a routed model to and from a folder          phatgoose.routing.compose
    Chooser        a prompt's experts, chosen without a base    phatgoose.routing
    evaluate       zero-shot scores                             phatgoose.evaluation
    compare        many methods on whole suites                 phatgoose.evaluation
    analyse        where the tokens go, and why                 phatgoose.analysis

Importing this package loads neither torch nor transformers; using a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .analysis.analyse import analyse as analyse
    from .evaluation.compare import compare as compare
    from .evaluation.evaluate import evaluate as evaluate
    from .experts.expert import Expert as Expert
    from .experts.pool import Pool as Pool
    from .routing.chooser import Chooser as Chooser
    from .routing.compose import compose as compose
    from .routing.compose import detach as detach
    from .routing.compose import load as load
    from .routing.compose import save as save
    from .tasks.loading import load_task as load_task
    from .training.train_expert import train_expert as train_expert
    from .training.train_expert import train_gates as train_gates

_HOMES = {
    "Chooser": "routing.chooser",
    "Expert": "experts.expert",
    "Pool": "experts.pool",
    "analyse": "analysis.analyse",
    "compare": "evaluation.compare",
    "compose": "routing.compose",
    "detach": "routing.compose",
    "evaluate": "evaluation.evaluate",
    "load": "routing.compose",
    "load_task": "tasks.loading",
    "save": "routing.compose",
    "train_expert": "training.train_expert",
    "train_gates": "training.train_expert",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'phatgoose' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
