"""Tiny bases that hold few positions."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from phatgoose.base import Base, fingerprint
from tiny import make_tokenizer

FEW = {"vocab_size": 300, "max_position_embeddings": 40}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
BOTH = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
GPT2 = {"vocab_size": 300, "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 1}
KINDS_HERE = {"gpt2": GPT2, "opt": {**FEW, **SMALL, "word_embed_proj_dim": 16}, "bart": FEW | BOTH}


@cache
def few_places(kind: str) -> Base:
    """A base that holds 24 tokens, of a kind whose positions are a table."""
    torch.manual_seed(0)
    name = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    config = AutoConfig.for_model(kind, **{**KINDS_HERE[kind], name: 24}, **IDS)
    auto = AutoModelForSeq2SeqLM if kind == "bart" else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.forced_eos_token_id = None
    tokenizer = make_tokenizer(final_eos=kind == "bart")
    return Base(model, tokenizer, "few", None, fingerprint(model))
