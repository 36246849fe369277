"""Joint gates: trained together with the expert (paper Appendix A), for comparison with `gates`.

A joint gate v is part of the new module at its site (`new_modules`), which acts at the strength
sigmoid(v . u), as it does behind a gate trained later.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["new_gate", "take_gates"]


def new_gate(in_features: int, device: torch.device) -> nn.Parameter:
    """An untrained gate: zeros, [n]."""
    return nn.Parameter(torch.zeros(in_features, device=device))


def take_gates(owners: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The trained gates, by site, of modules that hold one as `gate`; they lose it.

    PEFT would save a gate that stayed in its layer.
    """
    gates = {}
    for site, owner in owners.items():
        gate: Tensor = owner.gate  # type: ignore[assignment]
        gates[site] = gate.detach().cpu()
        del owner.gate
    return gates
