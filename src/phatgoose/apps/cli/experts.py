"""Commands of contributors: train, gate, stats, check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...config import TASK_FILES, Formatting, GateTraining, Peft, Training
from ...errors import ConfigError, ExpertError
from ...experts import kinds
from ...files import one_line, require_free, write_text
from ...names import SMOLLM2, check_name, require_folder
from ...tasks.task import Sources, refuse_twice
from ..console import complain, report, say
from . import options

if TYPE_CHECKING:
    from ...experts.expert import Expert, ExpertInfo


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
    multitask: Annotated[str | None, "Train one expert of this name on all tasks at once."] = None,
    mixture_most: Annotated[
        int | None, typer.Option(help="With --multitask: most training examples of a task.", min=1)
    ] = None,
    base: options.BaseOptions,
    template: options.TemplateOptions,
    sources: Sources,
    resume: options.Resume = False,
    engine: options.EngineOptions,
    plan: Annotated[bool, "Train nothing and download nothing: print steps and tokens."] = False,
    json: options.JsonOption = None,
    shape: Peft,
    training: Training,
    gates: GateTraining,
    formatting: Formatting,
) -> None:
    """Train experts: adapter, gates and statistics for each task."""
    if not tasks:
        raise ConfigError("No task was given: name task files or a recipe that lists some.")
    options.only_with("with --multitask", multitask is not None, {"mixture_most": mixture_most})
    from ...tasks.suites.registry import mixture, open_tasks

    opened = open_tasks(tasks, sources, **vars(template))
    if multitask is not None:
        opened = [mixture(opened, multitask, most=mixture_most, seed=training.seed)]
    refuse_twice("tasks", (task.name for task in opened))
    for task in opened:
        check_name(task.name)
        if not resume:
            require_free(out / task.name, ExpertError, f"{options.ANOTHER_OUT}, or --resume")
    missing = [task for task in opened if not (out / task.name).exists()]
    name = base.base or SMOLLM2
    if not plan:
        options.require_there(base.base)
        for task in missing:
            if task.origin == "file":  # mistakes in the user's own files
                task.load().with_validation(training.seed)
    from ...training.pool_jobs import ExpertJob, train_experts
    from ...training.trainer import Hyperparameters

    settings = Hyperparameters(shape, training, gates, formatting)
    if plan:
        from ..plan import plan_of, print_plan

        print_plan(plan_of(name, settings, missing), json, len(opened) - len(missing))
        return
    jobs = [ExpertJob(task, settings, resume) for task in opened]
    reported = list[dict[str, object]]()
    new = {task.name for task in missing}
    with engine.open() as chosen:
        for expert in train_experts(name, jobs, out=out, dtype=base.dtype, engine=chosen):
            record = {
                "name": expert.name,
                "folder": str(out / expert.name),
                "base": expert.base.id,
                "trained_now": expert.name in new,
                "metrics": dict(expert.metrics),
            }
            reported.append(record)
            line = f"[{len(reported)}/{len(jobs)}] {_summary(expert)} -> {out / expert.name}"
            say(line, err=str(json) == "-")
    report(json, {"base": name, "experts": reported}, "report")


def _summary(expert: ExpertInfo) -> str:
    metrics = expert.metrics
    loss = metrics.get("expert_validation_loss")
    speed = metrics.get("gate_tokens_per_second")
    if loss is None:  # an expert of `gate` or `import` is there already
        return f"{expert.name}: there already, and not trained here"
    gates = "trained jointly" if speed is None else f"{speed:.0f} tokens/s"
    line = (
        f"{expert.name}: validation loss {loss:.4f} at step {metrics['expert_best_step']}, "
        f"{metrics['expert_tokens_per_second']:.0f} tokens/s; gates: {gates}"
    )
    if metrics.get("inputs_cut"):
        line += f"; inputs cut: {metrics['inputs_cut']}"
    return line


def gate(
    *,
    adapter: Annotated[
        Path,
        typer.Argument(
            help="Folder of the adapter (LoRA, (IA)³, bottleneck), or an imported expert."
        ),
    ],
    task: Annotated[str, "The data it was trained on."],
    out: options.ExpertOut,
    base: options.BaseOptions,
    template: options.TemplateOptions,
    resume: options.Resume = False,
    training: Annotated[
        Training, "steps", "learning_rate", "eval_every", "eval_examples", "acts_on"
    ],
    gates: Annotated[GateTraining, "joint"],
    formatting: Formatting,
) -> None:
    """Train gates for an adapter or an imported expert, which is named after --out."""
    require_folder(adapter, ExpertError)
    options.require_there(base.base)
    examples = template.load(task)
    from ...experts.expert import base_named_in
    from ...training.train_expert import train_gates

    expert = train_gates(
        base.load(None if base.base else base_named_in(adapter)),
        adapter,
        examples,
        out=out,
        training=training,
        gate_training=gates,
        formatting=formatting,
        resume=resume,
    )
    say(f"{expert.name}: gates at {len(expert.gates)} sites -> {out}")


@dataclass(frozen=True)
class MeasuringOptions(options.BaseOptions):
    gain: Annotated[
        bool | None,
        "Score the expert and the base alone on solved rows of --task, and record the difference; "
        "default: if there are 20 rows or more, unless --no-means.",
    ] = None


def stats(
    *,
    expert: Annotated[Path, typer.Argument(help="The expert directory; it is rewritten.")],
    task: Annotated[str | None, "The data it was trained on."] = None,
    prompts: Annotated[
        list[str] | None,
        "Instead of --task: a prompt like those it is for, or a file of some (.txt, one a line; "
        ".jsonl, …); repeatable. Mean activations, which need targets, are not measured. `self`: "
        "32 prompts that the expert, trained on whole chats, writes itself. Prompts that aren't in "
        "a task's file are kept in prompts.txt, which push publishes.",
    ] = None,
    gates: Annotated[GateTraining, "joint", "gate_steps", "gate_learning_rate"],
    base: MeasuringOptions,
    template: options.TemplateOptions,
) -> None:
    """Compute statistics for an existing expert, of its task or a few example prompts.

    Rows to score are the task's test split, else those that training set apart, or of other data
    validation or all. Seed and formatting are those that the expert was trained with.
    """
    if bool(task) == bool(prompts):
        raise ConfigError("Give either the data (--task) or example prompts (--prompts).")
    options.only_with("with --task", bool(task), {**vars(template), "gain": base.gain})
    require_folder(expert, ExpertError)
    options.require_there(base.base)
    from ...tasks.loading import load_prompts
    from ...tasks.task import Task

    writes = prompts == ["self"]
    if task:
        examples = template.load(task)
    else:
        examples = Task("written") if writes else load_prompts(prompts or ())
    from ...evaluation.gain import FEWEST_ROWS, gain_over_base, solved_rows
    from ...experts.expert import LAYOUT, Expert
    from ...training.train_expert import measure, written_prompts

    loaded = Expert.load(expert)
    gain = base.gain
    if gain is None and task and gates.means:
        gain = len(solved_rows(loaded, examples)) >= FEWEST_ROWS
    needs_base = writes or gain or (bool(task) and gates.means)
    opened = base.load(loaded.info.base) if needs_base else None
    if writes and opened is not None:
        examples = written_prompts(loaded, opened)
        say(
            f"{loaded.name} wrote {len(examples.train)} prompts. They must read like real ones: an "
            "adapter trained on answers alone writes answers, whose statistics are worth nothing."
        )
        for example in examples.train[:3]:
            say(f"  {one_line(example.input, 100)}")
    if gain and opened is not None:
        loaded = loaded.with_statistics(gain=gain_over_base(loaded, opened, examples))
    measured = measure(loaded, opened, examples, gates)
    is_data = any(Path(place).suffix in TASK_FILES for place in prompts or ())
    if prompts and not writes and not is_data:  # data may be confidential, and push publishes these
        lines = (" ".join(example.input.split()) for example in examples.train)
        write_text(expert / LAYOUT.prompts, "\n".join(lines) + "\n", ExpertError)
    say(f"{_contents(measured)} -> {expert}")


def check(directories: Annotated[list[Path], typer.Argument(help="Expert directories.")]) -> int:
    """Verify expert directories and report errors.

    Hashes, names, shapes and finiteness are checked; the exit code is 1 when anything is wrong.
    """
    from ...experts.expert import Expert

    code = 0
    for directory in directories:
        try:
            say(f"ok  {directory}: {_contents(Expert.load(directory))}")
        except ExpertError as error:
            complain("error", str(error), "bold red")
            code = 1
    return code


def _contents(expert: Expert) -> str:
    parts = ("gates", "means", "prompt_statistics", "embeddings")
    answers = ", ".join(f"{part}: {'yes' if expert.has(part) else 'no'}" for part in parts)
    if expert.info.gain is not None:
        answers += f", gain over the base: {expert.info.gain}"
    tail = expert.info.tail
    if tail:
        answers += f", acts on the prompt's last {tail} tokens and the answer"
    return f"{expert.name}, {kinds()[expert.kind].label}, {len(expert.modules)} sites, {answers}"
