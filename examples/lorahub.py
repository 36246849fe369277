"""LoraHub's adapters of flan-t5-large, ready for phatgoose (docs/tutorials/lorahub.md):

    python examples/lorahub.py --names names.txt --adapters adapters --data flanv2 --out ready

`adapters` holds a folder NAME for each adapter, as the Hub has it: adapter_config.json and
adapter_model.safetensors or adapter_model.bin. `flanv2` is a copy of the dataset lorahub/flanv2: a
file of JSON lines for each task, NAME.json or NAME:VERSION.json, with `inputs` and `targets`.
This writes ready/adapters/NAME and ready/tasks/NAME.jsonl, of --most rows each, drawn by a seed.

A file .bin is a pickle, which could run code. A process of its own reads it by
`torch.load(weights_only=True)`, which refuses all but tensors, and writes safetensors. --out
appears when all is checked.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from phatgoose.errors import ExpertError, PhatgooseError, TaskError
from phatgoose.experts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_WEIGHTS
from phatgoose.files import new_directory, one_line, reading, regular_file
from phatgoose.names import check_name


def convert(source, target):
    """Write the tensors of `source`, a pickle, into `target`. This runs in a process of its own."""
    content = torch.load(source, weights_only=True, map_location="cpu")
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError("wanted tensors by name")
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, target)


def write_adapter(source, target):
    """Copy the adapter in the folder `source` into the new folder `target`, as safetensors."""
    target.mkdir(parents=True)
    with reading(source):
        shutil.copyfile(source / ADAPTER_CONFIG, target / ADAPTER_CONFIG)
        if (source / ADAPTER_WEIGHTS).exists():
            shutil.copyfile(source / ADAPTER_WEIGHTS, target / ADAPTER_WEIGHTS)
            return
    pickled = regular_file(source / PICKLED_WEIGHTS).resolve()
    command = [sys.executable, __file__, "--convert", pickled, target / ADAPTER_WEIGHTS]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"its reader ended with {done.returncode}"]
        raise ExpertError(f"{source / PICKLED_WEIGHTS} is no adapter's file of tensors: {told[-1]}")


def task_file(folder, name):
    """The file of the task that adapter `name` was trained on."""
    # LoraHub's run.sh names an adapter after what comes before the version.
    found = [path for path in folder.glob("*.json") if path.stem.partition(":")[0] == name]
    if len(found) != 1:
        raise TaskError(
            f"{folder} has {len(found)} files {name}.json or {name}:VERSION.json, not 1."
        )
    return found[0]


def write_task(source, target, most):
    """Write `most` rows of `source`, drawn by a seed, into `target`, as a task file."""
    with reading(source):
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        pairs = [{"input": row["inputs"], "target": row["targets"]} for row in rows]
    told = [pair for pair in pairs if pair["input"].strip() and pair["target"].strip()]
    chosen = random.Random(0).sample(told, min(most, len(told)))
    lines = [json.dumps(pair) + "\n" for pair in chosen]
    target.parent.mkdir(exist_ok=True)
    target.write_text("".join(lines), encoding="utf-8")


def main(words):
    """0 after what the command line `words` ask for, 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", type=Path, required=True, help="file of names, one a line")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapters' folders")
    parser.add_argument("--data", type=Path, required=True, help="copy of lorahub/flanv2")
    parser.add_argument("--most", type=int, default=5000, help="rows of each task")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    try:
        if words[:1] == ["--convert"]:
            with reading("The file"):  # torch raises errors of many kinds
                return convert(*map(Path, words[1:]))
        given = parser.parse_args(words)
        with reading(given.names):
            names = given.names.read_text(encoding="utf-8").split()
        with new_directory(given.out, ExpertError) as work:
            for name in names:
                check_name(name)
                write_adapter(given.adapters / name, work / "adapters" / name)
                source = task_file(given.data, name)
                write_task(source, work / "tasks" / f"{name}.jsonl", given.most)
        print(f"{len(names)} adapters and their tasks in {given.out}")
    except PhatgooseError as problem:
        print(one_line(problem, 600), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
