"""Step 3: several sources in one loop. Each lies where it is; a row table says which of its rows a row of queries
reads, and -1 that it reads none. Nothing is concatenated or expanded."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_problem import pick, row_table

from lr_kernels import Source


@triton.jit
def attention_kernel(
    query,  # (B, N, H, D)
    key, value,  # S x (R, M, H, D)
    rows,  # S x int32 (B,)
    visible,  # S x bool (R, M)
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

    for source in range(S):
        row = tl.load(pick(rows, source, S) + b)
        tokens = pick(M, source, S)
        count = tl.where(row < 0, 0, tokens)
        for start in range(0, count, BN):
            j = start + tl.arange(0, BN)
            at = ((row * tokens + j) * H + h)[:, None] * D + c[None, :]
            k = tl.load(pick(key, source, S) + at, mask=(j < count)[:, None], other=0.0)
            v = tl.load(pick(value, source, S) + at, mask=(j < count)[:, None], other=0.0)
            seen = tl.load(pick(visible, source, S) + row * tokens + j, mask=j < count, other=0).to(tl.int32) != 0
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(seen[None, :], s, -float("inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
            top = new_top

    tl.store(out + q_at, acc / total[:, None], mask=(i < N)[:, None])


def attend(query: Tensor, sources: list[Source], BM: int = 32, BN: int = 32) -> Tensor:
    B, N, H, D = query.shape
    masks = [torch.ones(s.key.shape[:2], dtype=torch.bool) if s.key_mask is None else s.key_mask for s in sources]
    out = torch.empty_like(query)
    attention_kernel[(B * H * triton.cdiv(N, BM),)](
        query, tuple(s.key for s in sources), tuple(s.value for s in sources),
        tuple(row_table(s, B) for s in sources), tuple(masks), out, tuple(s.key.shape[1] for s in sources),
        N, H, D**-0.5, S=len(sources), D=D, BM=BM, BN=BN,
    )  # fmt: skip
    return out
