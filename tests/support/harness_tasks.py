"""A task of lm_eval's in a folder, and its results without a network."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'harness'")

import lm_eval
from lm_eval.tasks import TaskManager

from scored_tasks import CHOICE_TASK

# lm_eval passes a space at the end of an input on to its choices.
EXAMPLES = tuple(replace(each, input=each.input.rstrip()) for each in CHOICE_TASK.test)
YAML = """
task: my_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
output_type: {output_type}
test_split: test
doc_to_text: "{{{{input}}}}"
"""
CHOICES = """
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
OPEN = """
doc_to_target: target
generation_kwargs: {until: ["zzz"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_task(parent: Path, output_type: str = "multiple_choice") -> Path:
    """The folder with `my_task`, which is scored in the style of `output_type`."""
    folder = parent / "tasks"
    folder.mkdir()
    rows = [vars(each) | {"label": each.choices.index(each.target)} for each in EXAMPLES]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = CHOICES if output_type == "multiple_choice" else OPEN
    text = YAML.format(folder=folder, output_type=output_type) + more
    (folder / "my_task.yaml").write_text(text)
    return folder


def results_of(model: Any, tasks: Path, **options: Any) -> dict[str, Any]:
    """lm_eval's results of `my_task` in the folder `tasks`."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        # lm_eval describes the machine in each result, which takes a second.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
        return lm_eval.simple_evaluate(
            model=model, tasks=["my_task"], task_manager=manager, bootstrap_iters=0, **options
        )


def answers_of(results: dict[str, Any]) -> list[list[Any]]:
    """What the model answered to the requests of each example."""
    samples = sorted(results["samples"]["my_task"], key=lambda sample: sample["doc_id"])
    return [[answer[0] for answer in sample["resps"]] for sample in samples]
