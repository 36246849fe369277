"""examples/released_experts.py, on checkpoints with the layout of the paper's authors.

The checkpoints and the formula are written here from the description of the released code alone.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from paths import ROOT
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from tiny import logits_of, make_ids

SCRIPT = ROOT / "examples" / "released_experts.py"
EXPERTS, RANK = 4, 4
LAYERS = ("SelfAttention.", "EncDecAttention.", "DenseReluDense.")


def linears_of(model):
    """Every linear layer of T5's attention and feed-forward networks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part in name for part in LAYERS)
    }


def released(model, seed=0, vectors=1):
    """A checkpoint as the released code writes it; `vectors` is the seed of gates or means."""
    factors, routers = (torch.Generator().manual_seed(s) for s in (seed, vectors))
    tensors = {
        f"{stack}.embed_tokens.weight": model.get_input_embeddings().weight.detach().clone()
        for stack in ("encoder", "decoder")
    }
    for number in range(EXPERTS):
        for name, linear in linears_of(model).items():
            n, d, experts = linear.in_features, linear.out_features, f"{name}._addons.expert_lora"
            # Turned over, and so not contiguous, as theirs.
            tensors[f"{experts}.layer1__{number}"] = torch.randn(RANK, n, generator=factors).T * 0.4
            tensors[f"{experts}.layer2__{number}"] = torch.randn(d, RANK, generator=factors).T * 0.4
            router = f"{name}._addons.router.expert_embeddings__{number}"
            # So long that ε is little beside them: the paper and we add none to gates' variance.
            tensors[router] = torch.randn(n, generator=routers) * 10
    return tensors


@contextmanager
def routed_as_released(model, tensors):
    """Every linear layer with the mixture of experts of the released code, in their words."""

    def mixture(name, n):
        def hook(linear, inputs, output):
            (u,) = inputs
            layer1, layer2, routers = (
                torch.stack([tensors[f"{name}._addons.{key}__{i}"] for i in range(EXPERTS)])
                for key in ("expert_lora.layer1", "expert_lora.layer2", "router.expert_embeddings")
            )
            v = functional.layer_norm(routers, (n,), eps=1e-5)
            scores = functional.layer_norm(u, (n,), eps=1e-5) @ v.T * (1 / n) ** 0.5
            weights, chosen = scores.softmax(dim=-1).topk(2, dim=-1)
            weights = weights / weights.sum(dim=-1, keepdim=True)  # they add 1e-6
            full = torch.zeros_like(scores).scatter(-1, chosen, weights)
            outputs = [u @ one @ two for one, two in zip(layer1, layer2, strict=True)]
            mixed = sum(full[..., i, None] * each for i, each in enumerate(outputs))
            return output + mixed / RANK

        return hook

    hooks = [
        linear.register_forward_hook(mixture(name, linear.in_features))
        for name, linear in linears_of(model).items()
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("released_experts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def in_this_process(script, monkeypatch):
    """The reader of checkpoints runs here, since a process takes seconds to import torch."""

    def run(command, **_):
        with redirect_stderr(StringIO()) as told:
            code = script.main(list(map(str, command[2:])))
        return SimpleNamespace(returncode=code, stderr=told.getvalue())

    monkeypatch.setattr("subprocess.run", run)


@pytest.fixture
def t5(loaded_bases):
    return copy.deepcopy(loaded_bases["t5"])


@pytest.fixture
def split(script, t5, tmp_path, capsys):
    """`split(gates=…, means=…, names=…)`: the script's run on these, into the folder `out`."""

    def do(names="", **contents):
        words = ["--base", t5.id, "--out", tmp_path / "out"]
        for kind, content in contents.items():
            path = tmp_path / f"{kind}.pt"
            if content is not None:
                torch.save(content, path)
            words += [f"--{kind}", path]
        if names:
            (tmp_path / "names.txt").write_text(names)
            words += ["--names", tmp_path / "names.txt"]
        code = script.main(list(map(str, words)))
        return SimpleNamespace(code=code or 0, **capsys.readouterr()._asdict())

    return do


def test_released_experts_are_routed_as_by_the_released_code(t5, split, tmp_path):
    gates, means = released(t5.model), released(t5.model, vectors=2)
    done = split(gates=gates, means=means, names="news\nreviews\nqa\nnli\n")
    assert done.code == 0, done.err
    assert "4 experts with gates and means" in done.out
    folders = [tmp_path / "out" / name for name in ("news", "reviews", "qa", "nli")]
    assert sorted((tmp_path / "out").iterdir()) == sorted(folders)

    ids = make_ids(rows=2, tokens=9)
    for router, tensors in (("phatgoose", gates), ("average-activation", means)):
        with routed_as_released(t5.model, tensors):
            wanted = logits_of(t5.model, ids)
        model = compose(Pool.open(folders), copy.deepcopy(t5), router=router, k=2)
        got = logits_of(model, ids)
        assert not torch.allclose(wanted, logits_of(t5.model, ids), atol=0.1)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.usefixtures("in_this_process")
def test_tensors_keep_their_numbers_and_their_type(t5, split, tmp_path):
    tensors = {
        key: value.bfloat16() if ".layer" in key and "lora" in key else value
        for key, value in released(t5.model).items()
    }
    site = "decoder.block.1.layer.1.EncDecAttention.k"
    tensors[f"{site}._addons.expert_lora.expert_input_gate"] = torch.zeros(32)  # of one expert
    assert split(gates=tensors).code == 0
    folder = tmp_path / "out" / "expert3"
    adapter = load_file(folder / "adapter_model.safetensors")
    A = adapter[f"base_model.model.{site}.lora_A.weight"]
    assert A.dtype == torch.bfloat16
    assert torch.equal(A, tensors[f"{site}._addons.expert_lora.layer1__3"].T)
    vectors = load_file(folder / "phatgoose.safetensors")
    assert torch.equal(
        vectors[f"gate.{site}"], tensors[f"{site}._addons.router.expert_embeddings__3"]
    )
    assert len(vectors) == len(linears_of(t5.model))  # no means


def changed(key, change):
    """A checkpoint's tensors after `change(tensors, full key)` of the key with this ending."""

    def make(model):
        tensors = released(model)
        change(tensors, next(full for full in tensors if full.endswith(key)))
        return tensors

    return make


def put(value):
    return lambda tensors, key: tensors.__setitem__(key, value)


def retrieval(model):
    kept = {key: value for key, value in released(model).items() if "router" not in key}
    routers = {f"encoder._addons.router.expert_embeddings__{i}": torch.ones(8) for i in range(4)}
    return kept | routers


REFUSED = {
    "a list": (lambda _: [torch.ones(2)], "wanted tensors by name"),
    "a model": (lambda model: model.state_dict(), "it has 'shared.weight'"),
    "nothing": (lambda _: {}, "wanted keys that end in layer1__0"),
    "merged": (lambda _: {"a._addons.expert_lora.layer1": torch.ones(2, 2)}, "it has 'a._addons"),
    "retrieval": (retrieval, "encoder.expert_embeddings is (8,) torch.float32; wanted no such"),
    "a gap": (
        lambda model: {k: v for k, v in released(model).items() if not k.endswith("__1")},
        "wanted keys that end in layer1__0",
    ),
    "no gate": (
        changed("q._addons.router.expert_embeddings__2", lambda tensors, key: tensors.pop(key)),
        "expert 2: encoder.block.0.layer.0.SelfAttention.q.expert_embeddings is missing",
    ),
    "another size": (
        changed("q._addons.expert_lora.layer1__1", put(torch.ones(31, RANK))),
        "expert 1: encoder.block.0.layer.0.SelfAttention.q.layer1 is (31, 4) torch.float32; "
        "wanted (32, 4)",
    ),
    "two ranks": (
        changed("q._addons.expert_lora.layer2__1", put(torch.ones(5, 32))),
        "SelfAttention.q.layer2 is (5, 32) torch.float32; wanted (4, 32)",
    ),
    "whole numbers": (
        changed("q._addons.expert_lora.layer2__1", put(torch.ones(4, 32, dtype=torch.int64))),
        "SelfAttention.q.layer2 is no tensor of numbers",
    ),
    "not a number": (
        changed("q._addons.router.expert_embeddings__2", put(torch.full((32,), torch.nan))),
        "SelfAttention.q.expert_embeddings",
    ),
    "one number, often": (
        changed("q._addons.expert_lora.layer1__0", put(torch.ones(1).expand(10**11, RANK))),
        "larger than the file",
    ),
    "another base": (
        changed("encoder.embed_tokens.weight", put(torch.ones(300, 32))),
        "is of another base than",
    ),
}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(case, t5, split, tmp_path):
    make, told = REFUSED[case]
    done = split(gates=make(t5.model))
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"gates.pt"}


class Attack:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_nothing_is_unpickled(save, split, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    save({"a._addons.expert_lora.layer1__0": Attack(tmp_path / "ran")}, tmp_path / "gates.pt")
    done = split(gates=None)
    assert done.code == 2
    assert "is no checkpoint of the released experts" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("in_this_process")
def test_the_files_must_be_of_the_same_experts(t5, split):
    done = split(gates=released(t5.model), means=released(t5.model, seed=5))
    assert done.code == 2
    assert "Expert 0 differs between the files, at encoder.block.0" in done.err


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("names", ["a\nb\nc\n", "a\nb\nc\nc\n"])
def test_every_expert_needs_a_name_of_its_own(names, t5, split):
    done = split(gates=released(t5.model), names=names)
    assert done.code == 2
    assert "Experts: {'gates': 4}, different names: 3" in done.err


@pytest.mark.usefixtures("in_this_process")
def test_files_that_are_not_there(split):
    done = split(gates=None)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "gates.pt does not exist" in done.err
