"""Saved models that experts join and leave: as if the new pool had been composed and saved."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from growth_cases import EMBEDDED, NAMES, ROUTERS, composed
from mixed_experts import ordered, renamed
from phatgoose.base import Base, load_base
from phatgoose.errors import ExpertError, PoolError, RoutingError, WrongBaseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.ia3 import ScalingVector
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.saved.change import add_to_saved, remove_from_saved
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.routing.saved.tensors import read_saved
from routed_models import with_embeddings
from tiny import logits_of, make_ids


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_is_that_of(folder: Path, router: str, pool: Pool, base: Base) -> None:
    """The folder holds, byte for byte, what composing the pool and saving it writes."""
    model = compose(pool, copy.deepcopy(base), router=router)
    save(model, folder.parent / "wanted", overwrite=True)
    for name in ("routed.json", "routed.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (folder.parent / "wanted" / name).read_bytes()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_model_grows_and_shrinks(llama, uneven, toy_embedder, tmp_path, router):
    pool = with_embeddings(uneven) if router in EMBEDDED else uneven
    folder = tmp_path / "routed"
    save(compose(pool.select(["e0", "e1"]), copy.deepcopy(llama), router=router), folder)
    add_to_saved(folder, pool.select(["e2"]))
    assert add_to_saved(folder, pool.select(["e3"])).names == NAMES
    assert_is_that_of(folder, router, pool, llama)
    # The directions of spectr stay as many as they were: what is too many is zeros.
    left = ("e1", "e2") if router == "spectr" else ("e1", "e3")
    assert remove_from_saved(folder, set(NAMES) - set(left)).names == left
    assert_is_that_of(folder, router, pool.select(left), llama)


def test_experts_of_all_kinds_join_and_leave(llama, llama_mixed, tmp_path):
    folder, first = tmp_path / "routed", ["lora0", "lora7", "bottleneck3"]
    save(composed("phatgoose", ordered(llama_mixed, first), llama), folder)
    second = ["ia32", "bottleneck4", "biased1", "bottleneck5"]
    add_to_saved(folder, ordered(llama_mixed, second))
    assert_is_that_of(folder, "phatgoose", ordered(llama_mixed, [*first, *second]), llama)
    remove_from_saved(folder, ["bottleneck3", "lora7"])
    assert_is_that_of(folder, "phatgoose", ordered(llama_mixed, ["lora0", *second]), llama)


@torch.no_grad()
def test_types_that_differ_from_site_to_site_stay(base_folders, pool_of, tmp_path):
    pool = pool_of("t5")  # whose `wo` transformers keeps in float32
    half = load_base(base_folders["t5"], dtype="float16")
    save(composed("average-activation", Pool(pool.experts[:2]), half), tmp_path / "routed")
    add_to_saved(tmp_path / "routed", Pool(pool.experts[2:]))
    assert_is_that_of(tmp_path / "routed", "average-activation", pool, half)
    types = {t.dtype for t in load_file(tmp_path / "routed" / "routed.safetensors").values()}
    assert types >= {torch.float16, torch.float32}


def test_an_expert_at_new_sites_is_rounded_once(llama, uneven, tmp_path):
    base = load_base(llama.id, dtype="bfloat16")
    save(composed("phatgoose", uneven.select(["e1"]), base), tmp_path / "routed")
    add_to_saved(tmp_path / "routed", uneven.select(["e2"]))
    wanted = composed("phatgoose", uneven.select(["e1", "e2"]), base)
    loaded = load(tmp_path / "routed", base)
    assert loaded.phatgoose.layers.keys() == wanted.phatgoose.layers.keys()
    assert torch.equal(logits_of(loaded, make_ids()), logits_of(wanted, make_ids()))


def test_a_removed_name_may_come_again(llama, uneven, pair):
    remove_from_saved(pair, ["e0"])
    again = renamed(uneven["e3"], "e0")
    assert add_to_saved(pair, Pool((again,))).names == ("e1", "e0")
    assert_is_that_of(pair, "phatgoose", Pool((uneven["e1"], again)), llama)


def test_what_else_is_in_the_folder_stays_there(uneven, pair):
    (pair / "notes").mkdir()
    (pair / "notes" / "routed.safetensors").write_text("mine")
    pair.rename(pair.parent / "kept")
    pair.symlink_to("kept")
    before = contents(pair)
    add_to_saved(pair, uneven.select(["e2"]))
    changed = {"routed.json", "routed.safetensors", "README.md"}
    after = contents(pair.parent / "kept")
    assert {name for name in before | after if before.get(name) != after.get(name)} == changed
    assert pair.is_symlink()


def test_what_is_private_stays_so_and_no_link_s_target_changes(uneven, pair, tmp_path):
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o600)
    (pair / "notes").symlink_to(tmp_path / "key")
    (pair / "nothing").symlink_to(tmp_path / "gone")
    pair.chmod(0o700)
    add_to_saved(pair, uneven.select(["e2"]))
    assert [oct(path.stat().st_mode & 0o777) for path in (tmp_path / "key", pair)] == [
        oct(0o600),
        oct(0o700),
    ]
    assert (pair / "nothing").is_symlink()


def test_folded_experts_stay_what_they_are(llama, pool_of, tmp_path):
    save(compose(pool_of("llama", (24, 9, 20)), llama, router="merged"), tmp_path / "routed")
    with pytest.raises(RoutingError, match="folded"):
        remove_from_saved(tmp_path / "routed", ["e0"])
    with pytest.raises(RoutingError, match="folded"):
        add_to_saved(tmp_path / "routed", Pool((renamed(pool_of("llama")["e0"], "new"),)))


def test_what_can_not_join_or_leave_changes_nothing(uneven, pool_of, llama_mixed, pair):
    before, expert = contents(pair), uneven["e2"]
    lora = expert.lora.items()
    wide = {site: replace(each, A=torch.cat([each.A] * 2, dim=1)) for site, each in lora}
    large = {site: replace(each, A=each.A * 1e25) for site, each in lora}
    # Such a module scales outputs, so that it can't tell how long the site's inputs are.
    site, info = "model.layers.0.self_attn.k_proj", llama_mixed["ia32"].info
    scaling = {site: ScalingVector(torch.ones(32), on_input=False)}
    odd = Expert(replace(info, name="odd"), pair.parent, scaling, {site: torch.ones(7)}, {})
    refused = {
        "'e1' is there already": (PoolError, uneven["e1"]),
        "fingerprint": (WrongBaseError, renamed(pool_of("t5").experts[0], "new")),
        r"'e2', site .* maps 96 to 32 features": (ExpertError, replace(expert, modules=wide)),
        "'e2' at .*: its update has numbers of": (RoutingError, replace(expert, modules=large)),
        "mean of 7 numbers for 32 inputs": (ExpertError, odd),
    }
    for said, (kind, joining) in refused.items():
        with pytest.raises(kind, match=said):
            add_to_saved(pair, Pool((joining,)))
    with pytest.raises(PoolError, match="no expert 'e2'"):
        remove_from_saved(pair, ["e2"])
    with pytest.raises(PoolError, match="No expert would be left"):
        remove_from_saved(pair, ["e0", "e1"])
    with pytest.raises(RoutingError, match="holds no routed model"):
        remove_from_saved(pair.parent / "nowhere", ["e0"])
    assert contents(pair) == before


def test_an_expert_for_prompts_ends_does_not_join_an_encoder_decoder(
    pool_of, base_folders, tmp_path
):
    pool = pool_of("t5")
    save(compose(pool.select(["e0"]), str(base_folders["t5"])), tmp_path / "routed")
    late = replace(pool["e1"], info=replace(pool["e1"].info, acts_on={"tail": 4}))
    with pytest.raises(RoutingError, match="'e1' act from a prompt's end on"):
        add_to_saved(tmp_path / "routed", Pool((late,)))


def test_an_addition_that_is_killed_is_none(llama, uneven, pair, monkeypatch):
    before = contents(pair)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ctypes.CDLL", killed)  # names are exchanged through it
    with pytest.raises(KeyboardInterrupt):
        add_to_saved(pair, uneven.select(["e2", "e3"]))
    monkeypatch.undo()
    assert load(pair, copy.deepcopy(llama)).phatgoose.experts == ("e0", "e1")
    assert contents(pair) == before
    add_to_saved(pair, uneven.select(["e2", "e3"]))
    assert_is_that_of(pair, "phatgoose", uneven, llama)


def test_of_two_changes_at_once_one_is_told(uneven, pair):
    def names():
        yield "e1"
        add_to_saved(pair, uneven.select(["e2"]))

    with pytest.raises(RoutingError, match=r"Another process has changed .* meanwhile"):
        remove_from_saved(pair, names())
    assert read_saved(pair).names == ("e0", "e1", "e2")
