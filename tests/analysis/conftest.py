"""Fixtures of the analysis's tests."""

import copy

import pytest

import phatgoose as pg
from analysed import TASKS
from phatgoose.analysis.analyse import Analysis
from routed_models import SCORES


@pytest.fixture(scope="session")
def found(loaded_bases, pool_of) -> Analysis:
    """Two tasks, analysed under three routers."""
    return pg.analyse(
        pool_of("llama"),
        TASKS,
        routers=["phatgoose", "arrow", "oracle"],
        base=copy.deepcopy(loaded_bases["llama"]),
        scores=SCORES,
    )
