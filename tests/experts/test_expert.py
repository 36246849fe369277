"""The expert directory: what is saved comes back, and every kind of damage is found and named."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from changed_adapters import set_config
from changed_experts import SITE, change_vectors, make, problem_of, set_info, vectors_for
from paths import GOLDEN
from phatgoose.base import BaseReference
from phatgoose.config import Formatting
from phatgoose.errors import ConfigError, ExpertError
from phatgoose.experts.expert import (
    LAYOUT,
    Expert,
    base_named_in,
    check_expert,
    format_record,
    recorded_formatting,
    warn_of_other_formatting,
)
from phatgoose.experts.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.files import sha256_of


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[site].view(torch.int32), other[site].view(torch.int32)) for site in one
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_expert_comes_back_bit_for_bit(adapter, tmp_path):
    made = make(
        adapter,
        means=vectors_for(adapter, 2),
        embeddings=torch.eye(3),
        embedder="some/embedder",
        task={"name": "reviews", "note": "with ünicode"},
        hyperparameters={"rank": 4, "learning_rate": 5e-3, "sites": None},
        metrics={"loss": 0.1},
    )
    saved = made.save(tmp_path / "deep" / "reviews")
    loaded = Expert.load(tmp_path / "deep" / "reviews")
    for expert in (saved, loaded):
        assert same_bits(expert.gates, made.gates)
        assert same_bits(expert.means, made.means)
        assert torch.equal(expert.embeddings, torch.eye(3))
        assert expert.name == "reviews"
        for key in ("base", "task", "hyperparameters", "metrics", "embedder", "adapter_sha256"):
            assert getattr(expert.info, key) == getattr(made.info, key), key
    assert check_expert(saved.directory) == []


def test_a_loss_that_is_no_number_does_not_make_an_expert_unreadable(adapter, tmp_path):
    metrics = {"loss": float("nan"), "losses": [1.0, float("inf")]}
    saved = make(adapter, metrics=metrics).save(tmp_path / "reviews")
    assert saved.info.metrics == {"loss": None, "losses": [1.0, None]}


def test_the_base_is_the_one_that_the_adapter_names_at_the_revision_that_it_names(
    adapter, llama, tmp_path
):
    adapter = shutil.copytree(adapter, tmp_path / "reviews")
    assert base_named_in(adapter) == BaseReference(llama.id)
    set_config(adapter, revision="abc123")
    wanted = BaseReference(llama.id, "abc123")
    assert base_named_in(adapter) == wanted
    expert = Expert.from_peft(adapter, {}).save(tmp_path / "plain")
    assert expert.info.base == wanted
    set_config(expert.directory, revision="other")
    assert base_named_in(expert.directory) == wanted  # what the expert itself says
    assert Expert.from_peft(adapter, {}, base=llama).info.base == llama.reference
    set_config(adapter, base_model_name_or_path=None)
    assert base_named_in(adapter) is None
    with pytest.raises(ExpertError, match="doesn't name its base; give base"):
        Expert.from_peft(adapter, {})


def test_a_revision_that_is_none_is_refused_unless_the_base_is_given(adapter, llama, tmp_path):
    adapter = shutil.copytree(adapter, tmp_path / "reviews")
    for odd in (["v2"], "../v2"):
        set_config(adapter, revision=odd)
        for read in (base_named_in, lambda folder: Expert.from_peft(folder, {})):
            with pytest.raises(ExpertError, match=re.escape(f"names revision {odd!r} of its base")):
                read(adapter)
    assert Expert.from_peft(adapter, {}, base=llama).info.base == llama.reference


def test_an_expert_directory_can_be_read_by_others(original, tmp_path):
    before = os.umask(0o022)
    try:
        directory = original.save(tmp_path / "shared").directory
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o755
    hidden = [path.name for path in directory.iterdir() if path.stat().st_mode & 0o444 != 0o444]
    assert hidden == []


def test_an_expert_without_gates_is_whole_too(adapter, tmp_path):
    expert = make(adapter, gates={}).save(tmp_path / "plain")
    assert (expert.gates, expert.means, expert.embeddings) == ({}, {}, None)
    assert not (expert.directory / LAYOUT.vectors).exists()
    assert check_expert(expert.directory) == []


def test_gates_of_any_dtype_are_kept_as_float32(adapter):
    gates = {site: vector.to(torch.bfloat16) for site, vector in vectors_for(adapter, 1).items()}
    made = make(adapter, gates=gates)
    assert all(torch.equal(made.gates[site], gates[site].float()) for site in gates)


def test_gates_may_be_the_means_too(adapter, tmp_path):
    sites = Expert.from_peft(adapter, {}).lora
    both = torch.randn(len(sites), 64)
    vectors = {site: both[z, : lora.A.shape[1]] for z, (site, lora) in enumerate(sites.items())}
    expert = Expert.from_peft(adapter, vectors, means=vectors).save(tmp_path / "expert")
    for site, vector in vectors.items():
        assert torch.equal(expert.gates[site], vector)
        assert torch.equal(expert.means[site], vector)


@settings(max_examples=25)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)
)
def test_any_finite_float32_vector_survives(adapter, tmp_path_factory, values):
    gates = {**vectors_for(adapter, 1), SITE: torch.tensor(values, dtype=torch.float32)}
    made = make(adapter, gates=gates)
    saved = made.save(tmp_path_factory.getbasetemp() / "any" / "reviews", overwrite=True)
    assert same_bits(saved.gates, gates)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"gates": {SITE: torch.zeros(31)}}, "the gate has shape (31,)"),
        ({"means": {SITE: torch.zeros(33)}}, "the mean has shape (33,)"),
        ({"gates": {SITE: torch.full((32,), torch.nan)}}, f"site {SITE}: the gate is not finite"),
        ({"gates": {SITE: None}}, f"site {SITE}: the gate is missing"),
        ({"embeddings": 2 * torch.eye(3)}, "each of length 1"),
    ],
)
def test_what_does_not_fit_is_refused_when_an_expert_is_made(adapter, given, complaint):
    for kind, change in given.items():
        if kind != "embeddings":
            vectors = {**vectors_for(adapter, 1), **change}
            given = {kind: {site: held for site, held in vectors.items() if held is not None}}
    with pytest.raises(ExpertError, match=re.escape(complaint)) as caught:
        make(adapter, **given)
    assert "'reviews'" in str(caught.value)


@pytest.mark.parametrize("file", [ADAPTER_WEIGHTS, LAYOUT.vectors])
def test_a_changed_file_is_found_by_its_hash(directory, file):
    save_file(
        {name: -tensor for name, tensor in load_file(directory / file).items()}, directory / "new"
    )
    os.replace(directory / "new", directory / file)
    problem = problem_of(directory)
    for part in ("'reviews'", f"{file} was changed", sha256_of(directory / file)[:12]):
        assert part in problem


@pytest.mark.parametrize("kind", ["gate", "mean"])
@pytest.mark.parametrize(
    ("site", "vector", "complaint"),
    [
        (SITE, torch.zeros(31), "has shape (31,)"),
        (SITE, torch.zeros(1, 32), "has shape (1, 32)"),
        (
            SITE,
            torch.zeros(32, dtype=torch.float16),
            "type torch.float16, wanted (32,) and float32",
        ),
        (SITE, torch.full((32,), torch.nan), "not finite"),
        (SITE, torch.full((32,), torch.inf), "not finite"),
        (SITE, None, "{} is missing"),
        ("model.layers.9.mlp.up_proj", torch.zeros(32), "adapter is missing"),
    ],
)
def test_a_damaged_vector_is_found(directory, kind, site, vector, complaint):
    def damage(vectors):
        vectors.update({f"{kind}.{site}": vector}) if vector is not None else vectors.pop(
            f"{kind}.{site}"
        )

    change_vectors(directory, damage)
    problem = problem_of(directory)
    assert site in problem
    assert complaint.format(kind) in problem


@pytest.mark.parametrize("key", ["bias.x", "gates", "notes"])
def test_a_vector_of_an_unknown_kind_is_found(directory, key):
    change_vectors(directory, lambda vectors: vectors.update({key: torch.zeros(32)}))
    assert repr(key) in problem_of(directory)


@pytest.mark.parametrize("file", [ADAPTER_WEIGHTS, LAYOUT.vectors])
@pytest.mark.parametrize("length", [0, 40, -4])
def test_a_truncated_file_is_found(directory, file, length):
    path = directory / file
    path.write_bytes(path.read_bytes()[:length])
    assert f"{path} is damaged or truncated" in problem_of(directory)


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, LAYOUT.vectors, LAYOUT.info])
def test_a_missing_file_is_found(directory, file):
    (directory / file).unlink()
    problem = problem_of(directory)
    assert file in problem
    assert str(directory) in problem
    shutil.rmtree(directory)
    assert "no expert directory" in problem_of(directory)


def test_every_problem_is_named_not_only_the_first(directory):
    def damage(vectors):
        vectors[f"gate.{SITE}"] = torch.zeros(3)
        del vectors["gate.model.layers.1.self_attn.q_proj"]

    change_vectors(directory, damage)
    set_info(directory, adapter_sha256="0" * 64)
    assert len(check_expert(directory)) == 3


def test_an_existing_target_is_refused_and_left_alone(original, directory):
    (directory / "mine.txt").write_text("keep")
    before = contents(directory)
    with pytest.raises(ExpertError, match="exists already"):
        original.save(directory)
    assert contents(directory) == before


def test_overwriting_replaces_the_whole_directory(adapter, directory):
    (directory / "mine.txt").write_text("old")
    make(adapter, name="other").save(directory, overwrite=True)
    assert Expert.load(directory).name == "other"
    assert not (directory / "mine.txt").exists()
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_an_expert_may_overwrite_itself(directory):
    before = contents(directory)
    Expert.load(directory).save(directory, overwrite=True)
    assert contents(directory) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError, OSError(28, "No space")])
def test_an_interrupted_save_leaves_nothing(original, tmp_path, monkeypatch, interruption):
    def stop(tensors, path):
        Path(path).write_bytes(b"half")
        raise interruption

    monkeypatch.setattr("phatgoose.experts.expert.save_file", stop)
    wanted = ExpertError if isinstance(interruption, OSError) else interruption
    with pytest.raises(wanted):
        original.save(tmp_path / "expert")
    assert list(tmp_path.iterdir()) == []


def test_the_golden_expert_is_read_with_the_numbers_it_was_written_with():
    expert = Expert.load(GOLDEN)
    assert expert.name == "golden"
    assert expert.info.base == BaseReference("example/base", "main", "sha256:0123")
    assert expert.info.embedder == "example/embedder"
    assert expert.info.hyperparameters == {"rank": 2, "learning_rate": 0.005}
    query, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert set(expert.lora) == {query, down}
    assert expert.lora[query].scale == 1.5
    assert expert.lora[down].scale == 4.0
    assert expert.lora[query].A.tolist() == [[-1.0, -0.75, -0.5, -0.25], [0.0, 0.25, 0.5, 0.75]]
    assert expert.lora[query].B.tolist() == [[0.5, 0.75], [1.0, 1.25], [1.5, 1.75]]
    assert expert.gates[query].tolist() == [0.0, 0.25, 0.5, 0.75]
    assert expert.gates[down].tolist() == [2.0, 2.25, 2.5, 2.75, 3.0, 3.25]
    assert expert.means[query].tolist() == [-0.5, -0.25, 0.0, 0.25]
    assert expert.embeddings.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [1.0, 0.0]]


def test_the_golden_expert_is_written_again_with_the_same_names_and_values(tmp_path):
    again = Expert.load(GOLDEN).save(tmp_path / "golden").directory
    assert {path.name for path in again.iterdir()} == {path.name for path in GOLDEN.iterdir()}
    old, new = (json.loads((folder / LAYOUT.info).read_text()) for folder in (GOLDEN, again))
    for info in (old, new):  # a hash also depends on how safetensors lays out its header
        del info["vectors_sha256"]
    assert new == old
    for file in (LAYOUT.vectors, LAYOUT.embeddings):
        one, other = load_file(GOLDEN / file), load_file(again / file)
        assert same_bits(one, other)


@pytest.mark.parametrize("name", ["../up", "a/b", "a b", ".hidden", "-dash", "ä", "a\n", "a:b"])
def test_names_that_could_leave_a_folder_or_break_a_card_are_refused(adapter, name):
    with pytest.raises(ExpertError, match="can't name an expert"):
        make(adapter, name=name)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        *(("format_version", v, f"format version {v!r} is unknown") for v in (2, 0, None, "1")),
        ("name", 5, "name is 5"),
        ("name", "../../etc", "not a valid name"),
        ("base", "tiny", "not a valid description"),
        ("base", {"id": 5}, "base.id is 5"),
        ("base", {"id": "tiny", "fingerprint": 5}, "base.fingerprint is 5"),
        ("base", {"id": "me/base", "revision": "../../up"}, "revision is '../../up'"),
        ("adapter_sha256", None, "adapter_sha256 is None"),
        ("vectors_sha256", 5, "vectors_sha256 is 5"),
        ("task", [], "task is []"),
        ("metrics", "good", "metrics is 'good'"),
        ("embedder", 5, "embedder is 5"),
        ("colour", "red", "colour"),
        *((key, KeyError, key) for key in ("name", "base", "adapter_sha256")),  # lacking
    ],
)
def test_a_wrong_description_is_refused(directory, key, value, complaint):
    info = json.loads((directory / LAYOUT.info).read_text())
    info[key] = value
    kept = {name: held for name, held in info.items() if held is not KeyError}
    (directory / LAYOUT.info).write_text(json.dumps(kept))
    assert complaint in problem_of(directory)


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", '"expert"', "\x00"])
def test_a_broken_description_is_refused(directory, text):
    (directory / LAYOUT.info).write_text(text)
    assert str(directory / LAYOUT.info) in problem_of(directory)


OLD = {"max_input_tokens": 112, "max_target_tokens": 512, "chat": False}  # before truncation
NEW = {**OLD, "truncation": "middle"}


def warned_of(records, given=Formatting()) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_formatting(records, given)
    return [str(warning.message) for warning in caught]


def record_of(name: str, hyperparameters, metrics=None) -> dict[str, object]:
    return {"name": name, "formatting": format_record(hyperparameters, metrics or {})}


def test_an_expert_that_names_no_truncation_was_cut_on_the_right():
    assert recorded_formatting(OLD, "here") == Formatting(max_input_tokens=112, truncation="right")
    assert recorded_formatting(NEW, "here") == Formatting(max_input_tokens=112)
    assert recorded_formatting({"rank": 4}, "here") is None


def test_what_no_formatting_can_be_is_refused_with_its_place():
    with pytest.raises(ConfigError, match="here: truncation is 'top', but must be one of middle"):
        recorded_formatting({"truncation": "top"}, "here")
    assert format_record({"truncation": "top"}, {}) is None


def test_inputs_of_another_form_are_told_with_both_forms():
    records = [record_of(name, OLD) for name in ("a", "b")] + [record_of("c", {"rank": 4})]
    assert warned_of(records) == [
        "Inputs are read with max_input_tokens 512, truncation middle, but a, b were trained with "
        "max_input_tokens 112, truncation right."
    ]
    assert warned_of(records, Formatting(max_input_tokens=112, truncation="right")) == []


def test_how_inputs_are_cut_says_nothing_of_an_expert_whose_own_were_whole():
    whole = record_of("a", OLD, {"inputs": 9, "inputs_cut": 0})
    assert warned_of([whole]) == []
    (line,) = warned_of([whole], Formatting(chat=True))
    assert line == (
        "Inputs are read with the chat template (--chat), but a was trained with no chat template."
    )
    assert len(warned_of([record_of("a", OLD, {"inputs": 9, "inputs_cut": 1})])) == 1


@pytest.mark.parametrize("found", ["right", 5, [], {"truncation": 3}, {"chat": "no"}, {"odd": 1}])
def test_a_stranger_s_record_is_passed_over(found):
    assert warned_of([{"name": "a", "formatting": found}]) == []
