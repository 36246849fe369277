"""Marks: whether every expert of a pool, alone, answers every example right.

    python research/marks.py DATA POOL OUT [--base B] [--rows 40] [--unseen 60] [--random SEED]
        [--random-output] [--ranked] [--routed ROUTER ...]

DATA is what `render_tasks.py` writes, or task files of yours: own-known/NAME.jsonl and
own-new/NAME.jsonl of the experts' own tasks, and eval/*.jsonl that no expert was trained on; any
may be missing. FOLDER.toml beside a folder says how its tasks are scored; for eval, commit 6aa0f67a
has suites with their metrics, and suffixes of BIG-bench's inputs (research/study/suites). POOL is a
pool whose experts are named after their tasks. The base, each expert alone and, with `--random`,
each expert's random twin answer the experts' own tasks in known and new wordings and the unseen
tasks, as `phatgoose evaluate` scores them: plain prompts, and choices by their mean log-likelihood
per token. Prompt routers score the same prompts; install examples/more-routers, which has two
of them.

Tasks are scored in pieces of 20 examples, first one piece of every task. OUT/cells.jsonl keeps what
is finished, one model on one piece a line: run the command again to go on, with more models or rows
if you like. OUT/NAME.parquet is written whenever all models have answered a piece of every task. It
has one row an example, and no text:

    prompt               the first 16 hex digits of the SHA-256 of the input
    task, wording        `known` and `new` are experts' own tasks, `unseen` the others
    choices, label       their number, and which is right first; 0 and -1 for written answers
    embedding            of the prompt, in the space of the experts' centres, if it has any
    score/MODEL          0 to 1; MODEL is base, expert/NAME, random/NAME or routed/ROUTER
    likelihoods/MODEL    mean log-likelihood per token of each choice
    choice/ROUTER        a prompt router's score of each expert, in the order of the metadata

`phatgoose replay OUT/NAME.parquet` scores rules by it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from more_routers.centroids import clusters_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from phatgoose.base.identity import Base, number_format
from phatgoose.errors import PoolError, TaskError
from phatgoose.evaluation.compare import code_version
from phatgoose.evaluation.evaluate import EvaluationSet, Questions, ScoringSettings, score
from phatgoose.evaluation.metrics import metric
from phatgoose.evaluation.results import ResultStore
from phatgoose.experts.expert import Expert
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.files import new_file, read_table
from phatgoose.routing.compose import compose, detach, resolve_base
from phatgoose.routing.opening import open_chooser
from phatgoose.routing.routers.prompt import PromptChooser
from phatgoose.tasks.encoding import Encoder, said_in_tokens
from phatgoose.tasks.loading import load_task

ROUTERS = ("retrieval", "centroid", "centroids:clusters=4", "discriminant", "joint-discriminant")
CLUSTERS = 4  # of each expert, in the file's metadata
WORDINGS = {"own-known": "known", "own-new": "new", "eval": "unseen"}
PIECE = 20  # examples of a task
AT_ONCE = 200  # examples that are scored, then kept
Which = tuple[str, str, int]  # wording, task, piece
Sets = dict[Which, EvaluationSet]
Model = tuple[str, Any, Pool | None, str]  # name, what it is made of, its experts, its router
Columns = dict[str, list[Any]]


def main() -> None:
    """Score what isn't there yet, and write the file after each round of pieces."""
    given = _options()
    pool = Pool.open(given.pool)
    base = resolve_base(given.base, pool.base)
    sets = evaluation_sets(given.data, pool, given.rows, given.unseen, ranked=given.ranked)
    name = given.name or Path(base.reference.id).name
    models = list(models_of(pool, given.random, given.routed, by_output=given.random_output))
    count = sum(len(each.examples) for each in sets.values())
    dtype = number_format(base.model)
    print(f"{name}: {len(models)} models, {count} examples, {dtype}", flush=True)
    finished, basis = Sets(), basis_of(pool)
    with ResultStore.alone(given.out / "cells.jsonl") as store:
        for piece in sorted({piece for _, _, piece in sets}):
            begun = time.monotonic()
            asked = {which: each for which, each in sets.items() if which[2] == piece}
            for some in alike(asked):
                for model in models:
                    answer(store, base, some, model)
            finished |= asked
            columns = examples_of(finished) | choices_of(pool, base, finished, given.out, basis)
            columns |= {k: v for model in models for k, v in answers(store, base, finished, model)}
            write(given.out / f"{name}.parquet", metadata(name, base, pool, basis), columns)
            rows, seconds = len(columns["prompt"]), time.monotonic() - begun
            print(f"{rows} examples, {rows * len(models)} marks, {seconds:.0f} s", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", help="default: the one that the experts name")
    parser.add_argument("--name", help="of the file; default: the base's")
    parser.add_argument("--rows", type=int, default=40, help="of an own task, in each wording")
    parser.add_argument("--unseen", type=int, default=60, help="rows of an unseen task; 0: none")
    parser.add_argument("--ranked", action="store_true", help="unseen tasks with choices only")
    parser.add_argument("--random", type=int, metavar="SEED", help="random twins of experts too")
    parser.add_argument("--random-output", action="store_true", help="twins change as much")
    parser.add_argument("--routed", nargs="*", default=[], help="routers to run: merged phatgoose")
    return parser.parse_args()


def evaluation_sets(
    data: Path,
    pool: Pool,
    rows: int,
    unseen: int,
    *,
    ranked: bool,
    wordings: Mapping[str, str] = WORDINGS,
) -> Sets:
    """Pieces of own and unseen tasks, the same own rows in each of the `wordings`, by folder.

    A task's pieces are in an order that doesn't depend on how many are asked for. With `ranked`
    unseen tasks without choices are left out.
    """
    found: Sets = {}
    for folder, wording in wordings.items():
        limit = unseen if wording == "unseen" else rows
        for table in tables_of(data / folder):
            path = data / folder / Path(table["file"]).name
            is_asked = wording == "unseen" or path.stem in pool.names
            if not (limit and is_asked and path.is_file() and path.stat().st_size):
                continue
            ending = table.get("suffix", "")
            task = load_task(path)
            examples = task.evaluation_examples()
            drawn = random.Random(0).sample(examples, len(examples))[:limit]
            task = replace(
                task,
                test=tuple(replace(each, input=each.input + ending) for each in drawn),
                metrics=tuple(table.get("metrics", ())),
                max_new_tokens=table.get("max_new_tokens"),
            )
            whole = EvaluationSet.of(task, ScoringSettings())
            if ranked and wording == "unseen" and not whole.is_ranked:
                continue
            for start in range(0, len(drawn), PIECE):
                part = whole.examples[start : start + PIECE]
                found[wording, task.name, start // PIECE] = replace(whole, examples=part)
    if not found:
        raise SystemExit(f"error: {data} has no task files in {', '.join(wordings)} for this pool.")
    return found


def tables_of(folder: Path) -> list[dict[str, Any]]:
    """The tasks there: file, and perhaps metrics, max_new_tokens and a suffix of inputs.

    By the suite beside the folder, FOLDER.toml, as `render_tasks.py` writes it; without one all.
    """
    suite = folder.with_suffix(".toml")
    if not suite.is_file():
        return [{"file": path.name} for path in sorted(folder.glob("*.jsonl"))]
    content = read_table(suite, "Suite", TaskError)
    return [{"suffix": content.get("suffix", ""), **table} for table in content["tasks"]]


def models_of(
    pool: Pool, seed: int | None, routed: list[str], *, by_output: bool
) -> Iterator[Model]:
    """The base, each expert, and what else is asked for."""
    yield "base", None, None, ""
    made_of: Any  # JSON
    for expert in pool.experts:
        made_of = expert.info.adapter_sha256
        yield f"expert/{expert.name}", made_of, pool.select([expert.name]), "single"
    for router in routed:
        made_of = [expert.info.adapter_sha256 for expert in pool.experts]
        yield f"routed/{router}", made_of, pool, router
    if seed is None:
        return
    twins = Pool(tuple(random_twin(expert, seed, by_output=by_output) for expert in pool.experts))
    drawn = [seed, "output"] if by_output else [seed]
    for expert, twin in zip(pool.experts, twins.experts, strict=True):
        made_of = [expert.info.adapter_sha256, *drawn]
        yield f"random/{expert.name}", made_of, Pool((twin,)), "single"
    for router in routed:
        made_of = [*(expert.info.adapter_sha256 for expert in pool.experts), *drawn]
        yield f"routed/{router}, random LoRAs", made_of, twins, router


def random_twin(expert: Expert, seed: int, *, by_output: bool = False) -> Expert:
    """The expert with random LoRAs: at every site the rank and Frobenius norm of its own update.

    A trained update acts where activations are, so it changes them several times as much as a
    random one of its norm. With `by_output` both change the expert's mean activation as much.
    Gates, statistics and embeddings stay. Raises PoolError for an expert that is no LoRA.
    """
    if len(expert.lora) < len(expert.modules):
        raise PoolError(f"Expert {expert.name!r} isn't a LoRA; it has no random twin.")
    draws = torch.Generator().manual_seed(zlib.crc32(expert.name.encode()) + seed)
    modules = {
        site: _random(lora, draws, expert.means[site] if by_output else None)
        for site, lora in sorted(expert.lora.items())
    }
    return replace(expert, modules=modules)


def _random(lora: LoraFactors, draws: torch.Generator, mean: Tensor | None) -> LoraFactors:
    A = torch.randn(lora.A.shape, generator=draws)
    B = torch.randn(lora.B.shape, generator=draws)
    if mean is None:
        share = norm_of_product(lora.A, lora.B) / norm_of_product(A, B)
    else:
        share = (lora.B.float() @ (lora.A.float() @ mean)).norm() / (B @ (A @ mean)).norm()
    return LoraFactors(A, B * share, lora.scale, lora.bias)


def norm_of_product(A: Tensor, B: Tensor) -> Tensor:
    """The Frobenius norm of B A, from the small matrices BᵀB and AAᵀ."""
    A, B = A.float(), B.float()
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()


def answer(store: ResultStore, base: Base, sets: Sets, model: Model) -> None:
    """Store what one model answers to `sets`, which are scored alike, as far as it isn't there."""
    keys = keys_of(base, sets, model)
    missing = {which: each for which, each in sets.items() if store.get(keys[which]) is None}
    if not missing:
        return
    _, _, pool, router = model
    with composed(base, pool, router):
        for which, result in scored(base, missing).items():
            store.add(keys[which], result)


def answers(
    store: ResultStore, base: Base, sets: Sets, model: Model
) -> Iterator[tuple[str, list[Any]]]:
    """Columns: the stored scores and likelihoods of one model, example by example."""
    results = [store.get(key) or {} for key in keys_of(base, sets, model).values()]
    for part in ("score", "likelihoods"):
        yield f"{part}/{model[0]}", [value for result in results for value in result[part]]


def keys_of(base: Base, sets: Sets, model: Model) -> dict[Which, Any]:
    """The store's key of each piece."""
    about = [base.fingerprint, number_format(base.model)]
    return {
        which: {"model": list(model[:2]), "base": about, "set": [*which[:2], each.digest]}
        for which, each in sets.items()
    }


@contextmanager
def composed(base: Base, pool: Pool | None, router: str) -> Iterator[None]:
    """The base's model routes over `pool` inside; None leaves it alone."""
    if pool is None:
        yield
        return
    compose(pool, base, router=router)
    try:
        yield
    finally:
        detach(base.model)


def alike(sets: Sets) -> Iterator[Sets]:
    """The sets that are scored alike, some at a time, so that batches are full."""
    kinds: dict[Any, Sets] = {}
    for which, each in sets.items():
        kinds.setdefault((each.metrics, each.max_new_tokens), {})[which] = each
    for same in kinds.values():
        yield from together(same)


def together(sets: Sets) -> Iterator[Sets]:
    """Some sets at a time: the base's states of all prompts take gigabytes."""
    some: Sets = {}
    for which, each in sets.items():
        some[which] = each
        if sum(len(held.examples) for held in some.values()) >= AT_ONCE:
            yield some
            some = {}
    if some:
        yield some


def scored(base: Base, sets: Sets) -> dict[Which, dict[str, Any]]:
    """Cells of the store: one model on sets that are scored alike."""
    begun = time.monotonic()
    first = next(iter(sets.values()))
    examples = tuple(row for each in sets.values() for row in each.examples)
    every = replace(first, name=", ".join(task for _, task, _ in sets), examples=examples)
    encoder = Encoder.for_model(base.model, base.tokenizer, every.formatting)
    found = score(base.model, Questions(every, encoder))
    by_metric = [
        metric(name).combine(rows, 1)
        for name, rows in zip(found.sample.metrics, found.sample.statistics, strict=True)
    ]
    scores = [round(float(each), 4) for each in np.mean(by_metric, axis=0)]
    likelihoods = [[round(x, 4) for x in each.scores] for each in found.predictions]
    seconds = (time.monotonic() - begun) / len(examples)
    cells, start = {}, 0
    for which, each in sets.items():
        its = slice(start, start + len(each.examples))
        start = its.stop
        cells[which] = {
            "score": scores[its],
            "likelihoods": likelihoods[its],
            "seconds": round(seconds * len(each.examples), 2),
            "code": code_version(),
        }
    return cells


def examples_of(sets: Sets) -> Columns:
    """What the file says of each example."""
    found: Columns = {name: [] for name in ("prompt", "task", "wording", "choices", "label")}
    for (wording, task, _), each in sets.items():
        for row in each.examples:
            right = [i for i, choice in enumerate(row.choices) if choice in row.answers]
            found["prompt"].append(hashlib.sha256(row.input.encode()).hexdigest()[:16])
            found["task"].append(task)
            found["wording"].append(wording)
            found["choices"].append(len(row.choices))
            found["label"].append(right[0] if right else -1)
    return found


def choices_of(pool: Pool, base: Base, sets: Sets, out: Path, basis: Tensor | None) -> Columns:
    """Embeddings of the prompts in `basis`, and each prompt router's scores; from `out` if there.

    Routers whose needs the pool lacks are left out by name.
    """
    about = json.dumps([pool.records(), ROUTERS], default=str)
    kept = {}
    for which, each in sets.items():
        digest = hashlib.sha256(f"{about} {each.digest}".encode()).hexdigest()
        kept[which] = out / "choices" / f"{digest[:16]}.safetensors"
    missing = {which: each for which, each in sets.items() if not kept[which].exists()}
    if missing:
        choosers = {router: c for router in ROUTERS if (c := _chooser(pool, base, router))}
        encoder = Encoder.for_model(base.model, base.tokenizer)
        for some in together(missing):
            prompts = [p for each in some.values() for p in Questions(each, encoder).prompts]
            found = _chosen(choosers, base, prompts)
            counts = [len(each.examples) for each in some.values()]
            parts = {name: rows.split(counts) for name, rows in found.items()}
            for i, which in enumerate(some):
                with new_file(kept[which]) as path:
                    save_file({name: rows[i].contiguous() for name, rows in parts.items()}, path)
    held = [load_file(path) for path in kept.values()]
    found = {name: torch.cat([part[name] for part in held]) for name in held[0]}
    if basis is not None:
        found["embedding"] = found["embedding"] @ basis
    return {name: list(rows.numpy()) for name, rows in found.items()}


def _chooser(pool: Pool, base: Base, router: str) -> PromptChooser | None:
    try:
        return open_chooser(pool, base.tokenizer, router=router)
    except PoolError as error:
        print(f"without {router}: {error}", flush=True)
        return None


def _chosen(
    choosers: Mapping[str, PromptChooser], base: Base, prompts: list[list[int]]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for router, chooser in choosers.items():
        found[f"choice/{router}"] = chooser.score(prompts)
        if router == "retrieval":
            found["embedding"] = chooser.router.features(
                chooser, [said_in_tokens(base.tokenizer, prompt) for prompt in prompts]
            )
    return found


def metadata(name: str, base: Base, pool: Pool, basis: Tensor | None) -> dict[str, str]:
    """What the file says of all rows: `phatgoose` is JSON; `centres` are each expert's, base64."""
    about: dict[str, Any] = {"format": 1, "base": name, "experts": list(pool.names)}
    about |= {"code": code_version(), "dtype": number_format(base.model)}
    if basis is None:
        return {"phatgoose": json.dumps(about)}
    held = clusters_of(pool, CLUSTERS)
    about["owners"] = held.owners.tolist()  # the expert of each centre, float16
    rows = (held.rows.float() @ basis).half().numpy()
    centres = base64.b64encode(rows.tobytes()).decode()
    return {"phatgoose": json.dumps(about), "centres": centres}


def basis_of(pool: Pool) -> Tensor | None:
    """The space of the experts' centres, [columns of an embedding, dimensions]; None without any.

    Products with centres stay as they are there. As long as centres are far fewer than columns,
    little else of a prompt can be told.
    """
    if not all(expert.has("embeddings") for expert in pool.experts):
        return None
    rows = clusters_of(pool, CLUSTERS).rows.float()
    return torch.linalg.svd(rows, full_matrices=False).Vh.T


def write(path: Path, about: Mapping[str, str], columns: Columns) -> None:
    """The Parquet file, whole or not at all."""
    arrays = {name: _array(name, values) for name, values in columns.items()}
    table = pa.table(arrays).replace_schema_metadata(about)
    halves = [name for name in arrays if name.startswith(("embedding", "choice/", "likelihoods/"))]
    with new_file(path) as unfinished:
        pq.write_table(
            table,
            unfinished,
            compression="zstd",
            compression_level=19,
            use_dictionary=[name for name in arrays if name not in halves],
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in halves},
        )


def _array(name: str, values: list[Any]) -> pa.Array:
    part = name.partition("/")[0]
    if part in ("task", "wording"):
        return pa.array(values).dictionary_encode()
    if part in ("choices", "label"):
        return pa.array(values, pa.int16())
    if part == "score":
        return pa.array(values, pa.float32())
    if part in ("embedding", "choice"):
        exact = np.asarray(values)
        rows = exact.astype(np.float16)
        if part == "choice":  # rounding must not change which expert is first
            first = np.arange(len(rows)), exact.argmax(axis=1)
            rows[first] = np.nextafter(rows.max(axis=1), np.float16(np.inf))
        return pa.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])
    if part == "likelihoods":
        ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
        flat = np.asarray([x for each in values for x in each], np.float16)
        return pa.ListArray.from_arrays(ends, flat)
    return pa.array(values)


if __name__ == "__main__":
    main()
