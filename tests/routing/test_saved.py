"""Saved models: what is written, read and changed. Damaged folders: whole/test_routed_strangers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from growth_cases import assert_is_that_of, composed
from mixed_experts import ordered, renamed
from phatgoose.base import load_base
from phatgoose.errors import ExpertError, PoolError, RoutingError, WrongBaseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.ia3 import ScalingVector
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.saved import (
    add_to_saved,
    read_saved,
    remove_from_saved,
    shareable,
)
from routed_models import compose_by, of_task
from tiny import logits_of, make_ids, make_model

READ = {"routed.json", "routed.safetensors"}
FILES = READ | {"config.json", "tokenizer.json", "tokenizer_config.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def model(llama, llama_pool):
    return compose(llama_pool, llama, router="phatgoose")


@pytest.fixture
def pair(llama, uneven, tmp_path) -> Path:
    """A folder of e0 and e1 under router phatgoose."""
    save(composed("phatgoose", uneven.select(["e0", "e1"]), llama), tmp_path / "pair")
    return tmp_path / "pair"


# Saved and loaded


@pytest.mark.parametrize(
    ("router", "ranks"),
    [("phatgoose", (2, 3, 4)), ("retrieval", (2, 3, 4)), ("merged", (24, 9, 20))],
    ids=["phatgoose", "retrieval", "merged and folded"],
)
def test_a_loaded_model_is_the_saved_one_without_the_experts_files(
    base, kind, pool_of, toy_embedder, tmp_path, router, ranks
):
    experts = pool_of(kind, ranks).experts
    pool = Pool(tuple(replace(e, directory=Path("gone") / e.name) for e in experts))
    model, ids = compose_by(router, pool, base), make_ids(rows=2)
    wanted = logits_of(model, ids)
    kinds = {type(layer) for layer in composition_of(model).layers.values()}
    assert (RoutedLinear in kinds) == (ranks[0] < 9)  # ranks that are large fold everywhere
    save(model, tmp_path / "routed")
    loaded = of_task(load(tmp_path / "routed", dtype="float32"), "second")
    assert {type(layer) for layer in composition_of(loaded).layers.values()} == kinds
    assert torch.equal(logits_of(loaded, ids), wanted)
    save(loaded, tmp_path / "again")
    for file in READ:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "routed" / file).read_bytes()


def test_settings_and_names_are_kept_and_no_place_on_this_machine(llama, llama_pool, tmp_path):
    router = "phatgoose:eps=0.001"
    given = {"k": 3, "kernel": "gather", "router": router}
    model = compose(llama_pool, llama, **given)
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


def test_what_is_in_the_file_is_mapped_and_not_copied(pair):
    tensors = read_saved(pair).tensors
    storages = [tensors[name].untyped_storage() for name in tensors if name[1] == "."]
    assert {each.data_ptr() for each in storages} == {storages[0].data_ptr()}
    assert storages[0].nbytes() == (pair / "routed.safetensors").stat().st_size


def test_nothing_is_overwritten_unless_asked_for(llama, llama_pool, model, tmp_path, monkeypatch):
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


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


# save_pretrained, and who calls it


def test_save_pretrained_writes_what_save_does(base, pool, tmp_path):
    ids, model = make_ids(), compose(pool, base, router="phatgoose")
    wanted = logits_of(model, ids)
    save(model, tmp_path / "saved")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(str(tmp_path / "new"), max_shard_size="1GB", state_dict={})
    assert contents(tmp_path / "saved").keys() == FILES
    assert contents(tmp_path / "new") == contents(tmp_path / "saved") | {"README.md": b"mine"}
    detach(model)
    assert torch.equal(logits_of(load(tmp_path / "new", base), ids), wanted)


def test_where_no_model_can_be_written_nothing_is(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RoutingError, match=r"file can't be written: .*exists"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_a_push_to_the_hub_takes_the_routed_model_along(model, monkeypatch):
    pushed = set[str]()
    url = type("Url", (), {"repo_id": "me/x"})
    api = type("Api", (), {"create_repo": lambda *_, **__: url})
    card = type("Card", (), {"save": lambda _, place: Path(place).write_text("card")})
    monkeypatch.setattr("transformers.utils.hub.hf_api", api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card())
    monkeypatch.setattr(
        type(model),
        "_upload_modified_files",
        lambda _, folder, *__, **___: pushed.update(contents(Path(folder))),
    )
    model.push_to_hub("me/x")
    assert pushed == FILES | {"README.md"}
    with pytest.raises(RoutingError, match=r"model\.push_to_hub"):
        model.save_pretrained("x", push_to_hub=True)


@pytest.mark.parametrize("moment", ["before composing", "afterwards"])
def test_a_base_that_was_trained_is_not_lost_without_a_word(llama, llama_pool, moment, tmp_path):
    def train() -> None:
        llama.model.lm_head.weight.data.mul_(1.5)

    if moment == "before composing":
        train()
    model = compose(llama_pool, llama, router="phatgoose")
    if moment == "afterwards":
        train()
    for write in (lambda to: save(model, to), model.save_pretrained):
        with pytest.raises(RoutingError, match=r"have changed since .* detach it and save the"):
            write(tmp_path / "routed")
    assert not (tmp_path / "routed").exists()
    wanted = logits_of(detach(model), make_ids())
    model.save_pretrained(tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(logits_of(found, make_ids()), wanted)


def take_gradients(model) -> None:
    model.requires_grad_(True)
    model(make_ids()).logits.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16).half(),
        lambda model: model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}),
        take_gradients,
        lambda model: model.tie_weights(),
    ],
    ids=["types", "its own state", "gradients", "tying"],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"], indirect=True)  # gpt2's are tied
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_base_that_nobody_changed_is_saved(base, pool, change, tmp_path):
    model = compose(pool, base, router="phatgoose")
    change(model)
    save(model, tmp_path / "routed")
    assert contents(tmp_path / "routed").keys() == FILES


# Experts that join and leave: byte for byte what the new pool, composed and saved, would be.


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
    types = {tensor.dtype for tensor in read_saved(tmp_path / "routed").tensors.values()}
    assert types >= {torch.float16, torch.float32}


def test_what_else_is_in_the_folder_stays_as_it_is(llama, uneven, pair, tmp_path):
    (pair / "notes").mkdir()
    (pair / "notes" / "routed.safetensors").write_text("mine")
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o600)
    (pair / "link").symlink_to(tmp_path / "key")
    (pair / "nothing").symlink_to(tmp_path / "gone")
    pair.chmod(0o700)
    pair.rename(tmp_path / "kept")
    pair.symlink_to("kept")
    before = contents(pair)
    add_to_saved(pair, uneven.select(["e2"]))
    after = contents(tmp_path / "kept")
    different = {name for name in before | after if before.get(name) != after.get(name)}
    assert different == READ
    assert pair.is_symlink()
    assert (pair / "nothing").is_symlink()
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "key", tmp_path / "kept")]
    assert modes == [0o600, 0o700]


def test_an_addition_that_is_killed_is_none(llama, uneven, pair, monkeypatch):
    before = contents(pair)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ctypes.CDLL", killed)  # names are exchanged through it
        with pytest.raises(KeyboardInterrupt):
            add_to_saved(pair, uneven.select(["e2", "e3"]))
    assert load(pair, copy.deepcopy(llama)).phatgoose.experts == ("e0", "e1")
    assert contents(pair) == before


def test_of_two_changes_at_once_one_is_refused(uneven, pair):
    def names():
        yield "e1"
        add_to_saved(pair, uneven.select(["e2"]))

    with pytest.raises(RoutingError, match="another process has changed it meanwhile"):
        remove_from_saved(pair, names())
    assert read_saved(pair).names == ("e0", "e1", "e2")


def without_numbers(**change: Any):
    """An expert e2 whose LoRAs are changed so."""
    return lambda pool: replace(
        pool["e2"],
        modules={
            site: replace(each, **{name: by(getattr(each, name)) for name, by in change.items()})
            for site, each in pool["e2"].lora.items()
        },
    )


def odd(pool: Pool) -> Expert:
    # Such a module scales outputs, so that it can't tell how long the site's inputs are.
    site, info = "model.layers.0.self_attn.k_proj", pool["e2"].info
    scaling = {site: ScalingVector(torch.ones(32), on_input=False)}
    return Expert(replace(info, name="odd"), Path("odd"), scaling, {site: torch.ones(7)}, {})


@pytest.mark.parametrize(
    ("kind", "said", "joining"),
    [
        (PoolError, "'e1' is there already", lambda pool: pool["e1"]),
        (
            ExpertError,
            r"'e2', site .* they can't be of one base",
            without_numbers(A=lambda A: torch.cat([A] * 2, dim=1)),
        ),
        (
            RoutingError,
            "'e2' at .*: its update may have numbers of",
            without_numbers(A=lambda A: A * 1e25),
        ),
        (ExpertError, "layers of 32 and 7 features", odd),
    ],
)
def test_what_can_not_join_changes_nothing(uneven, pair, kind, said, joining):
    before = contents(pair)
    with pytest.raises(kind, match=said):
        add_to_saved(pair, Pool((joining(uneven),)))
    assert contents(pair) == before


def test_what_is_folded_neither_grows_nor_shrinks(llama, pool_of, tmp_path):
    pool = pool_of("llama", (24, 9, 20))
    save(compose_by("merged", pool, llama), tmp_path / "routed")
    with pytest.raises(RoutingError, match="folded"):
        add_to_saved(tmp_path / "routed", Pool((renamed(pool["e0"], "new"),)))
    with pytest.raises(RoutingError, match="folded"):
        remove_from_saved(tmp_path / "routed", ["e0"])


def test_the_last_expert_can_not_leave(pair):
    before = contents(pair)
    with pytest.raises(PoolError, match="'e0', 'e1' can't leave"):
        remove_from_saved(pair, ["e0", "e1"])
    assert contents(pair) == before


# Numbers that a layer can't compute with


def times(expert: Expert, factor: float, site: str) -> Expert:
    """The expert with its B at one site times `factor`."""
    lora = expert.lora[site]
    return replace(expert, modules={**expert.modules, site: replace(lora, B=lora.B * factor)})


@pytest.mark.parametrize("router", ["merged", "phatgoose"])
@pytest.mark.parametrize(
    ("factor", "dtype"), [(1e30, "float32"), (1e30, "bfloat16"), (1e6, "half")]
)
def test_an_update_that_overflows_is_refused_by_name(llama, llama_pool, router, factor, dtype):
    site, (e0, e1, e2, e3) = llama_pool.sites[3], llama_pool.experts
    llama.model.to(getattr(torch, dtype))
    with pytest.raises(RoutingError, match=rf"Expert 'e2' at {site}: .* numbers of (\d|inf)"):
        compose(Pool((e0, e1, times(e2, factor, site), e3)), llama, router=router)
    compose(llama_pool, llama, router=router)


def measured_in(pool: Pool, *formats: str | None) -> Pool:
    """The pool whose experts record that they were measured on bases of these formats."""
    pairs = zip(pool.experts, formats, strict=True)
    return Pool(tuple(replace(e, info=replace(e.info, measured_in=each)) for e, each in pairs))


@pytest.mark.parametrize("router", ["discriminant", "average-activation"])
def test_statistics_of_quantised_and_plain_bases_are_not_mixed(llama, uneven, router, tmp_path):
    plain = measured_in(uneven, *("torch.bfloat16", "torch.float32") * 2)
    mixed = measured_in(uneven, *["torch.bfloat16"] * 3, "torch.bfloat16, Params4bit")
    told = r"\(Params4bit, not quantised\)\. .* phatgoose stats EXPERT --task"
    with pytest.raises(PoolError, match=told):
        compose(mixed, llama, router=router)
    compose(mixed, llama, router="phatgoose")  # which compares none
    detach(llama.model)
    model = compose(plain.select(["e0", "e1", "e2"]), llama, router=router)
    save(model, tmp_path / "routed")
    with pytest.raises(PoolError, match="Params4bit, not quantised"):
        add_to_saved(tmp_path / "routed", mixed.select(["e3"]))
    detach(model)
    compose(measured_in(uneven, None, *["torch.float32"] * 3), llama, router=router)
