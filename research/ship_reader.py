"""What a LoRA teaches reader e5, as the package ships it: in float16, by the names of its layers.

    python research/ship_reader.py TAUGHT src/phatgoose/e5/taught.safetensors

TAUGHT is a checkpoint of teach_reader.py. Its scale goes into the second factor.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    taught, out = map(Path, sys.argv[1:])
    config = json.loads((taught / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    weights = load_file(taught / "adapter_model.safetensors")
    shipped = {}
    for name, weight in weights.items():
        layer, factor, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        is_second = factor == "lora_B"
        shipped[f"{layer}.{factor[-1]}"] = (weight * scale if is_second else weight).half()
    save_file(shipped, out)


if __name__ == "__main__":
    main()
