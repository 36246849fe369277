"""The expert directory: what is saved comes back, and every kind of damage is found and named."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from changed_adapters import set_config
from changed_experts import (
    SITE,
    change_tensors,
    change_vectors,
    make,
    problem_of,
    set_info,
    vectors_for,
)
from paths import GOLDEN
from phatgoose.base.fingerprint import BaseReference
from phatgoose.base.loading import load_base
from phatgoose.errors import ExpertError
from phatgoose.experts.expert import LAYOUT, Expert, base_named_in, check_expert
from phatgoose.experts.kinds.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.files.atomic import clear_left_overs
from phatgoose.files.strict import sha256_of


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
    set_config(adapter, revision=["v2"])
    for read in (base_named_in, lambda folder: Expert.from_peft(folder, {})):
        with pytest.raises(ExpertError, match=r"names revision \['v2'\] of its base"):
            read(adapter)
    assert Expert.from_peft(adapter, {}, base=llama).info.base == llama.reference


def test_pefts_files_are_copied_byte_for_byte(adapter, original):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (original.directory / file).read_bytes() == (adapter / file).read_bytes()


def test_an_expert_directory_holds_nothing_but_what_the_format_names(original):
    assert set(contents(original.directory)) == {
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        LAYOUT.vectors,
        LAYOUT.info,
        LAYOUT.card,
    }


def test_an_expert_directory_can_be_read_by_others(original, tmp_path):
    before = os.umask(0o022)
    try:
        directory = original.save(tmp_path / "shared").directory
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o755
    hidden = [path.name for path in directory.iterdir() if path.stat().st_mode & 0o444 != 0o444]
    assert hidden == []


def test_peft_loads_an_expert_directory_as_an_ordinary_adapter(base_folders, adapter, original):
    ids = torch.arange(3, 19)[None]
    logits = []
    for folder in (adapter, original.directory):
        base = load_base(base_folders["llama"], dtype="float32")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(base.model, folder)
        with torch.no_grad():
            logits.append(model(ids).logits)
            assert not torch.allclose(logits[0], base_logits(base_folders, ids))
    assert torch.equal(*logits)


def base_logits(base_folders: dict[str, Path], ids: torch.Tensor) -> torch.Tensor:
    return load_base(base_folders["llama"], dtype="float32").model(ids).logits


def test_an_expert_without_gates_is_whole_too(adapter, tmp_path):
    expert = make(adapter, gates={}).save(tmp_path / "plain")
    assert (expert.gates, expert.means, expert.embeddings) == ({}, {}, None)
    assert not (expert.directory / LAYOUT.vectors).exists()
    assert check_expert(expert.directory) == []


def test_base_and_name_default_to_what_the_adapter_says(adapter, base_folders):
    info = make(adapter, base=None).info
    assert info.name == "reviews"
    assert info.base == BaseReference(str(base_folders["llama"]))


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


def test_an_adapter_that_names_no_base_needs_one(adapter, tmp_path):
    adapter = Path(shutil.copytree(adapter, tmp_path / "nameless"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    nameless = config | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(nameless))
    with pytest.raises(ExpertError, match="doesn't name its base; give base"):
        Expert.from_peft(adapter, {})
    assert Expert.from_peft(adapter, {}, base=BaseReference("tiny")).info.base.id == "tiny"


def test_embeddings_of_another_form_are_refused_before_anything_is_written(adapter):
    with pytest.raises(ExpertError, match="each of length 1"):
        Expert.from_peft(adapter, {}, embeddings=2 * torch.eye(3))


def test_the_card_names_base_and_metrics(original):
    card = (original.directory / LAYOUT.card).read_text()
    assert 'base_model: "tiny"' in card
    assert "sha256:ab" in card


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
    ("kind", "size", "complaint"),
    [("gates", 31, "the gate has shape (31,)"), ("means", 33, "the mean has shape (33,)")],
)
def test_vectors_that_do_not_fit_are_refused_when_an_expert_is_made(adapter, kind, size, complaint):
    vectors = {**vectors_for(adapter, 1), SITE: torch.zeros(size)}
    with pytest.raises(ExpertError) as caught:
        make(adapter, **{kind: vectors})
    for part in ("'reviews'", SITE, complaint, "wanted (32,) and float32"):
        assert part in str(caught.value)


def test_gates_that_are_not_finite_are_refused_when_an_expert_is_made(adapter):
    vectors = vectors_for(adapter, 1)
    vectors[SITE][3] = float("nan")
    with pytest.raises(ExpertError, match=rf"site {SITE}: the gate is not finite"):
        make(adapter, gates=vectors)


def test_gates_for_some_sites_only_are_refused_when_an_expert_is_made(adapter):
    vectors = vectors_for(adapter, 1)
    del vectors[SITE]
    with pytest.raises(ExpertError, match=rf"site {SITE}: the gate is missing"):
        make(adapter, gates=vectors)


def test_a_changed_adapter_is_found_by_its_hash(directory):
    weights = load_file(directory / ADAPTER_WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in weights.items()}, directory / "new")
    os.replace(directory / "new", directory / ADAPTER_WEIGHTS)
    problem = problem_of(directory)
    wanted = json.loads((directory / LAYOUT.info).read_text())["adapter_sha256"]
    for part in (
        "'reviews'",
        ADAPTER_WEIGHTS,
        sha256_of(directory / ADAPTER_WEIGHTS)[:12],
        wanted[:12],
    ):
        assert part in problem


def test_changed_vectors_are_found_by_their_hash(directory):
    vectors = load_file(directory / LAYOUT.vectors)
    save_file({key: -vector for key, vector in vectors.items()}, directory / LAYOUT.vectors)
    problem = problem_of(directory)
    assert LAYOUT.vectors in problem
    assert "changed" in problem


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


def test_a_missing_directory_is_no_expert(tmp_path):
    assert "no expert directory" in problem_of(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gate_that_is_not_finite_is_found(directory, value):
    change_vectors(directory, lambda vectors: vectors[f"gate.{SITE}"][5].fill_(value))
    problem = problem_of(directory)
    assert f"gate.{SITE}" in problem
    assert "not finite" in problem


def test_an_adapter_that_is_not_finite_is_found(directory):
    name = f"base_model.model.{SITE}.lora_A.weight"
    change_tensors(
        directory,
        ADAPTER_WEIGHTS,
        "adapter_sha256",
        lambda tensors: tensors[name][0, 0].fill_(float("nan")),
    )
    assert name in problem_of(directory)


@pytest.mark.parametrize("kind", ["gate", "mean"])
@pytest.mark.parametrize(
    ("vector", "got"),
    [
        (torch.zeros(31), "(31,)"),
        (torch.zeros(1, 32), "(1, 32)"),
        (torch.zeros(32, dtype=torch.float16), "torch.float16"),
        (torch.zeros(32, dtype=torch.float64), "torch.float64"),
    ],
)
def test_a_vector_of_a_wrong_size_or_type_is_found(directory, kind, vector, got):
    change_vectors(directory, lambda vectors: vectors.update({f"{kind}.{SITE}": vector}))
    problem = problem_of(directory)
    for part in ("'reviews'", SITE, f"the {kind} has", got, "wanted (32,) and float32"):
        assert part in problem


@pytest.mark.parametrize("kind", ["gate", "mean"])
def test_a_site_without_its_vector_is_found(directory, kind):
    change_vectors(directory, lambda vectors: vectors.pop(f"{kind}.{SITE}"))
    problem = problem_of(directory)
    assert f"'reviews', site {SITE}" in problem
    assert f"{kind} is missing" in problem


@pytest.mark.parametrize("kind", ["gate", "mean"])
def test_a_vector_without_its_site_is_found(directory, kind):
    extra = {f"{kind}.model.layers.9.mlp.up_proj": torch.zeros(32)}
    change_vectors(directory, lambda vectors: vectors.update(extra))
    problem = problem_of(directory)
    assert "site model.layers.9.mlp.up_proj" in problem
    assert "adapter is missing" in problem


@pytest.mark.parametrize("key", ["bias.x", "gates", "notes"])
def test_a_vector_of_an_unknown_kind_is_found(directory, key):
    change_vectors(directory, lambda vectors: vectors.update({key: torch.zeros(32)}))
    assert repr(key) in problem_of(directory)


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


def test_a_target_below_a_file_is_refused_with_the_reason(original, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExpertError, match="can't be written"):
        original.save(tmp_path / "file" / "expert")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused_with_the_reason(original, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ExpertError, match="can't be written: Permission denied"):
        original.save(tmp_path / "expert")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_save_leaves_nothing(original, tmp_path, monkeypatch, interruption):
    def stop(tensors, path):
        Path(path).write_bytes(b"half")
        raise interruption

    monkeypatch.setattr("phatgoose.experts.expert.save_file", stop)
    with pytest.raises(interruption):
        original.save(tmp_path / "expert")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_nothing(original, tmp_path, monkeypatch):
    def fail(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phatgoose.experts.expert.save_file", fail)
    with pytest.raises(ExpertError, match="No space left on device"):
        original.save(tmp_path / "expert")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_that_fails_at_the_last_moment_keeps_the_old_expert(
    original, directory, monkeypatch
):
    rename = os.rename

    def fail_into_place(source, target):
        if Path(target) == directory and ".unfinished-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    before = contents(directory)
    monkeypatch.setattr("os.rename", fail_into_place)
    with pytest.raises((OSError, ExpertError)):
        original.save(directory, overwrite=True)
    assert directory.is_dir()
    assert contents(directory) == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_an_old_expert_that_cannot_even_be_brought_back_is_kept_beside_its_place(
    original, directory, monkeypatch
):
    rename = os.rename

    def fail_into_place(source, target):
        if Path(target) == directory:
            raise OSError(5, "Input/output error")
        rename(source, target)

    before = contents(directory)
    with monkeypatch.context() as broken:
        broken.setattr("os.rename", fail_into_place)
        with pytest.raises((OSError, ExpertError)):
            original.save(directory, overwrite=True)
    (kept,) = directory.parent.iterdir()
    assert contents(kept / directory.name) == before
    monkeypatch.setattr("phatgoose.files.atomic.YOUNG", -1.0)
    clear_left_overs(directory)
    assert contents(directory) == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


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
