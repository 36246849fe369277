"""The notebook of examples/ runs from top to bottom, here on a tiny base in smollm2's place."""

import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from paths import ROOT

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = nbformat.read(ROOT / "examples" / "first-pool.ipynb", as_version=4)


def test_the_committed_copy_was_run_to_its_end():
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.mark.heavy
def test_every_cell_runs(base_folders, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cached = tmp_path / "cache" / "phatgoose" / "bases" / "smollm2-135m-instruct"
    shutil.copytree(base_folders["llama"], cached)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with warnings.catch_warnings():  # of the kernel's sockets and event loop
        warnings.simplefilter("ignore")
        nbclient.execute(NOTEBOOK, cwd=str(tmp_path), timeout=300, kernel_name="python3")
    assert (tmp_path / "comparison" / "comparison.md").is_file()
    assert (tmp_path / "both").is_dir()
