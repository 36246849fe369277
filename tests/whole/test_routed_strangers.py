"""Routed models of strangers: whatever is done to a folder, what comes back runs or is one line.

PHATGOOSE_FUZZ sets how many damaged folders are tried (research/reliability.md has figures, and how
to run this with the native kernel under AddressSanitizer).
"""

import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from damage import content_of, damaged, damages, examples, json_of, only_reading, told
from mixed_experts import mixed_pool_for
from phatgoose.base.identity import Base
from phatgoose.base.loading import load_base
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from phatgoose.routing.routers.router import all_routers
from phatgoose.routing.saved import add_to_saved, read_saved, remove_from_saved
from routed_models import SCORES, of_task, uneven_pool, with_embeddings
from tiny import VOCABULARY, logits_of, make_ids, write_expert
from toy_embedders import use_toy_embedder

INFO, FILE = "routed.json", "routed.safetensors"
KINDS = ["plain", "mixed", "retrieval", "arrow", "centroid", "discriminant", "oracle", "merged"]
IDS = make_ids(rows=2)


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
    routers = {"plain": "phatgoose", "mixed": "phatgoose"}
    for kind in KINDS:
        pool, router = {"mixed": mixed, "merged": high}.get(kind, uneven), routers.get(kind, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oracle's k
            model = compose(pool, copy.deepcopy(base), router=router, scores=SCORES)
        save(model, place / "folders" / kind)
    write_expert(base, place, "more", seed=9)
    # Once: pydantic compiles our declarations, and routers are imported.
    read_saved(place / "folders" / "plain")
    all_routers()
    return place


def record_hash(folder: Path) -> None:
    """Write the file's present hash into the description, so that deeper checks are reached."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        info = json_of(folder / INFO)
        info["weights_sha256"] = sha256(content_of(folder / FILE)).hexdigest()
        (folder / INFO).write_text(json.dumps(info))


def load_and_run(folder: Path, base: Base) -> None:
    """A pass through the loaded model, before whose tensors nothing is in memory."""
    model = load(folder, base)
    for layer in composition_of(model).layers.values():
        for module in layer.modules():
            for name, tensor in module.named_buffers(recurse=False):
                setattr(module, name, tensor.clone())
    try:
        assert logits_of(of_task(model, "second"), IDS).shape == (*IDS.shape, VOCABULARY)
    finally:
        detach(model)


@examples(40)
@given(
    done=damages((INFO,), (FILE,)),
    rehash=st.integers(0, 4).map(bool),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_a_damaged_folder_runs_or_is_one_line(strangers, bases, done, rehash, kind, dtype):
    more, base = Pool.open(strangers / "experts" / "more"), bases[dtype]
    with damaged(strangers / "folders" / kind, done) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a k that is lowered, say
        if rehash:
            record_hash(folder)
        with only_reading(folder), told():
            read_saved(folder)
        with told():
            load_and_run(folder, base)
            event("runs")  # --hypothesis-show-statistics tells how many did
        with told():
            names = add_to_saved(folder, more).names
            assert remove_from_saved(folder, names[:1]).names == names[1:]
            load_and_run(folder, base)
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
    with told() as lines:
        load(folder, base)
    (line,) = lines
    return line


SIZES, ORDER, WHOLE, UNKNOWN = "; wanted ", "in order", "one module for each", "no such tensor"
TAMPERED: list[tuple[str, str, Callable[[Tensor], Tensor | None], str]] = [
    # kind, tensor, change, said
    ("plain", "A.", lambda t: t[..., :5], SIZES),
    ("plain", "A.", lambda t: t.long(), "torch.int64; wanted"),
    ("plain", "A.", lambda t: None, "A is missing; wanted"),
    ("plain", "B.", lambda t: t[..., :5], "which the base lacks"),  # they agree with each other
    ("plain", "vectors.", lambda t: t[:1], SIZES),
    ("plain", "experts.", lambda t: t + 1, ORDER),
    ("plain", "experts.", lambda t: t - 1, ORDER),
    ("plain", "experts.", lambda t: t.flip(0), ORDER),
    ("plain", "experts.", lambda t: t * 0, ORDER),
    ("plain", "weights", lambda t: t, SIZES),
    ("plain", "lookup.other", lambda t: t, UNKNOWN),
    ("mixed", "lora_rows.", lambda t: t * 0, WHOLE),
    ("mixed", "lora_rows.", lambda t: None, WHOLE),  # a kernel would look for all in them
    ("mixed", "input_rows.", lambda t: t - 100, WHOLE),
    ("retrieval", "lookup.owners", lambda t: t + 9, "owners must number experts"),
    ("retrieval", "lookup.embeddings", lambda t: 2 * t, "longer than 1"),
    ("centroid", "lookup.centroids", lambda t: t[:1], SIZES),
    ("discriminant", "lookup.readings.whole.rest", lambda t: -t - 1, "variances are below 0"),
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
    "another router": lambda info: info["routing"].update(router="merged"),
    "a router without tensors": lambda info: info["routing"].update(router="retrieval"),
    "no experts": lambda info: info.update(experts=[]),
    "name that climbs": lambda info: info["experts"][0].update(name="../e0"),
    "name of another": lambda info: info["experts"][0].update(name="e1"),
    "end of nobody": lambda info: info["experts"][0].update(acts_on={"tail": -1}),
    "base that colours": lambda info: info["base"].update(id="\x1b[31mbase"),
    "tasks of nobody": lambda info: info.update(lookup={"experts_by_task": {"x": -1}}),
    "one expert fewer": lambda info: info["experts"].pop(),
    "nothing": lambda info: info.clear(),
}


@pytest.mark.parametrize("how", DESCRIPTIONS)
def test_a_description_is_read_strictly(folder, bases, how):
    info = json.loads((folder / INFO).read_text())
    DESCRIPTIONS[how](info)
    (folder / INFO).write_text(json.dumps(info))
    assert re.search(r"routed\.|router is", complaint(folder, bases["float32"]))


@pytest.mark.parametrize("file", [INFO, FILE])
def test_a_link_out_of_the_folder_is_refused_unread(folder, bases, file):
    (folder / file).rename(folder.parent / file)
    (folder / file).symlink_to(folder.parent / file)
    assert f"{file} can't be read: it is a link that leads out" in complaint(
        folder, bases["float32"]
    )
