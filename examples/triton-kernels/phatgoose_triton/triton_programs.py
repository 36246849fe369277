"""What runs on the GPU, written in Triton; `triton_gpu` beside this calls it.

Glossary of `kernels`. A *pair* is a token and one of its k experts, numbered t k + j; a
*block* is some of one expert's pairs, multiplied together. Pointers are named after what they point
at; all tensors are contiguous. Sums are float32, and so is `inner` [T k, r], which holds w A u.
Offsets that grow with tokens or experts are 64-bit. Tensor cores multiply float32 as three products
of tf32, which loses no more than float32's own sums.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter can't multiply bfloat16: there products are of float32, with equal results.
WIDE = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
RANKS = tl.constexpr(16)  # multiplied by B at once


@triton.jit
def _both(rows, columns):
    return rows[:, None] & columns[None, :]


@triton.jit
def _multiplied(left, right, products):
    if WIDE:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, products, input_precision="tf32x3")


@triton.jit
def _affinities(
    u, vectors, token, expert, tokens, n, E, eps, STANDARDISED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    products = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if STANDARDISED:
        # The variance is summed around each token's first feature, which keeps it exact where
        # activations are far from zero.
        first = tl.load(u + token * n, mask=token < tokens, other=0.0).to(tl.float32)
        sums = tl.zeros((BLOCK_T,), tl.float32)
        squares = tl.zeros((BLOCK_T,), tl.float32)
        vector_sums = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, n, BLOCK_N):
        feature = start + tl.arange(0, BLOCK_N)
        inside = _both(token < tokens, feature < n)
        x = tl.load(u + token[:, None] * n + feature[None, :], mask=inside, other=0.0)
        loaded = _both(feature < n, expert < E)
        v = tl.load(vectors + expert[None, :] * n + feature[:, None], mask=loaded, other=0.0)
        products = _multiplied(x, v, products)
        if STANDARDISED:
            shifted = tl.where(inside, x.to(tl.float32) - first[:, None], 0.0)
            sums += tl.sum(shifted, 1)
            squares += tl.sum(shifted * shifted, 1)
            vector_sums += tl.sum(v.to(tl.float32), 0)
    if STANDARDISED:
        mean = sums / n
        variance = tl.maximum(squares / n - mean * mean, 0.0)
        # Rounding leaves v̄ a small mean; it goes with the mean of u.
        products -= (mean + first)[:, None] * vector_sums[None, :]
        products *= (1.0 / tl.sqrt((variance + eps) * n))[:, None]
    else:
        products = tl.abs(products)
    return products


@triton.jit
def _choose(
    scores,
    experts,
    weights,
    token,
    tokens,
    E,
    k,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert = tl.arange(0, BLOCK_E)
    # NaN compares as false and becomes the lowest number, so every choice is one of the E experts.
    left = tl.where(scores > -3.4e38, scores, -3.4e38)
    left = tl.where((expert < E)[None, :], left, float("-inf"))
    choice = tl.arange(0, BLOCK_K)
    chosen = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    for j in range(k):
        # Of equals the first, as on every path (`router.highest`).
        best = tl.argmax(left, 1)
        tl.store(experts + token * k + j, best.to(tl.int64), mask=token < tokens)
        chosen = tl.where(choice[None, :] == j, tl.max(left, 1)[:, None], chosen)
        left = tl.where(expert[None, :] == best[:, None], float("-inf"), left)
    powers = tl.exp(chosen - tl.max(chosen, 1)[:, None])
    shares = powers / tl.sum(powers, 1)[:, None]
    written = _both(token < tokens, choice < k)
    tl.store(weights + token[:, None] * k + choice[None, :], shares, mask=written)


@triton.jit(do_not_specialize=["tokens"])
def score_experts(
    u, vectors, scores, tokens, n, E, eps, STANDARDISED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Affinities [T, E] of some tokens to some experts."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    products = _affinities(
        u, vectors, token, expert, tokens, n, E, eps, STANDARDISED, BLOCK_T, BLOCK_E, BLOCK_N
    )
    written = _both(token < tokens, expert < E)
    tl.store(scores + token[:, None] * E + expert[None, :], products, mask=written)


@triton.jit(do_not_specialize=["tokens"])
def score_and_choose(
    u, vectors, experts, weights, tokens, n, E, k, eps, STANDARDISED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The k experts of the highest affinity of some tokens, and their softmax: E fits a block."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    products = _affinities(
        u, vectors, token, expert, tokens, n, E, eps, STANDARDISED, BLOCK_T, BLOCK_E, BLOCK_N
    )
    _choose(products, experts, weights, token, tokens, E, k, BLOCK_T, BLOCK_E, BLOCK_K)


@triton.jit
def choose_experts(scores, experts, weights, E, k, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr):
    """The k highest scores of one token, and their softmax."""
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    expert = tl.arange(0, BLOCK_E)
    row = tl.load(scores + token[:, None] * E + expert[None, :], mask=(expert < E)[None, :])
    _choose(row, experts, weights, token, token + 1, E, k, 1, BLOCK_E, BLOCK_K)


@triton.jit
def _choice(scores, pair, E, k, BLOCK_E: tl.constexpr):
    expert = tl.arange(0, BLOCK_E)
    left = tl.load(scores + pair // k * E + expert, mask=expert < E, other=0.0)
    left = tl.where(left > -3.4e38, left, -3.4e38)
    left = tl.where(expert < E, left, float("-inf"))
    highest = tl.max(left, 0)
    own, power, total = tl.argmax(left, 0), 0.0, 0.0
    for j in range(k):
        best = tl.argmax(left, 0)
        each = tl.exp(tl.max(left, 0) - highest)
        own = tl.where(j == pair % k, best, own)
        power = tl.where(j == pair % k, each, power)
        total += each
        left = tl.where(expert == best, float("-inf"), left)
    return own.to(tl.int64), power / total


@triton.jit
def shrink_pair(
    u, scores, experts, weights, A, inner, E, k, r, n, CHOOSES: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some of the r numbers w A u of one pair. CHOOSES has its expert chosen first."""
    pair = tl.program_id(0).to(tl.int64)
    if CHOOSES:
        expert, weight = _choice(scores, pair, E, k, BLOCK_E)
        # Each program of the pair has chosen the same; one of them writes it.
        if tl.program_id(1) == 0:
            tl.store(experts + pair, expert)
            tl.store(weights + pair, weight)
    else:
        expert = tl.load(experts + pair)
        weight = tl.load(weights + pair)
        if weight == 0.0:
            return
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = (expert * r + rank) * n
    products = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, n, BLOCK_N):
        feature = start + tl.arange(0, BLOCK_N)
        x = tl.load(u + pair // k * n + feature, mask=feature < n, other=0.0)
        loaded = _both(rank < r, feature < n)
        a = tl.load(A + rows[:, None] + feature[None, :], mask=loaded, other=0.0)
        products += a.to(tl.float32) * x.to(tl.float32)[None, :]
    tl.store(inner + pair * r + rank, weight * tl.sum(products, 1), mask=rank < r)


@triton.jit
def expand_token(
    inner,
    experts,
    weights,
    B,
    delta,
    k,
    r,
    d,
    ADDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some of the d numbers of one token's delta: B `inner` of its pairs; or ADDED to it."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(k):
        pair = token * k + j
        if tl.load(weights + pair) != 0.0:
            expert = tl.load(experts + pair)
            for start in range(0, r, RANKS):
                rank = start + tl.arange(0, RANKS)
                h = tl.load(inner + pair * r + rank, mask=rank < r, other=0.0)
                loaded = _both(rank < r, feature < d)
                b_rows = B + (expert * r + rank)[:, None] * d
                b = tl.load(b_rows + feature[None, :], mask=loaded, other=0.0)
                total += tl.sum(h[:, None] * b.to(tl.float32), 0)
    if ADDED:
        total += tl.load(delta + token * d + feature, mask=feature < d, other=0.0).to(tl.float32)
    tl.store(delta + token * d + feature, total.to(delta.dtype.element_ty), mask=feature < d)


@triton.jit(do_not_specialize=["pairs"])
def count_pairs(experts, weights, counts, places, pairs, BLOCK: tl.constexpr):
    """How many pairs each expert has, `counts` [E], and each pair's place among its expert's."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weighs = tl.load(weights + pair, mask=pair < pairs, other=0.0) != 0.0
    expert = tl.load(experts + pair, mask=weighs, other=0)
    # Which pair comes first is chance, but no result depends on it.
    place = tl.atomic_add(counts + expert, 1, mask=weighs)
    tl.store(places + pair, place, mask=weighs)


@triton.jit
def arrange_experts(counts, firsts, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Each expert's first block, when each has as many as its pairs fill: `firsts` [E]."""
    expert = tl.arange(0, BLOCK_E)
    count = tl.load(counts + expert, mask=expert < E, other=0)
    blocks = (count + BLOCK_T - 1) // BLOCK_T
    tl.store(firsts + expert, tl.cumsum(blocks, 0) - blocks, mask=expert < E)


@triton.jit(do_not_specialize=["pairs"])
def place_pairs(
    experts,
    weights,
    places,
    firsts,
    owners,
    rows,
    pairs,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put each pair into a block of its expert: `rows` and `owners` count from 1."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weighs = tl.load(weights + pair, mask=pair < pairs, other=0.0) != 0.0
    expert = tl.load(experts + pair, mask=weighs, other=0)
    place = tl.load(places + pair, mask=weighs, other=0)
    block = tl.load(firsts + expert, mask=weighs, other=0) + place // BLOCK_T
    row = place % BLOCK_T
    # Counted from 1: the 0 of a fresh tensor marks an empty place.
    tl.store(rows + block * BLOCK_T + row, pair + 1, mask=weighs)
    tl.store(owners + block, expert.to(tl.int32) + 1, mask=weighs & (row == 0))


@triton.jit
def shrink_block(
    u,
    owners,
    rows,
    weights,
    A,
    inner,
    k,
    r,
    n,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some of the r numbers w A u of each pair in one block."""
    block = tl.program_id(0)
    expert = tl.load(owners + block).to(tl.int64) - 1
    # A block more than were needed.
    if expert < 0:
        return
    pair = tl.load(rows + block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64) - 1
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_rows = u + (pair // k)[:, None] * n
    a_rows = A + (expert * r + rank)[None, :] * n
    products = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, n, BLOCK_N):
        feature = start + tl.arange(0, BLOCK_N)
        inside = _both(pair >= 0, feature < n)
        x = tl.load(x_rows + feature[None, :], mask=inside, other=0.0)
        loaded = _both(feature < n, rank < r)
        a = tl.load(a_rows + feature[:, None], mask=loaded, other=0.0)
        products = _multiplied(x, a, products)
    weight = tl.load(weights + pair, mask=pair >= 0, other=0.0)
    written = _both(pair >= 0, rank < r)
    places = inner + pair[:, None] * r + rank[None, :]
    tl.store(places, products * weight[:, None], mask=written)


@triton.jit
def expand_block(
    inner,
    owners,
    rows,
    B,
    parts,
    r,
    d,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some of the d numbers w B A u of each pair in one block: `parts` [T k, d]."""
    block = tl.program_id(0)
    expert = tl.load(owners + block).to(tl.int64) - 1
    if expert < 0:
        return
    pair = tl.load(rows + block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64) - 1
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    products = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, r, RANKS):
        rank = start + tl.arange(0, RANKS)
        inside = _both(pair >= 0, rank < r)
        h = tl.load(inner + pair[:, None] * r + rank[None, :], mask=inside, other=0.0)
        loaded = _both(rank < r, feature < d)
        b_rows = B + (expert * r + rank)[:, None] * d
        b = tl.load(b_rows + feature[None, :], mask=loaded, other=0.0)
        # Tensor cores want both sides of one type.
        h = h.to(b.dtype)
        products = _multiplied(h, b, products)
    written = _both(pair >= 0, feature < d)
    places = parts + pair[:, None] * d + feature[None, :]
    tl.store(places, products.to(parts.dtype.element_ty), mask=written)


@triton.jit
def add_choices(parts, weights, delta, k, d, ADDED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Some of the d numbers of one token's delta, the sum of its pairs' parts; or ADDED to it."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(k):
        pair = token * k + j
        if tl.load(weights + pair) != 0.0:
            part = tl.load(parts + pair * d + feature, mask=feature < d, other=0.0)
            total += part.to(tl.float32)
    if ADDED:
        total += tl.load(delta + token * d + feature, mask=feature < d, other=0.0).to(tl.float32)
    tl.store(delta + token * d + feature, total.to(delta.dtype.element_ty), mask=feature < d)
