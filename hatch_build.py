"""Puts the compiled kernel into the wheel, if PHATGOOSE_BUILD_KERNEL=1 in the environment asks it.

Then there must be a C++ compiler with OpenMP ($CXX, else c++; on Linux GCC, whose OpenMP is torch's
too), and the wheel is one for this platform and for any Python, as it is called through ctypes.
Otherwise, and in an editable install, this does nothing: the wheel is pure, and the kernel is
compiled where it first runs.
"""

from __future__ import annotations

import os
import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("phatgoose/routing/kernels")


class KernelHook(BuildHookInterface):
    """Compiles `native.cpp` for every level of this platform's processors."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries and the platform's tag to what is built. `version` may be "editable".

        Raises OSError when the kernel is asked for and can't be compiled.
        """
        if os.environ.get("PHATGOOSE_BUILD_KERNEL") != "1" or version == "editable":
            return
        kernels = Path(self.root, "src") / KERNELS
        shipped = runpy.run_path(str(kernels / "shipped.py"), run_name="shipped")
        self.made = tempfile.TemporaryDirectory(prefix="phatgoose-kernel-")
        compiler = os.environ.get("CXX") or "c++"
        libraries = shipped["compile_levels"](
            kernels / "native.cpp", Path(self.made.name), compiler
        )
        for library in libraries:
            build_data["force_include"][str(library)] = str(KERNELS / library.name)
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled: the wheel has it."""
        if hasattr(self, "made"):
            self.made.cleanup()
