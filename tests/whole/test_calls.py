"""Who looks at a call, to record, to measure or to choose an expert, knows that call and no other.

On OPT too, whose whole model calls its decoder past its base model and flattens rows inside.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from architectures import reading_pool, tiny_of
from phatgoose.base.identity import Base, fingerprint
from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.recording import record
from phatgoose.sites import find_sites
from phatgoose.tasks.batching import Collator, pad_left, pad_right
from phatgoose.tasks.encoding import TokenPair
from phatgoose.training.train_expert import mean_activations
from routed_models import tailed
from tiny import make_tokenizer

PROMPTS = ([40, 50, 60, 70, 80, 90], [100, 110, 120], [200, 30, 210, 31], [7, 250, 8])
each_model = pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "t5", "bart"])


def batch_of(model, prompts=PROMPTS) -> dict[str, torch.Tensor]:
    """Ids and mask of prompts in padded rows."""
    pad = pad_right if model.config.is_encoder_decoder else pad_left
    return {
        "input_ids": pad(prompts, 0),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0),
    }


def answers(model, prompts=PROMPTS, **options) -> torch.Tensor:
    """The logits of three steps of generation, [steps, rows, vocabulary]."""
    settings = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    length = {"max_new_tokens": 3, "min_new_tokens": 3}
    found = model.generate(**batch_of(model, prompts), **length, **settings, **options)
    return torch.stack(found.logits)


def base_of(name: str) -> Base:
    """The tiny model with a tokenizer."""
    model = copy.deepcopy(tiny_of(name).base)
    tokenizer = make_tokenizer(final_eos=model.config.is_encoder_decoder)
    return Base(model, tokenizer, "tiny", None, fingerprint(model))


@cache
def voters(name: str) -> Pool:
    """The tiny experts with prompt statistics by which PROMPTS have different experts."""
    return reading_pool(tiny_of(name).pool.experts)


def voting(name: str):
    return compose(voters(name), base_of(name), router="discriminant:fallback=off", k=1)


@each_model
def test_padding_is_recorded_nowhere(name):
    model = tiny_of(name).routed
    with record(model) as together:
        answers(model)
    alone = []
    for prompt in PROMPTS:
        with record(model) as recording:
            answers(model, [prompt])
        alone.append(recording)
    for site, weights in together.weights.items():
        for row in range(len(PROMPTS)):
            real = torch.cat([mask[row] for mask in together.real[site]])
            wanted = torch.cat([part[0] for part in alone[row].weights[site]])
            got = torch.cat([part[row] for part in weights])
            torch.testing.assert_close(got[real], wanted, rtol=0, atol=2e-4)
            assert not got[~real].any()


@each_model
def test_means_are_those_of_each_example_alone(name):
    model = tiny_of(name).base
    sites = find_sites(model)
    pairs = [TokenPair(prompt, [9] * (n + 1)) for n, prompt in enumerate(PROMPTS)]
    collator = Collator(model, 0)
    got = mean_activations(model, sites, pairs, collator)
    alone = [mean_activations(model, sites, [pair], collator) for pair in pairs]
    for site, mean in got.items():
        decodes = model.config.is_encoder_decoder and sites[site].stream == "decoder"
        mask = "decoder_attention_mask" if decodes else "attention_mask"
        counts = torch.tensor([int(collator([pair])[mask].sum()) for pair in pairs])
        rows = torch.stack([means[site] for means in alone])
        wanted = (counts[:, None] * rows).sum(dim=0) / counts.sum()
        torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_threads_have_votes_of_their_own(name):
    model = voting(name)
    wanted = [answers(model, [prompt]) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        got = threads.map(lambda prompt: answers(model, [prompt]), [*PROMPTS] * 3)
    assert all(map(torch.equal, got, wanted * 3))


@pytest.mark.parametrize("router", ["discriminant", "phatgoose"])
def test_continuous_batching_is_refused_where_inputs_are_read(router):
    """By a router, or to know where prompts end, for experts that act from there on."""
    pool = voters("llama")
    pool = tailed(pool.experts, (2, 2, 2)) if router == "phatgoose" else pool
    model = compose(pool, base_of("llama"), router=router)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32, page_size=16)
    with pytest.raises(RoutingError, match="several share a row in continuous batching"):
        model.generate_batch([*PROMPTS], continuous_batching_config=small, warmup=False)
