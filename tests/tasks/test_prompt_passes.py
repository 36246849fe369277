"""Passes of prompts, seen at sites and blocks: against passes of each prompt alone."""

from __future__ import annotations

import torch

from phatgoose.base.sites import find_sites
from phatgoose.tasks.prompt_passes import PromptReading, last_token, mean_token, read_prompts
from tiny import make_ids

PROMPTS = [make_ids(tokens=n, seed=n)[0].tolist() for n in (4, 9, 1, 6)]


class Ends(PromptReading):
    """The last and the mean activation of each prompt, at some sites and after some blocks."""

    def __init__(self, sites, blocks):
        self.sites, self.blocks = sites, blocks

    def begin(self, mask):
        self.mask, self.parts = mask, []

    def see_site(self, site, u):
        self.parts += [last_token(u, self.mask), mean_token(u, self.mask)]

    def see_block(self, index, hidden):
        self.parts += [last_token(hidden, self.mask), mean_token(hidden, self.mask)]

    def found(self):
        return torch.cat(self.parts, dim=1)


def alone(base, prompt, sites, blocks) -> torch.Tensor:
    """The same of one prompt, by torch's own hooks and transformers' hidden states."""
    seen = []
    model = base.model
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        for name in sites
    ]
    stack = model.get_encoder() if base.is_encoder_decoder else model.base_model
    with torch.no_grad():
        hidden = stack(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    seen += [hidden[index + 1][0] for index in blocks]
    return torch.cat([part for tokens in seen for part in (tokens[-1], tokens.mean(dim=0))])


def test_what_is_read_is_what_each_prompt_alone_gives(base, monkeypatch):
    monkeypatch.setattr("phatgoose.tasks.prompt_passes.BATCH_TOKENS", 18)
    every = find_sites(base.model)
    stack = "encoder" if base.is_encoder_decoder else ""
    named = [name for name in every if stack in name.split(".") or not stack]
    sites = {name: every[name] for name in (named[0],)}
    got = read_prompts(base.model, PROMPTS, Ends(sites, (0,)))
    wanted = torch.stack([alone(base, prompt, sites, (0,)) for prompt in PROMPTS])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
