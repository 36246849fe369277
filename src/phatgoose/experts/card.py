"""The model card of an expert, which its Hub page shows."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from ..base import is_hub_id
from ..files import one_line
from ..passes import ActsOn
from .registry import kinds

CARD = """\
---
{front}library_name: {library}
tags:
- phatgoose
- {tag}
---

# {name}

{kind} expert for `{base_id}` with PHATGOOSE gates (Muqeeth et al. 2024): one vector per module that
lets a pool of such experts choose, for every token and at every module, who acts.

- Base model: `{base_id}`{revision}
- Base fingerprint: `{fingerprint}`
- Adapted modules: {sites}
{acts_on}{task}{hyperparameters}{metrics}
## Use
{alone}
Routed together with others:

```python
import phatgoose as pg
model = pg.compose(pg.Pool.open(["path/to/{name}", "path/to/another"]))
```
"""

ALONE = """
As an ordinary adapter: `PeftModel.from_pretrained(base_model, "path/to/{name}")` of PEFT.
"""

LONGEST_CELL = 500


def model_card(info: Mapping[str, Any], kind: str, sites: int, *, copied: bool = False) -> str:
    """The card of an expert of this `kind`, in Markdown; `info` is what `phatgoose.json` says.

    `copied` says that PEFT's files of it stand beside ours.
    """
    in_peft = copied or kinds()[kind].peft_type is not None
    base = info["base"]
    # In YAML an id without an owner might be a number.
    quoted = base["id"] if "/" in base["id"] else json.dumps(base["id"])
    return CARD.format(
        name=info["name"],
        front=f"base_model: {quoted}\n" if is_hub_id(base["id"]) else "",
        base_id=code(base["id"]),
        revision=f" at revision `{code(base['revision'])}`" if base["revision"] else "",
        fingerprint=code(base["fingerprint"] or "not recorded"),
        sites=sites,
        acts_on=_acts_on(info.get("acts_on"), in_peft=in_peft, copied=copied),
        kind=kinds()[kind].title,
        tag=kind if in_peft else "adapter",
        library="peft" if in_peft else "phatgoose",
        alone=ALONE.format(name=info["name"]) if in_peft else "",
        task=_section("Task", info["task"]),
        hyperparameters=_section("Hyper-parameters", info["hyperparameters"]),
        metrics=_section("Metrics", info["metrics"]),
    )


def _acts_on(record: Mapping[str, Any] | None, *, in_peft: bool, copied: bool) -> str:
    acts_on = ActsOn.of(record)
    if acts_on is None:
        return ""
    alone = in_peft and (copied or not acts_on.invocation)
    warning = " PEFT alone doesn't know this and lets it act on all tokens." if alone else ""
    return f"- Acts on: {code(str(acts_on))}; before that the base is itself.{warning}\n"


def _cell(value: object) -> str:
    text = html.escape(one_line(value, LONGEST_CELL), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def code(text: object) -> str:
    """`text` as it may stand between backticks, whoever wrote it."""
    return one_line(text).replace("`", "'")


def _section(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in values.items())
    return f"\n## {title}\n\n| | |\n|---|---|\n{rows}\n"
