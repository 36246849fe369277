"""Every Triton program as a GPU would get it, compiled ahead of time without one.

    python tests/support/compiled_programs.py TARGET DTYPE [largest]

prints a JSON line for each launch that `kernels.triton_gpu` can choose on that target (80, 90 or
100, the compute capability times ten) and type (fp32, bf16 or fp16), or for those with the largest
blocks: registers and bytes of stack a thread, bytes of shared memory, and how many instructions of
tensor cores there are. TRITON_INTERPRET must not be 1.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phatgoose.routing.kernels import triton_programs as programs
from phatgoose.routing.kernels.triton_gpu import computed_features, loaded_features

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
POINTERS = {  # what they point at where it isn't the model's own type
    **dict.fromkeys(("scores", "weights", "inner"), "*fp32"),
    **dict.fromkeys(("owners", "rows", "counts", "places", "firsts"), "*i32"),
    "experts": "*i64",
}
OWN = ("u", "vectors", "A", "B", "parts", "delta")  # of the model's type
SIZES = ("n", "d")  # a multiple of 16, or not


@dataclass(frozen=True)
class Launch:
    """One way to start a program; `aligned` says that n and d are multiples of 16."""

    program: str
    constants: dict[str, object]
    aligned: bool
    warps: int = 4
    stages: int = 3

    def compiled(self, dtype: str, target: int) -> dict[str, object]:
        """What it takes of the GPU."""
        function = getattr(programs, self.program)
        signature = {name: self._type(name, dtype) for name in function.arg_names}
        sixteens = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(function.arg_names)
            if signature[name].startswith("*") or (self.aligned and name in SIZES)
        }
        made = triton.compile(
            ASTSource(function, signature, constexprs=self.constants, attrs=sixteens),
            target=GPUTarget("cuda", target, 32),
            options={"num_warps": self.warps, "num_stages": self.stages},
        )
        registers, stack = usage(made.asm["cubin"])
        return {
            "program": self.program,
            "aligned": self.aligned,
            **self.constants,
            "registers": registers,
            "stack": stack,
            "shared": made.metadata.shared,
            "tensor": len(re.findall(r"mma\.sync|wgmma|tcgen05\.mma", made.asm["ptx"])),
        }

    def _type(self, name: str, dtype: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name in OWN:
            return f"*{dtype}"
        return POINTERS.get(name, "fp32" if name == "eps" else "i32")


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread: a program that spills has a stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told).groups()
    return int(registers), int(stack)


def launches(dtype: str) -> Iterator[Launch]:
    """Every launch that can be chosen for models of `dtype`, up to 4096 experts and k = 64."""
    size = ITEMSIZE[dtype]
    for aligned in (True, False):
        n = d = 64 if aligned else 63
        wide, computed = {"WIDE": False}, {"BLOCK_D": computed_features(size, d)}
        loaded = {"BLOCK_N": loaded_features(size, n)}
        for standard, T in itertools.product((True, False), (16, 32)):
            common = {"STANDARDISED": standard, **wide, "BLOCK_T": T, **loaded}
            for E, K in ((16, 2), (16, 16), (32, 2), (32, 32), (64, 2), (64, 64)):
                both = {**common, "BLOCK_E": E, "BLOCK_K": K}
                yield Launch("score_and_choose", both, aligned)
            yield Launch("score_experts", {**common, "BLOCK_E": 16 if T == 16 else 64}, aligned)
        for T in (16, 32, 64):
            for R in (16, 32, 64):
                blocks = {**wide, "BLOCK_T": T, "BLOCK_R": R, **loaded}
                yield Launch("shrink_block", blocks, aligned)
            blocks = {**wide, "BLOCK_T": T, "BLOCK_R": 16, **computed}
            yield Launch("expand_block", blocks, aligned)
        yield from launches_apart(computed, aligned)
    for E, K in itertools.product((128, 1024, 4096), (2, 64)):
        warps = min(max(E // 256, 1), 8)
        yield Launch("choose_experts", {"BLOCK_E": E, "BLOCK_K": K}, True, warps)
    yield Launch("count_pairs", {"BLOCK": 512}, True)
    for T in (16, 64):
        yield Launch("place_pairs", {"BLOCK_T": T, "BLOCK": 512}, True)
        for E in (16, 4096):
            yield Launch("arrange_experts", {"BLOCK_T": T, "BLOCK_E": E}, True)


def launches_apart(computed: dict[str, int], aligned: bool) -> Iterator[Launch]:
    """Those of the programs that take one pair or token each."""
    for E, chooses in ((1, False), (64, True), (256, True), (4096, True)):
        blocks = {"CHOOSES": chooses, "BLOCK_E": E, "BLOCK_R": 4, "BLOCK_N": 512}
        yield Launch("shrink_pair", blocks, aligned)
    for added in (True, False):
        yield Launch("expand_token", {"ADDED": added, "BLOCK_R": 16, **computed}, aligned)
        yield Launch("add_choices", {"ADDED": added, "BLOCK_D": 1024}, aligned)


def largest(every: Iterator[Launch]) -> list[Launch]:
    """For each program, alignment and flags the one with the largest blocks."""
    kinds: dict[tuple[object, ...], list[Launch]] = {}
    for launch in every:
        flags = [value for value in launch.constants.values() if isinstance(value, bool)]
        kinds.setdefault((launch.program, launch.aligned, *flags), []).append(launch)
    return [max(kind, key=lambda each: sum(blocks_of(each))) for kind in kinds.values()]


def blocks_of(launch: Launch) -> list[int]:
    return [size for name, size in launch.constants.items() if name.startswith("BLOCK")]


if __name__ == "__main__":
    every = launches(sys.argv[2])
    for launch in largest(every) if "largest" in sys.argv else every:
        found = launch.compiled(sys.argv[2], int(sys.argv[1]))
        print(json.dumps(found), flush=True)  # noqa: T201  it is a program
