"""Tile sizes of the attention kernel as data: (architecture, head_dim, dtype, kind) -> Tile.

Chosen by cross-compiling with Triton 3.9 (`python -m lr_kernels.triton.report`): the largest tile without spills in 3
sources with row tables and logit biases. Not timed yet on the GPUs themselves.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    BM: int
    """queries of a program"""
    BN: int
    """keys of a step"""
    warps: int
    stages: int
    """with a gathered source at least 3: with 2 the load of the index list is no longer prefetched"""
    D0: int
    D1: int
    """head_dim is computed as D0 + D1 columns, powers of two; D1 0: one part"""


class Tiles(NamedTuple):
    """One row of the table. The address registers of a gather and the bias of a pair decide which tile still fits."""

    columns: tuple[int, int]
    """D0, D1: serves head_dim up to their sum"""
    dense: tuple[int, int, int, int]
    """BM, BN, warps, stages where every source is dense"""
    gathered: tuple[int, int, int, int]
    """where a source has an index list"""
    biased: tuple[int, int, int, int]
    """where the softmax needs one instruction more per pair: key_bias, logit_scale, a scale that is not positive"""


SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes a program can have, per architecture."""

INTERPRETER = 0

_MMA = (  # sm_80, 86, 89, 120: queries live in registers; two parts of D spill from 160 on, one part of 256 does not
    Tiles((16, 0), (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)),
    Tiles((32, 0), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    Tiles((64, 0), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    Tiles((64, 16), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3)),
    Tiles((128, 0), (128, 32, 8, 3), (64, 64, 8, 3), (64, 64, 8, 3)),
    Tiles((256, 0), (64, 32, 8, 2), (64, 32, 8, 3), (64, 32, 8, 2)),
)
_HOPPER = (  # 4 warps of 128 x 64 leave room for 2 programs per SM up to D 64; above, 8 warps hide the latency
    Tiles((16, 0), (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3)),
    Tiles((32, 0), (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3)),
    Tiles((32, 16), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),  # 4 warps: 22 spills, in one part of 64: 16
    Tiles((64, 0), (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)),  # biased, dense, 4 warps: 20 spills
    Tiles((64, 16), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3)),  # gathered at 128 x 128, 3 stages: 10 spills
    Tiles((64, 32), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    Tiles((128, 0), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3)),  # gathered at 128 x 128: 16 spills
    Tiles((128, 32), (128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 3)),  # gathered at 128 x 64, 3 stages: 6 spills
    Tiles((128, 64), (128, 32, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)),
    Tiles((256, 0), (128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2)),
)
_BLACKWELL = (  # sm_100: tcgen05 keeps accumulators in tensor memory, the scores still pass through registers
    Tiles((64, 0), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    Tiles((64, 16), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    Tiles((128, 0), (128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)),  # gathered at 128 x 64: 16 spills
    Tiles((128, 32), (128, 32, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)),  # gathered at 128 x 32, 3 stages: 4 spills
    Tiles((256, 0), (128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
)
_FLOAT32 = (  # exact fp32 products run on the FMA units and keep their operands in registers
    Tiles((64, 0), (32, 16, 4, 2), (32, 16, 4, 2), (32, 16, 4, 2)),  # 32 x 32: 116 spills
    Tiles((128, 0), (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    Tiles((256, 0), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """(D0, D1): the next power of two, from 65 on two of them where that is less work (80 = 64 + 16 instead of 128)."""
    whole = max(16, 1 << (head_dim - 1).bit_length())
    rest = max(16, 1 << max(0, head_dim - whole // 2 - 1).bit_length())
    return (whole // 2, rest) if whole >= 128 and rest < whole // 2 else (whole, 0)


def attention_tile(arch: int, head_dim: int, dtype: torch.dtype, kind: str) -> Tile:
    """The tile of an architecture (major * 10 + minor) for kind "dense", "gathered" or "biased"."""
    if arch == INTERPRETER:
        return Tile(64, 64, 4, 1, *split_head_dim(head_dim))
    if dtype == torch.float32:
        table = _FLOAT32
    elif 100 <= arch < 120:
        table = _BLACKWELL
    else:
        table = _HOPPER if arch == 90 else _MMA
    tiles = next(t for t in table if sum(t.columns) >= head_dim)
    return Tile(*getattr(tiles, kind), *tiles.columns)
