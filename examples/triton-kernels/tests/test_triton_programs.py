"""The Triton programs as GPUs get them, compiled without one: no register spills to memory."""

import os
import subprocess
import sys
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from phatgoose_triton import triton_gpu as kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = {torch.int64: "i64", torch.int32: "i32", int: "i32", float: "fp32"}
TYPES |= {each: name for name, each in DTYPES.items()}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("target", "dtype"), [(t, d) for t in ("80", "90", "100") for d in DTYPES])
def test_no_program_spills(target, dtype, tmp_path):
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": tmp_path, "TRITON_DUMP_PTXAS_LOG": "1"}
    run = [sys.executable, __file__, target, dtype]
    told = subprocess.check_output(run, env=os.environ | own).decode()
    stacks = [line.strip() for line in told.splitlines() if "spill" in line]
    assert set(stacks) == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
    assert len(stacks) > 25  # some launches are of one program


def launches(dtype: torch.dtype) -> list:
    """What the kernel starts with its largest blocks: name, arguments and constants of each."""
    programs, like = mock.MagicMock(), {"dtype": dtype, "device": "meta"}
    with mock.patch.object(kernel, "_programs", return_value=programs):
        for n in (64, 63):  # rows that begin at multiples of 16 bytes, or don't; all else is odd
            u, A = torch.empty(2**18 + 1, n, **like), torch.empty(4095, 63, n, **like)
            for y, eps in ((None, 1e-5), (u, None)):
                kernel.top_experts(u, A[:63, 0], 63, eps)
                experts, _ = kernel.top_experts(u, A[:, 0], 63, eps)
                kernel.add_routed(u[:9], u[:9], (A[:, 0], A, A), 1, eps)
                kernel.one_by_one(u, experts[:, :1], u[:, :1], A, A, y)
                kernel.in_blocks(u, experts[:, :1], u[:, :1], A, A, y)
    return list({str(call): call for call in programs.mock_calls if call[2]}.values())


if __name__ == "__main__":
    from triton import backends, compile, compiler

    target = backends.compiler.GPUTarget("cuda", int(sys.argv[1]), 32)
    programs = kernel._programs()
    for name, args, how in launches(DTYPES[sys.argv[2]]):
        function = getattr(programs, name.split(".")[0])
        options = {"num_warps": how.pop("num_warps", 4)}
        types = [f"*{TYPES[a.dtype]}" if hasattr(a, "dtype") else TYPES[type(a)] for a in args]
        types = dict(zip(function.arg_names, [*types, *["constexpr"] * len(how)], strict=True))
        even = [(place,) for place, a in enumerate(args) if hasattr(a, "dtype") or a == 64]
        attrs = {place: [["tt.divisibility", 16]] for place in even}
        source = compiler.ASTSource(function, types, constexprs=how, attrs=attrs)
        compile(source, target, options)  # whose log is printed
