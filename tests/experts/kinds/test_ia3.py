"""(IA)³ vectors on disk: read as PEFT wrote them, or refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from changed_adapters import complaint_about
from golden_sites import DOWN, QUERY
from paths import GOLDENS
from phatgoose.experts.expert import Expert
from phatgoose.experts.kinds.peft import ADAPTER_WEIGHTS


def test_the_golden_ia3_is_read_as_it_was_written():
    expert = Expert.load(GOLDENS / "ia3")
    assert expert.kind == "ia3"
    assert expert.modules[QUERY].vector.tolist() == [0.5, 0.75, 1.0]
    assert expert.modules[DOWN].vector.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75]
    assert {site: m.on_input for site, m in expert.modules.items()} == {QUERY: False, DOWN: True}


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 1, 1)])
def test_an_ia3_tensor_of_another_shape_is_refused(tmp_path, shape):
    folder = shutil.copytree(GOLDENS / "ia3", tmp_path / "mine")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    tensors[f"base_model.model.{QUERY}.ia3_l"] = torch.ones(shape)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    assert f"site {QUERY}: wanted a vector" in complaint_about(folder)
    tensors["base_model.model.x.lora_A.weight"] = torch.ones(2, 2)
    del tensors[f"base_model.model.{QUERY}.ia3_l"]
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    assert "'base_model.model.x.lora_A.weight'" in complaint_about(folder)
