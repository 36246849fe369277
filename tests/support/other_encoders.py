"""Tiny encoder-decoder models that are built unlike T5 and BART."""

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from architectures import BART, IDS

PROPHETNET = {  # its decoder has several rows of activations for each of tokens
    "hidden_size": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
}
LED = {  # pads inside, to whole windows
    **BART,
    "attention_window": [8, 8],
    "max_encoder_position_embeddings": 128,
    "max_decoder_position_embeddings": 128,
}
NLLB_MOE = {**BART, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
SWITCH = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2}
SWITCH |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
SWITCH |= {"num_heads": 4, "num_experts": 2}
OTHER_ENCODERS = {  # by transformers' model_type
    "bart": BART,
    "led": LED,
    "nllb-moe": NLLB_MOE,
    "prophetnet": PROPHETNET,
    "switch_transformers": {**SWITCH, "decoder_start_token_id": 0},
}


def make_other(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**IDS, **OTHER_ENCODERS[architecture]})
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config)
    return model.eval()
