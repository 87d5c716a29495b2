"""Checks of the arguments of `methods`. They run where a `with` block begins, not in the first step that is active."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...presets.shared import MAX_OTHERS
from ...runtime.backends import BACKENDS
from ...runtime.checks import check_choice, check_integer, entries_of, fail, plain_number

MAX_SEED = 2**53
"""The largest seed: a step's generator is seeded with 1000 times the seed plus the step, which must fit 64 bits."""


def check_backend(op: str, backend: str) -> None:
    """ValueError for a name that is no backend."""
    check_choice(op, "backend", backend, ("auto", *BACKENDS))


def check_images(op: str, images: int, backend: str, most: float = float("inf")) -> int:
    """The number of images of a half; also checks the backend, which every method has."""
    check_backend(op, backend)
    expected = "at least 1" if most == float("inf") else f"1 to {most} images"
    return check_integer(op, "images", images, 1, expected, most)


def check_seed(op: str, seed: int) -> int:
    """The seed as an int. ValueError unless it is an integer of at most 53 bits."""
    return check_integer(op, "seed", seed, -MAX_SEED, "an integer of at most 53 bits", MAX_SEED)


def check_anchors(anchors: Sequence[int], images: int) -> list[int]:
    """Refuse a list of images that is empty, names one twice or names one that the half does not have."""
    expected = f"a list of 1 to {MAX_OTHERS} of the images 0 to {images - 1}, each once"
    entries = entries_of(anchors)
    if entries is None or not 1 <= len(entries) <= MAX_OTHERS:
        fail("consistory", "anchors", expected, repr(anchors))
    found = [check_integer("consistory", "anchors", x, 0, expected, images - 1) for x in entries]
    if len(set(found)) != len(found):
        fail("consistory", "anchors", expected, found)
    return found


def check_later(op: str, steps: int | Collection[int] | None) -> None:
    """Refuse the first step for a method whose masks come from the steps before."""
    number = plain_number(steps)
    if number is not None:
        first = number == 0
    else:
        first = steps is None or (isinstance(steps, Collection) and not isinstance(steps, str) and 0 in steps)
    if first:
        fail(op, "steps", "steps from 1 on", repr(steps), "the masks are found in the steps before")


def check_list(op: str, name: str, values: Sequence[object], length: int | None = None) -> list[Any]:
    """The values as a list with one entry per image."""
    sized = isinstance(values, list | tuple) or (isinstance(values, Tensor | np.ndarray) and values.ndim > 0)
    if not sized or (length is not None and len(values) != length):
        expected = "a list" if length is None else f"a list of {length}"
        fail(op, name, f"{expected}, one per image", len(values) if sized else repr(values))
    return list(values)


def check_strength(op: str, name: str, x: float | Tensor) -> None:
    """Refuse a strength that is neither a number nor a tensor without NaN. Its entries are read once, before the
    run."""
    if isinstance(x, Tensor):
        if bool(x.isnan().any()):
            fail(op, name, "finite numbers", "NaN")
    elif (number := plain_number(x)) is None or math.isnan(number):
        fail(op, name, "a number or a tensor", repr(x))


def as_mask(op: str, name: str, mask: Tensor | np.ndarray) -> Tensor:
    """The mask as a tensor, bool or floating, (1 or B, height, width)."""
    found = torch.from_numpy(mask) if isinstance(mask, np.ndarray) and mask.dtype.kind in "bf" else mask
    expected = "bool or float (height, width) or (1 or B, height, width)"
    if not isinstance(found, Tensor) or found.dim() not in (2, 3) or found.numel() == 0:
        fail(op, name, expected, tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__)
    if found.dtype != torch.bool and not found.is_floating_point():
        fail(op, name, expected, found.dtype)
    return found if found.dim() == 3 else found[None]


def stacked_masks(op: str, masks: Tensor | np.ndarray | Sequence[Tensor], images: int) -> Tensor:
    """Masks, given as a tensor, an array or a list of them, as bool (images, height, width)."""
    expected = f"bool ({images}, height, width)"
    found = masks
    if isinstance(masks, Sequence) and not isinstance(masks, str):
        parts = [torch.from_numpy(x) if isinstance(x, np.ndarray) and x.dtype == bool else x for x in masks]
        if not all(isinstance(x, Tensor) for x in parts) or len({(x.shape, x.device) for x in parts}) != 1:
            fail(op, "masks", expected + ", or a list of masks of one size", repr([type(x).__name__ for x in parts]))
        found = torch.stack(parts)
    elif isinstance(masks, np.ndarray) and masks.dtype == bool:
        found = torch.from_numpy(masks)
    if not isinstance(found, Tensor):
        fail(op, "masks", expected, f"{type(found).__name__} {getattr(found, 'dtype', '')}".strip())
    if found.dim() != 3 or len(found) != images or found.dtype != torch.bool or found.numel() == 0:
        fail(op, "masks", expected, f"{found.dtype} {tuple(found.shape)}")
    return found
