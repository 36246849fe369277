"""Settings: the paper's defaults, checks, recipes, and what the command line reads off them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from phatgoose.apps.cli.options import RECIPE_TABLES
from phatgoose.config import (
    IA3,
    Bottleneck,
    Formatting,
    GateTraining,
    Lora,
    Routing,
    Serving,
    Training,
    from_mapping,
    given_or_default,
    settings_of,
)
from phatgoose.errors import ConfigError
from phatgoose.routing.routers.configs import Phatgoose, Random

CONFIGS = (Lora, IA3, Bottleneck, Training, GateTraining, Formatting, Routing, Serving)

PAPER = [  # sections 3 and 4.1, and the released code
    (Lora, "rank", 16),
    (Lora, "alpha", 1.0),
    (Lora, "init_std", 0.01),
    (Lora, "sites", None),
    (IA3, "sites", None),
    (IA3, "feedforward", None),
    (Bottleneck, "placement", "houlsby"),
    (Bottleneck, "size", 64),
    (Bottleneck, "activation", "relu"),
    (Bottleneck, "scale", 1.0),
    (Training, "steps", 1000),
    (Training, "batch_size", 1024),
    (Training, "learning_rate", 5e-3),
    (Training, "warmup_ratio", 0.06),
    (Training, "weight_decay", 0.0),
    (Training, "max_grad_norm", 1.0),
    (Training, "eval_every", 100),
    (GateTraining, "gate_steps", 100),
    (GateTraining, "gate_learning_rate", None),
    (GateTraining, "statistics_examples", 1000),
    (GateTraining, "means", True),
    (GateTraining, "embedder", "sentence-transformers/all-MiniLM-L6-v2"),
    (Formatting, "max_input_tokens", 512),
    (Formatting, "chat", False),
    (Routing, "router", "phatgoose"),
    (Routing, "k", None),
    (Phatgoose, "eps", 1e-5),
    (Phatgoose, "affinity", "standardised"),
]

OUT_OF_RANGE = [
    (Lora, "rank", 0),
    (Lora, "alpha", 0.0),
    (Lora, "init_std", -0.1),
    (Bottleneck, "placement", "parallel"),
    (Bottleneck, "activation", "tanh"),
    (Bottleneck, "size", 0),
    (Bottleneck, "scale", 0.0),
    (Bottleneck, "init_std", -0.1),
    (Training, "steps", 0),
    (Training, "batch_size", -1),
    (Training, "micro_batch_size", 0),
    (Training, "eval_every", 0),
    (Training, "eval_examples", 0),
    (Training, "learning_rate", 0.0),
    (Training, "learning_rate", float("nan")),
    (Training, "warmup_ratio", 1.5),
    (Training, "warmup_ratio", -0.1),
    (Training, "weight_decay", -1.0),
    (Training, "max_grad_norm", 0.0),
    (GateTraining, "gate_steps", 0),
    (GateTraining, "gate_learning_rate", 0.0),
    (GateTraining, "statistics_examples", 0),
    (Formatting, "max_input_tokens", 0),
    (Formatting, "max_target_tokens", 0),
    (Routing, "k", 0),
    (Phatgoose, "eps", 0.0),
    (Phatgoose, "eps", float("nan")),
    (Phatgoose, "temperature", -1.0),
    (Phatgoose, "temperature", float("nan")),
    (Random, "seed", -1),
    (Training, "seed", -1),
    (Training, "seed", 1 << 32),
    (Lora, "alpha", 10**400),
]

WRONG_TYPE = [
    (Routing, "k", 2.5, "a whole number"),
    (Routing, "k", 2.0, "a whole number"),
    (Routing, "k", "2", "a whole number"),
    (Routing, "k", True, "a whole number"),
    (Routing, "router", 3, "a text"),
    (Routing, "router", None, "a text"),
    (Routing, "kernel", b"auto", "a text"),
    (Routing, "embedder", ["e0"], "a text"),
    (Phatgoose, "eps", "1e-5", "a number"),
    (Phatgoose, "temperature", False, "a number"),
    (Formatting, "chat", "no", "true or false"),
    (Formatting, "chat", None, "true or false"),
    (Training, "steps", "many", "a whole number"),
    (Training, "steps", 2.5, "a whole number"),
    (Training, "steps", True, "a whole number"),
    (Training, "learning_rate", "fast", "a number"),
    (Training, "learning_rate", True, "a number"),
    (Lora, "sites", 3, "a text"),
    (GateTraining, "means", 1, "true or false"),
    (GateTraining, "gate_learning_rate", "slow", "a number"),
]


@pytest.mark.parametrize(("config", "name", "value"), PAPER)
def test_defaults_are_the_papers(config, name, value):
    assert getattr(config(), name) == value


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_cannot_be_changed_afterwards(config):
    first = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), first, 1)


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_of_covers_every_field_with_a_help_text(config):
    settings = settings_of(config)
    assert [setting.name for setting in settings] == [f.name for f in dataclasses.fields(config)]
    for setting in settings:
        assert len(setting.help) > 10, setting
        assert setting.default == getattr(config(), setting.name)


def test_config_classes_share_names_only_where_one_flag_serves_several_kinds_of_expert():
    owners: dict[str, list[type]] = {}
    for config in CONFIGS:
        for setting in settings_of(config):
            owners.setdefault(setting.name, []).append(config)
    shared = {name: configs for name, configs in owners.items() if len(configs) > 1}
    assert shared.pop("embedder") == [GateTraining, Routing]  # which no command has both
    assert shared == {"sites": [Lora, IA3, Bottleneck], "init_std": [Lora, Bottleneck]}
    for name, configs in shared.items():
        settings = [s for config in configs for s in settings_of(config) if s.name == name]
        assert len({(s.type, s.help, s.default) for s in settings}) == 1


@pytest.mark.parametrize(("config", "name", "value"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused_by_name(config, name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is .*, but must be"):
        config(**{name: value})


@pytest.mark.parametrize(("config", "name", "value", "wanted"), WRONG_TYPE)
def test_values_of_a_wrong_type_are_refused_with_what_is_wanted(config, name, value, wanted):
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


def test_every_config_class_has_a_table_in_recipes():
    assert set(RECIPE_TABLES.values()) == set(CONFIGS)


def test_settings_of_another_class_are_refused():
    given = Training(steps=3)
    assert given_or_default(Training, given, "training") is given
    assert given_or_default(Training, None, "training") == Training()
    for wrong in ({"steps": 3}, "fast", Formatting()):
        with pytest.raises(ConfigError, match=r"training is .* class phatgoose\.config\.Training"):
            given_or_default(Training, wrong, "training")
