"""The documents, the citation and the image: examples run, links lead somewhere, commands exist."""

from __future__ import annotations

import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

import phatgoose
from command_line import review, write_rows
from paths import ROOT
from phatgoose.apps.cli import app
from phatgoose.apps.deploy import ENGINE_PORT
from phatgoose.experts import KINDS
from phatgoose.routing.routers.registry import OURS as ROUTERS
from phatgoose.routing.routers.router import Router

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SHELLS = {"bash", "console", "sh"}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

FENCE = re.compile(
    r"^(?P<runs><!-- runs -->\s*\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```", re.M | re.S
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
INLINE = re.compile(r"`phatgoose (?P<name>[a-z][\w-]+)")
MODULE = re.compile(r"`(phatgoose(?:\.\w+)+)")
TEXT = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
PROSE = {document: FENCE.sub("", text) for document, text in TEXT.items()}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def words_of(command: str) -> list[str]:
    """The words after `phatgoose`, up to a pipe, a redirection or another command."""
    words = shlex.split(command, comments=True)[1:]
    ends = [i for i, word in enumerate(words) if word in {"|", ">", ">>", "&&", ";", "&"}]
    return words[: ends[0]] if ends else words


@pytest.fixture
def reader(base_folders, tmp_path, monkeypatch) -> Path:
    """What a reader has at hand: data, a tiny base, and the same tiny base in place of smollm2."""
    for topic in ("reviews", "trivia", "unseen"):
        write_rows(tmp_path / f"{topic}.jsonl", [review(number) for number in range(8)])
    cached = tmp_path / "cache" / "phatgoose" / "bases" / "smollm2-135m-instruct"
    for place in (tmp_path / "tiny-base", cached):
        shutil.copytree(base_folders["llama"], place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUNNABLE = [document for document in DOCUMENTS if "<!-- runs -->" in TEXT[document]]


@pytest.mark.parametrize("document", RUNNABLE, ids=lambda document: document.name)
def test_examples_that_say_so_run(document, reader, phat, monkeypatch):
    module = ModuleType("example")  # which dataclasses look up
    monkeypatch.setitem(sys.modules, "example", module)
    for block in (block for block in FENCE.finditer(TEXT[document]) if block["runs"]):
        if block["kind"] == "python":
            line = TEXT[document].count("\n", 0, block.start("code"))
            padded = "\n" * line + block["code"]  # so that a failure names its line
            with warnings.catch_warnings():  # PEFT's, about transformers
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
                exec(compile(padded, str(document), "exec", dont_inherit=True), vars(module))
            continue
        for command in block["code"].replace("\\\n", " ").splitlines():
            assert command.startswith("phatgoose "), f"{command!r} of {document} isn't run here"
            outcome = phat(*words_of(command))
            assert outcome.code == 0, f"{command}: {outcome.err}"
    for added in Router.defined.keys() - ROUTERS.keys():  # an example's router is nobody else's
        del Router.defined[added]
    KINDS.pop("shift", None)


@each_document
def test_links_lead_to_files_and_headings_that_exist(document):
    for link in (found["target"] for found in LINK.finditer(PROSE[document])):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if anchor:  # as GitHub makes them
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", each.strip().lower()) for each in headings]
            assert anchor in [slug.replace(" ", "-") for slug in slugs], link


@each_document
def test_commands_in_blocks_and_in_the_text_exist(document):
    blocks = (b["code"] for b in FENCE.finditer(TEXT[document]) if b["kind"] in SHELLS)
    for line in (line for code in blocks for line in code.replace("\\\n", " ").splitlines()):
        command = line.strip().removeprefix("$ ")
        name, *words = words_of(command) if command.startswith("phatgoose ") else ("--help",)
        if name not in {"--help", "--version", "--install-completion"}:
            assert name in COMMANDS, command
            if "--help" not in words:
                COMMANDS[name].make_context(name, words)  # raises for an unknown flag
    for found in INLINE.finditer(PROSE[document]):
        assert found["name"] in COMMANDS, found[0]


@each_document
def test_modules_that_are_named_exist(document):
    for name in MODULE.findall(PROSE[document]):
        if not name.endswith((".json", ".safetensors", ".png")):
            pkgutil.resolve_name(name)


def test_every_router_is_in_the_page_of_routers():
    table = TEXT[ROOT / "docs" / "routers.md"].partition("## All of them")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|", table, flags=re.MULTILINE)
    assert sorted(rows) == sorted(ROUTERS)


def test_the_drawing_of_imports_is_up_to_date():
    program = ROOT / "docs" / "site" / "import_graph.py"
    drawn = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    page = TEXT[ROOT / "docs" / "design.md"]
    assert drawn.stdout in page, "run: python docs/site/import_graph.py --write"


def test_the_citation_has_the_version_and_licence_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert str(citation["version"]) == phatgoose.__version__ == project["version"]
    assert citation["license"] == "Apache-2.0"


def test_the_image_is_pinned_and_has_no_rights():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    base, *stages = re.findall(r"^FROM (.+)$", dockerfile, re.M)
    assert re.fullmatch(r"python:3\.\d+-slim@sha256:[0-9a-f]{64} AS python", base)
    assert {stage.split()[0] for stage in stages} == {"python"}
    (user,) = re.findall(r"^USER (.+)$", dockerfile, re.M)
    assert user not in {"root", "0"}


def test_the_services_of_compose_fit_each_other_and_their_flags_exist():
    folder = ROOT / "examples" / "compose"
    parts = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in folder.glob("*.y*ml")}
    services = parts["compose.yaml"]["services"]
    assert parts["gpu.yaml"]["services"].keys() <= services.keys()
    images = [
        service["image"] for name in parts for service in parts[name].get("services", {}).values()
    ]
    assert all(image == "phatgoose" or re.search(r":v\d+\.\d+\.\d+$", image) for image in images)
    gateway = services["gateway"]
    assert (folder / gateway["build"] / "Dockerfile").is_file()
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)
    _, name, *words = [*yaml.safe_load(entry), *gateway["command"]]
    given = COMMANDS[name].make_context(name, words).params
    ports = {"gateway": given["port"], "engine": ENGINE_PORT}
    assert services["engine"]["expose"] == [str(ENGINE_PORT)]
    assert given["upstream"] == [f"http://engine:{ENGINE_PORT}"]
    scraped = parts["prometheus.yml"]["scrape_configs"]
    targets = [
        target for job in scraped for each in job["static_configs"] for target in each["targets"]
    ]
    assert targets == [f"{service}:{port}" for service, port in ports.items()]
    assert given["allow_host"] == ["gateway"]  # as Prometheus calls it
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        for mount in service["volumes"]:
            source = mount.partition(":")[0]
            is_there = source in parts["compose.yaml"]["volumes"] or (folder / source).exists()
            assert is_there or source == "./deploy"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one_that_systemd_takes_and_its_command_exists(tmp_path):
    (unit,) = re.findall(r"^```ini\n(.*?)^```", TEXT[ROOT / "docs" / "serving.md"], re.M | re.S)
    (line,) = re.findall(r"^ExecStart=(.+)$", unit, re.M)
    program, name, *words = shlex.split(line)
    assert program.endswith("/phatgoose")
    COMMANDS[name].make_context(name, words)
    path = tmp_path / "phatgoose.service"
    path.write_text(unit.replace(program, sys.executable))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True
    )
    assert (verified.returncode, verified.stderr) == (0, "")
