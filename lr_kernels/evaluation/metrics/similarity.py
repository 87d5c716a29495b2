"""Likeness to the concept and to the prompt, by encoders' features."""

from typing import Any

import PIL.Image
import torch
from torch import Tensor

from .encoders import Clip, Encoder, identity_of, load_encoder, model_of
from .masks import RECORDED, masks_by, segmenter
from .metric import Column, Metric, PromptImages, Scores
from .preprocess import without_background


class EncoderMetric(Metric):
    """A metric by an encoder's features.

    Args:
        model: a folder, or an id on the hub. Default: that of DEFAULTS. name: of the column. protocol: of PROTOCOLS.
    """

    kind: str
    about: str

    def __init__(self, *, protocol: str = "standard", model: str | None = None, name: str | None = None):
        self.protocol, self.model = protocol, model_of(self.kind, model)
        self.identity = identity_of(self.model)
        self.columns = {name or self.column(): Column(self.about)}

    def column(self) -> str:
        """The default name of the column."""
        return self.kind

    def encoder(self, device: torch.device) -> Encoder:
        """The encoder, loaded."""
        return load_encoder(self.kind, self.model, self.protocol, device)

    def settings(self) -> dict[str, Any]:
        """The class, the model and the protocol."""
        return super().settings() | {"model": self.identity, "protocol": self.protocol}


class ImageSimilarity(EncoderMetric):
    """The mean cosine between the features of an image and those of the concept's images.

    Args:
        masked: whether the surroundings of the concept are made grey before, in both.
        masks: with `masked`, where the concept is in the images: "recorded", where the method itself has found it, or a
            function of an image and a noun, as "package.module:function"; see `masks.segmenter`.
    """

    about = "likeness"

    def __init__(
        self,
        *,
        protocol: str = "standard",
        model: str | None = None,
        name: str | None = None,
        masked: bool = False,
        masks: str = RECORDED,
    ):
        if masks != RECORDED and not masked:
            raise ValueError(f"masks: expected {RECORDED!r} where masked is false, got {masks!r}")
        self.masked, self.masks, self.needs_masks = masked, masks, masked
        if masked and protocol == "dreammatcher":
            raise ValueError("masked: expected false, since the protocol dreammatcher has no masks, got true")
        self.segment = segmenter(masks) if masked else None
        super().__init__(protocol=protocol, model=model, name=name)
        self._known: dict[str, Tensor] = {}

    def column(self) -> str:
        """As "dino", masked "dino_masked"."""
        name = "clip_i" if self.kind == "clip" else self.kind
        return f"{name}_masked" if self.masked else name

    def settings(self) -> dict[str, Any]:
        """With the masks."""
        return super().settings() | ({"masks": self.masks} if self.masked else {})

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """A column of cosines in [-1, 1]; None where masks are wanted and there is none, or an empty one."""
        encoder, (column,) = self.encoder(device), self.columns
        images: list[PIL.Image.Image | None] = [*shown.images]
        if self.masked:
            masks = zip(shown.images, masks_by(self.segment, shown))
            images = [None if mask is None or not mask.any() else without_background(x, mask) for x, mask in masks]
        seen = [image for image in images if image is not None]
        values = iter((encoder.features(seen) @ self.known(shown, encoder).T).mean(1).tolist() if seen else [])
        return {column: [None if image is None else next(values) for image in images]}

    def known(self, shown: PromptImages, encoder: Encoder) -> Tensor:
        """The features of the concept's images, computed once."""
        if shown.concept not in self._known:
            images = shown.references
            if self.masked:
                if shown.reference_masks is None:
                    raise ValueError(f"concepts.{shown.concept}.masks: expected masks of its images, got none")
                images = [without_background(x, mask) for x, mask in zip(images, shown.reference_masks)]
            self._known[shown.concept] = encoder.features(images)
        return self._known[shown.concept]


class ClipImage(ImageSimilarity):
    """CLIP-I: `ImageSimilarity` by CLIP."""

    kind = "clip"


class DinoImage(ImageSimilarity):
    """DINO: `ImageSimilarity` by DINO."""

    kind = "dino"


class DinoV2Image(ImageSimilarity):
    """DINOv2: `ImageSimilarity` by DINOv2."""

    kind = "dinov2"


class ClipText(EncoderMetric):
    """CLIP-T: the cosine between CLIP's features of an image and of its prompt.

    The standard protocol takes the prompt with the class noun in place of the concept, as "a ball on sand", since CLIP
    knows no token of a concept. The protocol dreammatcher takes the template with its literal "{}".
    """

    kind, about = "clip", "prompt"

    def column(self) -> str:
        """As papers call it."""
        return "clip_t"

    def score(self, shown: PromptImages, device: torch.device) -> Scores:
        """A column of cosines in [-1, 1]."""
        encoder, (column,) = self.encoder(device), self.columns
        assert isinstance(encoder, Clip)
        text = encoder.text(shown.template if self.protocol == "dreammatcher" else shown.class_prompt)
        return {column: (encoder.features(shown.images) @ text).tolist()}
