"""The libFuzzer target of the native kernel: build it, and run it on its corpus.

python tests/fuzz/kernel.py SECONDS [FOLDER]      new inputs go to FOLDER, if one is named
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
CORPUS = Path(__file__).parent / "corpus" / "kernel"
COMPILERS = ("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))
SANITIZERS = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined")
# OpenMP is left out: its pragmas are none of this compiler's business then.
FLAGS = ("-std=c++17", "-O1", "-g", "-march=native", "-w", *SANITIZERS)
LIMITS = ("-max_len=512", "-timeout=20", "-verbosity=0", "-print_final_stats=1")
MISSING = "no clang++ that has libFuzzer; 'apt-get install clang' brings one"


def built(folder: Path) -> Path | None:
    """The fuzzer, compiled into `folder`; None where no compiler can."""
    program = folder / "kernel"
    for compiler in filter(None, map(shutil.which, COMPILERS)):
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(program)]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return program
    return None


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the fuzzer, as libFuzzer's `arguments` say."""
    return subprocess.run([program, *arguments], stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        fuzzer = built(Path(place))
        if fuzzer is None:
            sys.exit(MISSING)
        found = sys.argv[2] if len(sys.argv) > 2 else place
        done = run(fuzzer, found, str(CORPUS), f"-max_total_time={sys.argv[1]}", *LIMITS)
    sys.stderr.write(done.stderr)
    sys.exit(done.returncode)
