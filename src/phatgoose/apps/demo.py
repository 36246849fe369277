"""The demo: the whole story on small tasks of our own, on a laptop, in minutes.

It trains five experts, composes them, and compares the result with the base and each single expert
on five tasks that no expert was trained on. Each asks for the skill of one training task in another
domain and other words, so its score says whether routing carries a skill over. How an answer is
called is a convention of ours that no base can know. All texts in `demo_tasks/` were written for
this demo.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from rich.text import Text

from ..analysis.analyse import analyse
from ..analysis.report import write_report
from ..base.identity import Base
from ..base.loading import load_base
from ..config import GateTraining, Lora, Routing, Training
from ..evaluation.compare import METHODS, compare, label_of
from ..evaluation.evaluate import evaluate
from ..evaluation.results import BASE, Comparison, means_of
from ..experts.expert import LAYOUT
from ..experts.pool import Pool
from ..routing.compose import compose, save
from ..routing.routers.auto import resolved
from ..routing.routers.registry import AUTO
from ..tasks.embeddings import can_embed
from ..tasks.loading import load_task
from ..tasks.task import Suite, Task
from ..training.train_expert import train_expert
from .console import show
from .generation import explain
from .tables import drawn, routers_table

TASKS = Path(__file__).parent / "demo_tasks"
SKILLS = {  # the training task, which names the expert: the unseen task
    "sentiment": "hotel_feedback",
    "archive": "evening_classes",
    "dates": "family_papers",
    "bookings": "course_places",
    "village": "village_post",
}


def unseen_tasks(most: int) -> list[Task]:
    """The tasks of the skills, each with at most `most` test rows."""
    tasks = (load_task(TASKS / f"{name}.csv") for name in SKILLS.values())
    return [replace(task, test=task.test[:most]) for task in tasks]


def verdict(comparison: Comparison, row: str, skills: dict[str, str]) -> str:
    """Each expert above the base on the unseen task of its skill, and the gains of `row`.

    Gains are differences of means over the datasets, over the base and each single expert, the
    smallest first.
    """
    base = comparison.results[BASE]
    experts = comparison.experts
    lifts = list[str]()
    for name, task in skills.items():
        lift = experts[name][task].score - base[task].score
        lifts.append(f"{name} {100 * lift:+.0f}")
    models = {BASE: base, **experts}
    means = means_of({**models, row: comparison.results[row]}, comparison.datasets)
    gains = {name: means.gain(row, name) for name in models}
    lines = ["Each expert's points above the base on the unseen task of its skill:"]
    lines.append(f"  {', '.join(lifts)}")
    lines.append(f"{label_of(row)}, the demo's router: points of its mean, 95 % interval in pairs:")
    for name in sorted(models, key=lambda name: (gains[name].value, name)):
        lines.append(f"  {gains[name].in_points} over {name}")
    return "\n".join(lines)


ROUTER = AUTO  # the demo's router; PHATGOOSE stands beside it in the table
BESIDE = (BASE, "merged", "retrieval", "phatgoose", "oracle")
COMMAND = "phatgoose"
# Sums are rounded differently by other numbers of threads.
THREADS = 2  # fixed, so that results are the same each time on one machine
LORA = Lora(rank=16, alpha=16.0)
TRAINING = Training(steps=24, batch_size=8, learning_rate=3e-3, eval_every=24, eval_examples=16)
GATES = GateTraining(gate_steps=12, gate_learning_rate=5e-3, statistics_examples=32)
EVALUATED = 40  # examples of each unseen task
READ = 8  # examples of each whose routing is analysed
PROPOSED = 3  # prompts that an expert brings, for the server's page
ANSWER_TOKENS = 10  # of a written answer: the longest right one and its end
PROMPT = (
    '"Quinn here. Can you keep three places in the pottery class on Friday?" Make an entry of it '
    "in our format. Entry:"
)


def run_demo(base_name: str, out: Path, *, all_methods: bool = False) -> None:
    """Train, compare and route; write experts, tables, report and routed model to `out`.

    What `out` already has is kept, so an interrupted demo continues where it stopped.
    """
    begun = time.monotonic()
    torch.set_num_threads(THREADS)
    show(_step("1. Base model", f" {base_name}"))
    base = load_base(base_name)
    show(_step(f"2. {len(SKILLS)} experts with gates", ", each trained on one task"))
    pool = _train_pool(base, out / "experts")
    routing = resolved(Routing(router=ROUTER), pool, base.tokenizer)
    unseen = unseen_tasks(EVALUATED)
    show(_step("3. On tasks that none of them has seen", f", {EVALUATED} examples each"))
    shown = {*BESIDE, routing.router} - (set() if can_embed() else {"retrieval"})
    comparison = compare(
        pool,
        [Suite.of("unseen", unseen)],
        "all" if all_methods else [name for name in METHODS if name in shown],
        base=base,
        out=out,
        max_new_tokens=ANSWER_TOKENS,
    )
    show(drawn(comparison.scores(routing.router)))
    show(verdict(comparison, routing.router, SKILLS))
    model = compose(pool, base, routing=routing)
    # The same rows, whose answers are written instead of ranked, unless they were written before.
    open_tasks = list[Task]()
    for task in unseen:
        if task.test[0].choices:
            rows = tuple(replace(row, choices=()) for row in task.test)
            open_tasks.append(replace(task, test=rows))
    now = evaluate(model, open_tasks, tokenizer=base.tokenizer, max_new_tokens=ANSWER_TOKENS).scores
    scored = [*comparison.results[routing.router].values(), *now]
    per_cent = {score.task: 100 * score.score for score in scored}
    listed = ", ".join(f"{name} {score:.0f}" for name, score in per_cent.items())
    show(
        f"The same questions without choices to rank, answered in writing as `serve` answers them "
        f"(per cent exact):\n  {listed}; mean {fmean(per_cent.values()):.1f}"
    )
    show(_step("4. A routed answer", ", each token in the colour of its top expert"))
    show(*explain(model, base.tokenizer, PROMPT, None, ANSWER_TOKENS).coloured())
    show(_step("5. Where the tokens of each unseen task went"))
    analysis = analyse(model, unseen, tokenizer=base.tokenizer, limit=READ, score=False)
    show(routers_table(analysis))
    report = write_report(analysis, out / "analysis")
    save(model, out / "routed", overwrite=True)
    program = COMMAND if shutil.which(COMMAND) else Path(sys.executable).with_name(COMMAND)
    ending = (
        f"Report -> {report}   tables -> {out / 'comparison.md'}\n"
        "Three commands to try next:\n"
        f"  {program} generate {out / 'routed'} 'The home of Tamsin:' --show-experts\n"
        f"  {program} demo --out {out} --all-methods\n"
        f"  {program} train your-task.jsonl --recipe recipes/laptop.toml --out {out / 'experts'}"
    )
    show(ending, wrap=False)
    show(f"Done in {time.monotonic() - begun:.0f} s.")


def _step(title: str, rest: str = "") -> Text:
    return Text.assemble((title, "bold"), rest)


def _train_pool(base: Base, folder: Path) -> Pool:
    gates = replace(GATES, embeddings=can_embed())
    for name, unseen in SKILLS.items():
        train_expert(
            base,
            load_task(TASKS / f"{name}.csv"),
            out=folder / name,
            peft=LORA,
            training=TRAINING,
            gate_training=gates,
            resume=True,
        )
        inputs = [row.input for row in load_task(TASKS / f"{unseen}.csv").test]
        lines = [f"{text}\n" for text in inputs if "\n" not in text]
        (folder / name / LAYOUT.prompts).write_text("".join(lines[:PROPOSED]), encoding="utf-8")
    return Pool.open([folder / name for name in SKILLS])
