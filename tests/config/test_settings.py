"""Settings: the paper's defaults, checks, recipes, and what the command line reads off them."""

import dataclasses
import typing

import numpy as np
import pytest

from phatgoose.apps.cli.options import RECIPE_TABLES
from phatgoose.config import (
    IA3,
    Bottleneck,
    Dora,
    Formatting,
    GateTraining,
    Lora,
    Routing,
    RoutingSettings,
    Serving,
    Training,
    from_mapping,
    settings_of,
)
from phatgoose.errors import ConfigError
from phatgoose.routing.routers.fixed import Random
from phatgoose.routing.routers.phatgoose import Phatgoose

CONFIGS = (Lora, Dora, IA3, Bottleneck, Training, GateTraining, Formatting, Routing, Serving)

DEFAULTS = {  # the paper's (sections 3 and 4.1, and the released code), but for rate, alpha, batch
    Lora: {"rank": 16, "alpha": 32.0, "sites": None},
    Dora: {"rank": 16, "alpha": 32.0},
    IA3: {"sites": None},
    Bottleneck: {"placement": "houlsby", "size": 64, "activation": "relu", "scale": 1.0},
    Training: {
        **{"steps": 1000, "batch_size": 32, "learning_rate": 2e-4},
        **{"lr_schedule": "constant_with_warmup", "eval_every": 100},
    },
    GateTraining: {
        **{"gate_steps": 100, "gate_learning_rate": 5e-3, "statistics_examples": 1000},
        **{"means": True, "embedder": "sentence-transformers/all-MiniLM-L6-v2"},
    },
    Formatting: {"max_input_tokens": 512, "chat": False},
    Routing: {"router": "auto", "k": None},  # the paper's is named by its recipes
    Phatgoose: {"eps": 1e-5},
}

NAN = float("nan")
OUT_OF_RANGE = {
    Lora: {"rank": [0], "alpha": [0.0, 10**400]},
    Bottleneck: {"placement": ["parallel"], "activation": ["tanh"], "size": [0], "scale": [0.0]},
    Training: {
        **{name: [0] for name in ("steps", "micro_batch_size", "eval_every", "eval_examples")},
        **{"batch_size": [-1], "learning_rate": [0.0, NAN]},
        **{"lr_schedule": ["stairs"], "seed": [-1, 1 << 32]},
    },
    GateTraining: {"gate_steps": [0], "gate_learning_rate": [0.0], "statistics_examples": [0]},
    Formatting: {"max_input_tokens": [0], "max_target_tokens": [0]},
    Routing: {"k": [0]},
    Phatgoose: {"eps": [0.0, NAN], "temperature": [-1.0, NAN]},
    Random: {"seed": [-1]},
}

WRONG_TYPE = {
    "a whole number": [(Routing, "k", [2.5, 2.0, "2", True]), (Training, "steps", ["many", 2.5])],
    "a number": [(Phatgoose, "eps", ["1e-5", False]), (GateTraining, "gate_learning_rate", ["x"])],
    "a text": [
        (Routing, "router", [3, None]),
        (Routing, "embedder", [["e0"]]),
        (Lora, "sites", [3]),
    ],
    "true or false": [(Formatting, "chat", ["no", None]), (GateTraining, "means", [1])],
}


def each(table):
    return [(c, name, value) for c, row in table.items() for name, value in row.items()]


@pytest.mark.parametrize(("config", "name", "value"), each(DEFAULTS))
def test_defaults_are_the_papers_or_what_a_usual_base_wants(config, name, value):
    assert getattr(config(), name) == value


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_of_covers_every_field_with_a_help_text(config):
    settings = settings_of(config)
    assert [setting.name for setting in settings] == [f.name for f in dataclasses.fields(config)]
    for setting in settings:
        assert len(setting.help) > 10, setting
        assert setting.default == getattr(config(), setting.name) or setting.default is None


@pytest.mark.parametrize(("config", "name", "values"), each(OUT_OF_RANGE))
def test_values_out_of_range_are_refused_by_name(config, name, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{name} is .*, but must be"):
            config(**{name: value})


@pytest.mark.parametrize("wanted", WRONG_TYPE)
def test_values_of_a_wrong_type_are_refused_with_what_is_wanted(wanted):
    for config, name, values in WRONG_TYPE[wanted]:
        for value in values:
            with pytest.raises(ConfigError, match=rf"^{name} is .*must be {wanted}\.$"):
                config(**{name: value})
            with pytest.raises(ConfigError, match=rf"^here: {name} is .*must be {wanted}\.$"):
                from_mapping(config, {name: value}, "here")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "value", [[], {}, object(), 1j, b"x", float("nan"), float("inf"), float("-inf")]
)
def test_no_setting_takes_what_has_none_of_its_types(config, value):
    for setting in settings_of(config):
        with pytest.raises(ConfigError, match=rf"^{setting.name} is .*, but must be"):
            config(**{setting.name: value})


def test_numbers_of_numpy_become_pythons():
    k = Routing(k=np.int64(3)).k
    eps = Phatgoose(eps=np.float32(0.5)).eps
    assert (k, type(k), eps, type(eps)) == (3, int, 0.5, float)
    assert type(from_mapping(Lora, {"alpha": 16}, "here").alpha) is float


def test_unknown_settings_are_refused_with_their_name_and_the_known_ones():
    with pytest.raises(ConfigError, match=r"^here: unknown setting 'lerning_rate'.*learning_rate"):
        from_mapping(Training, {"lerning_rate": 1e-3}, "here")


def test_alpha_follows_the_rank_unless_it_is_given():
    assert (Lora(rank=4).alpha, Lora(rank=4, alpha=1).alpha) == (8.0, 1.0)


def test_every_config_class_has_a_table_in_recipes():
    assert set(RECIPE_TABLES.values()) == set(CONFIGS)


def test_the_keywords_of_compose_are_the_settings_of_routing():
    declared = typing.get_type_hints(RoutingSettings)
    assert declared == {setting.name: setting.type for setting in settings_of(Routing)}
