"""The demo: the whole story on small tasks of our own, on a laptop, in minutes.

It trains five experts with their gates, composes them, and compares the result with the base and
each single expert on five tasks that no expert was trained on. Each of those asks for the skill of
one training task in another domain and other words, so its score says whether routing carries a
skill over.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.text import Text
from tqdm.auto import tqdm

from ...analysis.analyse import analyse
from ...base.loading import Base, load_base
from ...config import GateTraining, Lora, Routing, Training
from ...evaluation.comparison.compare import compare
from ...evaluation.comparison.methods import BASE, METHODS, label_of
from ...evaluation.evaluate import evaluate
from ...experts.pool import Pool
from ...routing.compose import compose
from ...routing.routers.automatic import settled
from ...routing.routers.registry import AUTO
from ...routing.saved.save import save
from ...tasks.embeddings import can_embed
from ...training.progress import TrainingCallback
from ...training.train_expert import train_expert
from ..console.printing import show
from ..console.tables import datasets_table, routers_table
from ..generation import Sampling, generate, recorded_tokens
from ..report.page import write_report
from .gains import Gain, gains_of, lifts_of, write_gains
from .skills import SKILLS, trained_task, unseen_suite, unseen_tasks, without_choices

__all__ = ["run_demo"]

ROUTER = AUTO  # the demo's router; PHATGOOSE stands beside it in the table
BESIDE = (BASE, "merged", "retrieval", "phatgoose", "oracle")
COMMAND = "phatgoose"
THREADS = 2  # fixed, so that results are the same each time on one machine
LORA = Lora(rank=16, alpha=16.0)
TRAINING = Training(steps=24, batch_size=8, learning_rate=3e-3, eval_every=24, eval_examples=16)
GATES = GateTraining(gate_steps=12, gate_learning_rate=5e-3, statistics_examples=32)
EVALUATED = 40  # examples of each unseen task
READ = 8  # examples of each whose routing is analysed
ANSWER_TOKENS = 10  # of a written answer: the longest right one and its end
PROMPT = (
    '"Quinn here. Can you keep three places in the pottery class on Friday?" Make an entry of it '
    "in our format. Entry:"
)


def run_demo(base_name: str, out: Path, *, seed: int = 0, all_methods: bool = False) -> None:
    """Train, compare and route; write experts, tables, report and routed model to `out`.

    `seed` is that of the experts' training. The table has the base, each single expert, and a few
    routers, or with `all_methods` every one. Experts and scores that `out` already has are kept, so
    an interrupted demo continues where it stopped.
    """
    begun = time.monotonic()
    torch.set_num_threads(THREADS)
    show(_step("1. Base model", f" {base_name}"))
    base = load_base(base_name)
    show(_step(f"2. {len(SKILLS)} experts with gates", ", each trained on one task"))
    pool = _train_pool(base, out / "experts", seed)
    routing = settled(Routing(router=ROUTER), pool, base.model, base.tokenizer)
    unseen = unseen_tasks(EVALUATED)
    show(_step("3. On tasks that none of them has seen", f", {EVALUATED} examples each"))
    comparison = compare(
        pool,
        [unseen_suite(unseen)],
        "all" if all_methods else _shown(routing.router),
        base=base,
        out=out,
        max_new_tokens=ANSWER_TOKENS,
    )
    show(datasets_table(comparison, routing.router))
    gains, lifts = gains_of(comparison, routing.router), lifts_of(comparison, SKILLS)
    show(_verdict(routing.router, gains, lifts))
    model = compose(pool, base, routing=routing)
    asked = without_choices(unseen)
    scored = evaluate(model, asked, tokenizer=base.tokenizer, max_new_tokens=ANSWER_TOKENS).scores
    written = {score.task: 100 * score.score for score in scored}
    show(_written(written))
    write_gains(out / "gains.json", routing.router, gains, lifts, written)
    show(_step("4. A routed answer", ", each token in the colour of its top expert"))
    sampling = Sampling(ANSWER_TOKENS)
    routed = generate(model, base.tokenizer, PROMPT, sampling=sampling, record=True)
    show(recorded_tokens(routed, base.tokenizer))
    show(_step("5. Where the tokens of each unseen task went"))
    analysis = analyse(model, unseen, tokenizer=base.tokenizer, limit=READ, score=False)
    show(routers_table(analysis))
    report = write_report(analysis, out / "analysis")
    save(model, out / "routed", overwrite=True)
    show(_ending(out, report), wrap=False)
    show(f"Done in {time.monotonic() - begun:.0f} s.")


def _step(title: str, rest: str = "") -> Text:
    return Text.assemble((title, "bold"), rest)


def _shown(router: str) -> list[str]:
    """The methods of the table, in its order; Retrieval needs a sentence embedder."""
    wanted = {*BESIDE, router} - (set() if can_embed() else {"retrieval"})
    return [name for name in METHODS if name in wanted]


def _train_pool(base: Base, folder: Path, seed: int) -> Pool:
    """The experts of SKILLS, those that `folder` lacks trained behind one progress bar."""
    training, gates = replace(TRAINING, seed=seed), replace(GATES, embeddings=can_embed())
    missing = [name for name in SKILLS if not (folder / name).is_dir()]
    steps = len(missing) * (training.steps + gates.gate_steps)
    with tqdm(total=steps, desc="experts", unit="step", disable=None) as bar:
        for name in SKILLS:
            bar.set_postfix_str(name)
            train_expert(
                base,
                trained_task(name),
                out=folder / name,
                peft=LORA,
                training=training,
                gate_training=gates,
                resume=True,
                callback=TrainingCallback(on_steps=bar.update, shows_bar=False),
            )
    return Pool.open([folder / name for name in SKILLS])


def _verdict(router: str, gains: list[Gain], lifts: dict[str, float]) -> str:
    """What the table says: each skill's lift, and the routed model against all others."""
    lifted = ", ".join(f"{name} {lift:+.0f}" for name, lift in lifts.items())
    return "\n".join(
        [
            f"Each expert's points above the base on the unseen task of its skill:\n  {lifted}",
            f"{label_of(router)}, the demo's router: points of its mean, 95 % interval in pairs:",
            *(f"  {gain.in_words}" for gain in gains),
        ]
    )


def _written(scores: dict[str, float]) -> str:
    """What the routed model scores where it isn't given choices to rank."""
    each = ", ".join(f"{task} {score:.0f}" for task, score in scores.items())
    mean = sum(scores.values()) / len(scores)
    return (
        f"The same questions without choices to rank, answered in writing as `serve` answers them "
        f"(per cent exact):\n  {each}; mean {mean:.1f}"
    )


def _ending(out: Path, report: Path) -> str:
    """Where the results are, and three commands to go on with."""
    installed = Path(sys.executable).with_name(COMMAND)
    program = COMMAND if shutil.which(COMMAND) else installed
    return (
        f"Report -> {report}   tables -> {out / 'comparison.md'}\n"
        "Three commands to try next:\n"
        f"  {program} generate {out / 'routed'} 'The home of Tamsin:' --show-experts\n"
        f"  {program} demo --out {out} --all-methods\n"
        f"  {program} train your-task.jsonl --recipe recipes/laptop.toml --out {out / 'experts'}"
    )
