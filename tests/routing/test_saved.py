"""Saved models: what is written, read and changed. Damaged folders: whole/test_routed_strangers."""

from __future__ import annotations

import copy
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import pytest
import torch
from transformers import AutoModelForCausalLM

from fake_hub import contents
from forked import forked, kill_self, needs_fork
from mixed_experts import make_kind, ordered
from phatgoose.base.loading import load_base
from phatgoose.errors import ConfigError, ExpertError, PoolError, RoutingError, WrongBaseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.saved import add_to_saved, read_saved, remove_from_saved, shareable
from routed_models import assert_is_that_of, compose_by, composed
from tiny import logits_of, make_adapter, make_ids, make_model, small_reader

READ = {"routed.json", "routed.safetensors"}
FILES = READ | {"config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def model(llama, llama_pool):
    return compose(llama_pool, llama, router="phatgoose")


@pytest.fixture
def pair(llama, uneven, tmp_path) -> Path:
    """A folder of e0 and e1 under router phatgoose."""
    save(composed("phatgoose", uneven.select(["e0", "e1"]), llama), tmp_path / "pair")
    return tmp_path / "pair"


# Saved and loaded: of every router, contracts/test_routers.


@pytest.mark.parametrize(("router", "ranks"), [("phatgoose", (2, 3, 4)), ("merged", (24, 9, 20))])
def test_a_loaded_model_is_the_saved_one_without_the_experts_files(
    base, kind, pool_of, tmp_path, router, ranks
):
    experts = pool_of(kind, ranks).experts
    pool = Pool(tuple(replace(e, directory=Path("gone") / e.name) for e in experts))
    model, ids = compose(pool, base, router=router), make_ids(rows=2)
    wanted = logits_of(model, ids)
    kinds = {type(layer) for layer in composition_of(model).layers.values()}
    assert (RoutedLinear in kinds) == (ranks[0] < 9)  # ranks that are large fold everywhere
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", dtype="float32")
    assert {type(layer) for layer in composition_of(loaded).layers.values()} == kinds
    assert torch.equal(logits_of(loaded, ids), wanted)
    save(loaded, tmp_path / "again")
    for file in READ:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "routed" / file).read_bytes()


def test_a_model_in_another_type_is_saved_with_its_scalings_in_float32(llama, tmp_path):
    experts = (make_kind(kind, llama, tmp_path) for kind in ("ia3", "dora", "lora"))
    model = compose(Pool(tuple(experts)), llama, router="phatgoose").bfloat16()
    save(model, tmp_path / "routed")
    loaded = composition_of(load(tmp_path / "routed", dtype="bfloat16")).layers
    for site, layer in composition_of(model).layers.items():
        for name, tensor in loaded[site].stack.tensors().items():
            assert torch.equal(tensor, layer.stack.tensors()[name].to(tensor))
            assert name.endswith("deltas") == (tensor.dtype == torch.float32)


def test_settings_and_names_are_kept_and_no_place_on_this_machine(llama, llama_pool, tmp_path):
    model = compose(llama_pool, llama, k=3, kernel="gather", router="phatgoose:eps=0.001")
    save(model, tmp_path / "routed")
    saved, parts = composition_of(model), composition_of(load(tmp_path / "routed", dtype="float32"))
    assert (parts.routing, parts.base) == (saved.routing, saved.base)
    assert parts.experts == saved.experts == llama_pool.names
    assert parts.records == shareable(saved.records)
    said = (tmp_path / "routed" / "routed.json").read_text()
    assert [each["path"] for each in json.loads(said)["experts"]] == list(parts.experts)
    assert str(llama_pool.experts[0].directory.parent) not in said


def test_the_loaded_model_can_be_given_its_base_in_any_type(llama, model, tmp_path):
    save(model, tmp_path / "routed")
    wanted = logits_of(model, make_ids())
    detach(model)
    for base in (llama, llama.model):
        loaded = load(tmp_path / "routed", base)
        assert loaded is llama.model
        assert torch.equal(logits_of(loaded, make_ids()), wanted)
        with pytest.raises(RoutingError, match="routed already"):
            load(tmp_path / "routed", base)
        detach(loaded)
    for name in (None, llama.id, Path(llama.id)):
        assert load(tmp_path / "routed", name, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(WrongBaseError, match="fingerprint"):
        load(tmp_path / "routed", make_model("llama", seed=1))


def test_nothing_is_overwritten_unless_asked_for(llama, llama_pool, model, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    place = tmp_path / "routed"
    save(model, place)
    detach(model)
    before = contents(place)
    other = compose(llama_pool, llama, k=1, router="phatgoose")
    with pytest.raises(RoutingError, match="exists already"):
        save(other, place)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.serialize_file", full)
        with pytest.raises(RoutingError, match="No space left on device"):
            save(other, place, overwrite=True)
        with pytest.raises(RoutingError, match="No space left on device"):
            other.save_pretrained(place)
    assert contents(place) == before
    save(other, place, overwrite=True)
    assert composition_of(load(place, dtype="float32")).routing.k == 1


def test_save_pretrained_writes_what_save_does(model, tmp_path, monkeypatch):
    save(model, tmp_path / "saved")
    assert contents(tmp_path / "saved").keys() == FILES
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("mine")
    for _ in range(2):
        model.save_pretrained(str(tmp_path / "new"), max_shard_size="1GB", state_dict={})
    assert contents(tmp_path / "new") == contents(tmp_path / "saved") | {"README.md": b"mine"}
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(RoutingError, match=r"README\.md can't be written: .*exists"):
        model.save_pretrained(tmp_path / "new" / "README.md")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RoutingError, match="holds another model"):
        model.save_pretrained(tmp_path)
    with pytest.raises(RoutingError, match=r"model\.push_to_hub"):
        model.save_pretrained("x", push_to_hub=True)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_push_to_the_hub_takes_the_routed_model_along(model, hub):
    model.push_to_hub("me/x", token="t")
    (*_, pushed) = hub.repositories["me/x"].commits.values()
    assert pushed.keys() == {*FILES, ".gitattributes", "README.md"}


def test_a_base_that_was_trained_is_not_lost_without_a_word(llama, model, tmp_path):
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    save(model, tmp_path / "unchanged")
    llama.model.lm_head.weight.data.mul_(1.5)
    for write in (lambda to: save(model, to), model.save_pretrained):
        with pytest.raises(RoutingError, match=r"have changed since .* detach it and save the"):
            write(tmp_path / "routed")
    assert not (tmp_path / "routed").exists()
    wanted = logits_of(detach(model), make_ids())
    model.save_pretrained(tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(logits_of(found, make_ids()), wanted)


# Experts that join and leave: byte for byte what the new pool, composed and saved, would be.


def test_experts_of_all_kinds_join_and_leave(llama, llama_mixed, tmp_path):
    pool = Pool((*llama_mixed.experts, make_kind("dora", llama, tmp_path, seed=8)))
    folder, first = tmp_path / "routed", ["lora0", "lora7", "bottleneck3"]
    save(composed("phatgoose", ordered(pool, first), llama), folder)
    second = ["ia32", "bottleneck4", "biased1", "bottleneck5", "dora8"]
    add_to_saved(folder, ordered(pool, second))
    assert_is_that_of(folder, "phatgoose", ordered(pool, [*first, *second]), llama)
    remove_from_saved(folder, ["bottleneck3", "lora7"])
    assert_is_that_of(folder, "phatgoose", ordered(pool, ["lora0", *second]), llama)


def test_what_else_is_in_the_folder_stays_as_it_is(uneven, pair, tmp_path):
    (pair / "notes").mkdir()
    (pair / "notes" / "routed.safetensors").write_text("mine")
    (pair / "nothing").symlink_to(tmp_path / "gone")
    pair.chmod(0o700)
    pair.rename(tmp_path / "kept")
    pair.symlink_to("kept")
    before = contents(pair)
    add_to_saved(pair, uneven.select(["e2"]))
    after = contents(tmp_path / "kept")
    assert {name for name in before | after if before.get(name) != after.get(name)} == READ
    assert pair.is_symlink()
    assert (pair / "nothing").is_symlink()
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700


def test_who_read_the_prompts_is_kept_and_loaded_only_if_it_is_known(llama, llama_pool, tmp_path):
    folder, reader = tmp_path / "routed", small_reader().reference
    save(compose(llama_pool, llama, router="discriminant:fallback=off"), folder)
    told = json.loads((folder / "routed.json").read_text())
    assert told["lookup"]["reader"] == asdict(reader)
    for changes, error, why in (
        (None, RoutingError, "names no reader of prompts"),
        ({"id": "them/theirs"}, ConfigError, "by 'them/theirs:1-1', and only e5, .* are load"),
        ({"fingerprint": "sha256:0"}, ConfigError, "isn't the one that the experts' prompts were"),
        ({"last": 6}, ConfigError, "Reader minilm has 6 blocks, wanted minilm:1-6"),
        ({"first": 2}, ConfigError, "Reader minilm has 6 blocks, wanted minilm:2-1"),
        ({"last": 2}, ConfigError, r"has states of \[2, 384\], .* are of \[1, 384\]"),
    ):
        told["lookup"]["reader"] = changes and {**asdict(reader), "fingerprint": None, **changes}
        (folder / "routed.json").write_text(json.dumps(told))
        with pytest.raises(error, match=why):
            load(folder, dtype="float32")


@needs_fork
@pytest.mark.parametrize("step", [1, 2])
def test_an_addition_that_is_killed_at_any_step_of_replacing_loses_nothing(
    llama, uneven, pair, step
):
    before, rename, steps = contents(pair), os.rename, []

    def killed(*places: Path) -> None:
        steps.append(places)
        if len(steps) == step:
            kill_self()
        rename(*places)

    def add() -> None:  # in a process of its own
        os.rename = killed
        add_to_saved(pair, uneven.select(["e2", "e3"]))

    assert forked(add) == -signal.SIGKILL
    if step == 2:
        assert not pair.exists()
        (old,) = pair.parent.glob(".pair.replaced-*")
        old.rename(pair)
    assert contents(pair) == before
    assert load(pair, copy.deepcopy(llama)).phatgoose.experts == ("e0", "e1")


def test_of_two_changes_at_once_one_is_refused(uneven, pair):
    def names():
        yield "e1"
        add_to_saved(pair, uneven.select(["e2"]))

    with pytest.raises(RoutingError, match="another process has changed it meanwhile"):
        remove_from_saved(pair, names())
    assert read_saved(pair).names == ("e0", "e1", "e2")


def test_of_two_additions_that_would_replace_the_folder_at_once_none_is_lost(
    uneven, pair, monkeypatch
):
    both, rename = Barrier(2, timeout=3), os.rename

    def at_once(source: Path, place: Path) -> None:
        if source == pair:
            with suppress(BrokenBarrierError):  # the other isn't let in
                both.wait()
        rename(source, place)

    monkeypatch.setattr("os.rename", at_once)
    with ThreadPoolExecutor(2) as threads:
        pools = {name: uneven.select([name]) for name in ("e2", "e3")}
        tries = {name: threads.submit(add_to_saved, pair, pools[name]) for name in pools}
    errors = {name: str(each.exception()) for name, each in tries.items() if each.exception()}
    (refused,) = errors
    assert "another process has changed it meanwhile; try again" in errors[refused]
    assert read_saved(pair).names == ("e0", "e1", "e3" if refused == "e2" else "e2")


def test_prompts_that_joining_experts_bring_are_read(llama, tmp_path):
    texts = {"a": ["Once more", "and again", "then"], "b": ["1 + 2 =", "12 + 7 =", "3 + 3 ="]}
    for seed, (name, lines) in enumerate(texts.items()):
        folder = make_adapter(llama, tmp_path / name, seed=seed)
        (folder / "prompts.txt").write_text("\n".join(lines))
    base, pool = load_base(llama.id), Pool.open(tmp_path)
    save(composed("discriminant", pool.select(["a"]), base), tmp_path / "routed")
    add_to_saved(tmp_path / "routed", tmp_path / "b")
    assert_is_that_of(tmp_path / "routed", "discriminant", pool, base)


def changed(expert: Expert, name: str, by) -> Pool:
    modules = {site: replace(each, **{name: by(each)}) for site, each in expert.lora.items()}
    return Pool((replace(expert, modules=modules),))


def test_what_can_not_join_or_leave_changes_nothing(llama, uneven, pair, pool_of, tmp_path):
    before, e2 = contents(pair), uneven["e2"]
    with pytest.raises(PoolError, match="'e1' is there already"):
        add_to_saved(pair, uneven.select(["e1"]))
    with pytest.raises(ExpertError, match=r"'e2', site .* they can't be of one base"):
        add_to_saved(pair, changed(e2, "A", lambda each: torch.cat([each.A] * 2, dim=1)))
    with pytest.raises(RoutingError, match=r"'e2' at .*: its update may have numbers of"):
        add_to_saved(pair, changed(e2, "A", lambda each: each.A * 1e25))
    with pytest.raises(PoolError, match="'e0', 'e1' can't leave"):
        remove_from_saved(pair, ["e0", "e1"])
    assert contents(pair) == before
    large = pool_of("llama", (24, 9, 20))
    save(compose_by("merged", large, llama), tmp_path / "folded")
    with pytest.raises(RoutingError, match="folded"):
        add_to_saved(
            tmp_path / "folded",
            Pool((replace(large["e0"], info=replace(large["e0"].info, name="new")),)),
        )
    with pytest.raises(RoutingError, match="folded"):
        remove_from_saved(tmp_path / "folded", ["e0"])


@pytest.mark.parametrize("router", ["merged", "phatgoose"])
@pytest.mark.parametrize(("factor", "dtype"), [(1e30, "float32"), (1e6, "half")])
def test_an_update_that_overflows_is_refused_by_name(llama, llama_pool, router, factor, dtype):
    (e2,) = changed(llama_pool["e2"], "B", lambda each: each.B * factor).experts
    llama.model.to(getattr(torch, dtype))
    with pytest.raises(RoutingError, match=r"Expert 'e2' at .* numbers of (\d|inf)"):
        compose(Pool((llama_pool["e0"], e2)), llama, router=router)
    compose(llama_pool, llama, router=router)


@pytest.fixture
def measured_apart(uneven) -> Pool:
    """Experts of which one was measured on a quantised base."""
    formats = ["torch.bfloat16", "torch.float32", "torch.bfloat16", "torch.bfloat16, Params4bit"]
    pairs = zip(uneven.experts, formats, strict=True)
    return Pool(tuple(replace(e, info=replace(e.info, measured_in=each)) for e, each in pairs))


def test_means_of_quantised_and_plain_bases_are_not_mixed(llama, measured_apart, tmp_path):
    pool, router = measured_apart, "average-activation"
    with pytest.raises(PoolError, match="phatgoose stats EXPERT --task"):
        compose(pool, llama, router=router)
    save(compose(pool.select(["e0", "e1", "e2"]), llama, router=router), tmp_path / "routed")
    with pytest.raises(PoolError, match="phatgoose stats EXPERT --task"):
        add_to_saved(tmp_path / "routed", pool.select(["e3"]))


def test_prompt_statistics_go_with_any_base(llama, measured_apart, tmp_path):
    pool, router = measured_apart, "discriminant:fallback=off"
    three = compose(pool.select(["e0", "e1", "e2"]), llama, router=router)
    save(three, tmp_path / "routed")
    detach(three)
    add_to_saved(tmp_path / "routed", pool.select(["e3"]))
    save(compose(pool, llama, router=router), tmp_path / "whole")
    assert contents(tmp_path / "routed") == contents(tmp_path / "whole")
