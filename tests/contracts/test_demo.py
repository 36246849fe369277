"""The demo's scores and choices are those frozen in demo.json, on a processor like the one there.

    make demo && make test-heavy

The folder is `demo`, or that of PHATGOOSE_DEMO. `PYTHONPATH=src:tests/support python
tests/contracts/test_demo.py` freezes it again. Training in bfloat16 rounds by the instructions at
hand, so another processor makes other experts. On the same kind a score may differ by two of a
task's 40 questions, a mean by 2.5 points, a weight by 0.02 and one choice in 50.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from paths import ROOT
from phatgoose.apps.demo import SKILLS, unseen_tasks
from phatgoose.base.loading import load_base
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach
from phatgoose.routing.recording import record
from phatgoose.tasks.encoding import Encoder

DEMO = Path(os.environ.get("PHATGOOSE_DEMO", ROOT / "demo"))
FROZEN = ROOT / "tests" / "contracts" / "demo.json"
ASKED = 10  # questions of each task whose choices are frozen
QUESTION = 1 / 40  # of a task's score


def scores_of(folder: Path) -> dict[str, dict[str, float]]:
    """The score of every method on every task."""
    scores: dict[str, dict[str, float]] = {}
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        kept = json.loads(line)
        method, task = kept["key"]["method"], kept["key"]["task"]
        name = method.get("router", method.get("model"))
        if name == "single":
            name = f"single {method['pool'][0]}"
        scores.setdefault(name, {})[task] = round(kept["result"]["score"], 4)
    # An expert is named by the order of the runs, since its hash changes with its bits.
    experts = [name for name in scores if name.startswith("single ")]
    return {
        f"expert {experts.index(name)}" if name in experts else name: found
        for name, found in scores.items()
    }


def demo_of(folder: Path) -> dict[str, Any]:
    """What is frozen of a demo's folder."""
    base = load_base("smollm2")
    pool = Pool.open([folder / "experts" / name for name in SKILLS])
    encoder = Encoder.of(base)
    prompts = [encoder.prompt(row.input) for task in unseen_tasks(ASKED) for row in task.test]
    model = compose(pool, base, router="discriminant:fallback=off")
    chooser = composition_of(model).chooser
    assert chooser is not None
    chosen = [chooser.choose([prompt]).experts[0, 0].item() for prompt in prompts]
    detach(model)
    model, weights = compose(pool, base, router="phatgoose"), []
    for prompt in prompts:
        with torch.inference_mode(), record(model) as recording:
            model(input_ids=torch.tensor([prompt]))
        means = torch.stack(list(recording.usage().values())).mean(dim=0)
        weights.append([round(each, 4) for each in means.tolist()])
    detach(model)
    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "scores": scores_of(folder),
        "discriminant": chosen,
        "phatgoose": weights,
    }


@pytest.mark.heavy
@pytest.mark.real
def test_the_demo_is_the_frozen_one():
    if not (DEMO / "routed").is_dir():
        pytest.skip(f"needs a finished demo in {DEMO} (make demo)")
    wanted = json.loads(FROZEN.read_text(encoding="utf-8"))
    here = torch.backends.cpu.get_cpu_capability()
    if here != wanted["processor"]:
        pytest.skip(f"frozen with {wanted['processor']}; this processor has {here}")
    got = demo_of(DEMO)
    assert got["scores"].keys() == wanted["scores"].keys()
    for name, scores in wanted["scores"].items():
        assert got["scores"][name] == pytest.approx(scores, abs=2 * QUESTION), name
        mean = sum(scores.values()) / len(scores)
        found = got["scores"][name].values()
        assert sum(found) / len(found) == pytest.approx(mean, abs=QUESTION), name
    pairs = zip(got["discriminant"], wanted["discriminant"], strict=True)
    assert sum(ours != theirs for ours, theirs in pairs) <= len(wanted["discriminant"]) // 50
    for ours, theirs in zip(got["phatgoose"], wanted["phatgoose"], strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(demo_of(DEMO)) + "\n", encoding="utf-8")
    sys.stdout.write(f"{FROZEN}\n")
