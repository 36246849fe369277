"""LoRAs of several ranks, side by side."""

from __future__ import annotations

import torch

from phatgoose.experts.pool import Pool
from phatgoose.routing.stacks import stack_of

QUERY = "model.layers.0.self_attn.q_proj"


DOWN = "model.layers.1.mlp.down_proj"


def test_a_stack_of_mixed_ranks_is_filled_up_with_zeros(write, tmp_path):
    write("four", "four")
    write("six", "six")
    pool = Pool.open(tmp_path / "pool")
    stack = stack_of(pool, DOWN, torch.float32, torch.device("cpu")).lora
    assert stack_of(pool, DOWN, torch.float32, torch.device("cpu")).experts.tolist() == [0, 1]
    assert stack.A.shape == (2, 6, 48)
    assert stack.B.shape == (2, 6, 32)
    assert not stack.A[0, 4:].any()
    assert not stack.B[0, 4:].any()
    for row, expert in enumerate(pool.experts):
        lora = expert.lora[DOWN]
        update = lora.scale * lora.B @ lora.A
        assert torch.allclose(stack.B[row].T @ stack.A[row], update, atol=1e-6)


def test_a_stack_holds_only_the_experts_that_act_at_the_site(write, tmp_path):
    write("a", "two")
    write("b", "four")
    pool = Pool.open(tmp_path / "pool")
    cpu = torch.device("cpu")
    assert stack_of(pool, DOWN, torch.float32, cpu).experts.tolist() == [1]
    assert stack_of(pool, QUERY, torch.float32, cpu).experts.tolist() == [0, 1]
    assert pool.vectors("gates", DOWN).tolist() == [pool.experts[1].gates[DOWN].tolist()]
    assert pool.vectors("gates", QUERY).shape == (2, 32)


def test_a_stack_comes_in_the_dtype_asked_for(write):
    stack = stack_of(Pool.open(write("a")), QUERY, torch.bfloat16, torch.device("cpu")).lora
    assert (stack.A.dtype, stack.B.dtype) == (torch.bfloat16, torch.bfloat16)
