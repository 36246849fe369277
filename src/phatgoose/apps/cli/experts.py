"""Commands of contributors: train, gate, stats, check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...config import Formatting, GateTraining, Training
from ...errors import ConfigError, ExpertError
from ...experts import kinds
from ...files import require_free, write_text
from ..console import check_report, complain, report, say
from . import options

if TYPE_CHECKING:
    from ...experts.expert import Expert, ExpertInfo
    from ...tasks.suites.registry import TrainingTask


def train(
    *,
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            help="Task files (.jsonl, .json, .csv, .parquet), hub:DATASET, suites (t0hi, flan, a "
            ".toml file, a folder of task files) or one of a suite's datasets (t0hi/ag_news); "
            "default: the recipe's."
        ),
    ] = None,
    out: Annotated[Path, "Folder that receives the experts."] = Path("experts"),
    peft: Annotated[str | None, f"Kind of expert: {options.KINDS} (default: lora)."] = None,
    multitask: Annotated[str | None, "Train one expert of this name on all tasks at once."] = None,
    mixture_most: Annotated[
        int | None, "With --multitask: maximum training examples drawn from each task."
    ] = None,
    base: options.BaseOptions,
    template: options.TemplateOptions,
    source: options.SourceOptions,
    unfinished: options.RestartOptions,
    engine: options.EngineOptions,
    plan: Annotated[
        bool,
        "Train nothing and download nothing: print steps, tokens and disk, and at a known speed "
        "one worker's time.",
    ] = False,
    tokens_per_second: Annotated[
        float | None, "With --plan: a worker's speed as training reports it.", {"min": 1e-3}
    ] = None,
    measure: Annotated[
        bool, "With --plan: train a few steps here to find a worker's speed and memory."
    ] = False,
    json: options.JsonOption = None,
    shapes: options.ExpertShapes,
    training: Training,
    gates: GateTraining,
    formatting: Formatting,
    given: frozenset[str],
) -> None:
    """Train experts: adapter, gates and statistics for each task."""
    if not tasks:
        raise ConfigError("No task was given: name task files or a recipe that lists some.")
    options.only_with("--multitask NAME", multitask is not None, {"mixture_most": mixture_most})
    shape = shapes.of(peft or "lora")
    given_speed = {"tokens_per_second": tokens_per_second, "measure": measure or None}
    options.only_with("--plan", plan, given_speed)
    engine.check()
    check_report(json, ConfigError)
    from ...tasks.suites.registry import mixture, open_tasks
    from ...training.pool_jobs import ExpertJob, train_experts
    from ...training.trainer import Hyperparameters

    opened = open_tasks(tasks, source.sources, **vars(template))
    if multitask is not None:
        opened = [mixture(opened, multitask, most=mixture_most, seed=training.seed)]
    if "micro_batch_size" in given:  # wins over those that suites name for their datasets
        opened = [task.without_micro_batch() for task in opened]
    _refuse_taken_names(opened, out, resume=unfinished.resume)
    missing = [task for task in opened if not (out / task.name).exists()]
    name = base.base or options.EMBEDDED
    settings = Hyperparameters(shape, training, gates, formatting)
    if plan:
        from ..plan import Speed, measured, plan_of, print_plan

        speed = None if tokens_per_second is None else Speed(tokens_per_second)
        speed = measured(name, base.dtype, settings, missing) if measure else speed
        planned = plan_of(name, base.dtype, settings, missing, speed)
        print_plan(planned, json, len(opened) - len(missing))
        return
    _read_files(missing, training.seed)
    own_settings = {
        task.name: replace(settings, training=task.settings(training)) for task in opened
    }
    jobs = [ExpertJob(task, own_settings[task.name], **vars(unfinished)) for task in opened]
    own: dict[str, Any] = {"base": name, "dtype": base.dtype, "peft": peft or "lora"}
    own |= {"multitask": multitask, "mixture_most": mixture_most, **vars(source)}

    reported: list[dict[str, Any]] = []
    new = {task.name: task for task in missing}
    with engine.open() as chosen:
        for expert in train_experts(name, jobs, out=out, dtype=base.dtype, engine=chosen):
            task, place = new.get(expert.name), str(out / expert.name)
            reported.append(
                {
                    "name": expert.name,
                    "folder": place,
                    "base": expert.base.id,
                    "trained_now": task is not None,
                    "metrics": dict(expert.metrics),
                }
            )
            line = f"[{len(reported)}/{len(jobs)}] {_summary(expert)} -> {place}"
            say(line, err=str(json) == "-")
            if task is not None:
                used = {**own, "tasks": task.places}
                recipe = options.written_recipe(used, vars(own_settings[task.name]).values())
                write_text(Path(f"{place}.yaml"), recipe, ExpertError)
    report(json, {"base": name, "experts": reported}, "report", ConfigError)


def _read_files(tasks: list[TrainingTask], seed: int) -> None:
    """Raise TaskError for mistakes in the user's own files, before anything is trained."""
    for task in tasks:
        if task.origin == "file":
            task.load().with_validation(seed)


def _refuse_taken_names(tasks: list[TrainingTask], out: Path, *, resume: bool) -> None:
    from ...experts.expert import check_name

    named: dict[str, str] = {}
    for task in tasks:
        check_name(task.name)
        if task.name in named:
            raise ConfigError(
                f"Two tasks are named {task.name!r} ({named[task.name]} and {task.named}); experts "
                f"of one pool need own names."
            )
        named[task.name] = task.named
        if not resume:
            require_free(out / task.name, ExpertError, f"{options.ANOTHER_OUT}, or --resume")


def _summary(expert: ExpertInfo) -> str:
    from ...tasks.encoding import recorded_share

    metrics = expert.metrics
    loss, speed = metrics.get("expert_validation_loss"), metrics.get("gate_tokens_per_second")
    if loss is None:  # an expert of `gate` or `import` is there already
        return f"{expert.name}: there already, and not trained here"
    gates = "trained jointly" if speed is None else f"{speed:.0f} tokens/s"
    cut = f"; inputs cut: {recorded_share(metrics)}" if metrics.get("inputs_cut") else ""
    return (
        f"{expert.name}: validation loss {loss:.4f} at step {metrics['expert_best_step']}, "
        f"{metrics['expert_tokens_per_second']:.0f} tokens/s; gates: {gates}{cut}"
    )


def gate(
    *,
    adapter: Annotated[
        Path,
        typer.Argument(
            help="Folder of the adapter (LoRA, (IA)³, bottleneck), or an imported expert."
        ),
    ],
    task: options.TaskOption,
    out: options.ExpertOut,
    base: options.BaseOptions,
    template: options.TemplateOptions,
    name: options.ExpertName = None,
    unfinished: options.RestartOptions,
    training: Annotated[
        Training,
        options.Without(("steps", "learning_rate", "eval_every", "eval_examples", "acts_on")),
    ],
    gates: GateTraining,
    formatting: Formatting,
) -> None:
    """Train gates for an adapter or an imported expert."""
    if not unfinished.resume:
        require_free(out, ExpertError, f"{options.ANOTHER_OUT}, or --resume")
    from ...experts.expert import base_named_in
    from ...training.train_expert import train_gates

    loaded = template.load(task)
    expert = train_gates(
        base.load(None if base.base else base_named_in(adapter)),
        adapter,
        loaded,
        out=out,
        training=training,
        gate_training=gates,
        formatting=formatting,
        name=name,
        **vars(unfinished),
    )
    say(f"{expert.name}: gates at {len(expert.gates)} sites -> {out}")


def stats(
    *,
    expert: Annotated[Path, typer.Argument(help="The expert directory; it is rewritten.")],
    task: options.TaskOption,
    gates: Annotated[GateTraining, options.Without(("joint", "gate_steps", "gate_learning_rate"))],
    base: options.BaseOptions,
    template: options.TemplateOptions,
) -> None:
    """Compute statistics for an existing expert.

    Seed and formatting are those that the expert was trained with.
    """
    from ...experts.expert import Expert
    from ...training.train_expert import measure

    loaded, data = Expert.load(expert), template.load(task)
    measured = measure(loaded, base.load(loaded.info.base), data, gates)
    say(f"{_contents(measured)} -> {expert}")


def check(
    directories: Annotated[list[Path], typer.Argument(help="Expert directories.")],
    json: options.JsonOption = None,
) -> None:
    """Verify expert directories and report errors.

    Hashes, names, shapes and finiteness are checked; the exit code is 1 when anything is wrong. The
    settings that train writes beside an expert (NAME.yaml) may be among the names.
    """
    from ...experts.expert import LAYOUT, Expert, check_expert

    directories = [
        place
        for place in directories
        if place.suffix != ".yaml" or place.with_suffix("") not in directories
    ]
    problems = {directory: check_expert(directory) for directory in directories}
    listed = {str(directory): found for directory, found in problems.items()}
    alone = report(json, {"problems": listed}, "problems", ExpertError)
    for directory, found in problems.items():
        if found and not (directory / LAYOUT.info).is_file():
            raise ExpertError(found[0])  # not an expert at all
        if not found and not alone:
            say(f"ok  {directory}: {_contents(Expert.load(directory))}")
    wrong = [problem for found in problems.values() for problem in found]
    for problem in wrong:
        complain("error", problem, "bold red")
    if wrong:
        raise typer.Exit(1)


def _contents(expert: Expert) -> str:
    from ...tasks.encoding import recorded_share

    parts = ("gates", "means", "readings", "embeddings")
    answers = ", ".join(f"{part}: {'yes' if expert.has(part) else 'no'}" for part in parts)
    share = recorded_share(expert.info.metrics)
    answers += f", acts on {expert.acts_on}" if expert.acts_on else ""
    cut = f", inputs cut: {share}" if share is not None else ""
    return (
        f"{expert.name}, {kinds()[expert.kind].label}, {len(expert.modules)} sites, {answers}{cut}"
    )
