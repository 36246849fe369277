"""Training DoRAs: PEFT's numbers and gradients, PEFT's files, and what a base in 16 bits keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from phatgoose.config import Dora
from phatgoose.errors import ConfigError
from phatgoose.sites import find_sites
from phatgoose.training.train_expert import fresh_expert
from tiny import make_ids, make_model, random
from training_runs import TRAINING, train

DORA = Dora(rank=2, alpha=4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT
def test_loss_and_gradients_are_pefts(base, kind):
    config = LoraConfig(
        r=DORA.rank,
        lora_alpha=DORA.alpha,
        use_dora=True,
        target_modules=list(find_sites(base.model)),
        fan_in_fan_out=kind == "gpt2",
    )
    peft, ids = get_peft_model(make_model(kind), config), make_ids()
    inputs = {"decoder_input_ids": ids} if kind == "t5" else {}
    theirs = {}  # A, B and m, by site
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            site, part = name.removeprefix("base_model.model.").split(".lora_")
            theirs[site, part[0]] = parameter
    with fresh_expert(base, DORA, joint=False) as fresh:
        ours = {(s, name): p for s, part in fresh.parts.items() for name, p in part.items()}
        assert ours.keys() == theirs.keys()
        for key in sorted(ours):
            now = 0.2 * random(*ours[key].shape, seed=len(key[0]))
            if key[1] == "m":
                torch.testing.assert_close(ours[key], theirs[key])
                now = ours[key] * (1 + now)
            ours[key].data.copy_(now)
            theirs[key].data.copy_(now)
        found = []
        for model, trained in ((fresh.model, ours), (peft, theirs)):
            model.train()
            torch.manual_seed(1)  # of the bases' dropout
            loss = model(ids, **inputs).logits.square().mean()
            found.append((loss, torch.autograd.grad(loss, [trained[key] for key in sorted(ours)])))
    (loss, slopes), (wanted, others) = found
    torch.testing.assert_close(loss, wanted)
    for slope, other in zip(slopes, others, strict=True):
        assert other.any()
        torch.testing.assert_close(slope, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_quantised_weights_are_refused_before_anything_is_written(llama, tmp_path):
    llama.model.is_quantized = True
    with pytest.raises(ConfigError, match="not on quantised ones: leave out --dtype 4bit"):
        train(llama, tmp_path / "echo", peft=DORA, training=TRAINING)
    assert not list(tmp_path.iterdir())
