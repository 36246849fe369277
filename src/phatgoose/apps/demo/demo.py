"""The demo: the whole story on small tasks of our own, on a laptop, in minutes.

It trains five experts with their gates, composes them, and compares the result with the base, each
single expert and every other router on five tasks that no expert was trained on. Each of those asks
for the skill of one training task in another domain, with other prompts and other answer words, so
its score says whether routing carries a skill over. The texts in `tasks/` are original.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.text import Text

from ...analysis.analyse import analyse
from ...base.loading import Base, load_base
from ...config import GateTraining, Lora, Training
from ...evaluation.comparison.compare import compare
from ...experts.pool import Pool
from ...routing.compose import compose
from ...routing.saved.save import save
from ...tasks.embeddings import can_embed
from ...tasks.loading import load_task
from ...tasks.suites.entries import Entry, Suite
from ...tasks.task import Task
from ...training.train_expert import train_expert
from ..console.printing import show
from ..console.tables import datasets_table, routers_table
from ..generation import Sampling, generate, recorded_tokens
from ..report.page import write_report

__all__ = ["run_demo"]

TASKS = Path(__file__).parent / "tasks"
TRAINED = ("sentiment", "entailment", "arithmetic", "ordering", "category")
UNSEEN = ("hotel_feedback", "true_or_false", "word_problems", "which_first", "odd_one_out")
SEED = 0
THREADS = 2  # fixed, so that results are the same each time on one machine
LORA = Lora(rank=16, alpha=16.0)
TRAINING = Training(
    steps=32, batch_size=8, learning_rate=2e-3, eval_every=32, eval_examples=16, seed=SEED
)
GATES = GateTraining(gate_steps=16, gate_learning_rate=5e-3, statistics_examples=32)
EVALUATED = 60  # examples of each unseen task
READ = 16  # examples of each whose routing is analysed
PROMPT = "Nina saw seven ducks and two herons. Is a heron a bird, a fruit or a tool? Answer:"


def run_demo(base_name: str, out: Path) -> None:
    """Train, compare and route; write experts, tables, report and routed model to `out`.

    Experts that `out` already has are kept, so an interrupted demo continues where it stopped.
    """
    begun = time.monotonic()
    torch.set_num_threads(THREADS)
    show(_step("1. Base model", f" {base_name}"))
    base = load_base(base_name)
    show(_step("2. Five experts with gates", ", each trained on one task"))
    pool = _train_pool(base, out / "experts")
    unseen = _unseen_tasks()
    show(_step("3. Every method on unseen tasks", f", {EVALUATED} examples each"))
    show(datasets_table(compare(pool, [_suite(unseen)], base=base, out=out)))
    show(_step("4. A routed answer", ", each token in the colour of its top expert"))
    model = compose(pool, base)
    routed = generate(model, base.tokenizer, PROMPT, sampling=Sampling(12), record=True)
    show(recorded_tokens(routed, base.tokenizer))
    show(_step("5. Where the tokens of each unseen task went"))
    analysis = analyse(model, unseen, tokenizer=base.tokenizer, limit=READ, score=False)
    show(routers_table(analysis))
    report = write_report(analysis, out / "analysis")
    save(model, out / "routed", overwrite=True)
    show(f"Report -> {report}   tables -> {out / 'comparison.md'}")
    show(f"Routed model -> {out / 'routed'} (try: phatgoose generate {out / 'routed'} …)")
    show(f"Done in {time.monotonic() - begun:.0f} s.")


def _step(title: str, rest: str = "") -> Text:
    return Text.assemble((title, "bold"), rest)


def _train_pool(base: Base, folder: Path) -> Pool:
    gates = replace(GATES, embeddings=can_embed())
    for name in TRAINED:
        expert = train_expert(
            base,
            load_task(TASKS / f"{name}.csv"),
            out=folder / name,
            peft=LORA,
            training=TRAINING,
            gate_training=gates,
            resume=True,
        )
        loss = expert.info.metrics["expert_validation_loss"]
        show(f"   {name}: validation loss {loss:.3f}")
    return Pool.open([folder / name for name in TRAINED])


def _unseen_tasks() -> list[Task]:
    tasks = (load_task(TASKS / f"{name}.csv") for name in UNSEEN)
    return [replace(task, test=task.test[:EVALUATED]) for task in tasks]


def _suite(tasks: list[Task]) -> Suite:
    def entry(task: Task) -> Entry:
        return Entry(task.name, lambda _: task)

    return Suite("unseen", tuple(map(entry, tasks)))
