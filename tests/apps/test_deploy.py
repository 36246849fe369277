"""Handing a pool over: the folder that starts an engine and the gateway."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from command_line import refused
from paths import ROOT
from phatgoose.apps.deploy import deploy
from phatgoose.base.identity import BaseReference
from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from routed_models import tailed
from tiny import write_expert


@pytest.fixture
def pool(pool_of):
    return on_base(pool_of("llama"), "me/base")


def on_base(pool, named, revision=None):
    """The experts of `pool` where their files name the base `named`."""
    base = BaseReference(named, revision)
    return Pool(tuple(replace(e, info=replace(e.info, base=base)) for e in pool.experts))


def command_in(script):
    """The arguments of the last line of a script."""
    last = script.read_text().strip().splitlines()[-1]
    return shlex.split(last.removeprefix("exec "))


def value_of(command, flag):
    return command[command.index(flag) + 1]


@pytest.mark.parametrize(("rank", "allowed"), [(4, "8"), (80, "128")])
def test_vllm_gets_experts_as_they_are_and_a_rank_that_it_allows(llama, tmp_path, rank, allowed):
    pool = Pool([write_expert(llama, tmp_path, name, rank=rank) for name in ("e0", "e1")])
    out = tmp_path / "out"
    assert deploy(pool, "vllm", out, llama.id).rank == rank
    command = command_in(out / "engine.sh")
    assert command[:3] == ["vllm", "serve", "./base"]
    assert value_of(command, "--max-lora-rank") == allowed
    assert command[-3:] == ["e0=experts/e0", "e1=experts/e1", "$@"]
    hashes = [
        [e.info.adapter_sha256 for e in p.experts] for p in (pool, Pool.open(out / "experts"))
    ]
    assert hashes[0] == hashes[1]
    assert (out / "base" / "config.json").is_file()
    gateway = command_in(out / "gateway.sh")
    assert gateway[:3] == ["phatgoose", "serve", "experts"]
    assert "--base" not in gateway  # of which it reads nothing


def test_an_expert_s_own_files_are_handed_over_and_no_others(llama, tmp_path):
    pool = on_base(Pool.open(write_expert(llama, tmp_path / "pool", "e")), "me/base")
    folder = pool["e"].directory
    (tmp_path / "secret.txt").write_text("of this machine")
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    deploy(pool, "vllm", tmp_path / "out")
    handed = {path.name for path in (tmp_path / "out" / "experts" / "e").iterdir()}
    assert handed == {path.name for path in folder.iterdir()} - {"evil.py", "notes.txt"}
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ConfigError, match=r"README\.md .*a link that leads out"):
        deploy(pool, "vllm", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "named",
    [
        *("--tool-parser-plugin=experts/e0/evil.py", "-c", "/home/me/.ssh", "../up", "a/../b", ""),
        *("${HOME}/x", "$(id)", "me/base;id", "me/base --flag", "me/base\nFROM evil", "a/b/c"),
        "experts/e0",  # a folder of the deployment, where an expert's files would be the base's
    ],
)
def test_a_base_that_is_named_by_an_expert_is_a_hub_id_and_nothing_else(pool, tmp_path, named):
    with pytest.raises(ConfigError, match=r"no Hub id.* --base FOLDER"):
        deploy(on_base(pool, named), "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_folder_of_the_operator_s_goes_along_unless_the_operator_names_it(
    pool, tmp_path, monkeypatch
):
    (tmp_path / "me" / "base").mkdir(parents=True)
    (tmp_path / "me" / "base" / "key").write_text("of this machine")
    monkeypatch.chdir(tmp_path)
    pool = on_base(pool, "me/base", "v1.2")
    assert deploy(pool, "vllm", tmp_path / "out").base == "me/base"
    assert value_of(command_in(tmp_path / "out" / "engine.sh"), "--revision") == "v1.2"
    assert deploy(pool, "vllm", tmp_path / "named", "me/base").base == "base"
    assert [path.name for path in (tmp_path / "named" / "base").iterdir()] == ["key"]


CONVERTER = """
import os, pathlib, sys
assert sys.path[0] == os.path.dirname(__file__)  # where its packages lie
source, _, target, *options = sys.argv[1:]
pathlib.Path(target).write_text("new")
print(os.getpid(), source, *options, sep="|")
sys.exit(7) if source == os.environ["REFUSED"] else None
"""


@pytest.fixture
def convert(pool, tmp_path):
    """Hands a pool over and converts it, by programs that write "new" and print what they got."""
    script = ROOT / "examples" / "convert_for_llama_cpp.py"
    for name in ("hf", "lora"):
        (tmp_path / f"convert_{name}_to_gguf.py").write_text(CONVERTER)

    def run(base, *options, refused=""):
        deploy(pool, "llama.cpp", tmp_path / "out", base)
        (tmp_path / "out" / "base.gguf").write_text("old")
        command = [sys.executable, script, tmp_path / "out", "--llama-cpp", tmp_path, *options]
        environment = {**os.environ, "REFUSED": refused}
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)

    return run


def test_llama_cpp_gets_scripts_that_pass_on_what_their_caller_adds(pool, llama, tmp_path, convert):
    outcome, out = convert(llama.id, "--seed", "two words"), tmp_path / "out"
    arguments = command_in(out / "engine.sh")
    assert (arguments[0], arguments[-1]) == ("llama-server", "$@")
    assert value_of(arguments, "--host") == "127.0.0.1"
    files = [f"gguf/{name}.gguf" for name in pool.names]
    assert value_of(arguments, "--lora") == ",".join(files)
    assert "--lora-init-without-apply" in arguments
    assert "python examples/convert_for_llama_cpp.py ." in (out / "README.md").read_text()
    pids, words = zip(*(line.split("|", 1) for line in outcome.stdout.splitlines()), strict=True)
    experts = [f"experts/{name}|--base|base|--outtype|f32" for name in pool.names]
    assert (len({*pids}), [*words]) == (1, [*experts, "base|--seed|two words"])
    there = {path: path.read_text() for path in out.rglob("*.gguf")}
    assert there == dict.fromkeys((out / file for file in ("base.gguf", *files)), "new")


@pytest.mark.parametrize("refused", ["experts/e1", "base"])
def test_a_conversion_that_fails_is_named_and_changes_nothing(llama, tmp_path, convert, refused):
    outcome, out = convert(llama.id, refused=refused), tmp_path / "out"
    assert outcome.returncode == 7
    assert f"{refused} is not converted" in outcome.stderr
    assert {p: p.read_text() for p in out.rglob("*.gguf")} == {out / "base.gguf": "old"}


def test_converting_wants_the_base_as_a_folder(convert):
    outcome = convert("you/base")
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert "base is no folder" in outcome.stderr


def test_a_base_s_name_is_one_word_of_the_engine_s_command(pool, tmp_path):
    name = "it's\nEND\n$(touch ran) \\"
    deploy(pool, "vllm", tmp_path / "out", name)
    (tmp_path / "vllm").write_text('#!/bin/sh\nprintf "%s" "$2"')
    (tmp_path / "vllm").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = [tmp_path / "out" / "engine.sh"]
    ran = subprocess.run(command, env={"PATH": path}, text=True, capture_output=True)
    assert ran.stdout == name
    assert not (tmp_path / "out" / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "other ranks"),
        ({"alpha_pattern": {"q_proj": 2}}, "other scales"),
        ({"lora_bias": True}, "biases"),
        ({"use_rslora": True}, "rsLoRA"),  # which is no matter for vLLM
    ],
)
def test_what_an_engine_would_not_apply_is_refused_by_name(pool, tmp_path, change, words):
    first, *others = pool.experts
    folder = shutil.copytree(first.directory, tmp_path / "e0")
    pool = Pool((replace(first, directory=folder), *others))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"'e0' has {words}"):
        deploy(pool, "llama.cpp", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_gateway_is_given_another_engine_by_the_environment(pool, tmp_path):
    deploy(pool, "vllm", tmp_path / "out")
    (tmp_path / "phatgoose").write_text('#!/bin/sh\nprintf "%s\\n" "$@"')
    (tmp_path / "phatgoose").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for given, wanted in (
        ({}, "http://127.0.0.1:8001"),
        ({"PHATGOOSE_UPSTREAM": ""}, "http://127.0.0.1:8001"),
        ({"PHATGOOSE_UPSTREAM": "http://gpu:9 x"}, "http://gpu:9 x"),  # one word whatever it is
    ):
        command = [tmp_path / "out" / "gateway.sh", "--upstream", "http://third:8001"]
        ran = subprocess.run(command, env={"PATH": path, **given}, text=True, capture_output=True)
        words = ran.stdout.splitlines()
        assert words[:4] == ["serve", "experts", "--port", "8000"]
        assert words[-4:] == ["--upstream", wanted, "--upstream", "http://third:8001"]


def test_the_engine_alone_has_the_base_that_the_operator_names(pool, tmp_path):
    deploy(on_base(pool, "/home/trainer/llama"), "vllm", tmp_path / "out", "you/base")
    assert command_in(tmp_path / "out" / "engine.sh")[:3] == ["vllm", "serve", "you/base"]
    assert "you/base" not in (tmp_path / "out" / "gateway.sh").read_text()


def test_experts_that_act_on_a_part_of_the_prompt_are_refused(pool, tmp_path):
    with pytest.raises(ConfigError, match="'e0' has a part of the prompt where it acts"):
        deploy(tailed(pool.experts, (3, None, None, None)), "vllm", tmp_path / "out")


def test_the_command_hands_over_and_refuses_other_engines(pool, llama, tmp_path, phat):
    place, other = pool.experts[0].directory.parent, ("--out", tmp_path / "other")
    line = ("export", place, "--engine", "vllm", "--out", tmp_path / "out")
    refused(phat(*line), f"base by {llama.id!r}")
    outcome = phat(*line, "--base", llama.id)
    assert (outcome.code, outcome.err) == (0, "")
    assert "4 experts of rank 4 or less for vllm" in outcome.out
    refused(phat(*line), "exists")
    refused(phat("export", place, "--engine", "tgi", *other), "must be one of vllm")
    bare = Pool(
        tuple(replace(each, prompt_statistics={}, embeddings=None) for each in pool.experts)
    )
    with pytest.warns(UserWarning, match="can't choose yet: .* run 'phatgoose stats'"):
        deploy(bare, "vllm", tmp_path / "bare")
