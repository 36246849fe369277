"""Imports: what PEFT's adapters become, what it loses, and what is refused."""

from __future__ import annotations

import shutil
import warnings

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from changed_experts import set_config
from import_cases import Case, write_case
from odd_files import one_line_of
from phatgoose.base.identity import BaseReference
from phatgoose.base.loading import load_base
from phatgoose.errors import BaseModelError, ConfigError, ExpertError, PoolError
from phatgoose.experts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.experts.importing import import_adapter, import_adapters
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import prompt_statistics_of
from phatgoose.reader import open_reader
from phatgoose.routing.compose import compose, detach
from tiny import (
    IDS,
    SETTINGS,
    logits_of,
    make_adapter,
    make_ids,
    make_model,
    make_tokenizer,
    peft_model,
    random_model,
)

PATTERNS = {"rank_pattern": {r"BLOCKS\.0\..*": 2}, "alpha_pattern": {r".*BLOCKS\.1\..*": 7}}
DECODERS = ("llama", "gpt2")
LOSSY = {"allow_loss": 0.0, "only": ("llama",)}
CASES = (
    Case("LoRA"),
    Case("patterns of rank and alpha, rsLoRA", {"use_rslora": True, **PATTERNS}),
    Case("a pattern of targets", {"target_modules": r".*\.BLOCKS\.1\..*\.(FIRST|FFN)"}),
    Case("target_modules=all-linear", {"target_modules": "all-linear"}),
    Case("exclude_modules", {"exclude_modules": r".*BLOCKS\.0\..*"}),
    Case("layers_to_transform", {"layers_to_transform": [1], "layers_pattern": "BLOCKS"}),
    Case("lora_bias", {"lora_bias": True}),
    Case("DoRA", {"use_dora": True}),
    Case("(IA)³ on outputs", {"feedforward_modules": []}, peft.IA3Config),
    Case("(IA)³ on an input", {"feedforward_modules": ["FFN"]}, peft.IA3Config),
    Case("(IA)³ by default", {"target_modules": None}, peft.IA3Config),
    Case("LoHa", {"r": 2}, peft.LoHaConfig, allow_loss=0.0, only=("t5", "llama")),
    Case("LoKr", {"r": 2}, peft.LoKrConfig, allow_loss=0.0, only=("t5", "llama")),
    Case("FourierFT", {"n_frequency": 20}, peft.FourierFTConfig, **LOSSY),
    Case("C3A", {"block_size": 4}, peft.C3AConfig, **LOSSY),
    Case("DeLoRA", {"r": 4}, peft.DeloraConfig, **LOSSY),
    # What is refused; tests/experts/test_damage.py has options that can't be routed, and tensors.
    Case("embeddings", {"target_modules": ["FIRST", "TABLE"]}, refused="output layers are none"),
    Case("a head", {"target_modules": ["FIRST", "lm_head"]}, refused="lm_head", only=DECODERS),
    Case("resized embeddings", refused="wanted no such tensor"),
    Case("prompts", {"num_virtual_tokens": 4}, peft.PromptTuningConfig, "type 'PROMPT_TUNING'"),
    Case("OFT", {"oft_block_size": 4}, peft.OFTConfig, "of type 'OFT'", only=("llama",)),
)
TOLERANCE = 1e-5  # of the largest logit
LOSSY_TOLERANCE = 2e-2  # --allow-loss 0 leaves out what float32 sums of squares don't notice


@pytest.mark.parametrize(
    ("case", "kind"),
    [pytest.param(case, kind, id=f"{case.name}-{kind}") for case in CASES for kind in case.only],
)
def test_every_option_is_imported_exactly_or_refused(case, kind, base_folders, tmp_path):
    adapter = write_case(case, kind, base_folders[kind], tmp_path / "adapter")
    options = {"allow_loss": case.allow_loss, "base": str(base_folders[kind])}
    if case.refused is not None:
        message = one_line_of(lambda: import_adapter(adapter, tmp_path / "no", **options))
        assert case.refused in message
        assert not (tmp_path / "no").exists()
        return
    expert = import_adapter(adapter, tmp_path / "expert", **options)
    ids = make_ids(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*lora_bias")  # of layers that have no bias
        wanted = logits_of(PeftModel.from_pretrained(make_model(kind), adapter), ids)
        warnings.filterwarnings("ignore", message=".*taking .* on trust")
        routed = compose(Pool((expert,)), make_model(kind), router="single", k=1)
    lossy = case.allow_loss is not None
    difference = (logits_of(routed, ids) - wanted).abs().max() / wanted.abs().max()
    assert difference <= (LOSSY_TOLERANCE if lossy else TOLERANCE)
    for file in () if lossy or expert.kind == "dora" else (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (adapter / file).read_bytes() == (expert.directory / file).read_bytes()


def test_an_import_is_an_expert_without_gates_that_says_where_it_is_from(
    own_adapter, llama, tmp_path
):
    expert = import_adapter(own_adapter, tmp_path / "experts" / "mine")
    assert (expert.name, expert.gates, expert.means) == ("mine", {}, {})
    assert expert.info.base == llama.reference
    assert expert.info.hyperparameters == {"imported_from": "adapter"}
    detach(compose(Pool((expert,)), llama, router="arrow", k=1))
    without = import_adapter(own_adapter, tmp_path / "b", name="other", fingerprint=False)
    assert without.name == "other"
    with pytest.warns(UserWarning, match="'phatgoose import --fingerprint' records one"):
        compose(Pool((without,)), llama, router="arrow", k=1)


def test_the_base_of_an_import_is_the_one_that_the_adapter_or_the_user_names(
    own_adapter, llama, tmp_path
):
    set_config(own_adapter, revision="v2")
    named = import_adapter(own_adapter, tmp_path / "named", fingerprint=False)
    assert named.info.base == BaseReference(llama.id, "v2")
    other = import_adapter(own_adapter, tmp_path / "other", base=llama.id, fingerprint=False)
    assert other.info.base == BaseReference(llama.id)  # of the base that the user named instead
    renamed = import_adapter(own_adapter, tmp_path / "renamed", base_id="you/base")
    assert renamed.info.base == BaseReference("you/base", None, llama.fingerprint)
    set_config(own_adapter, revision=2)
    with pytest.raises(ExpertError, match=r"config.json is not valid: revision: "):
        import_adapter(own_adapter, tmp_path / "numbered")


@pytest.mark.parametrize("place", ["/not/here", "typo", "./adapters/typo"])
def test_a_folder_that_is_not_there_is_called_so_and_no_reference(place, tmp_path):
    with pytest.raises(ExpertError, match=r"(typo|here).*does not exist. Wanted a PEFT"):
        import_adapter(place, tmp_path / "mine")
    with pytest.raises(ExpertError, match="hub:OWNER/NAME"):
        import_adapter("hub:typo", tmp_path / "mine")


def test_a_base_that_does_not_fit_or_is_not_named_or_not_there_is_told(own_adapter, tmp_path):
    make_model("qwen2").save_pretrained(tmp_path / "other")
    with pytest.raises(ExpertError, match=r"k_proj.lora_B.weight is .*; wanted \(16, 4\)"):
        import_adapter(own_adapter, tmp_path / "mine", base=str(tmp_path / "other"))
    with pytest.raises(BaseModelError, match="nowhere"):
        import_adapter(own_adapter, tmp_path / "mine", base="nowhere")
    set_config(own_adapter, r=10**12)  # for which nothing is allocated
    with pytest.raises(ExpertError, match=r"wanted \(1000000000000, "):
        import_adapter(own_adapter, tmp_path / "mine")
    set_config(own_adapter, target_modules=["nothing"])
    with pytest.raises(ExpertError, match="nothing"):
        import_adapter(own_adapter, tmp_path / "mine")
    set_config(own_adapter, base_model_name_or_path=None)
    with pytest.raises(ExpertError, match="--base"):
        import_adapter(own_adapter, tmp_path / "mine")


def test_an_approximation_loses_no_more_than_allowed_and_says_how_much(base_folders, tmp_path):
    case = next(case for case in CASES if case.name == "LoHa")
    adapter = write_case(case, "llama", base_folders["llama"], tmp_path / "adapter")
    exact = import_adapter(adapter, tmp_path / "exact", allow_loss=0.0).lora
    expert = import_adapter(adapter, tmp_path / "lossy", allow_loss=0.3)
    lost = {}
    for site, lora in expert.lora.items():
        whole = (exact[site].B @ exact[site].A).double()
        rest = whole - lora.scale * (lora.B @ lora.A).double()
        lost[site] = float(rest.square().sum() / whole.square().sum())
    record = expert.info.hyperparameters
    assert 0 < max(lost.values()) <= 0.3
    assert record["kept_at_worst_site"] == pytest.approx(1 - max(lost.values()), abs=1e-5)
    assert max(lost.values()) >= 1 - record["kept_of_update"] > 0
    assert record["converted_from"] == "LOHA"
    ranks = {site: lora.A.shape[0] for site, lora in expert.lora.items()}
    assert any(rank < exact[site].A.shape[0] for site, rank in ranks.items())


def test_a_folder_of_adapters_is_a_pool_as_if_it_were_imported(llama, tmp_path):
    options = {"a": {}, "b": {"use_dora": True}}  # whose files can't stay as they are
    folders = [
        make_adapter(llama, tmp_path / "adapters" / name, seed=seed, **options[name])
        for seed, name in enumerate(options)
    ]
    again = shutil.copytree(folders[0], tmp_path / "again" / "a")
    found = import_adapters([*folders, again], tmp_path / "pool")
    assert list(found.refused) == [str(again)]
    assert "exists already" in found.refused[str(again)]
    read, imported = Pool.open(tmp_path / "adapters"), Pool.open(tmp_path / "pool")
    assert (read.names, read.base) == (imported.names, imported.base)
    assert [record["path"] for record in read.records()] == list(map(str, folders))
    for name in read:
        assert read[name].info == imported[name].info
        for site, module in read[name].modules.items():
            assert torch.equal(module.B, imported[name].modules[site].B)
    assert Pool.open(folders[0]).names == ("a",)
    set_config(folders[1], use_qalora=True)
    with pytest.warns(UserWarning, match=r"adapters/b is left out: .* 'use_qalora'"):
        assert Pool.open(tmp_path / "adapters").names == ("a",)
    set_config(folders[0], use_qalora=True)
    with pytest.raises(PoolError, match=r"adapter in .*adapters can be used\. .*'use_qalora'"):
        Pool.open(tmp_path / "adapters")


def test_prompts_that_adapters_bring_are_measured_when_they_are_imported_or_opened(llama, tmp_path):
    texts = {"a": ["Once more", "and again", "then"], "b": ["1 + 2 =", "12 + 7 =", "3 + 3 ="]}
    for seed, (name, lines) in enumerate(texts.items()):
        folder = make_adapter(llama, tmp_path / "adapters" / name, seed=seed)
        (folder / "prompts.txt").write_text("\n".join(lines))
    import_adapters((tmp_path / "adapters").iterdir(), tmp_path / "pool")
    imported, read = Pool.open(tmp_path / "pool"), Pool.open(tmp_path / "adapters").measured()
    for name in texts:
        assert read[name].info.reader == imported[name].info.reader == open_reader().reference
        assert read[name].info.prompts_read == imported[name].info.prompts_read == 3
        assert read[name].prompts == imported[name].prompts == tuple(texts[name])
        for part, wanted in imported[name].prompt_statistics.items():
            assert torch.equal(read[name].prompt_statistics[part], wanted)
    assert read.measured() is read
    router = compose(str(tmp_path / "adapters"), llama).phatgoose.chooser
    choice = router.choose([lines[0] for lines in texts.values()])
    assert [next(iter(each)) for each in choice.named(router.experts)] == ["a", "b"]
    detach(llama.model)


def test_prompts_of_an_adapter_are_measured_where_its_base_has_no_weights(
    own_adapter, base_folders, tmp_path
):
    (own_adapter / "prompts.txt").write_text("Is it good?")
    (tmp_path / "base").mkdir()
    shutil.copy(base_folders["llama"] / "config.json", tmp_path / "base")
    with pytest.warns(UserWarning, match=r"mine: few prompts \(1\)"):
        expert = import_adapter(own_adapter, tmp_path / "mine", base=str(tmp_path / "base"))
    assert expert.info.base.fingerprint is None
    assert (expert.prompts, expert.info.prompts_read) == (("Is it good?",), 1)
    wanted = prompt_statistics_of(open_reader().states(["Is it good?"]))
    assert wanted.keys() == expert.prompt_statistics.keys()
    assert all(
        torch.equal(expert.prompt_statistics[part], values) for part, values in wanted.items()
    )


def test_adapters_are_read_by_the_reader_that_the_others_name(llama, make_expert, tmp_path):
    make_expert(llama, "one")  # whose statistics the small reader made
    folder = make_adapter(llama, tmp_path / "adapters" / "new", seed=1)
    (folder / "prompts.txt").write_text("one\ntwo\nthree")
    pool = Pool((*Pool.open(tmp_path / "experts").experts, *Pool.open(folder).experts))
    assert pool.measured()["new"].info.reader == pool["one"].info.reader != open_reader().reference
    with pytest.raises(ConfigError, match="read by 'minilm:1-1'"):
        pool.measured("minilm:1-2")
    alone = Pool.open(folder).measured("minilm:0-1")["new"].info
    assert (alone.reader.first, alone.reader.last, alone.prompts_read) == (0, 1, 3)


@pytest.mark.skipif("exaone" not in CONFIG_MAPPING, reason="this transformers has no exaone")
def test_names_that_transformers_5_has_changed_are_changed_as_peft_does_it(tmp_path):
    random_model("exaone", IDS | SETTINGS["qwen2"]).save_pretrained(tmp_path / "base")
    make_tokenizer(final_eos=False).save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", dtype="float32")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], use_rslora=True)
    tensors = {
        name.replace("model.layers", "transformer.h").replace("self_attn", "attn.attention"): tensor
        for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items()
    }
    assert "base_model.model.transformer.h.0.attn.attention.q_proj.lora_A.weight" in tensors
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    expert = import_adapter(adapter, tmp_path / "expert")
    assert set(expert.lora) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    wanted = logits_of(peft_model(base, adapter), make_ids())
    assert not torch.allclose(wanted, logits_of(base.model, make_ids()))
    again = logits_of(peft_model(base, expert.directory), make_ids())
    torch.testing.assert_close(again, wanted)


def test_a_config_can_not_make_peft_import_a_module(adapter, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    set_config(adapter, megatron_config={"a": 1}, megatron_core="evil")
    with pytest.raises(ExpertError, match="megatron_config"):
        import_adapter(adapter, tmp_path / "mine")
    set_config(adapter, megatron_config=None)
    import_adapter(adapter, tmp_path / "mine")
    assert not (tmp_path / "ran").exists()
