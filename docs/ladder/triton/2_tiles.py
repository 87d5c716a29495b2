"""Step 2: tiles. A program computes BM queries and walks the keys BN at a time; the softmax is kept up to date as it
goes (online), and products of tiles are tl.dot."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_problem import concatenated

from lr_kernels import Source


@triton.jit
def attention_kernel(
    query, key, value,  # (B, N, H, D), (B, M, H, D) twice
    visible,  # bool (B, M)
    out,  # (B, N, H, D)
    N, M, H, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
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

    for start in range(0, M, BN):
        j = start + tl.arange(0, BN)
        at = ((b * M + j) * H + h)[:, None] * D + c[None, :]
        k = tl.load(key + at, mask=(j < M)[:, None], other=0.0)
        v = tl.load(value + at, mask=(j < M)[:, None], other=0.0)
        seen = tl.load(visible + b * M + j, mask=j < M, other=0).to(tl.int32) != 0
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
    key, value, visible = concatenated(B, sources)
    out = torch.empty_like(query)
    attention_kernel[(B * H * triton.cdiv(N, BM),)](
        query, key, value, visible, out, N, key.shape[1], H, D**-0.5, D=D, BM=BM, BN=BN
    )
    return out
