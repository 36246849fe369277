"""Nothing is written through a link that somebody put where a file of ours will be."""

import pytest

from odd_files import KEPT
from phatgoose.errors import ExpertError
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
