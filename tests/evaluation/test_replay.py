"""Marks of single experts: made by research/marks.py, replayed without a model."""

from __future__ import annotations

import json
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from command_line import run
from paths import ROOT
from phatgoose.errors import ConfigError, EvaluationError
from phatgoose.evaluation.evaluate import EvaluationSet, ScoringSettings, evaluate
from phatgoose.evaluation.replay import (
    Prompt,
    chosen_by,
    imported_rule,
    read_marks,
    replay,
    router_rule,
)
from phatgoose.routing.compose import compose, detach
from topic_prompts import CHOOSING, OPEN

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


@pytest.fixture(scope="module")
def program():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "research" / "marks.py")))


@pytest.fixture
def marks(program, tmp_path):
    """A file of marks of two experts and five examples."""
    columns = {
        "prompt": [f"{i:016x}" for i in range(5)],
        "task": ["kinds", "kinds", "moods", "moods", "other"],
        "wording": ["new"] * 4 + ["unseen"],
        "choices": [2, 2, 3, 3, 0],
        "label": [0, 1, 2, 0, -1],
        "embedding": [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.6, 0.5]],
        "choice/centroid": [[0.9, 0.1], [0.2, 0.3], [0.1, 0.8], [0.1, 0.8], [0.5, 0.50001]],
        "likelihoods/base": [[-1.0, -2.0]] * 2 + [[-1.0, -2.0, -3.0]] * 2 + [[]],
    }
    columns |= {f"score/{model}": right for model, right in RIGHT.items()}
    about = {"format": 1, "base": "tiny", "experts": EXPERTS, "owners": [0, 1, 1]}
    centres = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float16)
    coded = program.base64.b64encode(centres.tobytes()).decode()
    path = tmp_path / "tiny.parquet"
    program.write(path, {"phatgoose": json.dumps(about), "centres": coded}, columns)
    return path


def lines_of(marks, rules) -> dict:
    (held,) = read_marks(marks)
    chosen = {name: chosen_by(held, rule) for name, rule in rules.items()}
    found = replay(held, chosen)
    return {each.wording: {line.name: line for line in each.lines} for each in found}


def test_a_router_s_first_choices_are_scored_by_the_experts_own_marks(marks):
    found = lines_of(marks, {"centroid": router_rule("centroid")})
    new, unseen = found["new"], found["unseen"]
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
    assert new["base"].own is None
    # The scores differ by less than float16 tells, and moods is still first.
    assert unseen["centroid"].score.value == 0.0
    assert unseen["oracle*"].score.value == 1.0
    assert "own expert" not in unseen
    assert unseen["centroid"].kept is None


def test_intervals_hold_the_values_and_vanish_where_nothing_varies(marks):
    new = lines_of(marks, {"never": lambda _: None})["new"]
    for line in new.values():
        assert line.score.low <= line.score.value <= line.score.high
    assert (new["never"].gain.low, new["never"].gain.high) == (0, 0)  # in pairs
    assert new["base"].score.high > new["base"].score.low


def test_a_rule_sees_features_and_neither_task_nor_answer(marks):
    seen: list[Prompt] = []

    def nearest(prompt: Prompt) -> str:
        seen.append(prompt)
        return max(EXPERTS, key=lambda name: (prompt.centres[name] @ prompt.embedding).max())

    new = lines_of(marks, {"nearest": nearest})["new"]
    assert new["nearest"].own == 1.0
    assert set(vars(seen[0])) == {"hash", "embedding", "scores", "centres"}
    assert seen[1].hash == f"{1:016x}"
    assert seen[2].scores["centroid"] == pytest.approx({"kinds": 0.1, "moods": 0.8}, abs=1e-3)
    assert [len(seen[0].centres[name]) for name in EXPERTS] == [1, 2]


def test_of_weights_the_heaviest_is_scored_with_a_warning(marks):
    (held,) = read_marks(marks)
    with pytest.warns(UserWarning, match="5 of 5 choices are mixtures"):
        chosen = chosen_by(held, lambda _: {"kinds": 0.4, "moods": 0.6})
    assert chosen.tolist() == [1] * 5
    assert chosen_by(held, lambda _: {"moods": 1.0}).tolist() == [1] * 5
    assert chosen_by(held, lambda _: {}).tolist() == [-1] * 5


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            router_rule("arrow"),
            "no choices of 'arrow', but of centroid; research/marks.py stores",
        ),
        (lambda prompt: max([]), "The rule failed on prompt [0-9a-f]+: .*empty"),
        (lambda _: sys.exit(3), "The rule failed on prompt [0-9a-f]+: 3"),
        (lambda _: "birds", "'birds'. Experts are kinds, moods"),
        (lambda _: ["kinds"], "The rule failed on prompt [0-9a-f]+: unhashable"),
        (lambda _: {"kinds": None, "moods": 1.0}, "The rule failed on prompt [0-9a-f]+: '>'"),
    ],
)
def test_what_can_t_be_replayed_is_refused(marks, rule, message):
    (held,) = read_marks(marks)
    with pytest.raises(ConfigError, match=message):
        chosen_by(held, rule)


@pytest.mark.parametrize(
    "name", ["nothing", "no.such.module:rule", "json:no_rule", "mine:rule", "quits:rule"]
)
def test_rules_that_can_t_be_imported(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def rule(prompt)\n")
    (tmp_path / "quits.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ConfigError, match=r"^Rule .* can't be imported"):
        imported_rule(name)


def test_files_that_hold_no_marks(program, tmp_path, marks):
    table = parquet.read_table(marks)
    about = json.loads(table.schema.metadata[b"phatgoose"])
    few = table.select(["prompt", "task", "wording", "score/base", "choice/centroid", *SCORES])
    one = few.slice(0, 1)
    many = pa.concat_tables([one] * 2**12).combine_chunks()
    for held, changes, complaint in (
        (pa.concat_tables([many] * 2**11), {}, "it says that it holds 67108864 numbers"),
        (few.slice(0, 0), {}, "it says that it holds 0 numbers"),
        (few.drop_columns(["wording"]), {}, "no column wording"),
        (few.drop_columns(list(SCORES[:1])), {}, "no column score/expert/kinds"),
        (few, {"experts": ["kinds", "kinds"]}, "experts ['kinds', 'kinds']"),
        (few, {"experts": ["kinds"]}, "cannot reshape"),
        (few, {"format": 9}, "format 9; this phatgoose reads 1"),
        (one.set_column(1, "task", pa.array([None], "string")), {}, "are valid indices"),
        (
            one.set_column(2, "wording", pa.array(["odd"])),
            {},
            "column wording has empty or unknown cells",
        ),
        (
            one.set_column(3, "score/base", pa.array([None], "float32")),
            {},
            "has empty or unknown cells",
        ),
        (one.set_column(3, "score/base", pa.array(["x"])), {}, "could not convert"),
        (one.set_column(4, "choice/centroid", pa.array([1.0])), {}, "flatten"),
        (one.set_column(1, "task", pa.array([[1]])), {}, "dictionary"),
        (one, {"owners": {}}, "len"),
    ):
        held = held.replace_schema_metadata({"phatgoose": json.dumps(about | changes)})
        parquet.write_table(held, tmp_path / "odd.parquet", compression="zstd")
        with pytest.raises(EvaluationError, match=f"holds no marks: .*{re.escape(complaint)}"):
            read_marks(tmp_path / "odd.parquet")
    (tmp_path / "odd.parquet").write_bytes(b"PAR1 is not enough")
    for place in (tmp_path / "nowhere", tmp_path / "..", tmp_path):
        with pytest.raises(EvaluationError, match="holds no marks"):
            read_marks(place)


def test_a_long_text_in_many_rows_is_held_once(marks):
    table = parquet.read_table(marks).slice(0, 1)
    long = pa.DictionaryArray.from_arrays([0] * 2**19, ["x" * 2**20])
    rows = {
        name: table[name].take([0] * 2**19) for name in ("task", "wording", "score/base", *SCORES)
    }
    parquet.write_table(pa.table({"prompt": long} | rows, metadata=table.schema.metadata), marks)
    (held,) = read_marks(marks)
    assert held.columns["prompt"][0] is held.columns["prompt"][-1]


def test_marks_are_made_of_task_files_that_no_suite_names(program, tmp_path):
    rows = "\n".join(json.dumps({"input": f"Is {i} odd?", "target": "no"}) for i in range(50))
    for file in ("own-new/kinds", "own-new/strangers", "eval/riddles"):
        path = tmp_path / f"{file}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(rows)
    pool = SimpleNamespace(names=("kinds",))
    sets = program.evaluation_sets(tmp_path, pool, 3, 30, ranked=False)
    found = {key: len(each.examples) for key, each in sets.items()}
    assert found == {
        ("new", "kinds", 0): 3,
        ("unseen", "riddles", 0): 20,
        ("unseen", "riddles", 1): 10,
    }
    more = program.evaluation_sets(tmp_path, pool, 40, 40, ranked=False)
    assert more["unseen", "riddles", 0].digest == sets["unseen", "riddles", 0].digest
    assert more["new", "kinds", 0].examples[:3] == sets["new", "kinds", 0].examples
    asked = [
        example.input for key, each in more.items() if key[0] == "new" for example in each.examples
    ]
    assert len(set(asked)) == 40
    assert set(program.evaluation_sets(tmp_path, pool, 3, 2, ranked=True)) == {("new", "kinds", 0)}
    with pytest.raises(SystemExit, match="no task files in own-known, own-new, eval"):
        program.evaluation_sets(tmp_path / "eval", pool, 3, 2, ranked=False)


def test_the_command_prints_a_table_for_each_wording(marks, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rules.py").write_text("def moods(prompt):\n    return 'moods'\n")
    monkeypatch.chdir(tmp_path)
    numbers = tmp_path / "numbers.json"
    options = ["--router", "centroid", "--rule", "my_rules:moods", "--json", str(numbers)]
    out = run(capsys, "replay", marks, *options).out
    sys.modules.pop("my_rules", None)
    assert "tiny, new: 2 tasks, 4 examples" in " ".join(out.split())
    assert "my_rules:moods" in out
    content = json.loads(numbers.read_text())
    assert [each["wording"] for each in content] == ["new", "unseen"]
    lines = {line["name"]: line for line in content[0]["lines"]}
    assert lines["my_rules:moods"]["score"]["value"] == 0.75
    hint = run(capsys, "replay", marks).err
    assert "Next, score a rule: --router NAME (centroid), or --rule" in hint


def test_marks_are_what_evaluate_scores(program, llama, llama_pool):
    """Tasks that are scored together, for full batches, have the scores of each alone."""
    settings = ScoringSettings(max_new_tokens=4)
    sets = {
        ("new", "choosing", 0): EvaluationSet.of(CHOOSING, settings),
        ("unseen", "choosing", 0): EvaluationSet.of(CHOOSING, settings),
        ("new", "open", 0): EvaluationSet.of(OPEN, settings),
    }
    pool = llama_pool.select(["e1"])
    parts = list(program.alike(sets))
    assert [list(some) for some in parts] == [list(sets)[:2], list(sets)[2:]]
    found = {}
    with program.composed(llama, pool, "single"):
        for some in parts:
            found |= program.scored(llama, some)
    model = compose(pool, llama, router="single")
    wanted = evaluate(model, [CHOOSING, OPEN], max_new_tokens=4)
    detach(model)
    for score, names in zip(wanted.scores, (("new", "unseen"), ("new",)), strict=True):
        for name in names:
            cell = found[name, score.task, 0]
            assert cell["score"] == [float(each.correct) for each in score.predictions]
            for likelihoods, each in zip(cell["likelihoods"], score.predictions, strict=True):
                assert likelihoods == pytest.approx(each.scores, abs=2e-4)


def test_products_with_centres_survive_in_their_space(program, llama_pool, monkeypatch):
    rows = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    held = SimpleNamespace(rows=rows, owners=torch.tensor([0, 0, 1]))
    pool = SimpleNamespace(experts=[SimpleNamespace(has=lambda _: True)])
    monkeypatch.setitem(program.basis_of.__globals__, "clusters_of", lambda *_: held)
    basis, prompts = program.basis_of(pool), torch.randn(5, 8)
    assert basis.shape == (8, 3)
    torch.testing.assert_close((prompts @ basis) @ (rows @ basis).T, prompts @ rows.T)
    assert program.basis_of(SimpleNamespace(experts=[SimpleNamespace(has=lambda _: False)])) is None


def test_published_marks_have_no_text_and_are_replayed():
    folder = ROOT / "research" / "marks"
    assert all(path.stat().st_size <= 5_000_000 for path in folder.glob("*.parquet"))
    for marks in read_marks(folder):
        texts = {name for name, held in marks.columns.items() if held.dtype == object}
        assert texts == {"prompt", "task", "wording"}
        assert all(re.fullmatch("[0-9a-f]{16}", each) for each in marks.columns["prompt"])
        new, *_ = replay(marks, {"discriminant": chosen_by(marks, router_rule("discriminant"))})
        lines = {line.name: line.score.value for line in new.lines}
        assert new.wording == "new"
        assert lines["own expert"] >= lines["discriminant"] - 0.05 > lines["base"]
