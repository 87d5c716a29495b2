"""Pictures and masks of every kind as tensors: pixels for the VAE and for ControlNets, masks on the grid of latents."""

import math
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL import ExifTags, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ...runtime.checks import check_choice, fail
from ..processors.routing import token_mask

OP = "LayoutRetouch"
"""The function that messages name unless another one is given."""
FITS = ("crop", "pad", "squeeze")
"""How a picture of another aspect ratio is brought to a size: its longer side is cut around the middle, its border
colours are repeated around it, or it is squeezed."""

WHITES = (1, 255, 65535)
"""Numbers that are white in pictures whose dtype does not say it: the smallest of these that no pixel exceeds."""
OVERSHOOT = 0.5
"""How far numbers may be outside [0, 1] before they are taken for another range. Sharp filters overshoot by as much."""
LUMINANCE = (0.299, 0.587, 0.114)
UNDERSHOOT = 0.1
"""How far below 0 floating numbers may be before they are taken to be in [-1, 1]."""
NEARLY_BLACK = 16
"""If the white of the dtype is more than this many times the largest number, the numbers are taken to have another
range."""
PROPORTIONS = 0.1
"""How far the logarithms of the aspect ratios of a picture and of its mask may be apart. Masks are made at other sizes,
so the ratios are not quite equal."""

Image = PIL.Image.Image | np.ndarray | Tensor
Images = list[PIL.Image.Image] | np.ndarray | Tensor
"""Several, as pipelines return them."""
Size = tuple[int, int]
"""height and width"""
Span = tuple[float, float]
"""start and end of what is shown along one side of a picture, in its pixels"""
Place = tuple[str, str]
"""the function and the argument that messages name"""


def preprocess(
    images: Image | Sequence[Image],
    height: int,
    width: int,
    fit: str = "crop",
    *,
    normalize: bool = True,
    opaque: bool = False,
    name: str = "image",
    op: str = OP,
) -> Tensor:
    """Images of any kind and size -> fp32 (n, 3, height, width).

    PIL images are turned as their EXIF orientation says, put on white where they are transparent, and read in any mode
    that PIL converts to RGB; 16-bit ones from 0 to 65535; "F" and "I" from 0 to the smallest of 1, 255 and 65535 that
    no pixel exceeds. They are resized by Lanczos' filter, arrays and tensors by a linear one, both antialiased.

    Args:
        images: one, several, or batches. Arrays are (height, width), (height, width, C) or (n, height, width, C),
            tensors (height, width), (C, height, width) or (n, C, height, width); C is 1, 3, or 4 with opacity. They
            hold booleans, bytes, uint16, other integers (as "I"), or floating numbers in [0, 1]. Where floating ones
            are below -0.1, all of the call's arrays and tensors of floating numbers are taken to be in [-1, 1].
        fit: one of `FITS`, for images of another aspect ratio.
        opaque: the opacity is left out, and colours are what they are beneath it, as diffusers reads control images.
        normalize: False leaves the numbers as they are, in [0, 1], as ControlNets take them.
        name, op: of the argument and of the function in messages.

    Returns:
        In [-1, 1], on the device of the first image; the very numbers of diffusers' `VaeImageProcessor` for images that
        have the size already (but that takes any negative number for a sign of [-1, 1]).

    Raises:
        ValueError: a shape, a range of numbers, a mode or a fit that is none of these, NaN or Inf, no image. TypeError:
        neither an image, an array nor a tensor, or one of other things than real numbers.
    """
    several: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
    if not several:
        fail(op, name, "at least one image", "none")
    check_choice(op, "fit", fit, FITS)
    names = [name if len(several) == 1 else f"{name}[{i}]" for i in range(len(several))]
    read = [_read(image, opaque, (op, each)) for image, each in zip(several, names)]
    signed = [each for x, each in zip(read, names) if isinstance(x, Tensor) and bool(x.min() < -UNDERSHOOT)]
    if signed and normalize:
        told = f"negative numbers, so it is taken to be in [-1, 1] ({', '.join(signed)})"
        warnings.warn(f"lr_kernels.{op}: {name}: {told}; clip what is meant to be in [0, 1]", stacklevel=2)
    batches = []
    for image, x in zip(several, read):
        pixels = _fitted(x, (height, width), fit)
        shifts = normalize and not (signed and _is_floating(image))
        batches.append((2 * pixels - 1 if shifts else pixels).float())
    return torch.cat([batch.to(batches[0].device) for batch in batches])


def as_mask(
    mask: Image,
    size: Size,
    fit: str,
    device: torch.device,
    name: str = "reference_mask",
    picture: Image | None = None,
    op: str = OP,
) -> Tensor:
    """A mask of any kind and size -> bool (1, *size), True on the subject. May be empty.

    What is above half its range is the subject; the range ends at the smallest of 1, 255 and 65535 that no number
    exceeds. A mask is read from the opacity of a picture that is at least half transparent somewhere (a cut-out), else
    from its brightness: of colours, their luminance. Of a PIL image with a palette of colours (a map of labels) every
    index but 0 is the subject; with a palette of greys its brightness counts. EXIF orientation is followed too.

    Args:
        mask: (height, width), also with a dimension of channels, of which there may be 1, 3 or 4: the last one of an
            array, the first one of a tensor. Further dimensions must be 1.
        size: rows and columns of the latents; a token is of the subject where the mask covers it by half, or by as
            much as it covers any, so that a small subject stays.
        fit: one of `FITS`, as for the image that the mask belongs to; a mask of the latents' own aspect ratio stays
            whole with each. What is padded is not of the subject.
        picture: what the mask belongs to. None: not compared.
        name, op: of the argument and of the function in messages.

    Raises:
        ValueError: a shape, a range of numbers, a mode or a fit that is none of these, NaN or Inf; a mask that has
        the proportions neither of its picture nor of the latents, or that is turned; the picture itself as its mask
        where it is nowhere half transparent. TypeError: neither an image, an array nor a tensor, or one of other things
        than real numbers.
    """
    place = op, name
    check_choice(op, "fit", fit, FITS)
    x = _mask_planes(mask, place)
    if mask is picture and not _is_cutout(x):
        fail(*place, "a mask, or a picture that is transparent around the subject", "the picture, which is opaque")
    subject = _subject(x)
    given = subject.shape[0], subject.shape[1]
    if picture is not None:
        _check_proportions(given, _sides(picture), size, place)
    rows, columns = _shown(given, size, fit)
    down, across = _overlaps(rows, subject.shape[0], size[0]), _overlaps(columns, subject.shape[1], size[1])
    covered = (down @ subject.double() @ across.T).round(
        decimals=9
    )  # so that half a token is exactly a half, and nothing exactly 0
    return token_mask(covered[None], size).unflatten(1, size).to(device)


def one_by_one(images: Image | Sequence[Image | None]) -> list[Image]:
    """One image, several, batches of them -> every image by itself; numbers and channels as they are."""
    several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
    return [part for image in several for part in (image if getattr(image, "ndim", 0) == 4 else [image])]


def masks_one_by_one(masks: Any) -> list[Image]:
    """Masks of several images as a list: a list, an array (n, h, w, C), or (n, h, w) with a width that is no number of
    channels, a tensor (n, h, w) or (n, C, h, w); anything else is one mask."""
    if isinstance(masks, (list, tuple)):
        return list(masks)
    shape = tuple(getattr(masks, "shape", ()))
    batched = 4 if len(shape) == 3 and shape[-1] in (1, 3, 4) and not isinstance(masks, Tensor) else 3
    return list(masks) if len(shape) >= batched else [masks]


# Reading


def _read(image: Image, opaque: bool, place: Place) -> PIL.Image.Image | Tensor:
    """A PIL image of mode RGB, or of mode F with white at 1; arrays and tensors as floating (n, 3 or 1, h, w)."""
    if isinstance(image, PIL.Image.Image):
        return _read_pil(image, opaque, place)
    x = _planes(image, place)
    if _is_floating(image):
        _check_unit(x, place)
    else:
        x = x / _white_of(image, x, place)
    if x.shape[1] != 4:
        return x
    colours, opacity = x.split((3, 1), 1)
    return colours if opaque else colours * opacity + (1 - opacity)


def _upright(image: PIL.Image.Image, place: Place) -> PIL.Image.Image:
    """The image turned as its EXIF orientation says, in a mode that PIL converts."""
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:  # a file that is cut short, closed or damaged
        fail(*place, "an image that PIL can read", str(error))
    image = ImageOps.exif_transpose(image)
    return image.convert("LA") if image.mode == "La" else image


def _read_pil(image: PIL.Image.Image, opaque: bool, place: Place) -> PIL.Image.Image:
    image = _upright(image, place)
    if _is_number_mode(image):
        array = np.asarray(image)
        x = _planes(array, place)
        return PIL.Image.fromarray((x / _white_of(array, x, place))[0, 0].float().numpy())
    if image.has_transparency_data and not opaque:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _mask_planes(mask: Image, place: Place) -> Tensor:
    """The planes of a mask, (C, h, w) in [0, 1]: 1 of brightness, 3 of colours, or 4 with opacity."""
    if isinstance(mask, PIL.Image.Image):
        mask = _mask_array(mask, place)
    else:
        while getattr(mask, "ndim", 0) > 2 and 1 in mask.shape:
            mask = mask.squeeze(tuple(mask.shape).index(1))
        if isinstance(mask, (np.ndarray, Tensor)) and mask.ndim not in (2, 3):
            fail(*place, "shape (height, width)", tuple(mask.shape), "several masks are a list")
    x = _planes(mask, place, "shape (height, width), or also 3 or 4 channels")[0].cpu()
    return x / _smallest_white(x, place)


def _is_cutout(x: Tensor) -> bool:
    return len(x) == 4 and bool(x[3].min() <= 0.5)


def _subject(x: Tensor) -> Tensor:
    """Where the planes of a mask say the subject is, bool (h, w)."""
    if len(x) == 4:
        x = x[3:] if _is_cutout(x) else x[:3]
    if len(x) == 3:
        x = (x * torch.tensor(LUMINANCE, dtype=x.dtype).view(3, 1, 1)).sum(0, keepdim=True)
    return x[0] > 0.5


def _mask_array(mask: PIL.Image.Image, place: Place) -> np.ndarray:
    """The planes of a PIL image's mask as an array: (h, w), (h, w, 3), or (h, w, 4) with opacity."""
    mask = _upright(mask, place)
    if _is_number_mode(mask):
        return np.asarray(mask)
    if mask.has_transparency_data:
        return np.asarray(mask.convert("RGBA"))
    colours = np.asarray(mask.convert("RGB"))
    if mask.mode == "P" and not (colours == colours[..., :1]).all():
        return np.asarray(mask) > 0
    return colours


def _planes(
    image: np.ndarray | Tensor,
    place: Place,
    expected: str = "shape (height, width), with 1, 3 or 4 channels or without",
) -> Tensor:
    """The numbers of an array or a tensor, finite, as floating (n, C, h, w)."""
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "buif":
            fail(*place, "numbers or booleans", f"an array of {image.dtype}", error=TypeError)
        double = image.dtype.kind == "f" and image.dtype.itemsize >= 8
        x = torch.from_numpy(
            np.array(image, np.float64 if double else np.float32)
        )  # a copy, since the array may have any strides and byte order
        x = x if x.dim() < 3 else x.movedim(-1, -3)
        hint = "an array has its channels last"
    elif isinstance(image, Tensor):
        if image.is_complex():
            fail(*place, "real numbers or booleans", image.dtype, error=TypeError)
        x = image.to(torch.promote_types(image.dtype, torch.float32))
        hint = "a tensor has its channels before height and width"
    else:
        hint = "open a file with PIL.Image.open" if isinstance(image, (str, PathLike)) else ""
        fail(*place, "a PIL image, an array or a tensor", type(image).__name__, hint, TypeError)
    while 2 <= x.dim() < 4:
        x = x[None]
    if x.dim() != 4 or x.shape[1] not in (1, 3, 4) or x.numel() == 0:
        fail(*place, expected, tuple(image.shape), hint)
    if not bool(x.isfinite().all()):
        fail(*place, "finite numbers", "NaN or Inf")
    return x


def _is_number_mode(image: PIL.Image.Image) -> bool:
    """Whether its pixels are numbers of more than 8 bits: I, F, I;16 and its byte orders."""
    return image.mode.startswith(("I", "F"))


def _is_floating(image: Image) -> bool:
    if isinstance(image, Tensor):
        return image.is_floating_point()
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"


def _sides(image: Image) -> Size:
    """Height and width of one image, as its EXIF orientation turns it."""
    if isinstance(image, PIL.Image.Image):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size if turned else image.size[::-1]
    channels_last = isinstance(image, np.ndarray) and image.ndim > 2
    return tuple(image.shape[-3:-1] if channels_last else image.shape[-2:])


def _check_proportions(mask: Size, picture: Size, latents: Size, place: Place) -> None:
    def fits(sides: Size) -> bool:
        return abs(math.log(mask[0] * sides[1] / (mask[1] * sides[0]))) < PROPORTIONS

    turned = fits(picture[::-1])
    if fits(picture) or (fits(latents) and not turned):
        return
    hint = "make it of the whole picture"
    if turned:
        hint = "a mask is turned as its picture is shown: make it of PIL.ImageOps.exif_transpose(photo)"
    wanted, got = (f"{h} x {w}" for h, w in (picture, mask))
    fail(*place, f"the proportions of its picture, {wanted}", got, f"both height x width; {hint}")


# Ranges


def _check_unit(x: Tensor, place: Place) -> None:
    """Raise unless numbers are in [0, 1], or in [-1, 1] where they can be, but for an overshoot."""
    low, high = (float(end) for end in x.detach().aminmax())
    lowest = -1 if x.shape[1] != 4 else 0
    if high > 1 + OVERSHOOT or low < lowest - OVERSHOOT:
        hint = "divide numbers of 0 to 255 by 255; latents are no images"
        fail(*place, "floating numbers in [0, 1]", f"numbers from {low:g} to {high:g}", hint)


def _white_of(image: np.ndarray | Tensor, x: Tensor, place: Place) -> int:
    """The number that is white, by the dtype of an image if it says it, else by its numbers x."""
    by_dtype = {"bool": 1, "uint8": 255, "uint16": 65535}
    dtype = image.dtype.name if isinstance(image, np.ndarray) else str(image.dtype).removeprefix("torch.")
    if dtype not in by_dtype:
        return _smallest_white(x, place)
    white, highest = by_dtype[dtype], float(x.max())
    if 0 < highest < white / NEARLY_BLACK:
        told = f"its largest number is {highest:g} where {dtype} has {white} for white, so it is nearly black"
        hint = "scale it, or pass floating numbers in [0, 1]"
        warnings.warn(f"lr_kernels.{place[0]}: {place[1]}: {told}; {hint}", stacklevel=2)
    return white


def _smallest_white(x: Tensor, place: Place) -> int:
    low, high = (float(end) for end in x.detach().aminmax())
    fitting = [white for white in WHITES if high <= white * (1 + OVERSHOOT)]
    if not fitting or low < -OVERSHOOT:
        fail(*place, "numbers from 0 to 1, 255 or 65535", f"numbers from {low:g} to {high:g}")
    return fitting[0]


# Fitting


def _shown(given: Size, wanted: Size, fit: str) -> tuple[Span, Span]:
    """Which rows and columns of a picture are shown; padding shows more than there are."""
    (h, w), (height, width) = given, wanted
    if fit == "squeeze":
        return (0, h), (0, w)
    choose = min if fit == "crop" else max
    spans = choose(h, w * height / width), choose(w, h * width / height)
    return _middle(spans[0], h, height), _middle(spans[1], w, width)


def _middle(span: float, length: int, wanted: int) -> Span:
    start = (length - span) / 2
    if span == wanted:
        start = math.trunc(start)  # without scaling pixels stay as they are
    return start, start + span


def _fitted(x: PIL.Image.Image | Tensor, size: Size, fit: str) -> Tensor:
    """A picture as `_read` gives it -> (n, 3, *size)."""
    given = (x.height, x.width) if isinstance(x, PIL.Image.Image) else (x.shape[2], x.shape[3])
    rows, columns = _shown(given, size, fit)
    (top, height, below), (left, width, right) = (
        _placed(span, length, wanted) for span, length, wanted in zip((rows, columns), given, size)
    )
    down, across = ((max(start, 0), min(end, length)) for (start, end), length in zip((rows, columns), given))
    if isinstance(x, PIL.Image.Image):
        x = _resized_pil(x, down, across, (height, width))
    else:
        x = _resized(x, down, across, (height, width))
    x = x.expand(-1, 3, -1, -1)
    around = (left, right, top, below)
    return F.pad(x, around, mode="replicate") if any(around) else x


def _placed(span: Span, length: int, wanted: int) -> tuple[int, int, int]:
    """How many of the wanted pixels are before, within and after the picture, along one side."""
    start, end = span
    if start >= 0 and end <= length:
        return 0, wanted, 0
    within = max(round(length * wanted / (end - start)), 1)
    before = (wanted - within) // 2
    return before, within, wanted - within - before


def _resized_pil(image: PIL.Image.Image, rows: Span, columns: Span, size: Size) -> Tensor:
    """Rows and columns of an image of mode RGB or F -> (1, 3 or 1, *size) in [0, 1]."""
    height, width = size
    box = (columns[0], rows[0], columns[1], rows[1])
    image = image.resize((width, height), PIL.Image.Resampling.LANCZOS, box=box)
    array = np.asarray(image, np.float32)
    pixels = array / 255 if image.mode == "RGB" else array.clip(0, 1)[..., None]
    return torch.from_numpy(pixels).movedim(-1, 0)[None]


def _resized(x: Tensor, rows: Span, columns: Span, size: Size) -> Tensor:
    """Rows and columns of (n, C, h, w) -> (n, C, *size), linear and antialiased."""
    if tuple(x.shape[2:]) == tuple(size) and rows == (0, x.shape[2]) and columns == (0, x.shape[3]):
        return x
    down, across = (_ramps(*sides).to(x) for sides in zip((rows, columns), x.shape[2:], size))
    return down @ x @ across.T


def _ramps(span: Span, length: int, count: int) -> Tensor:
    """fp64 (count, length): the share of each of `length` pixels in each of `count` that lie evenly within the span.

    It falls linearly with the distance to 0 at one step, of the pixels there are or of those that are made, whichever
    is longer.
    """
    step = (span[1] - span[0]) / count
    centres = span[0] + step * (torch.arange(count, dtype=torch.float64) + 0.5)
    distance = torch.arange(length, dtype=torch.float64) + 0.5 - centres[:, None]
    shares = (1 - distance.abs() / max(step, 1)).clamp(min=0)
    return shares / shares.sum(1, keepdim=True)


def _overlaps(span: Span, length: int, count: int) -> Tensor:
    """fp64 (count, length): as `_ramps`, but how much of each of `count` equal parts of the span each pixel covers."""
    step = (span[1] - span[0]) / count
    starts = (span[0] + step * torch.arange(count, dtype=torch.float64))[:, None]
    pixels = torch.arange(length, dtype=torch.float64)
    return ((starts + step).minimum(pixels + 1) - starts.maximum(pixels)).clamp(min=0) / step
