"""Tokens in the colours of their experts."""

from __future__ import annotations

from phatgoose.apps.console import COLOURS, coloured, expert_style


def test_tokens_have_their_experts_colours_above_a_legend():
    text = coloured([("a", 0, False), ("b", None, False), ("c", 8, True)], {8: "eighth"})
    assert text.plain == "abc\n\n eighth  "
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles == {
        "a": COLOURS[0],
        "c": f"{COLOURS[1]} underline bold",
        " eighth ": f"reverse {COLOURS[1]} underline",
    }


def test_every_expert_of_two_rounds_has_a_style_of_its_own():
    assert len({expert_style(expert) for expert in range(2 * len(COLOURS))}) == 2 * len(COLOURS)
