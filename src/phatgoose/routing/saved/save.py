"""Saving routed models, to a folder of their own or the one that `save_pretrained` is given.

Both write the same files (docs/format.md): the stacked experts and their router, and a description
that names the base. The base's weights are not in them. For transformers and readers there are a
config, the tokenizer and a card beside them, which `load` doesn't read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...base import is_hub_id, surely_differs
from ...config import MODEL_TYPE
from ...errors import RoutingError
from ...experts.card import code
from ...experts.hub import HubReference
from ...files import (
    WRITING_ERRORS,
    new_directory,
    new_file,
    read_json_object,
    reason,
    sha256_of,
    write_text,
)
from ..composition import Composition, composition_of
from ..layers import FoldedLinear, RoutedLinear
from .tensors import FORMAT_VERSION, ROUTED_INFO, ROUTED_WEIGHTS, routing_record, shareable

CONFIG, CARD = "config.json", "README.md"
OTHERS = (CONFIG, "adapter_config.json")  # of models that from_pretrained would find
LIBRARY = "library_name: phatgoose"  # stands in our cards, and so tells them from a user's README


def save(model: PreTrainedModel, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write the routed `model` to `directory`: experts, router and hashes; the base by name only.

    Complete or not at all. Config, tokenizer and card are written too, for transformers and people.

    Args:
        model: A routed model.
        directory: The folder to make.
        overwrite: Replace the folder if it is there.

    Raises:
        RoutingError: `model` is not routed, its base's weights have changed, or `directory` exists
            or can't be written.
    """
    parts = composition_of(model)
    _check_base(model, parts)
    target = Path(directory)
    with new_directory(target, RoutingError, overwrite=overwrite) as work:
        save_file(_tensors(parts), work / ROUTED_WEIGHTS)
        describe(model, parts, work)


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
    there before, and leaves the rest alone. `phatgoose.load` reads the folder. `state_dict` and
    `how` (shards, say) are about the base's weights, of which none are written. Raises as `save`
    does, and RoutingError when the folder holds another model, or with `push_to_hub`, in whose
    place `model.push_to_hub` stands.
    """
    parts = composition_of(model)
    target = Path(save_directory)
    if push_to_hub:
        raise RoutingError("A routed model goes to the Hub by model.push_to_hub(name).")
    found = [name for name in OTHERS if (target / name).exists() and not is_ours(target / name)]
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
        describe(model, parts, target)
    except WRITING_ERRORS as error:
        raise RoutingError(f"{target} can't be written: {reason(error)}.") from error


def is_ours(config: Path) -> bool:
    """True if `config` is that of a routed model, False also if it can't be read."""
    return bool(_said_in(config, "model_type") == MODEL_TYPE)


def _check_base(model: PreTrainedModel, parts: Composition) -> None:
    if surely_differs(model, parts.base):
        raise RoutingError(
            f"The weights of the base {parts.base.id!r} have changed since it was loaded: "
            f"trained or resized? A routed model is saved without them; detach it and save the "
            f"base."
        )


def describe(model: PreTrainedModel, parts: Composition, folder: Path) -> None:
    """Write all but the experts' tensors, which are in `folder` already; the description last."""
    info = {
        "format_version": FORMAT_VERSION,
        "base": asdict(parts.base),
        "routing": routing_record(parts.router.recorded),
        "experts": shareable(parts.records),
        "weights_sha256": sha256_of(folder / ROUTED_WEIGHTS),
        "lookup": dict(parts.prompt_router.tables.info) if parts.prompt_router else {},
    }
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [type(model).__name__],
        "is_encoder_decoder": bool(model.config.is_encoder_decoder),
        "base_model": parts.base.id,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n", RoutingError)
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(folder)
    write_card(folder, info)
    write_text(folder / ROUTED_INFO, json.dumps(info, indent=2) + "\n", RoutingError)


MODEL_CARD = """\
---
{front}{library}
tags:
- phatgoose
---

# Routed model of {count}

Router `{router}` chooses among {count} for the base `{base}`. The base's weights are not in this
folder: they are loaded by its name and checked.

```python
import phatgoose as pg

model = pg.load("path/to/this/folder")
```

## Experts

{experts}
"""


def write_card(folder: Path, info: Mapping[str, Any]) -> None:
    """Write the card of the model that `info` describes; a README that isn't ours stays."""
    card = folder / CARD
    if card.exists() and LIBRARY not in card.read_text(encoding="utf-8", errors="replace"):
        return
    base, experts = info["base"]["id"], info["experts"]
    lines = [
        f"- {name}" + (f" (`{code(path)}`)" if HubReference.is_one(path) else "")
        for name, path in ((record["name"], record.get("path") or "") for record in experts)
    ]
    content = MODEL_CARD.format(
        front=f"base_model: {json.dumps(base)}\n" if is_hub_id(base) and "/" in base else "",
        library=LIBRARY,
        count="1 expert" if len(experts) == 1 else f"{len(experts)} experts",
        router=code(info["routing"]["router"]),
        base=code(base),
        experts="\n".join(lines),
    )
    write_text(card, content, RoutingError)


def _tensors(parts: Composition) -> dict[str, Tensor]:
    tensors = {f"experts.{name}": layer.experts for name, layer in parts.layers.items()}
    tensors |= parts.prompt_router.tables.saved() if parts.prompt_router else {}
    for name, layer in parts.layers.items():
        held: dict[str, Tensor] = {}
        if isinstance(layer, FoldedLinear):
            held = {"folded": layer.folded}
        elif isinstance(layer, RoutedLinear):
            held = {**layer.stack.tensors(), **layer.router.state()}
        tensors |= {f"{kind}.{name}": tensor for kind, tensor in held.items()}
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def is_encoder_decoder(folder: Path) -> bool:
    """What the config of the routed model in `folder` says; False without one."""
    return bool(_said_in(folder / CONFIG, "is_encoder_decoder"))


def _said_in(config: Path, name: str) -> Any:
    with suppress(RoutingError, OSError):
        return read_json_object(config, RoutingError).get(name)
    return None
