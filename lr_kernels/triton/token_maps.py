"""attention_with_token_maps: cross-attention that also returns the head-mean probability of chosen keys.

A program owns a tile of queries and walks the heads, so the mean over heads is a sum in registers: no atomics, and the
(B, H, N, M) probabilities never exist. The chosen keys' logits are computed once more when their row sum is known.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.calls import Call
from ..runtime.checks import FLOAT32_MAX
from ..runtime.schemas import MAX_HEAD_DIM, MAX_TOKENS
from .launch import INTERPRETED, architecture, check_grid, dense_last, dot_precision, on_device, strides
from .sources import load_tile
from .tiles import split_head_dim

_INF = tl.constexpr(float("inf"))


@triton.jit(
    do_not_specialize=["N", "M", "H", "T", "tiles", "blocks", "maps_b", "maps_n", "maps_t", "token_b"]
    + [f"{x}_{dim}" for x in ("query", "key", "value", "out") for dim in "bnh"]
)
def attention_with_token_maps_forward_kernel(
    query,  # (B, N, H, D)
    key, value,  # (B, M, H, D)
    token_indices,  # int32 (B, T)
    out, maps,  # (B, N, H, D), fp32 (B, N, T)
    N, M, H, T, tiles, blocks, query_factor, scale_log2,  # scale_log2 > 0: of products with query * query_factor
    query_b, query_n, query_h, key_b, key_n, key_h, value_b, value_n, value_h, out_b, out_n, out_h,  # units of UNIT
    maps_b, maps_n, maps_t, token_b,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Out and maps of one tile of queries, over all heads."""
    # Which queries, and which BT of the chosen keys
    pid = tl.program_id(0)
    block = pid // tiles % blocks
    b = (pid // tiles // blocks).to(tl.int64)
    i = pid % tiles * BM + tl.arange(0, BM)
    query_ok = i < N
    i = i.to(tl.int64)
    t = block * BT + tl.arange(0, BT)
    chosen = tl.load(token_indices + b * token_b + t, mask=t < T, other=-1)
    chosen_ok = (chosen >= 0) & (chosen < M)
    c0 = tl.arange(0, D0)
    W0: tl.constexpr = D0 if D1 > 0 else D
    mean = tl.zeros([BM, BT], tl.float32)
    scale_log2 = tl.cast(scale_log2, tl.float32)  # the interpreter takes a tiny number for fp64
    # 2^-16 in every weight and 1/16 in the queries, as in attention_steps.py
    HEADROOM: tl.constexpr = 16.0 if query.dtype.element_ty == tl.bfloat16 else 0.0
    WEIGHT: tl.constexpr = 0.0000152587890625 if query.dtype.element_ty == tl.float32 else 1.0
    for h in range(H):
        h64 = tl.cast(h, tl.int64)
        q_at = query + (b * query_b + h64 * query_h) * UNIT + (i * query_n)[:, None] * UNIT
        k_base = key + (b * key_b + h64 * key_h) * UNIT
        v_base = value + (b * value_b + h64 * value_h) * UNIT
        q0 = load_tile(q_at + c0[None, :], query_ok, c0, W0, D0, True, UPCAST)
        q0 = (q0 * query_factor).to(q0.dtype)
        acc0 = tl.zeros([BM, D0], tl.float32)
        if D1 > 0:
            c1 = tl.arange(0, D1)
            q1 = load_tile(q_at + (D0 + c1)[None, :], query_ok, c1, D - D0, D1, True, UPCAST)
            q1 = (q1 * query_factor).to(q1.dtype)
            acc1 = tl.zeros([BM, D1], tl.float32)
        top = tl.full([BM], -_INF, tl.float32)
        total = tl.zeros([BM], tl.float32)
        # Softmax over all keys
        for j in tl.range(0, M, BN):
            at = j + tl.arange(0, BN)
            ok = at < M
            k_at = k_base + (at.to(tl.int64) * key_n)[:, None] * UNIT
            v_at = v_base + (at.to(tl.int64) * value_n)[:, None] * UNIT
            k0 = load_tile(k_at + c0[None, :], ok, c0, W0, D0, True, UPCAST)
            s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            if D1 > 0:
                k1 = load_tile(k_at + (D0 + c1)[None, :], ok, c1, D - D0, D1, True, UPCAST)
                s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
            s = tl.where(ok[None, :], s, -_INF)
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == -_INF, 0.0, new_top)
            # the difference first: of large scores the product with scale_log2 is beyond fp32
            p = tl.exp2((s - base[:, None]) * scale_log2 - HEADROOM) * WEIGHT
            shrink = tl.exp2((top - base) * scale_log2)
            total = total * shrink + tl.sum(p, 1)
            top = new_top
            v0 = load_tile(v_at + c0[None, :], ok, c0, W0, D0, True, UPCAST)
            p = p.to(v0.dtype)
            acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
            if D1 > 0:
                v1 = load_tile(v_at + (D0 + c1)[None, :], ok, c1, D - D0, D1, True, UPCAST)
                acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        if block == 0:
            o_at = out + (b * out_b + h64 * out_h) * UNIT + (i * out_n)[:, None] * UNIT
            o0 = (acc0 / total[:, None]).to(out.dtype.element_ty)
            tl.store(o_at + c0[None, :], o0, mask=query_ok[:, None] & (c0[None, :] < W0))
            if D1 > 0:
                o1 = (acc1 / total[:, None]).to(out.dtype.element_ty)
                tl.store(o_at + (D0 + c1)[None, :], o1, mask=query_ok[:, None] & (c1[None, :] < D - D0))
        # Probability of the chosen keys
        k_at = k_base + (chosen.to(tl.int64) * key_n)[:, None] * UNIT
        k0 = load_tile(k_at + c0[None, :], chosen_ok, c0, W0, D0, True, UPCAST)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_tile(k_at + (D0 + c1)[None, :], chosen_ok, c1, D - D0, D1, True, UPCAST)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        base = tl.where(top == -_INF, 0.0, top)
        mean += tl.exp2((s - base[:, None]) * scale_log2 - HEADROOM) * WEIGHT / total[:, None]
    at = maps + b * maps_b + (i * maps_n)[:, None] + (t.to(tl.int64) * maps_t)[None, :]
    tl.store(at, mean / H, mask=query_ok[:, None] & (t < T)[None, :])


def attention_with_token_maps_triton(
    query: Tensor, key: Tensor, value: Tensor, token_indices: Tensor, scale: float, out: Tensor, maps: Tensor
) -> None:
    """Shapes as in the schema `attention_with_token_maps` of runtime/schemas.py."""
    _check(query, key, value, token_indices, out, maps)
    # Early return for trivial cases
    if out.numel() == 0 or key.shape[1] == 0:
        out.zero_()
        maps.zero_()
        return
    arguments, constants, programs = launch_arguments(
        query, key, value, token_indices, scale, out, maps, architecture(query.device)
    )
    grid = check_grid("attention_with_token_maps", programs)
    with on_device(query.device):
        attention_with_token_maps_forward_kernel[grid](*arguments, **constants)


def launch_arguments(
    query: Tensor, key: Tensor, value: Tensor, token_indices: Tensor, scale: float, out: Tensor, maps: Tensor, arch: int
) -> tuple[tuple, dict, int]:  # fmt: skip
    """(positional arguments, constants and options, number of programs) of the kernel on an architecture."""
    B, N, H, D = query.shape
    M, T = key.shape[1], token_indices.shape[1]
    D0, D1 = split_head_dim(D)
    exact = query.dtype == torch.float32
    # On sm_100 Triton 3.6 cannot compile the tensor memory of 64 rows
    BM = 16 if exact and D > 128 else 32 if exact or INTERPRETED or 100 <= arch < 120 else 64
    if D > 128 and not exact and (80 <= arch < 90 or arch >= 100):  # 64 queries in two parts: 15 spills at D 160
        D0, D1, BM = 256, 0, 32
    BT = min(32, max(16, triton.next_power_of_2(T)))
    tiles, blocks = triton.cdiv(N, BM), max(1, triton.cdiv(T, BT))
    dims = [strides(x, 0, 1, 2) for x in (query, key, value, out)]
    unit = 16 // query.element_size()
    if any(x % unit for strides_ in dims for x in strides_):
        unit = 1
    tokens = dense_last(token_indices)
    shrink = 1 if query.dtype == torch.float16 else 1 / 16
    scale_log2 = min(max(abs(scale) / math.log(2) / shrink, 1e-45), FLOAT32_MAX)  # above 0: no infinity times 0
    arguments = (
        query, key, value, tokens, out, maps, N, M, H, T, tiles, blocks, math.copysign(shrink, scale), scale_log2,
        *(x // unit for strides_ in dims for x in strides_), *strides(maps, 0, 1, 2), strides(tokens, 0)[0],
    )  # fmt: skip
    constants = {
        "D": D, "D0": D0, "D1": D1, "BM": BM, "BN": 32, "BT": BT, "UNIT": unit,
        "PRECISION": dot_precision(query.dtype), "UPCAST": INTERPRETED,
        "num_warps": 4 if D <= 128 and not exact else 8, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip
    return arguments, constants, B * tiles * blocks


def examples(arch: int) -> list[tuple]:
    """(name, kernel, positional arguments, constants and options) of launches whose registers the report tells."""
    found = []
    for head_dim in (40, 160):
        like = torch.empty(2, 4096, 8, head_dim, dtype=torch.bfloat16, device="meta")
        text = like[:, :77]
        tokens = torch.empty(2, 4, dtype=torch.int32, device="meta")
        maps = torch.empty(2, 4096, 4, device="meta")
        arguments, constants, _ = launch_arguments(like, text, text, tokens, 0.1, like, maps, arch)
        kernel = attention_with_token_maps_forward_kernel
        found.append((f"token maps D{head_dim} bf16", kernel, arguments, constants))
    return found


def _check(query: Tensor, key: Tensor, value: Tensor, token_indices: Tensor, out: Tensor, maps: Tensor) -> None:
    """The arguments of attention_with_token_maps."""
    call = Call("attention_with_token_maps", query, "query")
    batch, tokens, heads, head_dim = call.input("query", query, ("batch", "tokens", "heads", "head_dim"))
    call.require(1 <= head_dim <= MAX_HEAD_DIM, "query", f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    call.require(heads >= 1, "query", "at least one head", heads)
    keys = call.input("key", key, (batch, "keys", heads, head_dim))[1]
    call.require(keys <= MAX_TOKENS, "key", f"at most {MAX_TOKENS} keys", keys)
    call.input("value", value, (batch, keys, heads, head_dim))
    chosen = call.input("token_indices", token_indices, (batch, "maps"), 0, torch.int32)[1]
    call.output("out", out, query.shape)
    call.output("maps", maps, (batch, tokens, chosen), 0, torch.float32)
