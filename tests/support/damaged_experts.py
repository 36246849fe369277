"""The files of an expert's directory, to be damaged, and its hashes made to fit."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from damage import content_of, json_of
from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.kinds.bottleneck.module import FILES
from phatgoose.experts.kinds.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS

JSON_FILES = (LAYOUT.info, ADAPTER_CONFIG, FILES.config)
WEIGHTS = (ADAPTER_WEIGHTS, FILES.weights)
TENSOR_FILES = (*WEIGHTS, LAYOUT.vectors, LAYOUT.embeddings)
FILES = (*JSON_FILES, *TENSOR_FILES, LAYOUT.card)


def record_hashes(folder: Path) -> None:
    """Write the files' present hashes into the description, so that deeper checks are reached."""
    try:
        info = json_of(folder / LAYOUT.info)
        weights = next((file for file in WEIGHTS if (folder / file).is_file()), WEIGHTS[0])
        for file, key in (
            (weights, "adapter"),
            (LAYOUT.vectors, "vectors"),
            (LAYOUT.embeddings, "embeddings"),
        ):
            info[f"{key}_sha256"] = sha256(content_of(folder / file)).hexdigest()
        (folder / LAYOUT.info).write_text(json.dumps(info))
    except (OSError, ValueError, TypeError):
        return
