"""Commands of contributors: train, gate, measure, check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from ...config import Formatting, GateTraining, Lora, Recipe, Training
from ...errors import ConfigError, ExpertError
from .flags import with_settings

if TYPE_CHECKING:
    from ...expert import Expert
    from ...tasks import Task

__all__ = ["BaseOption", "ChoicesOption", "DtypeOption", "TemplateOption", "register"]

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
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue unfinished work.")]
RestartOption = Annotated[bool, typer.Option("--restart", help="Throw unfinished work away.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder that receives the experts.")]


def register(app: typer.Typer) -> None:
    """Add the contributors' commands to `app`."""
    app.command("train", help="Train experts: LoRA, gates and statistics for each task.")(train)
    app.command("gate", help="Train gates for a PEFT LoRA adapter that exists already.")(gate)
    app.command("measure", help="Measure statistics for an expert that exists already.")(measure)
    app.command("check", help="Verify expert directories and name what is wrong.")(check)


@with_settings(Lora, Training, GateTraining, Formatting)
def train(
    *,
    tasks: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Task files (.jsonl, .csv) or hub:DATASET; default: the recipe's."),
    ] = None,
    out: OutOption = Path("experts"),
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
    resume: ResumeOption = False,
    restart: RestartOption = False,
    recipe: Recipe,
    lora: Lora,
    training: Training,
    gates: GateTraining,
    formatting: Formatting,
) -> None:
    """Train one expert per task, one after another, with the base loaded once."""
    sources = tasks or list(recipe.tasks)
    if not sources:
        raise ConfigError("No task was given: name task files or a recipe that lists some.")
    if mixture_most is not None and multitask is None:
        raise ConfigError("--mixture-most is for --multitask NAME, which was not given.")
    from ...bases import load_base
    from ...tasks import load_task, mix
    from ...training import train_expert

    loaded = [load_task(source, template=template, choices=choices) for source in sources]
    if multitask is not None:
        loaded = [mix(loaded, multitask, most=mixture_most, seed=training.seed)]
    _refuse_taken_names(loaded, out, resume=resume)
    model = load_base(base or recipe.base or "smollm2", dtype=dtype)
    console = Console()
    for number, task in enumerate(loaded, 1):
        expert = train_expert(
            model,
            task,
            out=out / task.name,
            name=task.name,
            lora=lora,
            training=training,
            gate_training=gates,
            formatting=formatting,
            resume=resume,
            restart=restart,
        )
        console.print(
            f"[{number}/{len(loaded)}] {_summary(expert)} -> {out / task.name}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _refuse_taken_names(tasks: list[Task], out: Path, *, resume: bool) -> None:
    """Raise unless each task can have its expert in a folder of its own below `out`."""
    from ...expert import check_name

    names = [task.name for task in tasks]
    for name in names:
        check_name(name)
        if names.count(name) > 1:
            raise ConfigError(f"Two tasks are named {name!r}; experts of one pool need own names.")
        if (out / name).exists() and not resume:
            raise ExpertError(f"{out / name} exists already; choose another --out, or --resume.")


def _summary(expert: Expert) -> str:
    """What training came to, on one line."""
    metrics = expert.info.metrics
    speed = metrics.get("gate_tokens_per_second")
    gates = "trained jointly" if speed is None else f"{speed:.0f} tokens/s"
    return (
        f"{expert.name}: validation loss {metrics['expert_validation_loss']:.4f} at step "
        f"{metrics['expert_best_step']}, {metrics['expert_tokens_per_second']:.0f} tokens/s; "
        f"gates: {gates}"
    )


@with_settings(Training, GateTraining, Formatting)
def gate(
    *,
    adapter: Annotated[Path, typer.Argument(help="Folder of the PEFT LoRA adapter.")],
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
    if out.exists():
        raise ExpertError(f"{out} exists already; choose another --out.")
    from ...adapters import read_adapter_config
    from ...bases import load_base
    from ...gates import train_gates
    from ...tasks import load_task

    loaded = load_task(task, template=template, choices=choices)
    named = read_adapter_config(adapter).get("base_model_name_or_path")
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
    Console().print(f"{expert.name}: gates at {len(expert.gates)} sites -> {out}", highlight=False)


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
    from ...bases import load_base
    from ...expert import Expert
    from ...statistics import measure as measure_expert
    from ...tasks import load_task

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
    typer.echo(f"{_contents(measured)} -> {expert}")


def check(
    directories: Annotated[list[Path], typer.Argument(help="Expert directories.")],
) -> None:
    """Verify hashes, names, shapes and finiteness of experts; exit 2 when anything is wrong."""
    from ...expert import Expert, check_expert

    problems = {directory: check_expert(directory) for directory in directories}
    for directory, found in problems.items():
        if not found:
            typer.echo(f"ok  {directory}: {_contents(Expert.load(directory))}")
    wrong = [problem for found in problems.values() for problem in found]
    for problem in wrong[:-1]:
        typer.echo(f"error: {problem}", err=True)
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
    return f"{expert.name}, {len(expert.lora)} sites, {answers}"
