"""Routed models of strangers: whatever is done to a folder, what comes back runs or is one line.

PHATGOOSE_FUZZ sets how many damaged folders are tried (research/reliability.md has figures, and how
to run this with the native kernel under AddressSanitizer).
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from damage import content_of, damages, do_all, json_of, unexpected, watched
from growth_cases import uneven_pool
from mixed_experts import mixed_pool_for
from phatgoose.apps.cli import main
from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.growing import add_experts, remove_experts
from phatgoose.routing.saved.change import add_to_saved, remove_from_saved
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.routing.saved.tensors import read_saved
from routed_models import SCORES, with_embeddings
from tiny import VOCABULARY, logits_of, make_ids, write_expert
from toy_embedders import use_toy_embedder

EXAMPLES = int(os.environ.get("PHATGOOSE_FUZZ", "40"))
INFO, FILE = "routed.json", "routed.safetensors"
KINDS = (
    *("plain", "mixed", "retrieval", "spectr", "centroid", "discriminant"),
    *("oracle", "merged"),
)
IDS = make_ids(rows=2)


SECRET = "the secret of somebody else"
DAMAGES = damages((INFO,), (FILE,))


@pytest.fixture(scope="module", autouse=True)
def _toy_embedder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_toy_embedder(patch)
        yield


@pytest.fixture(scope="session")
def strangers(loaded_bases, tmp_path_factory) -> Path:
    """One folder of each kind, and `more`, the pool of an expert who can join."""
    place, base = tmp_path_factory.mktemp("strangers"), loaded_bases["llama"]
    uneven = with_embeddings(uneven_pool(base, place / "uneven"))
    mixed = mixed_pool_for(base, place / "mixed-experts")
    high = Pool((write_expert(base, place, "high", rank=40), write_expert(base, place, "low")))
    made = {
        "plain": (uneven, "phatgoose"),
        "spectr": (uneven, "spectr:shortlist=2"),
        "mixed": (mixed, "phatgoose"),
        "merged": (high, "merged"),
    }
    for kind in KINDS:
        pool, router = made.get(kind, (uneven, kind))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oracle's k
            model = compose(pool, copy.deepcopy(base), router=router, scores=SCORES)
        save(model, place / "folders" / kind)
    write_expert(base, place, "more", seed=9)
    return place


def record_hash(folder: Path) -> None:
    """Write the file's present hash into the description, so that deeper checks are reached."""
    try:
        info = json_of(folder / INFO)
        info["weights_sha256"] = sha256(content_of(folder / FILE)).hexdigest()
        (folder / INFO).write_text(json.dumps(info))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return


@contextmanager
def told() -> Iterator[None]:
    """Whatever is refused inside is refused in one printable line of bounded length."""
    try:
        yield
    except PhatgooseError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 1500
        assert SECRET not in message


def run(model: PreTrainedModel) -> None:
    """One pass through `model`, whose tensors are put where nothing stands behind them before."""
    parts = composition_of(model)
    for layer in parts.layers.values():
        for module in layer.modules():
            for name, tensor in module.named_buffers(recurse=False):
                setattr(module, name, tensor.clone())
    if parts.routing.router == "oracle":
        parts.context.use(parts.context.choose([[]], task="second"))
    assert logits_of(model, IDS).shape == (*IDS.shape, VOCABULARY)


def load_and_run(folder: Path, base: Base, more: Pool) -> None:
    """Load the model in `folder`, run it, and let an expert join and others leave it in memory."""
    model = load(folder, base)
    try:
        run(model)
        with told():
            run(add_experts(model, more))
        with told():
            run(remove_experts(model, [composition_of(model).experts[0]]))
    finally:
        detach(model)


def change(folder: Path, base: Base, more: Pool) -> None:
    """Let an expert join and another leave the model in `folder`."""
    names = add_to_saved(folder, more).names
    assert remove_from_saved(folder, names[:1]).names == names[1:]
    load_and_run(folder, base, more)


@settings(
    max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(
    done=DAMAGES,
    rehash=st.integers(0, 4).map(bool),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_a_damaged_folder_runs_or_is_one_line(strangers, bases, done, rehash, kind, dtype):
    more, base = Pool.open(strangers / "experts" / "more"), bases[dtype]
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a k that is lowered, say
        folder = Path(place) / "models" / "model"
        shutil.copytree(strangers / "folders" / kind, folder)
        (folder.parent / "secret.json").write_text(json.dumps({"name": SECRET}))
        do_all(done, folder)
        if rehash:
            record_hash(folder)
        before = sorted(path.name for path in folder.parent.rglob("*"))
        with watched() as events, told():
            read_saved(folder)
        assert unexpected(events, folder) == []
        assert sorted(path.name for path in folder.parent.rglob("*")) == before
        with told():
            load_and_run(folder, base, more)
            event("runs")  # --hypothesis-show-statistics tells how many did
        with told():
            change(folder, base, more)
            event("can be changed")


@pytest.fixture(scope="module")
def bases(loaded_bases) -> dict[str, Base]:
    """The tiny Llama by type."""
    llama = copy.deepcopy(loaded_bases["llama"])
    return {"float32": llama, "bfloat16": load_base(llama.id, dtype="bfloat16")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folders_that_are_damaged_are_sound(strangers, bases, kind, dtype, tmp_path):
    folder = shutil.copytree(strangers / "folders" / kind, tmp_path / "model")
    more = Pool.open(strangers / "experts" / "more")
    load_and_run(folder, bases[dtype], more)
    with told():
        change(folder, bases[dtype], more)


@pytest.fixture
def folder(strangers, tmp_path) -> Path:
    """A folder of one's own of four plain experts."""
    return shutil.copytree(strangers / "folders" / "plain", tmp_path / "model")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the description."""
    info = json.loads((folder / INFO).read_text())
    change(info)
    (folder / INFO).write_text(json.dumps(info))


def tamper(folder: Path, begin: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change the first tensor whose name begins so, and make the hash fit."""
    tensors = load_file(folder / FILE)
    name = next(name for name in sorted(tensors) if name.startswith(begin))
    tensors[name] = change(tensors[name]).clone().contiguous()
    save_file(tensors, folder / FILE)
    record_hash(folder)


def complaint(folder: Path, base: Base) -> str:
    """What `load` says."""
    with pytest.raises(PhatgooseError) as caught:
        load(folder, base)
    assert str(caught.value).isprintable()
    return str(caught.value)


SHAPE, RANGE, ORDER = "shape .* wanted", "numbers from .* wanted 0 to 3", "must be in order"
TAMPERED: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "A narrowed": ("A.", lambda t: t[..., :5], "vectors have 32 columns for 5 inputs|" + SHAPE),
    "A of one expert": ("A.", lambda t: t[:1], SHAPE),
    "A of another rank": ("A.", lambda t: t[:, :1], SHAPE),
    "A deeper": ("A.", lambda t: t[None], SHAPE),
    "A without ranks": ("A.", lambda t: t[:, :0], SHAPE),
    "A of whole numbers": ("A.", lambda t: t.long(), "type torch.int64; wanted"),
    "A of bytes": ("A.", lambda t: t.to(torch.int8), "type torch.int8; wanted"),
    "B of one expert": ("B.", lambda t: t[:1], SHAPE),
    "B of another rank": ("B.", lambda t: t[:, :1], SHAPE),
    "vectors of one expert": ("vectors.", lambda t: t[:1], SHAPE),
    "vectors narrowed": ("vectors.", lambda t: t[:, :-1], "columns|" + SHAPE),
    "one vector": ("vectors.", lambda t: t[0], SHAPE),
    "experts of another pool": ("experts.", lambda t: t + 1, RANGE),
    "negative experts": ("experts.", lambda t: t - 1, RANGE),
    "huge experts": ("experts.", lambda t: t * 2**62, RANGE),
    "experts backwards": ("experts.", lambda t: t.flip(0), ORDER),
    "an expert twice": ("experts.", lambda t: t * 0, ORDER),
    "experts in int32": ("experts.", lambda t: t.int(), "type torch.int32; wanted"),
    "fewer experts": ("experts.", lambda t: t[:1], SHAPE),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tensors_that_are_not_what_kernels_take_them_for_are_refused(folder, bases, how):
    begin, change, said = TAMPERED[how]
    tamper(folder, begin, change)
    assert re.search(said, complaint(folder, bases["float32"]))
    with pytest.raises(RoutingError, match=said):
        remove_from_saved(folder, ["e0"])


MIXED: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "B_bias narrowed": ("B_bias.", lambda t: t[:, :3], SHAPE),
    "lora_rows twice": ("lora_rows.", lambda t: t * 0, "one module for each"),
    "lora_rows of nobody": ("lora_rows.", lambda t: t + 100, "one module for each"),
    "input_deltas narrowed": ("input_deltas.", lambda t: t[:, :3], SHAPE),
    "input_rows negative": ("input_rows.", lambda t: t - 100, "one module for each"),
    "output_deltas widened": ("output_deltas.", lambda t: t.repeat(1, 2), SHAPE),
    "up of fewer": ("up.", lambda t: t[:-1], SHAPE),
    "down of another size": ("down.", lambda t: t[:, :1], SHAPE),
    "down_bias flat": ("down_bias.", lambda t: t.flatten(), SHAPE),
    "no such activation": ("activations.", lambda t: t + 3, "activations has numbers from"),
    "a negative activation": ("activations.", lambda t: t - 3, "activations has numbers from"),
    "bottleneck_rows in int32": ("bottleneck_rows.", lambda t: t.int(), "int32; wanted"),
}


OTHERS: dict[str, tuple[str, str, Callable[[Tensor], Tensor], str]] = {
    "owners of another pool": ("retrieval", "lookup.owners", lambda t: t + 9, "owners has numbers"),
    "negative owners": ("retrieval", "lookup.owners", lambda t: t - 1, "owners has numbers"),
    "fewer owners": ("retrieval", "lookup.owners", lambda t: t[:-1], SHAPE),
    "fewer centroids": ("centroid", "lookup.centroids", lambda t: t[:1], SHAPE),
    "narrow means": ("discriminant", "lookup.readings.whole.mean", lambda t: t[..., :4], SHAPE),
    "directions of fewer": ("discriminant", "lookup.readings.whole.factor", lambda t: t[:1], SHAPE),
    "centroids of whole numbers": ("centroid", "lookup.centroids", lambda t: t.long(), SHAPE),
    "directions of more": ("spectr", "directions.", lambda t: torch.cat([t, t]), SHAPE),
    "narrow directions": ("spectr", "directions.", lambda t: t[..., :4], SHAPE),
    "a folded weight turned": ("merged", "folded.model.layers.0.mlp", lambda t: t.T, "folded into"),
    "long embeddings": ("retrieval", "lookup.embeddings", lambda t: 2 * t, "longer than 1"),
    "long centroids": ("centroid", "lookup.centroids", lambda t: 2 * t, "longer than 1"),
    "rests below 0": (
        "discriminant",
        "lookup.readings.whole.rest",
        lambda t: -t - 1,
        "has variances",
    ),
}


OTHERS |= {how: ("mixed", *case) for how, case in MIXED.items()}


@pytest.mark.parametrize("how", OTHERS)
def test_tensors_of_other_routers_and_kinds_are_refused_too(strangers, bases, how, tmp_path):
    kind, begin, change, said = OTHERS[how]
    folder = shutil.copytree(strangers / "folders" / kind, tmp_path / "model")
    tamper(folder, begin, change)
    assert re.search(said, complaint(folder, bases["float32"]))


def test_sizes_that_agree_with_each_other_but_not_with_the_base_are_refused(folder, bases):
    tamper(folder, "B.", lambda t: t[..., :5])
    assert read_saved(folder).sites
    assert "wanted [P" in complaint(folder, bases["float32"])


def test_embeddings_of_another_embedder_are_told_when_they_are_searched(strangers, bases, tmp_path):
    folder, base = tmp_path / "model", bases["float32"]
    shutil.copytree(strangers / "folders" / "retrieval", folder)
    tamper(folder, "lookup.embeddings", lambda t: t[:, :4])
    model = load(folder, base)
    try:
        with pytest.raises(RoutingError, match=r"have 4 columns, those of .* 64"):
            run(model)
    finally:
        detach(model)


def test_names_of_tasks_do_not_reach_a_terminal_as_they_are(strangers, bases, tmp_path):
    folder = shutil.copytree(strangers / "folders" / "oracle", tmp_path / "model")
    edit(folder, lambda info: info["lookup"]["experts_by_task"].update({"\x1b[2J\n": 0}))
    model = load(folder, bases["float32"])
    try:
        with pytest.raises(RoutingError) as caught:
            composition_of(model).context.choose([[]], task="third")
        assert str(caught.value).isprintable()
    finally:
        detach(model)


@pytest.mark.parametrize("begin", ["A.", "B.", "experts.", "vectors."])
def test_a_tensor_that_is_missing_is_told(folder, bases, begin):
    tensors = load_file(folder / FILE)
    del tensors[next(name for name in tensors if name.startswith(begin))]
    save_file(tensors, folder / FILE)
    record_hash(folder)
    assert "but no" in complaint(folder, bases["float32"])


@pytest.mark.parametrize("name", ["C.x", "A", "A.", "votes.x", "lookup.other", "weights"])
def test_a_tensor_that_nobody_knows_is_refused(folder, bases, name):
    save_file(load_file(folder / FILE) | {name: torch.zeros(2)}, folder / FILE)
    record_hash(folder)
    assert f"holds {name!r}, which is no part" in complaint(folder, bases["float32"])


DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "k 1.5": lambda info: info["routing"].update(k=1.5),
    "k of words": lambda info: info["routing"].update(k="two"),
    "no eps": lambda info: info["routing"].update(router="phatgoose:eps=0"),
    "a long router": lambda info: info["routing"].update(router="x" * 10**6),
    "unknown kernel": lambda info: info["routing"].update(kernel="\x1b[31mfast"),
    "another router": lambda info: info["routing"].update(router="merged"),
    "a router without tensors": lambda info: info["routing"].update(router="retrieval"),
    "a router without tasks": lambda info: info["routing"].update(router="oracle"),
    "an unknown router": lambda info: info["routing"].update(router="phatgoose-input"),
    "settings twice": lambda info: info["routing"].update(router="arrow:form=peft,form=svd"),
    "unknown setting": lambda info: info["routing"].update({"\x1b[2Jclear": 1}),
    "routing of words": lambda info: info.update(routing="phatgoose"),
    "experts null": lambda info: info.update(experts=None),
    "experts of words": lambda info: info.update(experts=["e0", "e1", "e2", "e3"]),
    "no experts": lambda info: info.update(experts=[]),
    "name that clears screens": lambda info: info["experts"][0].update(name="\x1b[2J"),
    "name that climbs": lambda info: info["experts"][0].update(name="../e0"),
    "name of lines": lambda info: info["experts"][0].update(name="e0\ne1"),
    "name of another": lambda info: info["experts"][0].update(name="e1"),
    "name null": lambda info: info["experts"][0].update(name=None),
    "path of numbers": lambda info: info["experts"][0].update(path=3),
    "hash of numbers": lambda info: info["experts"][0].update(adapter_sha256=[]),
    "base null": lambda info: info.update(base=None),
    "base of numbers": lambda info: info["base"].update(id=3),
    "base that colours": lambda info: info["base"].update(id="\x1b[31mbase"),
    "lookup null": lambda info: info.update(lookup=None),
    "tasks of words": lambda info: info.update(lookup={"experts_by_task": {"x": "e0"}}),
    "tasks of no expert": lambda info: info.update(lookup={"experts_by_task": {"x": 4}}),
    "tasks of nobody": lambda info: info.update(lookup={"experts_by_task": {"x": -1}}),
    "embedder of numbers": lambda info: info.update(lookup={"embedder": 3}),
    "one expert fewer": lambda info: info["experts"].pop(),
    "hash of lists": lambda info: info.update(weights_sha256=[]),
    "no hash": lambda info: info.pop("weights_sha256"),
    **{f"no {key}": lambda info, key=key: info.pop(key) for key in ("base", "routing", "experts")},
    "version 99": lambda info: info.update(format_version=99),
    "version true": lambda info: info.update(format_version=True),
}


@pytest.mark.parametrize("how", DESCRIPTIONS)
def test_a_description_is_read_strictly(folder, bases, how):
    edit(folder, DESCRIPTIONS[how])
    message = complaint(folder, bases["float32"])
    assert len(message) < 600


def test_a_link_out_of_the_folder_is_refused_unread(folder, bases):
    (folder / FILE).rename(folder.parent / FILE)
    (folder / FILE).symlink_to(folder.parent / FILE)
    assert f"{FILE} is a symbolic link that leads out" in complaint(folder, bases["float32"])


@pytest.mark.parametrize("command", ["add", "remove"])
def test_commands_refuse_a_tampered_folder_in_one_line_and_leave_it(
    folder, strangers, capsys, command
):
    tamper(folder, "B.", lambda t: t[:, :1])
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    more = {"add": [str(strangers / "experts" / "more")], "remove": ["e0"]}[command]
    with pytest.raises(SystemExit) as caught:
        main([command, str(folder), *more])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "wanted [P" in told
    assert {name: (folder / name).read_bytes() for name in before} == before
