"""A base is recognised by its weights and config, whatever its name and dtype."""

import shutil

import torch
from safetensors.torch import load_file

from phatgoose.base import fingerprint, fingerprint_of_files, load_base, load_skeleton
from phatgoose.files import TensorFile
from tiny import make_model


def test_the_fingerprint_is_the_same_in_another_type_and_under_another_name(
    base_folders, kind, tmp_path
):
    copy = shutil.copytree(base_folders[kind], tmp_path / "renamed")
    one, other = load_base(base_folders[kind], dtype="float32"), load_base(copy, dtype="bfloat16")
    assert other.model.dtype == torch.bfloat16
    assert one.id != other.id
    assert one.fingerprint == other.fingerprint
    assert fingerprint(make_model(kind, seed=0)) != fingerprint(make_model(kind, seed=1))


@torch.no_grad()
def test_the_fingerprint_sees_changes():
    model = make_model("llama")
    seen = {fingerprint(model)}
    for row in (0, 13, 31):  # every element of a small tensor
        model.model.layers[0].post_attention_layernorm.weight[row] = 1.5
        seen.add(fingerprint(model))
    model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    seen.add(fingerprint(model))
    model.config.num_attention_heads = 8
    assert len({*seen, fingerprint(model)}) == 6


def test_the_files_of_a_base_have_its_fingerprint_unloaded(base_folders, kind):
    folder = base_folders[kind]
    loaded, skeleton = load_base(folder, dtype="float32"), load_skeleton(str(folder))
    file = TensorFile(folder / "model.safetensors")
    assert fingerprint_of_files(skeleton, file) == loaded.fingerprint
    tensors = {name: tensor.clone() for name, tensor in file.items()}
    next(tensor for tensor in tensors.values() if tensor.dim() == 2).mul_(1.5)
    assert fingerprint_of_files(skeleton, tensors) not in (None, loaded.fingerprint)


def test_files_that_lack_a_parameter_or_have_another_shape_have_none(base_folders):
    folder = base_folders["llama"]
    skeleton, tensors = load_skeleton(str(folder)), load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert fingerprint_of_files(skeleton, {n: t for n, t in tensors.items() if n != name}) is None
    assert fingerprint_of_files(skeleton, tensors | {name: tensors[name][1:]}) is None
    whole = tensors[name].to(torch.int8)
    assert fingerprint_of_files(skeleton, tensors | {name: whole}) is None
