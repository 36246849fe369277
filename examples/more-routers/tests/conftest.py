"""The fixtures of phatgoose's own tests, tests/support/shared_fixtures.py, and neutral text."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["shared_fixtures"]


@pytest.fixture
def read_neutrally():
    """A function: what each site of a base is given by neutral text, one input at a time."""
    from more_routers.neutral import neutral_examples

    from phatgoose.sites import find_sites
    from phatgoose.tasks.encoding import Encoder

    def read(base) -> dict[str, torch.Tensor]:
        seen = defaultdict(list)
        hooks = [
            base.model.get_submodule(site).register_forward_pre_hook(
                lambda _, args, site=site: seen[site].append(args[0].flatten(0, -2))
            )
            for site in find_sites(base.model)
        ]
        for pair in Encoder.of(base).pairs(neutral_examples()):
            ids = {"input_ids": torch.tensor([pair.prompt + pair.target])}
            if base.is_encoder_decoder:
                target = [base.model.config.decoder_start_token_id, *pair.target[:-1]]
                ids = {
                    "input_ids": torch.tensor([pair.prompt]),
                    "decoder_input_ids": torch.tensor([target]),
                }
            with torch.no_grad():
                base.model(**ids)
        for hook in hooks:
            hook.remove()
        return {site: torch.cat(inputs) for site, inputs in seen.items()}

    return read
