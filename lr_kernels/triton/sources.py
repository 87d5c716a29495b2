"""Device code that attention's forward and backward kernels share: sources, lists of keys, classes of queries."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MAX = tl.constexpr(3.4028234663852886e38)
INF = tl.constexpr(float("inf"))


@triton.jit
def pick(options, s, S: tl.constexpr):
    """options[s] of an S-tuple for a run-time s."""
    picked = options[0]
    for i in tl.static_range(1, S):
        picked = tl.where(s == i, options[i], picked)
    return picked


@triton.jit
def pick_int(options, s, S: tl.constexpr):
    """int64 options[s] of integers that came through `encode`."""
    return (pick(options, s, S) >> 4).to(tl.int64)


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
def load_parts(at, ok, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr):
    """Columns [0, D0) and [D0, D0 + D1) of the rows `ok` at these pointers; zeros elsewhere."""
    c0 = tl.arange(0, D0)
    W0: tl.constexpr = D0 if D1 > 0 else D
    x0 = load_tile(at + c0[None, :], ok, c0, W0, D0, True, UPCAST)
    x1 = x0
    if D1 > 0:
        c1 = tl.arange(0, D1)
        x1 = load_tile(at + (D0 + c1)[None, :], ok, c1, D - D0, D1, True, UPCAST)
    return x0, x1


@triton.jit
def dequantized(x, scale, float8, DTYPE: tl.constexpr, EIGHT_BIT: tl.constexpr, UPCAST: tl.constexpr):
    """(tokens, columns) in 8 bits, given as int8, times the scale of each token, as numbers of DTYPE.

    EIGHT_BIT: 1 for int8, 2 for e4m3, 3 where the run-time value float8 says which.
    """
    y = x.to(tl.float32)
    if EIGHT_BIT >= 2:  # by the bits alone, for cards without such numbers
        bits = x.to(tl.int32)
        magnitude = (bits & 0x7F) << 20
        z = (magnitude | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * (2.0**120)  # another exponent bias
        z = tl.where(magnitude == (0x7F << 20), float("nan"), z)
        if EIGHT_BIT == 2:
            y = z
        else:
            y = tl.where(float8, z, y)
    y = y * scale[:, None]
    if not UPCAST:
        y = y.to(DTYPE)
    elif DTYPE == tl.bfloat16:  # the interpreter would cut the last bits off
        bits = y.to(tl.int32, bitcast=True)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        y = y.to(DTYPE).to(tl.float32)
    return y


@triton.jit
def to_log2(x):
    """Natural-log weight -> log2 units. What is finite stays finite: finfo.min must not turn into -inf."""
    y = tl.minimum(x * LOG2E, MAX, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(y, -MAX, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(tl.abs(x) == INF, x, y)


@triton.jit
def source_row(rows, with_rows, R, s, b, S: tl.constexpr):
    """(row of source s that query row b reads, int64; whether it reads one). A row outside [0, R) reads nothing."""
    row = b.to(tl.int64)
    reads = True
    if rows is not None:
        has = ((with_rows >> s) & 1) != 0
        r = tl.load(pick(rows, s, S) + b, mask=has, other=0).to(tl.int64)
        reads = (r >= 0) & (r < pick_int(R, s, S))
        row = tl.where(has, tl.where(reads, r, 0), row)
    return row, reads


@triton.jit
def key_list(key_index, key_count, index_stride, count_stride, with_index, M, s, c64, row, reads, S: tl.constexpr):
    """(list of the keys of source s that class c64 sees, entries of it, number of keys): all of them without a list,
    else the count read from the device; 0 entries where this source has no list."""
    count = pick_int(M, s, S).to(tl.int32)
    index = count
    index_count = 0
    if key_index is not None:
        gathered = ((with_index >> s) & 1) != 0
        index = pick(key_index, s, S)
        index += c64 * pick_int(index_stride[0], s, S) + row * pick_int(index_stride[1], s, S)
        counts = pick(key_count, s, S)
        counts += c64 * pick_int(count_stride[0], s, S) + row * pick_int(count_stride[1], s, S)
        count = tl.where(gathered, tl.load(counts, mask=gathered & reads, other=0), count)
        index_count = tl.where(gathered, count, 0)
    return index, index_count, tl.where(reads, count, 0)


@triton.jit
def per_head(table, table_stride, with_table, s, b64, h64, otherwise: tl.constexpr, S: tl.constexpr):
    """Entry (b, h) of the table of source s; `otherwise` where it has none."""
    has = ((with_table >> s) & 1) != 0
    place = pick_int(table_stride[0], s, S) + b64 * pick_int(table_stride[1], s, S)
    place += h64 * pick_int(table_stride[2], s, S)
    return tl.load(pick(table, s, S) + place, mask=has, other=otherwise)


@triton.jit
def key_entries(key_index, index, at, index_count):
    """(BN,) entries `at` of the list of keys, 0 past its end. A loop loads those of its next tile: the loads of keys
    and values then start from registers, and run as many tiles ahead as those of a source without a list."""
    if key_index is None:
        return 0
    else:
        return tl.load(index + at, mask=at < index_count, other=0)


@triton.jit
def key_tokens(key_index, entries, at, index_count):
    """(BN,) tokens of the keys at places `at`, whose entries of the list are known; index_count is 0 where this source
    has no list."""
    if key_index is None:
        return at
    else:
        return tl.where(at < index_count, entries, at)


@triton.jit
def key_shift(key_bias, bias, tokens, at, bias_count, beta):
    """beta plus the bias of each key in log2 units, (1, BN); without any bias beta alone."""
    if key_bias is None:
        return beta
    else:
        return (to_log2(tl.load(bias + tokens, mask=at < bias_count, other=0.0)) + beta)[None, :]


@triton.jit
def query_tokens(query_order, slot, ok):
    """(BM,) int64: the queries at these places of the order."""
    if query_order is None:
        return slot.to(tl.int64)
    else:
        return tl.load(query_order + slot, mask=ok, other=0).to(tl.int64)


@triton.jit
def query_tile(class_start, tile, classes, BM: tl.constexpr):
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
