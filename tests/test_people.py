"""The pool of people of benchmarks/people: its texts, and the cases that are made of them."""

from __future__ import annotations

import json
import random
import re
import sys
import tomllib
from collections import Counter

import pytest

from paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
SKILLS = tomllib.loads((BENCHMARKS / "people" / "skills.toml").read_text(encoding="utf-8"))
WRITTEN = {  # of each kind of text by hands 2 and 3
    "light": 8,
    "medium": 8,
    "heavy": 8,
    "corrections": 8,
    "joins": 6,
    "short": 8,
    "middle": 5,
    "long": 2,
    "code": 8,
    "sayings": 8,
    "general": 100,
    "near": 60,
    "neutral": 30,
    "helper": 12,
    "frame": 10,
    "contexts": 8,
}


@pytest.fixture
def people(monkeypatch):
    """The module people_cases of the folder benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import people_cases

    yield people_cases
    sys.modules.pop("people_cases")


def test_each_hand_wrote_sixteen_prompts_of_each_of_forty_skills(people):
    assert len(SKILLS) == 40
    for number in (1, 2, 3):
        skills = people.load_hand(number).skills
        assert set(skills) == set(SKILLS)
        assert {len(set(skill["prompts"])) for skill in skills.values()} == {16}
    others = people.load_hand(1).others
    assert len(others) == 60
    assert not set(others) & set(SKILLS)
    assert {len(set(skill["prompts"])) for skill in others.values()} == {5}


def test_no_prompt_is_in_two_hands_or_of_two_skills(people):
    prompts = Counter[str]()
    for number in (1, 2, 3):
        hand = people.load_hand(number)
        for skill in (*hand.skills.values(), *hand.others.values()):
            prompts.update(" ".join(prompt.lower().split()) for prompt in skill["prompts"])
    assert [prompt for prompt, count in prompts.items() if count > 1] == []


@pytest.mark.parametrize("number", [2, 3])
def test_hands_wrote_what_manners_are_made_of(people, number):
    hand = people.load_hand(number)
    assert set(hand.texts) == set(WRITTEN)
    for kind, texts in hand.texts.items():
        assert len(texts) == WRITTEN[kind], kind
    for kind in ("light", "medium", "heavy", "corrections", "joins", "sayings"):
        for template in hand.texts[kind]:
            names = {"joins": ("first", "second"), "sayings": ("request", "paste")}
            for name in names.get(kind, ("request",)):
                assert template.count(f"{{{name}}}") == 1, template
    for skill in hand.skills.values():
        assert all(skill[language].strip() for language in (*people.LANGUAGES, "word"))


def test_cases_are_the_same_each_time_and_owned_by_their_skill(people):
    hand = people.load_hand(3)
    every = people.cases(hand)
    assert every == people.cases(hand)
    counts = Counter(case.manner for case in every)
    for manner in ("plain", "light", "medium", "heavy", "typos 7 %", "frame", "two requests"):
        assert counts[manner] == 80, manner
    assert counts["ja"] == counts["one word"] == 40
    assert counts["general -> base"] == counts["general, polite -> base"] == 100
    for case in every:
        assert not (case.manner.endswith("-> base") and case.wanted)
        assert not case.wanted or case.owner in case.wanted


def test_manners_are_of_the_same_prompts(people):
    every = people.cases(people.load_hand(3))
    plain = {case.turns[-1][1] for case in every if case.manner == "plain"}
    lowered = {case.turns[-1][1] for case in every if case.manner == "lower case"}
    assert lowered == {prompt.lower() for prompt in plain}
    for case in every:
        if case.manner in {"heavy", "correction", "beside code"}:
            assert any(prompt in case.turns[-1][1] for prompt in plain)


def test_typos_keep_words_apart_and_spaces_as_they_are(people):
    prompts = [p for s in people.load_hand(1).skills.values() for p in s["prompts"]]
    for share in (0.03, 0.07, 1.0):
        for prompt in prompts:
            typed = people.misspelt(prompt, share, random.Random(prompt))
            assert len(typed.split()) == len(prompt.split())
            assert people.WORD.sub("", typed) == people.WORD.sub("", prompt)
    assert people.misspelt("a word", 0, random.Random(0)) == "a word"


def test_braces_of_prompts_and_templates_are_text(people):
    filled = people.filled('{"a": {request}} {paste}', request="{paste}", paste="{x}")
    assert filled == '{"a": {paste}} {x}'


PAGE = (ROOT / "docs" / "people.md").read_text(encoding="utf-8")
(OWN_ROW,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)  # most_words
MORE_ROWS = """

def nobody(pool, chats):
    return [None for _ in chats]


def strange(pool, chats):
    return ["everything" for _ in chats]
"""


@pytest.fixture
def people_table(people, tmp_path, monkeypatch):
    """`people_table.main` with a module my_rows on the path, and words as its command line."""
    pytest.importorskip("matplotlib")
    (tmp_path / "my_rows.py").write_text(OWN_ROW + MORE_ROWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    import people_table

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["people_table.py", "--only", "--draws", "1", *words])
        people_table.main()

    yield run
    for name in set(sys.modules) - before:
        if name.startswith(("people", "my_rows")):
            sys.modules.pop(name)


def test_a_row_of_ones_own_is_in_the_table_beside_those_that_are_kept(
    people_table, tmp_path, capsys
):
    people_table("--row", "my_rows:nobody", "--out", "mine")
    people_table("--row", "my_rows:most_words", "--out", "mine")
    content = json.loads((tmp_path / "mine.json").read_text())
    nobody, most_words = (content["rows"][f"my_rows:{n}"] for n in ("nobody", "most_words"))
    for manner, row in nobody.items():
        assert row["right"] == float(manner.endswith("-> base")), manner
    assert nobody["plain"]["n"] == 48  # in two pools of 24 experts
    assert 1 / 24 < most_words["plain"]["low"] <= most_words["plain"]["right"] < 1
    lines = (tmp_path / "mine.md").read_text().splitlines()
    assert lines[2].startswith("| n | 48 | 48 |")
    assert [line.split("|")[1].strip() for line in lines[3:]] == [
        "my_rows:most_words",
        "my_rows:nobody",
    ]
    assert "my_rows:nobody" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("my_rows:strange", "The row answered 'everything', which is no expert of the pool"),
        ("my_rows:missing", "--row my_rows:missing: wanted MODULE:FUNCTION"),
        ("no_such_module:row", "--row no_such_module:row: wanted MODULE:FUNCTION"),
    ],
)
def test_a_row_that_is_none_is_told(people_table, row, told):
    with pytest.raises(SystemExit, match=told):
        people_table("--row", row, "--out", "mine")
