"""Means with bootstrap intervals, for values per image that may come in groups such as one subject and seed."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def bootstrap_interval(
    values: ArrayLike,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The mean of values and a percentile bootstrap interval of it.

    With groups the bootstrap is hierarchical: it draws as many groups as there are, with replacement, and from each
    drawn group as many of its values as it has, with replacement. The interval then says how far the mean would move
    with other groups (other seeds, other subjects), which is more than it moves with other images of the same ones.

    Args:
        values: [N], finite; an array, tensor or sequence.
        groups: N hashable labels, such as (subject, seed); None: the values are independent.
        level: the share of the bootstrap means that the interval holds, in (0, 1).
        samples: bootstrap means to draw.
        seed: of the draws; the same arguments give the same interval.

    Returns:
        (mean, low, high), floats. The mean is over all values, whatever their groups' sizes.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) == 0 or not np.isfinite(found).all():
        raise ValueError(f"values: expected one dimension of finite numbers, at least one; got shape {found.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a share between 0 and 1; got {level}")
    rng = np.random.default_rng(seed)
    if groups is None:
        means = found[rng.integers(len(found), size=(samples, len(found)))].mean(1)
    else:
        means = _hierarchical_means(found, _rows_of_groups(groups, len(found)), samples, rng)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(found.mean()), float(low), float(high)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The mean of first - second, values [N] each of the same images, with its interval; see `bootstrap_interval`."""
    one, other = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if one.shape != other.shape:
        raise ValueError(f"second: expected the shape of first, {one.shape}; got {other.shape}")
    return bootstrap_interval(one - other, groups, level, samples, seed)


def _rows_of_groups(groups: Sequence[Hashable] | np.ndarray, count: int) -> list[np.ndarray]:
    """The row numbers of each group: a list of integer arrays."""
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(groups):
        rows.setdefault(label, []).append(row)
    if (given := sum(len(members) for members in rows.values())) != count:
        raise ValueError(f"groups: expected {count} labels, one per value; got {given}")
    return [np.array(members) for members in rows.values()]


def _hierarchical_means(
    values: np.ndarray, groups: list[np.ndarray], samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Bootstrap means [samples] of values [N] in groups, given as their row numbers."""
    sizes = np.array([len(members) for members in groups])
    largest = sizes.max()
    table = np.stack([np.resize(values[members], largest) for members in groups])
    total, drawn = np.zeros(samples), np.zeros(samples)
    for _ in groups:
        picks = rng.integers(len(groups), size=samples)
        size = sizes[picks][:, None]
        members = rng.integers(size, size=(samples, largest))
        counted = np.arange(largest) < size
        total += (table[picks[:, None], members] * counted).sum(1)
        drawn += sizes[picks]
    return total / drawn
