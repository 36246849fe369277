"""Model cards: what they say, and nothing that others made them say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paths import GOLDENS
from phatgoose.base.identity import BaseReference
from phatgoose.experts.expert import Expert, model_card

HOSTILE = "<script>alert(1)</script> | `x` [a](javascript:b)\n\n# Title\n<img src=x>"
INFO = Expert.load(GOLDENS / "expert").info


@pytest.mark.parametrize("key", ["task", "hyperparameters", "metrics"])
def test_what_others_wrote_is_indented_and_so_no_markdown(key):
    info = replace(INFO, **{key: {HOSTILE: HOSTILE, "long": "x" * 10**6, "lines": [HOSTILE]}})
    card = model_card(info, "lora")
    assert "javascript" in card
    for line in card.splitlines():
        assert line.startswith("    ") or not ("script" in line or "Title" in line or "img" in line)
    assert len(card) < 10_000


def test_a_base_of_any_name_keeps_the_front_matter_of_a_card_whole():
    """The Hub refuses a card whose base_model it can't know."""
    yaml = pytest.importorskip("yaml")
    hostile = ("a: [b", "{}", "'", "# x", "!!python/object:os.system", "a`<b>")
    paths = ("./llama", "/models/llama", "models/of/mine", "C:\\llama", "models/läma")
    for base in (*hostile, *paths, "me/base-1.0"):
        card = model_card(replace(INFO, base=BaseReference(base)), "lora")
        front = yaml.safe_load(card.split("---")[1])
        assert front.get("base_model") == (base if base == "me/base-1.0" else None)
        assert front["library_name"] == "peft"
        page = card.partition("## phatgoose.json")[0].partition("# golden")[2]
        assert page.count("`") % 2 == 0


def test_the_card_names_the_bundled_base_as_the_hub_knows_it():
    card = model_card(replace(INFO, base=BaseReference("smollm2")), "lora")
    assert "\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card
    assert "expert for `smollm2`" in card


def test_the_card_says_what_peft_can_load():
    ours, pefts = model_card(INFO, "bottleneck"), model_card(INFO, "ia3")
    assert "library_name: phatgoose" in ours
    assert "PeftModel" not in ours
    assert "library_name: peft" in pefts
    assert "PeftModel.from_pretrained" in pefts
    assert "(IA)³ expert" in pefts
    last = model_card(replace(INFO, acts_on={"tail": 3}), "lora")
    assert "lets it act on all tokens" in last
