"""LoRA training speed, tokens per second: phatgoose beside PEFT, on the same data in one run.

    python benchmarks/training_speed.py [--rounds 3] [--target-words 2]

Three ways, interleaved, medians over rounds: `train_expert`; a plain PEFT loop with everything in
bfloat16 (`autocast_adapter_dtype=False`); the same loop with PEFT's defaults (adapters upcast).
SmolLM2-135M, rank 16 on all linears, batches of 8 rows of about 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import phatgoose as pg
from phatgoose.bases import Base, load_base
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.encoding import IGNORED, Encoder, pad_left
from phatgoose.tasks import Task

ROWS, STEPS, WORDS = 8, 6, 120
LORA = Lora(rank=16, alpha=16.0)
VOCABULARY = "the a green old ship tree rain went over under far home and then sang slowly".split()


def make_task(target_words: int) -> Task:
    """Random word rows, all of about the same length."""
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(generator.choices(VOCABULARY, k=count))

    rows = [
        {"input": words(WORDS - target_words), "target": words(target_words)}
        for _ in range(ROWS * 4)
    ]
    return pg.load_task([*rows, {**rows[0], "split": "validation"}], name="speed")


def phatgoose_speed(base: Base, task: Task) -> float:
    """What `train_expert` reports."""
    training = Training(steps=STEPS, batch_size=ROWS, micro_batch_size=ROWS, learning_rate=1e-3)
    gates = GateTraining(gate_steps=1, means=False)
    with tempfile.TemporaryDirectory() as folder:
        expert = pg.train_expert(
            base, task, out=Path(folder) / "e", lora=LORA, training=training, gate_training=gates
        )
    return float(expert.info.metrics["expert_tokens_per_second"])


def peft_speed(base: Base, task: Task, *, upcast: bool) -> float:
    """A plain training loop over a PEFT model."""
    encoder = Encoder.of(base)
    pairs = [encoder.pair(row.input, row.target) for row in task.train]
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base.model, config, autocast_adapter_dtype=upcast)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    seconds, tokens = 0.0, 0
    for step in range(STEPS):
        batch = [pairs[(step * ROWS + i) % len(pairs)] for i in range(ROWS)]
        rows = [pair.prompt + pair.target for pair in batch]
        labels = [[IGNORED] * len(pair.prompt) + pair.target for pair in batch]
        begun = time.perf_counter()
        loss = model(
            input_ids=pad_left(rows, base.tokenizer.pad_token_id),
            attention_mask=pad_left([[1] * len(row) for row in rows], 0),
            labels=pad_left(labels, IGNORED),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step:  # the first step warms up
            seconds += time.perf_counter() - begun
            tokens += sum(map(len, rows))
    model.unload()
    return tokens / seconds


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target-words", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    base, task = load_base("smollm2"), make_task(options.target_words)
    speeds: dict[str, list[float]] = {"phatgoose": [], "peft bf16": [], "peft default": []}
    for _ in range(options.rounds):
        speeds["phatgoose"].append(phatgoose_speed(base, task))
        speeds["peft bf16"].append(peft_speed(base, task, upcast=False))
        speeds["peft default"].append(peft_speed(base, task, upcast=True))
    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    ratios = {
        f"phatgoose / {name}": round(medians["phatgoose"] / medians[name], 2)
        for name in ("peft bf16", "peft default")
    }
    setting = {"threads": torch.get_num_threads(), "target_words": options.target_words}
    print(json.dumps({**setting, "tokens_per_second": medians, **ratios, "all": speeds}))


if __name__ == "__main__":
    main()
