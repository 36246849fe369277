"""How many tokens a base model can distinguish by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["Positions", "positions_of"]

# What architectures call their table of positions, learned or precomputed.
TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding")


@dataclass(frozen=True)
class Positions:
    """How many tokens fit into the stack that reads prompts and the one that reads answers.

    None means any number. In a causal model both share one row of `prompt` positions. `trained` is
    the length that a model without a table was trained for: it accepts longer rows, with unknown
    quality.
    """

    prompt: int | None = None
    answer: int | None = None
    trained: int | None = None


def positions_of(model: PreTrainedModel) -> Positions:
    """The positions of `model`, routed or not, with weights or without.

    Relative positions (T5) and ALiBi have no limit, rotary ones only that of their training.
    """
    if model.config.is_encoder_decoder:
        encoder, decoder = model.get_encoder(), model.get_decoder()
        return Positions(_places(encoder), _places(decoder))
    places = _places(model)
    config = model.config.get_text_config()
    trained = None
    if places is None and not getattr(config, "alibi", False):
        trained = getattr(config, "max_position_embeddings", None)
    return Positions(places, places, trained if trained and trained > 0 else None)


def _places(stack: nn.Module) -> int | None:
    """The size of the table of positions in `stack`, None without one."""
    for module in stack.modules():
        for name in TABLES:
            table: Any = getattr(module, name, None)
            if isinstance(table, nn.Embedding):
                padding = table.padding_idx
                unused = getattr(table, "offset", None) or (0 if padding is None else padding + 1)
                return int(table.num_embeddings) - int(unused)
            if isinstance(table, Tensor):  # precomputed sines and cosines
                return len(table)
    return None
