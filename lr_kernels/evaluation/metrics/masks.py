"""Where the concept is in the images: found by the methods themselves, or by a function of the user's."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from .metric import PromptImages

RECORDED = "recorded"
Segmenter = Callable[..., Any]
"""segmenter(image, noun) -> bool (height, width), where an RGB image shows a thing of this class; an array, a PIL image
of two values, or a tensor"""


def segmenter(name: str) -> Segmenter | None:
    """The function of that name, "package.module:function"; None for "recorded"."""
    if name == RECORDED:
        return None
    found = named("masks", name)
    if not callable(found):
        raise ValueError(f"masks: expected a function, got {name!r}, which is {type(found).__name__}")
    return found


def named(argument: str, name: str) -> Any:
    """What "package.module:name" names. ValueError where there is no such thing."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of a module of the user's, whatever it is
        raise ValueError(
            f"{argument}: expected package.module:name of what can be imported, got {name!r}: {error}"
        ) from None


def masks_by(segment: Segmenter | None, shown: PromptImages) -> list[np.ndarray | None]:
    """A mask for each image, bool (height, width); None where there is none."""
    if segment is None:
        return shown.masks or [None] * len(shown.images)
    return [np.asarray(segment(image, shown.noun)) > 0 for image in shown.images]
