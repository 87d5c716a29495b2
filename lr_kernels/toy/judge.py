"""The toy world's measures: a small classifier trained on renders, and the metrics computed with it."""

import itertools
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from lr_kernels.toy import world
from lr_kernels.toy.data import BACKDROPS

WEIGHTS = Path(__file__).parent / "judge.safetensors"
WIDTH = 24
HISTOGRAM_BINS = 4
SMALLEST_OBJECT = 0.02  # of the image area; a smaller mask counts as no object


def conv(inputs, outputs, kernel=3, stride=1):
    """Convolution, batch norm and ReLU: [B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Verdict(NamedTuple):
    """Logits for N images: mask [N, 64, 64], background [N, 7], shape [N, 5], subject [N]."""

    mask: torch.Tensor
    background: torch.Tensor
    shape: torch.Tensor
    subject: torch.Tensor


class Judge(nn.Module):
    """Finds the object in images [N, 3, 64, 64] in [-1, 1], names background and shape, and tells the subject."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.at_half = nn.Sequential(conv(3, width, 5, 2), conv(width, width))
        self.at_quarter = nn.Sequential(conv(width, 2 * width, 3, 2), conv(2 * width, 2 * width))
        self.at_eighth = nn.Sequential(conv(2 * width, 4 * width, 3, 2), conv(4 * width, 4 * width))
        self.up_quarter = conv(6 * width, 2 * width)
        self.up_half = conv(3 * width, width)
        self.mask = nn.Conv2d(width, 1, 1)
        self.background = nn.Linear(4 * width, len(BACKDROPS))
        self.shape = nn.Linear(4 * width, len(world.SHAPES))
        self.subject = nn.Sequential(nn.Linear(8 * width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, images):
        half = self.at_half(images)
        quarter = self.at_quarter(half)
        features = self.at_eighth(quarter)
        up = self.up_quarter(torch.cat([F.interpolate(features, scale_factor=2.0), quarter], 1))
        up = self.up_half(torch.cat([F.interpolate(up, scale_factor=2.0), half], 1))
        mask = self.mask(up)

        coverage = F.avg_pool2d(torch.sigmoid(mask), 4)
        outside = 1 - coverage
        on_object = (features * coverage).sum((2, 3)) / (coverage.sum((2, 3)) + 0.1)
        off_object = (features * outside).sum((2, 3)) / (outside.sum((2, 3)) + 0.1)
        strongest = (features * (coverage > 0.2)).amax((2, 3))
        return Verdict(
            F.interpolate(mask, scale_factor=2.0, mode="bilinear")[:, 0],
            self.background(off_object),
            self.shape(on_object),
            self.subject(torch.cat([on_object, strongest], 1))[:, 0],
        )


@lru_cache(maxsize=1)
def load_judge():
    """The shipped judge, ready to use."""
    judge = Judge()
    judge.load_state_dict(load_file(WEIGHTS))
    return judge.eval().requires_grad_(False)


def color_histogram(images, masks):
    """Normalized colour histograms [N, 64] of images [N, 3, H, W] in [-1, 1] inside masks [N, H, W] of 0 and 1."""
    bins = ((images.clamp(-1, 1) + 1) / 2 * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1)
    codes = (bins[:, 0] * HISTOGRAM_BINS + bins[:, 1]) * HISTOGRAM_BINS + bins[:, 2]
    counts = torch.zeros(len(images), HISTOGRAM_BINS**3).scatter_add_(1, codes.flatten(1), masks.flatten(1).float())
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


@lru_cache(maxsize=1)
def reference_histogram():
    """Mean histogram [64] of the subject's references inside their true masks."""
    images, masks = world.references()
    return color_histogram(images, masks > 0.5).mean(0)


def centroids(masks):
    """Mean x and y of masks [N, H, W] as fractions of the side: two tensors [N]."""
    area = masks.sum((1, 2)).clamp(min=1)
    line = (torch.arange(masks.shape[-1]) + 0.5) / masks.shape[-1]
    return (masks * line).sum((1, 2)) / area, (masks * line[:, None]).sum((1, 2)) / area


def overlap(first, second):
    """Intersection over union of masks [N, H, W] of 0 and 1: [N]."""
    intersection = (first * second).sum((1, 2))
    return intersection / (first + second - first * second).sum((1, 2)).clamp(min=1)


@torch.no_grad()
def object_masks(images):
    """The judge's object masks [N, 64, 64] of 0 and 1 for images [N, 3, 64, 64] in [-1, 1]."""
    return (load_judge()(images.float().clamp(-1, 1)).mask > 0).float()


@torch.no_grad()
def evaluate(images, backgrounds, layouts=None):
    """Every metric of the toy world, averaged over images.

    Args:
        images: [N, 3, 64, 64] in [-1, 1].
        backgrounds: N background names; images that share one count as seeds of one prompt.
        layouts: optional [N, 3, 64, 64], the layout images behind them.

    Returns:
        dict of floats: `identity` (probability of showing the subject), `histogram` (colour intersection with the
        references), `background` (share recognised as asked), `shape` (share recognised as balls), `position_std`
        (fraction of the side), `diversity` (1 - mean IoU between seeds of a prompt) and, given layouts, `layout_iou`.
    """
    images = images.float().clamp(-1, 1)
    verdict = load_judge()(images)
    masks = (verdict.mask > 0).float()
    visible = masks.mean((1, 2)) > SMALLEST_OBJECT
    x, y = (centre[visible] for centre in centroids(masks))
    shared = torch.minimum(color_histogram(images, masks), reference_histogram()).sum(1) * visible
    wanted = torch.tensor([BACKDROPS.index(name) for name in backgrounds])
    is_ball = (verdict.shape.argmax(1) == world.SHAPES.index(world.CLASS_WORD)) & visible
    pairs = [(i, j) for i, j in itertools.combinations(range(len(images)), 2) if backgrounds[i] == backgrounds[j]]
    metrics = {
        "identity": torch.sigmoid(verdict.subject).mean(),
        "histogram": shared.mean(),
        "background": (verdict.background.argmax(1) == wanted).float().mean(),
        "shape": is_ball.float().mean(),
        "position_std": (x.var() + y.var()).sqrt(),
    }
    if pairs:
        first, second = torch.tensor(pairs).T
        metrics["diversity"] = 1 - overlap(masks[first], masks[second]).mean()
    if layouts is not None:
        metrics["layout_iou"] = overlap(masks, object_masks(layouts)).mean()
    return {name: round(float(value), 4) for name, value in metrics.items()}
