"""multi_source_attention, forward: one launch for all sources, masks and query classes of a layer.

A run-time loop over the sources picks pointers by a select chain, so there is one pipelined loop over key tiles however
many sources there are, no pointer table on the device and no host synchronization. Scores live in log2 units.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import INTERPRETED, architecture, check_grid, dense_last, on_device, strides

LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(LOG2E)
_MAX = tl.constexpr(3.4028234663852886e38)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _pick(options, s, S: tl.constexpr):
    """options[s] of an S-tuple for a run-time s."""
    picked = options[0]
    for i in tl.static_range(1, S):
        picked = tl.where(s == i, options[i], picked)
    return picked


@triton.jit
def _pick_int(options, s, S: tl.constexpr):
    """int64 options[s] of integers that came through `_encode`."""
    return (_pick(options, s, S) >> 4).to(tl.int64)


@triton.jit
def load_tile(
    pointers, ok, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr
):
    """(tokens, PADDED) of which WIDTH columns, and with MASKED only the rows `ok`, are read; zeros elsewhere."""
    if WIDTH < PADDED:
        if MASKED:
            x = tl.load(pointers, mask=ok[:, None] & (columns[None, :] < WIDTH), other=0.0)
        else:
            x = tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=ok[:, None], other=0.0)
    else:
        x = tl.load(pointers)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _to_log2(x):
    """Natural-log weight -> log2 units. What is finite stays finite: finfo.min must not turn into -inf."""
    y = tl.minimum(x * _LOG2E, _MAX, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(y, -_MAX, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(tl.abs(x) == _INF, x, y)


@triton.jit
def _attend_tile(
    q0, q1, acc0, acc1, top, total,  # (BM, D0), (BM, D1), (BM, D0), (BM, D1), (BM,), (BM, 8)
    key, value, tokens, ok,  # pointers at (row, 0, head, 0); (BN,) tokens to read; (BN,) which of them exist
    key_stride, value_stride, alpha, shift,  # shift: scalar, or (1, BN)
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    NARROW: tl.constexpr, PER_PAIR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys and values to the running softmax of BM queries."""
    c0 = tl.arange(0, D0)
    if NARROW:  # the launcher knows that no token offset of a source reaches 2^31: half the address registers
        k_at = key + (tokens * (key_stride.to(tl.int32) * UNIT))[:, None]
        v_at = value + (tokens * (value_stride.to(tl.int32) * UNIT))[:, None]
    else:
        k_at = key + (tokens.to(tl.int64) * key_stride)[:, None] * UNIT
        v_at = value + (tokens.to(tl.int64) * value_stride)[:, None] * UNIT
    W0: tl.constexpr = D0 if D1 > 0 else D
    k0 = load_tile(k_at + c0[None, :], ok, c0, W0, D0, MASKED, UPCAST)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        c1 = tl.arange(0, D1)
        k1 = load_tile(k_at + (D0 + c1)[None, :], ok, c1, D - D0, D1, MASKED, UPCAST)
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    v0 = load_tile(v_at + c0[None, :], ok, c0, W0, D0, MASKED, UPCAST)
    if PER_PAIR or MASKED:  # bias per key, or an alpha that may be negative: one instruction more per pair
        t = s * alpha + shift
        if MASKED:
            t = tl.where(ok[None, :], t, -_INF)
        # min(): a live +inf gives NaN for its own row; max() drops NaN, which p carries on
        new_top = tl.minimum(tl.maximum(top, tl.max(t, 1)), _MAX)
        p = tl.exp2(t - new_top[:, None])
    else:
        new_top = tl.minimum(tl.maximum(top, tl.max(s, 1) * alpha + shift), _MAX)
        p = tl.exp2(s * alpha - (new_top - shift)[:, None])
    shrink = tl.exp2(top - new_top)
    # 8 partial sums per row stay inside a thread, which halves the shuffles of the loop
    total = total * shrink[:, None] + tl.sum(tl.reshape(p, (BM, BN // 8, 8)), 1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if D1 > 0:
        c1 = tl.arange(0, D1)
        v1 = load_tile(v_at + (D0 + c1)[None, :], ok, c1, D - D0, D1, MASKED, UPCAST)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, new_top, total


@triton.jit
def _key_tokens(index, at, index_count):
    """(BN,) tokens of the keys at places `at` of the list; index_count is 0 where this source has no list."""
    if index is None:
        return at
    else:
        listed = at < index_count
        return tl.where(listed, tl.load(index + at, mask=listed, other=0), at)


@triton.jit
def _key_shift(bias, tokens, at, bias_count, beta):
    """beta plus the bias of each key in log2 units, (1, BN); without any bias beta alone."""
    if bias is None:
        return beta
    else:
        return (_to_log2(tl.load(bias + tokens, mask=at < bias_count, other=0.0)) + beta)[None, :]


@triton.jit
def _query_tile(class_start, tile, classes, BM: tl.constexpr):
    """Tile number -> (class, first place, end place) in query_order; past the last tile (0, 0, 0). No tile straddles
    classes."""
    c_found = 0
    first = 0
    end = 0
    for c in range(classes):
        low = tl.load(class_start + c)
        high = tl.load(class_start + c + 1)
        count = tl.cdiv(high - low, BM)
        here = (tile >= 0) & (tile < count)
        c_found = tl.where(here, c, c_found)
        first = tl.where(here, low + tile * BM, first)
        end = tl.where(here, high, end)
        tile -= count
    return c_found, first, end


@triton.jit(
    do_not_specialize=[
        "N", "H", "classes", "tiles_per_head", "with_rows", "with_index", "with_bias", "with_scale", "with_shift",
        "query_b", "query_n", "query_h", "out_b", "out_n", "out_h", "lse_b", "lse_n", "lse_h", "order_b", "class_b",
    ]
)  # fmt: skip
def multi_source_attention_forward_kernel(
    query,  # (B, N, H, D)
    key, value,  # S x (R, M, H, D)
    rows,  # S x int32 (B,); here and in the next five, None where no source has it
    key_index, key_count,  # S x int32 (C or 1, R or 1, M), S x int32 (C or 1, R or 1)
    key_bias,  # S x fp32 (R or 1, M)
    logit_scale, logit_bias,  # S x fp32 (B, H)
    query_order, class_start,  # int32 (B or 1, N), (B or 1, C + 1), or None: one class
    out, lse,  # (B, N, H, D), fp32 (B, N, H) or None
    M, R,  # S encoded integers each, as all strides of sources
    key_stride, value_stride,  # (row, key, head) x S, in units of UNIT elements
    index_stride, count_stride, bias_stride, scale_stride, shift_stride,  # (class, row), same, (row,), (b, h), same
    N, H, classes, tiles_per_head, scale_log2,
    with_rows, with_index, with_bias, with_scale, with_shift,  # bit s: source s has it
    query_b, query_n, query_h, out_b, out_n, out_h,  # strides in units of UNIT elements
    lse_b, lse_n, lse_h, order_b, class_b,
    S: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr, PER_PAIR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Which queries: one tile of BM queries of one class, one head
    pid = tl.program_id(0)
    tile = pid % tiles_per_head
    h = pid // tiles_per_head % H
    b = pid // tiles_per_head // H
    h64 = h.to(tl.int64)
    b64 = b.to(tl.int64)
    om = tl.arange(0, BM)
    c64 = tl.cast(0, tl.int64)
    if query_order is None:
        i = tile * BM + om
        query_ok = i < N
    else:
        c, first, end = _query_tile(class_start + b64 * class_b, tile, classes, BM)
        if first >= end:
            return
        c64 = c.to(tl.int64)
        slot = first + om
        query_ok = slot < end
        i = tl.load(query_order + b64 * order_b + slot, mask=query_ok, other=0)
    i = i.to(tl.int64)

    # The queries stay in registers or shared memory for all sources
    c0 = tl.arange(0, D0)
    W0: tl.constexpr = D0 if D1 > 0 else D
    q_at = query + (b64 * query_b + h64 * query_h) * UNIT + (i * query_n)[:, None] * UNIT
    q0 = load_tile(q_at + c0[None, :], query_ok, c0, W0, D0, True, UPCAST)
    q1 = q0
    acc0 = tl.zeros([BM, D0], tl.float32)
    acc1 = 0.0
    if D1 > 0:
        c1 = tl.arange(0, D1)
        q1 = load_tile(q_at + (D0 + c1)[None, :], query_ok, c1, D - D0, D1, True, UPCAST)
        acc1 = tl.zeros([BM, D1], tl.float32)
    top = tl.full([BM], -_MAX, tl.float32)
    total = tl.zeros([BM, 8], tl.float32)

    on = tl.arange(0, BN)
    for s in range(S):
        # Which row of the source; a row outside [0, R) reads nothing
        row = b64
        reads = True
        if rows is not None:
            has = ((with_rows >> s) & 1) != 0
            r = tl.load(_pick(rows, s, S) + b, mask=has, other=0).to(tl.int64)
            reads = (r >= 0) & (r < _pick_int(R, s, S))
            row = tl.where(has, tl.where(reads, r, 0), b64)
        # How many keys: all, or the count of the class, read from the device
        count = _pick_int(M, s, S).to(tl.int32)
        index = None
        index_count = 0
        if key_index is not None:
            gathered = ((with_index >> s) & 1) != 0
            index = _pick(key_index, s, S)
            index += c64 * _pick_int(index_stride[0], s, S) + row * _pick_int(index_stride[1], s, S)
            counts = _pick(key_count, s, S)
            counts += c64 * _pick_int(count_stride[0], s, S) + row * _pick_int(count_stride[1], s, S)
            count = tl.where(gathered, tl.load(counts, mask=gathered, other=0), count)
            index_count = tl.where(gathered, count, 0)
        count = tl.where(reads, count, 0)
        # logit = alpha · ⟨q, k⟩ + beta + bias
        alpha = scale_log2
        if logit_scale is not None:
            has = ((with_scale >> s) & 1) != 0
            place = b64 * _pick_int(scale_stride[0], s, S) + h64 * _pick_int(scale_stride[1], s, S)
            alpha = scale_log2 * tl.load(_pick(logit_scale, s, S) + place, mask=has, other=1.0)
        beta = 0.0
        if logit_bias is not None:
            has = ((with_shift >> s) & 1) != 0
            place = b64 * _pick_int(shift_stride[0], s, S) + h64 * _pick_int(shift_stride[1], s, S)
            beta = _to_log2(tl.load(_pick(logit_bias, s, S) + place, mask=has, other=0.0))
            # fp32 loses ⟨q, k⟩ beside such a bias; without this exp2(alpha · s) could overflow
            alpha = tl.where(tl.abs(beta) > 1e30, 0.0, alpha)
        bias = None
        bias_count = 0
        if key_bias is not None:
            bias_count = tl.where(((with_bias >> s) & 1) != 0, count, 0)
            bias = _pick(key_bias, s, S) + row * _pick_int(bias_stride[0], s, S)
        k_n = _pick_int(key_stride[1], s, S)
        v_n = _pick_int(value_stride[1], s, S)
        k = _pick(key, s, S)
        k += (row * _pick_int(key_stride[0], s, S) + h64 * _pick_int(key_stride[2], s, S)) * UNIT
        v = _pick(value, s, S)
        v += (row * _pick_int(value_stride[0], s, S) + h64 * _pick_int(value_stride[2], s, S)) * UNIT

        full = count // BN * BN
        for j in tl.range(0, full, BN):
            at = j + on
            tokens = _key_tokens(index, at, index_count)
            shift = _key_shift(bias, tokens, at, bias_count, beta)
            acc0, acc1, top, total = _attend_tile(
                q0, q1, acc0, acc1, top, total, k, v, tokens, query_ok, k_n, v_n, alpha, shift,
                D, D0, D1, BM, BN, UNIT, NARROW, PER_PAIR, False, PRECISION, UPCAST,
            )  # fmt: skip
        if full < count:
            at = full + on
            ok = at < count
            tokens = _key_tokens(index, at, index_count)
            shift = _key_shift(bias, tokens, at, bias_count, beta)
            acc0, acc1, top, total = _attend_tile(
                q0, q1, acc0, acc1, top, total, k, v, tokens, ok, k_n, v_n, alpha, shift,
                D, D0, D1, BM, BN, UNIT, NARROW, PER_PAIR, True, PRECISION, UPCAST,
            )  # fmt: skip

    if query_order is not None:  # read again: cheaper than registers held through the loop
        i = tl.load(query_order + b64 * order_b + slot, mask=query_ok, other=0).to(tl.int64)
    # Normalize and store; no visible key: out 0, lse -inf; a NaN in acc stays
    mass = tl.sum(total, 1)
    inverse = tl.where(mass == 0, 0.0, 1.0 / mass)
    o_at = out + (b64 * out_b + h64 * out_h) * UNIT + (i * out_n)[:, None] * UNIT
    o0 = (acc0 * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(o_at + c0[None, :], o0, mask=query_ok[:, None] & (c0[None, :] < W0))
    if D1 > 0:
        c1 = tl.arange(0, D1)
        o1 = (acc1 * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(o_at + (D0 + c1)[None, :], o1, mask=query_ok[:, None] & (c1[None, :] < D - D0))
    if lse is not None:
        log2_mass = top + tl.log2(mass)
        natural = tl.where(log2_mass <= -_MAX, -_MAX, log2_mass * _LN2)
        tl.store(lse + b64 * lse_b + i * lse_n + h64 * lse_h, tl.where(mass == 0, -_INF, natural), mask=query_ok)


def _encode(integers) -> tuple[int, ...]:
    """Integers for a tuple argument. Triton (3.6 to 3.9) compiles anew for tuple elements that are 1 or that become
    divisible by 16, whatever do_not_specialize says; times 16 they all look alike."""
    return tuple(16 * x for x in integers)


def _optional(tensors: list[Tensor | None]) -> tuple[tuple[Tensor, ...] | None, int]:
    """(S pointers, bit set of the sources that have one), or (None, 0); the gaps hold a pointer that is never read."""
    filler = next((x for x in tensors if x is not None), None)
    if filler is None:
        return None, 0
    bits = sum(1 << s for s, x in enumerate(tensors) if x is not None)
    return tuple(filler if x is None else dense_last(x) for x in tensors), bits


def _source_strides(tensors: tuple[Tensor, ...] | None, *dims: int) -> tuple[tuple[int, ...], ...] | None:
    """(S encoded strides) per dimension."""
    if tensors is None:
        return None
    return tuple(_encode(x) for x in zip(*(strides(t, *dims) for t in tensors)))


def multi_source_attention_triton(
    query: Tensor, key: list[Tensor], value: list[Tensor], rows: list[Tensor | None],
    key_index: list[Tensor | None], key_count: list[Tensor | None], key_bias: list[Tensor | None],
    logit_scale: list[Tensor | None], logit_bias: list[Tensor | None],
    query_order: Tensor | None, class_start: Tensor | None, scale: float, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """Shapes as in the schema `multi_source_attention` of lr_kernels/ops.py."""
    # Early return for trivial cases
    if out.numel() == 0:
        return
    if not any(k.shape[1] for k in key):
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    arguments, constants, programs = launch_arguments(
        query, key, value, rows, key_index, key_count, key_bias, logit_scale, logit_bias, query_order, class_start,
        scale, out, lse, architecture(query.device),
    )  # fmt: skip
    grid = check_grid("multi_source_attention", programs)
    with on_device(query.device):
        multi_source_attention_forward_kernel[grid](*arguments, **constants)


def launch_arguments(
    query: Tensor, key: list[Tensor], value: list[Tensor], rows: list[Tensor | None],
    key_index: list[Tensor | None], key_count: list[Tensor | None], key_bias: list[Tensor | None],
    logit_scale: list[Tensor | None], logit_bias: list[Tensor | None],
    query_order: Tensor | None, class_start: Tensor | None, scale: float, out: Tensor, lse: Tensor | None, arch: int,
) -> tuple[tuple, dict, int]:  # fmt: skip
    """(positional arguments, constants and options, number of programs) of the kernel on an architecture."""
    B, N, H, D = query.shape
    S = len(key)
    per_pair = any(x is not None for x in (*key_bias, *logit_scale)) or not scale > 0
    kind = "biased" if per_pair else "gathered" if any(x is not None for x in key_index) else "dense"
    tile = tiles.attention_tile(arch, D, query.dtype, kind)
    classes = 1 if class_start is None else class_start.shape[1] - 1
    tiles_per_head = triton.cdiv(N, tile.BM) + classes - 1
    row_tables, with_rows = _optional(rows)
    index, with_index = _optional(key_index)
    count, _ = _optional(key_count)
    bias, with_bias = _optional(key_bias)
    scales, with_scale = _optional(logit_scale)
    shifts, with_shift = _optional(logit_bias)
    order, starts = dense_last(query_order), dense_last(class_start)
    # 16-byte loads need every stride to be a multiple of 16 bytes; strides are then passed in those units
    unit = 16 // query.element_size()
    dims = [strides(x, 0, 1, 2) for x in (query, out, *key, *value)]
    if any(x % unit for strides_ in dims for x in strides_):
        unit = 1
    units = [tuple(x // unit for x in strides_) for strides_ in dims]
    query_strides, out_strides, *source_units = units
    arguments = (
        query, tuple(key), tuple(value), row_tables, index, count, bias, scales, shifts,
        order, starts, out, lse,
        _encode(k.shape[1] for k in key), _encode(k.shape[0] for k in key),
        tuple(_encode(x) for x in zip(*source_units[:S])), tuple(_encode(x) for x in zip(*source_units[S:])),
        _source_strides(index, 0, 1), _source_strides(count, 0, 1), _source_strides(bias, 0),
        _source_strides(scales, 0, 1), _source_strides(shifts, 0, 1),
        N, H, classes, tiles_per_head, scale * LOG2E, with_rows, with_index, with_bias, with_scale, with_shift,
        *query_strides, *out_strides, *((0, 0, 0) if lse is None else strides(lse, 0, 1, 2)),
        *((0, 0) if order is None else (*strides(order, 0), *strides(starts, 0))),
    )  # fmt: skip
    constants = {
        "S": S, "D": D, "D0": tile.D0, "D1": tile.D1, "BM": tile.BM, "BN": tile.BN, "UNIT": unit,
        "NARROW": all(x.shape[1] * x.stride(1) < 2**31 for x in (*key, *value)), "PER_PAIR": per_pair,
        "PRECISION": dot_precision(query.dtype), "UPCAST": INTERPRETED,
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return arguments, constants, B * H * tiles_per_head


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies fp32: exactly, unless PyTorch was told that TF32 is good enough."""
    allowed = torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
