"""The demo: the whole story on five small tasks of our own, on a laptop, in minutes.

Five experts are trained with their gates, composed, and scored beside the base, each single expert
and the uniform merge on five tasks that none of them was trained on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from ..bases import Base, load_base
from ..config import GateTraining, Lora, Training
from ..errors import EvaluationError
from ..evaluation import Evaluation, evaluate
from ..pool import Pool
from ..recording import Recording
from ..routed import compose, detach, record
from ..storage import save
from ..tasks import Task, load_task
from ..training import train_expert
from ..work import write_text
from .demo_tasks import held_out_rows, training_rows
from .figures import usage_heat_map
from .generation import Sampling, answer, coloured

__all__ = ["run_demo"]

SEED = 0
THREADS = 2  # the same number everywhere, so that one machine gives the same numbers each time
LORA = Lora(rank=16, alpha=16.0)
TRAINING = Training(
    steps=32, batch_size=8, learning_rate=2e-3, eval_every=32, eval_examples=16, seed=SEED
)
GATES = GateTraining(gate_steps=16, gate_learning_rate=5e-3, statistics_examples=32)
EVALUATED = 60  # examples of each unseen task
PROMPT = "Nina saw seven ducks and two herons. Is a heron a bird, a fruit or a tool? Answer:"


def run_demo(base_name: str, out: Path) -> None:
    """Train, route, score and draw; leave experts, routed model, table and figure in `out`.

    Experts that `out` holds already are kept, so an interrupted demo goes on where it stopped.
    """
    begun = time.monotonic()
    torch.set_num_threads(THREADS)
    console = Console(highlight=False)
    console.print(f"[bold]1. Base model[/] {base_name}")
    base = load_base(base_name)
    console.print("[bold]2. Five experts with gates[/], each trained on one task")
    pool = _train_pool(base, out / "experts", console)
    unseen = _unseen_tasks()
    console.print(f"[bold]3. Scores on unseen tasks[/], {EVALUATED} examples each")
    results = _score_all(base, pool, unseen, console)
    _write_results(results, out / "scores.json")
    console.print(_table(results))
    console.print("[bold]4. A routed answer[/], each token in the colour of its top expert")
    model = compose(pool, base)
    routed = answer(model, base.tokenizer, PROMPT, sampling=Sampling(12), record=True)
    console.print(coloured(routed, base.tokenizer))
    console.print("[bold]5. Where the tokens of each unseen task went[/]")
    usage = {task.name: _usage(model, base, task) for task in unseen}
    usage_heat_map(usage, pool.names, out / "routing.png")
    save(model, out / "routed", overwrite=True)
    console.print(f"Heat map -> {out / 'routing.png'}   scores -> {out / 'scores.json'}")
    console.print(f"Routed model -> {out / 'routed'} (try: phatgoose generate {out / 'routed'} …)")
    console.print(f"Done in {time.monotonic() - begun:.0f} s.")


def _train_pool(base: Base, folder: Path, console: Console) -> Pool:
    names = []
    for name, rows in training_rows(SEED).items():
        expert = train_expert(
            base,
            load_task(rows, name=name),
            out=folder / name,
            lora=LORA,
            training=TRAINING,
            gate_training=GATES,
            resume=True,
        )
        loss = expert.info.metrics["expert_validation_loss"]
        console.print(f"   {name}: validation loss {loss:.3f}")
        names.append(folder / name)
    return Pool.open(names)


def _unseen_tasks() -> list[Task]:
    return [
        load_task([{**row, "split": "test"} for row in rows[:EVALUATED]], name=name)
        for name, rows in held_out_rows().items()
    ]


def _score_all(
    base: Base, pool: Pool, tasks: list[Task], console: Console
) -> dict[str, Evaluation]:
    """Every row of the table by its label."""
    console.print("   base")
    results = {"base": evaluate(base, tasks)}
    ways = {name: {"keep": [name], "k": 1} for name in pool.names}
    ways |= {"merged": {"router": "merged"}, "PHATGOOSE": {"router": "phatgoose", "k": 2}}
    for label, options in ways.items():
        console.print(f"   {label}")
        model = compose(pool, base, **options)  # type: ignore[arg-type]
        results[label] = evaluate(model, tasks)
        detach(model)
    return results


def _write_results(results: dict[str, Evaluation], path: Path) -> None:
    content = {label: result.to_dict() for label, result in results.items()}
    write_text(path, json.dumps(content, indent=2) + "\n", EvaluationError)


def _table(results: dict[str, Evaluation]) -> Table:
    """Accuracy in per cent with half the 95 % interval, a row per model."""
    first = next(iter(results.values()))
    table = Table(title="zero-shot accuracy, % (± half the 95 % interval)")
    table.add_column("model", no_wrap=True)
    for score in first.scores:
        table.add_column(score.task.replace("_", " "), justify="right")
    table.add_column("mean", justify="right")
    for label, result in results.items():
        cells = [
            f"{100 * score.score:.0f} ±{50 * (score.high - score.low):.0f}"
            for score in result.scores
        ]
        style = "bold" if label == "PHATGOOSE" else ""
        table.add_row(Text(label), *cells, f"{100 * result.mean:.1f}", style=style)
    return table


def _usage(model: PreTrainedModel, base: Base, task: Task) -> dict[str, torch.Tensor]:
    """Mean routing weights over the prompts of a task, by site."""
    recording: Recording
    with record(model) as recording, torch.inference_mode():
        for example in task.test[:16]:
            ids = base.tokenizer(example.input, return_tensors="pt").input_ids
            extra = {"decoder_input_ids": ids[:, :1]} if base.is_encoder_decoder else {}
            model(input_ids=ids.to(model.device), use_cache=False, **extra)
    return recording.usage()
