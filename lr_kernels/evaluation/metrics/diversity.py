"""How much the images of one prompt differ from each other."""

import importlib.util
import itertools
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .encoders import DEFAULTS, identity_of, load_encoder, model_of
from .masks import RECORDED, masks_by, segmenter
from .metric import Column, Metric, PromptImages, Scores
from .preprocess import pixels_of


class Pairwise(Metric):
    """A column: the mean over the pairs of images of a prompt of something that each pair has.

    It is given per image, as the mean over the pairs that the image is in: so the mean over images is that over pairs,
    and each image says how far it is from the others. A prompt with one image has no pairs, and None.
    """

    def pairs(self, shown: PromptImages, device: torch.device) -> list[list[float | None]]:
        """A square of values, of which the diagonal is not read; None where an image cannot be compared."""
        raise NotImplementedError

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """A column of means."""
        values, (column,) = self.pairs(shown, device), self.columns
        return {column: means_of_others(values)}


def means_of_others(values: list[list[float | None]]) -> list[float | None]:
    """Of each row of a square the mean without the diagonal and without None; None where nothing is left."""
    others = [[x for j, x in enumerate(row) if j != i and x is not None] for i, row in enumerate(values)]
    return [sum(row) / len(row) if row else None for row in others]


def square(count: int, distances: Any) -> list[list[float | None]]:
    """A symmetric square of distances(i, j), i < j."""
    values: list[list[float | None]] = [[None] * count for _ in range(count)]
    for i, j in itertools.combinations(range(count), 2):
        values[i][j] = values[j][i] = distances(i, j)
    return values


class LayoutIoU(Pairwise):
    """1 - the IoU of the concept's masks in two images: how much its place and outline differ.

    Args:
        masks: "recorded", where the method itself has found the concept, or "package.module:function", see
            `masks.segmenter`. name: of the column.
    """

    def __init__(self, *, protocol: str = "standard", masks: str = RECORDED, name: str = "layout_diversity"):
        self.masks, self.segment = masks, segmenter(masks)
        self.columns = {name: Column("diversity")}

    def settings(self) -> dict[str, Any]:
        """With the masks."""
        return super().settings() | {"masks": self.masks}

    def pairs(self, shown: PromptImages, device: torch.device) -> list[list[float | None]]:
        """1 - IoU; None where an image has no mask."""
        masks = masks_by(self.segment, shown)

        def distance(i: int, j: int) -> float | None:
            first, second = masks[i], masks[j]
            if first is None or second is None:
                return None
            return 1 - float((first & second).sum()) / max(float((first | second).sum()), 1.0)

        return square(len(masks), distance)


class Vendi(Metric):
    """The Vendi score (arXiv 2210.02410) of the images of a prompt: the effective number of different ones.

    The exponential of the entropy of the eigenvalues of K / n, where K holds the cosines between the features of n
    images. It is 1 for equal images and n for images whose features have nothing in common.

    Args:
        encoder: "dino" (default), "dinov2" or "clip". model: of it, a folder or an id on the hub. name: of the column.
    """

    def __init__(
        self,
        *,
        protocol: str = "standard",
        encoder: str = "dino",
        model: str | None = None,
        name: str = "vendi",
    ):
        if encoder not in DEFAULTS:
            raise ValueError(f"encoder: expected one of {', '.join(DEFAULTS)}, got {encoder!r}")
        self.protocol, self.encoder, self.model = protocol, encoder, model_of(encoder, model)
        self.identity = identity_of(self.model)
        self.columns = {name: Column("diversity")}

    def settings(self) -> dict[str, Any]:
        """With the encoder."""
        return super().settings() | {"encoder": self.encoder, "model": self.identity, "protocol": self.protocol}

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """One value for the prompt; None for a single image."""
        (column,) = self.columns
        if len(shown.images) < 2:
            return {column: None}
        encoder = load_encoder(self.encoder, self.model, self.protocol, device)
        return {column: vendi_score(encoder.features(shown.images))}


def vendi_score(features: Tensor) -> float:
    """The Vendi score of unit vectors (n, C)."""
    similarity = features.double() @ features.double().T
    shares = torch.linalg.eigvalsh(similarity / len(features)).clamp(min=0)
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


class Lpips(Pairwise):
    """LPIPS (arXiv 1801.03924) between the images of a prompt, by torchmetrics, which needs torchvision.

    Args:
        network: "alex" (default), "vgg" or "squeeze". name: of the column.
    """

    def __init__(self, *, protocol: str = "standard", network: str = "alex", name: str = "lpips"):
        if network not in ("alex", "vgg", "squeeze"):
            raise ValueError(f"network: expected one of alex, vgg, squeeze, got {network!r}")
        need("torchmetrics", "torchvision")
        self.network = network
        self.columns = {name: Column("diversity")}

    def settings(self) -> dict[str, Any]:
        """With the network."""
        return super().settings() | {"network": self.network}

    def pairs(self, shown: PromptImages, device: torch.device) -> list[list[float | None]]:
        """Distances."""
        inputs = [(pixels_of(image)[None] / 127.5 - 1).to(device) for image in shown.images]
        measure = load_lpips(self.network, device)

        def distance(i: int, j: int) -> float:
            with torch.no_grad():
                return float(measure(inputs[i], inputs[j]))

        return square(len(inputs), distance)


class DreamSim(Metric):
    """DreamSim (arXiv 2306.09344) between the images of a prompt, and between each and the concept's images, by the
    package dreamsim.

    Args:
        model_type: "ensemble" (default) or another of the package's types. name: the beginning of the columns' names.
    """

    def __init__(self, *, protocol: str = "standard", model_type: str = "ensemble", name: str = "dreamsim"):
        need("dreamsim")
        self.model_type, self.name = model_type, name
        self.columns = {name: Column("likeness", "lower"), f"{name}_diversity": Column("diversity")}

    def settings(self) -> dict[str, Any]:
        """With the type."""
        return super().settings() | {"model_type": self.model_type}

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """The mean distance to the concept's images, and to the other images of the prompt."""
        model, prepare = load_dreamsim(self.model_type, device)
        images, references = (
            [prepare(image).to(device) for image in given] for given in (shown.images, shown.references)
        )

        def distance(first: Tensor, second: Tensor) -> float:
            with torch.no_grad():
                return float(model(first, second))

        likeness = [float(np.mean([distance(image, reference) for reference in references])) for image in images]
        values = square(len(images), lambda i, j: distance(images[i], images[j]))
        return {self.name: likeness, f"{self.name}_diversity": means_of_others(values)}


def need(*modules: str) -> None:
    """ModuleNotFoundError for packages of a metric that are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"expected the packages {', '.join(missing)}, got none; pip install {' '.join(missing)}"
        )


@cache
def load_lpips(network: str, device: torch.device) -> Any:
    """torchmetrics' LPIPS, of images in [-1, 1]."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=False).to(device).eval()


@cache
def load_dreamsim(model_type: str, device: torch.device) -> tuple[Any, Any]:
    """The model, and its preprocessing of PIL images."""
    from dreamsim import dreamsim

    return dreamsim(pretrained=True, device=str(device), dreamsim_type=model_type)
