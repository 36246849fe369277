"""Settings of very short trainings."""

from __future__ import annotations

from phatgoose.config import GateTraining, Lora, Training

LORA = Lora(rank=2)
TRAINING = Training(steps=4, batch_size=4, micro_batch_size=4, eval_every=1)
GATES = GateTraining(gate_steps=2, statistics_examples=4)


SETTINGS = {
    "peft": Lora(rank=2),
    "training": Training(steps=20, batch_size=4, micro_batch_size=2, eval_every=10),
    "gate_training": GateTraining(gate_steps=5, statistics_examples=6),
}
