"""What a metric is, and what it sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch

Scores = Mapping[str, Sequence[float | None] | float | None]
"""By column: a value for each image, or one for all images of the prompt; None where there is nothing to measure."""


ABOUT, BETTER = ("likeness", "prompt", "diversity", "other"), ("higher", "lower", "")


@dataclass(frozen=True)
class Column:
    """One of a metric's columns.

    Args:
        about: "likeness" to the concept, "prompt" fidelity, "diversity" among images of a prompt, or "other".
        better: "higher", "lower", or "" where neither is.
    """

    about: str
    better: str = "higher"

    def __post_init__(self) -> None:
        for name, allowed in (("about", ABOUT), ("better", BETTER)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Column: {name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class PromptImages:
    """What a metric sees: the images of one method, concept and prompt."""

    concept: str
    noun: str
    """of the concept's class, as "ball" """
    template: str
    """as "a {} on sand" """
    prompt: str
    """as "a sks ball on sand" """
    images: list[PIL.Image.Image]
    """in RGB"""
    samples: list[int]
    """their numbers"""
    references: list[PIL.Image.Image]
    """the concept's images, in RGB"""
    masks: list[np.ndarray | None] = field(default_factory=list)
    """bool (height, width): where the method itself found the concept in each image; None where it did not look"""
    reference_masks: list[np.ndarray] | None = None
    layouts: list[PIL.Image.Image | None] = field(default_factory=list)
    """the images of the method "layout" with the same prompt and numbers"""

    @property
    def class_prompt(self) -> str:
        """The prompt with the noun in place of the concept, as "a ball on sand"."""
        return self.template.replace("{}", self.noun)


class Metric:
    """A measure of images; a class of one's own serves as well, see docs/evaluation.md.

    Options are keyword arguments of `__init__`, with annotations of what a file can hold; `protocol` is the file's and
    has to be among them. It is called before any model is loaded; a wrong option is a ValueError. `score` loads what it
    needs. What changes the numbers belongs into `settings`.
    """

    version: ClassVar[str] = "1"
    """another one means other numbers: it is kept with the scores, which are computed anew when it changes"""
    columns: Mapping[str, Column]
    needs_masks: bool = False
    """whether the concept's images need masks"""

    def __init__(self, *, protocol: str = "standard"):
        pass

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """The columns of the images of one prompt."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON holds it."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "version": self.version}
