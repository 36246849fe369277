"""save_pretrained of a routed model, and who calls it: what is written is what `save` writes."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.files import new_file
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.growing import add_experts, remove_experts
from phatgoose.routing.saved import save as saving
from phatgoose.routing.saved.change import remove_from_saved
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save, write_card
from tiny import logits_of, make_ids

READ = {"routed.json", "routed.safetensors"}
FILES = READ | {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
CHANGED = r"have changed since .* detach it and save the base"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def model(llama, llama_pool):
    return compose(llama_pool, llama, router="phatgoose")


def test_save_pretrained_writes_what_save_does(base, pool, tmp_path):
    ids, model = make_ids(), compose(pool, base, router="phatgoose")
    wanted = logits_of(model, ids)
    save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "new" / "folder")
    assert names(tmp_path / "new" / "folder") == FILES
    for name in FILES:
        one, other = tmp_path / "saved" / name, tmp_path / "new" / "folder" / name
        assert one.read_bytes() == other.read_bytes()
    detach(model)
    assert torch.equal(logits_of(load(tmp_path / "new" / "folder", base), ids), wanted)


def test_a_folder_that_is_there_keeps_its_other_files(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    remove_experts(model, ["e1"])
    model.save_pretrained(str(tmp_path), max_shard_size="1GB", state_dict=model.state_dict())
    assert names(tmp_path) == {*FILES, "notes.txt"}
    base = detach(model)
    assert composition_of(load(tmp_path, base)).experts == ("e0", "e2", "e3")


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_what_from_pretrained_would_find_instead_is_not_written_beside(model, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(RoutingError, match=rf"holds another model \({name}\)"):
        model.save_pretrained(tmp_path)
    assert names(tmp_path) == {name}


def test_a_write_that_breaks_off_leaves_no_routed_model(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)

    def full(place):
        if place.name == "routed.json":
            raise OSError(28, "No space left on device")
        return new_file(place)

    monkeypatch.setattr("phatgoose.files.new_file", full)
    with pytest.raises(RoutingError, match="No space left on device"):
        model.save_pretrained(tmp_path)
    with pytest.raises(RoutingError, match="holds no routed model"):
        load(tmp_path, detach(model))


def test_weights_that_cannot_be_written_leave_the_model_that_was_there(
    model, tmp_path, monkeypatch
):
    model.save_pretrained(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phatgoose.routing.saved.save.save_file", full)
    with pytest.raises(RoutingError, match="No space left on device"):
        model.save_pretrained(tmp_path)
    composition_of(load(tmp_path, detach(model)))


def test_a_file_in_the_place_of_the_folder_is_told(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RoutingError, match=r"file can't be written: .*exists"):
        model.save_pretrained(tmp_path / "file")


def test_only_the_main_process_writes(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert names(tmp_path) == set()


def test_the_trainer_saves_a_routed_model(llama, model, tmp_path):
    wanted = logits_of(model, make_ids())
    options = TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True)
    Trainer(model, options, processing_class=llama.tokenizer).save_model(tmp_path / "saved")
    assert names(tmp_path / "saved") > FILES
    assert "model.safetensors" not in names(tmp_path / "saved")
    detach(model)
    assert torch.equal(logits_of(load(tmp_path / "saved", llama), make_ids()), wanted)


def test_a_push_to_the_hub_takes_the_routed_model_along(model, monkeypatch):
    pushed = set[str]()
    monkeypatch.setattr(
        "transformers.utils.hub.hf_api",
        lambda: type(
            "Api", (), {"create_repo": lambda *_, **__: type("Url", (), {"repo_id": "me/x"})}
        ),
    )
    card = type("Card", (), {"save": lambda _, place: Path(place).write_text("card")})
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card())
    monkeypatch.setattr(
        type(model),
        "_upload_modified_files",
        lambda _, folder, *__, **___: pushed.update(names(Path(folder))),
    )
    model.push_to_hub("me/x")
    assert pushed == {*FILES, "README.md"}
    with pytest.raises(RoutingError, match=r"model\.push_to_hub"):
        model.save_pretrained("x", push_to_hub=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformers_alone_takes_a_routed_folder_for_no_model(model, tmp_path):
    """It reads the tokenizer; the model is for `load`."""
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("say a").input_ids == model.tokenizer("say a").input_ids
    with pytest.raises(ValueError, match="model type `phatgoose`"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_received_model_s_card_holds_no_markdown_of_its_author_s(tmp_path):
    hostile = "`\n\n# Title\n<img src=x> `"
    info = {
        "base": {"id": hostile},
        "routing": {"router": f"single:expert={hostile}"},
        "experts": [{"name": "a", "path": f"hub:me/a{hostile}"}],
    }
    write_card(tmp_path, info)
    card = (tmp_path / "README.md").read_text()
    assert card.count("Title") == 3
    assert "Title" not in re.sub(r"`[^`\n]*`", "", card)  # all of it is quoted, as code


def test_the_card_names_base_and_experts_and_a_readme_of_ones_own_stays(model, tmp_path):
    save(model, tmp_path / "routed")
    card = (tmp_path / "routed" / "README.md").read_text()
    for text in ("4 experts", model.phatgoose.base.id, "- e3\n", "`phatgoose`", "pg.load"):
        assert text in card
    remove_from_saved(tmp_path / "routed", ["e3"])
    assert "- e3\n" not in (tmp_path / "routed" / "README.md").read_text()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "README.md").read_text() == "mine"


def test_the_tokenizer_comes_and_goes_with_the_routing(llama, llama_pool):
    model = compose(llama_pool, llama)
    assert model.tokenizer is llama.tokenizer
    assert not hasattr(detach(model), "tokenizer")


def test_no_place_on_this_machine_is_saved(model, llama_pool, tmp_path):
    save(model, tmp_path / "routed")
    info = json.loads((tmp_path / "routed" / "routed.json").read_text())
    assert [each["path"] for each in info["experts"]] == list(llama_pool.names)
    said = (tmp_path / "routed" / "routed.json").read_text()
    assert str(llama_pool.experts[0].directory.parent) not in said


def test_a_base_that_was_trained_is_not_lost_without_a_word(model, tmp_path):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(0.5)
    for write in (
        lambda: save(model, tmp_path / "a"),
        lambda: model.save_pretrained(tmp_path / "b"),
    ):
        with pytest.raises(RoutingError, match=CHANGED):
            write()
    assert names(tmp_path) == set()
    wanted = logits_of(detach(model), make_ids())
    model.save_pretrained(tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(logits_of(found, make_ids()), wanted)


@pytest.mark.parametrize("moment", ["before composing", "before the pool grew"])
def test_a_change_is_seen_whenever_it_came(llama, llama_pool, make_expert, moment, tmp_path):
    joining = Pool((make_expert(llama, "new", seed=9),))
    head = llama.model.lm_head.weight.data
    if moment == "before composing":
        head.mul_(1.5)
    model = compose(llama_pool, llama, router="phatgoose")
    if moment == "before the pool grew":
        head.mul_(1.5)
        remove_experts(add_experts(model, joining), ["e1"])
    with pytest.raises(RoutingError, match=CHANGED):
        save(model, tmp_path / "routed")


def load_its_own(model):
    model.load_state_dict({name: part.clone() for name, part in model.state_dict().items()})


def offload_and_bring_back(model):
    cpu_offload(model, execution_device="cpu")
    logits_of(model, make_ids())
    remove_hook_from_submodules(model)


def take_gradients(model):
    model.requires_grad_(True)
    model(make_ids()).logits.sum().backward()


NO_CHANGES = {
    "nothing": lambda model: None,
    "a type": lambda model: model.to(torch.bfloat16),
    "a type and back": lambda model: model.to(torch.bfloat16).float(),
    "two types": lambda model: model.to(torch.bfloat16).half(),
    "its own state": load_its_own,
    "offloading": offload_and_bring_back,
    "offloaded": lambda model: cpu_offload(model, execution_device="cpu"),
    "gradients": take_gradients,
    "generation": lambda model: model.generate(make_ids(), max_new_tokens=2),
    "tying": lambda model: model.tie_weights(),
}


@pytest.mark.parametrize("what", NO_CHANGES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"], indirect=True)  # gpt2's are tied
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_base_that_nobody_changed_is_saved(base, pool, what, tmp_path):
    model = compose(pool, base, router="phatgoose")
    NO_CHANGES[what](model)
    save(model, tmp_path / "routed")
    assert names(tmp_path / "routed") == FILES


def test_another_type_is_no_other_base(llama, model, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype).save_pretrained(tmp_path)
    detach(model)
    assert composition_of(load(tmp_path, llama.id)).experts == ("e0", "e1", "e2", "e3")


def test_a_copy_writes_itself(model, tmp_path):
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    for number, copied in enumerate(
        (copy.deepcopy(model), torch.load(written, weights_only=False))
    ):
        remove_experts(copied, ["e1"])
        copied.save_pretrained(tmp_path / str(number))
        assert composition_of(load(tmp_path / str(number), detach(copied))).experts[1] == "e2"
    model.save_pretrained(tmp_path / "model")
    assert composition_of(load(tmp_path / "model", detach(model))).experts[1] == "e1"


def test_the_base_is_not_saved(llama, saved):
    routed = sum(tensor.numel() for tensor in load_file(saved / "routed.safetensors").values())
    embedding = llama.model.get_input_embeddings().weight
    assert not any(
        tensor.shape == embedding.shape
        for tensor in load_file(saved / "routed.safetensors").values()
    )
    assert routed > 0
    assert names(saved) == FILES


def test_a_plain_model_is_not_saved(llama, tmp_path):
    with pytest.raises(RoutingError, match="not routed"):
        save(llama.model, tmp_path / "routed")
    assert not (tmp_path / "routed").exists()


def test_nothing_is_overwritten_unless_asked_for(llama, llama_pool, saved):
    content = (saved / "routed.json").read_text()
    model = compose(llama_pool, llama, k=1, router="phatgoose")
    with pytest.raises(RoutingError, match="exists already"):
        save(model, saved)
    assert (saved / "routed.json").read_text() == content
    save(model, saved, overwrite=True)
    assert composition_of(load(saved, dtype="float32")).routing.k == 1


@pytest.mark.parametrize("step", ["save_file", "sha256_of"])
def test_a_failed_overwrite_keeps_the_old_folder(llama, llama_pool, saved, monkeypatch, step):
    model = compose(llama_pool, llama, k=1, router="phatgoose")

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, step, fail)
    with pytest.raises(KeyboardInterrupt):
        save(model, saved, overwrite=True)
    monkeypatch.undo()
    assert composition_of(load(saved, dtype="float32")).routing.k == 2
