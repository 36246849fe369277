"""Some experts' modules at one site."""

from __future__ import annotations

import torch

from phatgoose.experts.kinds.ia3 import ScalingVector
from phatgoose.routing.stacks import OutputScalingStack, row_tensor

CPU = torch.device("cpu")


def test_a_part_has_the_tensors_of_its_rows_by_their_names_in_the_whole():
    scaling = ScalingVector(torch.tensor([1.0, 2.0]), on_input=False)
    part = OutputScalingStack.of({1: scaling, 3: scaling}, CPU)
    tensors = part.tensors()
    assert set(tensors) == set(part.names.values())
    assert part.rows.tolist() == [1, 3]
    assert row_tensor(range(3), CPU).tolist() == [0, 1, 2]
