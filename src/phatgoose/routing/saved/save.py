"""Saving routed models, to a folder of their own or the one that `save_pretrained` is given.

Both write the same files (docs/format.md): the stacked experts and their router, and a description
that names the base. The base's weights are not in them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...base.fingerprint import changed_since, surely_differs
from ...errors import RoutingError
from ...files.atomic import WRITING_ERRORS, new_directory, new_file, write_text
from ...files.strict import reason, sha256_of
from ..composition import Composition, composition_of
from ..layers import FoldedLinear, RoutedLayer, RoutedLinear
from .tensors import ROUTED_INFO, ROUTED_WEIGHTS, routing_record, version_of

FORMAT_VERSION = 1
OTHERS = ("config.json", "adapter_config.json")  # of models that from_pretrained would find


def save(model: PreTrainedModel, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write the routed `model` to `directory`: experts, router and hashes; the base by name only.

    Complete or not at all. Raises RoutingError when `model` is not routed, its base's weights have
    changed, or `directory` exists (unless `overwrite`) or can't be written.
    """
    parts = composition_of(model)
    _check_base(model, parts)
    target = Path(directory)
    with new_directory(target, RoutingError, overwrite=overwrite) as work:
        save_file(_tensors(parts), work / ROUTED_WEIGHTS)
        (work / ROUTED_INFO).write_text(described(parts, work), encoding="utf-8")


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    **how: Any,
) -> None:
    """What `model.save_pretrained` is while `model` is routed: writes the files that `save` does.

    As transformers' own it writes into a folder that may be there already, replaces what it wrote
    there before, and leaves the rest alone. `phatgoose.load` reads the folder, `from_pretrained`
    doesn't. `state_dict` and `how` (shards, say) are about the base's weights, of which none are
    written. Raises as `save` does, and RoutingError when the folder holds another model, or with
    `push_to_hub`, in whose place `model.push_to_hub` stands.
    """
    parts = composition_of(model)
    target = Path(save_directory)
    if push_to_hub:
        raise RoutingError("A routed model goes to the Hub by model.push_to_hub(name).")
    found = [name for name in OTHERS if (target / name).exists()]
    if found:
        raise RoutingError(
            f"{target} holds another model ({found[0]}), which from_pretrained would take for the "
            f"routed one; choose another place."
        )
    _check_base(model, parts)
    if not is_main_process:
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
        with new_file(target / ROUTED_WEIGHTS) as unfinished:
            save_file(_tensors(parts), unfinished)
            (target / ROUTED_INFO).unlink(missing_ok=True)  # no routed model until all is there
    except WRITING_ERRORS as error:
        raise RoutingError(f"{target} can't be written: {reason(error)}.") from error
    write_text(target / ROUTED_INFO, described(parts, target), RoutingError)


def _check_base(model: PreTrainedModel, parts: Composition) -> None:
    changed, differs = changed_since(model, parts.marks), parts.differs
    if any(mark.content is None for mark in parts.marks.values()):  # offloaded when it was routed
        differs = surely_differs(model, parts.base)
    if changed or differs:
        name = f" ({changed})" if changed else ""
        raise RoutingError(
            f"The weights of the base {parts.base.id!r} have changed since it was loaded{name}: "
            f"trained or resized? A routed model is saved without them; detach it and save the "
            f"base."
        )


def described(parts: Composition, folder: Path) -> str:
    info = {
        "format_version": version_of(parts.records, FORMAT_VERSION),
        "base": asdict(parts.base),
        "routing": routing_record(parts.routing),
        "experts": parts.records,
        "weights_sha256": sha256_of(folder / ROUTED_WEIGHTS),
        "lookup": dict(parts.prompt_router.tables.info) if parts.prompt_router else {},
    }
    return json.dumps(info, indent=2) + "\n"


def _tensors(parts: Composition) -> dict[str, Tensor]:
    tensors = {f"experts.{name}": layer.experts for name, layer in parts.layers.items()}
    tensors |= parts.prompt_router.tables.saved() if parts.prompt_router else {}
    for layer in parts.layers.values():
        tensors |= layer_tensors(layer)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def layer_tensors(layer: RoutedLayer) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    if isinstance(layer, FoldedLinear):
        held = {"folded": layer.folded}
    elif isinstance(layer, RoutedLinear):
        held = {**layer.stack.tensors(), **layer.router.state()}
    return {f"{name}.{layer.site.name}": tensor for name, tensor in held.items()}
