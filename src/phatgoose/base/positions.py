"""How many tokens a base model can tell apart by their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["Positions", "positions_of"]

# What architectures call their table of positions, learned or computed once.
TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding")


@dataclass(frozen=True)
class Positions:
    """The tokens that fit into what reads prompts and into what reads answers; None: any number.

    In a causal model both are one row, which has `prompt` places. `trained` is the length that a
    model without a table was made for: it reads on, but nobody knows how well.
    """

    prompt: int | None = None
    answer: int | None = None
    trained: int | None = None


def positions_of(model: PreTrainedModel) -> Positions:
    """The positions of `model`, routed or not, with weights or without.

    Relative positions (T5) and ALiBi have no limit, rotary ones none but their training's.
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
    """The places in the table of positions that `stack` has, None without one."""
    for module in stack.modules():
        for name in TABLES:
            table: Any = getattr(module, name, None)
            if isinstance(table, nn.Embedding):
                padding = table.padding_idx
                unused = getattr(table, "offset", None) or (0 if padding is None else padding + 1)
                return int(table.num_embeddings) - int(unused)
            if isinstance(table, Tensor):  # sines and cosines, looked up by place
                return len(table)
    return None
