"""`phatgoose import`, `push` and `pull`."""

from __future__ import annotations

import pytest

from fake_hub import contents, pushed_now
from phatgoose.apps.cli import main
from phatgoose.experts.expert import Expert
from tiny import make_adapter

# huggingface_hub 2.4 hands its own HTTP client an argument that this one advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_the_commands_push_pull_and_import(hub, pair, llama, tmp_path, capsys):
    def phatgoose(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        assert (caught.value.code, streams.err) == (0, ""), streams.err
        return streams.out

    told = phatgoose("push", pair[0], "me/reviews")
    assert told.strip().endswith(f"-> hub:me/reviews@{pushed_now(hub)}")
    assert "e0: 14 sites" in phatgoose("pull", "me/reviews", "--out", tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(pair[0])
    assert "e0" in phatgoose("pool", "hub:me/reviews", "--out", tmp_path / "pool.json")
    hub.add("you/lora", contents(make_adapter(llama, tmp_path / "adapter")))
    told = phatgoose("import", "you/lora", "--base", llama.id, "--out", tmp_path / "theirs")
    assert "theirs: 14 sites, LoRA of rank 4" in told
    assert "phatgoose gate" in told
    assert Expert.load(tmp_path / "theirs").gates == {}
