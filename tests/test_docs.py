"""The documents: examples run, links lead somewhere, and commands are ones that exist."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import typer

import phatgoose
from paths import ROOT
from phatgoose.apps.cli import app
from phatgoose.experts import KINDS
from phatgoose.routing.routers.registry import OURS as ROUTERS
from phatgoose.routing.routers.router import Router

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

FENCE = re.compile(
    r"^(?P<runs><!-- runs -->\s*\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```", re.M | re.S
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
INLINE = re.compile(r"`(?P<code>phatgoose [^`]+)`")
PLACEHOLDERS = {"…", "..."}


@dataclass(frozen=True)
class Block:
    """A fenced piece of a document."""

    kind: str
    code: str
    line: int
    runs: bool


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            found["kind"],
            found["code"],
            text.count("\n", 0, found.start("code")) + 1,
            bool(found["runs"]),
        )
        for found in FENCE.finditer(text)
    ]


def prose_of(document: Path) -> str:
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def shell_lines(document: Path) -> Iterator[str]:
    for block in blocks_of(document):
        if block.kind in {"bash", "console", "sh"}:
            for line in block.code.replace("\\\n", " ").splitlines():
                yield line.strip().removeprefix("$ ")


def commands_of(document: Path) -> list[str]:
    """The `phatgoose …` command lines in shell blocks."""
    return [line for line in shell_lines(document) if line.startswith("phatgoose ")]


def words_of(command: str) -> list[str]:
    """The words after `phatgoose`, up to a pipe, a redirection or another command."""
    words = shlex.split(command, comments=True)[1:]
    ends = [i for i, word in enumerate(words) if word in {"|", ">", ">>", "&&", ";", "&"}]
    return words[: ends[0]] if ends else words


def slug_of(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def cases(find: object) -> list[object]:
    return [
        pytest.param(document, item, id=f"{document.name}: {item}")
        for document in DOCUMENTS
        for item in find(document)  # type: ignore[operator]
    ]


def write_rows(path: Path, topic: str) -> None:
    rows = [
        {"input": f"{topic} {i}:", "target": ("yes", "no")[i % 2], "choices": ["yes", "no"]}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def reader(base_folders, tmp_path, monkeypatch) -> Path:
    """What a reader has at hand: data, a tiny base, and the same tiny base in place of smollm2."""
    for topic in ("reviews", "trivia", "unseen"):
        write_rows(tmp_path / f"{topic}.jsonl", topic)
    shutil.copytree(base_folders["llama"], tmp_path / "tiny-base")
    cached = tmp_path / "cache" / "phatgoose" / "bases" / "smollm2-135m-instruct"
    shutil.copytree(base_folders["llama"], cached)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUNNABLE = [d for d in DOCUMENTS if any(block.runs for block in blocks_of(d))]


@pytest.mark.parametrize("document", RUNNABLE, ids=lambda document: document.name)
def test_examples_that_say_so_run(document, reader, phat, monkeypatch):
    module = ModuleType("example")  # which dataclasses look up
    monkeypatch.setitem(sys.modules, "example", module)
    namespace = vars(module)
    for block in (block for block in blocks_of(document) if block.runs):
        if block.kind == "python":
            padded = "\n" * (block.line - 1) + block.code  # so that a failure names its line
            with warnings.catch_warnings():  # PEFT's, about transformers
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
                exec(compile(padded, str(document), "exec", dont_inherit=True), namespace)
            continue
        for command in block.code.replace("\\\n", " ").splitlines():
            assert command.startswith("phatgoose "), f"{command!r} of {document} isn't run here"
            outcome = phat(*words_of(command))
            assert outcome.code == 0, f"{command}: {outcome.err}"
    for added in Router.defined.keys() - ROUTERS.keys():  # an example's router is nobody else's
        del Router.defined[added]
    KINDS.pop("shift", None)


def links_of(document: Path) -> list[str]:
    links = [found["target"] for found in LINK.finditer(prose_of(document))]
    return sorted({link for link in links if not re.match(r"\w+:", link)})


@pytest.mark.parametrize(("document", "link"), cases(links_of))
def test_links_lead_to_files_and_headings_that_exist(document, link):
    name, _, anchor = link.partition("#")
    target = (document.parent / name).resolve() if name else document
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
        assert anchor in map(slug_of, headings)


@pytest.mark.parametrize(("document", "command"), cases(commands_of))
def test_commands_in_blocks_can_be_given_as_they_stand(document, command):
    name, *words = words_of(command)
    if name.startswith("-"):
        assert name in {"--help", "--version", "--install-completion"}
        return
    assert name in COMMANDS
    if "--help" not in words:
        COMMANDS[name].make_context(name, words)  # raises for an unknown flag or a missing value


def inline_of(document: Path) -> list[str]:
    return sorted({found["code"] for found in INLINE.finditer(prose_of(document))})


@pytest.mark.parametrize(("document", "command"), cases(inline_of))
def test_commands_in_the_text_and_their_flags_exist(document, command):
    name, *words = command.split()[1:]
    if name in PLACEHOLDERS or name.startswith("-"):
        return
    assert name in COMMANDS
    if COMMANDS[name].context_settings.get(
        "ignore_unknown_options"
    ):  # lm-eval: its flags are another program's
        return
    known = {"--help"}
    for parameter in COMMANDS[name].params:
        known |= {*parameter.opts, *parameter.secondary_opts}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_recipes_and_make_targets_that_are_named_exist(document):
    text, makefile = (path.read_text(encoding="utf-8") for path in (document, ROOT / "Makefile"))
    for recipe in re.findall(r"(?<![\w/])recipes/[\w./-]+\.toml", text):
        assert (ROOT / recipe).is_file(), recipe
    for line in shell_lines(document):
        if re.match(r"make \w", line):
            assert re.search(rf"^{re.escape(line.split()[1])}:", makefile, re.M), line


MODULE = re.compile(r"`(phatgoose(?:\.\w+)+)")
SOURCE_FILE = re.compile(r"`(?:src/phatgoose/)?((?:[a-z_0-9*]+/)+[a-z_0-9*]+\.(?:py|cpp|toml))`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_names_of_modules_and_files_are_there(document):
    text = prose_of(document)
    for name in MODULE.findall(text):
        if not name.endswith((".json", ".safetensors", ".png")):
            pkgutil.resolve_name(name)
    for file in SOURCE_FILE.findall(text):
        found = [*ROOT.glob(file), *(ROOT / "src" / "phatgoose").glob(f"**/{file}")]
        assert found, f"{document.name}: {file}"


def test_every_router_is_in_the_page_of_routers():
    page = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")
    table = page.partition("## All of them")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|", table, flags=re.MULTILINE)
    assert sorted(rows) == sorted(ROUTERS)


def test_the_drawing_of_imports_is_up_to_date():
    program = ROOT / "docs" / "site" / "import_graph.py"
    drawn = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert drawn.stdout in page, "run: python docs/site/import_graph.py --write"


def test_the_reference_has_every_name_of_the_package():
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    names, results = (re.findall(r"^::: (\S+)$", part, re.M) for part in page.split("## Results"))
    assert sorted(name.rpartition(".")[2] for name in names) == sorted(phatgoose.__all__)
    for name in names:
        assert pkgutil.resolve_name(name) is getattr(phatgoose, name.rpartition(".")[2])
    assert all(pkgutil.resolve_name(name) for name in results)
