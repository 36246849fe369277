"""Neutral text: the same passages for everybody, and what a base makes of them."""

import hashlib

import pytest
import torch

from phatgoose.base.sites import find_sites
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.neutral import PASSAGES, moments, neutral_examples
from tiny import logits_of

DIGEST = "9fddd28e22dd9762326201a8e8152024ec5a354d4cfec972764b8aa09a797652"


def test_the_passages_never_change():
    assert hashlib.sha256(PASSAGES.read_bytes()).hexdigest() == DIGEST
    examples = neutral_examples()
    assert len(examples) == 40
    for passage, example in zip(PASSAGES.read_text().strip().split("\n\n"), examples, strict=True):
        assert (example.input + example.target).split() == passage.split() or (
            f"{example.input} {example.target}".split() == passage.split()
        )
        assert example.input
        assert example.target


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_moments_are_those_of_all_real_tokens(base):
    sites = find_sites(base.model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
    hooks = [
        base.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in sites
    ]
    for pair in Encoder.of(base).pairs(neutral_examples()):
        if base.model.config.is_encoder_decoder:
            target = torch.tensor([[base.model.config.decoder_start_token_id, *pair.target[:-1]]])
            logits_of(base.model, torch.tensor([pair.prompt]), decoder_input_ids=target)
        else:
            logits_of(base.model, torch.tensor([pair.prompt + pair.target]))
    for hook in hooks:
        hook.remove()
    for name, (mean, deviation) in moments(base.model, base.tokenizer, sites).items():
        tokens = torch.cat(seen[name])
        torch.testing.assert_close(mean, tokens.mean(dim=0), atol=1e-4, rtol=1e-3)
        wanted = tokens.std(dim=0, correction=0)
        torch.testing.assert_close(deviation, wanted, atol=1e-3, rtol=1e-2)
