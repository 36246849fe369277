"""The store of finished results."""

import json
import re
from pathlib import Path

import pytest

from phatgoose.errors import EvaluationError
from phatgoose.evaluation.comparison.result_store import ResultStore

KEY = {"task": "a", "method": {"k": 2, "pool": ["x", "y"]}}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new" / "results.jsonl"


def filled(path: Path, count: int) -> ResultStore:
    store = ResultStore(path)
    for number in range(count):
        store.add({"n": number}, {"score": number / 7})
    return store


def test_what_was_added_is_found_now_and_later(path):
    store = ResultStore(path)
    assert (len(store), store.get(KEY), path.exists()) == (0, None, False)
    store.add(KEY, {"score": 0.1, "answers": ["ü", 'a "quoted"\nline']})
    for each in (store, ResultStore(path)):
        assert len(each) == 1
        assert each.get(KEY) == {"score": 0.1, "answers": ["ü", 'a "quoted"\nline']}


def test_a_key_is_its_content_whatever_the_order_and_kind_of_its_parts(path):
    ResultStore(path).add(KEY, {"score": 1})
    turned = {"method": {"pool": ("x", "y"), "k": 2}, "task": "a"}
    assert ResultStore(path).get(turned) == {"score": 1}
    for other in ({**KEY, "task": "b"}, {**KEY, "method": {"k": 1, "pool": ["x", "y"]}}, {}):
        assert ResultStore(path).get(other) is None


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x1e", "\r", "\x0b"])
def test_marks_that_some_take_for_the_end_of_a_line_stay_within_theirs(path, mark):
    ResultStore(path).add(KEY, {"answers": [f"before{mark}after"]})
    assert ResultStore(path).get(KEY) == {"answers": [f"before{mark}after"]}


def test_each_result_is_a_line_on_the_disk_when_add_returns(path):
    store = ResultStore(path)
    for number in range(3):
        store.add({"n": number}, {"score": number})
        lines = path.read_text().splitlines()
        assert json.loads(lines[-1]) == {"key": {"n": number}, "result": {"score": number}}
        assert len(lines) == number + 1


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_last_line_that_was_cut_off_goes_with_a_warning(path, cut):
    filled(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.warns(UserWarning, match=r"results\.jsonl: the last result was cut off; dropped"):
        store = ResultStore(path)
    assert [store.get({"n": n}) is None for n in range(3)] == [False, False, True]
    store.add({"n": 2}, {"score": 2 / 7})
    assert path.read_bytes() == whole
    assert len(ResultStore(path)) == 3  # and nothing is left to warn of


def test_a_file_that_holds_half_a_line_is_empty_and_stays_until_something_is_added(path):
    path.parent.mkdir()
    path.write_text('{"key": {"n"')  # it may be another process that is writing it now
    with pytest.warns(UserWarning, match="cut off"):
        store = ResultStore(path)
    assert len(store) == 0
    assert path.read_text() == '{"key": {"n"'
    store.add({"n": 0}, {})
    assert path.read_text() == '{"key": {"n": 0}, "result": {}}\n'


def test_of_two_who_want_to_add_results_the_second_is_told(path):
    with ResultStore.alone(path) as first:
        first.add({"n": 0}, {})
        with (
            pytest.raises(EvaluationError, match=r"Another process is adding results to .*; wait"),
            ResultStore.alone(path),
        ):
            pass
        assert len(ResultStore(path)) == 1  # reading is for everyone
    with ResultStore.alone(path) as second:
        second.add({"n": 1}, {})
    assert len(ResultStore(path)) == 2


@pytest.mark.parametrize(
    "line", ["{not json", "", "[]", "7", '{"key": {}}', '{"result": {}}', '{"key": {"n": 0}, "re']
)
def test_a_broken_line_among_others_names_the_file(path, line):
    filled(path, 2)
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{line}\n{second}\n")
    with pytest.raises(EvaluationError, match=rf"{re.escape(str(path))} is no file of results"):
        ResultStore(path)
    assert path.read_text() == f"{first}\n{line}\n{second}\n"  # left as it was


def test_a_place_that_cannot_be_read_or_written_is_told(path, tmp_path):
    (tmp_path / "other").write_bytes(b"\xff\xfe\n")
    with pytest.raises(EvaluationError, match="can't be read"):
        ResultStore(tmp_path / "other")
    path.mkdir(parents=True)
    with pytest.raises(EvaluationError, match=r"results\.jsonl is not a regular file"):
        ResultStore(path)
    (path / "file").write_text("")
    store = ResultStore(path / "file" / "results.jsonl")
    with pytest.raises(EvaluationError, match="can't be written"), ResultStore.alone(store.path):
        pass
    with pytest.raises(EvaluationError, match=r"results\.jsonl can't be written: File exists"):
        store.add(KEY, {})
    assert store.get(KEY) is None
