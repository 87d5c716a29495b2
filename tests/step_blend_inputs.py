"""Arguments of step_blend for its tests."""

import math

import torch

from lr_kernels.runtime.schemas import COLUMNS


def randn(shape, generator, layout="batch-slice"):
    """A tensor that is not contiguous: a slice of a wider batch, or channels last."""
    if layout == "channels-last":
        return torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)
    return torch.randn(shape[0], 2, *shape[1:], generator=generator)[:, 1]


def make(
    *, count=2, shape=(2, 4, 9, 11), rows=1, steps=3, mask=None, mask_rows=1, noise=False, history=False, keep=None,
    copies=0, seed=0,
):  # fmt: skip
    """(positional arguments without step, keyword arguments) in float32; with a history or copies, all outputs."""
    g = torch.Generator().manual_seed(seed)
    predictions = [randn(shape, g, "channels-last" if i == 1 else "batch-slice") for i in range(count)]
    coefficients = torch.randn(steps, rows, count + len(COLUMNS), generator=g)
    absent = [] if noise else ["sigma", "q"]
    coefficients[..., [count + COLUMNS.index(x) for x in (absent if history else [*absent, "h"])]] = 0
    keywords = {"noise": randn(shape, g) if noise else None}
    if mask is not None:
        m = torch.rand(mask_rows, *shape[2:], generator=g)
        keywords["mask"] = m > 0.5 if mask == "bool" else (1.5 * m - 0.25).clamp(0, 1)
    if mask is not None or keep is not None:
        keywords["background"] = randn(shape, g)
    if keep is not None:
        keywords["keep_rows"] = torch.tensor(keep, dtype=torch.bool)
    if history:
        keywords |= {"history": randn(shape, g), "history_out": torch.full(shape, math.nan)}
    if copies:
        keywords["model_input"] = torch.full((copies * shape[0], *shape[1:]), math.nan)
    return (randn(shape, g), predictions, coefficients), keywords
