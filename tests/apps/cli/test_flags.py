"""Settings as flags, and the help of every command."""

from __future__ import annotations

import pytest
import typer

from fake_packages import install
from phatgoose.apps.cli import app
from phatgoose.apps.cli.options import open_pool, split, with_flags
from phatgoose.config import (
    IA3,
    Bottleneck,
    Formatting,
    GateTraining,
    Lora,
    Routing,
    Training,
    settings_of,
)
from phatgoose.errors import ConfigError
from phatgoose.routing.routers import registry
from phatgoose.routing.routers.configs import Discriminant
from phatgoose.routing.routers.registry import ROUTERS

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "configs"),
    [
        ("train", (Lora, IA3, Bottleneck, Training, GateTraining, Formatting)),
        ("gate", (Formatting,)),
        ("compose", (Routing,)),
        ("generate", (Routing, Formatting)),
        ("evaluate", (Routing, Formatting)),
    ],
)
def test_every_setting_is_a_flag_with_its_help(command, configs):
    parameters = {p.name: p for p in COMMANDS[command].params}
    wanted = [setting for config in configs for setting in settings_of(config)]
    assert "--recipe" in parameters["recipe"].opts
    for setting in wanted:
        parameter = parameters[setting.name]
        assert f"--{setting.name.replace('_', '-')}" in parameter.opts
        assert setting.help in parameter.help
        if isinstance(setting.default, bool):
            assert f"--no-{setting.name.replace('_', '-')}" in parameter.secondary_opts


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("sites", "lora, ia3, bottleneck"),
        ("init_std", "lora, bottleneck"),
        ("rank", "lora"),
        ("size", "bottleneck"),
        ("seed", "training"),
    ],
)
def test_a_setting_is_shown_under_every_kind_that_it_belongs_to(name, tables):
    (shown,) = [p for p in COMMANDS["train"].params if p.name == name]
    assert shown.rich_help_panel == f"Settings: {tables}"


def test_gate_has_no_flag_for_what_is_not_its_business():
    """The adapter is trained already; a recipe may say how, and says it to `train`."""
    flags = {parameter.name for parameter in COMMANDS["gate"].params}
    settings = {
        setting.name for config in (Training, GateTraining) for setting in settings_of(config)
    }
    assert settings - flags == {"steps", "eval_every", "eval_examples"}


def test_joint_gates_take_no_notice_of_what_a_recipe_says_of_others(tmp_path):
    found = []
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[gates]\ngate_learning_rate = 0.01\ngate_inputs = "standardised"\n')
    flags = dict.fromkeys(setting.name for setting in settings_of(GateTraining))

    def command(*, gates: GateTraining):
        found.append(gates)

    for joint, wanted in (
        (True, GateTraining(joint=True)),
        (None, GateTraining(gate_learning_rate=0.01, gate_inputs="standardised")),
    ):
        with_flags(command)(recipe=recipe, **{**flags, "joint": joint})
        assert found.pop() == wanted
    with pytest.raises(ConfigError, match=r"gate_learning_rate is 0\.02"):
        with_flags(command)(recipe=None, **{**flags, "joint": True, "gate_learning_rate": 0.02})


def test_every_command_and_option_has_a_help_text():
    for name, command in COMMANDS.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command, phat):
    outcome = phat(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"phatgoose {command}" in outcome.out or f" {command} " in outcome.out


def test_help_on_generating_fits_two_screens_and_routers_describe_their_settings(phat, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    help_text = phat("generate", "--help").out
    assert len(help_text.splitlines()) <= 64
    listed = phat("routers")
    assert (listed.code, listed.err) == (0, "")
    assert all(name in listed.out for name in ROUTERS)
    told = phat("routers", "discriminant").out
    assert "needs: readings" in told
    assert "k: experts for each input (default: 1)" in told
    for setting in settings_of(Discriminant):
        assert f"{setting.name}: {setting.help}" in told
    assert phat("routers", "nothing").code == 2


def test_a_router_of_another_package_is_known_to_commands(phat, tmp_path, monkeypatch):
    spec = "from phatgoose.routing.routers.registry import RouterSpec\n"
    spec += "SPEC = RouterSpec('theirs', 'Theirs', 'none of ours', 'their_router.Router')\n"
    points = {registry.ENTRY_POINTS: {"theirs": "their_spec:SPEC", "lost": "their_spec:LOST"}}
    install(tmp_path, monkeypatch, "their_spec", spec, points)
    monkeypatch.setattr(registry, "ROUTERS", registry._Registry())
    told = phat("routers", "theirs")
    assert told.out == "theirs: none of ours\n"
    assert told.err.startswith("warning: phatgoose.routers: lost of their-spec can't be loaded")
    assert "Router lost can't be loaded" in phat("routers", "lost").err


def test_names_are_repeated_or_listed():
    assert split(["a,b", "c", ",d,"]) == ["a", "b", "c", "d"]
    assert split(None) == []


def test_one_place_or_several_make_a_pool(llama_pool):
    one, two = (expert.directory for expert in llama_pool.experts[:2])
    assert open_pool([one.parent]).names == llama_pool.names
    assert open_pool([one, two]).names == ("e0", "e1")
