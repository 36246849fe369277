"""Embedders: which one is loaded because of an expert's record, and that none runs code."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModel, BertConfig

from odd_files import rewrite
from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from phatgoose.names import packaged
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from phatgoose.tasks.embeddings import (
    DEFAULT_EMBEDDER,
    EMBEDDERS,
    embed_texts,
    load_embedder,
    without_downloads,
)
from routed_models import with_embeddings
from tiny import make_tokenizer
from toy_embedders import ToyEmbedder


@pytest.fixture
def loaded(monkeypatch) -> Iterator[list[str]]:
    """The embedders that were loaded, toys in place of those meant."""
    names: list[str] = []

    def transformer(name: str, **_: object) -> ToyEmbedder:
        names.append(name)
        return ToyEmbedder(name)

    fake = SimpleNamespace(__version__="6.0.0", SentenceTransformer=transformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    with patch.dict(EMBEDDERS, clear=True):
        yield names


def test_an_embedder_reads_long_texts_without_their_middle(monkeypatch):
    texts: list[str] = []

    def encode(several: list[str], **_: object) -> torch.Tensor:
        texts.extend(several)
        return torch.ones(len(several), 2)

    tokenizer = make_tokenizer(final_eos=True)
    reader = SimpleNamespace(max_seq_length=20, tokenizer=tokenizer, encode=encode)
    monkeypatch.setitem(EMBEDDERS, "toy", reader)
    embed_texts(["one two three four five six", "one two"], "toy")
    assert texts == ["one four five six", "one two"]


def recorded_by(pool: Pool, embedder: str) -> Pool:
    """`pool`, its embeddings made by `embedder` as far as the experts' records say."""
    experts = with_embeddings(pool).experts
    return Pool(tuple(replace(e, info=replace(e.info, embedder=embedder)) for e in experts))


@pytest.mark.parametrize(
    ("recorded", "named"),
    [*((r, None) for r in ("/tmp/evil", "somebody/evil", "evil\x1b[31m")), ("a/b", "c/d")],
)
def test_no_other_embedder_is_loaded_because_a_record_names_it(
    llama, llama_pool, loaded, recorded, named
):
    pool = recorded_by(llama_pool, recorded)
    with pytest.raises(ConfigError, match="only the default embedder is loaded") as caught:
        compose(pool, llama, router="retrieval", embedder=named)
    assert str(caught.value).isprintable()
    assert loaded == []
    model = compose(pool, llama, router="retrieval", embedder=recorded)
    assert composition_of(model).chooser.ready.embedder == recorded
    assert loaded == [recorded]
    detach(model)
    compose(with_embeddings(llama_pool), llama, router="retrieval")
    assert loaded[1:] == [packaged(DEFAULT_EMBEDDER)]


def test_a_routed_folder_names_no_embedder_either(llama, llama_pool, loaded, tmp_path):
    model = compose(recorded_by(llama_pool, "a/b"), llama, router="retrieval", embedder="a/b")
    save(model, tmp_path / "routed")
    routing = json.loads((tmp_path / "routed" / "routed.json").read_text())["routing"]
    assert "embedder" not in routing
    rewrite(tmp_path / "routed" / "routed.json", routing=routing | {"embedder": "a/b"})
    EMBEDDERS.clear()
    del loaded[:]
    with pytest.raises(ConfigError, match="only the default embedder"):
        load(tmp_path / "routed", dtype="float32")
    assert loaded == []
    load(tmp_path / "routed", dtype="float32", embedder="a/b")
    assert loaded == ["a/b"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["modules.json", "auto_map", "pickle"])
def test_an_embedder_that_is_named_runs_no_code(tmp_path, monkeypatch, how):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Module: pass\n")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(**small, intermediate_size=8, vocab_size=8)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    module = {"idx": 0, "name": "0", "path": "", "type": "evil.Module"}
    if how == "modules.json":
        (tmp_path / "modules.json").write_text(json.dumps([module]))
    elif how == "auto_map":
        named = {"AutoConfig": "evil.Module"}
        rewrite(tmp_path / "config.json", model_type="evil", auto_map=named)
    else:
        (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match=r"Embedder .* (is not valid|can't be read)"):
        embed_texts(["a"], str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_nothing_is_downloaded_where_a_client_asks_and_no_code_is_run(monkeypatch):
    asked = []

    def transformer(name: str, **options: object) -> None:
        asked.append((name, options["local_files_only"], options["trust_remote_code"]))
        raise OSError("it is not here")

    fake = SimpleNamespace(__version__="6.0.0", SentenceTransformer=transformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    with without_downloads(), pytest.raises(ConfigError, match="it is not here"):
        load_embedder("a/b")
    with pytest.raises(ConfigError, match="Embedder 'a/b' can't be read"):
        load_embedder("a/b")
    assert asked == [("a/b", True, False), ("a/b", False, False)]
