"""Model cards: what they say, and nothing that others made them say."""

from __future__ import annotations

import json

import pytest

from paths import GOLDENS
from phatgoose.experts.expert import LAYOUT, model_card

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
        assert front.get("base_model") == (base if base == "me/base-1.0" else None)
        assert front["library_name"] == "peft"
        assert card.partition("# e")[2].count("`") % 2 == 0


def test_a_base_that_is_a_folder_is_none_of_the_hub():
    """The Hub refuses a card whose base_model it can't know."""
    info = json.loads((GOLDENS / "bottleneck" / LAYOUT.info).read_text())
    for base in ("./llama", "/models/llama", "models/of/mine", "C:\\llama", "models/läma"):
        info["base"]["id"] = base
        card = model_card(info, "bottleneck", 2)
        assert card.startswith("---\nlibrary_name: ")
        assert f"Base model: `{base}`" in card


def test_the_card_says_what_peft_can_load():
    info = json.loads((GOLDENS / "bottleneck" / LAYOUT.info).read_text())
    ours, pefts = model_card(info, "bottleneck", 2), model_card(info, "ia3", 2)
    assert "library_name: phatgoose" in ours
    assert "PeftModel" not in ours
    assert "library_name: peft" in pefts
    assert "PeftModel.from_pretrained" in pefts
    assert "(IA)³ expert" in pefts
