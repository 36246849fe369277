"""A base is recognised by its weights and config, whatever its name and dtype."""

import shutil

import pytest
import torch

from phatgoose.base.fingerprint import Mark, fingerprint
from phatgoose.base.loading import load_base
from tiny import make_model


def test_the_fingerprint_is_the_same_in_float32_and_bfloat16(base_folders, kind):
    one, other = (load_base(base_folders[kind], dtype=d) for d in ("float32", "bfloat16"))
    assert other.model.dtype == torch.bfloat16
    assert one.fingerprint == other.fingerprint


def test_the_fingerprint_is_the_same_for_a_copy_under_another_name(base_folders, kind, tmp_path):
    copy = shutil.copytree(base_folders[kind], tmp_path / "renamed")
    one, other = (load_base(f, dtype="float32") for f in (base_folders[kind], copy))
    assert one.id != other.id
    assert one.fingerprint == other.fingerprint


def test_the_fingerprint_tells_two_seeds_of_one_architecture_apart(kind):
    assert fingerprint(make_model(kind, seed=0)) == fingerprint(make_model(kind, seed=0))
    assert fingerprint(make_model(kind, seed=0)) != fingerprint(make_model(kind, seed=1))


def set_element(row: int):
    def change(model):
        model.model.layers[0].post_attention_layernorm.weight[row] = 1.5

    return change


@pytest.mark.parametrize(
    "change",
    [
        *map(set_element, (0, 13, 31)),  # every element of a small tensor
        lambda model: model.model.layers[1].mlp.up_proj.weight.mul_(1.1),
        lambda model: setattr(model.config, "num_attention_heads", 8),
    ],
    ids=["first", "middle", "last", "a matrix", "heads"],
)
def test_the_fingerprint_sees_changes(change):
    model = make_model("llama")
    before = fingerprint(model)
    with torch.no_grad():
        change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mark_sees_signs_and_places(dtype):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    mark = Mark.of(weight)
    assert mark.fits(weight.clone())
    negated, swapped = weight.clone(), weight.clone()
    negated[:, 3] = -negated[:, 3]
    swapped[:, :128] = weight[:, :128].roll(64, dims=1)
    moved = weight[:, [1, 0, *range(2, 512)]]
    assert not any(mark.fits(other) for other in (negated, swapped, moved))
