"""Nothing is written through a link that somebody put where a file of ours will be, or read."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from odd_files import KEPT
from phatgoose.base.loading import fingerprint_here, load_base, load_skeleton, load_tokenizer
from phatgoose.errors import BaseModelError, ExpertError
from phatgoose.experts.hub import push
from phatgoose.routing.compose import compose, save
from phatgoose.routing.saved import add_to_saved, remove_from_saved
from phatgoose.training.train_expert import open_work


def test_a_received_routed_folder_writes_through_no_link(llama, llama_pool, tmp_path, victim):
    folder = tmp_path / "routed"
    save(compose(llama_pool.select(["e0", "e1"]), llama, router="phatgoose"), folder)
    (folder / ".routed.json.unfinished").symlink_to(victim)
    add_to_saved(folder, llama_pool.select(["e2"]))
    remove_from_saved(folder, ["e0"])
    assert victim.read_text() == KEPT


@pytest.mark.parametrize("place", ["", "lock", "run.json", "checkpoint-1/trainable.safetensors"])
def test_unfinished_work_that_is_or_holds_a_link_is_refused(tmp_path, victim, place):
    link = tmp_path / ".expert.work" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim if place else victim.parent)
    work = open_work(tmp_path / "expert", {}, resume=True)
    with pytest.raises(ExpertError, match="symbolic link"), work:
        pass
    assert victim.read_text() == KEPT


def test_what_is_pushed_is_no_link_out_of_the_folder(golden_copy, victim):
    (golden_copy / "README.md").unlink()
    (golden_copy / "README.md").symlink_to(victim)
    with pytest.raises(ExpertError, match=r"README\.md can't be read: it is a link that leads out"):
        push(golden_copy, "me/golden")


LOADERS = (load_base, load_tokenizer, load_skeleton, fingerprint_here)
TEMPLATES = "additional_chat_templates"  # where transformers looks for more


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("file", ["chat_template.jinja", "config.json", f"{TEMPLATES}/rag.jinja"])
def test_a_base_whose_file_is_a_link_out_of_its_folder_is_refused(
    base_folders, tmp_path, victim, load, file
):
    folder = shutil.copytree(base_folders["llama"], tmp_path / "base")
    link = folder / file
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    with pytest.raises(BaseModelError, match=rf"{link.name} can't be read: it is a link that lead"):
        load(str(folder))


def test_a_base_whose_folder_of_templates_is_a_link_out_of_it_is_refused(
    base_folders, tmp_path, victim
):
    folder = shutil.copytree(base_folders["llama"], tmp_path / "base")
    (tmp_path / "others").mkdir()
    victim.rename(tmp_path / "others" / "key.jinja")
    (folder / TEMPLATES).symlink_to(tmp_path / "others")
    with pytest.raises(BaseModelError, match=r"key\.jinja can't be read: it is a link that leads"):
        load_tokenizer(folder)


def test_links_within_a_base_and_those_to_the_hub_caches_own_blobs_are_followed(
    base_folders, tmp_path
):
    repository = tmp_path / "models--me--base"
    folder = repository / "snapshots" / "abc"
    blobs = shutil.copytree(base_folders["llama"], repository / "blobs")
    (folder / TEMPLATES).mkdir(parents=True)
    for blob in blobs.iterdir():
        (folder / blob.name).symlink_to(blob)
    (blobs / "template").write_text("{{ messages }}")
    (folder / TEMPLATES / "rag.jinja").symlink_to(blobs / "template")
    (folder / "chat_template.jinja").symlink_to(f"{TEMPLATES}/rag.jinja")
    (folder / "checkpoint").symlink_to(tmp_path)  # a folder that nobody opens
    base = load_base(folder)
    assert base.tokenizer.chat_template == {"default": "{{ messages }}", "rag": "{{ messages }}"}


def test_weights_outside_a_bases_folder_are_not_read(base_folders, tmp_path):
    folder = shutil.copytree(base_folders["llama"], tmp_path / "base")
    (folder / "model.safetensors").rename(tmp_path / "private.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "private.safetensors"), "../private.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match=r"'\.\./private\.safetensors'.* of its own folder"):
        load_base(folder)
