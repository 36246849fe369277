"""Rows of Hub datasets: local copies in every layout, the Hub with a stand-in, and all refusals."""

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


def read(data: Path, dataset: str, config: str | None, split: str) -> list[dict]:
    return list(read_rows(Sources(data), dataset, config, split))


def complaint(data: Path | None, dataset: str, config: str | None, split: str) -> str:
    with pytest.raises(TaskError) as caught:
        read_rows(Sources(data), dataset, config, split)
    return str(caught.value)


def test_rows_have_a_length_an_index_and_an_order(data):
    write(data / "me/sentiment/data/train-00000-of-00001.parquet", TRAIN)
    rows = read_rows(Sources(data), "me/sentiment", None, "train")
    assert (len(rows), rows[1], list(rows)) == (2, TRAIN[1], TRAIN)
    write(data / "me/sentiment/data/train-00000-of-00001.parquet", [*TRAIN, *TEST])
    assert read(data, "me/sentiment", None, "train") == [*TRAIN, *TEST]  # read anew


@pytest.mark.parametrize(
    ("files", "dataset", "config", "split"),
    [  # files with TRAIN and with TEST, and what asks for TRAIN
        (["sentiment/train.parquet"], "me/sentiment", None, "train"),
        (["me/a/train.parquet", "a/train.parquet"], "me/a", None, "train"),  # the owner's first
        (["d/data/train-0-0123456789abcdef.parquet", "d/data/test-0.parquet"], "d", None, "train"),
        (["d/mrpc/train.parquet", "d/qqp/train.parquet"], "d", "mrpc", "train"),
        (["d/d/train/0000.parquet", "d/d/challenge/0000.parquet"], "d", "d", "train"),  # an export
        (["d/d/challenge/0000.parquet", "d/d/train/0000.parquet"], "d", None, "challenge"),
        (["piqa/default/train/0000.parquet"], "piqa", "plain_text", "train"),
        (["d/data/train-00000-of-00001.parquet"], "d", "default", "train"),
        (["d/default/train/0.parquet", "d/other/train/0.parquet"], "d", None, "train"),
        (["d/a/train_r1/0000.parquet", "d/a/train_r2/0000.parquet"], "d", "a", "train_r1"),
        (["d/my_dev.jsonl", "d/my_training-set.jsonl"], "d", None, "validation"),
        (["d/my_training-set.jsonl", "d/my_dev.jsonl"], "d", None, "train"),
        (["d/reviews.jsonl"], "d", None, "train"),
        (["d/train.csv"], "d", None, "train"),
        (["d/[1] really?/train.jsonl"], "d", "[1] really?", "train"),
    ],
)
def test_a_split_is_found_by_the_names_of_files_and_folders(data, files, dataset, config, split):
    for file, rows in zip(files, (TRAIN, TEST), strict=False):
        write(data / file, rows)
    assert read(data, dataset, config, split) == TRAIN


def test_shards_are_read_in_order(data, monkeypatch):
    write(data / "d/data/train-00001-of-00002.parquet", TRAIN[1:])
    write(data / "d/data/train-00000-of-00002.parquet", TRAIN[:1])
    assert read(data, "d", None, "train") == TRAIN
    monkeypatch.chdir(data.parent)
    assert read(Path("data"), "d", None, "train") == TRAIN


def test_links_in_hidden_folders_are_read_as_in_the_hubs_cache(tmp_path):
    write(tmp_path / ".cache/blobs/0a1b.parquet", TRAIN)
    (tmp_path / ".cache/d/data").mkdir(parents=True)
    link = tmp_path / ".cache/d/data/train-00000-of-00001.parquet"
    link.symlink_to(tmp_path / ".cache/blobs/0a1b.parquet")
    assert read(tmp_path / ".cache", "d", None, "train") == TRAIN


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
  - split: train
    path: main/part-a*
  - split: extra
    path: [main/part-b1.jsonl, main/part-b2.jsonl]
- config_name: other
  default: true
  data_files: other/*.jsonl
- config_name: third
  data_dir: third
---
# A dataset
"""


def test_configurations_that_the_readme_declares_are_followed(data):
    write(data / "d/main/part-a1.jsonl", TRAIN)
    write(data / "d/main/part-b2.jsonl", TRAIN[1:])
    write(data / "d/main/part-b1.jsonl", TRAIN[:1])
    write(data / "d/other/x.jsonl", TEST)
    write(data / "d/third/test.jsonl", TEST)
    (data / "d/README.md").write_text(README, encoding="utf-8")
    assert read(data, "d", "main", "train") == read(data, "d", "main", "extra") == TRAIN
    assert read(data, "d", None, "train") == read(data, "d", "third", "test") == TEST
    message = complaint(data, "d", "main", "test")
    assert "Split test of dataset d (configuration main) isn't in" in message
    assert message.endswith("there are extra, train.")


def test_a_copy_may_hold_one_of_the_declared_configurations_alone(data):
    write(data / "d/other/x.jsonl", TEST)
    (data / "d/README.md").write_text(README, encoding="utf-8")
    assert read(data, "d", "other", "train") == TEST
    message = complaint(data, "d", "main", "train")
    assert "has no file main/part-a*, which its README.md declares" in message
    assert "configuration fourth; it has main, other, third" in complaint(data, "d", "fourth", "x")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("configs: [", "README.md can't be read"),
        ("configs: 3", "README.md can't be read"),
        ("configs:\n- nothing: 1", "README.md can't be read"),
        ("configs:\n- config_name: default\n  data_files: ../x.jsonl", "outside its folder"),
        ("configs:\n- config_name: default\n  data_files: /etc/x.jsonl", "outside its folder"),
    ],
)
def test_a_header_that_is_broken_or_points_outside_is_refused(data, header, words):
    write(data / "x.jsonl", TRAIN)
    write(data / "d/train.jsonl", TRAIN)
    (data / "d/README.md").write_text("# Title\n", encoding="utf-8")
    assert read(data, "d", None, "train") == TRAIN  # a README without a header
    (data / "d/README.md").write_text(f"---\n{header}\n---\n", encoding="utf-8")
    assert words in complaint(data, "d", None, "train")


def test_what_save_to_disk_wrote_is_read(data):
    splits = {"train": TRAIN, "test": TEST}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    saved.save_to_disk(data / "owner/d/GROUP/Some Task:1.0")
    assert read(data, "owner/d", "GROUP/Some Task:1.0", "test") == TEST
    assert "there are test, train" in complaint(data, "owner/d", "GROUP/Some Task:1.0", "x")


def test_one_saved_dataset_without_splits_is_its_training_split(data):
    datasets.Dataset.from_list(TRAIN).with_format("numpy").save_to_disk(data / "d")
    rows = read(data, "d", None, "train")
    assert rows == TRAIN
    assert type(rows[0]["label"]) is int
    assert "there are train" in complaint(data, "d", None, "test")
    (data / "e").mkdir()
    arrow = data / "d/data-00000-of-00001.arrow"
    arrow.rename(data / "e/train-00000-of-00001.arrow")  # a file of the same format alone
    assert read(data, "e", None, "train") == TRAIN
    assert f"{data / 'd'} can't be read" in complaint(data, "d", None, "train")  # damaged now


@pytest.mark.parametrize(
    ("files", "config", "split", "words"),
    [
        ([], "c", "train", "Split train of dataset me/d (configuration c) isn't there"),
        (["mrpc/train.parquet"], "qqp", "train", "has no configuration qqp; it has mrpc."),
        (["data/train-0.parquet"], None, "test", "there are data/train-0.parquet."),
        (["latest.jsonl", "train.jsonl"], None, "test", "latest.jsonl, train.jsonl"),
        (["d.py"], None, "train", PARQUET_REVISION),  # a script alone: what to copy
        (["a/train/0.parquet", "b/train/0.parquet"], None, "train", "name one of a, b"),
    ],
)
def test_what_is_missing_is_told_with_what_there_is(data, files, config, split, words):
    for file in files:
        write(data / "me/d" / file, TRAIN)
    message = complaint(data, "me/d", config, split)
    assert words in message
    assert files or f"{data / 'me/d'} or {data / 'd'}" in message


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow", "train.jsonl"])
def test_a_broken_file_is_named(data, name):
    (data / "d").mkdir()
    (data / "d" / name).write_bytes(b"PAR1 this is nothing {")
    message = complaint(data, "d", None, "train")
    assert f"{data / 'd' / name} can't be read" in message
    assert "\n" not in message


@pytest.mark.parametrize("local", [True, False])
def test_a_missing_library_says_how_to_install_it(data, monkeypatch, local):
    write(data / "d/train.jsonl", TRAIN)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = complaint(data if local else None, "d", None, "train")
    assert message.endswith("needs datasets: pip install 'phatgoose[datasets]'.")


class Hub:
    """Stands in for the Hub: a table of repositories, and a record of what was asked."""

    def __init__(self, monkeypatch, error: Exception | None = None, files: Path | None = None):
        self.asked: list[tuple] = []
        self.error, self.files = error, files
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def load_dataset(self, dataset, config, *, split):
        self.asked.append((dataset, config, split))
        if self.error:
            raise self.error
        return datasets.Dataset.from_list(TRAIN)

    def snapshot_download(self, dataset, *, repo_type, revision, allow_patterns):
        assert repo_type == "dataset"
        self.asked.append((dataset, revision, *allow_patterns))
        if self.files is None:
            raise OSError("no connection\nand more")
        return str(self.files)


def test_without_copies_rows_come_from_the_hub(monkeypatch, data):
    hub = Hub(monkeypatch)
    assert list(read_rows(Sources(), "me/sentiment", "c", "train")) == TRAIN
    assert hub.asked == [("me/sentiment", "c", "train")]
    datasets.Dataset.from_list(TRAIN).save_to_disk(data / "A/B")
    hub = Hub(monkeypatch, files=data)
    assert list(read_rows(Sources(), "me/many", "A/B", "train")) == TRAIN
    assert hub.asked == [("me/many", "main", "A/B/*")]  # a folder inside a repository


@pytest.mark.parametrize(
    "message",
    [
        "Dataset scripts are no longer supported, but found quail.py",
        "contains custom code; pass the argument `trust_remote_code=True`",
    ],
)
def test_a_dataset_that_needs_a_script_comes_from_the_hubs_export(monkeypatch, data, message):
    write(data / "quail/train/0000.parquet", TRAIN)
    hub = Hub(monkeypatch, RuntimeError(message), data)
    assert list(read_rows(Sources(), "quail", "quail", "train")) == TRAIN
    assert list(read_rows(Sources(), "quail", None, "train")) == TRAIN
    exports = [asked for asked in hub.asked if asked[1] == PARQUET_REVISION]
    assert exports == [
        ("quail", PARQUET_REVISION, "quail/*train/*.parquet", "default/*train/*.parquet"),
        ("quail", PARQUET_REVISION, "*/*train/*.parquet"),
    ]


def test_what_is_not_on_the_hub_is_told(monkeypatch, data):
    Hub(monkeypatch, ValueError("Unknown split 'x': no description"))
    message = complaint(None, "d", None, "x")
    assert "can't be loaded from the Hub: Unknown split 'x': no description." in message
    assert "folder with a copy" in message
    Hub(monkeypatch, RuntimeError("scripts are no longer supported"), data)
    assert "has no file */*x/*.parquet" in complaint(None, "d", None, "x")
    Hub(monkeypatch, RuntimeError("scripts are no longer supported"))
    message = complaint(None, "d", None, "x")
    assert f"(revision {PARQUET_REVISION}): no connection. Check" in message
