"""Other people's words in our messages: short, printable, on one line."""

from __future__ import annotations

import errno

from phatgoose.files.strict import first_line, one_line, reason, shortened


def test_a_text_of_others_is_one_printable_line_of_bounded_length():
    assert one_line("a\nb\x1b[31mc") == "a b [31mc"
    assert one_line("x" * 400) == "x" * 300 + "…"
    assert shortened("y" * 100) == "'" + "y" * 79 + "…"


def test_an_error_is_told_by_its_first_line_or_its_type():
    assert first_line(ValueError("  first\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"


def test_the_reason_is_the_systems_where_there_is_one():
    assert reason(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert reason(ValueError("odd")) == "odd"
