"""Means with bootstrap intervals, for values in nested groups such as concept, prompt and seed."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

Path = tuple[Hashable, ...]
"""The groups that a value is in, the largest first, as (concept, prompt)."""
CHUNK = 100
"""Bootstrap means that are drawn at a time, which bounds the memory."""


def bootstrap_interval(
    values: ArrayLike,
    paths: Sequence[Path] | None = None,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The mean of values and a percentile bootstrap interval of it.

    With paths the mean is one of means: each group counts the same within the group that it is in, whatever its size.
    The bootstrap is hierarchical: it draws as many groups as there are, with replacement, from each drawn group as many
    of its own groups, and from the last ones as many of their values. The interval then says how far the mean would
    move with other groups (other concepts, other prompts), which is more than it moves with other images of the same
    ones.

    Args:
        values: [N], finite; an array, tensor or sequence.
        paths: N tuples of one length, as (concept, prompt); None: the values are independent.
        level: the share of the bootstrap means that the interval holds, in (0, 1).
        samples: bootstrap means to draw.
        seed: of the draws; the same arguments give the same interval.

    Returns:
        (mean, low, high), floats.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) == 0 or not np.isfinite(found).all():
        raise ValueError(f"values: expected one dimension of finite numbers, at least one; got shape {found.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a share between 0 and 1; got {level}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1; got {samples}")
    paths = [()] * len(found) if paths is None else list(paths)
    if len(paths) != len(found):
        raise ValueError(f"paths: expected {len(found)}, one per value; got {len(paths)}")
    if len({len(path) for path in paths}) > 1:
        raise ValueError("paths: expected tuples of one length; got several")
    table, sizes = _table(found, paths)
    everything = [np.arange(width) < size[..., None] for width, size in zip(table.shape, sizes)]
    rng = np.random.default_rng(seed)
    counts = [min(CHUNK, samples - start) for start in range(0, samples, CHUNK)]
    means = np.concatenate([_bootstrap_means(table, sizes, count, rng) for count in counts])
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(_mean_of_means(table, everything)), float(low), float(high)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    paths: Sequence[Path] | None = None,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The mean of first - second, values [N] each of the same images, with its interval; see `bootstrap_interval`."""
    one, other = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if one.shape != other.shape:
        raise ValueError(f"second: expected the shape of first, {one.shape}; got {other.shape}")
    return bootstrap_interval(one - other, paths, level, samples, seed)


def _table(values: np.ndarray, paths: Sequence[Path]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Values by their places in the groups, an axis for each level and one for the values of the last groups; and for
    each axis how many of its places are taken, in an array over the axes before it. What is not taken is 0."""
    depth = len(paths[0])
    places: list[dict[Path, int]] = [{} for _ in range(depth)]  # of each group within the group that it is in
    taken: list[dict[Path, int]] = [{} for _ in range(depth + 1)]
    where = []
    for path in paths:
        place = []
        for axis in range(depth):
            above, group = path[:axis], path[: axis + 1]
            if group not in places[axis]:
                places[axis][group] = taken[axis].get(above, 0)
                taken[axis][above] = places[axis][group] + 1
            place.append(places[axis][group])
        last = taken[depth].get(path, 0)
        taken[depth][path] = last + 1
        where.append((*place, last))
    shape = tuple(max(counts.values()) for counts in taken)
    table = np.zeros(shape)
    table[tuple(np.array(where).T)] = values
    sizes = []
    for axis, counts in enumerate(taken):
        size = np.zeros(shape[:axis], dtype=np.int64)
        for path, count in counts.items():
            size[tuple(places[level][path[: level + 1]] for level in range(axis))] = count
        sizes.append(size)
    return table, sizes


def _bootstrap_means(table: np.ndarray, sizes: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap means [count]."""
    index: tuple[np.ndarray, ...] = ()
    counted = []
    for width, size in zip(table.shape, sizes):
        there = size[index] if index else np.full(count, size)
        picks = rng.integers(np.maximum(there, 1)[..., None], size=(*there.shape, width))
        counted.append(np.arange(width) < there[..., None])
        index = (*(x[..., None] for x in index), picks)
    return _mean_of_means(table[index], counted)


def _mean_of_means(values: np.ndarray, counted: list[np.ndarray]) -> np.ndarray:
    """The means over the last axes, one for each of `counted`, which says what counts."""
    for shown in reversed(counted):
        weights = np.broadcast_to(shown, values.shape)
        values = (values * weights).sum(-1) / np.maximum(weights.sum(-1), 1)
    return values
