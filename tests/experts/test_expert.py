"""The expert directory: what is saved comes back, and every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from changed_experts import DOWN, QUERY, SITE, make, set_config, vectors_for
from fake_hub import contents
from paths import GOLDEN, GOLDENS
from phatgoose.base.identity import BaseReference
from phatgoose.config import Formatting
from phatgoose.errors import ExpertError
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS
from phatgoose.experts.expert import (
    LAYOUT,
    Expert,
    Gain,
    adapter_files,
    base_named_in,
    warn_of_other_formatting,
)

REFERENCE_OF_GOLDEN = BaseReference("example/base", "main", "sha256:0123")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[site].view(torch.int32), other[site].view(torch.int32)) for site in one
    )


def test_what_json_lacks_does_not_make_an_expert_unreadable(adapter, tmp_path):
    metrics = {"loss": float("nan"), "losses": [1.0, float("inf")]}
    task = {"source": "\udcff.jsonl"}  # a file's name that isn't UTF-8
    saved = make(adapter, metrics=metrics, task=task).save(tmp_path / "deep" / "reviews")
    assert saved.info.metrics == {"loss": None, "losses": [1.0, None]}
    assert saved.info.task == {"source": "?.jsonl"}


def test_a_gain_comes_back_and_an_impossible_one_is_refused(adapter, tmp_path):
    gain = Gain(0.25, -0.125, 0.5, 30, "exact match")
    saved = make(adapter, gain=gain).save(tmp_path / "reviews")
    assert saved.info.gain == gain
    path = saved.directory / LAYOUT.info
    record = json.loads(path.read_text())
    for name, value in (("low", -1.5), ("rows", 0), ("metric", "a\nb"), ("sure", True)):
        path.write_text(json.dumps(record | {"gain": record["gain"] | {name: value}}))
        with pytest.raises(ExpertError, match=f"gain.{name}"):
            Expert.load(saved.directory)
    assert "gain" not in json.loads(
        (make(adapter).save(tmp_path / "b").directory / LAYOUT.info).read_text()
    )


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


def test_what_does_not_fit_is_not_saved(adapter, tmp_path):
    odd = vectors_for(adapter, 1) | {SITE: torch.zeros(31)}
    with pytest.raises(ExpertError, match=r"q_proj is \(31,\)"):
        make(adapter, gates=odd).save(tmp_path / "reviews")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_whole_if_at_all(adapter, original, directory):
    (directory / "mine.txt").write_text("keep")
    before = contents(directory)
    with pytest.raises(ExpertError, match="exists already"):
        original.save(directory)
    assert contents(directory) == before
    make(adapter, name="other").save(directory, overwrite=True)
    assert Expert.load(directory).name == "other"
    assert not (directory / "mine.txt").exists()
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    (directory / LAYOUT.prompts).write_text("Is it good?\n")  # which is the expert's own
    before = contents(directory)
    Expert.load(directory).save(directory, overwrite=True)
    assert contents(directory) == before
    assert Expert.load(directory).prompts == ("Is it good?",)
    with (directory / LAYOUT.prompts).open("wb") as file:
        file.truncate(2**30)  # takes no place here, but would in a copy
    with pytest.warns(UserWarning, match="at most 1048576 are read"):
        Expert.load(directory).save(directory.parent / "copy")
    assert not (directory.parent / "copy" / LAYOUT.prompts).exists()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError, OSError(28, "No space")])
def test_an_interrupted_save_leaves_nothing(original, tmp_path, interruption):
    class Stopping(dict):
        def items(self):  # read for the file of vectors, when the adapter's are written already
            assert list(tmp_path.glob(f".*/new/{ADAPTER_WEIGHTS}"))
            raise interruption

    wanted = ExpertError if isinstance(interruption, OSError) else interruption
    with pytest.raises(wanted):
        replace(original, means=Stopping(original.means)).save(tmp_path / "expert")
    assert list(tmp_path.iterdir()) == []


def test_the_golden_expert_is_read_with_the_numbers_it_was_written_with():
    expert = Expert.load(GOLDEN)
    assert expert.name == "golden"
    assert expert.info.base == base_named_in(GOLDEN) == REFERENCE_OF_GOLDEN
    assert expert.info.embedder == "example/embedder"
    assert expert.info.hyperparameters == {"rank": 2, "learning_rate": 0.005}
    assert set(expert.lora) == {QUERY, DOWN}
    assert (expert.lora[QUERY].scale, expert.lora[DOWN].scale) == (1.5, 4.0)
    assert expert.lora[QUERY].A.tolist() == [[-1.0, -0.75, -0.5, -0.25], [0.0, 0.25, 0.5, 0.75]]
    assert expert.lora[QUERY].B.tolist() == [[0.5, 0.75], [1.0, 1.25], [1.5, 1.75]]
    assert expert.gates[QUERY].tolist() == [0.0, 0.25, 0.5, 0.75]
    assert expert.gates[DOWN].tolist() == [2.0, 2.25, 2.5, 2.75, 3.0, 3.25]
    assert expert.means[QUERY].tolist() == [-0.5, -0.25, 0.0, 0.25]
    assert expert.embeddings.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [1.0, 0.0]]


def test_the_golden_experts_of_other_kinds_are_read_as_they_were_written():
    modules = Expert.load(GOLDENS / "ia3").modules
    assert modules[QUERY].vector.tolist() == [0.5, 0.75, 1.0]
    assert modules[DOWN].vector.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75]
    assert {site: m.on_input for site, m in modules.items()} == {QUERY: False, DOWN: True}
    expert = Expert.load(GOLDENS / "bottleneck")
    assert (expert.kind, expert.lora, set(expert.modules)) == ("bottleneck", {}, {QUERY, DOWN})
    query = expert.modules[QUERY]
    assert (query.activation, query.scale, query.size) == ("gelu", 0.5, 2)
    assert query.sizes["d"] == 3
    assert "n" not in query.sizes
    assert query.down.tolist() == [[-1.0, -0.75, -0.5], [-0.25, 0.0, 0.25]]
    assert query.up_bias.tolist() == [1.5, 1.75, 2.0]


@pytest.mark.parametrize("kind", ["expert", "ia3", "bottleneck", "dora"])
def test_a_golden_expert_is_written_again_without_a_change(kind, tmp_path):
    golden = GOLDENS / kind
    again = Expert.load(golden).save(tmp_path / "again").directory
    Expert.load(again)
    assert {path.name for path in again.iterdir()} == {path.name for path in golden.iterdir()}
    old, new = (json.loads((folder / LAYOUT.info).read_text()) for folder in (golden, again))
    for info in (old, new):  # a hash also depends on how safetensors lays out its header
        del info["vectors_sha256"]
    assert new == old
    for file in (LAYOUT.vectors, LAYOUT.embeddings):
        assert same_bits(load_file(golden / file), load_file(again / file))
    adapter = adapter_files(golden)
    for file in (adapter.config, adapter.weights):
        assert (again / file).read_bytes() == (golden / file).read_bytes()


@pytest.mark.parametrize("name", ["../up", "a/b", "a b", ".hidden", "-dash", "ä", "a\n", "a:b"])
def test_names_that_could_leave_a_folder_or_break_a_card_are_refused(adapter, name):
    with pytest.raises(ExpertError, match="can't name an expert"):
        make(adapter, name=name)


FORM = {"max_input_tokens": 112, "max_target_tokens": 512, "truncation": "right", "chat": False}


@pytest.mark.parametrize(
    ("trained", "formatting", "said"),
    [
        (
            FORM,
            Formatting(),
            "read with max_input_tokens 512, truncation middle, but a was trained "
            "with max_input_tokens 112, truncation right (2 of the experts differ).",
        ),
        (FORM, Formatting(112, "right"), None),
        # How inputs are cut says nothing of an expert whose own were whole.
        (FORM | {"inputs_cut": 0}, Formatting(), None),
        (FORM | {"inputs_cut": 0}, Formatting(chat=True), "chat True, but a was trained with chat"),
        (5, Formatting(), None),
        ({"chat": "\x1b[2J\n"}, Formatting(), "a was trained with chat  [2J"),
    ],
)
def test_inputs_of_another_form_are_told_with_both_forms(trained, formatting, said):
    record = {"name": "a", "formatting": trained}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_formatting([record, {"name": "c", "formatting": None}, record], formatting)
    told = [str(warning.message) for warning in caught]
    assert len(told) == (said is not None)
    assert all(said in each and each.isprintable() for each in told)
