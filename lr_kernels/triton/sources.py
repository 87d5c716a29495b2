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
def key_list(
    key_index, key_count, index_stride, count_stride, key_block, with_index, M, s, c64, row, h64, reads,
    S: tl.constexpr,
):  # fmt: skip
    """(list of the keys of source s that class c64 and head h64 see, keys in it, log2 of the keys of an entry, number
    of keys): all of them without a list, else as the count on the device says; 0 keys where this source has no list."""
    count = pick_int(M, s, S).to(tl.int32)
    index = count
    index_count = 0
    block = 0
    if key_index is not None:
        gathered = ((with_index >> s) & 1) != 0
        index = pick(key_index, s, S)
        index += c64 * pick_int(index_stride[0], s, S) + row * pick_int(index_stride[1], s, S)
        index += h64 * pick_int(index_stride[2], s, S)
        counts = pick(key_count, s, S)
        counts += c64 * pick_int(count_stride[0], s, S) + row * pick_int(count_stride[1], s, S)
        counts += h64 * pick_int(count_stride[2], s, S)
        listed = tl.load(counts, mask=gathered & reads, other=0)
        if key_block is not None:  # the last block may be shorter
            block = pick_int(key_block, s, S).to(tl.int32)
            last = tl.load(index + tl.maximum(listed - 1, 0), mask=listed > 0, other=-1).to(tl.int64)
            beyond = ((last + 1) << block) - count
            listed = (listed << block) - tl.maximum(beyond, 0).to(tl.int32)
        count = tl.where(gathered, listed, count)
        index_count = tl.where(gathered, count, 0)
    return index, index_count, block, tl.where(reads, count, 0)


@triton.jit
def query_ranges(key_range, range_stride, with_range, s, b64, query_order, slot, end, S: tl.constexpr):
    """(BM,) twice: from which token on, and before which, the queries at these places see keys of source s. Of a place
    from `end` on those of the last query, and of one that sees nothing (2^31 - 1, 0)."""
    slot = tl.minimum(slot, end - 1)
    i = query_tokens(query_order, slot, slot >= 0)
    at = pick(key_range, s, S) + b64 * pick_int(range_stride[0], s, S) + i * 2
    has = ((with_range >> s) & 1) != 0
    low = tl.where(has, tl.load(at), 0)  # what stands in for a source without ranges may be read
    high = tl.where(has, tl.load(at + 1), 0x7FFFFFFF)
    return tl.where(low < high, low, 0x7FFFFFFF), tl.where(low < high, high, 0)


@triton.jit
def range_places(key_index, index, index_count, block, count, low, high):
    """Four places in the list of a source's keys, ascending: from the first on some query sees keys, from the second on
    all do, to the third, and before the fourth some do. low, high: from `query_ranges`."""
    four = tl.arange(0, 4)
    token = tl.where(four < 2, tl.min(low, 0), tl.max(high, 0))
    token = tl.where(four == 1, tl.max(low, 0), tl.where(four == 2, tl.min(high, 0), token))
    place = tl.minimum(tl.maximum(token, 0), count)
    if key_index is not None:
        found = tl.zeros([4], tl.int32)
        above = found + index_count
        left = index_count
        while left > 0:
            middle = (found + above) >> 1
            entry = tl.load(index + (middle >> block), mask=found < above, other=0)
            before = ((entry << block) + (middle & ((1 << block) - 1))) < token
            found, above = (
                tl.where((found < above) & before, middle + 1, found),
                tl.where((found < above) & (before == 0), middle, above),
            )
            left = left >> 1
        place = tl.where(index_count > 0, found, place)
    first = tl.sum(tl.where(four == 0, place, 0), 0)
    last = tl.maximum(tl.sum(tl.where(four == 3, place, 0), 0), first)
    inner = tl.minimum(tl.sum(tl.where(four == 1, place, 0), 0), last)
    outer = tl.maximum(tl.minimum(tl.sum(tl.where(four == 2, place, 0), 0), last), inner)
    return first, inner, outer, last


@triton.jit
def in_range(tokens, low, high):
    """(BM, BN): which of these tokens each query sees by its range."""
    return (tokens[None, :] >= low[:, None]) & (tokens[None, :] < high[:, None])


@triton.jit
def key_head(heads_per_key_head, s, h64, S: tl.constexpr):
    """int64: the head of source s that head h64 of the query reads; None: all sources have as many."""
    if heads_per_key_head is None:
        return h64
    else:
        return h64 // pick_int(heads_per_key_head, s, S)


@triton.jit
def per_head(table, table_stride, with_table, s, b64, h64, otherwise: tl.constexpr, S: tl.constexpr):
    """Entry (b, h) of the table of source s; `otherwise` where it has none."""
    has = ((with_table >> s) & 1) != 0
    place = pick_int(table_stride[0], s, S) + b64 * pick_int(table_stride[1], s, S)
    place += h64 * pick_int(table_stride[2], s, S)
    return tl.load(pick(table, s, S) + place, mask=has, other=otherwise)


@triton.jit
def key_entries(key_index, index, at, index_count, block):
    """(BN,) entries of the list of keys for places `at`, 0 past its end. A loop loads those of its next tile: the loads
    of keys and values then start from registers, and run as many tiles ahead as those of a source without a list."""
    if key_index is None:
        return 0
    else:
        return tl.load(index + (at >> block), mask=at < index_count, other=0)


@triton.jit
def key_tokens(key_index, entries, at, index_count, block):
    """(BN,) tokens of the keys at places `at`, whose entries of the list are known; index_count is 0 where this source
    has no list."""
    if key_index is None:
        return at
    else:
        return tl.where(at < index_count, (entries << block) + (at & ((1 << block) - 1)), at)


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


@triton.jit
def block_tile(query_block, tile, N, BM: tl.constexpr):
    """The same where every class is a block of query_block queries in order."""
    tiles = tl.cdiv(query_block, BM)
    c = tile // tiles
    first = c * query_block + (tile - c * tiles) * BM
    return c, first, tl.minimum((c + 1) * query_block, N)
