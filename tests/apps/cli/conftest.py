"""Fixtures of the command line's tests; a module may have another `here`."""

import shutil
import warnings
from pathlib import Path

import pytest

from command_line import FLAGS, open_row, review, write_rows
from phatgoose.apps.cli import main
from tiny import make_model, make_tokenizer


@pytest.fixture(scope="session")
def workshop(base_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two trained experts, what they were trained on, and a pool of damaged ones."""
    folder = tmp_path_factory.mktemp("workshop")
    write_rows(folder / "reviews.jsonl", [review(i) for i in range(8)])
    write_rows(folder / "counting.jsonl", [open_row(i) for i in range(8)])
    write_rows(folder / "unseen.jsonl", [review(i) for i in range(20, 26)])
    shutil.copytree(base_folders["llama"], folder / "tiny-base")
    make_model("llama", seed=1).save_pretrained(folder / "other-base")
    make_tokenizer(final_eos=False).save_pretrained(folder / "other-base")
    tasks = [str(folder / name) for name in ("reviews.jsonl", "counting.jsonl")]
    arguments = ["--base", str(folder / "tiny-base"), "--out", str(folder / "experts"), *FLAGS]
    with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
        main(["train", *tasks, *arguments])
    assert caught.value.code == 0
    return folder


@pytest.fixture
def here(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workshop, as the current folder."""
    folder = shutil.copytree(workshop, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder
