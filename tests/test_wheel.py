"""The wheel: built, installed elsewhere, and used without the source tree."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import phatgoose
from paths import ROOT
from phatgoose.routing.kernels.shipped import LEVELS

pytestmark = pytest.mark.skipif(
    os.environ.get("CI") != "true" and os.environ.get("PHATGOOSE_TEST_WHEEL") != "1",
    reason="building takes a while; set PHATGOOSE_TEST_WHEEL=1 (CI does by CI=true)",
)


def python(*arguments: object, cwd: Path | None = None, **environment: str) -> str:
    command, variables = [sys.executable, *map(str, arguments)], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(folder: Path, **environment: str) -> Path:
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    how = ("--no-deps", *isolation, "--wheel-dir", folder)
    python("-m", "pip", "wheel", "-q", *how, ROOT, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    source = ROOT / "src"
    files = (p for p in (source / "phatgoose").rglob("*") if p.is_file())
    wanted = {str(p.relative_to(source)) for p in files if "__pycache__" not in p.parts}
    names = zipfile.ZipFile(wheel).namelist()
    info = f"phatgoose-{phatgoose.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == wanted
    assert f"{info}licenses/LICENSE" in names


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_asked_to_the_wheel_carries_the_kernel_and_is_one_for_the_platform(wheel, tmp_path):
    compiled = built(tmp_path, PHATGOOSE_BUILD_KERNEL="1")
    assert compiled.name.startswith(f"phatgoose-{phatgoose.__version__}-py3-none-")
    assert not compiled.stem.endswith("-any")
    pure, names = (set(zipfile.ZipFile(path).namelist()) for path in (wheel, compiled))
    more = {Path(name).name for name in names - pure}
    assert "native-any.so" in more
    assert more <= {f"native-{level.name}.so" for level in LEVELS}


def test_the_installed_package_is_used_from_where_it_was_put(wheel, tmp_path):
    installed = tmp_path / "installed"
    python("-m", "pip", "install", "-q", "--no-deps", "--target", installed, wheel)
    code = "import phatgoose as p; from phatgoose.tasks.suites.registry import SUITES;"
    code += "print(p.__file__, p.__version__, *(len(s.open().names) for s in SUITES.values()))"
    told = python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert told[:2] == [f"{installed}/phatgoose/__init__.py", phatgoose.__version__]
    assert told[2:] == ["36", "11", "166", "22", "17", "23", "24"]
    assert (installed / "bin" / "phatgoose").exists()
