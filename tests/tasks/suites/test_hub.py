"""Rows of Hub datasets: from local copies, from a Hub on this machine, and all refusals."""

import json
from pathlib import Path

import pytest

from odd_files import one_line_of
from phatgoose.errors import TaskError
from phatgoose.tasks.loading import PARQUET_REVISION, load_task, read_rows
from phatgoose.tasks.task import Sources
from suite_data import save_copy

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("private_cache")

TRAIN = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
TEST = [{"text": "fine", "label": 1}]


def write(path: Path, rows: list[dict]) -> None:
    """Rows as the parquet, JSON Lines or CSV file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(data: Path | None, dataset: str, config: str | None, split: str) -> list[dict]:
    return list(read_rows(Sources(data), dataset, config, split))


def complaint(data: Path | None, dataset: str, config: str | None, split: str) -> str:
    return one_line_of(lambda: read_rows(Sources(data), dataset, config, split), TaskError)


@pytest.mark.filterwarnings("ignore:unclosed file.*csv:ResourceWarning")  # datasets 4.0
@pytest.mark.parametrize(
    ("files", "dataset", "config", "split"),
    [  # files with TRAIN and with TEST, and what asks for TRAIN
        (["d/mrpc/train.jsonl", "d/qqp/train.jsonl"], "d", "mrpc", "train"),
        (["d/d/val/0000.parquet", "d/d/train/0000.parquet"], "d", "d", "val"),  # an export
        (["d/d/challenge/0000.parquet", "d/d/train/0000.parquet"], "d", None, "challenge"),
        (["d/2016/test.csv", "d/2016/validation.csv"], "d", "2016", "test"),
    ],
)
def test_a_split_is_found_by_the_names_of_files_and_folders(
    tmp_path, files, dataset, config, split
):
    for file, rows in zip(files, (TRAIN, TEST), strict=True):
        write(tmp_path / file, rows)
    assert read(tmp_path, dataset, config, split) == TRAIN


@pytest.mark.parametrize(
    ("file", "content", "config", "split", "words"),
    [
        (None, b"", "c", "train", "--local-dir "),
        ("train.jsonl", b'{"a": 1}', None, "test", "Should be one of ['train']"),
        ("d.py", b"raise SystemExit", None, "train", PARQUET_REVISION),  # what to copy
        ("train.jsonl", b"this is nothing {", None, "train", "me/d: JSON parse error"),
    ],
)
def test_what_is_missing_or_broken_is_told(tmp_path, file, content, config, split, words):
    if file:
        (tmp_path / "me/d" / file).parent.mkdir(parents=True)
        (tmp_path / "me/d" / file).write_bytes(content)
    assert words in complaint(tmp_path, "me/d", config, split)


@pytest.fixture
def online(hub, monkeypatch):
    """The hub on this machine, for datasets too."""
    pages = f"{hub.url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
    values = {"HF_ENDPOINT": hub.url, "HUB_DATASETS_URL": pages, "HF_HUB_OFFLINE": False}
    for name, value in values.items():
        monkeypatch.setattr(datasets.config, name, value)
    return hub


def contents(folder: Path, above: str = "") -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {above + path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_without_copies_rows_come_from_the_hub(online, tmp_path):
    write(tmp_path / "plain/train.jsonl", TRAIN)
    online.add("me/plain", contents(tmp_path / "plain") | {"README.md": b"# Rows"})
    assert read(None, "me/plain", None, "train") == TRAIN
    task = load_task("hub:me/plain@main", template="{{ text }}? ||| {{ label }}")
    assert (task.name, task.source) == ("me--plain", "hub:me/plain@main")
    assert [example.input for example in task.train] == ["good?", "bad?"]
    save_copy(tmp_path, "saved", train=TEST)
    online.add("me/many", contents(tmp_path / "saved", "A/B/") | {"C/state.json": b"{}"})
    assert read(None, "me/many", "A/B", "train") == TEST  # a folder inside a repository
    assert not any("/C/" in request for request in online.requests)


def test_a_dataset_that_needs_a_script_comes_from_the_hubs_export(online, tmp_path):
    write(tmp_path / "quail/one/val/0000.parquet", TRAIN)
    write(tmp_path / "quail/one/train/0000.parquet", TEST)
    online.add("me/quail", {"README.md": b"# Rows", "quail.py": b"raise SystemExit"})
    online.add("me/quail", contents(tmp_path / "quail"), PARQUET_REVISION)
    for config in ("one", None):
        assert read(None, "me/quail", config, "val") == TRAIN
        assert read(None, "me/quail", config, "train") == TEST


def test_what_is_not_on_the_hub_is_told(online):
    message = complaint(None, "me/nothing", None, "x")
    assert "can't be loaded from the Hub: Dataset 'me/nothing' doesn't exist" in message
    with pytest.raises(TaskError, match="hub:me/nothing does not exist"):
        load_task("hub:me/nothing")
