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
from phatgoose.errors import PhatgooseError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.saved import add_to_saved, load, read_saved, remove_from_saved, save
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
    read_saved(place / "folders" / "plain")  # pydantic compiles our declarations once
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


def load_and_run(folder: Path, base: Base) -> None:
    """Load the model in `folder` and run it."""
    model = load(folder, base)
    try:
        run(model)
    finally:
        detach(model)


def change(folder: Path, base: Base, more: Pool) -> None:
    """Let an expert join and another leave the model in `folder`."""
    names = add_to_saved(folder, more).names
    assert remove_from_saved(folder, names[:1]).names == names[1:]
    load_and_run(folder, base)


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
            load_and_run(folder, base)
            event("runs")  # --hypothesis-show-statistics tells how many did
        with told():
            change(folder, base, more)
            event("can be changed")


@pytest.fixture(scope="module")
def bases(loaded_bases) -> dict[str, Base]:
    """The tiny Llama by type."""
    llama = copy.deepcopy(loaded_bases["llama"])
    return {"float32": llama, "bfloat16": load_base(llama.id, dtype="bfloat16")}


@pytest.fixture
def folder(strangers, tmp_path) -> Path:
    """A folder of one's own of four plain experts."""
    return shutil.copytree(strangers / "folders" / "plain", tmp_path / "model")


def tamper(folder: Path, begin: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change the first tensor whose name begins so, or add it, and make the hash fit."""
    tensors = load_file(folder / FILE)
    name = next((name for name in sorted(tensors) if name.startswith(begin)), begin)
    changed = change(tensors.pop(name, torch.zeros(2)))
    tensors |= {} if changed is None else {name: changed.clone().contiguous()}
    save_file(tensors, folder / FILE)
    record_hash(folder)


def complaint(folder: Path, base: Base) -> str:
    """What `load` says."""
    with pytest.raises(PhatgooseError) as caught:
        load(folder, base)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800
    return str(caught.value)


SIZES, ORDER, WHOLE, UNKNOWN = "; wanted ", "in order", "one module for each", "wanted no such one"
TAMPERED: list[tuple[str, str, Callable[[Tensor], Tensor | None], str]] = [
    # kind, tensor, change, said
    ("plain", "A.", lambda t: t[..., :5], SIZES),
    ("plain", "A.", lambda t: t[None], SIZES),
    ("plain", "A.", lambda t: t[:, :0], SIZES),
    ("plain", "A.", lambda t: t.long(), "torch.int64; wanted"),
    ("plain", "A.", lambda t: None, "A is missing; wanted"),
    ("plain", "B.", lambda t: t[:1], SIZES),
    ("plain", "B.", lambda t: t[..., :5], "which the base lacks"),  # they agree with each other
    ("plain", "vectors.", lambda t: t[:1], SIZES),
    ("plain", "vectors.", lambda t: None, "vectors is missing; wanted"),
    ("plain", "experts.", lambda t: t + 1, ORDER),
    ("plain", "experts.", lambda t: t - 1, ORDER),
    ("plain", "experts.", lambda t: t * 2**62, ORDER),
    ("plain", "experts.", lambda t: t.flip(0), ORDER),
    ("plain", "experts.", lambda t: t * 0, ORDER),
    ("plain", "experts.", lambda t: t.int(), "torch.int32; wanted"),
    ("plain", "experts.", lambda t: None, "experts is missing; wanted"),
    *(("plain", name, lambda t: t, SIZES) for name in ("C.x", "votes.x", "weights")),
    ("plain", "lookup.other", lambda t: t, UNKNOWN),
    ("mixed", "B_bias.", lambda t: t[:, :3], SIZES),
    ("mixed", "lora_rows.", lambda t: t * 0, WHOLE),
    ("mixed", "lora_rows.", lambda t: None, WHOLE),  # a kernel would look for all in them
    ("mixed", "input_rows.", lambda t: t - 100, WHOLE),
    ("mixed", "output_deltas.", lambda t: t.double(), "wanted .* of torch.float32"),
    ("mixed", "up.", lambda t: t[:-1], SIZES),
    ("retrieval", "lookup.owners", lambda t: t + 9, "owners must number experts"),
    ("retrieval", "lookup.owners", lambda t: t[:-1], SIZES),
    ("retrieval", "lookup.embeddings", lambda t: 2 * t, "longer than 1"),
    ("centroid", "lookup.centroids", lambda t: t[:1], SIZES),
    ("discriminant", "lookup.readings.whole.mean", lambda t: t[..., :4], SIZES),
    ("discriminant", "lookup.readings.whole.rest", lambda t: -t - 1, "variances are below 0"),
    ("spectr", "directions.", lambda t: t[..., :4], SIZES),
    ("merged", "folded.model.layers.0.mlp", lambda t: t.T, "which the base lacks"),
]


@pytest.mark.parametrize(("kind", "begin", "change", "said"), TAMPERED)
def test_tensors_that_are_not_what_kernels_take_them_for_are_refused(
    strangers, bases, kind, begin, change, said, tmp_path
):
    folder = shutil.copytree(strangers / "folders" / kind, tmp_path / "model")
    tamper(folder, begin, change)
    assert re.search(said, complaint(folder, bases["float32"]))


DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "k 1.5": lambda info: info["routing"].update(k=1.5),
    "a long router": lambda info: info["routing"].update(router="x" * 10**6),
    "unknown kernel": lambda info: info["routing"].update(kernel="\x1b[31mfast"),
    "another router": lambda info: info["routing"].update(router="merged"),
    "a router without tensors": lambda info: info["routing"].update(router="retrieval"),
    "routing of words": lambda info: info.update(routing="phatgoose"),
    "experts of words": lambda info: info.update(experts=["e0", "e1", "e2", "e3"]),
    "no experts": lambda info: info.update(experts=[]),
    "name that climbs": lambda info: info["experts"][0].update(name="../e0"),
    "name of another": lambda info: info["experts"][0].update(name="e1"),
    "hash of numbers": lambda info: info["experts"][0].update(adapter_sha256=[]),
    "end of nobody": lambda info: info["experts"][0].update(acts_on={"tail": -1}),
    "base that colours": lambda info: info["base"].update(id="\x1b[31mbase"),
    "lookup null": lambda info: info.update(lookup=None),
    "tasks of nobody": lambda info: info.update(lookup={"experts_by_task": {"x": -1}}),
    "embedder of numbers": lambda info: info.update(lookup={"embedder": 3}),
    "one expert fewer": lambda info: info["experts"].pop(),
    **{f"no {key}": lambda info, key=key: info.pop(key) for key in ("base", "routing", "experts")},
}


@pytest.mark.parametrize("how", DESCRIPTIONS)
def test_a_description_is_read_strictly(folder, bases, how):
    info = json.loads((folder / INFO).read_text())
    DESCRIPTIONS[how](info)
    (folder / INFO).write_text(json.dumps(info))
    assert "routed." in complaint(folder, bases["float32"])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 1}', None])
def test_a_damaged_or_missing_description_is_told(folder, bases, content):
    (folder / INFO).unlink()
    if content:
        (folder / INFO).write_text(content)
    assert INFO in complaint(folder, bases["float32"])


def test_a_link_out_of_the_folder_is_refused_unread(folder, bases):
    (folder / FILE).rename(folder.parent / FILE)
    (folder / FILE).symlink_to(folder.parent / FILE)
    assert f"{FILE} can't be read: it is a link that leads out" in complaint(
        folder, bases["float32"]
    )


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
    assert "; wanted [" in told
    assert {name: (folder / name).read_bytes() for name in before} == before
