"""Training DoRAs: PEFT's numbers and gradients, PEFT's files, and what a base in 16 bits keeps."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from phatgoose.config import Dora
from phatgoose.errors import ConfigError
from phatgoose.sites import find_sites
from phatgoose.training.train_expert import fresh_expert
from tiny import copied_model, make_ids
from training_runs import TRAINING, train

DORA = Dora(rank=2, alpha=4)


def trained_in(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """What is trained, by site and part: A, B and m."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = name.removeprefix("base_model.model.").replace("lora_magnitude", "lora_m")
            site, _, part = whole.replace(".trained.", ".lora_").partition(".lora_")
            found[site, part[0]] = parameter
    return found


def drawn(model: nn.Module, seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """The same, after A and B were drawn and m was changed."""
    held, generator = trained_in(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key in sorted(held):
            noise = torch.randn(held[key].shape, generator=generator)
            held[key].copy_(held[key] * (1 + 0.2 * noise) if key[1] == "m" else 0.2 * noise)
    return held


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT
def test_loss_and_gradients_are_pefts(base, kind):
    config = LoraConfig(
        r=DORA.rank,
        lora_alpha=DORA.alpha,
        use_dora=True,
        target_modules=list(find_sites(base.model)),
        fan_in_fan_out=kind == "gpt2",
    )
    theirs = get_peft_model(copied_model(kind), config)
    ids, found = make_ids(), []
    inputs = {"decoder_input_ids": ids} if kind == "t5" else {}
    with fresh_expert(base, DORA, joint=False) as fresh:
        norms = {key: p for key, p in trained_in(theirs).items() if key[1] == "m"}
        assert norms
        for name, norm in norms.items():
            torch.testing.assert_close(trained_in(fresh.model)[name], norm)
        for model in (fresh.model, theirs):
            model.train()
            held = drawn(model)
            torch.manual_seed(1)  # of the bases' dropout
            loss = model(ids, **inputs).logits.square().mean()
            slopes = torch.autograd.grad(loss, list(held.values()))
            found.append((loss, dict(zip(held, slopes, strict=True))))
    (loss, ours), (wanted, others) = found
    torch.testing.assert_close(loss, wanted)
    assert ours.keys() == others.keys()
    for name, other in others.items():
        assert other.any()
        tolerance = 1e-4 * float(other.abs().max())
        torch.testing.assert_close(ours[name], other, rtol=1e-3, atol=tolerance)


def test_quantised_weights_are_refused_before_anything_is_written(llama, tmp_path):
    llama.model.is_quantized = True
    with pytest.raises(ConfigError, match="not on quantised ones: leave out --dtype 4bit"):
        train(llama, tmp_path / "echo", peft=DORA, training=TRAINING)
    assert not list(tmp_path.iterdir())
