"""The model card of an expert: what a visitor of its Hub page reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["model_card"]

CARD = """\
---
base_model: {base_id}
library_name: {library}
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
{task}{hyperparameters}{metrics}
## Use
{alone}
Routed together with others:

```python
import phatgoose as pg
model = pg.compose(pg.Pool.open(["path/to/{name}", "path/to/another"]))
```
"""


ALONE = """
As an ordinary adapter:

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "path/to/{name}")
```
"""

KINDS = {"lora": "A LoRA", "ia3": "An (IA)³", "bottleneck": "A bottleneck-adapter"}


def model_card(info: Mapping[str, Any], kind: str, sites: int) -> str:
    """The card as Markdown with the front matter that the Hub reads.

    `kind` is the expert's, at so many `sites`; PEFT has no bottleneck adapters.
    """
    in_peft = kind != "bottleneck"
    base = info["base"]
    return CARD.format(
        name=info["name"],
        base_id=base["id"],
        revision=f" at revision `{base['revision']}`" if base["revision"] else "",
        fingerprint=base["fingerprint"] or "not recorded",
        sites=sites,
        kind=KINDS[kind],
        tag=kind if in_peft else "adapter",
        library="peft" if in_peft else "phatgoose",
        alone=ALONE.format(name=info["name"]) if in_peft else "",
        task=_section("Task", info["task"]),
        hyperparameters=_section("Hyper-parameters", info["hyperparameters"]),
        metrics=_section("Metrics", info["metrics"]),
    )


def _section(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = "\n".join(f"| {key} | {value} |" for key, value in values.items())
    return f"\n## {title}\n\n| | |\n|---|---|\n{rows}\n"
