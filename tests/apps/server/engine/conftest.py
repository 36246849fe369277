"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest
import torch

from phatgoose.base.loading import load_base
from routed_models import compose_by


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def runner_of(pool_of):
    """`runner_of(kind, router)`: the pool of that kind of base, composed, without end tokens."""
    from phatgoose.apps.server.models import ModelRunner

    made = {}

    def make(kind="llama", router="phatgoose"):
        if (kind, router) not in made:
            pool = pool_of(kind)
            base = load_base(pool.base.id, dtype="float32")
            runner = ModelRunner(compose_by(router, pool, base), base.tokenizer)
            runner.ends = frozenset()
            made[kind, router] = runner
        return made[kind, router]

    return make
