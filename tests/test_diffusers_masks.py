"""Masks of every kind, as pictures.py reads them for the tokens of a picture."""

import numpy as np
import PIL.Image
import pytest
import torch
from photographs import TURNS, photographed

from lr_kernels.diffusers.pipelines.pictures import FITS, as_mask

CPU = torch.device("cpu")
COLOURS = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
SQUARE = np.zeros((16, 16), bool)
GREY = np.random.default_rng(1).integers(0, 256, (24, 16), dtype=np.uint8)


def test_fits_of_masks():
    wide = np.zeros((16, 32), bool)
    wide[4:8, 12:20] = True
    crop, pad, squeeze = (as_mask(wide, (8, 8), fit, CPU)[0] for fit in FITS)
    expected = [torch.zeros(8, 8, dtype=torch.bool) for _ in FITS]
    expected[0][2:4, 2:6] = True  # columns 8 to 24 are shown
    expected[1][3:4, 3:5] = True  # 8 rows are shown above and below
    expected[2][2:4, 3:5] = True
    assert torch.equal(torch.stack([crop, pad, squeeze]), torch.stack(expected))
    assert not as_mask(np.ones((16, 32), bool), (8, 8), "pad", CPU)[0, :2].any()  # what is padded is no subject
    beside = np.zeros((16, 32), bool)
    beside[:, :8] = True
    assert not as_mask(beside, (8, 8), "crop", CPU).any()
    cut = np.zeros((9, 11), bool)
    cut[:, 10] = True  # the last column that is cut; sevenths of the others end there but for rounding
    assert not as_mask(cut, (7, 7), "crop", CPU).any()


def label_map(indices, *colours):
    image = PIL.Image.fromarray(indices.astype(np.uint8)).convert("P")
    image.putdata(indices.flatten().tolist())
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def forms():
    """(id, mask) of the subject `SQUARE`."""
    byte = np.where(SQUARE, 210, 10).astype(np.uint8)
    opacity = np.where(SQUARE, 255, 0).astype(np.uint8)
    opaque = np.full_like(byte, 255)
    black, red, grey = (0, 0, 0), (120, 0, 0), (200, 200, 200)
    yield from {
        "bool": SQUARE,
        "uint8": byte,
        "0 and 1 as uint8": SQUARE.astype(np.uint8),
        "0 and 1 as int64": SQUARE.astype(np.int64),
        "0 to 255 as int32": byte.astype(np.int32),
        "uint16": byte.astype(np.uint16) * 257,
        "floats": byte / 255,
        "floats to 255": byte.astype(np.float32),
        "half floats": torch.from_numpy(byte / 255).bfloat16(),
        "with overshoot": np.where(SQUARE, 1.1, -0.1),
        "batch of one": SQUARE[None],
        "tensor of one channel": torch.from_numpy(SQUARE)[None, None],
        "array of one channel": SQUARE[..., None],
        "RGB array": np.stack([byte] * 3, 2),
        "RGB tensor": torch.from_numpy(np.stack([byte] * 3)),
        "RGBA array by opacity": np.stack([opaque, opaque, opaque, opacity], 2),
        "RGBA floats by opacity": torch.from_numpy(np.stack([opaque, opaque, opaque, opacity]) / 255),
        "opaque RGBA array": np.stack([byte, byte, byte, opaque], 2),
        "1": PIL.Image.fromarray(SQUARE),
        "L": PIL.Image.fromarray(byte),
        "L of 0 and 1": PIL.Image.fromarray(SQUARE.astype(np.uint8)),
        "I;16": PIL.Image.fromarray(byte.astype(np.uint16) * 257),
        "I": PIL.Image.fromarray(SQUARE.astype(np.int32)),
        "F": PIL.Image.fromarray((byte / 255).astype(np.float32)),
        "RGB": PIL.Image.fromarray(byte).convert("RGB"),
        "CMYK": PIL.Image.fromarray(byte).convert("CMYK"),
        "RGBA": PIL.Image.fromarray(np.stack([opaque, opaque, opaque, opacity], 2)),
        "LA": PIL.Image.merge("LA", [PIL.Image.fromarray(opaque), PIL.Image.fromarray(opacity)]),
        "black LA": PIL.Image.merge("LA", [PIL.Image.new("L", (16, 16)), PIL.Image.fromarray(opacity)]),
        "opaque RGBA": PIL.Image.fromarray(byte).convert("RGBA"),
        "labels": label_map(SQUARE, black, red),
        "grey palette": label_map(~SQUARE, grey, black),
        "transparent palette": transparent_palette(),
        **{f"EXIF {orientation}": photographed(PIL.Image.fromarray(byte), orientation) for orientation in TURNS},
    }.items()


def transparent_palette():
    image = label_map(~SQUARE, (9, 9, 9), (120, 0, 0))
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("mask", [pytest.param(mask, id=name) for name, mask in forms()])
def test_masks_of_every_kind(mask):
    found = as_mask(mask, (16, 16), "crop", CPU)
    assert found.dtype == torch.bool and torch.equal(found[0], torch.from_numpy(SQUARE))


def test_channels_that_disagree_count_by_luminance():
    red, green = (PIL.Image.new("RGB", (2, 2), colour) for colour in ("red", "lime"))
    for image, bright in ((red, False), (green, True)):
        assert as_mask(image, (2, 2), "crop", CPU).all().item() == bright
        assert as_mask(np.asarray(image), (2, 2), "crop", CPU).all().item() == bright


def test_opacity_is_a_mask_only_where_it_leaves_something_out():
    veil = np.where(SQUARE, 210, 10).astype(np.uint8)[..., None].repeat(4, 2)
    veil[..., 3] = np.where(SQUARE, 255, 200)
    for mask in (veil, veil / 255.0, PIL.Image.fromarray(veil)):
        assert torch.equal(as_mask(mask, (16, 16), "crop", CPU)[0], torch.from_numpy(SQUARE))


def test_half_of_the_range_is_not_above_it():
    for dtype in (np.float32, np.float64):
        assert not as_mask(np.full((4, 4, 3), 0.5, dtype), (4, 4), "crop", CPU).any()
    assert not as_mask(np.full((4, 4), 127, np.uint8), (4, 4), "crop", CPU).any()
    assert as_mask(np.full((4, 4), 128, np.uint8), (4, 4), "crop", CPU).all()


def test_every_label_but_the_first_is_the_subject():
    labels = np.arange(4).repeat(4).reshape(4, 4)
    image = label_map(labels, (255, 255, 255), (0, 0, 0), (90, 0, 0), (0, 0, 90))
    assert torch.equal(as_mask(image, (4, 4), "crop", CPU)[0], torch.from_numpy(labels > 0))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3)])
def test_a_small_subject_stays(fit, size):
    mask = np.zeros((300, 311), bool)
    mask[150, 155] = True
    assert as_mask(mask, size, fit, CPU).sum() >= 1
    assert not as_mask(np.zeros((300, 311)), size, fit, CPU).any()


def test_tokens_that_are_covered_by_half_belong_to_the_subject():
    mask = np.zeros((6, 8), bool)
    mask[:, :3] = True
    assert as_mask(mask, (3, 4), "crop", CPU)[0, 0].tolist() == [True, True, False, False]
    thirds = np.zeros((24, 24), bool)
    thirds[:, :12] = True  # 2.4 columns of the 4.8 in the middle one of five tokens
    assert as_mask(thirds, (5, 5), "crop", CPU)[0, 0].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (np.zeros((2, 16, 16)), ValueError, r"expected shape \(height, width\), .*got \(2, 16, 16\)"),
        (np.zeros((2, 3, 16, 16)), ValueError, r"expected shape \(height, width\), got \(2, 3, 16, 16\)"),
        (np.ones(3, bool), ValueError, r"expected shape \(height, width\)"),
        (
            torch.tensor([[-8.0, 5.0]]),
            ValueError,
            "expected numbers from 0 to 1, 255 or 65535, got numbers from -8 to 5",
        ),
        (np.full((4, 4), np.nan), ValueError, "expected finite numbers"),
        ([SQUARE], TypeError, "expected a PIL image, an array or a tensor, got list"),
    ],
)
def test_masks_that_do_not_fit(mask, error, message):
    with pytest.raises(error, match=r"lr_kernels.LayoutRetouch: reference_mask\[1\]: " + message):
        as_mask(mask, (16, 16), "crop", CPU, "reference_mask[1]")
