"""Adapters turned into LoRAs: how much is lost, and no more than allowed."""

from __future__ import annotations

import pytest

from import_cases import CASES, write_case
from phatgoose.errors import ConfigError
from phatgoose.experts.importing.adapter import import_adapter
from phatgoose.experts.kinds.peft import ADAPTER_WEIGHTS


@pytest.mark.parametrize("loss", [0.1, 0.3])
def test_an_approximation_loses_no_more_than_allowed_and_says_how_much(
    base_folders, tmp_path, loss
):
    case = next(case for case in CASES if case.name.startswith("LoHa with"))
    adapter = write_case(case, "llama", base_folders["llama"], tmp_path / "adapter")
    exact = import_adapter(adapter, tmp_path / "exact", allow_loss=0.0).lora
    expert = import_adapter(adapter, tmp_path / "lossy", allow_loss=loss)
    lost = {}
    for site, lora in expert.lora.items():
        whole = (exact[site].B @ exact[site].A).double()
        rest = whole - lora.scale * (lora.B @ lora.A).double()
        lost[site] = float(rest.square().sum() / whole.square().sum())
    record = expert.info.hyperparameters
    assert 0 < max(lost.values()) <= loss
    assert record["kept_at_worst_site"] == pytest.approx(1 - max(lost.values()), abs=1e-5)
    assert max(lost.values()) >= 1 - record["kept_of_update"] > 0
    assert record["converted_from"] == "LOHA"
    ranks = {site: lora.A.shape[0] for site, lora in expert.lora.items()}
    assert any(rank < exact[site].A.shape[0] for site, rank in ranks.items())


def test_an_allowed_loss_changes_nothing_about_a_lora(adapter, tmp_path):
    expert = import_adapter(adapter, tmp_path / "mine", allow_loss=0.5)
    assert (expert.directory / ADAPTER_WEIGHTS).read_bytes() == (
        adapter / ADAPTER_WEIGHTS
    ).read_bytes()


@pytest.mark.parametrize("loss", [1.0, -0.1, 2])
def test_a_loss_that_can_not_be_is_refused(base_folders, tmp_path, loss):
    case = next(case for case in CASES if case.name.startswith("LoHa with"))
    adapter = write_case(case, "llama", base_folders["llama"], tmp_path / "adapter")
    with pytest.raises(ConfigError, match="from 0 to below 1"):
        import_adapter(adapter, tmp_path / "mine", allow_loss=loss)
