"""Step 5: the loop of a GPU. List entries are loaded a tile ahead, only the keys left over by whole tiles are masked,
and logits are in log2 units, which is what the processor's exponential takes."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_problem import pick, row_table

from lr_kernels import Source, plan_attention

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tile(q, acc, top, total, k_at, v_at, ok, alpha, MASKED: tl.constexpr):
    """Add a tile of keys to the running softmax; alpha turns scores into logits in log2 units."""
    if MASKED:
        k = tl.load(k_at, mask=ok[:, None], other=0.0)
        v = tl.load(v_at, mask=ok[:, None], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        s = tl.where(ok[None, :], s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * alpha)
    p = tl.exp2(s * alpha - new_top[:, None])  # one multiply-add
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def attention_kernel(
    query,  # (B, N, H, D)
    key, value,  # S x (R, M, H, D)
    rows,  # S x int32 (B,)
    key_index, key_count,  # S x int32 (R, M), S x int32 (R,)
    with_index,  # bit s: source s has a list; without one all its keys are visible
    out,  # (B, N, H, D)
    M,  # S integers
    N, H, scale, S: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(N, BM)
    tile, h, b = program % tiles, program // tiles % H, program // (tiles * H)
    c = tl.arange(0, D)
    i = tile * BM + tl.arange(0, BM)
    q_at = ((b * N + i) * H + h)[:, None] * D + c[None, :]
    q = tl.load(query + q_at, mask=(i < N)[:, None], other=0.0)
    top = tl.full([BM], -1e38, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    alpha = scale * LOG2E

    on = tl.arange(0, BN)
    for source in range(S):
        row = tl.load(pick(rows, source, S) + b)
        tokens = pick(M, source, S)
        listed = (((with_index >> source) & 1) != 0) & (row >= 0)
        count = tl.where(listed, tl.load(pick(key_count, source, S) + row, mask=listed, other=0), tokens)
        count = tl.where(row < 0, 0, count)
        index = pick(key_index, source, S) + row * tokens
        index_count = tl.where(listed, count, 0)
        k = pick(key, source, S) + (row * tokens * H + h) * D + c[None, :]
        v = pick(value, source, S) + (row * tokens * H + h) * D + c[None, :]

        whole = count // BN * BN
        entries = tl.load(index + on, mask=on < index_count, other=0)
        for start in tl.range(0, whole, BN):
            at = start + on
            j = tl.where(at < index_count, entries, at)[:, None] * (H * D)
            entries = tl.load(index + at + BN, mask=at + BN < index_count, other=0)
            acc, top, total = attend_tile(q, acc, top, total, k + j, v + j, on, alpha, False)
        for start in tl.range(whole, count, BN):  # at most one turn
            at = tl.minimum(start + on, count - 1)
            j = tl.where(at < index_count, tl.load(index + at, mask=at < index_count, other=0), at)[:, None] * (H * D)
            acc, top, total = attend_tile(q, acc, top, total, k + j, v + j, start + on < count, alpha, True)

    tl.store(out + q_at, acc / total[:, None], mask=(i < N)[:, None])


def attend(query: Tensor, sources: list[Source], BM: int = 32, BN: int = 32) -> Tensor:
    B, N, H, D = query.shape
    plan = plan_attention([s.key_mask for s in sources])
    filler = torch.zeros(1, dtype=torch.int32)  # a pointer for the sources without a list, never read
    out = torch.empty_like(query)
    attention_kernel[(B * H * triton.cdiv(N, BM),)](
        query, tuple(s.key for s in sources), tuple(s.value for s in sources), tuple(row_table(s, B) for s in sources),
        tuple(filler if x is None else x for x in plan.key_index),
        tuple(filler if x is None else x for x in plan.key_count),
        sum(1 << s for s, x in enumerate(plan.key_index) if x is not None),
        out, tuple(s.key.shape[1] for s in sources), N, H, D**-0.5, S=len(sources), D=D, BM=BM, BN=BN,
    )  # fmt: skip
    return out
