"""`phatgoose route`."""

import io
import json
import sys

import pytest

from command_line import write_rows
from discriminants import taught_in
from routed_models import TOPICS


@pytest.fixture
def pool(pool_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return taught_in(tmp_path / "experts", pool_of("llama"))


def test_prompts_files_of_chats_and_the_standard_input_are_routed(pool, phat, monkeypatch):
    chat = [{"role": "user", "content": TOPICS[1]}, {"role": "assistant", "content": "Yes."}]
    write_rows(
        pool.parent / "chats.jsonl",
        [{"messages": [*chat, {"role": "user", "content": "Shorter, please."}]}],
    )
    done = phat("route", pool, TOPICS[0], "chats.jsonl", "Thank you!", "--json", "-")
    assert done.code == 0, done.err
    choices = json.loads(done.out)["choices"]
    assert [choice["expert"] for choice in choices] == ["e0", "e1", "base"]
    shown = phat("route", pool, TOPICS[0], "--explain")
    assert shown.code == 0, shown.err
    assert "e0 1.00" in shown.out
    assert f"{TOPICS[0]} 1"[:10] in shown.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TOPICS[2]}\n\n{TOPICS[3]}\n"))
    piped = phat("route", pool, "--json", "-")
    assert [choice["expert"] for choice in json.loads(piped.out)["choices"]] == ["e2", "e3"]


def test_what_cannot_be_routed_is_an_error(pool, phat, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert phat("route", pool).code == 2
    refused = phat("route", pool, "hi", "--router", "arrow")
    assert refused.code == 2
    assert "doesn't choose by a prompt alone" in refused.err
    for folder in pool.iterdir():
        (folder / "prompts.txt").unlink()
    told = phat("route", pool, TOPICS[0], "--explain")
    assert told.code == 0
    assert "no expert of this pool brings example prompts" in told.err


def test_prompts_are_listed_added_and_taken_back(pool, phat):
    said = "How ripe are the plums?"
    added = phat("prompts", pool, said, "--expert", "e1")
    assert added.code == 0, added.err
    assert added.out.splitlines()[-1] == f" 1 e1: {said}"
    rows = json.loads(phat("prompts", pool, "--json", "-").out)
    assert rows["corrections"] == [["e1", said]]
    assert phat("prompts", pool, said).code == 2
    unknown = phat("prompts", pool, said, "--expert", "e77")
    assert (unknown.code, "no expert 'e77'" in unknown.err) == (2, True)
    gone = phat("prompts", pool, "--take-back", "1", "--json", "-")
    assert json.loads(gone.out)["corrections"] == []
    assert "There is no correction 1" in phat("prompts", pool, "--take-back", "1").err
