"""New LoRAs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from phatgoose.base.sites import find_sites
from phatgoose.training import train_expert as training_module
from training_runs import (
    LORA,
    train,
)


def test_lora_starts_as_the_method_says(llama, tmp_path, monkeypatch):
    started = {}

    def start(model, *_, **options):
        named = model.named_parameters()
        started.update({name: p.detach().clone() for name, p in named if p.requires_grad})
        raise LookupError

    monkeypatch.setattr(training_module, "fit", start)
    with pytest.raises(LookupError):
        train(llama, tmp_path / "echo", peft=replace(LORA, rank=16))
    A, B = (torch.cat([p.flatten() for n, p in started.items() if f"lora_{s}" in n]) for s in "AB")
    assert A.std().item() == pytest.approx(0.01, rel=0.05)
    assert not B.any()
    assert len(started) == 2 * len(find_sites(llama.model))
