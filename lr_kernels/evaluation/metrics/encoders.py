"""Encoders of images and texts, from a folder or the hub; each is loaded once for all metrics of a process."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model, ViTModel

from ...diffusers.many.file_checks import fingerprint
from .preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    hub_positions,
    squashed,
    squashed_for_clip,
    standard,
)

SIDE, SHORTER = 224, 256
"""Of the input of DINO and DINOv2, and of the image's shorter side before it is cut."""
BATCH = 16
DEFAULTS = {
    "clip": "openai/clip-vit-base-patch32",
    "dino": "facebook/dino-vits16",
    "dinov2": "facebook/dinov2-base",
}
"""The model that each kind of encoder is, by default."""


class Encoder:
    """Unit vectors of images."""

    def __init__(self, network: Any, protocol: str):
        self.network, self.protocol = network.eval().requires_grad_(False), protocol

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """The input of an RGB image: fp32 (3, side, side)."""
        raise NotImplementedError

    def encode(self, inputs: Tensor) -> Tensor:
        """The features (n, C) of inputs (n, 3, side, side)."""
        raise NotImplementedError

    @torch.no_grad()
    def features(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Unit vectors (n, C) of RGB images, fp32 on the CPU."""
        device = next(self.network.parameters()).device
        inputs = torch.stack([self.prepare(image) for image in images])
        encoded = [self.encode(batch.to(device)).float().cpu() for batch in inputs.split(BATCH)]
        return F.normalize(torch.cat(encoded), dim=1)


class Clip(Encoder):
    """CLIP (arXiv 2103.00020) with its text encoder."""

    def __init__(self, network: Any, protocol: str, tokenizer: Any):
        super().__init__(network, protocol)
        self.tokenizer = tokenizer

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """By the protocol, at the size that the model was trained with."""
        side = self.network.config.vision_config.image_size
        if self.protocol == "dreammatcher":
            return squashed_for_clip(image, side)
        return standard(image, side, side, CLIP_MEAN, CLIP_STD)

    def encode(self, inputs: Tensor) -> Tensor:
        """The projected features."""
        return self.network.visual_projection(self.network.vision_model(inputs)[1])

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """The unit vector (C,) of a text. ValueError for one that is longer than the model reads."""
        tokens = self.tokenizer(text, return_tensors="pt")
        length, longest = tokens["input_ids"].shape[1], self.network.config.text_config.max_position_embeddings
        if length > longest:
            raise ValueError(f"prompt: expected at most {longest} tokens, which CLIP reads, got {length}: {text!r}")
        tokens = tokens.to(next(self.network.parameters()).device)
        features = self.network.text_projection(self.network.text_model(**tokens)[1])
        return F.normalize(features[0].float().cpu(), dim=0)


class Dino(Encoder):
    """DINO (arXiv 2104.14294): the class token of a ViT."""

    def __init__(self, network: Any, protocol: str):
        super().__init__(network, protocol)
        if protocol == "dreammatcher":
            embeddings = network.embeddings
            count = 256 // network.config.patch_size
            grown = hub_positions(embeddings.position_embeddings.detach(), (count, count))
            embeddings.position_embeddings = torch.nn.Parameter(grown, requires_grad=False)
            embeddings.image_size = embeddings.patch_embeddings.image_size = (256, 256)

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """By the protocol."""
        if self.protocol == "dreammatcher":
            return squashed(image)
        return standard(image, SHORTER, SIDE, IMAGENET_MEAN, IMAGENET_STD)

    def encode(self, inputs: Tensor) -> Tensor:
        """The class token."""
        return self.network(inputs).last_hidden_state[:, 0]


class DinoV2(Encoder):
    """DINOv2 (arXiv 2304.07193): the class token. DreamMatcher has no figures of it, so both protocols are the same."""

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """As the authors."""
        return standard(image, SHORTER, SIDE, IMAGENET_MEAN, IMAGENET_STD)

    def encode(self, inputs: Tensor) -> Tensor:
        """The class token."""
        return self.network(inputs).last_hidden_state[:, 0]


MODEL_TYPES = {"clip": "clip", "dino": "vit", "dinov2": "dinov2"}
"""What the configuration of a model of each kind says."""


def model_of(kind: str, model: str | None) -> str:
    """The folder or id of an encoder, by default that of DEFAULTS. ValueError for a folder of another kind."""
    if model is None:
        return DEFAULTS[kind]
    if Path(model).is_dir():
        path = Path(model) / "config.json"
        found = json.loads(path.read_bytes()).get("model_type") if path.is_file() else "no config.json"
        if found != MODEL_TYPES[kind]:
            raise ValueError(f"model: expected a folder of a {MODEL_TYPES[kind]!r} of transformers, got {found!r}")
    return model


def identity_of(model: str) -> str:
    """What says which weights a model has: the fingerprint of a folder, or the id on the hub."""
    return fingerprint(Path(model)) if Path(model).is_dir() else model


@cache
def load_encoder(kind: str, model: str, protocol: str, device: torch.device) -> Encoder:
    """An encoder of DEFAULTS' kinds with the weights of a folder or of the hub. ValueError where weights are missing,
    which transformers would draw at random."""
    if kind == "clip":
        tokenizer = CLIPTokenizer.from_pretrained(model)
        return Clip(_loaded(CLIPModel, model).to(device), protocol, tokenizer)
    if kind == "dino":
        return Dino(_loaded(ViTModel, model, add_pooling_layer=False).to(device), protocol)
    return DinoV2(_loaded(Dinov2Model, model).to(device), protocol)


def _loaded(network: Any, model: str, **options: Any) -> Any:
    found, about = network.from_pretrained(model, output_loading_info=True, **options)
    if about["missing_keys"]:
        missing = sorted(about["missing_keys"])
        raise ValueError(f"model: expected the weights of a {network.__name__} in {model}, got none for {missing[0]}")
    return found
