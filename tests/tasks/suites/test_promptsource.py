"""promptsource's template files: what is read, what is rendered, and what is refused."""

import random

import pytest

from odd_files import one_line_of
from phatgoose.errors import TaskError
from phatgoose.tasks.suites.p3 import PromptTemplate, read_templates
from phatgoose.tasks.task import Example

FILE = """
dataset: fruit
templates:
  11: !Template
    answer_choices: sour ||| sweet
    id: 11
    jinja: "How does {{fruit}} taste? ||| {{answer_choices[label]}}"
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics:
      - Accuracy
      languages: [en]
      original_task: true
    name: taste
    reference: ours
  22: !Template
    answer_choices: null
    jinja: "Name a fruit. ||| {{fruit}}"
    metadata: !TemplateMetadata {original_task: null}
    name: Any fruit
"""


def rendered(jinja, row, choices=None, name="test"):
    return PromptTemplate(name, jinja, choices).render(row)


def test_reads_templates_and_sorts_them_by_name(tmp_path):
    (tmp_path / "fruit/big").mkdir(parents=True)
    (tmp_path / "fruit/big/templates.yaml").write_text(FILE, encoding="utf-8")
    first, second = read_templates(tmp_path, "fruit/big")
    assert first == PromptTemplate("Any fruit", "Name a fruit. ||| {{fruit}}")
    assert second == PromptTemplate(
        "taste",
        "How does {{fruit}} taste? ||| {{answer_choices[label]}}",
        "sour ||| sweet",
        original_task=True,
    )


@pytest.mark.parametrize(
    "text",
    [
        FILE.replace("reference: ours", "reference: !!python/object/apply:os.system [echo]"),
        "",
        "templates: {a: {name: n, jinja: x, answer_choices: '{% if %}'}}",
        "[" * 5000,
        None,
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, text):
    if text is not None:
        (tmp_path / "templates.yaml").write_text(text, encoding="utf-8")
    told = one_line_of(lambda: read_templates(tmp_path, "."), TaskError)
    assert f"templates.yaml {'does not exist.' if text is None else 'is not valid: '}" in told


OPTIONS = {"fruit": "a lemon", "label": 0, "options": ["red", " blue"], "key": 1}


@pytest.mark.parametrize(
    ("jinja", "choices", "wanted"),
    [
        (
            " Taste of\n{{fruit}}?  |||\n{{answer_choices[label]}} ",
            " sour|||sweet ",
            Example("Taste of\na lemon?", "sour", ("sour", "sweet")),
        ),
        (
            "Pick: {{answer_choices | join(', ')}} ||| {{answer_choices[key]}}",
            "{{options | join('|||')}}",
            Example("Pick: red, blue", "blue", ("red", "blue")),
        ),
        ("{% set _ = options.append(1) %}{{options | length}} ||| x", None, Example("3", "x")),
        (
            "{% for x in [1, 2] %}{{['a'] | choice}}{% endfor %} ||| {{answer_choices[0]}}",
            "{{['b'] | choice}}",
            Example("aa", "b", ("b",)),
        ),
        ("Q ||| red ||| ||| blue |||", None, Example("Q", "red", (), ("red", "blue"))),
    ],
)
def test_input_targets_and_choices_are_rendered_from_the_row(jinja, choices, wanted):
    row = {**OPTIONS, "options": list(OPTIONS["options"])}
    assert rendered(jinja, row, choices) == wanted
    assert row == OPTIONS


def test_separators_in_a_row_do_not_split():
    row = {"text": "a ||| b", "list": ["c ||| d", "e"], "deep": {"x": [{"y": "f|||g"}]}, "n": 3}
    jinja = "{{text}} {{deep.x[0].y}}{{n}} ||| {{list[0]}}"
    example = rendered(jinja, row, "{{list | join('|||')}}")
    assert example == Example("a ||| b f|||g3", "c ||| d", ("c ||| d", "e"))


def test_long_values_are_cut_as_promptsource_does():
    example = rendered("{{text}}! ||| {{text}}", {"text": "word " * 1000}, "{{text}}")
    assert len(example.input) <= 2048 + 1
    assert example.input.endswith("word...!")
    assert example.target.endswith("word...")
    assert len(example.choices[0]) == 4999


def test_choice_draws_the_same_for_the_same_row_and_differently_for_others():
    jinja, state = "{{range(1000) | choice}} {{range(1000) | choice}} ||| x", random.getstate()
    first = [rendered(jinja, {"n": n}).input for n in range(20)]
    assert first == [rendered(jinja, {"n": n}).input for n in range(20)]
    assert len({text for draws in first for text in draws.split()}) > 30
    assert first[0] != rendered(jinja, {"n": 0}, name="another").input
    assert random.getstate() == state
