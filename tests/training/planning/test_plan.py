"""Plans: the paper's numbers, tiny ones counted by hand, and nothing fetched from anywhere."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from safetensors.torch import load_file

from command_line import write_rows
from phatgoose.base.loading import load_base
from phatgoose.config import Formatting, GateTraining, Lora, Training
from phatgoose.errors import BaseModelError, ConfigError, TaskError
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training.plan import plan_training
from phatgoose.training.plan_costs import Shapes
from phatgoose.training.train_expert import train_expert
from tiny import make_tokenizer

T5_XL = "google/t5-xl-lm-adapt"
PER_ROW = {"peft": Lora(rank=2), "training": Training(steps=5, batch_size=4, eval_every=2)}
GATES = GateTraining(gate_steps=3, statistics_examples=6)

pytestmark = pytest.mark.usefixtures("_offline")


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
    assert {task.disk_bytes for task in plan.tasks} == {
        2 * 35_389_440 + 2 * 4 * 1_032_192 + 4 * 2 * 24 * 2048 * 18  # gates, means; readings
    }
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
        gate_training=GateTraining(means=False, readings=False),
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


def test_each_dataset_is_planned_with_its_own_micro_batch():
    news, hop = open_tasks(["t0hi/ag_news", "t0hi/wiki_hop"])
    assert (news.entry.micro_batch_size, hop.entry.micro_batch_size) == (16, 2)

    def memory(*tasks, **training):
        return plan_training(T5_XL, tasks, training=Training(**training)).memory_bytes

    plain = {rows: memory(news.without_micro_batch(), micro_batch_size=rows) for rows in (2, 8, 16)}
    assert (memory(hop), memory(news)) == (plain[2], plain[16])
    assert memory(hop, news) == plain[16]  # a worker may get either
    assert memory(news, micro_batch_size=2) == plain[16]
    assert memory(news, batch_size=8) == plain[8]
    assert memory(news.without_micro_batch(), batch_size=8) == plain[8]


# --- small ones ---


def test_a_plan_counts_what_training_will_do(planned_here, kind, base_folders):
    folder = str(base_folders[kind])
    plan = plan_training(
        folder, open_tasks(["counting.jsonl"]), **PER_ROW, gate_training=GATES, dtype="float32"
    )
    (task,) = plan.tasks
    encode = make_tokenizer(final_eos=kind == "t5")
    lengths = [len(encode(f"Count {i}:")["input_ids"]) for i in range(20)]
    assert (task.examples, task.counted, task.lengths) == (18, True, "measured")
    assert (task.steps, task.gate_steps, task.trained) == (5, 3, 4 * (5 + 3))
    # After steps 2, 4 and 5, two examples; then means and readings.
    assert task.measured == 3 * 2 + 2 * 6
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


def test_checkpoints_are_as_large_as_planned(planned_here, base_folders, monkeypatch):
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


def test_settings_change_the_plan_as_they_change_training(planned_here):
    tasks = open_tasks(["counting.jsonl"])

    def planned(**options):
        return plan_training("tiny-base", tasks, dtype="float32", **PER_ROW, **options)

    plain, joint = planned(gate_training=GATES), planned(gate_training=GateTraining(joint=True))
    assert (joint.tasks[0].gate_steps, joint.tasks[0].trained) == (0, 20)
    assert joint.working_bytes == plain.working_bytes + 9 * 4 * plain.gate_parameters
    bare = planned(gate_training=dataclasses.replace(GATES, means=False))
    assert plain.tasks[0].disk_bytes - bare.tasks[0].disk_bytes == 4 * plain.gate_parameters
    assert plain.tasks[0].measured - bare.tasks[0].measured == 6
    unread = planned(gate_training=dataclasses.replace(GATES, readings=False))
    assert plain.tasks[0].disk_bytes - unread.tasks[0].disk_bytes == 4 * 2 * 2 * 32 * 18
    assert plain.tasks[0].measured - unread.tasks[0].measured == 6
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


def test_without_a_tokenizer_lengths_are_told_by_words(planned_here):
    folder = planned_here / "bare"
    folder.mkdir()
    shutil.copy(planned_here / "tiny-base" / "config.json", folder)  # weights aren't needed either
    rows = [{"input": "one two three", "target": "four"} for _ in range(5)]
    tasks = open_tasks([str(write_rows(planned_here / "words.jsonl", rows))])
    plan = plan_training(str(folder), tasks)
    (task,) = plan.tasks
    assert (task.prompt_tokens, task.target_tokens) == (pytest.approx(4.9), pytest.approx(2.3))
    assert task.lengths == "words"
    assert any("1.3 a word" in note for note in plan.notes)


def test_copies_are_counted_and_those_that_are_missing_are_told(planned_here, hub_copies):
    plan = plan_training(
        "tiny-base", open_tasks(["t0hi/samsum", "t0hi/trec"], hub_copies), **PER_ROW
    )
    samsum, trec = plan.tasks
    assert (samsum.examples, samsum.counted, samsum.lengths) == (8, True, "measured")
    assert (trec.examples, trec.counted, trec.lengths) == (5452, False, "limits")
    assert any(re.search("1 copies can't be read, .*trec isn't there", n) for n in plan.notes)


def test_a_plan_is_refused_for_what_could_not_be_trained(planned_here):
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


def test_nothing_is_planned_for_no_task(planned_here):
    plan = plan_training("tiny-base", [])
    assert (plan.steps, plan.tokens, plan.seconds, plan.disk_bytes) == (0, 0, 0, 0)
