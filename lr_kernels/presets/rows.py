"""Tables of rows and masks for presets: how a table is made, and checks whose errors name the preset's own argument."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.checks import check_integer, entries_of, fail, has_shape, one_of, plain_number

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def guided_rows(rows: Sequence[int], halves: int = 2, device: torch.device | str = "cpu") -> Tensor:
    """The table of rows of a whole batch from that of one half of its guidance: no row reads one of another half.

    Args:
        rows: per image of a half, the number of the image that it reads, -1: none.
        halves: how many halves the batch has: 2 with guidance (unconditional, conditional), 1 without.
        device: of the queries.

    Returns:
        int32 (halves · len(rows),).

    Raises:
        ValueError: a number that is no image of a half; halves below 1.
    """
    check_integer("guided_rows", "halves", halves, 1, "the number of halves of the guidance, at least 1")
    entries = entries_of(rows)
    if entries is None:
        fail("guided_rows", "rows", "a list of the images' numbers that are read", repr(rows))
    images = len(entries)
    expected = f"-1 or an image of a half, 0 to {images - 1}"
    entries = [check_integer("guided_rows", "rows", row, -1, expected, images - 1) for row in entries]
    table = [row if row < 0 else half * images + row for half in range(halves) for row in entries]
    return torch.tensor(table, dtype=torch.int32, device=device)


def check_rows(op: str, name: str, rows: Tensor, query: Tensor) -> None:
    """Refuse a table that does not name one row, or -1, for each row of the batch. On a GPU the numbers are not looked
    at, since that would synchronize."""
    batch = query.shape[0]
    if not isinstance(rows, Tensor):
        fail(op, name, "an integer tensor", type(rows).__name__, "see guided_rows", TypeError)
    if not has_shape(rows, (batch,)):
        hint = "the UNet's batch has the images of every half of the guidance, see guided_rows"
        fail(op, name, f"shape ({batch},), one entry per row of the batch", tuple(rows.shape), hint)
    if rows.dtype not in _INTEGERS:
        fail(op, name, "an integer dtype", rows.dtype, error=TypeError)
    if rows.device != query.device:
        fail(op, name, str(query.device), rows.device)
    if rows.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
        low, high = torch.aminmax(rows)
        if int(low) < -1 or int(high) >= batch:
            fail(op, name, f"-1 to {batch - 1}", f"{int(low)} to {int(high)}")


def check_mask(op: str, name: str, mask: Tensor, rows: int, query: Tensor, *, soft: bool = False) -> None:
    """Refuse a mask that is not bool (rows or 1, N); with `soft` it may also be floating."""
    tokens = query.shape[1]
    if not isinstance(mask, Tensor):
        fail(op, name, "a tensor", type(mask).__name__, error=TypeError)
    if mask.dtype != torch.bool and not (soft and mask.is_floating_point()):
        fail(op, name, "torch.bool" + (" or a floating dtype" if soft else ""), mask.dtype, error=TypeError)
    if mask.dim() != 2 or not one_of(mask.shape[0], 1, rows) or mask.shape[1] != tokens:
        fail(op, name, f"shape ({rows} or 1, {tokens})", tuple(mask.shape))
    if mask.device != query.device:
        fail(op, name, str(query.device), mask.device)


def check_strength(op: str, name: str, x: object, query: Tensor, last: int) -> None:
    """Refuse a strength that is neither a number nor a tensor (), (B,) or (B, last)."""
    batch = query.shape[0]
    expected = f"a number, a scalar, ({batch},) or ({batch}, {last})"
    if isinstance(x, Tensor):
        if not has_shape(x, (), (batch,), (batch, last)):
            fail(op, name, expected, tuple(x.shape))
    elif (number := plain_number(x)) is None or math.isnan(number):
        fail(op, name, expected, repr(x))


def check_halves(op: str, halves: int, batch: int) -> int:
    """The rows of each half of the guidance. ValueError if the halves do not divide the batch."""
    check_integer(op, "halves", halves, 1, f"a divisor of the batch's {batch} rows")
    if batch % halves:
        fail(op, "halves", f"a divisor of the batch's {batch} rows", halves, "2 with guidance, 1 without")
    return batch // halves
