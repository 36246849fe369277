"""The T0 suites: what is in them, and which examples their entries make of rows and templates."""

import json
import warnings
from pathlib import Path

import pytest

from paths import ROOT, SHARED
from phatgoose.errors import TaskError
from phatgoose.evaluation.metrics import METRICS
from phatgoose.files import read_table
from phatgoose.tasks.suites import p3, t0
from phatgoose.tasks.suites.p3 import P3Dataset
from phatgoose.tasks.suites.t0 import t0_held_in, t0_held_out
from phatgoose.tasks.task import Example, Sources
from suite_data import save_templates

TABLES = read_table(Path(t0.__file__).with_suffix(".toml"), "Suite", TaskError)

HELD_OUT = "rte hellaswag copa wic winogrande cb story_cloze anli_r1 anli_r2 anli_r3 wsc"


@pytest.fixture
def written(tmp_path):
    """Writes a dataset's template file: (name, jinja, choices, original task) each."""

    def write(path, *templates):
        save_templates(tmp_path, path, *templates)
        return Sources(templates=tmp_path)

    return write


@pytest.fixture
def served(monkeypatch):
    """Serves rows by split in place of the Hub, and returns what was asked for."""
    requests = []

    def serve(**splits):
        def read_rows(sources, dataset, config, split):
            requests.append((dataset, config, split))
            return splits[split]

        monkeypatch.setattr(p3, "read_rows", read_rows)
        return requests

    return serve


def read(name, sources):
    suite = t0_held_in() if name in t0_held_in().names else t0_held_out()
    return suite.entry(name).read(sources)


def test_the_suites_have_the_papers_datasets():
    suite, held_out = t0_held_in(), t0_held_out()
    assert (suite.name, held_out.name, len(suite.names)) == ("t0hi", "t0ho", 36)
    assert held_out.names == tuple(HELD_OUT.split())
    assert {entry.metrics for entry in held_out.entries} == {("accuracy",)}
    assert {name for entry in suite.entries for name in entry.metrics} <= set(METRICS)
    assert all(
        (entry.max_new_tokens is None) == (entry.metrics == ("accuracy",))
        for entry in suite.entries
    )
    counts = {entry.name: entry.train_examples for entry in suite.entries}
    assert (counts["mrpc"], counts["wiki_hop"]) == (3668 * 7, 43738 * 9)
    assert counts["paws"] == counts["gigaword"] == counts["app_reviews"] == 500_000


def mrpc_row(index):
    return {"sentence1": f"left {index}", "sentence2": f"right {index}", "label": index % 2}


def test_held_in_task(written, served):
    same = "{{sentence1}} = {{sentence2}}? ||| {{answer_choices[label]}}"
    sources = written(
        "glue/mrpc",
        ("b same", same, "no|||yes", True),
        ("a same", "{{sentence2}}? ||| {{answer_choices[label]}}", "false ||| true", True),
        ("c write", "Rephrase {{sentence1}} ||| {{sentence2}}", None, False),
    )
    rows = [mrpc_row(index) for index in range(5)]
    requests = served(train=rows[:3], validation=rows)
    task = read("mrpc", sources)
    assert requests == [("nyu-mll/glue", "mrpc", "train"), ("nyu-mll/glue", "mrpc", "validation")]
    assert (task.metrics, task.max_new_tokens, task.test) == (("accuracy",), None, ())
    assert task.validation_origin == "split validation"
    assert len(task.train) == 3 * 3
    assert task.train[3:6] == (
        Example("right 1?", "true", ("false", "true")),
        Example("left 1 = right 1?", "yes", ("no", "yes")),
        Example("Rephrase left 1", "right 1"),
    )
    inputs = ["right 0?", "left 1 = right 1?", "right 2?", "left 3 = right 3?", "right 4?"]
    assert [example.input for example in task.validation] == inputs
    assert task.digest == read("mrpc", sources).digest


def test_generated_answers_are_compared_with_the_rows_own(written, served):
    row = {"question": "Q?", "answers": {"text": ["one", "1", " "]}, "summary": " B. "}
    served(train=[row], validation=[row] * 2)
    for name, answers in (("quoref", ("one", "1")), ("xsum", (" B. ",))):
        sources = written(name, ("find", "{{question}} ||| {{answers.text[0]}}", None, True))
        task = read(name, sources)
        assert task.train[0].references == ()
        for example in task.validation:
            assert (example.choices, example.answers) == ((), answers)


def test_held_out_tasks_have_every_row_in_every_original_template(written, served):
    sources = written(
        "anli",
        ("b", "B {{premise}} ||| {{answer_choices[label]}}", "x|||y|||z", True),
        ("a", "A {{premise}} ||| {{answer_choices[label]}}", "l|||m|||n", True),
        ("c", "C {{premise}} ||| {{answer_choices[label]}}", "x|||y|||z", False),
    )
    requests = served(
        dev_r1=[{"premise": "p", "label": 2}, {"premise": "q", "label": 0}],
        dev_r2=[{"premise": "r", "label": 1}],
        dev_r3=[{"premise": "s", "label": 1}],
    )
    task = read("anli_r1", sources)
    assert task.test == (
        Example("A p", "n", ("l", "m", "n")),
        Example("B p", "z", ("x", "y", "z")),
        Example("A q", "l", ("l", "m", "n")),
        Example("B q", "x", ("x", "y", "z")),
    )
    assert [example.row for example in task.test] == [0, 0, 1, 1]
    assert (task.train, task.validation, task.metrics) == ((), (), ("accuracy",))
    assert [read(f"anli_r{n}", sources).test[0].input for n in (2, 3)] == ["A r", "A s"]
    assert requests == [("facebook/anli", None, f"dev_r{n}") for n in (1, 2, 3)]


def test_pairs_left_out_are_counted_in_one_warning(written, served):
    sources = written(
        "super_glue/cb",
        ("a", "{{premise}} ||| {{answer_choices[label]}}", "yes|||no", True),
        ("b", "{{premise}} ||| {{hypothesis}}", "yes|||no", True),
        ("c", "{% if label %}{{premise}} ||| yes{% endif %}", "yes|||no", True),
        ("d", "{{premise}} ||| {{['yes', 'no'][label // label]}}", "yes|||no", True),
        ("e", "{{premise}} ||| {{['yes'][premise.missing.label]}}", "yes|||no", True),
    )
    served(validation=[{"premise": "p", "hypothesis": h, "label": 0} for h in ("h", "no", "YES")])
    with pytest.warns(UserWarning, match="cb: ") as caught:
        task = read("cb", sources)
    assert len(caught) == 1
    told = str(caught[0].message)
    assert "11 of 15 pairs of a row and a prompt template are left out" in told
    assert "2 whose target is not among the answer choices" in told
    assert "3 without an input or a target" in told
    assert "6 whose template can't be filled" in told
    assert "First failure: template 'd', " in told
    assert [example.target for example in task.test] == ["yes", "yes", "no", "yes"]


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{{premise}} ||| {{label}}", "rte: there are no examples: .*not among the answer"),
        ("{{text}} ||| no", "has no field text, which the template 't' needs; .* label"),
        (None, "there are no pairs of a row and a template"),
    ],
)
def test_datasets_without_examples_are_refused(written, served, jinja, reason):
    sources = written("super_glue/rte", ("t", jinja or "a ||| b", "yes|||no", True))
    served(validation=[{"premise": "p", "label": 0}] if jinja else [])
    with pytest.raises(TaskError, match=reason):
        read("rte", sources)


# --- the real templates, on the made-up records ---

P3 = SHARED / "data/p3_templates"
RECORDS = json.loads((ROOT / "tests/support/p3_records.json").read_text(encoding="utf-8"))


def records_of(table):
    if "prompt" in table:
        return {"text": "What is the capital of Peru ?", "coarse_label": 4, "fine_label": 32}
    folder = table["hub"].split("/")[-1]
    return RECORDS[f"{folder}/{table['config']}" if "config" in table else folder]


@pytest.mark.real
@pytest.mark.skipif(not P3.is_dir(), reason=f"no P3 templates in {P3}")
@pytest.mark.parametrize("table", TABLES["held_in"], ids=lambda table: table["name"])
def test_real_held_in_tasks(table, monkeypatch):
    rows = [records_of(table)] * (10_013 if table.get("set_apart") else 13)
    monkeypatch.setattr(p3, "read_rows", lambda *request: rows)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        task = read(table["name"], Sources(templates=P3))
    for example in task.validation:
        assert bool(example.choices) == (task.metrics == ("accuracy",))
    fields = ("name", "hub", "config", "ignored", "prompt", "prompt_choices")
    dataset = P3Dataset(**{key: table[key] for key in fields if key in table})
    templates = dataset.prompt_templates(Sources(templates=P3))
    assert len(templates) == table["train_templates"]
    assert 0 < len(task.train) <= 13 * len(templates)
