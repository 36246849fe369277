"""How experts and gates are trained, and how examples become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..errors import ConfigError
from .settings import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, RATIO, SEED, Settings, one_of

__all__ = ["EMBEDDING_FORMS", "TASK_FILES", "TRUNCATIONS", "Formatting", "GateTraining", "Training"]

TASK_FILES = (".csv", ".jsonl")
TRUNCATIONS = ("middle", "left", "right")
GATE_INPUTS = ("raw", "standardised")
EMBEDDING_FORMS = ("prompt", "paper")


@dataclass(frozen=True)
class Training(Settings):
    """How an expert is trained (paper section 4.1)."""

    steps: Annotated[int, "Optimiser steps.", AT_LEAST_1] = 1000
    batch_size: Annotated[int, "Sequences per optimiser step.", AT_LEAST_1] = 1024
    micro_batch_size: Annotated[int, "Sequences per forward pass, accumulated.", AT_LEAST_1] = 8
    learning_rate: Annotated[float, "AdamW learning rate.", POSITIVE] = 5e-3
    warmup_ratio: Annotated[
        float, "Share of the steps in which the learning rate rises.", RATIO
    ] = 0.06
    weight_decay: Annotated[float, "AdamW weight decay.", NOT_NEGATIVE] = 0.0
    max_grad_norm: Annotated[float, "Gradient clipping by global norm.", POSITIVE] = 1.0
    eval_every: Annotated[
        int,
        "Steps between validations; each saves a checkpoint, and the best one wins.",
        AT_LEAST_1,
    ] = 100
    eval_examples: Annotated[
        int, "Maximum validation examples to use, drawn by the seed.", AT_LEAST_1
    ] = 500
    seed: Annotated[int, "Seed of initialisation, data order and validation split.", SEED] = 0


@dataclass(frozen=True)
class GateTraining(Settings):
    """How the gates are trained (paper section 3), and which statistics other routers get.

    Batch size, warm-up, clipping, weight decay and seed are those of `Training` (paper section
    4.1).
    """

    joint: Annotated[
        bool,
        "Train gates together with the expert instead of after it (paper appendix A), for the "
        "expert's steps and at its learning rate.",
    ] = False
    gate_steps: Annotated[int, "Optimiser steps of gate training.", AT_LEAST_1] = 100
    gate_learning_rate: Annotated[
        float | None, "Learning rate of gate training; default: the expert's.", POSITIVE
    ] = None
    gate_inputs: Annotated[
        str,
        "What gates are trained on: activations raw (paper), or standardised by the base's mean "
        "and deviation over neutral text.",
        one_of(GATE_INPUTS),
    ] = "raw"
    statistics_examples: Annotated[
        int, "Training examples to measure for the statistics below.", AT_LEAST_1
    ] = 1000
    means: Annotated[bool, "Measure mean activations (for router average-activation)."] = True
    readings: Annotated[
        bool,
        "Measure how the base alone reads the prompts (for routers named after discriminants).",
    ] = True
    embeddings: Annotated[
        bool,
        "Embed training inputs (for routers joint-discriminant, retrieval, centroid and glider; "
        "needs the extra 'retrieval').",
    ] = False
    embedder: Annotated[str, "Sentence embedder: a Hub id or a local folder."] = (
        "sentence-transformers/all-MiniLM-L6-v2"
    )
    embedding_form: Annotated[
        str,
        "What is embedded: the prompt as the model reads it, or, for router retrieval as in the "
        "paper, the input behind its answer choices (paper).",
        one_of(EMBEDDING_FORMS),
    ] = "prompt"

    def __post_init__(self) -> None:
        """Raise ConfigError as all settings do, and for what joint gates can't have."""
        super().__post_init__()
        if self.joint and self.gate_learning_rate is not None:
            raise ConfigError(
                f"gate_learning_rate is {self.gate_learning_rate:g}, but joint gates are trained "
                f"at the expert's; leave it out, or turn joint off."
            )
        if self.joint and self.gate_inputs != "raw":
            raise ConfigError(
                f"gate_inputs is {self.gate_inputs!r}, but joint gates see raw inputs; turn joint "
                f"off."
            )


@dataclass(frozen=True)
class Formatting(Settings):
    """How an example becomes tokens."""

    max_input_tokens: Annotated[
        int, "Maximum tokens of an input; longer ones are cut.", AT_LEAST_1
    ] = 512
    truncation: Annotated[
        str,
        "Which part of a long input to cut: middle (of the template's longest field if known, else "
        "of the input; keeps three times as much after the cut as before), left, or right (as in "
        "the paper).",
        one_of(TRUNCATIONS),
    ] = "middle"
    max_target_tokens: Annotated[
        int,
        "Maximum tokens of a target; longer ones are cut on the right, with a warning.",
        AT_LEAST_1,
    ] = 512
    chat: Annotated[bool, "Wrap inputs in the base model's chat template."] = False
