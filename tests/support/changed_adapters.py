"""Adapters on disk, changed, and why they are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from odd_files import rewrite
from phatgoose.errors import ExpertError
from phatgoose.experts.expert import read_modules
from phatgoose.experts.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def adapter_of(expert: Path, to: Path) -> Path:
    """A copy without what makes an adapter an expert, which `import_adapter` would refuse."""
    return shutil.copytree(expert, to, ignore=shutil.ignore_patterns("phatgoose.*"))


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)


def complaint_about(adapter: Path) -> str:
    with pytest.raises(ExpertError) as caught:
        read_modules(adapter)
    message = str(caught.value)
    assert str(adapter) in message
    assert "\n" not in message
    return message


def set_config(adapter: Path, **values: object) -> None:
    rewrite(adapter / ADAPTER_CONFIG, **values)
