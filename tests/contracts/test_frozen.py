"""The frozen contract: tokens, choices, scores and losses of tiny models, to the last choice.

    PYTHONPATH=src:tests/support python tests/contracts/test_frozen.py    writes it again

Only a commit that says which numbers change, and why, may do that. Writing checks that no token and
no choice hangs on a near tie, which another processor would round otherwise.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

import phatgoose as pg
from mixed_experts import make_kind, mixed_pool_for
from paths import ROOT
from phatgoose.base.identity import Base
from phatgoose.base.loading import load_base
from phatgoose.config import IA3, Bottleneck, Dora, GateTraining, Lora, Peft, Training
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.likelihood import choice_log_likelihoods
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import detach
from phatgoose.routing.recording import record
from phatgoose.tasks.task import Example, Task
from phatgoose.training.train_expert import train_expert
from routed_models import compose_by
from tiny import logits_of, make_ids, make_model, make_tokenizer, write_expert
from topic_prompts import CHOOSING
from toy_embedders import use_toy_embedder

FROZEN = ROOT / "tests" / "contracts" / "frozen.json"
TOLERANCE = 2e-4  # of logits, losses and likelihoods, as a share of their size above 1
TOLERANCE_OF_WEIGHTS = 2e-5
NOISE = 1e-7  # relative, of weights: the last bit of float32
BASES = ("llama", "t5")
ROUTERS = (
    *("phatgoose", "phatgoose:temperature=0.5", "average-activation"),
    *("arrow", "arrow:form=peft"),
    *("retrieval", "centroid", "discriminant"),
    *("merged", "random", "single", "weights", "best-individual", "oracle"),
)
OTHER_POOLS = ("ia3", "bottleneck", "dora", "mixed")
OTHERS = ("phatgoose", "average-activation", "discriminant", "merged")
PROMPTS = ("plums or apples", "WHO? WHAT? WHERE?")
ANSWERING = ("phatgoose", "arrow", "merged", "discriminant", "retrieval")
READING_TOKENS = ("phatgoose", "arrow", "merged")
ANSWERS = make_ids(rows=3, tokens=5, seed=7).tolist()
SHAPES = {"lora": Lora(4), "dora": Dora(4), "ia3": IA3(), "bottleneck": Bottleneck(size=5)}
TRAINED = Task(
    "words",
    train=tuple(Example(f"say {word}:", word) for word in ("one", "two", "three", "four", "five")),
    validation=(Example("say six:", "six"),),
)


@dataclass(frozen=True)
class House:
    """Tiny bases by kind, and pools by base and kind of expert."""

    bases: dict[str, Base]
    pools: dict[tuple[str, str], Pool]


@contextmanager
def tiny_house(folder: Path) -> Iterator[House]:
    """A house whose experts are in `folder`, and a toy embedder while the context is open."""
    house = House({}, {})
    for kind in BASES:
        make_model(kind).save_pretrained(folder / kind)
        make_tokenizer(final_eos=kind == "t5").save_pretrained(folder / kind)
        base = house.bases[kind] = load_base(folder / kind, dtype="float32")
        loras = [write_expert(base, folder / f"{kind}-lora", f"e{z}", seed=z) for z in range(4)]
        house.pools[kind, "lora"] = Pool(tuple(loras))
        house.pools[kind, "mixed"] = mixed_pool_for(base, folder / f"{kind}-mixed")
        for name in ("ia3", "bottleneck", "dora"):
            place = folder / f"{kind}-{name}"
            experts = [make_kind(name, base, place, seed=seed) for seed in range(3)]
            house.pools[kind, name] = Pool(tuple(experts))
    with pytest.MonkeyPatch.context() as patch:
        use_toy_embedder(patch)
        yield house


def all_cases() -> Iterator[str]:
    """BASE/POOL/ROUTER, and BASE/training/KIND."""
    for base in BASES:
        yield from (f"{base}/lora/{router}" for router in ROUTERS)
        yield from (f"{base}/{pool}/{router}" for pool in OTHER_POOLS for router in OTHERS)
        yield from (f"{base}/training/{kind}" for kind in SHAPES)


CASES = tuple(all_cases())


def routed(model: PreTrainedModel, base: Base) -> dict[str, Any]:
    """Greedy tokens, who was chosen by every token at every site, and mean weights there."""
    greedy, seen = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        with torch.no_grad(), record(model) as recording:
            logits = logits_of(model, ids)
        seen += [torch.cat(passes, dim=1)[0] for passes in recording.weights.values()]
        made = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
        greedy.append(made[0 if base.is_encoder_decoder else ids.shape[1] :].tolist())
    return {
        "tokens": greedy,
        "logits": rounded(logits[0, -1, ::40]),
        "experts": ["".join(f"{bits(w):02x}" for w in each) for each in seen],
        "weights": [rounded(each.mean(dim=0)) for each in seen],
    }


def bits(weights: torch.Tensor) -> int:
    """The chosen experts of a token as the bits of a number."""
    return sum(1 << z for z, weight in enumerate(weights.tolist()) if weight)


def rounded(numbers: torch.Tensor) -> list[float]:
    return [float(f"{number:.6g}") for number in numbers.tolist()]


def answered(model: PreTrainedModel, base: Base) -> list[str]:
    """The answers of rank classification."""
    score = evaluate(model, CHOOSING, tokenizer=base.tokenizer).scores[0]
    return [each.answer for each in score.predictions]


def likelihoods(model: PreTrainedModel) -> list[float]:
    """Mean log-likelihoods per token of three answers to each of two prompts."""
    rows = [(prompt, ANSWERS) for prompt in make_ids(rows=2, tokens=6, seed=8).tolist()]
    by_row = dict(choice_log_likelihoods(model, rows, 0, budget=64))
    return [number for row in range(len(rows)) for number in by_row[row]]


class Losses(TrainerCallback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.found += [logs["loss"]] if "loss" in logs else []


def trained(base: Base, peft: Peft, out: Path) -> list[float]:
    """The losses of an expert's steps and of its gates'."""
    losses = Losses()
    train_expert(
        base,
        TRAINED,
        out=out,
        peft=peft,
        training=Training(steps=4, batch_size=4, learning_rate=5e-3),
        gate_training=GateTraining(gate_steps=3, readings=False),
        callbacks=[losses],
    )
    return losses.found


def found(house: House, case: str, folder: Path) -> Any:
    """What is frozen of a case; `folder` is for what it writes."""
    kind, pool, what = case.split("/", 2)
    base = house.bases[kind]
    if pool == "training":
        return trained(base, SHAPES[what], folder / case)
    model = compose_by(what, house.pools[kind, pool], base)
    result: dict[str, Any] = routed(model, base)
    if pool == "lora" and what in ANSWERING:
        result["answers"] = answered(model, base)
    if pool == "lora" and what in READING_TOKENS:
        result["likelihoods"] = likelihoods(model)
    detach(model)
    return result


def difference(got: Any, wanted: Any, place: str = "") -> str:
    """The first place where results differ, "" for none."""
    if isinstance(wanted, dict) and isinstance(got, dict) and got.keys() == wanted.keys():
        pairs = [(key, got[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, list) and isinstance(got, list) and len(got) == len(wanted):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(got, wanted, strict=True))]
    elif isinstance(wanted, float) and isinstance(got, float):
        most = TOLERANCE_OF_WEIGHTS if " weights" in place else TOLERANCE
        same = abs(got - wanted) <= most * max(1.0, abs(wanted))
        return "" if same else f"{place}: {got}, not {wanted}"
    else:
        return "" if got == wanted else f"{place}: {got!r:.200}, not {wanted!r:.200}"
    parts = (difference(*pair, f"{place} {key}") for key, *pair in pairs)
    return next(filter(None, parts), "")


def main() -> None:
    """Write FROZEN, unless a case changes with the last bits of the base's weights."""
    results: list[dict[str, Any]] = []
    for noise in (0.0, NOISE):
        with tempfile.TemporaryDirectory() as place, tiny_house(Path(place)) as house:
            for base in house.bases.values():
                for parameter in base.model.parameters():
                    parameter.data *= 1 + noise * torch.randn_like(parameter)
            results.append({case: found(house, case, Path(place)) for case in CASES})
    plain, noisy = results
    if changed := [
        where for case in CASES if (where := difference(noisy[case], plain[case], case))
    ]:
        sys.exit("Another processor may round this otherwise:\n" + "\n".join(changed))
    lines = (
        f"{json.dumps(case)}:{json.dumps(plain[case], separators=(',', ':'))}" for case in CASES
    )
    FROZEN.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


WANTED = json.loads(FROZEN.read_text(encoding="utf-8"))
GROUPS = sorted({case.rpartition("/")[0] for case in CASES})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("house")


@pytest.fixture(scope="module")
def house(place):
    with tiny_house(place) as made:
        yield made


def digest_of(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_every_case_is_frozen():
    assert set(WANTED) == set(CASES)


@pytest.mark.parametrize("group", GROUPS)
def test_numbers_are_the_frozen_ones(group, house, place):
    base = house.bases[group.partition("/")[0]].model
    before = digest_of(base)
    for case in (case for case in CASES if case.startswith(f"{group}/")):
        changed = difference(found(house, case, place), WANTED[case], case)
        assert not changed, changed
        assert digest_of(base) == before, f"after {case} the base isn't what it was, bit for bit"


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("router", ["phatgoose", "arrow", "merged", "discriminant", "retrieval"])
def test_a_saved_model_is_loaded_as_it_was(kind, router, house, tmp_path):
    base = house.bases[kind]
    model = compose_by(router, house.pools[kind, "lora"], base)
    wanted = routed(model, base)
    pg.save(model, tmp_path / "routed")
    detach(model)
    loaded = pg.load(tmp_path / "routed", dtype="float32")
    with torch.no_grad():
        assert routed(loaded, base) == wanted


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main()
