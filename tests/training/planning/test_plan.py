"""Plans: the paper's numbers, tiny ones counted by hand, and nothing fetched from anywhere."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import socket
from pathlib import Path
from statistics import fmean

import pytest
from safetensors.torch import load_file

from command_line import open_row, refused, review, snapshot, write_rows
from phatgoose.apps.cli.plan import _duration, _size
from phatgoose.base.loading import load_base, load_skeleton
from phatgoose.config import Formatting, GateTraining, Lora, Training
from phatgoose.errors import BaseModelError, ConfigError, TaskError
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.training_tasks import open_tasks
from phatgoose.training.planning.plan import plan_training
from phatgoose.training.planning.sizes import KNOWN_BASES, Shapes
from phatgoose.training.train_expert import train_expert
from tiny import make_tokenizer

T5_XL = "google/t5-xl-lm-adapt"
PER_ROW = {"peft": Lora(rank=2), "training": Training(steps=5, batch_size=4, eval_every=2)}
GATES = GateTraining(gate_steps=3, statistics_examples=6)

pytestmark = pytest.mark.usefixtures("_frozen")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Any connection is a failure."""

    def connect(self, address):
        pytest.fail(f"a plan connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def here(tmp_path, base_folders, monkeypatch) -> Path:
    write_rows(tmp_path / "counting.jsonl", [open_row(i) for i in range(20)])
    write_rows(tmp_path / "reviews.jsonl", [review(i) for i in range(30)])
    write_rows(tmp_path / "single.jsonl", [open_row(0)])
    shutil.copytree(base_folders["llama"], tmp_path / "tiny-base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(plan):
    """Every number of a plan."""
    record = dataclasses.asdict(plan)
    yield from (plan.steps, plan.sequences, plan.tokens, plan.seconds, plan.disk_bytes)
    yield from (value for value in record.values() if isinstance(value, int | float))
    for task in record["tasks"]:
        yield from (value for value in task.values() if isinstance(value, int | float))


# --- the paper's pools ---


@pytest.mark.parametrize(("suite", "count"), [("t0hi", 36), ("flan", 166)])
def test_the_papers_pools_have_the_papers_numbers(suite, count):
    plan = plan_training(T5_XL, open_tasks([suite]), dtype="bfloat16")
    assert (plan.sites, plan.expert_parameters, plan.gate_parameters) == (
        432,
        35_389_440,
        1_032_192,
    )
    assert len(plan.tasks) == count
    assert plan.steps == count * 1100
    assert {task.trained for task in plan.tasks} == {1100 * 1024}
    assert {task.lengths for task in plan.tasks} == {"limits"}
    assert {task.place for task in plan.tasks} == {"hub"}
    assert {task.disk_bytes for task in plan.tasks} == {2 * 35_389_440 + 2 * 4 * 1_032_192}
    assert all(math.isfinite(number) and number >= 0 for number in everything(plan))
    notes = " ".join(plan.notes)
    assert f"For {count} of {count} tasks, the tokens of a sequence are taken as the 512" in notes
    assert ("published shapes" in notes) == Shapes.of(T5_XL, Lora()).from_table
    assert "100 TFLOP/s" in notes


def test_time_is_four_operations_for_each_parameter_that_a_token_passes():
    plan = plan_training(
        T5_XL,
        open_tasks(["t0hi/trec"]),
        training=Training(eval_examples=1, eval_every=1000),
        gate_training=GateTraining(means=False),
        formatting=Formatting(max_input_tokens=100, max_target_tokens=10),
        tflops=50,
    )
    attention, feed_forward = 4 * 2048 * 2048, 3 * 2048 * 5120
    encoder = 24 * (attention + feed_forward) + 24 * attention // 2  # and cross-attention's k, v
    decoder = 24 * (attention + feed_forward) + 24 * attention // 2 + 2048 * 32128
    operations = 100 * encoder + 10 * decoder
    wanted = (1100 * 1024 * 4 + 1 * 2) * operations / 50e12
    (task,) = plan.tasks
    assert task.seconds == pytest.approx(wanted)
    assert task.tokens == (1100 * 1024 + 1) * 110


def test_the_known_examples_of_a_suite_are_told_as_the_suites():
    plan = plan_training(T5_XL, open_tasks(["t0hi/trec", "flan/niv2_misc"]))
    assert [(task.examples, task.counted) for task in plan.tasks] == [(5452, False), (None, False)]


def test_the_table_of_known_bases_gives_what_their_configs_give():
    known = KNOWN_BASES["smollm2"]
    model = load_skeleton(known)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    shapes = Shapes.of("smollm2", Lora())  # from its config where the package is installed
    assert (shapes.sites, shapes.expert) == (210, 4_884_480)
    assert shapes.target - shapes.prompt == known.vocab_size * known.hidden_size
    if shapes.from_table:
        pytest.skip("smollm2 is not installed: there is only the table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phatgoose.base.loading.smollm2_folder", _nowhere)
        assert Shapes.of("smollm2", Lora()) == dataclasses.replace(shapes, from_table=True)


def _nowhere() -> Path:
    raise BaseModelError("not here")


# --- small ones ---


def test_a_plan_counts_what_training_will_do(here, kind, base_folders):
    folder = str(base_folders[kind])
    plan = plan_training(
        folder, open_tasks(["counting.jsonl"]), **PER_ROW, gate_training=GATES, dtype="float32"
    )
    (task,) = plan.tasks
    encode = make_tokenizer(final_eos=kind == "t5")
    lengths = [len(encode(f"Count {i}:")["input_ids"]) for i in range(20)]
    assert (task.examples, task.counted, task.lengths) == (18, True, "measured")
    assert (task.steps, task.gate_steps, task.trained) == (5, 3, 4 * (5 + 3))
    assert task.measured == 3 * 2 + 6  # after steps 2, 4 and 5, two examples; then statistics
    assert task.prompt_tokens == pytest.approx(fmean(lengths), 0.1)
    length = task.prompt_tokens + task.target_tokens
    assert task.tokens == round((task.trained + task.measured) * length)
    assert plan.base == folder
    assert not any("shapes" in note for note in plan.notes)
    base, data = load_base(folder, dtype="float32"), load_task("counting.jsonl")
    expert = train_expert(base, data, out="new/counting", **PER_ROW, gate_training=GATES)
    tensors = [
        tensor
        for file in expert.directory.glob("*.safetensors")
        for tensor in load_file(file).values()
    ]
    assert task.disk_bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert plan.sites == len(expert.lora)
    assert plan.gate_parameters == sum(gate.numel() for gate in expert.gates.values())
    assert expert.info.task["train_examples"] == task.examples


def test_checkpoints_are_as_large_as_planned(here, base_folders, monkeypatch):
    sizes = []
    real = shutil.rmtree

    def measure(folder, *arguments, **options):
        if Path(folder).name.startswith("checkpoint-"):
            files = ("trainable.safetensors", "optimizer.pt")
            sizes.append(sum((Path(folder) / name).stat().st_size for name in files))
        real(folder, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", measure)
    lora, training = Lora(rank=64), Training(steps=4, batch_size=2, eval_every=1)
    base, options = str(base_folders["llama"]), {"peft": lora, "training": training}
    plan = plan_training(base, open_tasks(["counting.jsonl"]), **options, dtype="float32")
    loaded = load_base(base, dtype="float32")
    train_expert(loaded, load_task("counting.jsonl"), out="new", **options, gate_training=GATES)
    adapter = 4 * plan.expert_parameters
    assert max(sizes) == pytest.approx((plan.working_bytes - adapter) / 3, rel=0.05)


def test_settings_change_the_plan_as_they_change_training(here):
    tasks = open_tasks(["counting.jsonl"])

    def planned(**options):
        return plan_training("tiny-base", tasks, dtype="float32", **PER_ROW, **options)

    plain, joint = planned(gate_training=GATES), planned(gate_training=GateTraining(joint=True))
    assert (joint.tasks[0].gate_steps, joint.tasks[0].trained) == (0, 20)
    assert joint.working_bytes == plain.working_bytes + 9 * 4 * plain.gate_parameters
    bare = planned(gate_training=dataclasses.replace(GATES, means=False))
    assert plain.tasks[0].disk_bytes - bare.tasks[0].disk_bytes == 4 * plain.gate_parameters
    assert plain.tasks[0].measured - bare.tasks[0].measured == 6
    kept = planned(gate_training=dataclasses.replace(GATES, embeddings=True))
    assert kept.tasks[0].disk_bytes - plain.tasks[0].disk_bytes == 4 * 384 * 6
    assert any("384 dimensions" in note for note in kept.notes)
    half = plan_training("tiny-base", tasks, dtype="bfloat16", **PER_ROW, gate_training=GATES)
    assert plain.tasks[0].disk_bytes - half.tasks[0].disk_bytes == 2 * plain.expert_parameters
    (row,) = planned(gate_training=GATES, tokens_per_second=100.0).tasks
    length = row.prompt_tokens + row.target_tokens
    assert row.seconds == pytest.approx((row.trained + row.measured / 2) * length / 100)
    short = planned(formatting=Formatting(max_input_tokens=4, max_target_tokens=1)).tasks[0]
    assert (short.prompt_tokens, short.target_tokens) == (4, 1)


def test_without_a_tokenizer_lengths_are_told_by_words(here):
    folder = here / "bare"
    folder.mkdir()
    shutil.copy(here / "tiny-base" / "config.json", folder)  # weights aren't needed either
    rows = [{"input": "one two three", "target": "four"} for _ in range(5)]
    tasks = open_tasks([str(write_rows(here / "words.jsonl", rows))])
    plan = plan_training(str(folder), tasks)
    (task,) = plan.tasks
    assert (task.prompt_tokens, task.target_tokens) == (pytest.approx(4.9), pytest.approx(2.3))
    assert task.lengths == "words"
    assert any("1.3 a word" in note for note in plan.notes)


def test_copies_are_counted_and_those_that_are_missing_are_told(here, hub_copies):
    plan = plan_training(
        "tiny-base", open_tasks(["t0hi/samsum", "t0hi/trec"], hub_copies), **PER_ROW
    )
    samsum, trec = plan.tasks
    assert (samsum.examples, samsum.counted, samsum.lengths) == (8, True, "measured")
    assert (trec.examples, trec.counted, trec.lengths) == (5452, False, "limits")
    assert any(re.search("1 copies can't be read, .*trec isn't there", n) for n in plan.notes)


def test_a_plan_is_refused_for_what_could_not_be_trained(here):
    tasks = open_tasks(["counting.jsonl"])
    with pytest.raises(BaseModelError, match=r"'nobody/nothing'.*config.json at hand"):
        plan_training("nobody/nothing", tasks)
    for options in ({"tflops": 0.0}, {"tflops": float("nan")}, {"tokens_per_second": -1.0}):
        with pytest.raises(ConfigError, match="must be above 0 and finite"):
            plan_training("tiny-base", tasks, **options)
    with pytest.raises(ConfigError, match="matches 'nothing'"):
        plan_training("tiny-base", tasks, peft=Lora(sites="nothing"))
    with pytest.raises(TaskError, match="at least two"):
        plan_training("tiny-base", open_tasks(["single.jsonl"]))
    with pytest.raises(TaskError, match="no chat template"):
        plan_training("tiny-base", tasks, formatting=Formatting(chat=True))
    with pytest.raises(BaseModelError, match="dtype is 'int3'"):
        plan_training("tiny-base", tasks, dtype="int3")


def test_nothing_is_planned_for_no_task(here):
    plan = plan_training("tiny-base", [])
    assert (plan.steps, plan.tokens, plan.seconds, plan.disk_bytes) == (0, 0, 0, 0)


# --- the command ---


def test_the_command_prints_a_plan_and_writes_nothing_else(here, phat):
    before = snapshot(here)
    flags = ["--steps", 10, "--batch-size", 4, "--tflops", 2, "--dtype", "float32"]
    tasks = ["counting.jsonl", "reviews.jsonl", "t0hi/trec", "hub:a/b"]
    outcome = phat("train", *tasks, "--base", "tiny-base", *flags, "--plan")
    assert (outcome.code, outcome.err) == (0, "")
    assert snapshot(here) == before
    assert "4 experts to train on tiny-base" in outcome.out
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in outcome.out.splitlines()
        if line.startswith("│")
    }
    assert list(rows) == ["counting", "reviews", "trec", "a--b", "total"]
    assert rows["counting"][:3] == ["counting.jsonl", "18", "10 + 100"]
    assert rows["trec"][:2] == ["CogComp/trec, prompts of P3 (Hub)", "~5,452"]
    assert rows["a--b"][:2] == ["hub:a/b (Hub)", "?"]
    assert rows["a--b"][4].startswith("≤")
    assert rows["total"][0] == "4 tasks"
    assert "at 2 TFLOP/s" in outcome.out
    assert "For 2 of 4 tasks" in outcome.out


def test_a_plan_is_written_as_json(here, phat):
    flags = ["--base", "tiny-base", "--steps", 10, "--tokens-per-second", 50]
    outcome = phat("train", "counting.jsonl", *flags, "--plan", "--json", "out/plan.json")
    assert outcome.code == 0, outcome.err
    assert "plan -> out/plan.json" in outcome.out
    record = json.loads((here / "out" / "plan.json").read_text())
    assert [task["name"] for task in record["tasks"]] == ["counting"]
    assert record["totals"]["tokens"] == record["tasks"][0]["tokens"]
    assert record["sites"] == 14


def test_a_mixture_is_planned_as_one_expert(here, phat):
    flags = ["--base", "tiny-base", "--multitask", "all", "--mixture-most", 10, "--plan"]
    outcome = phat("train", "counting.jsonl", "reviews.jsonl", *flags)
    assert "1 experts to train" in outcome.out
    assert re.search(r"│ all +│ mixture of 2 tasks +│ +20 │", outcome.out)


def test_finished_experts_are_left_out_when_resumed(here, phat):
    (here / "experts" / "counting").mkdir(parents=True)
    arguments = ["train", "counting.jsonl", "reviews.jsonl", "--base", "tiny-base", "--plan"]
    refused(phat(*arguments), "experts/counting exists already")
    outcome = phat(*arguments, "--resume")
    assert "1 experts to train" in outcome.out
    assert "1 experts are finished" in outcome.out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tflops", "3"], "--tflops is for --plan"),
        (["--tokens-per-second", "0"], "--tokens-per-second is for --plan"),
        (["--json", "p.json"], "--json is for --plan"),
        (["--plan", "--tflops", "-1"], "tflops is -1.0"),
        (["--plan", "--tokens-per-second", "0"], "tokens_per_second is 0.0"),
        (["--plan", "--base", "nobody/nothing"], "config.json at hand"),
        (["--plan", "--json", "single.jsonl/p.json"], "can't be written"),
    ],
)
def test_bad_plans_are_told_in_one_line(here, phat, flags, complaint):
    refused(phat("train", "counting.jsonl", "--base", "tiny-base", *flags), complaint)


def test_times_and_sizes_are_told_in_fitting_units():
    seconds = [0, 89, 90, 5400, 359_999, 864_000]
    told = ["0 s", "89 s", "1.5 min", "1.5 h", "100.0 h", "10.0 days"]
    assert [_duration(value) for value in seconds] == told
    assert [_size(value) for value in (7, 1000, 80_650_000)] == ["7 B", "1.0 kB", "80.7 MB"]
