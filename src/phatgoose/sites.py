"""Parts of a base: sites, where experts act, blocks, positions, and where weights are.

A site is a linear layer inside one of the model's repeated blocks, named by its module path, such
as `model.layers.0.self_attn.q_proj` (paper section 3: LoRA modifies every linear layer). Embeddings
and output heads are outside the blocks and are not sites.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ConfigError, RoutingError
from .files import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as experts may be stored
ROUTED = "phatgoose"  # the attribute that marks a routed model; see `routing.compose`
Stream = Literal["encoder", "decoder"]
Tensors = Mapping[str, Tensor]  # by name, or by site

CROSS_ATTENTION = re.compile(  # its keys and values; GPT-2's are one layer
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\.(self\.)?"
    r"((k|v|key|value)(_proj)?|c_attn)$"
)


@dataclass(frozen=True)
class Site:
    """A linear layer that experts may adapt.

    `stream` says whose tokens it sees: "encoder" for the encoder's layers and for keys and values
    of cross-attention, "decoder" for all others (so always for causal models).
    """

    name: str
    in_features: int
    out_features: int
    stream: Stream


Sites = Mapping[str, Site]  # by name


def find_sites(model: PreTrainedModel, pattern: str | None = None) -> Sites:
    """All sites of `model` by name, in the model's order.

    `pattern` keeps only the sites whose name it matches (regular expression, `re.search`); None
    keeps all. Raises ConfigError when the pattern is invalid or matches nothing, RoutingError when
    the model is already routed.
    """
    if hasattr(model, ROUTED):
        raise RoutingError("This model is routed already; detach it first.")
    with reading(f"sites {pattern!r}", ConfigError):
        expression = re.compile(pattern or "")
    modules = dict(model.named_modules())
    blocks = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    is_encoder_decoder = model.config.is_encoder_decoder
    encoder = set(model.get_encoder().modules()) if is_encoder_decoder else set()
    sites = {}
    for name, module in modules.items():
        shape = linear_shape(module)
        if shape and name.startswith(tuple(blocks)) and expression.search(name):
            stream: Stream = "decoder"
            if encoder and (module in encoder or CROSS_ATTENTION.search(name)):
                stream = "encoder"
            sites[name] = Site(name, *shape, stream)
    if not sites:
        raise ConfigError(
            f"No linear layer in the blocks of {type(model).__name__} matches {pattern or ''!r}."
        )
    return sites


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer of any library; None for other modules."""
    # transformers' subclasses of Linear that compute something else: the routers of PhiMoE and
    # Llama 4, and DeepSeek V4's grouped projection.
    if any(part in type(module).__name__ for part in ("Router", "Grouped")):
        return None
    if is_conv1d(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[0], weight.shape[1]
    # Quantised linears of other libraries look the same.
    if all(hasattr(module, name) for name in ("in_features", "out_features", "weight")):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def is_conv1d(layer: nn.Module) -> bool:
    """True for GPT-2's linear layers, whose weight is [inputs, outputs]."""
    from transformers.pytorch_utils import Conv1D  # here: a gateway has no need of transformers

    return isinstance(layer, Conv1D)


class WrappedLinear(nn.Module):
    """A layer in place of a linear one, `base`, with its attributes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = linear_shape(base) or (0, 0)

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def replaced(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """`layers` in place of submodules of `model`, by name, while the context is open."""
    originals = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)


def prompt_stack(model: PreTrainedModel) -> nn.Module:
    """The part of `model` that reads prompts: an encoder, or a causal model without its head."""
    stack: nn.Module = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    return stack


def headless(model: PreTrainedModel) -> nn.Module:
    """`model` without its head: logits would be most of a small model's work."""
    return model if model.config.is_encoder_decoder else prompt_stack(model)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that prompts pass: a causal model's, or an encoder's."""
    modules = prompt_stack(model).modules()
    lists = [module for module in modules if isinstance(module, nn.ModuleList)]
    # A stack may have other lists too, of norms or of a mixture's experts.
    largest = max(lists, key=lambda modules: len(list(modules.modules())))
    return list(largest)


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens a stack of `model` can distinguish by position, or was trained for.

    None for any number: relative positions (T5) and ALiBi have no limit.
    """
    config = model.config.get_text_config()
    count: int | None = getattr(config, "max_position_embeddings", None)
    is_limited = count and count > 0 and not getattr(config, "alibi", False)
    return count if is_limited else None


class Stack(NamedTuple):
    """What reads prompts: a module that takes `input_ids` and an `attention_mask`, and its blocks.

    `positions` is what `positions_of` says.
    """

    module: nn.Module
    blocks: list[nn.Module]
    width: int
    positions: int | None


def stack_of(model: PreTrainedModel) -> Stack:
    width = int(model.config.get_text_config().hidden_size)
    return Stack(prompt_stack(model), blocks_of(model), width, positions_of(model))


def dtype_at(layer: nn.Module, model: PreTrainedModel) -> torch.dtype:
    """The type that experts have at `layer`: its own, or the model's if that is quantised."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.dtype if weight.dtype in FLOATS else model.dtype
