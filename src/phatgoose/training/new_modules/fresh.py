"""An expert about to be trained: a base with new modules at the expert's sites.

All start as the identity. Only parameters of the expert (and of its gates, in joint training) want
gradients. They are float32 master copies that are cast in the forward pass, so that nothing of the
base path is upcast. (PEFT's default casts every activation up; docs/design.md has the speeds.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...base.loading import Base
from ...base.sites import Site
from ...experts.kinds.peft_files import ADAPTER

__all__ = ["FreshExpert", "NewModules", "peft_options", "save_peft", "under_peft"]


@dataclass(frozen=True)
class FreshExpert:
    """An expert in training: `model` is trained, then `save` writes its files to a folder.

    `parts` are the modules by site that hold joint gates, which have to be taken before saving.
    """

    model: nn.Module
    parts: Mapping[str, nn.Module]
    save: Callable[[Path], None]


@dataclass(frozen=True)
class NewModules:
    """How new modules of one kind are made.

    `default_sites` is the pattern of sites of a model for settings that name none, None for all
    sites; `count` the number of trained parameters at some sites, without gates; `create` a context
    in which a base holds the modules. `dtype` is the type they are stored in, None for the base's.
    """

    default_sites: Callable[[PreTrainedModel, Any], str | None]
    count: Callable[[PreTrainedModel, Any, Iterable[Site]], int]
    create: Callable[..., AbstractContextManager[FreshExpert]]
    dtype: torch.dtype | None = None


def peft_options(base: Base, sites: dict[str, Site]) -> dict[str, Any]:
    """What the configurations of all of PEFT's adapters say of the base and these sites of it."""
    first = base.model.get_submodule(next(iter(sites)))
    return {
        "task_type": TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM,
        "target_modules": list(sites),
        "fan_in_fan_out": isinstance(first, Conv1D),
        "revision": base.revision,
    }


@contextmanager
def under_peft(base: Base, config: PeftConfig) -> Iterator[PeftModel]:
    """The base as PEFT's model with a fresh adapter of this `config`, while the context is open."""
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has renamed; a user can't act on it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = get_peft_model(base.model, config)
    try:
        yield model
    finally:
        model.unload()


def save_peft(model: PeftModel, base: Base, folder: Path, dtype: torch.dtype) -> None:
    """Write PEFT's files of the adapter in `dtype`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.peft_config[ADAPTER].base_model_name_or_path = base.id
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card; the expert has its own
