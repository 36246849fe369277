"""Near-duplicates: the cosine of updates that are never formed."""

import pytest
import torch

from phatgoose.analysis import duplicates
from phatgoose.analysis.duplicates import cosines, squared_norms
from phatgoose.experts.expert import Expert
from phatgoose.experts.ia3 import ScalingVector
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.routing.stacks import stack_of


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
