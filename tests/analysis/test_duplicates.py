"""Near-duplicates: the cosine of updates that are never formed."""

from dataclasses import replace

import pytest
import torch

from mixed_experts import renamed
from phatgoose.analysis import duplicates
from phatgoose.analysis.duplicates import cosines, near_duplicates, squared_norms
from phatgoose.experts.expert import Expert
from phatgoose.experts.ia3 import ScalingVector
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.routing.stacks import stack_of


def twin(expert: Expert, name: str, change) -> Expert:
    """The expert under another name and hash, with `change` done to the factors of each site."""
    info = replace(expert.info, name=name, adapter_sha256=name)
    lora = {site: change(factors) for site, factors in expert.lora.items()}
    return replace(expert, info=info, modules=lora)


def update(expert: Expert, pool: Pool, widths: dict[str, tuple[int, int]]) -> torch.Tensor:
    """The whole update as one vector, written out."""
    parts = []
    for site in pool.sites:
        if site in expert.lora:
            lora = expert.lora[site]
            parts.append((lora.scale * lora.B.double() @ lora.A.double()).flatten())
        else:
            parts.append(torch.zeros(widths[site], dtype=torch.float64).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("block", [1, 3, 2048])
def test_cosines_are_those_of_the_updates_written_out(uneven, monkeypatch, block):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    widths = {
        site: (lora.B.shape[0], lora.A.shape[1])
        for expert in uneven.experts
        for site, lora in expert.lora.items()
    }
    whole = torch.stack([update(expert, uneven, widths) for expert in uneven.experts])
    unit = torch.nn.functional.normalize(whole, dim=-1)
    torch.testing.assert_close(cosines(uneven), unit @ unit.T, rtol=0, atol=1e-6)


def test_squared_norms_are_those_of_the_updates_written_out(llama_mixed):
    for site in llama_mixed.sites:
        stack = stack_of(llama_mixed, site, torch.float64, torch.device("cpu"))
        for part, rows in stack.rows().items():
            got = squared_norms(stack.parts[part])
            for norm, z in zip(got, stack.experts[rows].tolist(), strict=True):
                module = llama_mixed.experts[z].modules[site]
                if isinstance(module, LoraFactors):
                    change = module.scale * module.B.double() @ module.A.double()
                elif isinstance(module, ScalingVector):
                    change = module.vector.double() - 1
                else:
                    change = module.scale * module.up.double() @ module.down.double()
                assert float(norm) == pytest.approx(float(change.square().sum()), rel=1e-4)


def test_the_same_update_in_other_factors_is_found_and_others_are_not(uneven):
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]

    def turned(lora: LoraFactors) -> LoraFactors:
        return replace(lora, A=turn @ lora.A, B=2 * lora.B @ turn.T, scale=lora.scale / 2)

    def nudged(lora: LoraFactors) -> LoraFactors:
        return replace(lora, B=lora.B + 0.1 * lora.B.abs().mean() * torch.ones_like(lora.B))

    source = uneven.experts[2]
    copied = replace(source, info=replace(source.info, name="copied"))
    more = [twin(source, "turned", turned), twin(source, "nudged", nudged), copied]
    found = near_duplicates(Pool((*uneven.experts, *more)), 0.95)
    pairs = [(pair.one, pair.other, pair.identical) for pair in found]
    assert pairs[0] == ("e2", "copied", True)
    assert set(pairs[1:3]) == {("e2", "turned", False), ("turned", "copied", False)}
    assert {pair.one for pair in found} | {pair.other for pair in found} == {
        "e2",
        "turned",
        "nudged",
        "copied",
    }
    assert found[0].cosine == 1
    assert all(abs(pair.cosine - 1) < 1e-6 for pair in found[:3])
    assert all(0.95 <= pair.cosine < 0.9999 for pair in found[3:])
    assert near_duplicates(uneven) == []


def test_near_duplicates_are_found_among_all_kinds(llama_mixed):
    twins = [renamed(llama_mixed.select([name]).experts[0], "twin") for name in ("ia32", "biased1")]
    for twin in twins:
        twin = replace(twin, info=replace(twin.info, adapter_sha256="another"))
        (found,) = near_duplicates(Pool((*llama_mixed.experts, twin)))
        assert (found.other, found.identical) == ("twin", False)
    same = cosines(llama_mixed)
    assert same[2, 3] == same[0, 2] == 0  # of different kinds
    assert 0 < abs(float(same[3, 4])) < 0.9
