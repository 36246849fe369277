"""Settings as flags, and the help of every command."""

import pytest
import typer

from phatgoose.apps.cli import app
from phatgoose.config import Bottleneck, GateTraining, Lora, Routing, Training, settings_of
from phatgoose.routing.routers import registry
from phatgoose.routing.routers.discriminant import Discriminant

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "configs"),
    [("train", (Lora, Bottleneck, Training, GateTraining)), ("compose", (Routing,))],
)
def test_every_setting_is_a_flag_with_its_help(command, configs):
    parameters = {p.name: p for p in COMMANDS[command].params}
    assert "--recipe" in parameters["recipe"].opts
    for setting in (setting for config in configs for setting in settings_of(config)):
        parameter = parameters[setting.name]
        assert f"--{setting.name.replace('_', '-')}" in parameter.opts
        assert setting.help in parameter.help
        if isinstance(setting.default, bool):
            assert f"--no-{setting.name.replace('_', '-')}" in parameter.secondary_opts


def test_help_on_generating_fits_two_screens_and_routers_describe_their_settings(phat, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    help_text = phat("generate", "--help").out
    assert len(help_text.splitlines()) <= 70
    listed = phat("routers")
    assert (listed.code, listed.err) == (0, "")
    assert all(name in listed.out for name in registry.OURS)
    told = phat("routers", "discriminant").out
    assert "needs: prompt_statistics" in told
    assert "k: experts for each input (default: 1)" in told
    for setting in settings_of(Discriminant):
        assert f"{setting.name}: {setting.help}" in told
    assert phat("routers", "nothing").code == 2
