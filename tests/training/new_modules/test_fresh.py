"""New modules on a base, and the base without them."""

from __future__ import annotations

import torch

from phatgoose.tasks.task import Task
from training_runs import (
    train,
    words,
)


def test_a_base_is_as_it_was_after_training(base, tmp_path):
    weights = {key: value.clone() for key, value in base.model.state_dict().items()}
    modules, attributes = dict(base.model.named_modules()), set(vars(base.model))
    train(base, tmp_path / "first", Task("other", words("x", "y", "z")))
    assert dict(base.model.named_modules()) == modules
    assert set(vars(base.model)) - attributes <= {"_is_accelerate_prepared"}  # accelerate's mark
    assert all(torch.equal(base.model.state_dict()[key], weights[key]) for key in weights)
    assert not base.model.training
