"""Block masks for video transformers: against the formula of every pair, and as attention."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from lr_kernels import Source, multi_source_attention, plan_attention
from lr_kernels.block_masks import radial_blocks, sliding_tiles

GRIDS = [((4, 6, 8), (2, 3, 4), (1, 1, 1)), ((6, 6, 4), (2, 2, 2), (3, 1, 2)), ((3, 12, 10), (3, 2, 2), (1, 3, 5))]


def seen_by_tiles(grid, tile, window):
    """(N, N) bool of the tokens in the order of the grid, pair by pair."""
    counts = [size // part for size, part in zip(grid, tile)]
    tokens = list(itertools.product(*map(range, grid)))

    def sees(query, key):
        for q, k, part, count, width in zip(query, key, tile, counts, window):
            first = min(max(q // part - width // 2, 0), count - width)
            if not first <= k // part < first + width:
                return False
        return True

    return torch.tensor([[sees(q, k) for k in tokens] for q in tokens])


def dense(blocks, tokens):
    """(N, N) bool in the order of the blocks."""
    wide = blocks.block_mask[0, 0]
    for dim, size in enumerate(blocks.block_size):
        wide = wide.repeat_interleave(size, dim).narrow(dim, 0, tokens)
    return wide


@pytest.mark.parametrize(("grid", "tile", "window"), GRIDS)
def test_sliding_tiles_see_the_tiles_around_them(grid, tile, window):
    blocks = sliding_tiles(grid, tile, window)
    expected = seen_by_tiles(grid, tile, window)
    tokens = len(expected)
    assert torch.equal(dense(blocks, tokens)[blocks.inverse][:, blocks.inverse], expected)
    assert torch.equal(torch.arange(tokens)[blocks.order][blocks.inverse], torch.arange(tokens))
    assert (expected.sum(1) == math.prod(tile) * math.prod(window)).all(), "all see as many keys"


@pytest.mark.parametrize("first_frame", [True, False])
@pytest.mark.parametrize(("frames", "tokens", "block"), [(1, 20, 8), (9, 12, 4), (40, 3, 1), (5, 10, 16)])
def test_radial_blocks_hold_every_pair_of_the_formula(frames, tokens, block, first_frame):
    blocks = radial_blocks(frames, tokens, block, first_frame)
    expected = torch.zeros(frames * tokens, frames * tokens, dtype=torch.bool)
    for (i, k), (j, m) in itertools.product(itertools.product(range(frames), range(tokens)), repeat=2):
        band = 2 ** math.floor(math.log2(max(abs(i - j), 1)))
        near = band <= tokens and abs(k - m) < tokens / band
        far = band > tokens and k == m and abs(i - j) % math.ceil(band / tokens) == 0
        expected[i * tokens + k, j * tokens + m] = near or far or (first_frame and j == 0)
    padded = F.pad(expected, (0, -len(expected) % block, 0, -len(expected) % block))
    count = len(padded) // block
    by_block = padded.view(count, block, count, block).any(3).any(1)
    assert torch.equal(blocks.block_mask[0, 0], by_block)


def test_attention_of_sliding_tiles():
    grid, tile, window = GRIDS[1]
    blocks = sliding_tiles(grid, tile, window)
    tokens = math.prod(grid)
    q, k, v = torch.randn(3, 1, tokens, 2, 16, generator=torch.Generator().manual_seed(0))
    plan = plan_attention([None], block_masks=[blocks.block_mask], block_size=blocks.block_size)
    source = Source(k[:, blocks.order], v[:, blocks.order], block_mask=blocks.block_mask, block_size=blocks.block_size)
    found = multi_source_attention(q[:, blocks.order], [source], plan=plan)[:, blocks.inverse]
    mask = seen_by_tiles(grid, tile, window)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sliding_tiles((4, 6), (2, 2, 2), (1, 1, 1)), "grid: expected three numbers: frames, height, width"),
        (
            lambda: sliding_tiles((4, 6, 7), (2, 3, 4), (1, 1, 1)),
            "tile: expected a divisor of 7, the grid's w",
        ),
        (
            lambda: sliding_tiles((8, 6, 8), (2, 3, 4), (2, 1, 1)),
            "window: expected an odd number below 4, or",
        ),
        (
            lambda: sliding_tiles((4, 6, 8), (2, 3, 4), (3, 1, 1)),
            "window: expected an odd number below 2, or",
        ),
        (lambda: radial_blocks(0, 4), "frames: expected a number from 1 on, got 0"),
        (lambda: radial_blocks(3, 4, 12), "block: expected a power of two, got 12"),
    ],
)
@pytest.mark.fault(number=7)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
