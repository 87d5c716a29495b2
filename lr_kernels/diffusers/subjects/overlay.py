"""A labelled sheet of what the pipelines read and made, with masks, heat maps and matches drawn over it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ...runtime.checks import fail
from ..processors.routing import token_mask

SUBJECT_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""The colour of each subject. They can be told apart with any colour vision (after Okabe and Ito), also on white."""
HEAT = ((0.0, (24, 16, 70)), (0.4, (150, 30, 110)), (0.75, (245, 120, 40)), (1.0, (255, 240, 150)))
"""From cold to hot: where in [0, 1], and the colour; ever lighter, so that it also reads without colours."""
TINT = 0.2
"""opacity of a mask's colour"""
SIDE = 192
GAP, MARGIN = 4, 12
TEXT, SMALL = 15, 12
"""font sizes in pixels: of a label's first line and of the others"""

Pictures = Sequence[PIL.Image.Image] | np.ndarray | Tensor


@dataclass(frozen=True)
class Row:
    """A row of a sheet: n pictures, and what is drawn over them."""

    label: str
    """its further lines are small and grey"""
    images: Pictures
    """n PIL images, or an array (n, H, W, 3) or a tensor (n, 3, H, W) in [0, 1]"""
    masks: Tensor | None = None
    """bool (n, h, w), or (subjects, n, h, w)"""
    heat: Tensor | None = None
    """(n, h, w) in [0, 1]"""
    colours: Tensor | None = None
    """(n, 4, h, w) in [0, 1]: red, green, blue and opacity of each token"""


def draw(
    output: BaseOutput, *, scale: float | None = None, reference_subjects: Sequence[int] | None = None
) -> PIL.Image.Image:
    """A labelled sheet of a pipeline's output: references with their foreground, layouts and results with the masks of
    their subjects, maps of the subjects over the layouts, and which tokens of layouts match which of the references.

    What the output does not have is left out. A reference's foreground is coloured by place, and each token of a layout
    that the reading "swap" matches to it has the colour of its match.

    Args:
        scale: pixels of the sheet per pixel of an image. None: images are 192 pixels long.
        reference_subjects: the subject of each reference, as given to the pipeline. None: the only one, or one
            reference for each.

    Raises:
        ValueError: images in the output type "latent"; references of several subjects without reference_subjects.
    """
    images = _pictures(output.images, "images")
    side = SIDE if scale is None else max(round(max(images[0].size) * scale), 1)
    layouts = None if output.layout_images is None else _pictures(output.layout_images, "layout_images")
    rows = []
    if output.reference_images is not None:
        masks = _of_references(output, reference_subjects)
        rows.append(Row("references", output.reference_images, masks))
    if layouts is not None:
        rows.append(Row("layouts", layouts, output.context_masks))
    rows.append(Row("results", images, output.subject_masks))
    if output.maps is not None:
        rows += _map_rows(output.maps, images if layouts is None else layouts)
    matched = all(x is not None for x in (output.matches, output.reference_images, output.reference_mask))
    if layouts is not None and matched:
        rows += _match_rows(output, layouts, reference_subjects)
    return sheet(rows, side=side)


def sheet(rows: Sequence[Row], *, side: int = SIDE) -> PIL.Image.Image:
    """Rows of pictures below each other, labelled at the left, each picture `side` pixels along its longer side.

    ValueError: no rows, or a mask, heat or colours that are not of the row's n pictures.
    """
    if not rows:
        fail("LayoutRetouchOutput.draw", "rows", "at least one row", 0)
    drawn = [_cells(row, side) for row in rows]
    label_width = max(_label_width(row) for row in rows) + MARGIN
    widths = [sum(cell.width + GAP for cell in cells) - GAP for cells in drawn]
    heights = [max(cell.height for cell in cells) for cells in drawn]
    width = 2 * MARGIN + label_width + max(widths)
    canvas = PIL.Image.new("RGB", (width, 2 * MARGIN + sum(heights) + GAP * (len(rows) - 1)), "white")
    top = MARGIN
    for row, cells, height in zip(rows, drawn, heights):
        _write_label(canvas, row, top, height)
        left = MARGIN + label_width
        for cell in cells:
            canvas.paste(cell, (left, top))
            left += cell.width + GAP
        top += height + GAP
    return canvas


def overlay_mask(image: PIL.Image.Image, mask: Tensor, *, tint: float = TINT) -> PIL.Image.Image:
    """Masks bool (h, w) or (subjects, h, w) of any size over an image of any mode -> an RGB image of the same size.

    Each subject is tinted in its colour of `SUBJECT_COLOURS` and outlined within by a line of that colour, without by a
    white one, which shows on pictures of any colour. tint: opacity from 0 (the outline alone) to 1.
    """
    masks = _enlarged((mask if mask.dim() == 3 else mask[None]).float(), image, "nearest-exact") > 0
    pixels = _pixels(image)
    line = max(round(max(image.size) / 96), 1)
    colours = [torch.tensor(SUBJECT_COLOURS[s % len(SUBJECT_COLOURS)]) / 255 for s in range(len(masks))]
    for inside, colour in zip(masks, colours):
        pixels = torch.where(inside, pixels + tint * (colour.view(3, 1, 1) - pixels), pixels)
    for inside, colour in zip(masks, colours):
        around = _grown(inside, max(line // 2, 1)) & ~inside
        border = _grown(~inside, line) & inside
        pixels = torch.where(around, 1.0, torch.where(border, colour.view(3, 1, 1), pixels))
    return _picture(pixels)


def overlay_heat(image: PIL.Image.Image, heat: Tensor) -> PIL.Image.Image:
    """A map (h, w) in [0, 1] of any size, in the colours of `HEAT` over a grey image -> an RGB image of its size."""
    heat = _enlarged(heat[None].float().nan_to_num(0), image, "bilinear")[0]
    places, colours = [place for place, _ in HEAT], [colour for _, colour in HEAT]
    hot = [np.interp(heat.numpy(), places, channel) / 255 for channel in zip(*colours)]
    return _picture(0.35 * _dimmed(image, 1.0) + 0.65 * torch.from_numpy(np.stack(hot)).float())


def overlay_colours(image: PIL.Image.Image, colours: Tensor) -> PIL.Image.Image:
    """Tokens (4, h, w) of red, green, blue and opacity in [0, 1] over a dim grey image -> an RGB image of its size."""
    *_, opacity = colours = _enlarged(colours.float(), image, "nearest-exact")
    dim = _dimmed(image, 0.45)
    return _picture(dim + 0.9 * opacity * (colours[:3] - dim))


def wheel(mask: Tensor) -> Tensor:
    """A colour for every place of a bool (rows, columns): fp32 (3, rows, columns) in [0, 1].

    White in the middle of the box around what is True; the hue is the direction from there, and the further, the
    fuller, up to the box's corners.
    """
    offsets = []
    for side in (1, 0):
        places = mask.any(side).nonzero()[:, 0]
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, mask.shape[1 - side] - 1)
        place = torch.arange(mask.shape[1 - side], device=mask.device)
        offsets.append(((2 * place - first - last) / max(last - first, 1)).clamp(-1, 1))
    y, x = torch.meshgrid(*offsets, indexing="ij")
    fullness, direction = torch.hypot(x, y) / math.sqrt(2), torch.atan2(y, x)
    thirds = torch.arange(3, device=mask.device).view(3, 1, 1) * (2 * math.pi / 3)
    return 1 - fullness * (0.5 - 0.5 * torch.cos(direction - thirds))


# The rows of an output


def _shown(reference_subjects: Sequence[int] | None, references: int, subjects: int) -> Sequence[int]:
    """The subject of each reference."""
    if reference_subjects is not None:
        return reference_subjects
    if subjects == 1:
        return [0] * references
    if references != subjects:
        fail("LayoutRetouchOutput.draw", "reference_subjects", f"the subjects of {references} references", None)
    return range(references)


def _of_subject(mask: Tensor, subject: int, subjects: int) -> Tensor:
    """A mask, bool (...), as the mask of one of several subjects, (subjects, ...); those of the others are empty."""
    masks = mask.new_zeros(subjects, *mask.shape)
    masks[subject] = mask
    return masks


def _of_references(output: BaseOutput, reference_subjects: Sequence[int] | None) -> Tensor | None:
    """bool (subjects, R, h, w): the foreground of each reference as a mask of its subject."""
    foreground = output.reference_mask
    if foreground is None:
        return None
    subjects = 1 if output.subject_masks is None else len(output.subject_masks)
    shows = _shown(reference_subjects, len(foreground), subjects)
    return torch.stack([_of_subject(mask, subject, subjects) for mask, subject in zip(foreground, shows)], 1)


def _map_rows(maps: Tensor, images: list[PIL.Image.Image]) -> list[Row]:
    labels = ["maps"] if len(maps) == 1 else [f"maps\nof subject {s + 1}" for s in range(len(maps))]
    return [Row(label, images, heat=heat) for label, heat in zip(labels, maps)]


def _match_rows(
    output: BaseOutput, layouts: list[PIL.Image.Image], reference_subjects: Sequence[int] | None
) -> list[Row]:
    """The references' colours, then for each reference the layouts in the colours of what their tokens match."""
    foregrounds = output.reference_mask
    masks = output.context_masks
    subjects = 1 if masks is None else len(masks)
    shows = _shown(reference_subjects, len(foregrounds), subjects)
    keys, rows = [], []
    for r, (index, consistent, grid) in enumerate(output.matches):
        foreground = token_mask(foregrounds[r : r + 1], grid)[0]
        colours = wheel(foreground.view(grid))
        keys.append(torch.cat([colours, foreground.view(1, *grid)]))
        subject = None if masks is None else masks[shows[r]]
        painted = _painted(index, consistent & foreground[index], colours, subject)
        label = "matches" if len(foregrounds) == 1 else f"matches\nof reference {r + 1}"
        outlined = None if subject is None else _of_subject(subject, shows[r], subjects)
        rows.append(Row(label, layouts, outlined, colours=painted))
    return [Row("colours\nby place", output.reference_images, colours=torch.stack(keys)), *rows]


def _painted(index: Tensor, matched: Tensor, colours: Tensor, subject: Tensor | None) -> Tensor:
    """(n, 4, *grid): each target token in the colour of its match, clear where the reading "swap" has none.

    index, matched: (n, N); colours: (3, *grid) of the reference's tokens; subject: bool (n, h, w), None for anywhere.
    """
    grid = colours.shape[1], colours.shape[2]
    if subject is not None:
        matched = matched & token_mask(subject, grid)
    painted = colours.flatten(1)[:, index].movedim(0, 1)
    return torch.cat([painted, matched[:, None]], 1).unflatten(2, grid)


# Cells and labels


def _cells(row: Row, side: int) -> list[PIL.Image.Image]:
    images = _pictures(row.images, "images")
    masks = row.masks[None] if row.masks is not None and row.masks.dim() == 3 else row.masks
    for name, x, dim in (("masks", masks, 1), ("heat", row.heat, 0), ("colours", row.colours, 0)):
        if x is not None and x.shape[dim] != len(images):
            fail("LayoutRetouchOutput.draw", name, f"one for each of the {len(images)} images", tuple(x.shape))
    cells = [_scaled(image, side) for image in images]
    if row.heat is not None:
        cells = [overlay_heat(cell, heat) for cell, heat in zip(cells, row.heat)]
    if row.colours is not None:
        cells = [overlay_colours(cell, colours) for cell, colours in zip(cells, row.colours)]
    if masks is not None:
        tint = TINT if row.heat is None and row.colours is None else 0  # the colours of their places mean something
        cells = [overlay_mask(cell, masks[:, i], tint=tint) for i, cell in enumerate(cells)]
    return cells


def _scaled(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """`side` pixels along the longer side; whole pixels of small images stay squares."""
    longer = max(image.size)
    width, height = (max(round(x * side / longer), 1) for x in image.size)
    whole = side % longer == 0
    return image.resize((width, height), PIL.Image.Resampling.NEAREST if whole else PIL.Image.Resampling.LANCZOS)


def _lines(row: Row) -> list[tuple[str, int, str]]:
    """The lines of a label: text, font size and colour."""
    first, *others = row.label.split("\n")
    return [(first, TEXT, "black"), *((line, SMALL, "#666666") for line in others)]


def _subjects(row: Row) -> int:
    return len(row.masks) if row.masks is not None and row.masks.dim() == 4 else 1


def _label_width(row: Row) -> int:
    text = max(ImageFont.load_default(size).getlength(line) for line, size, _ in _lines(row))
    swatches = _subjects(row) * (SMALL + GAP) - GAP if _subjects(row) > 1 else 0
    return math.ceil(max(text, swatches))


def _write_label(canvas: PIL.Image.Image, row: Row, top: int, height: int) -> None:
    """Centred beside the row; of several subjects also the colour and number of each."""
    draw = ImageDraw.Draw(canvas)
    lines, subjects = _lines(row), _subjects(row)
    step = GAP + 1
    block = sum(size + step for _, size, _ in lines) + (SMALL + step if subjects > 1 else 0)
    y = top + max(height - block, 0) // 2
    for line, size, colour in lines:
        draw.text((MARGIN, y), line, fill=colour, font=ImageFont.load_default(size))
        y += size + step
    for s in range(subjects if subjects > 1 else 0):
        x = MARGIN + s * (SMALL + GAP)
        draw.rectangle((x, y, x + SMALL, y + SMALL), fill=SUBJECT_COLOURS[s % len(SUBJECT_COLOURS)])
        middle = (x + SMALL / 2 + 0.5, y + SMALL / 2 + 0.5)
        draw.text(middle, str(s + 1), fill="white", font=ImageFont.load_default(SMALL - 2), anchor="mm")


# Pixels


def _pictures(images: Pictures, name: str) -> list[PIL.Image.Image]:
    """The images of any output type but "latent"."""
    if isinstance(images, (np.ndarray, Tensor)):
        x = torch.as_tensor(images)
        x = x.movedim(-1, 1) if isinstance(images, np.ndarray) and x.dim() == 4 else x
        if x.dim() != 4 or x.shape[1] != 3:
            hint = "latents are no pictures: call the pipeline with another output_type"
            fail("LayoutRetouchOutput.draw", name, "(n, 3, height, width) in [0, 1]", tuple(images.shape), hint)
        return [_picture(image.float().cpu()) for image in x]
    return [image.convert("RGB") for image in images]


def _picture(pixels: Tensor) -> PIL.Image.Image:
    """(3, h, w) in [0, 1] -> an RGB image."""
    return PIL.Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1).contiguous().numpy())


def _pixels(image: PIL.Image.Image) -> Tensor:
    """fp32 (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0) / 255


def _dimmed(image: PIL.Image.Image, brightness: float) -> Tensor:
    """(3, h, w), grey: brightness times that of the image."""
    return brightness * _pixels(image.convert("L"))


def _enlarged(x: Tensor, image: PIL.Image.Image, mode: str) -> Tensor:
    """(C, h, w) -> (C, *size of the image) on the CPU."""
    return F.interpolate(x[None].cpu(), (image.height, image.width), mode=mode)[0]


def _grown(mask: Tensor, pixels: int) -> Tensor:
    """The mask and all pixels at most so many pixels from it along each side, bool (h, w)."""
    return F.max_pool2d(mask[None].float(), 2 * pixels + 1, stride=1, padding=pixels)[0] > 0
