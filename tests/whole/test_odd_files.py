"""Files of strangers that are valid and yet odd: each is one line, never a traceback."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest

from paths import GOLDENS
from phatgoose.apps.cli import main
from phatgoose.apps.cli.recipe import read_recipe
from phatgoose.errors import ConfigError, ExpertError, PhatgooseError, PoolError, TaskError
from phatgoose.evaluation.comparison.result_store import ResultStore
from phatgoose.experts.adapter import adapter_files
from phatgoose.experts.card import model_card
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.experts.hub import reference_of
from phatgoose.experts.pool import Pool
from phatgoose.files.regular_file import sha256_of
from phatgoose.files.strict_json import MOST_NESTED
from phatgoose.files.strict_toml import MOST_TOML_BYTES, read_toml
from phatgoose.routing.routers.scores import read_scores
from phatgoose.tasks.suites.local import local_suite
from phatgoose.tasks.task import load_task

GOLDEN = GOLDENS / "expert"
DEPTHS = [MOST_NESTED + 1, 500, 900, 100_000]


@pytest.fixture
def directory(tmp_path) -> Path:
    return shutil.copytree(GOLDEN, tmp_path / "golden")


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def one_line_of(action, error: type[PhatgooseError] = PhatgooseError) -> str:
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("key", ["task", "hyperparameters", "metrics"])
def test_deep_records_are_refused_when_read_and_not_when_saved(directory, depth, key):
    text = (directory / LAYOUT.info).read_text()
    record = json.dumps({key: {"deep": "@"}})[1:-1].replace('"@"', nested(depth - 2))
    content = {k: v for k, v in json.loads(text).items() if k != key}
    (directory / LAYOUT.info).write_text(json.dumps(content)[:-1] + ", " + record + "}")
    assert "nested too deeply" in one_line_of(lambda: Expert.load(directory), ExpertError)


def test_records_as_deep_as_may_be_are_saved_and_read_again(directory, tmp_path):
    inner: object = 1
    for _ in range(MOST_NESTED - 2):
        inner = [inner]
    rewrite(directory / LAYOUT.info, metrics={"deep": inner})
    again = Expert.load(directory).save(tmp_path / "again")
    assert again.info.metrics == {"deep": inner}


@pytest.mark.parametrize("depth", [500, 100_000])
def test_deep_toml_is_one_line(tmp_path, depth):
    file = tmp_path / "a.toml"
    for text in (f"base = {nested(depth)}", "a." * depth + "b = 1", f"base = {'{a=' * depth}"):
        file.write_text(text)
        one_line_of(lambda: read_recipe(file), ConfigError)
        one_line_of(lambda: local_suite(file), TaskError)


def test_huge_toml_is_refused_unread(tmp_path):
    (tmp_path / "a.toml").write_text("#" * (MOST_TOML_BYTES + 1))
    told = one_line_of(lambda: read_toml(tmp_path / "a.toml", "Recipe", ConfigError))
    assert f"at most {MOST_TOML_BYTES}" in told
    (tmp_path / "a.toml").write_text("a = " + "9" * 5000)
    assert "not valid TOML" in one_line_of(lambda: read_recipe(tmp_path / "a.toml"))
    (tmp_path / "a.toml").write_text(f"base = [{', '.join(['1'] * 100_000)}]")
    one_line_of(lambda: read_recipe(tmp_path / "a.toml"), ConfigError)
    one_line_of(lambda: local_suite(tmp_path / "a.toml"), TaskError)


@pytest.mark.parametrize("line", [nested(100_000), "9" * 5000, '{"input": ' + "9" * 5000 + "}"])
def test_odd_lines_of_tasks_and_results_are_one_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    one_line_of(lambda: load_task(tmp_path / "a.jsonl"), TaskError)
    one_line_of(lambda: ResultStore(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "text", ["[]", nested(100_000), '{"experts": 5}', '{"experts": {"a": []}}']
)
def test_odd_scores_are_one_line(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    one_line_of(lambda: read_scores(tmp_path / "scores.json"), PoolError)


@pytest.mark.parametrize("path", [5, None, [], {}, 1.5, True, "\0", "x" * 5000, "../" * 100])
def test_a_manifest_whose_path_is_none_is_one_line(directory, tmp_path, path):
    Pool.open(directory).write_manifest(tmp_path / "pool.json")
    content = json.loads((tmp_path / "pool.json").read_text())
    content["experts"][0]["path"] = path
    (tmp_path / "pool.json").write_text(json.dumps(content))
    one_line_of(lambda: Pool.open(tmp_path / "pool.json"))


@pytest.mark.parametrize("records", [5, None, {}, [5], [None], [[]], {"path": 5}, "text"])
def test_a_manifest_of_other_records_is_one_line(directory, tmp_path, records):
    content = {"manifest_version": 1, "base": None, "experts": records}
    (tmp_path / "pool.json").write_text(json.dumps(content))
    one_line_of(lambda: Pool.open(tmp_path / "pool.json"), PoolError)
    with pytest.raises(SystemExit) as caught:
        main(["pool", str(tmp_path / "pool.json")])
    assert caught.value.code == 2


SHAPES = [
    [0, 2**62],
    [2**62, 0],
    [0, 2**63],
    [2**32, 2**32, 0],
    [],
    [0],
    [1],
    [0, 0],
    [1, 0],
    [0, 1],
]
SHAPES += [[1, 1, 1], [2, 1, 1], [2, 3], [3, 0, 2**61], [0, -1], [2**64, 0]]


def reshaped(file: Path, shape: list[int]) -> None:
    """Give every tensor of a safetensors file `shape`, and as much data as that needs."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    size = max(0, 4 * math.prod(shape))
    names = [name for name in json.loads(content[8 : 8 + length]) if name != "__metadata__"]
    table = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size * len(names))


@pytest.mark.parametrize("kind", ["expert", "ia3", "bottleneck"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_of_odd_shapes_are_one_line(tmp_path, kind, shape):
    folder = shutil.copytree(GOLDEN.parent / kind, tmp_path / kind)
    file = adapter_files(folder).weights
    reshaped(folder / file, shape)
    rewrite(folder / LAYOUT.info, adapter_sha256=sha256_of(folder / file))
    assert kind in one_line_of(lambda: Expert.load(folder), ExpertError)
    one_line_of(lambda: Expert.from_peft(folder, {}), ExpertError)


HOSTILE = "<script>alert(1)</script> | `x` [a](javascript:b)\n\n# Title\n<img src=x>"


@pytest.mark.parametrize("key", ["task", "hyperparameters", "metrics"])
def test_a_card_holds_no_html_and_no_markdown_of_others(key):
    info = {
        "name": "e",
        "base": {"id": "a/b", "revision": None, "fingerprint": None},
        **{part: {} for part in ("task", "hyperparameters", "metrics")},
        key: {HOSTILE: HOSTILE, "long": "x" * 10**6, "lines": ["a", {"b": HOSTILE}]},
    }
    card = model_card(info, "lora", 3)
    assert "<script" not in card
    assert "<img" not in card
    assert "\n# Title" not in card
    assert "](" not in card.replace("\\](", "")
    assert len(card) < 10_000
    rows = [line for line in card.splitlines() if line.startswith("| ") and "script" in line]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)


def test_a_base_of_any_name_keeps_the_front_matter_of_a_card_whole():
    yaml = pytest.importorskip("yaml")
    for base in ("a: [b", "{}", "'", "# x", "!!python/object:os.system", "a`<b>", "me/base-1.0"):
        info = {
            "name": "e",
            "base": {"id": base, "revision": "`<i>", "fingerprint": None},
            **{part: {} for part in ("task", "hyperparameters", "metrics")},
        }
        card = model_card(info, "lora", 3)
        front = yaml.safe_load(card.split("---")[1])
        assert front["base_model"] == base
        assert front["library_name"] == "peft"
        assert card.partition("# e")[2].count("`") % 2 == 0


def test_a_folder_that_looks_like_the_hubs_cache_is_not_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    inside = Path("models--famous--expert", "snapshots", "a" * 40)
    forged = shutil.copytree(GOLDEN, tmp_path / "received" / inside)
    assert reference_of(forged) is None
    record = Pool.open(forged).records()[0]
    assert record["path"] == str(forged.resolve())
    real = shutil.copytree(GOLDEN, tmp_path / "cache" / inside)
    assert str(reference_of(real)) == f"hub:famous/expert@{'a' * 40}"
    shutil.copytree(GOLDEN, real / "inner")
    assert str(reference_of(real / "inner")) == f"hub:famous/expert/inner@{'a' * 40}"
    assert reference_of(tmp_path / "cache") is None
