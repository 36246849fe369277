"""Tasks to be scored, here and by lm_eval, and their scores and answers one at a time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from phatgoose.tasks.task import Example, Task
from training_runs import target_nll

CHOICE_TASK = Task(
    "choose",
    test=(
        Example("is it?", "yes", ("yes", "no")),
        Example("which of the three letters is it", "b", ("a", "b", "c")),
        Example("one", "certainly not", ("certainly not", "perhaps", "no", "y")),
        Example("ends in space ", "maybe", ("maybe", "mayhem")),
        Example("a far longer input that makes other rows need padding", "no", ("no", "nope")),
    ),
)


def naive_scores(model, base, example: Example) -> list[float]:
    """The mean log-likelihood per target token, </s> included: one whole pass per choice."""
    with torch.no_grad():
        losses = [target_nll(model, base, [replace(example, target=c)]) for c in example.choices]
    return [-loss.mean().item() for loss in losses]


def greedy_text(model, base, text: str, tokens: int) -> str:
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )[0]
    start = 0 if base.is_encoder_decoder else ids.shape[1]
    return base.tokenizer.decode(output[start:], skip_special_tokens=True).strip()


# lm_eval passes a space at the end of an input on to its choices.
EXAMPLES = tuple(replace(each, input=each.input.rstrip()) for each in CHOICE_TASK.test)
STYLES = {  # how `my_task` is scored, and how much is told of it
    "multiple_choice": ("acc", {"doc_to_target": "label", "doc_to_choice": "choices"}),
    "generate_until": (
        "exact_match",
        {"doc_to_target": "target", "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 6}},
    ),
}


def write_task(parent: Path, style: str = "multiple_choice") -> Path:
    """A folder with `my_task` of lm_eval's."""
    folder = parent / "tasks"
    folder.mkdir()
    rows = [vars(each) | {"label": each.choices.index(each.target)} for each in EXAMPLES]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metric, more = STYLES[style]
    data = {"data_files": {"test": f"{folder}/rows.jsonl"}, "cache_dir": f"{folder}/cache"}
    task = {"task": "my_task", "dataset_path": "json", "dataset_kwargs": data} | more
    task |= {"output_type": style, "test_split": "test", "doc_to_text": "{{input}}"}
    task["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
    (folder / "my_task.yaml").write_text(json.dumps(task))  # YAML, too
    return folder


def results_of(model: Any, tasks: Path, **options: Any) -> dict[str, Any]:
    """lm_eval's results of `my_task` in the folder `tasks`, without a network."""
    import lm_eval
    from lm_eval.tasks import TaskManager

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
