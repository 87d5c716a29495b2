"""Block masks of sparse attention in video transformers, whose tokens are a grid of frames, rows and columns."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .runtime.checks import check_integer, fail


class TokenBlocks(NamedTuple):
    """A block mask of `Source`, and the order of the tokens that it is for."""

    order: Tensor
    """int64 (N,): `x[:, order]` has the tokens block by block; `inverse` undoes it"""
    inverse: Tensor
    """int64 (N,)"""
    block_mask: Tensor
    """bool (1, 1, query blocks, key blocks)"""
    block_size: tuple[int, int]
    """queries and keys in a block"""


def sliding_tiles(
    grid: Sequence[int], tile: Sequence[int], window: Sequence[int], device: torch.device | str = "cpu"
) -> TokenBlocks:
    """Sliding tile attention (arXiv 2502.04507): the tokens of a tile see those of the tiles around it.

    Args:
        grid: (frames, height, width) in tokens, whose first token is N = 0 and whose columns come first.
        tile: (frames, height, width) of a tile, which divide those of the grid.
        window: how many tiles a query sees in each dimension, odd or all of them; at the border the window is moved
            inside, so that all see the same number.

    Raises:
        ValueError: three numbers that are not three, or do not fit.
    """
    op = "sliding_tiles"
    sizes, inside, seen = (_three(op, name, x) for name, x in (("grid", grid), ("tile", tile), ("window", window)))
    for name, size, part, width in zip(("frames", "height", "width"), sizes, inside, seen):
        if size % part:
            fail(op, "tile", f"a divisor of {size}, the grid's {name}", part)
        if width > size // part or (width % 2 == 0 and width != size // part):
            fail(op, "window", f"an odd number below {size // part}, or it, in {name}", width)
    counts = [size // part for size, part in zip(sizes, inside)]
    place = torch.arange(sizes[0] * sizes[1] * sizes[2], device=device)
    split = [n for pair in zip(counts, inside) for n in pair]
    order = place.view(split).permute(0, 2, 4, 1, 3, 5).flatten()
    masks = []
    for count, width in zip(counts, seen):
        tiles = torch.arange(count, device=device)
        first = (tiles - width // 2).clamp(0, count - width)[:, None]
        masks.append((tiles >= first) & (tiles < first + width))
    t, h, w = masks
    mask = t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    volume = inside[0] * inside[1] * inside[2]
    keys = volume & -volume  # blocks of keys are powers of two
    mask = mask.flatten(0, 2).flatten(1).repeat_interleave(volume // keys, 1)
    return TokenBlocks(order, order.argsort(), mask[None, None], (volume, keys))


def radial_blocks(
    frames: int, tokens: int, block: int = 128, first_frame: bool = True, device: torch.device | str = "cpu"
) -> TokenBlocks:
    """Radial attention (arXiv 2506.19852): the further apart two frames are, the fewer of their tokens see each other.

    Token k of frame i sees token l of frame j, where with b = 2^⌊log2 max(|i - j|, 1)⌋

        |k - l| < tokens / b, as long as b <= tokens;  else k = l and |i - j| is a multiple of ⌈b / tokens⌉.

    A block is visible where a pair of its tokens is.

    Args:
        frames: of the video. tokens: of a frame.
        block: queries and keys in a block, a power of two.
        first_frame: whether all tokens also see the first frame.

    Raises:
        ValueError: numbers below 1, a block that is no power of two.
    """
    op = "radial_blocks"
    frames, tokens, block = (
        check_integer(op, name, x, 1, "a number from 1 on")
        for name, x in (("frames", frames), ("tokens", tokens), ("block", block))
    )
    if block & (block - 1):
        fail(op, "block", "a power of two", block)
    number = frames * tokens
    place = torch.arange(number, device=device)
    frame, inside = place // tokens, place % tokens
    bands = 2 ** torch.log2(torch.arange(1, max(frames, 2), device=device).float()).floor().long()
    bands = torch.cat([bands[:1], bands])  # by the distance of the frames
    rows = []
    for start in range(0, number, block):
        queries = place[start : start + block, None]
        apart = (queries // tokens - frame).abs()
        band = bands[apart]
        offset = (queries % tokens - inside).abs()
        seen = (band <= tokens) & (offset * band < tokens)
        seen |= (band > tokens) & (offset == 0) & (apart % ((band + tokens - 1) // tokens) == 0)
        if first_frame:
            seen |= frame == 0
        blocks = torch.nn.functional.pad(seen.any(0), (0, -number % block))
        rows.append(blocks.view(-1, block).any(1))
    return TokenBlocks(place, place, torch.stack(rows)[None, None], (block, block))


def _three(op: str, name: str, sizes: object) -> tuple[int, int, int]:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or len(sizes) != 3:
        fail(op, name, "three numbers: frames, height, width", repr(sizes))
    found = [check_integer(op, name, x, 1, "three numbers from 1 on") for x in sizes]
    return found[0], found[1], found[2]
