"""Settings: the paper's defaults, limits, recipes, and what the command line reads off them."""

import dataclasses
import typing

import numpy as np
import pytest

from phatgoose.config import (
    Bottleneck,
    Formatting,
    GateTraining,
    Lora,
    Routing,
    RoutingSettings,
    Training,
    from_mapping,
    settings_of,
)
from phatgoose.errors import ConfigError
from phatgoose.routing.routers.phatgoose import Phatgoose

DEFAULTS = {  # the paper's (sections 3 and 4.1, and the released code), but for rate, alpha, batch
    Lora: {"rank": 16, "alpha": 32.0, "sites": None},
    Bottleneck: {"placement": "houlsby", "size": 64, "activation": "relu", "scale": 1.0},
    Training: {"steps": 1000, "batch_size": 32, "learning_rate": 2e-4, "eval_every": 100},
    GateTraining: {
        **{"gate_steps": 100, "gate_learning_rate": 5e-3, "statistics_examples": 1000},
        **{"means": True, "embedder": "sentence-transformers/all-MiniLM-L6-v2"},
    },
    Formatting: {"max_input_tokens": 512, "chat": False},
    Routing: {"router": "auto", "k": None},  # the paper's is named by its recipes
    Phatgoose: {"eps": 1e-5},
}


@pytest.mark.parametrize("config", DEFAULTS)
def test_defaults_are_the_papers_or_what_a_usual_base_wants(config):
    assert vars(config()).items() >= DEFAULTS[config].items()


@pytest.mark.parametrize(
    ("config", "values", "complaint"),
    [
        (Lora, {"rank": 0}, "rank is 0, but must be greater than or equal to 1."),
        (Lora, {"alpha": 10**400}, "alpha is 1000.*, but must be a valid number."),
        (Bottleneck, {"placement": "x"}, "placement is 'x', but must be 'houlsby' or 'pfeiffer'."),
        (Training, {"learning_rate": float("nan")}, "learning_rate is nan, but must be a finite"),
        (Training, {"seed": 1 << 32}, "seed is 4294967296, but must be less than 4294967296."),
        (Training, {"acts_on": "none"}, "acts_on is 'none', but must be 'all' or 'answer' or"),
        (Training, {"acts_on": 0}, "acts_on is 0, but must be .*greater than or equal to 1"),
        (Formatting, {"chat": None}, "chat is None, but must be a valid boolean."),
        (Routing, {"k": 0}, "k is 0, but must be greater"),
        (Phatgoose, {"eps": 0.0}, "eps is 0.0, but must be greater than 0."),
    ],
)
def test_a_value_that_a_setting_cannot_have_is_refused_by_name(config, values, complaint):
    with pytest.raises(ConfigError, match=f"^{complaint}"):
        config(**values)
    with pytest.raises(ConfigError, match=f"^here: {complaint}"):
        from_mapping(config, values, "here")


def test_texts_and_numbers_of_numpy_become_the_settings_types():
    for k, eps in ((np.int64(3), np.float32(0.5)), ("3", "0.5")):
        values = Routing(k=k).k, Phatgoose(eps=eps).eps
        assert values == (3, 0.5)
        assert tuple(map(type, values)) == (int, float)
    assert Formatting(chat="true").chat is True
    assert [Training(acts_on=each).acts_on for each in ("answer", "12", 12)] == ["answer", 12, 12]


def test_alpha_follows_the_rank_unless_it_is_given():
    assert (Lora(rank=4).alpha, Lora(rank=4, alpha=1).alpha) == (8.0, 1.0)


def test_the_keywords_of_compose_are_the_settings_of_routing():
    declared = typing.get_type_hints(RoutingSettings)
    assert declared == {setting.name: setting.type for setting in settings_of(Routing)}
    assert set(declared) == {field.name for field in dataclasses.fields(Routing)}
