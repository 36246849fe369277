"""Sites: where in a base model an expert acts, what reaches them, and which tokens are real.

A site is a linear layer inside one of the model's repeated blocks, named by its module path, such
as `model.layers.0.self_attn.q_proj` (METHOD section 1: "for LoRA: every linear layer of every
block"). Embeddings and output heads stand outside the blocks and are no sites.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import ConfigError, RoutingError

__all__ = [
    "ROUTED",
    "Site",
    "Stream",
    "TokenMasks",
    "WrappedLinear",
    "find_sites",
    "linear_shape",
    "replace_module",
    "watch_inputs",
]

ROUTED = "phatgoose"  # the attribute by which a routed model is known; see routed.Composition
Stream = Literal["encoder", "decoder"]

CROSS_ATTENTION = re.compile(
    r"(EncDecAttention|encoder_attn|cross_attn|crossattention)\.(k|v|k_proj|v_proj)$"
)


@dataclass(frozen=True)
class Site:
    """A linear layer that experts may adapt.

    `stream` says whose tokens it sees: "encoder" for an encoder's layers and for the keys and
    values of cross-attention, "decoder" for all others (so always for causal models).
    """

    name: str
    in_features: int
    out_features: int
    stream: Stream


def find_sites(model: PreTrainedModel, pattern: str | None = None) -> dict[str, Site]:
    """All sites of `model` by name, in the model's order.

    `pattern` keeps only the sites whose name it matches (regular expression, `re.search`); None
    keeps all. Raises ConfigError when the pattern isn't one or matches nothing, RoutingError when
    the model is routed and its sites are taken.
    """
    if hasattr(model, ROUTED):
        raise RoutingError("This model is routed already; detach it first.")
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(f"sites is {pattern!r}, not a regular expression: {error}.") from error
    blocks = [
        name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    ]
    sites = {}
    for name, module in model.named_modules():
        shape = _shape_if_linear(module)
        if shape and name.startswith(tuple(blocks)) and wanted.search(name):
            sites[name] = Site(name, *shape, _stream_of(name, model))
    if not sites:
        raise ConfigError(
            f"No linear layer inside the blocks of {type(model).__name__} matches {pattern!r}."
            if pattern
            else f"{type(model).__name__} has no linear layers in blocks."
        )
    return sites


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer of any make. Raises ConfigError for other modules."""
    shape = _shape_if_linear(module)
    if shape is None:
        raise ConfigError(f"{type(module).__name__} is no linear layer.")
    return shape


def _shape_if_linear(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear) or (  # quantised linears of other libraries look the same
        hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and hasattr(module, "weight")
    ):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def _stream_of(name: str, model: PreTrainedModel) -> Stream:
    if not model.config.is_encoder_decoder:
        return "decoder"
    in_encoder = re.match(r"(model\.|transformer\.)?encoder\.", name)
    return "encoder" if in_encoder or CROSS_ATTENTION.search(name) else "decoder"


class WrappedLinear(nn.Module):
    """A layer that stands in the place of a linear one and looks like it to its model.

    `weight`, `bias`, `in_features` and `out_features` are those of `base`, and so are its keys in
    the model's state dict.
    """

    def __init__(self, base: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.register_state_dict_post_hook(_hide_wrapper)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_find_wrapper)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; some models look at its dtype."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias  # type: ignore[return-value]


def _hide_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}base.")]:
        state[prefix + key.removeprefix(f"{prefix}base.")] = state.pop(key)


def _find_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}base.{key.removeprefix(prefix)}"] = state.pop(key)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of `model` called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class TokenMasks:
    """Which of the tokens now passing through a model are real (True) rather than padding.

    Attached to a model, it reads the attention masks of every forward call, generation with a
    cache included (the mask then covers past tokens too; its last columns are the present ones).
    In a mask [rows, 1, queries, keys] a token is real that sees itself (`packing`).
    """

    def __init__(self) -> None:
        self._masks: dict[Stream, Tensor | None] = {"encoder": None, "decoder": None}
        self._handles: list[Any] = []

    def attach(self, model: PreTrainedModel) -> TokenMasks:
        """Self, watching `model` until `detach`."""
        if model.config.is_encoder_decoder:
            self._watch(model.get_encoder(), "encoder")
            self._watch(model.get_decoder(), "decoder")
        else:
            self._watch(model.base_model, "decoder")
        return self

    def detach(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def real_tokens(self, u: Tensor, stream: Stream) -> Tensor | None:
        """A boolean mask of shape u.shape[:-1], or None when every token of `u` is real."""
        mask = self._masks[stream]
        return mask if mask is not None and mask.shape == u.shape[:-1] else None

    def _watch(self, stack: nn.Module, stream: Stream) -> None:
        signature = inspect.signature(stack.forward)

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature.bind_partial(*args, **kwargs).arguments
            self._masks[stream] = _unless_all_real(_present_columns(given))
            if stream == "decoder":
                encoder_mask = given.get("encoder_attention_mask")
                self._masks["encoder"] = _unless_all_real(
                    None if encoder_mask is None else encoder_mask.bool()
                )

        self._handles.append(stack.register_forward_pre_hook(remember, with_kwargs=True))


def _unless_all_real(mask: Tensor | None) -> Tensor | None:
    """`mask`, or None when it hides nothing. Only a CPU is asked; others would be waited for."""
    if mask is None or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return mask
    return None if mask.all() else mask


def _present_columns(arguments: dict[str, Any]) -> Tensor | None:
    """The attention mask's columns of the tokens being passed, None when there is no such mask."""
    mask, tokens = arguments.get("attention_mask"), arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    if tokens is None or not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask[:, -tokens.shape[1] :].bool()
    itself = mask[:, 0].diagonal(mask.shape[-1] - mask.shape[-2], dim1=1, dim2=2)
    return itself if itself.dtype == torch.bool else itself == 0


@contextmanager
def watch_inputs(
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    see: Callable[[Site, Tensor, Tensor | None], None],
) -> Iterator[None]:
    """Call `see(site, u, real)` for each pass through each site while the context is open.

    `u` is the site's input, [..., n]; `real` the mask of its non-padding tokens, None for all.
    """
    masks = TokenMasks().attach(model)

    def watcher(site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(site, args[0], masks.real_tokens(args[0], site.stream))

        return hook

    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(watcher(site))
        for site in sites.values()
    ]
    try:
        yield
    finally:
        masks.detach()
        for handle in handles:
            handle.remove()
