"""Methods side by side on whole suites, as in the paper's Table 1.

Every finished run (one row on one dataset) is kept, so a comparison can be stopped, continued, and
extended by methods, experts or suites.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..base.identity import Base, check_base, dtype_name, number_format
from ..base.loading import load_base
from ..config import Routing, ScoringSettings
from ..errors import ConfigError, EvaluationError, PoolError, TaskError
from ..experts.expert import Expert, warn_of_other_formatting
from ..experts.pool import Pool
from ..files import sha256_of
from ..jobs import BaseLocation, Engine, absolute
from ..names import ROUTED_INFO
from ..routing.compose import check_composable, compose, detach, resolve_base
from ..routing.opening import is_pool, is_routed, open_model
from ..routing.routers.fixed import best_expert, best_expert_by_task
from ..routing.routers.router import all_routers, canonical, router_of
from ..routing.saved import base_of
from ..sites import ROUTED
from ..tasks.encoding import Encoder, as_read
from ..tasks.loading import given_tasks
from ..tasks.suites.registry import open_suite
from ..tasks.task import Sources, Suite, Task, refuse_twice
from .evaluate import EvaluationSet, Questions, TaskScore, examples_of, score
from .results import BASE, Comparison, ResultStore, restored, stored, write_tables

RESULTS = "results.jsonl"
PACKAGE = Path(__file__).parents[1]
OTHERS = ("apps", "analysis", "training")  # rooms that no score depends on

logger = logging.getLogger(__name__)

Source = Suite | Task | str | Path


# The rows: the base, every router of the registry (paper section 4.2), others.

# In the order of the tables. A single expert is no method: Oracle and Best Individual choose one.
ROUTERS = all_routers()
METHODS = {BASE: "Base model"}
for _name, _kind in ROUTERS.items():
    if _name not in ("single", "weights"):
        METHODS[_name] = _kind.label
# These follow from the single experts' results, which they know: they are not zero-shot.
DERIVED = tuple(name for name, kind in ROUTERS.items() if "scores" in kind.given)
EVERY = "all"  # stands for every method whose needs the pool meets


def label_of(router: str) -> str:
    """A router, with or without settings, in tables: "Arrow, form=peft"."""
    name, _, settings = router.partition(":")
    label = ROUTERS[name].label if name in ROUTERS else METHODS.get(name, name)
    if settings:
        label += f", {settings.replace(',', ', ')}"
    return label


def runnable_methods(
    pool: Pool, methods: Iterable[str] | str, routing: Routing
) -> tuple[list[str], list[str]]:
    """(names of the methods to run, notes on those of "all" that were left out).

    Raises ConfigError for an unknown name or settings that a named one can't have, and PoolError if
    `pool` lacks what a named one needs.
    """
    methods = [methods] if isinstance(methods, str) else list(methods) or [""]
    named = [canonical(name) if name != BASE else name for name in methods if name != EVERY]
    for name in named:
        _check_method(name, pool, routing)
    notes = list[str]()
    if EVERY not in methods:
        return list(dict.fromkeys(named)), notes
    runnable = []
    for name, label in METHODS.items():
        if name != BASE and "examples" in ROUTERS[name].given:
            continue  # it needs a file of the task's, so it is run by name only
        try:
            _check_method(name, pool, routing)
            runnable.append(name)
        except (ConfigError, PoolError) as error:
            notes.append(f"{label} was left out: {error}")
    return list(dict.fromkeys([*runnable, *named])), notes


def _check_method(name: str, pool: Pool, routing: Routing) -> None:
    if name not in (BASE, *DERIVED):
        check_composable(pool, replace(routing, router=name))


@dataclass(frozen=True)
class Row:
    """One model of a comparison; `identity` differs from that of any other model.

    Experts of `pool`, by `routing`; else the model at `place`, or the base alone if that is None
    too. In another process the `place` of a pool is those of its experts.
    """

    name: str
    identity: Mapping[str, object]
    pool: Pool | None = None
    routing: Routing | None = None
    place: str | tuple[str, ...] | None = None

    def portable(self) -> Row:
        if not self.pool:
            return self
        places = tuple(record["path"] for record in self.pool.records())
        return replace(self, pool=None, place=places)

    def opened(self) -> Row:
        """The row with its pool, made of what is at the experts' places."""
        if self.pool is not None or not isinstance(self.place, tuple):
            return self
        return pool_row(self.name, Pool.open(self.place), self.routing)

    @contextmanager
    def model(self, base: Base) -> Iterator[Base]:
        """The row's model; afterwards the base is as it was."""
        opened = base
        if isinstance(self.place, str):
            dtype = dtype_name(base.model.dtype)
            opened = open_model(self.place, base, dtype=dtype, routing=self.routing)
        elif self.pool is not None:
            compose(self.pool, base, routing=self.routing)
        try:
            yield opened
        finally:
            if hasattr(opened.model, ROUTED):
                detach(opened.model)


def rows_of(pool: Pool, methods: Sequence[str], routing: Routing) -> list[Row]:
    """Rows of `methods` in the order of METHODS; those derived from single experts have none."""
    rows = []
    order = [BASE, *ROUTERS]
    for name in sorted(methods, key=lambda name: order.index(name.partition(":")[0])):
        if name == BASE:
            rows.append(Row(name, {"model": "base"}))
        elif name not in DERIVED:
            rows.append(pool_row(name, pool, replace(routing, router=name)))
    return rows


def single_rows(pool: Pool) -> list[Row]:
    """A row for each expert alone."""
    alone = Routing(router="single")
    return [pool_row(name, pool.select([name]), alone) for name in pool.names]


def reference_row(label: str, place: str | Path, routing: Routing, base: Base) -> Row:
    """A row for any other model: a routed model's folder, a pool or an expert of `base`, or a base.

    A pool is routed by phatgoose, not by auto: the paper's row is one of gates trained jointly, and
    a row's rule must not depend on what else the experts share or what this machine has.
    """
    if is_routed(place):
        check_base(base_of(place), base.reference, label)
        identity = {"routed": sha256_of(Path(place) / ROUTED_INFO)}  # holds the weights' hash too
        return Row(label, identity, routing=routing, place=absolute(place))
    if not is_pool(place):
        identity = {"model": load_base(place).fingerprint}
        return Row(label, identity, place=absolute(place))
    pool = Pool.open(place)
    check_base(pool.base, base.reference, label)
    if len(pool) == 1:
        return pool_row(label, pool, Routing(router="single"))
    _check_method("phatgoose", pool, routing)
    return pool_row(label, pool, replace(routing, router="phatgoose"))


def pool_row(name: str, pool: Pool, routing: Routing | None) -> Row:
    """A row of `pool` by `routing`; its identity is of what the router uses, not of names alone."""
    router = router_of(routing or Routing())
    identity: dict[str, object] = {"router": router.routing.router}
    if router.k:
        identity["k"] = router.k
    identity["kernel"] = router.kernel
    identity["pool"] = [_expert_digest(expert, router.used(pool)) for expert in pool.experts]
    return Row(name, identity, pool, routing)


def _expert_digest(expert: Expert, shared: Sequence[str]) -> str:
    """A hash of what a router uses of an expert: its adapter and its `shared` parts."""
    settings = sorted((site, module.settings) for site, module in expert.modules.items())
    digest = hashlib.sha256(f"{expert.info.adapter_sha256} {settings}".encode())
    if expert.info.acts_on is not None:
        digest.update(str(expert.info.acts_on).encode())
    for part in shared:
        tensors = {}
        if part == "embeddings" and expert.embeddings is not None:
            tensors[f"{expert.info.embedder} {expert.info.embedding_form}"] = expert.embeddings
        elif part in ("gates", "means", "prompt_statistics"):
            tensors = dict(getattr(expert, part))
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]


# Comparing them.


@dataclass(frozen=True)
class ComparisonSettings(ScoringSettings):
    """How methods are compared, and how each run is scored (`ScoringSettings`).

    Attributes:
        references: Further models by label: an expert (such as a multitask one), another pool (by
            router phatgoose, such as one of jointly trained experts), a routed model, a base.
        routing: Gives k (for every router, where it is not None), kernel and embedder.
        sources: Where the files of suites are; by default the Hub.
        engine: Where runs are scored; by default this process. Results are the same.
    """

    references: Mapping[str, str | Path] = field(default_factory=dict)
    routing: Routing = field(default_factory=Routing)
    sources: Sources = field(default_factory=Sources)
    engine: Engine = field(default_factory=Engine)


def compare(
    pool: Pool | str | Path,
    suites: Iterable[Source] | Source,
    methods: Iterable[str] | str = "all",
    *,
    out: str | Path,
    base: Base | str | None = None,
    **settings: Any,
) -> Comparison:
    """Scores of `methods` over `pool` on `suites`, with intervals and paired differences.

    Finished runs are kept in `out`/results.jsonl and reused. The tables are written to
    `out`/comparison.md and .json.

    Args:
        pool: Experts, as `Pool.open` takes them.
        suites: Names in `suites.registry.SUITES`, folders of task files, suite files, single task
            files, Tasks or `Suite`s.
        methods: Names in METHODS, with settings of their routers as in
            "arrow:form=peft". "all" stands for those whose needs the pool meets, with a note on the
            others. Oracle and best-individual run every single expert once.
        out: The folder of results and tables.
        base: A loaded base or its name; None loads the pool's own.
        settings: Those of `ComparisonSettings`, such as `references` or `limit`.

    Raises:
        ConfigError: A method is unknown.
        PoolError: The pool doesn't meet the needs of a method that was named.
        WrongBaseError: The experts are of another base.
        EvaluationError: Another process writes to `out`.
        PhatgooseError: What opening pools, suites and models and scoring them raise.
    """
    how = ComparisonSettings(**settings)
    pool = Pool.open(pool)
    columns, datasets = _load(suites, how)
    base = resolve_base(base, pool.base)
    pool = pool.measured(how.routing.reader)
    chosen, notes = runnable_methods(pool, methods, how.routing)
    others = []
    for label, place in how.references.items():
        others.append(reference_row(label, place, how.routing, base))
    rows = rows_of(pool, chosen, how.routing)
    labels = {row.name: label_of(row.name) for row in rows}
    labels |= {label: label for label in how.references}
    rows += others
    singles = []
    if not set(DERIVED).isdisjoint(chosen):
        singles = single_rows(pool)
    names = [row.name for row in (*others, *singles)]
    refuse_twice("rows", [*METHODS, *names], ConfigError)
    for note in notes:  # after what may be refused
        warnings.warn(note, stacklevel=2)
    models = (*rows, *singles)
    _report_inputs(base, models, datasets, how)
    with ResultStore.alone(Path(out) / RESULTS) as store:
        results = _run(models, datasets, base, store, how.engine)
    comparison = Comparison(
        suites=columns,
        labels=labels,
        results={row.name: results[row.name] for row in rows},
        experts={row.name: results[row.name] for row in singles},
        notes=tuple(notes),
        settings=_recorded(how, base, pool),
    )
    comparison = _with_derived(comparison, chosen, pool)
    write_tables(comparison, Path(out))
    return comparison


def _recorded(how: ComparisonSettings, base: Base, pool: Pool) -> dict[str, object]:
    """What a comparison tells of how it was made."""
    device = base.model.device
    machine = platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    scoring = {setting.name: getattr(how, setting.name) for setting in fields(ScoringSettings)}
    return {
        "base": asdict(base.reference),
        "dtype": dtype_name(base.model.dtype),
        "experts": list(pool.names),
        "k": how.routing.k,
        "kernel": how.routing.kernel,
        "code": code_version(),
        "machine": machine,
        **scoring,
        "formatting": asdict(how.formatting),
    }


@cache
def code_version(package: Path = PACKAGE) -> str:
    """The release, and a hash of the code that decides what a score is, without comments."""
    digest = hashlib.sha256()
    files = sorted((path.relative_to(package).parts[0], path) for path in package.rglob("*.py"))
    for room, path in files:
        if room not in OTHERS:
            digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
    digest.update((package / "routing" / "kernels" / "native.cpp").read_bytes())
    root = (package / "__init__.py").read_text(encoding="utf-8")  # it imports this module
    release = root.partition('__version__ = "')[2].partition('"')[0]
    return f"{release}+{digest.hexdigest()[:12]}"


def _load(
    suites: Iterable[Source] | Source, settings: ComparisonSettings
) -> tuple[dict[str, tuple[str, ...]], dict[str, EvaluationSet]]:
    """(datasets' names by suite, datasets by name)."""
    datasets: dict[str, EvaluationSet] = {}
    sources = [suites] if isinstance(suites, str | Path | Suite | Task) else suites
    opened = list(map(_suite, sources))
    refuse_twice("suites", (suite.name for suite in opened), ConfigError)
    tasks = list[Task]()
    for suite in opened:
        tasks += suite.load(settings.sources)
    for task in given_tasks(tasks):
        dataset = EvaluationSet.of(task, settings)
        if datasets.setdefault(task.name, dataset).digest != dataset.digest:
            raise TaskError(f"Two suites have different datasets called {task.name!r}.")
    return {suite.name: suite.names for suite in opened}, datasets


def _suite(source: Source) -> Suite:
    if isinstance(source, Task):
        return Suite.of(source.name, [source])
    return source if isinstance(source, Suite) else open_suite(source)


def _report_inputs(
    base: Base,
    rows: Sequence[Row],
    datasets: Mapping[str, EvaluationSet],
    settings: ScoringSettings,
) -> None:
    """Log what is cut of the inputs; warn of experts trained on inputs of another form."""
    encoder = Encoder.of(base, settings.formatting)
    for name, dataset in datasets.items():
        Questions(dataset, encoder).cuts.report(name)
    experts: dict[Expert, None] = {}  # which are equal if they are one: rows share them
    for row in rows:
        if row.pool is not None:
            experts |= dict.fromkeys(row.pool.experts)
    records = Pool(tuple(experts)).records()
    examples = examples_of(datasets.values())
    warn_of_other_formatting(records, as_read(settings.formatting, examples))


def _run(
    rows: Sequence[Row],
    datasets: Mapping[str, EvaluationSet],
    base: Base,
    store: ResultStore,
    engine: Engine,
) -> dict[str, dict[str, TaskScore]]:
    """Every row's result on every dataset, computed by `engine` if the store has none."""
    runs = [run_of(row, dataset, base) for row in rows for dataset in datasets.values()]
    missing = {}  # by key: two rows may be one model
    for run in runs:
        if store.get(run.key) is None:
            missing[json.dumps(run.key, sort_keys=True)] = run
    finished = len(runs) - len(missing)
    workshop = RunWorkshop(base, {row.name: row for row in rows}, datasets)
    bar = tqdm(total=len(runs), initial=finished, desc="compare", unit="run", disable=None)
    # An error in this loop ends the engine's workers at once.
    with bar, closing(engine.run(workshop, list(missing.values()), bar)) as results:
        for number, (run, result) in enumerate(results, finished + 1):
            store.add(run.key, result)
            logger.info("[%d/%d] %s: %.3f", number, len(runs), run.name, result["score"])
    scores: dict[str, dict[str, TaskScore]] = {row.name: {} for row in rows}
    for run in runs:
        scores[run.row][run.dataset] = restored(store.get(run.key) or {})
    return scores


def _with_derived(comparison: Comparison, methods: Sequence[str], pool: Pool) -> Comparison:
    experts = comparison.expert_scores()
    results = dict(comparison.results)
    labels = dict(comparison.labels)
    choices = {}
    if "best-individual" in methods:
        best = best_expert(experts, pool.names)
        choices["best-individual"] = dict.fromkeys(experts[best], best)
    if "oracle" in methods:
        choices["oracle"] = best_expert_by_task(experts, pool.names)
    for name, chosen in choices.items():
        labels[name] = METHODS[name]
        results[name] = {task: comparison.experts[expert][task] for task, expert in chosen.items()}
    return replace(comparison, results=results, labels=labels, choices=choices)


@dataclass(frozen=True)
class Run:
    """The job of scoring one row on one dataset; `key` identifies its result in the store."""

    row: str
    dataset: str
    key: Mapping[str, object]
    size: int = 1

    @property
    def name(self) -> str:
        return f"{self.row} on {self.dataset}"

    def again(self) -> Run:
        return self


def run_of(row: Row, dataset: EvaluationSet, base: Base) -> Run:
    """The run of `row` on `dataset`; its key says all that its result depends on."""
    key = {
        "base": base.fingerprint,
        "dtype": number_format(base.model),
        "method": dict(row.identity),
        "task": dataset.name,
        "examples": dataset.digest,
        "code": code_version(),
    }
    return Run(row.name, dataset.name, key)


@dataclass(frozen=True)
class RunWorkshop:
    """Does runs with a base, from rows and datasets by name.

    One for another process has locations of base and experts.
    """

    base: Base | BaseLocation
    rows: Mapping[str, Row]
    datasets: Mapping[str, EvaluationSet]

    @contextmanager
    def open(self) -> Iterator[Callable[[Run], dict[str, Any]]]:
        """A function that does a run and returns its result as it is stored.

        Closing the context restores the base. Raises EvaluationError if code or experts aren't
        those of the run's key.
        """
        base = self.base.load() if isinstance(self.base, BaseLocation) else self.base
        with ExitStack() as composed:
            opened: dict[str, Base] = {}  # the last row's

            def result_of(run: Run) -> dict[str, Any]:
                dataset = self.datasets[run.dataset]
                if run.row not in opened:
                    opened.clear()
                    composed.close()
                    row = self.rows[run.row].opened()
                    if run_of(row, dataset, base).key != run.key:
                        raise EvaluationError(
                            f"{run.name}: this worker's phatgoose or experts aren't those that the "
                            f"comparison was begun with; all machines need the same, and adapters "
                            f"with prompts are measured on each: run 'phatgoose import' first."
                        )
                    opened[run.row] = composed.enter_context(row.model(base))
                routed = opened[run.row]
                encoder = Encoder.of(routed, dataset.formatting)
                return stored(score(routed.model, Questions(dataset, encoder)))

            yield result_of

    def portable(self) -> RunWorkshop:
        if isinstance(self.base, BaseLocation):
            return self
        rows = {name: row.portable() for name, row in self.rows.items()}
        return RunWorkshop(BaseLocation.of(self.base), rows, self.datasets)
