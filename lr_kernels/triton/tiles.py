"""Tile sizes of the attention kernels as data: (architecture, head_dim, dtype, kind) -> Tile.

sm_90, dense and gathered: the fastest on an H200 (`python -m lr_kernels.triton.tune`, benchmarks/results) of those
whose inner loop does not touch local memory. All others by cross-compiling (`python -m lr_kernels.triton.report`):
the largest tile without spills in 3 sources with row tables, not timed.
"""

from typing import NamedTuple, TypeVar

import torch


class Tile(NamedTuple):
    """The sizes that a kernel of attention is compiled for."""

    BM: int
    """queries of a program"""
    BN: int
    """keys of a step"""
    warps: int
    stages: int
    """of the loop over keys: 1 loads a tile when it is needed"""
    D0: int
    D1: int
    """head_dim is computed as D0 + D1 columns, powers of two; D1 0: one part"""


class Tiles(NamedTuple):
    """One row of the table: BM, BN, warps and stages by kind of call.

    A tile fits where its kernel needs at most 255 registers a thread. The kinds differ in what they need beside the
    accumulators: a gather holds addresses, a bias one number per pair, softmax groups a second accumulator, a padded
    head_dim masks.
    """

    head_dim: int
    """serves head dims up to this"""
    columns: tuple[int, int]
    """D0, D1"""
    dense: tuple[int, int, int, int]
    """where every source is dense"""
    gathered: tuple[int, int, int, int]
    """where a source has an index list"""
    biased: tuple[int, int, int, int]
    """where the softmax needs one instruction more per pair (key_bias, logit_scale, a scale that is not positive) or a
    shift per source (logit_bias), values have indices of their own, or a source is in 8 bits"""
    grouped: tuple[int, int, int, int]
    """with several softmax groups"""
    few: tuple[int, int, int, int] | None = None
    """dense or gathered with so few queries that the tiles above would leave multiprocessors idle; None: the same"""
    eight_bit: tuple[int, int, int, int] | None = None
    """with a source in 8 bits, where the tiles of `biased` and `grouped` would need too much shared memory then"""


_Table = TypeVar("_Table", bound=tuple)

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared memory in bytes that a program can have, by architecture."""

INTERPRETER = 0

_A = (128, 64, 4, 3)  # the tiles that most rows share
_B = (128, 64, 8, 3)
_C = (128, 32, 8, 3)
_D = (64, 64, 8, 3)
_E = (64, 32, 8, 3)
_F = (32, 32, 8, 3)
_H = (128, 32, 8, 2)
_MMA = (  # sm_80, 86, 89, 120: queries live in registers; with fewer than 16 a warp, warps share rows and wait
    Tiles(16, (16, 0), _A, _A, _B, _B),
    Tiles(32, (32, 0), _B, _B, _B, _B),
    Tiles(48, (32, 16), _B, _B, _C, _B),  # one part of 64, biased: 6 spills; value_index at 128 x 64: 2
    Tiles(63, (64, 0), _B, _B, _C, _C),  # biased at 128 x 64: 6 spills
    Tiles(64, (64, 0), _B, _B, _B, _B),
    Tiles(79, (64, 16), (128, 64, 8, 2), _C, _C, _C),  # gathered at 128 x 64: 20 spills
    Tiles(80, (64, 16), (128, 64, 8, 2), _B, _B, _C),
    Tiles(128, (128, 0), _C, _H, _H, _H),
    Tiles(160, (128, 32), _H, _H, _H, _H, eight_bit=(64, 32, 8, 2)),
    Tiles(  # 3 stages: too much for sm_86, 89, 120
        256, (256, 0), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), _F, eight_bit=(32, 32, 8, 2)
    ),
)
_G = (64, 64, 4, 3)
_HOPPER = (  # 4 warps of 128 x 64 leave room for 2 programs per SM up to D 64; above, 8 warps hide the latency
    Tiles(16, (16, 0), _A, _A, _A, _B),
    Tiles(32, (32, 0), _A, _A, _A, _B),
    Tiles(48, (64, 0), _A, _A, _B, _B, _B),  # 32 + 16 columns: spills with 4 warps, slower with 8
    Tiles(63, (64, 0), _A, _A, _B, _B, _B),
    Tiles(64, (64, 0), _A, (128, 64, 8, 4), _B, _B, _G),
    Tiles(80, (64, 16), _A, _B, _B, _B, _G),  # gathered at 128 x 64, 4 warps: 13 % faster, but spills in the inner loop
    Tiles(96, (64, 32), _B, _B, _B, _B),
    Tiles(128, (128, 0), _B, _B, _B, _C),
    Tiles(160, (128, 32), _B, _B, _C, _D),
    Tiles(192, (128, 64), _C, _C, _C, _F),  # groups at 64 x 32: 18 spills
    Tiles(256, (128, 128), _C, _C, _C, (32, 64, 8, 3)),  # in one part: 12 spills
)
_BLACKWELL = (  # sm_100: tcgen05 keeps accumulators in tensor memory, the scores still pass through registers
    Tiles(64, (64, 0), _B, _B, _B, _B),
    Tiles(80, (64, 16), _B, _B, _B, _C),
    Tiles(128, (128, 0), _B, _C, _C, _D, eight_bit=_H),  # gathered at 128 x 64: 16 spills; int8 with 3 stages: 56
    Tiles(159, (128, 32), (128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), _E),  # dense, 3 stages: 18 spills
    Tiles(160, (128, 32), _C, (64, 32, 8, 2), (64, 32, 8, 2), _E),  # gathered at 128 x 32, 3 stages: 4 spills
    Tiles(192, (128, 64), _D, _E, _E, (32, 64, 8, 3)),
    Tiles(256, (128, 128), _E, _E, _E, (32, 64, 8, 3)),  # in one part: 36 spills
)
_FLOAT32 = (  # exact fp32 products run on the FMA units and keep their operands in registers
    Tiles(64, (64, 0), (32, 16, 4, 2), (32, 16, 4, 2), (32, 16, 4, 2), (32, 16, 4, 2)),  # 32 x 32: 116 spills
    Tiles(128, (128, 0), (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    Tiles(256, (256, 0), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
)


class BackwardTiles(NamedTuple):
    """One row of a backward table: BM (queries), BN (keys), warps, stages of the two kernels."""

    head_dim: int
    """serves head dims up to this"""
    columns: tuple[int, int]
    """D0, D1"""
    query: tuple[int, int, int, int]
    source: tuple[int, int, int, int]


_K = (64, 64, 8, 2)
_L = (64, 32, 8, 2)
_M = (32, 64, 8, 2)
_N = (32, 32, 8, 2)
_MMA_BACKWARD = (
    BackwardTiles(32, (32, 0), _K, _L),
    BackwardTiles(64, (64, 0), _L, _L),  # source at 64 x 64: 438 spills; query there: 2 with Triton 3.6
    BackwardTiles(80, (64, 16), _L, _N),  # source at 32 x 64: 151
    BackwardTiles(128, (128, 0), _L, _L),
    BackwardTiles(256, (256, 0), (64, 32, 8, 1), _N),  # D 160 in two parts: 10 spills
)
_HOPPER_BACKWARD = (
    BackwardTiles(32, (32, 0), _K, _K),
    BackwardTiles(64, (64, 0), _K, _M),  # source at 64 x 64: 63 spills with Triton 3.6
    BackwardTiles(80, (64, 16), _L, _M),  # with Triton 3.6: 4 spills, at 160: 64
    BackwardTiles(128, (128, 0), _L, _M),
    BackwardTiles(160, (128, 32), _K, _M),
    BackwardTiles(256, (256, 0), _L, _N),
)
_BLACKWELL_BACKWARD = (
    BackwardTiles(32, (32, 0), _L, _K),
    BackwardTiles(64, (64, 0), _K, _K),
    BackwardTiles(80, (64, 16), _L, _M),
    BackwardTiles(128, (128, 0), _L, _L),  # source at 32 x 64: 28 spills
    BackwardTiles(256, (256, 0), _N, _N),
)
_FLOAT32_BACKWARD = (  # on sm_90 the query kernel has 4 spills at D 64, the source kernel 11 at 128
    BackwardTiles(64, (64, 0), (16, 16, 4, 1), (16, 16, 4, 2)),
    BackwardTiles(128, (128, 0), (16, 16, 8, 2), (16, 16, 8, 1)),
    BackwardTiles(256, (256, 0), (16, 16, 8, 1), (16, 16, 8, 1)),
)


FORCED: dict[str, Tile] = {}
"""Tiles, by kind or backward kernel, that every call takes instead of the table's. Only the tuner sets them."""


def backward_tile(arch: int, head_dim: int, dtype: torch.dtype, kernel: str) -> Tile:
    """The tile of a backward kernel, "query" or "source"."""
    if kernel in FORCED:
        return FORCED[kernel]
    if arch == INTERPRETER:
        return Tile(32, 32, 4, 1, *split_head_dim(head_dim))
    table = _of_family(arch, dtype, _FLOAT32_BACKWARD, _BLACKWELL_BACKWARD, _HOPPER_BACKWARD, _MMA_BACKWARD)
    tiles = next(t for t in table if t.head_dim >= head_dim)
    BM, BN, warps, stages = getattr(tiles, kernel)
    return Tile(BM, BN, warps, stages, *tiles.columns)


def _of_family(
    arch: int, dtype: torch.dtype, float32: _Table, blackwell: _Table, hopper: _Table, mma: _Table
) -> _Table:
    if dtype == torch.float32:
        return float32
    if 100 <= arch < 120:
        return blackwell
    return hopper if arch == 90 else mma


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """(D0, D1): the next power of two, from 65 on two of them where that is less work (80 = 64 + 16 instead of 128)."""
    whole = max(16, 1 << (head_dim - 1).bit_length())
    rest = max(16, 1 << max(0, head_dim - whole // 2 - 1).bit_length())
    return (whole // 2, rest) if whole >= 128 and rest < whole // 2 else (whole, 0)


FEW_QUERIES = 2**15
"""Queries, over all rows and heads: 128 of them for each of two programs on every multiprocessor of an H200."""


def attention_tile(
    arch: int, head_dim: int, dtype: torch.dtype, kind: str, queries: int, eight_bit: bool = False
) -> Tile:
    """The tile of an architecture (major * 10 + minor) for a kind that `Tiles` names.

    queries: of all rows and heads. eight_bit: whether a source is in 8 bits.
    """
    if kind in FORCED:
        return FORCED[kind]
    if arch == INTERPRETER:
        return Tile(64, 64, 4, 1, *split_head_dim(head_dim))
    table = _of_family(arch, dtype, _FLOAT32, _BLACKWELL, _HOPPER, _MMA)
    tiles = next(t for t in table if t.head_dim >= head_dim)
    few = tiles.few if queries < FEW_QUERIES and kind in ("dense", "gathered") else None
    BM, BN, warps, stages = few or (tiles.eight_bit if eight_bit else None) or getattr(tiles, kind)
    return Tile(BM, BN, warps, stages, *tiles.columns)


def unaligned_tile(arch: int, head_dim: int) -> Tile:
    """The tile of 16-bit calls whose rows do not start at multiples of 16 bytes. Their loads are not asynchronous, so
    the tiles in shared memory lie at constant addresses, which ptxas 12.8 (Triton 3.6) gets wrong for rows below 128
    bytes: 64 columns or more."""
    if arch == 90 or head_dim <= 64:  # as run on an H200; above D 64 it spills there
        BM, warps = 64, 4
    else:
        BM, warps = 64 if head_dim <= 128 else 32, 8
    return Tile(BM, 32, warps, 2, max(64, 1 << (head_dim - 1).bit_length()), 0)
