"""Rows and templates of a few datasets of the suites, made up, as copies on disk have them."""

import json
from pathlib import Path

import pytest

from phatgoose.tasks.task import Sources


def save_copy(data: Path, repository: str, config: str = "", **splits: list[dict]) -> None:
    """A copy of a Hub dataset below `data`, as `save_to_disk` writes it."""
    datasets = pytest.importorskip("datasets")
    parts = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(data / repository / config)


def save_templates(templates: Path, path: str, *several: tuple[str, str, str | None, bool]) -> None:
    """A dataset's template file below `templates`: (name, jinja, choices, original task) each."""
    nodes = [
        {"name": n, "jinja": j, "answer_choices": c, "metadata": {"original_task": original}}
        for n, j, c, original in several
    ]
    (templates / path).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"templates": dict(enumerate(nodes))})  # YAML, too
    (templates / path / "templates.yaml").write_text(text, encoding="utf-8")


def write_hub(folder: Path) -> Sources:
    """Made-up rows of six of the suites' datasets, in the Hub's layout, and templates for them."""
    data, templates = folder / "data", folder / "templates"
    films = [{"text": f"film {i}", "label": i % 2} for i in range(8)]
    talks = [{"dialogue": f"A: hello {i}", "summary": f"greeting {i}"} for i in range(8)]
    asked = [{"question": f"who is {i}", "answers": [f"N{i}", f"M{i}"]} for i in range(6)]
    pairs = [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": i % 2} for i in range(6)]
    ironic = [{"inputs": f"Q{i}", "targets": f"A{i}", "_template_type": "zs_opt"} for i in range(9)]
    films_repository = "cornell-movie-review-data/rotten_tomatoes"
    save_copy(data, films_repository, train=films, validation=films[:4])
    save_copy(data, "knkarthick/samsum", train=talks, validation=talks[:3])
    save_copy(data, "stanfordnlp/web_questions", train=asked, test=asked[:2])
    save_copy(data, "aps/super_glue", "rte", validation=pairs)
    prompted = ("r-three/Phatgoose_flanv2_offline", "FLANV2/NIV2/Irony Detection")
    save_copy(data, *prompted, train=ironic)
    pick = "{{answer_choices[label]}}"
    entails = "{{premise}}. So {{hypothesis}}? ||| " + pick
    for path, jinja, choices in (
        ("rotten_tomatoes", "{{text}}, good? ||| " + pick, "no ||| yes"),
        ("samsum", "Sum up: {{dialogue}} ||| {{summary}}", None),
        ("web_questions", "Tell me {{question}} ||| {{answers.0}}", None),
        ("super_glue/rte", entails, "yes ||| no"),
    ):
        save_templates(templates, path, ("only", jinja, choices, True))
    return Sources(data, templates)
