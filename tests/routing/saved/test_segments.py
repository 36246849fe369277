"""Packed models: written without being in memory, grown and shrunk, stored small."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from growth_cases import EMBEDDED, NAMES, ROUTERS, assert_same_models, composed, write_small_experts
from mixed_experts import ordered, renamed
from phatgoose.base.loading import load_base
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, ExpertError, PoolError, RoutingError, WrongBaseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.kinds.ia3.module import ScalingVector
from phatgoose.experts.kinds.peft import ADAPTER_WEIGHTS
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.growing import remove_experts
from phatgoose.routing.saved import segments as storing
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.routing.saved.segments import add_to_saved, compact, remove_from_saved, save_pool
from phatgoose.routing.saved.tensors import read_saved
from routed_models import SCORES, with_embeddings
from tiny import logits_of, make_ids

STATUS = Path("/proc/self/status")


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("routed"))


@pytest.mark.parametrize("router", [*ROUTERS, "oracle", "single", "best-individual"])
def test_packing_writes_what_composing_and_saving_does(
    llama, llama_pool, toy_embedder, tmp_path, router
):
    pool = with_embeddings(llama_pool)
    routing = Routing(router="single:expert=e2" if router == "single" else router)
    model = compose(pool, copy.deepcopy(llama), scores=SCORES, **asdict(routing))
    save(model, tmp_path / "saved")
    save_pool(pool, tmp_path / "packed", copy.deepcopy(llama), routing=routing, scores=SCORES)
    folders = (tmp_path / "saved", tmp_path / "packed")
    one, other = (json.loads((folder / "routed.json").read_text()) for folder in folders)
    assert one | {"weights_sha256": ""} == other | {"weights_sha256": ""}
    one, other = (load_file(folder / "routed.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_packed_model_grows_by_files_of_the_new_experts(
    llama, uneven, toy_embedder, tmp_path, router
):
    pool = with_embeddings(uneven) if router in EMBEDDED else uneven
    folder, routing = tmp_path / "packed", Routing(router=router)
    save_pool(pool.select(["e0", "e1"]), folder, copy.deepcopy(llama), routing=routing)
    before = (folder / "routed.safetensors").stat()
    add_to_saved(folder, pool.select(["e2"]))
    assert add_to_saved(folder, pool.select(["e3"])).names == NAMES
    assert (folder / "routed.safetensors").stat() == before
    assert len(files_of(folder)) == 4
    wanted = composed(router, uneven, llama)
    assert_same_models(load(folder, copy.deepcopy(llama)), wanted)
    compact(folder)
    assert len(files_of(folder)) == 2
    wanted = composed(router, uneven, llama)  # anew: a random one counts what it has drawn
    assert_same_models(load(folder, copy.deepcopy(llama)), wanted)


@pytest.mark.parametrize("stored", [None, "int8"])
def test_experts_of_all_kinds_join_in_the_type_that_is_there(llama, llama_mixed, tmp_path, stored):
    routing, base = Routing(router="phatgoose"), load_base(llama.id, dtype="bfloat16")
    folder, names = tmp_path / "packed", llama_mixed.names
    more = Pool(tuple(renamed(each, f"{each.name}-2") for each in llama_mixed.experts))
    save_pool(llama_mixed, folder, base, routing=routing, stored=stored)
    there = load_file(folder / "routed.safetensors")
    add_to_saved(folder, more)
    (added,) = (load_file(f) for f in folder.glob("routed-*.safetensors"))
    types = {name.partition(".")[0]: tensor.dtype for name, tensor in there.items()}
    assert {name: types[name.partition(".")[0]] for name in added} == {
        name: tensor.dtype for name, tensor in added.items()
    }
    assert compact(folder).names == (*names, *more.names)
    joined = load_file(next(folder.glob("routed-*.safetensors")))
    assert {n: t.dtype for n, t in joined.items()} == {n: t.dtype for n, t in there.items()}


@torch.no_grad()
def test_types_that_differ_from_site_to_site_stay(base_folders, pool_of, tmp_path):
    pool = pool_of("t5")  # whose `wo` transformers keeps in float32
    half = load_base(base_folders["t5"], dtype="float16")
    first, rest = Pool(pool.experts[:2]), Pool(pool.experts[2:])
    save_pool(first, tmp_path / "packed", half, routing=Routing("average-activation"))
    save_pool(pool, tmp_path / "whole", half, routing=Routing("average-activation"))
    add_to_saved(tmp_path / "packed", rest)
    compact(tmp_path / "packed")
    (joined,) = (load_file(f) for f in (tmp_path / "packed").glob("routed-*.safetensors"))
    wanted = load_file(tmp_path / "whole" / "routed.safetensors")
    factors = {name: each.dtype for name, each in wanted.items() if name.startswith(("A.", "B."))}
    assert set(factors.values()) == {torch.float16, torch.float32}
    assert joined.keys() == wanted.keys()
    assert all(torch.equal(joined[name], wanted[name]) for name in factors)
    assert factors == {name: joined[name].dtype for name in factors}


def test_a_new_site_has_the_type_of_those_called_alike():
    held = {"A.block.0.q": torch.float16, "A.block.0.wo": torch.float32, "means.block.0.q": None}
    types = storing._Types({n: torch.zeros(1, dtype=kind) for n, kind in held.items()})
    assert types.of("A", "block.1.q") == types.of("A", "block.0.q") == torch.float16
    assert types.of("A", "block.1.wo") == types.of("dora_A", "block.0.wo") == torch.float32
    assert types.of("means", "block.0.wo") == torch.float32
    assert types.of("vectors", "block.0.q") is None


@pytest.mark.parametrize("left", [["e0", "e1"], ["e1", "e3"], ["e0", "e2", "e3"]])
@pytest.mark.parametrize("router", ["phatgoose", "retrieval"])
def test_a_packed_model_shrinks_by_its_description(
    llama, uneven, toy_embedder, tmp_path, router, left
):
    pool = with_embeddings(uneven) if router == "retrieval" else uneven
    folder, routing = tmp_path / "packed", Routing(router=router)
    save_pool(pool.select(["e0", "e1", "e2"]), folder, copy.deepcopy(llama), routing=routing)
    add_to_saved(folder, pool.select(["e3"]))
    files = {name: (folder / name).stat() for name in files_of(folder) if "json" not in name}
    for name in NAMES:
        if name not in left:
            remove_from_saved(folder, [name])
    assert all((folder / name).stat() == was for name, was in files.items())
    wanted = compose(pool.select(left), copy.deepcopy(llama), **asdict(routing))
    assert_same_models(load(folder, copy.deepcopy(llama)), wanted)
    assert compact(folder).names == tuple(left)
    assert_same_models(load(folder, copy.deepcopy(llama)), wanted)
    remaining = [e for e in pool.experts if e.name not in left]
    add_to_saved(folder, Pool(tuple(remaining)))
    order = Pool((*pool.select(left).experts, *remaining))
    wanted = compose(order, copy.deepcopy(llama), **asdict(routing))
    assert_same_models(load(folder, copy.deepcopy(llama)), wanted)


def test_a_removed_name_may_come_again(llama, uneven, tmp_path):
    """e0 leaves and comes back as what e3 and then e2 is, each time after those that stayed."""
    folder, stay = tmp_path / "packed", uneven.select(["e1", "e2"])
    save_pool(
        uneven.select(["e0", "e1", "e2"]),
        folder,
        copy.deepcopy(llama),
        routing=Routing("phatgoose"),
    )
    for other in ("e3", "e2"):
        remove_from_saved(folder, ["e0"])
        again = Pool((renamed(uneven[other], "e0"),))
        assert add_to_saved(folder, again).names == ("e1", "e2", "e0")
        wanted = compose(
            Pool((*stay.experts, *again.experts)), copy.deepcopy(llama), router="phatgoose"
        )
        assert_same_models(load(folder, copy.deepcopy(llama)), wanted)
        with pytest.raises(PoolError, match="'e0' is there already"):
            add_to_saved(folder, again)
    assert json.loads((folder / "routed.json").read_text())["removed"] == [0, 3]
    assert compact(folder).names == ("e1", "e2", "e0")
    assert_same_models(load(folder, copy.deepcopy(llama)), wanted)


def test_folded_experts_are_packed_and_stay_what_they_are(llama, pool_of, tmp_path):
    pool, routing = pool_of("llama", (24, 9, 20)), Routing(router="merged")
    save_pool(pool, tmp_path / "packed", copy.deepcopy(llama), routing=routing)
    wanted = compose(pool, copy.deepcopy(llama), router="merged")
    model = load(tmp_path / "packed", copy.deepcopy(llama))
    assert torch.equal(logits_of(model, make_ids()), logits_of(wanted, make_ids()))
    with pytest.raises(RoutingError, match="folded"):
        remove_from_saved(tmp_path / "packed", ["e0"])
    with pytest.raises(RoutingError, match="folded"):
        add_to_saved(tmp_path / "packed", Pool((renamed(pool_of("llama")["e0"], "new"),)))


def test_what_can_not_join_or_leave_changes_nothing(llama, uneven, pool_of, packed):
    before = {name: (packed / name).read_bytes() for name in files_of(packed)}
    with pytest.raises(PoolError, match="'e1' is there already"):
        add_to_saved(packed, uneven.select(["e1"]))
    with pytest.raises(WrongBaseError):
        add_to_saved(packed, Pool((renamed(pool_of("t5").experts[0], "new"),)))
    with pytest.raises(PoolError, match="no expert 'e2'"):
        remove_from_saved(packed, ["e2"])
    with pytest.raises(PoolError, match="No expert would be left"):
        remove_from_saved(packed, ["e0", "e1"])
    with pytest.raises(PoolError, match="The pool has no experts"):
        add_to_saved(packed, Pool(()))
    expert = uneven.experts[2]
    wide = {
        site: replace(factors, A=torch.cat([factors.A, factors.A], dim=1))
        for site, factors in expert.lora.items()
    }
    with pytest.raises(ExpertError, match=r"'e2', site .* maps 96 to 32 features, .* 48 to 32"):
        add_to_saved(packed, Pool((replace(expert, modules=wide),)))
    with pytest.raises(ConfigError, match="float32, bfloat16, float16, int8, not in 'int4'"):
        compact(packed, stored="int4")
    with FileLock(packed / ".lock"), pytest.raises(RoutingError, match="Another process"):
        add_to_saved(packed, uneven.select(["e2"]))
    with pytest.raises(RoutingError, match="holds no routed model"):
        compact(packed.parent / "nowhere")
    assert {name: (packed / name).read_bytes() for name in files_of(packed)} == before


def enlarged(expert: Expert, times: float) -> Expert:
    modules = {site: replace(each, A=each.A * times) for site, each in expert.lora.items()}
    return replace(expert, modules=modules)


def test_numbers_that_no_layer_can_use_do_not_join(uneven, packed):
    before = {name: (packed / name).read_bytes() for name in files_of(packed)}
    with pytest.raises(RoutingError, match=r"'e2' at .*: its update has numbers of"):
        add_to_saved(packed, Pool((enlarged(uneven["e2"], 1e25),)))
    assert {name: (packed / name).read_bytes() for name in files_of(packed)} == before


def test_a_type_that_cannot_hold_the_experts_changes_nothing(llama, uneven, packed):
    before = {name: (packed / name).read_bytes() for name in files_of(packed)}
    pool = Pool((enlarged(uneven["e2"], 1e6),))
    for target in (packed, packed.parent / "new"):
        with pytest.raises(RoutingError, match=r"numbers that float16 can't hold; store .* in bfl"):
            save_pool(pool, target, copy.deepcopy(llama), stored="float16", overwrite=True)
    add_to_saved(packed, pool)
    after = files_of(packed)
    with pytest.raises(RoutingError, match="numbers that float16 can't hold"):
        compact(packed, stored="float16")
    assert files_of(packed) == after
    assert {name: (packed / name).read_bytes() for name in before if name != "routed.json"} == {
        name: content for name, content in before.items() if name != "routed.json"
    }
    assert not (packed.parent / "new").exists()


def test_an_expert_for_prompts_ends_does_not_join_an_encoder_decoder(
    pool_of, base_folders, tmp_path
):
    pool = pool_of("t5")
    base = load_base(base_folders["t5"], dtype="float32")
    save_pool(pool.select(["e0"]), tmp_path / "packed", base)
    late = replace(pool["e1"], info=replace(pool["e1"].info, acts_on={"tail": 4}))
    with pytest.raises(RoutingError, match="'e1' act from a prompt's end on"):
        add_to_saved(tmp_path / "packed", Pool((late,)))


def test_a_replacement_that_was_interrupted_is_undone_before_a_change(uneven, packed, monkeypatch):
    brought = []
    monkeypatch.setattr(storing, "bring_back", brought.append)
    add_to_saved(packed, uneven.select(["e2"]))
    assert brought == [packed]


@pytest.mark.parametrize("site", ["model.layers.0.self_attn.k_proj", "model.layers.0.elsewhere"])
def test_gates_of_another_length_change_nothing(llama, llama_mixed, packed, site):
    """The module scales outputs, so that it can't tell how long the site's inputs are."""
    before = {name: (packed / name).read_bytes() for name in files_of(packed)}
    info, where = llama_mixed.select(["ia32"]).experts[0].info, packed.parent
    modules = {site: ScalingVector(torch.ones(32), on_input=False)}
    odd = [
        Expert(replace(info, name=f"odd{n}"), where, modules, {site: torch.ones(n)}, {})
        for n in (7, 9)
    ]
    known = site.endswith("k_proj")
    for pool in [Pool((odd[0],))] * known + [Pool(tuple(odd))]:
        with pytest.raises(
            ExpertError, match=r"'odd\d', site .* mean of \d numbers for (32|7|9) inp"
        ):
            add_to_saved(packed, pool)
    assert {name: (packed / name).read_bytes() for name in files_of(packed)} == before


def test_what_does_not_hold_together_is_not_described(uneven, packed, monkeypatch):
    before = {name: (packed / name).read_bytes() for name in files_of(packed)}
    monkeypatch.setattr("phatgoose.routing.saved.segments.check_alike", lambda *_: None)
    expert = uneven.experts[2]
    bad = replace(expert, gates={site: gate[:7] for site, gate in expert.gates.items()})
    with pytest.raises(RoutingError, match=r"vectors has shape \[1, 7\]"):
        add_to_saved(packed, Pool((bad,)))
    assert {name: (packed / name).read_bytes() for name in files_of(packed)} == before


@pytest.mark.parametrize("step", ["write_tensors", "write_text"])
def test_an_interrupted_addition_is_none(llama, uneven, packed, monkeypatch, step):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(storing, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_to_saved(packed, uneven.select(["e2", "e3"]))
    monkeypatch.undo()
    assert read_saved(packed).names == ("e0", "e1")
    add_to_saved(packed, uneven.select(["e2", "e3"]))
    assert_same_models(load(packed, copy.deepcopy(llama)), composed("phatgoose", uneven, llama))
    compact(packed)
    assert len(files_of(packed)) == 2  # what was left behind is gone too


def test_a_segment_that_was_changed_is_told(uneven, packed):
    add_to_saved(packed, uneven.select(["e2"]))
    other = next(path for path in packed.iterdir() if path.name.startswith("routed-"))
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(RoutingError, match="was changed after it was written"):
        read_saved(packed)


@pytest.mark.parametrize("stored", ["int8", "bfloat16", "float16", "float32"])
def test_experts_are_stored_in_the_type_asked_for(llama, uneven, tmp_path, stored):
    folder = tmp_path / "packed"
    save_pool(
        uneven.select(["e0", "e1"]),
        folder,
        copy.deepcopy(llama),
        stored=stored,
        routing=Routing("phatgoose"),
    )
    add_to_saved(folder, uneven.select(["e2", "e3"]))
    kinds = {
        tensor.dtype
        for segment in read_saved(folder).segments
        for name, tensor in segment.tensors.items()
        if name.startswith(("A.", "B."))
    }
    assert kinds == {storing.STORED[stored]}
    got = logits_of(load(folder, copy.deepcopy(llama)), make_ids(rows=2))
    wanted = logits_of(composed("phatgoose", uneven, llama), make_ids(rows=2))
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error <= {"int8": 0.02, "bfloat16": 0.02, "float16": 0.002, "float32": 0}[stored]
    assert (error > 0) == (stored != "float32")
    compact(folder, stored="float32")
    again = logits_of(load(folder, copy.deepcopy(llama)), make_ids(rows=2))
    assert torch.equal(again, got)


def test_bfloat16_loses_nothing_under_a_base_in_bfloat16(llama, uneven, tmp_path):
    base = load_base(llama.id, dtype="bfloat16")
    wanted = logits_of(compose(uneven, copy.deepcopy(base), router="phatgoose"), make_ids())
    save_pool(
        uneven,
        tmp_path / "packed",
        copy.deepcopy(base),
        stored="bfloat16",
        routing=Routing("phatgoose"),
    )
    loaded = load(tmp_path / "packed", copy.deepcopy(base))
    assert torch.equal(logits_of(loaded, make_ids()), wanted)


@pytest.mark.skipif(not STATUS.is_file(), reason="memory is told by Linux's /proc")
def test_a_pool_that_is_packed_and_loaded_is_never_in_memory(llama, tmp_path):
    pool = Pool.open(write_small_experts(llama, tmp_path / "experts", 120, rank=64))
    size = sum(e.directory.joinpath(ADAPTER_WEIGHTS).stat().st_size for e in pool.experts)
    base, ids = copy.deepcopy(llama), make_ids(tokens=3)
    with own_memory() as taken:
        save_pool(pool, tmp_path / "packed", base, routing=Routing("phatgoose"))
    assert taken.peak < 0.4 * size
    with own_memory() as taken:
        model = load(tmp_path / "packed", base)
        got = logits_of(model, ids)
    assert taken.peak < 0.4 * size
    wanted = compose(pool, copy.deepcopy(llama), router="phatgoose")
    # It does take memory to have them there, and so much would have been seen. (What of composing
    # is seen depends on threads: on how much of earlier memory the allocator still holds.)
    assert sum(buffer.nbytes for buffer in wanted.buffers()) > 0.9 * size
    with own_memory() as taken:
        held = torch.ones(2 * size, dtype=torch.uint8)  # more than malloc takes from what it has
    assert taken.peak > 0.9 * held.nbytes
    assert torch.equal(got, logits_of(wanted, ids))


@dataclass
class Memory:
    """The most memory of its own, in bytes, that this process took."""

    peak: int = 0


@contextmanager
def own_memory() -> Iterator[Memory]:
    """What is taken while the context is open, mapped files aside: seen every millisecond."""

    def own() -> int:
        lines = STATUS.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def watch() -> None:
        while not done.wait(0.001):
            memory.peak = max(memory.peak, own() - before)

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory, done, before = Memory(), threading.Event(), own()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()
        memory.peak = max(memory.peak, own() - before)


def test_a_thousand_experts_are_opened_composed_packed_and_found_again(
    llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("phatgoose.files.tensor_file.torch.get_num_threads", lambda: 2)
    pool = Pool.open(write_small_experts(llama, tmp_path / "experts", 1000, rank=1))
    assert len(pool) == 1000
    model = compose(pool, copy.deepcopy(llama), router="phatgoose")
    wanted = logits_of(model, make_ids())
    save_pool(
        pool.select(leave_out=["x0999"]),
        tmp_path / "packed",
        copy.deepcopy(llama),
        routing=Routing("phatgoose"),
    )
    add_to_saved(tmp_path / "packed", pool.select(["x0999"]))
    loaded = load(tmp_path / "packed", copy.deepcopy(llama))
    assert torch.equal(logits_of(loaded, make_ids()), wanted)
    gone = [f"x{z:04}" for z in range(1000) if z % 3]
    remove_experts(loaded, gone)
    remove_from_saved(tmp_path / "packed", gone)
    assert_same_models(load(tmp_path / "packed", copy.deepcopy(llama)), loaded)


def test_a_packed_mixed_model_grows_shrinks_and_is_compacted(llama, llama_mixed, tmp_path):
    place, first = tmp_path / "packed", ["lora0", "lora7", "bottleneck3"]
    save_pool(
        ordered(llama_mixed, first), place, copy.deepcopy(llama), routing=Routing("phatgoose")
    )
    second = ["ia32", "bottleneck4", "biased1", "bottleneck5"]
    add_to_saved(place, ordered(llama_mixed, second))
    wanted = composed("phatgoose", ordered(llama_mixed, [*first, *second]), llama)
    assert_same_models(load(place, copy.deepcopy(llama)), wanted)
    remove_from_saved(place, ["bottleneck3", "lora7"])
    wanted = composed("phatgoose", ordered(llama_mixed, ["lora0", *second]), llama)
    assert_same_models(load(place, copy.deepcopy(llama)), wanted)
    (place / "notes.safetensors").write_text("somebody else's")
    compact(place)
    assert_same_models(load(place, copy.deepcopy(llama)), wanted)
    assert {path.name for path in place.glob("*.safetensors")} - {"notes.safetensors"} == {
        entry["file"] for entry in json.loads((place / "routed.json").read_text())["segments"]
    }
    assert (place / "notes.safetensors").read_text() == "somebody else's"


def test_a_pool_without_loras_is_packed_and_grows(llama, llama_mixed, tmp_path):
    place = tmp_path / "packed"
    save_pool(
        ordered(llama_mixed, ["ia32", "ia36"]),
        place,
        copy.deepcopy(llama),
        routing=Routing("phatgoose"),
    )
    add_to_saved(place, ordered(llama_mixed, ["lora0"]))
    wanted = composed("phatgoose", ordered(llama_mixed, ["ia32", "ia36", "lora0"]), llama)
    assert_same_models(load(place, copy.deepcopy(llama)), wanted)


def test_int8_is_for_the_factors_of_loras(llama, llama_mixed, tmp_path):
    place = tmp_path / "packed"
    save_pool(llama_mixed, place, copy.deepcopy(llama), stored="int8", routing=Routing("phatgoose"))
    loaded = load(place, copy.deepcopy(llama))
    wanted = composed("phatgoose", llama_mixed, llama)
    for site, layer in loaded.phatgoose.layers.items():
        mine, theirs = layer.stack.tensors(), wanted.phatgoose.layers[site].stack.tensors()
        for name in mine.keys() - {"A", "B"}:
            assert torch.equal(mine[name], theirs[name])
        for name in mine.keys() & {"A", "B"}:
            assert (mine[name] - theirs[name]).abs().max() <= theirs[name].abs().max() / 253
