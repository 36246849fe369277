"""kill -9 at random moments of the commands that write something.

For each command and moment a process runs the command on a tiny base and is killed. Then what it
was making must be complete or absent, and the same command, given again (with --resume where the
command has it), must finish with the very result of an undisturbed run. Commands that change a
routed model in its place (add, remove) must leave it as it was, or changed.

    python benchmarks/reliability.py --moments 50 --out runs/reliability-counts.json

Every command runs in a process forked from this one, which has loaded what the commands load, so
that moments fall into their work. They are moments of the processor's time that the process has
taken, so that they fall everywhere however busy the machine is. This process has one thread, for a
forked one could wait for ever for what another thread held.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import torch

from phatgoose.apps import tables  # noqa: F401
from phatgoose.apps.cli import main as phatgoose
from phatgoose.experts import importing  # noqa: F401  loaded before forking
from phatgoose.experts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.routing.compose import load
from phatgoose.routing.saved import SavedModel, read_saved
from phatgoose.training import train_expert  # noqa: F401  loaded before forking
from tiny import make_model, make_tokenizer

FEW = "--batch-size 4 --steps 6 --gate-steps 6 --eval-every 2 --statistics-examples 4 --rank 2"
GATES = "--batch-size 4 --gate-steps 30 --statistics-examples 4"
PATIENCE = 600  # seconds until a command is taken to hang: it says where in its log, and ends
REFUSE_WHAT_IS_DONE = ("import", "compose", "add", "remove")


# What was found of one command after each kill, and after the command was given again.
COUNTS = (
    *("moments", "finished_before", "absent", "complete"),
    *("broken", "rerun_failed", "other_result"),
)


@dataclass(frozen=True)
class Trial:
    """A command, given again as `again`, and how its result in a folder is looked at.

    `look` answers None when there is no result, otherwise what must not differ between runs; it
    raises when the result is broken. `before`, a routed model, is what the command changes.
    """

    command: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]
    look: Callable[[Path], Any]
    before: Path | None = None

    def begin(self, folder: Path) -> None:
        """Make the folder, with what the command needs there."""
        folder.mkdir()
        if self.before is not None:
            shutil.copytree(self.before, folder / "routed")


def contents(folder: Path) -> dict[str, str] | None:
    """The hashes of a folder's files, None when there is no such folder."""
    if not folder.is_dir():
        return None
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def weights_of(expert: Path) -> Any:
    """The hashes of an expert's tensors; its metrics hold speeds, which differ between runs."""
    if not expert.exists():
        return None
    Expert.load(expert)
    found = contents(expert) or {}
    return {file: found.get(file) for file in (ADAPTER_WEIGHTS, LAYOUT.vectors)}


def routed_of(folder: Path) -> Any:
    """The hashes of a routed model that loads."""
    if not folder.exists():
        return None
    load(folder)
    return contents(folder)


def changed_of(folder: Path, is_as_before: Callable[[SavedModel], bool]) -> Any:
    """The experts and the hashes of all tensors of a routed model that loads, if it changed."""
    load(folder / "routed")
    packed = read_saved(folder / "routed")
    if is_as_before(packed):
        return None
    found = {name: tensor.flatten().view(torch.uint8) for name, tensor in packed.tensors.items()}
    return packed.names, {n: sha256(found[n].numpy().tobytes()).hexdigest() for n in sorted(found)}


def comparison_of(folder: Path) -> Any:
    """The scores of a comparison without dates and times; None before its tables are written."""
    results = folder / "results.jsonl"
    if results.exists():
        for line in results.read_bytes().rpartition(b"\n")[0].splitlines():
            json.loads(line)
    if not (folder / "comparison.json").exists():
        return None
    return json.loads(
        (folder / "comparison.json").read_text(),
        object_hook=lambda d: {k: v for k, v in d.items() if k != "date" and "second" not in k},
    )


def trials(world: Path) -> dict[str, Trial]:
    """The commands that are killed, over the tiny world in `world`."""
    base, task, suite = world / "base", world / "task.jsonl", world / "suite"
    adapter, experts = world / "experts" / "first", world / "experts"
    data = f"--base {base} --dtype float32"

    def of(text: str, result: str = "") -> Callable[[Path], list[str]]:
        return lambda folder: text.replace("OUT", str(folder / result)).split()

    train = f"train {task} {data} {FEW} --out OUT"
    gate = f"gate {adapter} --task {task} {data} {GATES} --out OUT"
    imports = f"import {world / 'adapter'} --base {base} --out OUT"
    compose = f"compose {experts} {data} --out OUT"
    compare = f"compare {experts} --suites {suite} --limit 6 {data} --out OUT"

    def change(words: str, before: str, is_as_before: Callable[[SavedModel], bool]) -> Trial:
        command = of(words, "routed")
        return Trial(command, command, lambda f: changed_of(f, is_as_before), world / before)

    return {
        "train": Trial(of(train), of(f"{train} --resume"), lambda f: weights_of(f / "task")),
        "gate": Trial(
            of(gate, "mine"), of(f"{gate} --resume", "mine"), lambda f: weights_of(f / "mine")
        ),
        "import": Trial(of(imports, "mine"), of(imports, "mine"), lambda f: weights_of(f / "mine")),
        "compose": Trial(
            of(compose, "routed"), of(compose, "routed"), lambda f: routed_of(f / "routed")
        ),
        "compare": Trial(of(compare), of(compare), comparison_of),
        "add": change(f"add OUT {world / 'third'}", "two", lambda p: "third" not in p.names),
        "remove": change("remove OUT first", "three", lambda p: "first" in p.names),
    }


def start(arguments: list[str], log: Path) -> int:
    """The id of a process that runs the command, its output in `log`."""
    child = os.fork()
    if child:
        return child
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=stream)
        warnings.simplefilter("ignore")
        phatgoose(arguments)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def finish(child: int) -> int:
    """The exit status of a process, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(child: int, moment: float) -> None:
    """Come back when a process has taken `moment` seconds of the processor, or has ended."""
    while True:
        state, *numbers = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        taken = (int(numbers[10]) + int(numbers[11])) / os.sysconf("SC_CLK_TCK")
        if state == "Z" or taken >= moment:
            return
        time.sleep(0.001)


def try_moment(
    name: str, trial: Trial, folder: Path, moment: float, wanted: Any, counts: dict[str, Any]
) -> None:
    """Kill the command when it has worked for `moment` seconds, look, give it again, look again."""
    trial.begin(folder)
    log = folder.parent / f"{folder.name}.log"
    child = start(trial.command(folder), log)
    wait_for(child, moment)
    os.kill(child, signal.SIGKILL)
    counts["moments"] += 1
    counts["finished_before"] += finish(child) != -signal.SIGKILL
    try:
        found = trial.look(folder)
    except Exception as error:
        counts["broken"] += 1
        counts["remarks"].append(f"after {moment:.2f} s: {error}")
        return
    counts["absent" if found is None else "complete"] += 1
    counts["other_result"] += found is not None and found != wanted
    if found is not None and name in REFUSE_WHAT_IS_DONE:
        return  # it is there, and the command refuses to write over it
    code = finish(start(trial.again(folder), log))
    again = trial.look(folder) if code == 0 else None
    if again != wanted:
        counts["rerun_failed" if again is None else "other_result"] += 1
        counts["remarks"].append(f"after {moment:.2f} s, again: {log.read_text()[-300:]}")
    shutil.rmtree(folder)


def run(command: str, world: Path) -> None:
    """Run a command to its end. Exits with what it said when it failed."""
    log = world / "make.log"
    if finish(start(command.split(), log)) != 0:
        raise SystemExit(log.read_text())


def make_world(world: Path) -> None:
    """A tiny base, a task, a suite, an adapter, three experts, models of `two` and all `three`."""
    make_model("llama").save_pretrained(world / "base")
    make_tokenizer(final_eos=False).save_pretrained(world / "base")
    rows = [
        {"input": f"Film {i} is", "target": ("good", "bad")[i % 2], "choices": ["good", "bad"]}
        for i in range(12)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (world / "suite").mkdir()
    for path in ("task.jsonl", "first.jsonl", "second.jsonl", "third.jsonl", "suite/unseen.jsonl"):
        (world / path).write_text(text)
    data = f"--base {world / 'base'} --dtype float32"
    commands = f"""
        train {world}/first.jsonl {world}/second.jsonl {data} {FEW} --out {world}/experts
        train {world}/third.jsonl {data} {FEW} --out {world}/third
        compose {world}/experts {data} --out {world}/two
        compose {world}/experts {data} --out {world}/three
        add {world}/three {world}/third"""
    for command in commands.strip().splitlines():
        run(command, world)
    (world / "adapter").mkdir()
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(world / "experts" / "first" / file, world / "adapter")


def main() -> None:
    """Kill, look, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50, help="kills of each command")
    parser.add_argument("--only", help="commands, with commas; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the counts here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    draw = random.Random(options.seed)
    counts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        world = Path(place)
        make_world(world)
        for name, trial in trials(world).items():
            if options.only and name not in options.only.split(","):
                continue
            found = counts[name] = {**dict.fromkeys(COUNTS, 0), "remarks": []}
            whole = world / f"{name}-whole"
            trial.begin(whole)
            _, status, used = os.wait4(start(trial.command(whole), world / "whole.log"), 0)
            if status != 0:
                raise SystemExit((world / "whole.log").read_text())
            found["seconds_undisturbed"] = round(used.ru_utime + used.ru_stime, 2)
            wanted = trial.look(whole)
            for i in range(options.moments):
                moment = draw.uniform(0, found["seconds_undisturbed"])
                try_moment(name, trial, world / f"{name}-{i}", moment, wanted, found)
            print(name, json.dumps(found), flush=True)
    if options.out:
        options.out.write_text(json.dumps(counts, indent=2) + "\n")
    failed = ("broken", "rerun_failed", "other_result")
    raise SystemExit(any(found[name] for found in counts.values() for name in failed))


if __name__ == "__main__":
    main()
