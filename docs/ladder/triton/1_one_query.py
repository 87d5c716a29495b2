"""Step 1: the definition. One program computes one query, with all keys in front of it at once."""

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
    N, M, H, scale, D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i, h, b = program % N, program // N % H, program // (N * H)
    c = tl.arange(0, D)
    j = tl.arange(0, KEYS)
    at = ((b * M + j) * H + h)[:, None] * D + c[None, :]
    q = tl.load(query + ((b * N + i) * H + h) * D + c)
    k = tl.load(key + at, mask=(j < M)[:, None], other=0.0)
    v = tl.load(value + at, mask=(j < M)[:, None], other=0.0)
    seen = tl.load(visible + b * M + j, mask=j < M, other=0).to(tl.int32) != 0

    s = tl.sum(k * q[None, :], 1) * scale
    s = tl.where(seen, s, -float("inf"))
    p = tl.exp(s - tl.max(s, 0))
    o = tl.sum(p[:, None] * v, 0) / tl.sum(p, 0)
    tl.store(out + ((b * N + i) * H + h) * D + c, o)


def attend(query: Tensor, sources: list[Source]) -> Tensor:
    B, N, H, D = query.shape
    key, value, visible = concatenated(B, sources)
    M = key.shape[1]
    out = torch.empty_like(query)
    attention_kernel[(B * H * N,)](
        query, key, value, visible, out, N, M, H, D**-0.5, D=D, KEYS=triton.next_power_of_2(M)
    )
    return out
