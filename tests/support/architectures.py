"""Tiny random models of many architectures, with random experts that live in memory only."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import tiny
from phatgoose.base.identity import BaseReference, fingerprint
from phatgoose.experts.expert import Expert, ExpertInfo
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import prompt_statistics_of
from phatgoose.routing.compose import compose
from phatgoose.sites import find_sites

READ = ([40, 50, 60, 70, 80, 90], [100, 110, 120], [200, 30, 210, 31], [7, 250, 8])  # prompts
IDS = tiny.IDS | {"bos_token_id": 1}
LLAMA = tiny.LLAMA | {"intermediate_size": 48, "max_position_embeddings": 128}
GROUPED = {**LLAMA, "num_key_value_heads": 2}  # queries share keys and values
GEMMA = {**GROUPED, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
BART = {f"{stack}_{name}": n for stack in ("encoder", "decoder") for name, n in LAYERS.items()}
BART |= {"d_model": 32, "max_position_embeddings": 128, "dropout": 0.0}
BART |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
OPT = {**LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {  # by transformers' model_type
    "llama": LLAMA,
    "mistral": {**GROUPED, "sliding_window": 4},
    "qwen2": GROUPED,
    "qwen3": GEMMA,
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "sliding_window": 4},
    "gemma3_text": {**GEMMA, "sliding_window": 4},
    "phi": {**LLAMA, "resid_pdrop": 0.0},
    "phi3": GROUPED,
    "gpt2": {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": LLAMA,
    "gptj": {**GPT, "rotary_dim": 4},
    "opt": OPT,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": LLAMA,
    "stablelm": GROUPED,
    "olmo2": GROUPED,
    "starcoder2": {**GROUPED, "residual_dropout": 0.0},
    "t5": tiny.T5 | {"dropout_rate": 0.0},
    "bart": BART,
    "pegasus": {**BART, "decoder_start_token_id": 0},
}


PROPHETNET = {"hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0}
PROPHETNET |= {"num_encoder_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 2}
PROPHETNET |= {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
POSITIONS = {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128}
SWITCH = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2}
SWITCH |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
SWITCH |= {"num_heads": 4, "num_experts": 2, "decoder_start_token_id": 0}
OTHERS = {  # built unlike the above
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "lfm2": {**GROUPED, "full_attn_idxs": [1]},  # convolutions keep a state of their own
    "openai-gpt": GPT,  # keeps nothing of what it has read
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "prophetnet": PROPHETNET,  # its decoder has several rows of activations for each of tokens
    "led": {**BART, **POSITIONS, "attention_window": [8, 8]},  # pads inside, to whole windows
    "nllb-moe": {**BART, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "switch_transformers": SWITCH,
}


@dataclass
class Tiny:
    """A tiny base, its experts, and both together; none of the models is to be changed."""

    base: PreTrainedModel

    @cached_property
    def pool(self) -> Pool:
        return Pool(tuple(random_expert(self.base, seed) for seed in range(3)))

    @cached_property
    def routed(self) -> PreTrainedModel:
        return compose(self.pool, copy.deepcopy(self.base), router="phatgoose")

    @cached_property
    def assistant(self) -> PreTrainedModel:
        return copy.deepcopy(self.base)


@cache
def tiny_of(architecture: str) -> Tiny:
    return Tiny(make_tiny(architecture))


def make_tiny(architecture: str, **options: object) -> PreTrainedModel:
    """A random model without dropout, with weights large enough for routing to matter."""
    settings = {**IDS, **{**ARCHITECTURES, **OTHERS}[architecture], **options}
    model = tiny.random_model(architecture, settings)
    if "gemma" in architecture:
        with torch.no_grad():  # it multiplies them by the root of their size
            model.get_input_embeddings().weight.mul_(0.25)
    model.generation_config.eos_token_id = None
    return model


def random_expert(base: PreTrainedModel, seed: int) -> Expert:
    """A LoRA of rank 2 at every site of `base`, with gates and means."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    sites = find_sites(base).values()
    reference = BaseReference("tiny", None, fingerprint(base))
    return Expert(
        ExpertInfo(f"e{seed}", reference, f"sha256:{seed:064}"),
        Path(f"e{seed}"),
        {
            site.name: LoraFactors(0.2 * draw(2, site.in_features), draw(site.out_features, 2), 0.5)
            for site in sites
        },
        {site.name: draw(site.in_features) for site in sites},
        {site.name: draw(site.in_features) for site in sites},
    )


def reading_pool(experts: Iterable[Expert]) -> Pool:
    """The experts with prompt statistics, as if each had one of READ for its prompts."""
    reader, tokenizer = tiny.small_reader(), tiny.make_tokenizer(final_eos=False)
    states = reader.states([tokenizer.decode(tokens) for tokens in READ])  # [prompts, blocks, d]
    near = states[:, None] + 0.1 * states.std(dim=0) * tiny.random(4, 8, *states.shape[1:])
    return Pool(
        tuple(
            expert.with_statistics(
                prompt_statistics=prompt_statistics_of(each),
                reader=reader.reference,
                prompts_read=len(each),
            )
            for expert, each in zip(experts, near, strict=False)
        )
    )
