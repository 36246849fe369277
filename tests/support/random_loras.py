"""LoRAs of random sizes and ranks, for hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from phatgoose.experts.lora import LoraFactors
from tiny import random


def factors(r: int, n: int, d: int, seed: int, dtype: torch.dtype, rank: int) -> LoraFactors:
    """Random factors of rank r, or of `rank` where that is less."""
    B = random(d, r, seed=seed + 1)[:, :rank] @ random(min(rank, r), r, seed=seed + 2)
    return LoraFactors(random(r, n, seed=seed).to(dtype), B.to(dtype), 2.0)


def loras(*dtypes: torch.dtype):
    sizes, ranks = st.integers(1, 12), st.integers(0, 3) | st.just(8)
    floats = st.sampled_from(dtypes)
    return st.builds(factors, st.integers(1, 8), sizes, sizes, st.integers(0, 999), floats, ranks)
