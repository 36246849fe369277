"""Examples from rows and P3's templates."""

from __future__ import annotations

import pytest

from phatgoose.errors import TaskError
from phatgoose.tasks.suites.p3 import P3Dataset, PromptTemplate, without

DATASET = P3Dataset("rte", "aps/super_glue", "rte")
TEMPLATES = [PromptTemplate(name, "{{premise}} ||| yes") for name in ("one", "two", "three")]


def test_templates_are_left_out_by_name():
    assert [each.name for each in without(TEMPLATES, ["two"], DATASET)] == ["one", "three"]
    assert without(TEMPLATES, (), DATASET) == TEMPLATES


def test_a_template_that_is_left_out_must_be_there():
    with pytest.raises(TaskError, match="templates of super_glue/rte have no 'four'"):
        without(TEMPLATES, ["one", "four"], DATASET)
