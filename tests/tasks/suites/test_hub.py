"""Rows of Hub datasets: from local copies, from a Hub on this machine, and all refusals."""

import json
import sys
from pathlib import Path

import pytest

from phatgoose.errors import TaskError
from phatgoose.tasks.suites.hub import PARQUET_REVISION, read_rows
from phatgoose.tasks.task import Sources

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("private_cache")

TRAIN = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
TEST = [{"text": "fine", "label": 1}]


@pytest.fixture
def data(tmp_path):
    """The folder with copies of Hub datasets."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def write(path: Path, rows: list[dict], features=None) -> None:
    """Rows as the parquet, JSON Lines or CSV file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    elif path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(data: Path | None, dataset: str, config: str | None, split: str) -> list[dict]:
    return list(read_rows(Sources(data), dataset, config, split))


def complaint(data: Path | None, dataset: str, config: str | None, split: str) -> str:
    with pytest.raises(TaskError) as caught:
        read_rows(Sources(data), dataset, config, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_have_a_length_an_index_and_an_order(data):
    write(data / "me/sentiment/data/train-00000-of-00001.parquet", TRAIN)
    rows = read_rows(Sources(data), "me/sentiment", None, "train")
    assert (len(rows), rows[1], list(rows)) == (2, TRAIN[1], TRAIN)
    write(data / "me/sentiment/data/train-00000-of-00001.parquet", [*TRAIN, *TEST])
    assert read(data, "me/sentiment", None, "train") == [*TRAIN, *TEST]  # read anew


@pytest.mark.filterwarnings("ignore:unclosed file.*csv:ResourceWarning")  # datasets 4.0
@pytest.mark.parametrize(
    ("files", "dataset", "config", "split"),
    [  # files with TRAIN and with TEST, and what asks for TRAIN
        (["sentiment/train.parquet"], "me/sentiment", None, "train"),
        (["me/a/train.parquet", "a/train.parquet"], "me/a", None, "train"),  # the owner's first
        (["d/mrpc/train.jsonl", "d/qqp/train.jsonl"], "d", "mrpc", "train"),
        (["d/d/val/0000.parquet", "d/d/train/0000.parquet"], "d", "d", "val"),  # an export
        (["d/d/challenge/0000.parquet", "d/d/train/0000.parquet"], "d", None, "challenge"),
        (["d/2016/test.csv", "d/2016/validation.csv"], "d", "2016", "test"),
        (["d/reviews.jsonl"], "d", None, "train"),
    ],
)
def test_a_split_is_found_by_the_names_of_files_and_folders(
    data, files, dataset, config, split, monkeypatch
):
    for file, rows in zip(files, (TRAIN, TEST), strict=False):
        write(data / file, rows)
    assert read(data, dataset, config, split) == TRAIN
    monkeypatch.chdir(data)
    assert read(Path(), dataset, config, split) == TRAIN


def test_class_labels_stay_numbers(data):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    write(data / "d/train-00000-of-00001.parquet", TRAIN, features)
    assert [row["label"] for row in read(data, "d", None, "train")] == [1, 0]


README = """---
configs:
- config_name: main
  data_files:
  - split: extra
    path: main/part-a*
- config_name: other
  default: true
  data_files: other/*.jsonl
---
# A dataset
"""


def test_configurations_that_the_readme_declares_are_followed(data):
    write(data / "d/main/part-a1.jsonl", TRAIN)
    write(data / "d/other/x.jsonl", TEST)
    (data / "d/README.md").write_text(README, encoding="utf-8")
    assert read(data, "d", "main", "extra") == TRAIN
    assert read(data, "d", None, "train") == TEST
    message = complaint(data, "d", "main", "test")
    assert message.startswith("Split test of dataset d (configuration main) can't be loaded from")
    assert "Should be one of ['extra']" in message
    (data / "d/README.md").write_text("---\nconfigs: [\n---\n", encoding="utf-8")
    assert f"can't be loaded from {data / 'd'}" in complaint(data, "d", "main", "extra")


def test_what_save_to_disk_wrote_is_read(data):
    splits = {"train": TRAIN, "test": TEST}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    saved.save_to_disk(data / "owner/d/GROUP/Some Task:1.0")
    assert read(data, "owner/d", "GROUP/Some Task:1.0", "test") == TEST
    assert "there are train, test" in complaint(data, "owner/d", "GROUP/Some Task:1.0", "x")


def test_one_saved_dataset_without_splits_is_its_training_split(data):
    datasets.Dataset.from_list(TRAIN).with_format("numpy").save_to_disk(data / "d")
    rows = read(data, "d", None, "train")
    assert rows == TRAIN
    assert type(rows[0]["label"]) is int
    assert "there are train" in complaint(data, "d", None, "test")


@pytest.mark.parametrize(
    ("files", "config", "split", "words"),
    [
        ([], "c", "train", "Split train of dataset me/d (configuration c) isn't there"),
        (["mrpc/train.parquet"], "qqp", "train", "me/d/qqp"),
        (["data/train-0.parquet"], None, "test", "Should be one of ['train']"),
        (["d.py"], None, "train", PARQUET_REVISION),  # a script alone: what to copy
    ],
)
def test_what_is_missing_is_told_with_what_there_is(data, files, config, split, words):
    for file in files:
        write(data / "me/d" / file, TRAIN)
    message = complaint(data, "me/d", config, split)
    assert words in message
    assert files or f"{data / 'me/d'} or {data / 'd'}" in message


@pytest.mark.parametrize(
    ("name", "reason"), [("train.parquet", "Parquet"), ("train.jsonl", "JSON parse error")]
)
def test_a_broken_file_is_told(data, name, reason):
    (data / "d").mkdir()
    (data / "d" / name).write_bytes(b"PAR1 this is nothing {")
    message = complaint(data, "d", None, "train")
    assert f"can't be loaded from {data / 'd'}: {reason}" in message


@pytest.mark.parametrize("local", [True, False])
def test_a_missing_library_says_how_to_install_it(data, monkeypatch, local):
    write(data / "d/train.jsonl", TRAIN)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = complaint(data if local else None, "d", None, "train")
    assert message.endswith("needs datasets: pip install 'phatgoose[datasets]'.")


@pytest.fixture
def online(hub, monkeypatch):
    """The hub on this machine, for datasets too."""
    pages = f"{hub.url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
    for name, value in (("HF_ENDPOINT", hub.url), ("HUB_DATASETS_URL", pages)):
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return hub


def contents(folder: Path, above: str = "") -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {above + path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_without_copies_rows_come_from_the_hub(online, data):
    write(data / "plain/train.jsonl", TRAIN)
    online.add("me/plain", contents(data / "plain") | {"README.md": b"# Rows"})
    assert read(None, "me/plain", None, "train") == TRAIN
    datasets.DatasetDict({"train": datasets.Dataset.from_list(TEST)}).save_to_disk(data / "saved")
    online.add("me/many", contents(data / "saved", "A/B/") | {"C/state.json": b"{}"})
    assert read(None, "me/many", "A/B", "train") == TEST  # a folder inside a repository
    assert not any("/C/" in request for request in online.requests)


def test_a_dataset_that_needs_a_script_comes_from_the_hubs_export(online, data):
    write(data / "quail/one/val/0000.parquet", TRAIN)
    write(data / "quail/one/train/0000.parquet", TEST)
    online.add("me/quail", {"README.md": b"# Rows", "quail.py": b"raise SystemExit"})
    online.add("me/quail", contents(data / "quail"), PARQUET_REVISION)
    for config in ("one", None):
        assert read(None, "me/quail", config, "val") == TRAIN
        assert read(None, "me/quail", config, "train") == TEST


def test_what_is_not_on_the_hub_is_told(online, data):
    message = complaint(None, "me/nothing", None, "x")
    assert "can't be loaded from the Hub: Dataset 'me/nothing' doesn't exist" in message
    assert "folder with a copy" in message
    online.fail_on = "README"
    assert "can't be loaded from the Hub" in complaint(None, "me/nothing", None, "x")
