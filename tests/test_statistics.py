"""Means with intervals: known answers, nested groups, paired differences, bad arguments."""

import numpy as np
import pytest
import torch

from lr_kernels.statistics import bootstrap_interval, paired_difference


def test_intervals_of_known_answers():
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5, 0.5)
    rng = np.random.default_rng(0)
    values = rng.normal(2.0, 3.0, 400)
    mean, low, high = bootstrap_interval(values)
    assert mean == pytest.approx(values.mean()) and (low + high) / 2 == pytest.approx(mean, abs=0.05)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert bootstrap_interval(values) == (mean, low, high)
    narrow = bootstrap_interval(torch.from_numpy(values), level=0.5)
    assert low < narrow[1] < narrow[2] < high


def test_groups_widen_an_interval_to_what_groups_vary():
    rng = np.random.default_rng(1)
    centres = rng.normal(0.0, 1.0, 20)
    values, paths = np.repeat(centres, 25), [("ball", seed) for seed in range(20) for _ in range(25)]
    mean, low, high = bootstrap_interval(values, paths)
    assert mean == pytest.approx(centres.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * centres.std() / 20**0.5, rel=0.1)
    alone = bootstrap_interval(values)
    assert high - low > 3 * (alone[2] - alone[1])
    one_group = bootstrap_interval(values, [("only",)] * 500)
    assert one_group[1:] == pytest.approx(alone[1:], abs=0.03)


def test_every_group_counts_the_same():
    """The value of one group and three values of another; two prompts of a concept beside one of another."""
    assert bootstrap_interval([0.0, 1.0, 1.0, 1.0], [("a",), ("b",), ("b",), ("b",)]) == (0.5, 0.0, 1.0)
    paths = [("a", "x"), ("a", "y"), ("a", "y"), ("b", "x")]
    assert bootstrap_interval([0.0, 4.0, 8.0, 7.0], paths)[0] == (3.0 + 7.0) / 2


def test_the_deviations_of_all_levels_add_up():
    """Concepts, prompts and seeds vary by 1 each: the mean of 8 x 6 x 4 values has the sum of their variances."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(8, 1, 1)) + rng.normal(size=(8, 6, 1)) + rng.normal(size=(8, 6, 4))
    paths = [(concept, prompt) for concept in range(8) for prompt in range(6) for _ in range(4)]
    order = rng.permutation(len(paths))  # the values may come in any order
    _, low, high = bootstrap_interval(values.ravel()[order], [paths[i] for i in order], samples=4000)
    of_concepts = values.mean((1, 2)).var() / 8
    of_prompts = values.mean(2).var(1).mean() / (8 * 6)
    of_seeds = values.var(2).mean() / (8 * 6 * 4)
    assert (high - low) / 2 == pytest.approx(1.96 * (of_concepts + of_prompts + of_seeds) ** 0.5, rel=0.1)


def test_paired_differences_ignore_what_both_share():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 10, 100)
    mean, low, high = paired_difference(shared + 0.25, shared)
    assert (mean, low, high) == pytest.approx((0.25, 0.25, 0.25))
    assert paired_difference([1, 2], [0, 0], paths=[("a",), ("b",)]) == (1.5, 1.0, 2.0)


def test_bad_arguments_are_named():
    for values in ([], [[1.0]], [float("nan")]):
        with pytest.raises(ValueError, match="values: expected"):
            bootstrap_interval(values)
    with pytest.raises(ValueError, match="level: expected"):
        bootstrap_interval([1.0], level=95)
    with pytest.raises(ValueError, match="samples: expected"):
        bootstrap_interval([1.0], samples=0)
    with pytest.raises(ValueError, match="paths: expected 2, one per value"):
        bootstrap_interval([1.0, 2.0], paths=[("a",)])
    with pytest.raises(ValueError, match="paths: expected tuples of one length"):
        bootstrap_interval([1.0, 2.0], paths=[("a",), ("b", "c")])
    with pytest.raises(ValueError, match="second: expected the shape"):
        paired_difference([1.0], [1.0, 2.0])
