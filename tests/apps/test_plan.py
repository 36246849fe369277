"""Plans: the paper's numbers, tiny ones counted by hand, and nothing fetched from anywhere."""

import shutil
from dataclasses import replace

import pytest

from command_line import open_row, refused, review, snapshot, write_rows
from phatgoose.apps.plan import plan_of
from phatgoose.base.loading import load_base
from phatgoose.config import Formatting, GateTraining, Lora, Training
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training.train_expert import placed_sites
from phatgoose.training.trainer import Hyperparameters
from training_runs import SHAPES, each_shape

TRAINING = Training(steps=5, batch_size=4, micro_batch_size=2, eval_every=2)
GATES = GateTraining(gate_steps=3, statistics_examples=6)
SETTINGS = Hyperparameters(Lora(rank=2), TRAINING, GATES)


@pytest.fixture(autouse=True)
def here(tmp_path, base_folders, monkeypatch):
    """The current folder: a tiny base, and files to plan a training on; no network."""
    write_rows(tmp_path / "counting.jsonl", [open_row(i) for i in range(20)])
    write_rows(tmp_path / "reviews.jsonl", [review(i) for i in range(30)])
    shutil.copytree(base_folders["llama"], tmp_path / "tiny-base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda _, place: pytest.fail(f"asks {place}"))
    return tmp_path


def test_a_plan_counts_what_training_will_do(kind, base_folders):
    folder = str(base_folders[kind])
    plan = plan_of(folder, SETTINGS, open_tasks(["counting.jsonl"]))
    base, data = load_base(folder, dtype="float32"), load_task("counting.jsonl")
    (task,) = plan.tasks
    lengths = [pair.length for pair in Encoder.of(base).pairs(data.with_validation(0).train)]
    # Eight batches of four; after steps 2, 4 and 5, two examples; then means and prompt statistics.
    trained, forward, length = 4 * (5 + 3), 3 * 2 + 2 * 6, sum(lengths) / len(lengths)
    assert (task.examples, task.is_bound, task.steps, task.gate_steps) == (18, False, 5, 3)
    assert task.tokens == round((trained + forward) * length)
    joint, cut = GateTraining(joint=True), Formatting(4, max_target_tokens=1)
    short = replace(SETTINGS, gate_training=joint, formatting=cut)
    (task,) = plan_of(folder, short, open_tasks(["counting.jsonl"])).tasks
    assert (task.gate_steps, task.tokens) == (0, (4 * 5 + 3 * 2 + 2 * 18) * 5)


@each_shape
def test_a_plan_counts_the_parameters_of_each_kind(base_folders, shape):
    place, settings = str(base_folders["llama"]), Hyperparameters(SHAPES[shape])
    plan = plan_of(place, settings, open_tasks(["reviews.jsonl"]))
    sites = placed_sites(load_base(place, dtype="float32").model, SHAPES[shape])
    counts = {
        "ia3": 2 * (32 + 32 + 48),
        "houlsby": 4 * (2 * 5 * 32 + 5 + 32),
        "pfeiffer": 2 * (2 * 3 * 32 + 3 + 32),
        "dora": sum(2 * (s.in_features + s.out_features) + s.out_features for s in sites.values()),
    }
    assert (plan.sites, plan.expert_parameters) == (len(sites), counts[shape])


def test_without_the_bases_tokenizer_the_plan_is_an_upper_bound(here):
    folder = here / "bare"
    folder.mkdir()
    shutil.copy(here / "tiny-base" / "config.json", folder)  # weights aren't needed either
    (task,) = plan_of(str(folder), SETTINGS, open_tasks(["counting.jsonl"])).tasks
    assert (task.is_bound, task.examples) == (True, 18)


def test_the_command_prints_a_plan_and_writes_nothing_else(here, phat):
    before = snapshot(here)
    flags = ["--steps", 10, "--batch-size", 4, "--dtype", "float32"]
    tasks = ["counting.jsonl", "reviews.jsonl", "t0hi/trec", "hub:a/b"]
    outcome = phat("train", *tasks, "--base", "tiny-base", *flags, "--plan")
    assert (outcome.code, outcome.err) == (0, "")
    assert snapshot(here) == before
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in outcome.out.splitlines()
        if line.startswith("│")
    }
    assert list(rows) == ["counting", "reviews", "trec", "a--b", "total"]
    assert rows["counting"][:3] == ["counting.jsonl", "18", "10 + 100"]
    assert rows["trec"][:2] == ["CogComp/trec, prompts of P3", "5,452"]
    assert rows["a--b"][:2] == ["hub:a/b", ""]
    assert rows["a--b"][3].startswith("≤")
    assert rows["total"][0] == "4 tasks"
    assert "≤: data or tokenizer aren't here" in outcome.out


def test_finished_experts_are_left_out_when_resumed(here, phat):
    (here / "experts" / "counting").mkdir(parents=True)
    arguments = ["train", "counting.jsonl", "reviews.jsonl", "--base", "tiny-base", "--plan"]
    refused(phat(*arguments), "experts/counting exists already")
    outcome = phat(*arguments, "--resume")
    assert "1 experts to train" in outcome.out
    assert "1 experts are finished" in outcome.out
