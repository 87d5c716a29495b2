"""The toy world's measures: a small network trained on renders that names what an image shows, and metrics from it."""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from . import world
from .data import BACKDROPS, NO_DOT, colors_of

WEIGHTS = Path(__file__).parent / "judge.safetensors"
WIDTH = 16
CROP = 40
REACH = 2.1  # half the side of a crop in units of the object's radius of gyration: every shape fits
HISTOGRAM_BINS = 4
SMALLEST_OBJECT = 0.02  # of the image area; a smaller mask counts as no object
MOST_OBJECTS = 3


class Verdict(NamedTuple):
    """Logits for N images: mask [N, 64, 64] of all objects, background [N, 7], and of the object that was asked about
    shape [N, 5], texture [N, 3], colors [N, 6] (each present or not) and dot [N, 7] (its colour, or none)."""

    mask: torch.Tensor
    background: torch.Tensor
    shape: torch.Tensor
    texture: torch.Tensor
    colors: torch.Tensor
    dot: torch.Tensor


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU: [B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def pooled(features: Tensor, coverage: Tensor) -> Tensor:
    """Mean of features [B, C, H, W] weighted by coverage [B, 1, H, W]: [B, C]."""
    return (features * coverage).sum((2, 3)) / (coverage.sum((2, 3)) + 0.1)


def crop(images: Tensor, within: Tensor) -> Tensor:
    """Images [N, 3, H, W] and masks within [N, H, W] cut around each mask, [N, 4, CROP, CROP], zero past the border.

    The window's centre and side follow the mask's centroid and radius of gyration, so every object fills it alike and a
    few stray pixels hardly move it. An empty mask yields a tiny window.
    """
    x, y = centroids(within)
    line = (torch.arange(within.shape[-1]) + 0.5) / within.shape[-1]
    squares = (line - x[:, None])[:, None, :] ** 2 + (line - y[:, None])[:, :, None] ** 2
    half = REACH * ((within * squares).sum((1, 2)) / within.sum((1, 2)).clamp(min=1)).sqrt().clamp(min=0.02)
    zoom = 2 * half[:, None, None] * torch.eye(2)
    window = torch.cat([zoom, torch.stack([2 * x - 1, 2 * y - 1], 1)[:, :, None]], 2)
    grid = F.affine_grid(window, [len(images), 4, CROP, CROP], align_corners=False)
    return F.grid_sample(torch.cat([images, within[:, None]], 1), grid, align_corners=False)


class Finder(nn.Module):
    """Images [N, 3, 64, 64] -> logits of the object mask [N, 64, 64] and of the background [N, 7]."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.at_half = nn.Sequential(conv(3, width, 5, 2), conv(width, width))
        self.at_quarter = nn.Sequential(conv(width, 2 * width, 3, 2), conv(2 * width, 2 * width))
        self.at_eighth = nn.Sequential(conv(2 * width, 4 * width, 3, 2), conv(4 * width, 4 * width))
        self.up_quarter = nn.Sequential(conv(6 * width, 2 * width, 1), conv(2 * width, 2 * width))
        self.up_half = nn.Sequential(conv(3 * width, width, 1), conv(width, width))
        self.mask = nn.Conv2d(width, 4, 1)
        self.background = nn.Linear(4 * width, len(BACKDROPS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, 3, H, W] -> logits of the object's mask [N, H, W] and of the background."""
        half = self.at_half(images)
        quarter = self.at_quarter(half)
        features = self.at_eighth(quarter)
        up = self.up_quarter(torch.cat([F.interpolate(features, scale_factor=2.0), quarter], 1))
        up = self.up_half(torch.cat([F.interpolate(up, scale_factor=2.0), half], 1))
        mask = F.pixel_shuffle(self.mask(up), 2)
        return mask[:, 0], self.background(pooled(features, 1 - F.avg_pool2d(torch.sigmoid(mask), 8)))


class Namer(nn.Module):
    """Crops [N, 4, CROP, CROP] of images with a mask -> logits of shape [N, 5], texture, colours and dot."""

    SIZES = (len(world.SHAPES), len(world.TEXTURES), len(world.COLORS), NO_DOT + 1)

    def __init__(self, width: int = 2 * WIDTH) -> None:
        super().__init__()
        self.fine = nn.Sequential(conv(4, width // 2), conv(width // 2, width, 3, 2), conv(width, width))
        self.coarse = nn.Sequential(conv(width, 3 * width, 3, 2), conv(3 * width, 3 * width))
        self.hidden = nn.Sequential(nn.Linear(8 * width, 4 * width), nn.ReLU())
        self.answers = nn.Linear(4 * width, sum(self.SIZES))

    def forward(self, crops: Tensor) -> tuple[Tensor, ...]:
        """Crops [N, 4, CROP, CROP] -> logits of shape, texture, colours and dot, in the order of SIZES."""
        fine = self.fine(crops)
        coarse = self.coarse(fine)
        found = []
        for features, factor in ((fine, 2), (coarse, 4)):
            coverage = F.avg_pool2d(crops[:, 3:], factor)
            found += [pooled(features, coverage), (features * coverage).amax((2, 3))]
        return self.answers(self.hidden(torch.cat(found, 1))).split(self.SIZES, 1)


class Judge(nn.Module):
    """Finds the objects in images [N, 3, 64, 64] in [-1, 1], and names the background and the traits of one object."""

    def __init__(self) -> None:
        super().__init__()
        self.finder, self.namer = Finder(), Namer()

    def forward(self, images: Tensor, within: Tensor | None = None) -> Verdict:
        """The Verdict on images; within [N, 64, 64] in [0, 1] tells where the object is that is asked about.

        Without it the object is all that the judge finds.
        """
        mask, background = self.finder(images)
        if within is None:
            within = (mask.detach() > 0).float()
        return Verdict(mask, background, *self.namer(crop(images, within)))


@cache
def load_judge() -> Judge:
    """The shipped judge, ready to use."""
    judge = Judge()
    judge.load_state_dict(load_file(WEIGHTS))
    return judge.eval().requires_grad_(False)


def centroids(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean x and y of masks [N, H, W] as fractions of the side: two tensors [N]."""
    area = masks.sum((1, 2)).clamp(min=1)
    line = (torch.arange(masks.shape[-1]) + 0.5) / masks.shape[-1]
    return (masks * line).sum((1, 2)) / area, (masks * line[:, None]).sum((1, 2)) / area


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of masks [N, H, W] of 0 and 1: [N]."""
    intersection = (first * second).sum((1, 2))
    return intersection / (first + second - first * second).sum((1, 2)).clamp(min=1)


def components(masks: Tensor, most: int = MOST_OBJECTS) -> Tensor:
    """The largest connected parts of masks [N, H, W] of 0 and 1, largest first: [N, most, H, W].

    Pixels are connected through sides and corners. Where there are fewer parts, the rest is 0.
    """
    labels = torch.arange(1.0, masks[0].numel() + 1).view_as(masks[0]) * masks
    while True:
        flooded = F.max_pool2d(labels, 3, 1, 1) * masks
        if torch.equal(flooded, labels):
            break
        labels = flooded
    parts = masks.new_zeros(len(masks), most, *masks.shape[1:])
    for image, found in zip(labels, parts):
        names, areas = image[image > 0].unique(return_counts=True)
        for index, name in enumerate(names[areas.argsort(descending=True)][:most]):
            found[index] = image == name
    return parts


def color_histogram(images: Tensor, masks: Tensor) -> Tensor:
    """Normalized colour histograms [N, 64] of images [N, 3, H, W] in [-1, 1] inside masks [N, H, W] of 0 and 1."""
    bins = ((images.clamp(-1, 1) + 1) / 2 * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1)
    codes = (bins[:, 0] * HISTOGRAM_BINS + bins[:, 1]) * HISTOGRAM_BINS + bins[:, 2]
    counts = torch.zeros(len(images), HISTOGRAM_BINS**3).scatter_add_(1, codes.flatten(1), masks.flatten(1).float())
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


@cache
def reference_histogram(subject: str) -> Tensor:
    """Mean colour histogram [64] of a subject's references inside their true masks."""
    images, masks = world.references(subject)
    return color_histogram(images, masks > 0.5).mean(0)


def check(argument: str, value: object, allowed: Collection) -> None:
    """Raise a ValueError that names the argument unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{argument}: expected one of {', '.join(allowed)}; got {value!r}")


def look_probability(verdict: Verdict, subject: str) -> Tensor:
    """How much the objects asked about look like a subject: [N] in [0, 1].

    The geometric mean of the probabilities of its shape, its texture, its dot's colour, and its texture's colours (all
    of them and no others).
    """
    look = world.SUBJECTS[subject]
    assert look.dot is not None  # every subject has one
    present = torch.tensor([name in colors_of(look) for name in world.COLORS])
    traits = [
        verdict.shape.log_softmax(1)[:, world.SHAPES.index(look.shape)],
        verdict.texture.log_softmax(1)[:, world.TEXTURES.index(look.texture)],
        verdict.dot.log_softmax(1)[:, world.COLOR_NAMES.index(look.dot.color)],
        F.logsigmoid(torch.where(present, verdict.colors, -verdict.colors)).sum(1),
    ]
    return torch.stack(traits).mean(0).exp()


def visible(masks: Tensor) -> Tensor:
    """Whether masks [..., H, W] of 0 and 1 hold an object: [...] bool."""
    return masks.mean((-2, -1)) > SMALLEST_OBJECT


@torch.no_grad()
def judged(images: Tensor) -> tuple[Verdict, Tensor, Tensor]:
    """The Verdict on images [N, 3, 64, 64] in [-1, 1], the masks [N, 64, 64] of 0 and 1, and the clamped images."""
    images = images.float().clamp(-1, 1)
    verdict = load_judge()(images)
    return verdict, (verdict.mask > 0).float(), images


def object_masks(images: Tensor) -> Tensor:
    """The judge's masks [N, 64, 64] of 0 and 1 of all objects in images [N, 3, 64, 64] in [-1, 1]."""
    return judged(images)[1]


def identity(images: Tensor, subject: str = world.SUBJECT) -> Tensor:
    """Whether images [N, 3, 64, 64] in [-1, 1] show a subject: [N] in [0, 1], 0 where they show no object.

    The object is all that the judge finds; see `look_probability`.
    """
    check("subject", subject, world.SUBJECTS)
    verdict, masks, _ = judged(images)
    return look_probability(verdict, subject) * visible(masks)


def shape_rates(images: Tensor, shape: str) -> float:
    """The share of images [N, 3, 64, 64] in [-1, 1] whose object is judged to be of a shape, a float."""
    check("shape", shape, world.SHAPES)
    verdict, masks, _ = judged(images)
    return ((verdict.shape.argmax(1) == world.SHAPES.index(shape)) & visible(masks)).float().mean().item()


def scores(
    images: Tensor, backgrounds: Sequence[str | None], layouts: Tensor | None = None, subject: str = world.SUBJECT
) -> dict[str, Tensor]:
    """What `evaluate` averages, per image.

    Args:
        images: [N, 3, 64, 64] in [-1, 1].
        backgrounds: N background names, those asked for.
        layouts: optional [N, 3, 64, 64], the layout images behind them.
        subject: a name of `world.SUBJECTS`.

    Returns:
        dict of tensors [N] in [0, 1]: `identity`; `histogram`, the colour histogram's intersection with the
        references'; `background` and `shape`, 1 where recognised as asked; given layouts, `layout_iou`, of the masks.
    """
    check("subject", subject, world.SUBJECTS)
    if len(backgrounds) != len(images):
        raise ValueError(f"backgrounds: expected {len(images)} names, one per image; got {len(backgrounds)}")
    for name in backgrounds:
        check("backgrounds", name, BACKDROPS)
    verdict, masks, images = judged(images)
    seen = visible(masks)
    found = {
        "identity": look_probability(verdict, subject) * seen,
        "histogram": torch.minimum(color_histogram(images, masks), reference_histogram(subject)).sum(1) * seen,
        "background": verdict.background.argmax(1) == torch.tensor([BACKDROPS.index(name) for name in backgrounds]),
        "shape": (verdict.shape.argmax(1) == world.SHAPES.index(world.class_word(subject))) & seen,
    }
    if layouts is not None:
        found["layout_iou"] = overlap(masks, object_masks(layouts))
    return {name: values.float() for name, values in found.items()}


def evaluate(
    images: Tensor, backgrounds: Sequence[str | None], layouts: Tensor | None = None, subject: str = world.SUBJECT
) -> dict[str, float]:
    """Every metric of a set of images, as floats: the means of `scores`, whose arguments it takes, and `spread`."""
    found = scores(images, backgrounds, layouts, subject)
    return {name: round(float(values.mean()), 4) for name, values in found.items()} | spread(images, backgrounds)


def spread(images: Tensor, backgrounds: Sequence[str | None]) -> dict[str, float]:
    """How much a set of images [N, 3, 64, 64] in [-1, 1] varies, as floats.

    Returns:
        `position_std` of the objects' centres, a fraction of the side (nan with fewer than two objects), and
        `diversity`, 1 - the mean IoU of the masks of images that share a background, which count as seeds of one prompt
        (left out where none do).
    """
    metrics, masks = {}, object_masks(images)
    x, y = (centre[visible(masks)] for centre in centroids(masks))
    metrics["position_std"] = (x.var() + y.var()).sqrt() if len(x) > 1 else math.nan
    pairs = [(i, j) for i, j in itertools.combinations(range(len(images)), 2) if backgrounds[i] == backgrounds[j]]
    if pairs:
        first, second = torch.tensor(pairs).T
        metrics["diversity"] = 1 - overlap(masks[first], masks[second]).mean()
    return {name: round(float(value), 4) for name, value in metrics.items()}


WORDS_OF = {
    "shape": world.SHAPES,
    "color": world.COLOR_NAMES,
    "texture": world.TEXTURES,
    "subject": tuple(world.SUBJECTS),
    "place": world.PLACES,
    "background": BACKDROPS,
}
"""The values of each field of `Wanted`."""


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks of an image, in the words of the toy world; None where it says nothing.

    "a sks ball and a green box on sand" wants
    `Wanted(subject="ball", background="sand", other=Wanted(shape="box", color="green"))`.
    """

    shape: str | None = None
    color: str | None = None
    """one of the colours of the object's texture"""
    texture: str | None = None
    subject: str | None = None
    """a name of `world.SUBJECTS`: the object shall be this one"""
    place: str | None = None
    background: str | None = None
    other: "Wanted | None" = None
    """a second object, with neither a background nor another object of its own"""

    def __post_init__(self) -> None:
        for argument, allowed in WORDS_OF.items():
            if getattr(self, argument) is not None:
                check(argument, getattr(self, argument), allowed)
        if self.other is not None and (self.other.other, self.other.background) != (None, None):
            raise ValueError("other: expected an object without a background and another object of its own")


def at_place(masks: Tensor, place: str) -> Tensor:
    """Whether the centroids of masks [N, H, W] are outside of the middle, on the side that a place word names: [N]."""
    low, high = world.MIDDLE
    x, y = centroids(masks)
    return {"left": x < low, "right": x > high, "top": y < low, "bottom": y > high}[place]


def object_scores(verdict: Verdict, regions: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    """How well objects, one per row of a verdict, found in regions [N, H, W], agree with what is wanted of one object.

    Returns a dict of tensors [N] in [0, 1], probabilities, of what is asked for.
    """
    found = {}
    if wanted.shape is not None:
        found["shape"] = verdict.shape.softmax(1)[:, world.SHAPES.index(wanted.shape)]
    if wanted.color is not None:
        found["color"] = torch.sigmoid(verdict.colors[:, world.COLOR_NAMES.index(wanted.color)])
    if wanted.texture is not None:
        found["texture"] = verdict.texture.softmax(1)[:, world.TEXTURES.index(wanted.texture)]
    if wanted.subject is not None:
        found["identity"] = look_probability(verdict, wanted.subject)
    if wanted.place is not None:
        found["place"] = at_place(regions, wanted.place).float()
    return found


def best_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two different regions of the greatest sum, [N] each, for agreements [N, R] of R regions with two objects."""
    regions = first.shape[1]
    sums = first[:, :, None] + second[:, None, :] - 9 * torch.eye(regions)
    best = sums.flatten(1).argmax(1)
    return best // regions, best % regions


@torch.no_grad()
def fidelity(images: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    """How well images show what their prompt asks for, attribute by attribute.

    With one wanted object, it is all that the judge finds. With two, the connected parts of the judge's mask are judged
    one by one, and the two wanted objects are looked for in the pair of parts that agrees best.

    Args:
        images: [N, 3, 64, 64] in [-1, 1], of one prompt.
        wanted: what that prompt asks for.

    Returns:
        dict of tensors [N]: `present`, whether there are as many objects as wanted; of what is wanted: `identity` in
        [0, 1], and as 0 or 1 `shape`, `color`, `texture`, `place`, `background`; of the second object likewise
        `other_shape` and so on. An object that is missing scores 0.
    """
    verdict, masks, images = judged(images)
    objects = [wanted] if wanted.other is None else [wanted, wanted.other]
    regions = masks[:, None] if len(objects) == 1 else components(masks)
    count = regions.shape[1]
    seen = visible(regions)
    each = regions.flatten(0, 1)
    answers = load_judge()(images.repeat_interleave(count, 0), each)
    agreements = [object_scores(answers, each, one) for one in objects]
    if len(objects) == 1:
        picks = [torch.zeros(len(images), dtype=torch.long)]
    else:
        sums = (sum(found.values(), torch.zeros(len(each))) for found in agreements)
        one, other = (agreement.view(-1, count) * seen for agreement in sums)
        picks = [*best_pairs(one, other)]
    rows = torch.arange(len(images))
    present = [seen[rows, pick] for pick in picks]
    result = {"present": torch.stack(present).all(0).float()}
    for prefix, found, pick, here in zip(("", "other_"), agreements, picks, present):
        for name, values in found.items():
            score = values.view(-1, count)[rows, pick]
            result[prefix + name] = (score if name == "identity" else (score > 0.5).float()) * here
    if wanted.background is not None:
        right = verdict.background.argmax(1) == BACKDROPS.index(wanted.background)
        result["background"] = right.float()
    return result
