"""Commands of contributors: train, gate, measure, check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ...config import IA3, KIND_NAMES, Bottleneck, Formatting, GateTraining, Lora, Peft, Training
from ...errors import ConfigError, ExpertError
from ...tasks.cuts import recorded_share
from ..console.printing import say
from .engines import AddressOption, CpusOption, EngineOption, GpusOption, WorkersOption, open_engine
from .flags import shape_of, with_settings
from .plan import (
    JsonOption,
    MeasureOption,
    PlanOption,
    TflopsOption,
    TokensPerSecondOption,
    refuse_without_plan,
    show_plan,
)
from .recipe import Recipe

if TYPE_CHECKING:
    from ...experts.expert import Expert
    from ...tasks.suites.training_tasks import TrainingTask
    from ...training.destination import ExpertFolder, TrainedExpert
    from ...training.planning.speed import Speed

__all__ = [
    "BaseOption",
    "ChoicesOption",
    "DataOption",
    "DtypeOption",
    "TemplateOption",
    "TemplatesOption",
    "register",
]

# typer reads annotations at run time, on Python 3.10 too: hence Optional instead of "| None".
BaseOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--base", help="Base model: a Hub id, a local folder, or smollm2 (embedded)."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
TemplateOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--template", help="jinja2 template 'input ||| target' over a row's fields."),
]
ChoicesOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--choices", help="jinja2 template of the answer choices, 'yes ||| no'."),
]
DataOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--data", help="Folder of copies of Hub datasets; default: the Hub itself."),
]
TemplatesOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--templates", help="Folder of promptsource templates, for P3 datasets."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue unfinished work.")]
RestartOption = Annotated[bool, typer.Option("--restart", help="Throw unfinished work away.")]
OutOption = Annotated[
    str, typer.Option("--out", help="Folder that receives the experts, or an fsspec URL of one.")
]


def register(app: typer.Typer) -> None:
    """Add the contributors' commands to `app`."""
    app.command("train", help="Train experts: adapter, gates and statistics for each task.")(train)
    app.command("gate", help="Train gates for an adapter or an imported expert.")(gate)
    app.command("measure", help="Measure statistics for an expert that exists already.")(measure)
    app.command("check", help="Verify expert directories and name what is wrong.")(check)


@with_settings(Lora, IA3, Bottleneck, Training, GateTraining, Formatting)
def train(
    *,
    tasks: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            help="Task files (.jsonl, .csv), hub:DATASET, suites (t0hi, flan, a .toml file, a "
            "folder of task files) or one of a suite's datasets (t0hi/ag_news); default: the "
            "recipe's."
        ),
    ] = None,
    out: OutOption = "experts",
    peft: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--peft", help="Kind of expert: lora (default), ia3 or bottleneck."),
    ] = None,
    multitask: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--multitask", help="Train one expert of this name on all tasks at once."),
    ] = None,
    mixture_most: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--mixture-most",
            help="With --multitask: draw at most so many training examples of each task.",
        ),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    template: TemplateOption = None,
    choices: ChoicesOption = None,
    data: DataOption = None,
    templates: TemplatesOption = None,
    resume: ResumeOption = False,
    restart: RestartOption = False,
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = None,
    plan: PlanOption = False,
    tflops: TflopsOption = None,
    tokens_per_second: TokensPerSecondOption = None,
    measure: MeasureOption = False,
    json: JsonOption = None,
    recipe: Recipe,
    given: frozenset[str],
    flagged: frozenset[str],
    lora: Lora,
    ia3: IA3,
    bottleneck: Bottleneck,
    training: Training,
    gates: GateTraining,
    formatting: Formatting,
) -> None:
    """Train one expert per task; in this process one after another, with the base loaded once."""
    sources = tasks or list(recipe.tasks)
    if not sources:
        raise ConfigError("No task was given: name task files or a recipe that lists some.")
    if mixture_most is not None and multitask is None:
        raise ConfigError("--mixture-most is for --multitask NAME, which was not given.")
    shapes: dict[str, Peft] = {"lora": lora, "ia3": ia3, "bottleneck": bottleneck}
    shape = shape_of(peft or recipe.peft or "lora", shapes, flagged)
    speeds = {"tflops": tflops, "tokens_per_second": tokens_per_second}
    if not plan:
        refuse_without_plan({**speeds, "measure": measure, "json": json})
    from ...tasks.multitask import mixture
    from ...tasks.suites.entries import Sources
    from ...tasks.suites.training_tasks import open_tasks
    from ...training.destination import expert_folder

    places = Sources(data or recipe.data, templates or recipe.templates)
    opened = open_tasks(sources, places, template=template, choices=choices)
    if multitask is not None:
        opened = [mixture(opened, multitask, most=mixture_most, seed=training.seed)]
    folder = expert_folder(out)
    _refuse_taken_names(opened, folder, resume=resume)
    unfinished = [task for task in opened if not folder.has(task.name)]
    name = base or recipe.base or "smollm2"
    settings: dict[str, Any] = {"peft": shape, "formatting": formatting, "dtype": dtype}
    if plan:
        from ...training.planning.plan import plan_training
        from ...training.planning.schedule import schedule

        settings |= {"training": training, "gate_training": gates}
        speed = _measured(name, unfinished, speeds, settings) if measure else None
        planned = plan_training(
            name,
            unfinished,
            **settings,
            tflops=tflops,
            tokens_per_second=tokens_per_second,
            speed=speed,
        )
        spread = schedule(planned, workers or 1, gpus_per_worker or 0.0)
        show_plan(planned, spread, finished=len(opened) - len(unfinished), path=json)
        return
    from ...training import processes
    from ...training.pool_jobs import ExpertJob, train_experts

    _read_own_files(unfinished, training.seed)
    jobs = [
        ExpertJob(task, _training_of(task, training, given), gates, resume, restart)
        for task in opened
    ]
    with open_engine(engine, address, workers, gpus_per_worker, cpus_per_worker) as chosen:
        trained = train_experts(name, jobs, out=out, engine=chosen, **settings)
        for number, expert in enumerate(trained, 1):
            if processes.is_first():
                say(f"[{number}/{len(jobs)}] {_summary(expert)} -> {expert.place}")


def _measured(
    base: str,
    tasks: list[TrainingTask],
    speeds: Mapping[str, float | None],
    settings: Mapping[str, Any],
) -> Speed:
    """The speed of training here, measured. Raises ConfigError when one was given as well."""
    from ...training.planning.speed import measure_speed

    for name, value in speeds.items():
        if value is not None:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} tells a speed, and --measure finds one: choose.")
    return measure_speed(base, tasks, **settings)


def _read_own_files(tasks: list[TrainingTask], seed: int) -> None:
    """Read the user's own task files once, so that what is wrong is told before any training."""
    for task in tasks:
        if task.origin == "file":
            task.load().with_validation(seed)


def _training_of(task: TrainingTask, training: Training, given: frozenset[str]) -> Training:
    """`training` with the micro-batch that the task's suite says, unless the user said one."""
    most = task.entry.micro_batch_size
    if most is None or "micro_batch_size" in given:
        return training
    return replace(training, micro_batch_size=most)


def _refuse_taken_names(tasks: list[TrainingTask], folder: ExpertFolder, *, resume: bool) -> None:
    """Raise unless each task can have its expert under its own name in `folder`."""
    from ...experts.expert_info import check_name

    named: dict[str, str] = {}
    for task in tasks:
        check_name(task.name)
        if task.name in named:
            raise ConfigError(
                f"Two tasks are named {task.name!r} ({named[task.name]} and {task.named}); experts "
                f"of one pool need own names."
            )
        named[task.name] = task.named
        if folder.has(task.name) and not resume:
            raise ExpertError(
                f"{folder.place(task.name)} exists already; choose another --out, or --resume."
            )


def _summary(expert: TrainedExpert) -> str:
    """What training came to, on one line."""
    metrics = expert.metrics
    speed = metrics.get("gate_tokens_per_second")
    gates = "trained jointly" if speed is None else f"{speed:.0f} tokens/s"
    cut = f"; inputs cut: {recorded_share(metrics)}" if metrics.get("inputs_cut") else ""
    return (
        f"{expert.name}: validation loss {metrics['expert_validation_loss']:.4f} at step "
        f"{metrics['expert_best_step']}, {metrics['expert_tokens_per_second']:.0f} tokens/s; "
        f"gates: {gates}{cut}"
    )


@with_settings(Training, GateTraining, Formatting)
def gate(
    *,
    adapter: Annotated[
        Path,
        typer.Argument(
            help="Folder of the adapter (LoRA, (IA)³, bottleneck), or an imported expert."
        ),
    ],
    task: Annotated[str, typer.Option("--task", help="The data it was trained on.")],
    out: Annotated[Path, typer.Option("--out", help="The expert directory to write.")],
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    template: TemplateOption = None,
    choices: ChoicesOption = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--name", help="The expert's name; default: the name of --out."),
    ] = None,
    resume: ResumeOption = False,
    restart: RestartOption = False,
    recipe: Recipe,
    training: Training,
    gates: GateTraining,
    formatting: Formatting,
) -> None:
    """Train gates for an existing adapter."""
    if out.exists() and not resume:
        raise ExpertError(f"{out} exists already; choose another --out, or --resume.")
    from ...base.loading import load_base
    from ...experts.expert import base_named_in
    from ...tasks.loading import load_task
    from ...training.gates import train_gates

    loaded = load_task(task, template=template, choices=choices)
    named = base_named_in(adapter)
    expert = train_gates(
        load_base(base or recipe.base or named or "smollm2", dtype=dtype),
        adapter,
        loaded,
        out=out,
        training=training,
        gate_training=gates,
        formatting=formatting,
        name=name,
        resume=resume,
        restart=restart,
    )
    say(f"{expert.name}: gates at {len(expert.gates)} sites -> {out}")


def measure(
    expert: Annotated[Path, typer.Argument(help="The expert directory; it is rewritten.")],
    task: Annotated[str, typer.Option("--task", help="The data it was trained on.")],
    means: Annotated[
        bool, typer.Option("--means/--no-means", help="Measure each site's mean activation.")
    ] = True,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings/--no-embeddings",
            help="Embed training inputs (needs the extra 'retrieval').",
        ),
    ] = True,
    statistics_examples: Annotated[
        int, typer.Option("--statistics-examples", help="Training examples measured.")
    ] = 1000,
    embedder: Annotated[
        str, typer.Option("--embedder", help="Sentence embedder: a Hub id or a local folder.")
    ] = GateTraining.embedder,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    template: TemplateOption = None,
    choices: ChoicesOption = None,
) -> None:
    """Measure statistics of an expert, with the seed and formatting it was trained with."""
    from ...base.loading import load_base
    from ...experts.expert import Expert
    from ...tasks.loading import load_task
    from ...training.router_statistics import measure as measure_expert

    loaded, data = Expert.load(expert), load_task(task, template=template, choices=choices)
    measured = measure_expert(
        loaded,
        load_base(base or loaded.info.base.id, dtype=dtype),
        data,
        examples=statistics_examples,
        means=means,
        embeddings=embeddings,
        embedder=embedder,
    )
    say(f"{_contents(measured)} -> {expert}")


def check(
    directories: Annotated[list[Path], typer.Argument(help="Expert directories.")],
) -> None:
    """Verify hashes, names, shapes and finiteness of experts; exit 2 when anything is wrong."""
    from ...experts.expert import Expert, check_expert

    problems = {directory: check_expert(directory) for directory in directories}
    for directory, found in problems.items():
        if not found:
            say(f"ok  {directory}: {_contents(Expert.load(directory))}")
    wrong = [problem for found in problems.values() for problem in found]
    for problem in wrong[:-1]:
        say(f"error: {problem}", err=True)
    if wrong:
        raise ExpertError(wrong[-1])


def _contents(expert: Expert) -> str:
    """What an expert has, on one line."""
    has = {
        "gates": bool(expert.gates),
        "means": bool(expert.means),
        "embeddings": expert.embeddings is not None,
    }
    answers = ", ".join(f"{part}: {'yes' if there else 'no'}" for part, there in has.items())
    share = recorded_share(expert.info.metrics)
    cut = f", inputs cut: {share}" if share is not None else ""
    return f"{expert.name}, {KIND_NAMES[expert.kind]}, {len(expert.modules)} sites, {answers}{cut}"
