"""The toy world's measures as metrics of an evaluation: `lr_kernels.toy.metrics:Subject` and the others.

A concept's name is that of its subject in `world.SUBJECTS`. Images are those of the toy model, 64 x 64.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..evaluation.metrics.diversity import Pairwise, square
from ..evaluation.metrics.metric import Column, Metric, PromptImages, Scores
from . import world
from .encoder import similarity
from .judge import Wanted, centroids, color_histogram, fidelity, identity, object_masks, overlap, reference_histogram
from .judge import visible as is_visible

PROMPT = re.compile(r"a \{\}( and a (?P<color>\w+) (?P<shape>\w+))?( at (?P<place>\w+))? on (?P<background>\w+)")
"""The prompts that can be judged."""


def pixels(images: Sequence[PIL.Image.Image]) -> Tensor:
    """Images as the judge sees them, (n, 3, 64, 64) in [-1, 1]."""
    arrays = [np.asarray(image) for image in images]
    for array in arrays:
        if array.shape != (world.SIDE, world.SIDE, 3):
            raise ValueError(
                f"images: expected {world.SIDE} x {world.SIDE} pixels; got {array.shape[1]} x {array.shape[0]}"
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def wanted_of(shown: PromptImages) -> Wanted:
    """What a prompt asks of an image."""
    found = PROMPT.fullmatch(shown.template)
    if found is None:
        text = '"a {} [and a <colour> <shape>] [at <place>] on <background>"'
        raise ValueError(f"prompts: expected the form {text}; got {shown.template!r}")
    other = Wanted(shape=found["shape"], color=found["color"]) if found["shape"] else None
    return Wanted(subject=shown.concept, place=found["place"], background=found["background"], other=other)


class Subject(Metric):
    """Likeness to the subject: the judge's probability of all its traits, and the overlap of its colour histogram with
    that of the references. 0 for images without an object."""

    columns: Mapping[str, Column] = {"identity": Column("likeness"), "histogram": Column("likeness")}

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """Of the object that the judge finds; of two that a prompt asks for, the one that is more like the subject."""
        images, wanted = pixels(shown.images), wanted_of(shown)
        masks = object_masks(images)
        colors = torch.minimum(color_histogram(images, masks), reference_histogram(shown.concept)).sum(1)
        of_one = identity(images, shown.concept) if wanted.other is None else fidelity(images, wanted)["identity"]
        return {"identity": of_one.tolist(), "histogram": (colors * is_visible(masks)).tolist()}


class Encoder(Metric):
    """Likeness by an encoder that never saw the toy world, see `lr_kernels.toy.encoder`."""

    columns: Mapping[str, Column] = {"encoder": Column("likeness")}

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """Cosines."""
        return {"encoder": similarity(pixels(shown.images), pixels(shown.references)).tolist()}


class Prompt(Metric):
    """What else the prompt asks for, as 0 or 1: the background, both objects, the second one's shape and colour."""

    columns: Mapping[str, Column] = {
        name: Column("prompt") for name in ("background", "both_objects", "other_shape", "other_color")
    }

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """None for what the prompt does not ask for."""
        wanted = wanted_of(shown)
        found = fidelity(pixels(shown.images), wanted)
        nothing = [None] * len(shown.images)
        values = {name: found[name].tolist() if name in found else nothing for name in self.columns}
        return values | {"both_objects": nothing if wanted.other is None else found["present"].tolist()}


class Layout(Metric):
    """The IoU of the object with that of the layout."""

    columns: Mapping[str, Column] = {"layout_iou": Column("other")}

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """None where there is no layout."""
        found: list[float | None] = []
        for image, layout in zip(shown.images, shown.layouts):
            both = None if layout is None else object_masks(pixels([image, layout]))
            found.append(None if both is None else overlap(both[:1], both[1:]).item())
        return {"layout_iou": found}


class Outline(Pairwise):
    """1 - the IoU of the objects in two images of a prompt."""

    columns: Mapping[str, Column] = {"outline_diversity": Column("diversity")}

    def pairs(self, shown: PromptImages, device: torch.device) -> list[list[float | None]]:
        """Of the masks that the judge finds."""
        masks = object_masks(pixels(shown.images))
        return square(len(masks), lambda i, j: 1 - overlap(masks[i : i + 1], masks[j : j + 1]).item())


class Position(Pairwise):
    """The distance of the objects' centres in two images of a prompt, a fraction of the side."""

    columns: Mapping[str, Column] = {"position_diversity": Column("diversity")}

    def pairs(self, shown: PromptImages, device: torch.device) -> list[list[float | None]]:
        """None where an image shows no object."""
        masks = object_masks(pixels(shown.images))
        seen, centres = is_visible(masks).bool(), torch.stack(centroids(masks), 1)

        def distance(i: int, j: int) -> float | None:
            return (centres[i] - centres[j]).norm().item() if seen[i] and seen[j] else None

        return square(len(masks), distance)


def mask(image: PIL.Image.Image, noun: str) -> Tensor:
    """A function for the option `masks` of metrics: where the judge finds objects, (64, 64)."""
    return object_masks(pixels([image]))[0]
