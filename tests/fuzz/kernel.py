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

if __name__ == "__main__":
    seconds, *folders = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        program = f"{place}/kernel"
        for compiler in filter(None, map(shutil.which, COMPILERS)):
            command = [compiler, *FLAGS, str(SOURCE), "-o", program]
            if subprocess.run(command, capture_output=True).returncode == 0:
                break
        else:
            sys.exit("no clang++ that has libFuzzer; 'apt-get install clang' brings one")
        command = [program, *(folders or [place]), str(CORPUS)]
        sys.exit(subprocess.run([*command, f"-max_total_time={seconds}", *LIMITS]).returncode)
