"""Rows of Hub datasets: local copies in every layout, the Hub with a stand-in, and all refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from phatgoose.errors import TaskError
from phatgoose.tasks.suites.entries import Sources
from phatgoose.tasks.suites.hub import PARQUET_REVISION, read_rows

datasets = pytest.importorskip("datasets")

TRAIN = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
TEST = [{"text": "fine", "label": 1}]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    """Nothing that the library writes stays behind, and it shows no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def data(tmp_path):
    """The folder with copies of Hub datasets."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def write_parquet(path: Path, rows: list[dict], features=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(data: Path, dataset: str, config: str | None, split: str) -> list[dict]:
    return list(read_rows(Sources(data), dataset, config, split))


def complaint(data: Path | None, dataset: str, config: str | None, split: str) -> str:
    with pytest.raises(TaskError) as caught:
        read_rows(Sources(data), dataset, config, split)
    return str(caught.value)


def test_rows_have_a_length_an_index_and_an_order(data):
    write_parquet(data / "me/sentiment/data/train-00000-of-00001.parquet", TRAIN)
    rows = read_rows(Sources(data), "me/sentiment", None, "train")
    assert len(rows) == 2
    assert rows[1] == TRAIN[1]
    assert list(rows) == TRAIN


@pytest.mark.parametrize("place", ["me/sentiment", "sentiment"])
def test_the_owner_may_be_left_out_of_the_folder(data, place):
    write_parquet(data / place / "train-00000-of-00001.parquet", TRAIN)
    assert read(data, "me/sentiment", None, "train") == TRAIN


def test_the_folder_with_the_owner_comes_first(data):
    write_parquet(data / "me/sentiment/train.parquet", TRAIN)
    write_parquet(data / "sentiment/train.parquet", TEST)
    assert read(data, "me/sentiment", None, "train") == TRAIN


def test_shards_are_read_in_order(data):
    write_parquet(data / "d/data/train-00001-of-00002.parquet", TRAIN[1:])
    write_parquet(data / "d/data/train-00000-of-00002.parquet", TRAIN[:1])
    assert read(data, "d", None, "train") == TRAIN


def test_shards_with_a_hash_in_their_names_are_read(data):
    write_parquet(data / "d/data/train-00000-of-00001-0123456789abcdef.parquet", TRAIN)
    write_parquet(data / "d/data/test-00000-of-00001-0123456789abcdef.parquet", TEST)
    assert read(data, "d", None, "test") == TEST


def test_configurations_are_folders(data):
    write_parquet(data / "glue/mrpc/train-00000-of-00001.parquet", TRAIN)
    write_parquet(data / "glue/qqp/train-00000-of-00001.parquet", TEST)
    assert read(data, "glue", "mrpc", "train") == TRAIN
    assert read(data, "glue", "qqp", "train") == TEST


def test_the_hubs_parquet_export_is_read(data):
    write_parquet(data / "quail/quail/train/0000.parquet", TRAIN[:1])
    write_parquet(data / "quail/quail/train/0001.parquet", TRAIN[1:])
    write_parquet(data / "quail/quail/challenge/0000.parquet", TEST)
    assert read(data, "quail", "quail", "train") == TRAIN
    assert read(data, "quail", None, "train") == TRAIN
    assert read(data, "quail", None, "challenge") == TEST


def test_the_export_calls_a_single_configuration_default(data):
    write_parquet(data / "piqa/default/train/0000.parquet", TRAIN)
    assert read(data, "piqa", "plain_text", "train") == TRAIN


def test_default_is_the_configuration_without_a_folder_too(data):
    write_parquet(data / "d/data/train-00000-of-00001.parquet", TRAIN)
    assert read(data, "d", "default", "train") == TRAIN


def test_the_default_configuration_is_read_when_none_is_named(data):
    write_parquet(data / "d/default/train/0000.parquet", TRAIN)
    write_parquet(data / "d/other/train/0000.parquet", TEST)
    assert read(data, "d", None, "train") == TRAIN


def test_splits_of_similar_names_are_told_apart(data):
    write_parquet(data / "anli/plain_text/train_r1/0000.parquet", TRAIN)
    write_parquet(data / "anli/plain_text/train_r2/0000.parquet", TEST)
    assert read(data, "anli", "plain_text", "train_r1") == TRAIN
    assert read(data, "anli", "plain_text", "train_r2") == TEST


def test_usual_abbreviations_of_a_split_are_understood(data):
    write_jsonl(data / "d/my_dev.jsonl", TEST)
    write_jsonl(data / "d/my_training-set.jsonl", TRAIN)
    assert read(data, "d", None, "validation") == TEST
    assert read(data, "d", None, "train") == TRAIN


def test_a_word_that_merely_contains_a_splits_name_is_not_that_split(data):
    write_jsonl(data / "d/latest.jsonl", TEST)
    write_jsonl(data / "d/train.jsonl", TRAIN)
    assert "latest.jsonl, train.jsonl" in complaint(data, "d", None, "test")


def test_files_without_any_split_in_their_names_are_training_data(data):
    write_jsonl(data / "d/reviews.jsonl", TRAIN)
    assert read(data, "d", None, "train") == TRAIN


def test_jsonl_and_csv_files_are_read(data):
    write_jsonl(data / "a/train.jsonl", TRAIN)
    (data / "b").mkdir()
    (data / "b/train.csv").write_text("text,label\ngood,1\nbad,0\n", encoding="utf-8")
    assert read(data, "a", None, "train") == TRAIN
    assert read(data, "b", None, "train") == TRAIN


def test_a_changed_file_is_read_anew(data):
    write_jsonl(data / "d/train.jsonl", TRAIN)
    assert read(data, "d", None, "train") == TRAIN
    write_jsonl(data / "d/train.jsonl", [*TRAIN, *TEST])
    assert read(data, "d", None, "train") == [*TRAIN, *TEST]


def test_folders_may_have_characters_that_mean_something_in_patterns(data):
    write_jsonl(data / "d/[1] really?/train.jsonl", TRAIN)
    assert read(data, "d", "[1] really?", "train") == TRAIN


def test_links_in_hidden_folders_are_read_as_in_the_hubs_cache(tmp_path):
    write_parquet(tmp_path / ".cache/blobs/0a1b.parquet", TRAIN)
    (tmp_path / ".cache/d/data").mkdir(parents=True)
    link = tmp_path / ".cache/d/data/train-00000-of-00001.parquet"
    link.symlink_to(tmp_path / ".cache/blobs/0a1b.parquet")
    assert read(tmp_path / ".cache", "d", None, "train") == TRAIN


def test_the_folder_may_be_relative(data, monkeypatch):
    write_parquet(data / "d/train/0000.parquet", TRAIN)
    monkeypatch.chdir(data.parent)
    assert read(Path("data"), "d", None, "train") == TRAIN


def test_class_labels_stay_numbers(data):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    write_parquet(data / "d/train-00000-of-00001.parquet", TRAIN, features)
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
    write_jsonl(data / "d/main/part-a1.jsonl", TRAIN)
    write_jsonl(data / "d/main/part-b2.jsonl", TRAIN[1:])
    write_jsonl(data / "d/main/part-b1.jsonl", TRAIN[:1])
    write_jsonl(data / "d/other/x.jsonl", TEST)
    write_jsonl(data / "d/third/test.jsonl", TEST)
    (data / "d/README.md").write_text(README, encoding="utf-8")
    assert read(data, "d", "main", "train") == TRAIN
    assert read(data, "d", "main", "extra") == TRAIN
    assert read(data, "d", None, "train") == TEST
    assert read(data, "d", "third", "test") == TEST
    message = complaint(data, "d", "main", "test")
    assert "Split test of dataset d (configuration main) isn't in" in message
    assert message.endswith("there are extra, train.")


def test_a_copy_may_hold_one_of_the_declared_configurations_alone(data):
    write_jsonl(data / "d/other/x.jsonl", TEST)
    (data / "d/README.md").write_text(README, encoding="utf-8")
    assert read(data, "d", "other", "train") == TEST
    message = complaint(data, "d", "main", "train")
    assert "has no file main/part-a*, which its README.md declares" in message
    assert "configuration fourth; it has main, other, third" in complaint(data, "d", "fourth", "x")


def test_a_readme_without_a_header_says_nothing(data):
    write_jsonl(data / "d/train.jsonl", TRAIN)
    (data / "d/README.md").write_text("# Title\n", encoding="utf-8")
    assert read(data, "d", None, "train") == TRAIN


@pytest.mark.parametrize("header", ["configs: [", "configs: 3", "configs:\n- nothing: 1"])
def test_a_broken_header_is_refused(data, header):
    write_jsonl(data / "d/train.jsonl", TRAIN)
    (data / "d/README.md").write_text(f"---\n{header}\n---\n", encoding="utf-8")
    assert "README.md can't be read" in complaint(data, "d", None, "train")


@pytest.mark.parametrize("path", ["../secret.jsonl", "/etc/secret.jsonl"])
def test_a_readme_can_not_point_outside_its_folder(data, path):
    write_jsonl(data / "secret.jsonl", TRAIN)
    (data / "d").mkdir()
    header = f"configs:\n- config_name: default\n  data_files: {path}"
    (data / "d/README.md").write_text(f"---\n{header}\n---\n", encoding="utf-8")
    assert "outside its folder" in complaint(data, "d", None, "train")


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


def test_an_arrow_file_is_read(data):
    datasets.Dataset.from_list(TRAIN).save_to_disk(data / "saved")
    (data / "d").mkdir()
    (data / "saved/data-00000-of-00001.arrow").rename(data / "d/train-00000-of-00001.arrow")
    assert read(data, "d", None, "train") == TRAIN


def test_a_missing_copy_says_where_it_was_looked_for(data):
    message = complaint(data, "me/sentiment", "c", "train")
    assert "Split train of dataset me/sentiment (configuration c) isn't there" in message
    assert str(data / "me/sentiment") in message
    assert f"or {data / 'sentiment'}" in message


def test_a_missing_configuration_lists_those_there(data):
    write_parquet(data / "glue/mrpc/train-00000-of-00001.parquet", TRAIN)
    assert "has no configuration qqp; it has mrpc." in complaint(data, "glue", "qqp", "train")


def test_a_missing_split_lists_the_files_there(data):
    write_parquet(data / "d/data/train-00000-of-00001.parquet", TRAIN)
    message = complaint(data, "d", None, "test")
    assert message.endswith("there are data/train-00000-of-00001.parquet.")


def test_a_folder_with_a_script_alone_says_what_to_copy(data):
    (data / "d").mkdir()
    (data / "d/d.py").write_text("raise SystemExit", encoding="utf-8")
    assert PARQUET_REVISION in complaint(data, "d", None, "train")


def test_several_configurations_without_a_default_must_be_named(data):
    write_parquet(data / "d/a/train/0000.parquet", TRAIN)
    write_parquet(data / "d/b/train/0000.parquet", TEST)
    assert "name one of a, b" in complaint(data, "d", None, "train")


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow", "train.jsonl"])
def test_a_broken_file_is_named(data, name):
    (data / "d").mkdir()
    (data / "d" / name).write_bytes(b"PAR1 this is nothing {")
    message = complaint(data, "d", None, "train")
    assert f"{data / 'd' / name} can't be read" in message
    assert "\n" not in message


def test_a_damaged_saved_dataset_is_named(data):
    datasets.Dataset.from_list(TRAIN).save_to_disk(data / "d")
    (data / "d/data-00000-of-00001.arrow").unlink()
    assert f"{data / 'd'} can't be read" in complaint(data, "d", None, "train")


@pytest.mark.parametrize("local", [True, False])
def test_a_missing_library_says_how_to_install_it(data, monkeypatch, local):
    write_jsonl(data / "d/train.jsonl", TRAIN)
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


def test_without_copies_rows_come_from_the_hub(monkeypatch):
    hub = Hub(monkeypatch)
    assert list(read_rows(Sources(), "me/sentiment", "c", "train")) == TRAIN
    assert hub.asked == [("me/sentiment", "c", "train")]


@pytest.mark.parametrize(
    "message",
    [
        "Dataset scripts are no longer supported, but found quail.py",
        "contains custom code; pass the argument `trust_remote_code=True`",
    ],
)
def test_a_dataset_that_needs_a_script_comes_from_the_hubs_export(monkeypatch, data, message):
    write_parquet(data / "quail/train/0000.parquet", TRAIN)
    hub = Hub(monkeypatch, RuntimeError(message), data)
    assert list(read_rows(Sources(), "quail", "quail", "train")) == TRAIN
    assert list(read_rows(Sources(), "quail", None, "train")) == TRAIN
    exports = [asked for asked in hub.asked if asked[1] == PARQUET_REVISION]
    assert exports == [
        ("quail", PARQUET_REVISION, "quail/*train/*.parquet", "default/*train/*.parquet"),
        ("quail", PARQUET_REVISION, "*/*train/*.parquet"),
    ]


def test_a_folder_inside_a_repository_is_downloaded(monkeypatch, data):
    datasets.Dataset.from_list(TRAIN).save_to_disk(data / "A/B")
    hub = Hub(monkeypatch, files=data)
    assert list(read_rows(Sources(), "me/many", "A/B", "train")) == TRAIN
    assert hub.asked == [("me/many", "main", "A/B/*")]


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
