"""Marks of single experts, replayed without a model."""

from __future__ import annotations

import base64
import json
import re
import sys

import numpy as np
import pytest

from command_line import run
from paths import ROOT
from phatgoose.errors import ConfigError, EvaluationError
from phatgoose.evaluation.replay import Prompt, chosen_by, read_marks, replay, router_rule

pa = pytest.importorskip("pyarrow", reason="needs the extra replay")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra replay")
EXPERTS = ("kinds", "moods")
SCORES = tuple(f"score/expert/{name}" for name in EXPERTS)
RIGHT = {  # of the tasks kinds, kinds, moods, moods, and an unseen one
    "base": [0, 0, 1, 0, 1],
    "expert/kinds": [1, 1, 0, 0, 1],
    "expert/moods": [0, 1, 1, 1, 0],
    "random/kinds": [0, 0, 0, 0, 0],
    "random/moods": [1, 1, 1, 1, 1],
    "routed/merged": [1, 0, 0, 1, 0],
}


@pytest.fixture
def marks(tmp_path):
    """A file of marks of two experts and five examples, as research/marks.py writes them."""
    columns = {
        "prompt": [f"{i:016x}" for i in range(5)],
        "task": ["kinds", "kinds", "moods", "moods", "other"],
        "wording": ["new"] * 4 + ["unseen"],
        "choices": [2, 2, 3, 3, 0],
        "label": [0, 1, 2, 0, -1],
        "embedding": [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.6, 0.5]],
        "choice/centroid": [[0.9, 0.1], [0.2, 0.3], [0.1, 0.8], [0.1, 0.8], [0.5, 0.5005]],
        "likelihoods/base": [[-1.0, -2.0]] * 2 + [[-1.0, -2.0, -3.0]] * 2 + [[]],
    }
    columns |= {f"score/{model}": right for model, right in RIGHT.items()}
    for name in ("embedding", "choice/centroid"):
        flat = np.array(columns[name], np.float16).ravel()
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, 2)
    about = {"format": 1, "base": "tiny", "experts": EXPERTS, "owners": [0, 1, 1]}
    centres = base64.b64encode(np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float16).tobytes())
    metadata = {"phatgoose": json.dumps(about), "centres": centres}
    path = tmp_path / "tiny.parquet"
    parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def lines_of(path, **rules) -> list[dict]:
    """By name the lines of each wording."""
    (marks,) = read_marks(path)
    tables = replay(marks, {name: chosen_by(marks, rule) for name, rule in rules.items()})
    return [{line.name: line for line in each.lines} for each in tables]


def test_a_router_s_first_choices_are_scored_by_the_experts_own_marks(marks):
    new, unseen = lines_of(marks, centroid=router_rule("centroid"))
    scores = {name: line.score.value for name, line in new.items()}
    assert scores == {
        "base": 0.25,
        "random expert": (0.75 + 0.5) / 2,
        "oracle*": 1.0,
        "own expert": 1.0,
        "merged, run": 0.5,
        "centroid": 1.0,  # kinds, moods, moods, moods: all right
        "centroid, random LoRAs": 0.75,
    }
    assert new["centroid"].gain.value == 0.75
    assert new["centroid"].over_random.value == 0.25
    assert new["merged, run"].over_random is None  # there is no run with random LoRAs
    assert new["merged, run"].kept.value == 0.5
    assert new["centroid"].own == 0.75
    assert unseen["centroid"].score.value == 0.0
    assert unseen["oracle*"].score.value == 1.0
    assert "own expert" not in unseen
    assert unseen["centroid"].kept is None
    for line in new.values():
        assert line.score.low <= line.score.value <= line.score.high


def test_random_twins_are_scored_where_each_expert_has_one(marks):
    parquet.write_table(parquet.read_table(marks).drop_columns(["score/random/moods"]), marks)
    new, _ = lines_of(marks, centroid=router_rule("centroid"))
    assert new["centroid"].over_random is None


def test_a_rule_sees_features_and_neither_task_nor_answer(marks):
    seen: list[Prompt] = []

    def nearest(prompt: Prompt) -> str:
        seen.append(prompt)
        return max(EXPERTS, key=lambda name: (prompt.centres[name] @ prompt.embedding).max())

    new, _ = lines_of(marks, nearest=nearest)
    assert new["nearest"].own == 1.0
    assert set(vars(seen[0])) == {"hash", "embedding", "scores", "centres"}
    assert seen[1].hash == f"{1:016x}"
    assert seen[2].scores["centroid"] == pytest.approx({"kinds": 0.1, "moods": 0.8}, abs=1e-3)
    assert [len(seen[0].centres[name]) for name in EXPERTS] == [1, 2]


def test_what_can_t_be_replayed_is_refused(marks):
    for rule, message in (
        (router_rule("arrow"), "these marks have .*, scores of centroid.*: 'arrow'"),
        (lambda _: sys.exit(3), "The rule failed on prompt [0-9a-f]+ .*: 3"),
        (lambda _: "birds", "have experts kinds, moods.*'birds'"),
    ):
        with pytest.raises(ConfigError, match=message):
            lines_of(marks, rule=rule)


def test_files_that_hold_no_marks(tmp_path, marks):
    table = parquet.read_table(marks)
    about = json.loads(table.schema.metadata[b"phatgoose"])
    few = table.select(["prompt", "task", "wording", "score/base", "choice/centroid", *SCORES])
    one = few.slice(0, 1)
    many = pa.concat_tables([one] * 2**12).combine_chunks()
    long = pa.ListArray.from_arrays([0, 5 * 10**7], np.zeros(5 * 10**7, np.float16))  # a few bytes
    for odd, changes, complaint in (
        (pa.concat_tables([many] * 2**11), {}, "less than or equal to 50000000, got 67108864"),
        (one.append_column("embedding", long), {}, "less than or equal to 50000000, got 50000008"),
        (few.slice(0, 0), {}, "greater than or equal to 1, got 0"),
        (few, {"format": 9}, "format: Input should be 1, got 9"),
        (few.drop_columns(["wording"]), {}, "wording"),
        (few, {"experts": ["kinds"]}, "cannot reshape"),
        (one.set_column(2, "wording", pa.array(["odd"])), {}, "empty or unknown cells"),
        (one.set_column(3, "score/base", pa.array([np.inf])), {}, "empty or unknown cells"),
    ):
        odd = odd.replace_schema_metadata({"phatgoose": json.dumps(about | changes)})
        parquet.write_table(odd, tmp_path / "odd.parquet", compression="zstd")
        with pytest.raises(EvaluationError, match=re.escape(complaint)):
            read_marks(tmp_path / "odd.parquet")
    (tmp_path / "odd.parquet").write_bytes(b"PAR1 is not enough")
    for place in ("nowhere", "nowhere.parquet", "."):
        with pytest.raises(EvaluationError, match=re.escape(str(tmp_path / place))):
            read_marks(tmp_path / place)


def test_the_command_prints_a_table_for_each_wording(marks, tmp_path, monkeypatch, capsys):
    rule = "import sys\nsys.path.insert(0, 'theirs')\ndef moods(prompt):\n    return 'moods'\n"
    (tmp_path / "my_rules.py").write_text(rule)
    monkeypatch.chdir(tmp_path)
    numbers = tmp_path / "numbers.json"
    options = ["--router", "centroid", "--rule", "my_rules:moods", "--json", str(numbers)]
    out = run(capsys, "replay", marks, *options).out
    sys.modules.pop("my_rules", None)
    assert "tiny, new: 2 tasks, 4 examples" in " ".join(out.split())
    assert "my_rules:moods" in out
    new, _ = json.loads(numbers.read_text())
    scores = {line["name"]: line["score"]["value"] for line in new["lines"]}
    assert (new["wording"], scores["my_rules:moods"]) == ("new", 0.75)


def test_published_marks_have_no_text_and_are_replayed():
    for marks in read_marks(ROOT / "research" / "marks"):
        texts = {name for name, column in marks.columns.items() if column.dtype == object}
        assert texts == {"prompt", "task", "wording"}
        assert all(re.fullmatch("[0-9a-f]{16}", each) for each in marks.columns["prompt"])
    new, *_ = replay(marks, {"discriminant": chosen_by(marks, router_rule("discriminant"))})
    lines = {line.name: line.score.value for line in new.lines}
    assert lines["own expert"] >= lines["discriminant"] - 0.05 > lines["base"]
