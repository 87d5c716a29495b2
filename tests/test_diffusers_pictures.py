"""Pictures and masks of every kind as people have them: what `preprocess` and `as_mask` make of them."""

import io
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import ImageOps
from torch.nn import functional as F

from lr_kernels.diffusers.pipelines.pictures import FITS, as_mask, preprocess

CPU = torch.device("cpu")
COLOURS = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
GREY = np.random.default_rng(1).integers(0, 256, (24, 16), dtype=np.uint8)
UNIT = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(2))
SQUARE = np.zeros((16, 16), bool)
SQUARE[4:10, 6:14] = True


def own_size(image):
    return preprocess(image, 24, 16)


def as_pixels(array):
    """uint8 (h, w, 3) or (h, w) -> what `preprocess` should make of it at its own size."""
    array = np.broadcast_to(array[..., None], (*array.shape, 3)) if array.ndim == 2 else array
    return torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1


def photographed(image, orientation):
    """An upright PIL image as a camera saves it, through a file."""
    stored = image
    for turn in TURNS[orientation]:
        stored = stored.transpose(turn)
    exif = stored.getexif()
    exif[0x112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    file.seek(0)
    return PIL.Image.open(file)


FLIP, UPSIDE, HALF = PIL.Image.FLIP_LEFT_RIGHT, PIL.Image.FLIP_TOP_BOTTOM, PIL.Image.ROTATE_180
LEFT, RIGHT = PIL.Image.ROTATE_90, PIL.Image.ROTATE_270
TURNS = {
    1: [],
    2: [FLIP],
    3: [HALF],
    4: [UPSIDE],
    5: [PIL.Image.TRANSPOSE],
    6: [LEFT],
    7: [PIL.Image.TRANSVERSE],
    8: [RIGHT],
}
"""From the upright picture to the stored one; each is the inverse of what a viewer does."""


# Images at their own size


@pytest.mark.parametrize("image", [COLOURS, GREY], ids=["RGB", "L"])
def test_pil_images_are_read_as_diffusers_does(image):
    image = PIL.Image.fromarray(image)
    assert torch.equal(own_size(image), VaeImageProcessor().preprocess(image.convert("RGB")))
    assert torch.equal(own_size([image, image])[1:], own_size(image))
    plain = VaeImageProcessor(do_normalize=False).preprocess(image.convert("RGB"))
    assert torch.equal(preprocess(image, 24, 16, normalize=False), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_read_as_diffusers_does(dtype):
    unit = UNIT.to(dtype)
    for image in (unit, unit[0], [unit[0], unit[1]]):
        pixels = own_size(image)
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels.to(dtype), VaeImageProcessor().preprocess(image))
    assert torch.equal(own_size([unit, unit[0]]), torch.cat([own_size(unit), own_size(unit[:1])]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_are_read_as_diffusers_does(dtype):
    array = UNIT.permute(0, 2, 3, 1).numpy().astype(dtype)
    for image in (array, [array[0], array[1]], (COLOURS / 255.0).astype(dtype)):
        assert torch.equal(own_size(image), VaeImageProcessor().preprocess(image).float())
    assert torch.equal(own_size(array[0]), own_size(array)[:1])


def test_negative_numbers_mean_minus_one_to_one_for_the_whole_call():
    """As in diffusers; one of the two pictures has no negative number."""
    signed = torch.stack([UNIT[0], UNIT[1] * 2 - 1])
    with pytest.warns(UserWarning, match=r"image: negative numbers, so it is taken to be in \[-1, 1\]"):
        assert torch.equal(own_size(signed), signed)
    with pytest.warns(UserWarning):
        assert torch.equal(own_size([signed[0], signed[1]]), signed)
    with pytest.warns(UserWarning):
        mixed = own_size([signed[1], PIL.Image.fromarray(COLOURS), COLOURS])
    assert torch.equal(mixed, torch.cat([signed[1:], as_pixels(COLOURS), as_pixels(COLOURS)]))


def test_the_undershoot_of_a_filter_is_no_sign_of_minus_one():
    dark = torch.linspace(-0.05, 1, 64).expand(3, 8, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = preprocess([dark, UNIT[0]], 8, 64)
    torch.testing.assert_close(found[0], 2 * dark - 1)
    with pytest.warns(UserWarning, match=r"\(image\[1\]\); clip what is meant to be in \[0, 1\]"):
        preprocess([UNIT[0], 2 * UNIT[0] - 1], 8, 8)


@pytest.mark.parametrize("array", [np.uint16(COLOURS), np.uint16(COLOURS) * 16, np.uint8(COLOURS > 99)])
def test_numbers_far_below_the_white_of_their_dtype_are_told(array):
    with pytest.warns(UserWarning, match=r"image: its largest number is \d+ where uint(8|16) has \d+ for white"):
        preprocess(array, *array.shape[:2])


@pytest.mark.parametrize("image", ["dog.png", Path("dog.png")])
def test_a_file_is_to_be_opened(image):
    with pytest.raises(TypeError, match=r"image\[1\]: expected a PIL image.*; open a file with PIL.Image.open"):
        preprocess([COLOURS, image], 8, 8)


def test_images_that_pil_cannot_read_are_named():
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    cut_short = PIL.Image.open(io.BytesIO(file.getvalue()[:-900]))
    closed = PIL.Image.open(io.BytesIO(file.getvalue()))
    closed.close()
    for image in (cut_short, closed):
        with pytest.raises(ValueError, match="image: expected an image that PIL can read, got"):
            preprocess(image, 8, 8)
        with pytest.raises(ValueError, match="mask: expected an image that PIL can read, got"):
            as_mask(image, (8, 8), "crop", torch.device("cpu"), "mask")


def test_an_opaque_picture_is_not_its_own_mask():
    opaque = PIL.Image.fromarray(COLOURS).convert("RGBA")
    for picture in (PIL.Image.fromarray(COLOURS), opaque, COLOURS):
        with pytest.raises(ValueError, match="mask: expected a mask, or a picture that is transparent around"):
            as_mask(picture, (8, 8), "crop", torch.device("cpu"), "mask", picture)
    opaque.putpixel((0, 0), (0, 0, 0, 0))
    assert as_mask(opaque, (8, 8), "crop", torch.device("cpu"), "mask", opaque).any()


def test_a_mask_of_one_pixel_is_one():
    for size in ((1, 1), (1, 60), (60, 1)):
        assert as_mask(PIL.Image.new("RGB", size, "white"), (8, 8), "squeeze", torch.device("cpu")).all()


def test_control_images_keep_their_numbers():
    marked = UNIT[:1].clone()
    marked[:, :, :4] = -1  # what is to be painted, for inpainting ControlNets
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(preprocess(marked, 24, 16, normalize=False), marked)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
def test_photos_are_turned_as_their_exif_says(orientation, mode):
    array = GREY.astype(np.uint16) * 257 if mode == "I;16" else GREY if mode == "L" else COLOURS
    upright = PIL.Image.fromarray(array).convert(mode)
    photo = photographed(upright, orientation)
    assert photo.size == ((16, 24) if orientation < 5 else (24, 16))
    assert ImageOps.exif_transpose(photo).tobytes() == upright.tobytes()
    expected = as_pixels(COLOURS if mode.startswith("RGB") else GREY)
    torch.testing.assert_close(own_size(photo), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits(dtype):
    array = np.random.default_rng(3).integers(0, 65536, (24, 16)).astype(dtype)
    expected = torch.from_numpy(array.astype(np.float32) / 65535 * 2 - 1).expand(1, 3, -1, -1)
    byte_orders = [PIL.Image.frombytes(mode, (16, 24), array.astype(d).tobytes()) for mode, d in ORDERS.items()]
    tensor = torch.from_numpy(array.astype(np.uint16))
    for image in (*byte_orders, PIL.Image.fromarray(array.astype(np.int32)), array, array[..., None], tensor):
        torch.testing.assert_close(own_size(image), expected, rtol=0, atol=1e-6)


def test_sixteen_bits_may_be_dark():
    dark = np.full((4, 4), 200, np.uint16)
    for image in (dark, PIL.Image.fromarray(dark), torch.from_numpy(dark)):
        assert preprocess(image, 4, 4, normalize=False).max() == np.float32(200) / np.float32(65535)


ORDERS = {"I;16": "<u2", "I;16B": ">u2"}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(16, 16), (40, 40), (9, 15)])
def test_sixteen_bits_are_resized_as_eight(fit, size):
    """But for rounding to bytes after each side; noise that no overshoot of the filter brings to black or white."""
    noise = 80 + GREY // 3
    eight = preprocess(PIL.Image.fromarray(noise), *size, fit)
    sixteen = preprocess(PIL.Image.fromarray(noise.astype(np.uint16) * 257), *size, fit)
    assert (eight - sixteen).abs().max() < 2 * 2 / 255


def test_numbers_of_pil_images_end_at_the_white_that_none_exceeds():
    expected = as_pixels(GREY)
    numbers = GREY.astype(np.float32)
    for image in (numbers, numbers / 255, numbers * 257, GREY.astype(np.int32)):
        torch.testing.assert_close(own_size(PIL.Image.fromarray(image)), expected, rtol=0, atol=1e-6)
    binary = (GREY > 127).astype(np.int32)
    assert torch.equal(own_size(PIL.Image.fromarray(binary)), as_pixels((GREY > 127) * np.uint8(255)))


def test_overshoots_of_filters_end_at_black_and_white():
    image = PIL.Image.fromarray(np.array([[-0.1, 0.5, 1.2]], np.float32))
    assert preprocess(image, 1, 3)[0, 0, 0].tolist() == [-1, 0, 1]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int64])
def test_integers_and_booleans(dtype):
    array = COLOURS > 127 if dtype is bool else COLOURS.astype(dtype)
    expected = as_pixels(np.uint8(255) * (COLOURS > 127) if dtype is bool else COLOURS)
    for image in (array, array[None], torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(own_size(image), expected)
    grey = array[..., 0]
    for image in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert torch.equal(own_size(image), expected[:, :1].expand(-1, 3, -1, -1))


def test_arrays_of_any_strides_and_byte_order():
    unit = UNIT[0].permute(1, 2, 0).numpy()
    assert torch.equal(own_size(unit[:, ::-1].astype(">f4")), own_size(UNIT[0].flip(2)))
    array = COLOURS[::-1, ::-1]
    array.flags.writeable = False
    assert torch.equal(own_size(array), as_pixels(COLOURS[::-1, ::-1]))


# Transparency


def cutout(opacity):
    return np.concatenate([COLOURS, np.broadcast_to(opacity, (24, 16))[..., None].astype(np.uint8)], 2)


def test_transparent_pictures_are_put_on_white():
    half = np.full((24, 16), 255)
    half[:12] = 0
    expected = as_pixels(np.where(half[..., None] == 0, 255, COLOURS).astype(np.uint8))
    picture = cutout(half)
    for image in (PIL.Image.fromarray(picture), picture, picture / 255.0, (picture / 255.0)[None]):
        torch.testing.assert_close(own_size(image), expected, rtol=0, atol=1e-6)
    tensor = torch.from_numpy(picture / 255.0).permute(2, 0, 1)
    torch.testing.assert_close(own_size(tensor), expected, rtol=0, atol=1e-6)
    assert torch.equal(own_size(PIL.Image.fromarray(cutout(255))), as_pixels(COLOURS))
    veiled = own_size(PIL.Image.fromarray(cutout(51)))
    torch.testing.assert_close(veiled, as_pixels(COLOURS) / 5 + 4 / 5, rtol=0, atol=1 / 255)


def test_transparency_of_grey_and_of_palettes():
    grey = PIL.Image.new("LA", (2, 1))
    grey.putdata([(100, 255), (100, 0)])
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.info["transparency"] = 1
    keyed = PIL.Image.new("RGB", (2, 1), (255, 0, 0))
    keyed.putpixel((1, 0), (0, 255, 0))
    keyed.info["transparency"] = (0, 255, 0)
    level = 100 / 255 * 2 - 1
    for image, first in ((grey, (level, level, level)), (palette, (1, -1, -1)), (keyed, (1, -1, -1))):
        pixels = preprocess(image, 1, 2)
        torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(first, dtype=torch.float32))
        assert pixels[0, :, 0, 1].tolist() == [1, 1, 1]


def test_modes_of_print_and_of_two_tones():
    cyan = PIL.Image.new("CMYK", (1, 1), (255, 0, 0, 0))
    assert preprocess(cyan, 1, 1).flatten().tolist() == [-1, 1, 1]
    assert preprocess(PIL.Image.new("1", (1, 1), 1), 1, 1).flatten().tolist() == [1, 1, 1]


# Fits


def striped(height, width, horizontal):
    """Numbers that grow linearly along one side from 0.5 / length, as PIL image of mode F, array and tensor."""
    along = (torch.arange(width if horizontal else height) + 0.5) / (width if horizontal else height)
    ramp = along.expand(height, width) if horizontal else along[:, None].expand(height, width)
    ramp = ramp.contiguous()
    return PIL.Image.fromarray(ramp.numpy()), ramp.numpy(), ramp


@pytest.mark.parametrize("horizontal", [True, False])
def test_crop_cuts_the_longer_side_around_the_middle(horizontal):
    size = (20, 60) if horizontal else (60, 20)
    for image in striped(*size, horizontal):
        shown = preprocess(image, 10, 10, "crop", normalize=False)[0, 0]
        along = shown[5] if horizontal else shown[:, 5]
        expected = 1 / 3 + (torch.arange(10) + 0.5) / 30  # the middle third
        torch.testing.assert_close(along, expected, rtol=0, atol=2e-3)
    exact = preprocess(COLOURS, 16, 16)
    assert torch.equal(exact, as_pixels(COLOURS[4:20]))  # no scaling: pixels as they are
    assert torch.equal(exact, preprocess(PIL.Image.fromarray(COLOURS), 16, 16))
    odd = preprocess(COLOURS, 24, 13)
    assert torch.equal(odd, as_pixels(COLOURS[:, 1:14]))
    assert torch.equal(odd, preprocess(PIL.Image.fromarray(COLOURS), 24, 13))


@pytest.mark.parametrize("horizontal", [True, False])
def test_pad_repeats_the_border(horizontal):
    size = (20, 60) if horizontal else (60, 20)
    for image in striped(*size, not horizontal):  # a ramp across the padded side
        shown = preprocess(image, 30, 30, "pad", normalize=False)[0, 0]
        across = shown[:, 15] if horizontal else shown[15]
        assert torch.equal(across[:10], across[10].expand(10)) and torch.equal(across[20:], across[19].expand(10))
        torch.testing.assert_close(across[11:19], ((torch.arange(10) + 0.5) / 10)[1:-1], rtol=0, atol=6e-3)
    for image in (COLOURS, PIL.Image.fromarray(COLOURS)):
        shown = preprocess(image, 24, 24, "pad")
        assert torch.equal(shown, F.pad(as_pixels(COLOURS), (4, 4, 0, 0), mode="replicate"))


def test_squeeze_shows_everything():
    image = PIL.Image.fromarray(COLOURS)
    assert torch.equal(preprocess(image, 32, 8, "squeeze"), VaeImageProcessor().preprocess(image, 32, 8))
    tensor = preprocess(UNIT, 10, 12, "squeeze", normalize=False)
    torch.testing.assert_close(tensor, F.interpolate(UNIT, (10, 12), mode="bilinear", antialias=True))
    larger = preprocess(UNIT, 30, 45, "squeeze", normalize=False)
    torch.testing.assert_close(larger, F.interpolate(UNIT, (30, 45), mode="bilinear", antialias=True))


@pytest.mark.parametrize("fit", FITS)
def test_the_fit_does_not_matter_where_the_aspect_ratio_is_right(fit):
    for image in (PIL.Image.fromarray(COLOURS), COLOURS):
        assert torch.equal(preprocess(image, 48, 32, fit), preprocess(image, 48, 32, "squeeze"))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (3, 1000)])
def test_extreme_shapes(fit, shape):
    for image in (np.full((*shape, 3), 51, np.uint8), PIL.Image.new("RGB", shape[::-1], (51, 51, 51))):
        shown = preprocess(image, 16, 24, fit)
        torch.testing.assert_close(shown, torch.full((1, 3, 16, 24), -0.6))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (61, 97), (100, 41), (64, 64), (33, 20)])
def test_image_and_mask_stay_together(fit, shape):
    """A bright rectangle is where its mask is, but for tokens at its border."""
    mask = np.zeros(shape, bool)
    mask[shape[0] // 4 : shape[0] // 2, shape[1] // 3 : 2 * shape[1] // 3] = True
    pixels = mask.astype(np.float32)
    for image in (pixels, PIL.Image.fromarray(pixels)):
        shown = F.avg_pool2d(preprocess(image, 128, 128, fit, normalize=False)[:, 0], 8)
        subject = as_mask(mask, (16, 16), fit, CPU)
        assert subject.any()
        assert (shown[subject] > 0.4).all() and (shown[~subject] < 0.6).all()


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


# Masks


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


# What does not fit


@pytest.mark.parametrize(
    "image, error, message",
    [
        ([], ValueError, "expected at least one image, got none"),
        ("cat.png", TypeError, "expected a PIL image, an array or a tensor, got str"),
        ([[COLOURS]], TypeError, "expected a PIL image, an array or a tensor, got list"),
        (
            COLOURS.astype(np.float32),
            ValueError,
            r"expected floating numbers in \[0, 1\], got numbers from 0 to 255; di",
        ),
        (UNIT * 4 - 2, ValueError, r"expected floating numbers in \[0, 1\], got numbers from -1.9"),
        (torch.full((1, 4, 8, 8), -0.7), ValueError, "got numbers from -0.7 to -0.7; .*latents are no images"),
        (UNIT.numpy(), ValueError, r"got \(2, 3, 24, 16\); an array has its channels last"),
        (torch.from_numpy(COLOURS), ValueError, r"got \(24, 16, 3\); a tensor has its channels before"),
        (COLOURS[..., :2], ValueError, r"expected shape \(height, width\), with 1, 3 or 4 channels or without"),
        (np.zeros((0, 4, 3)), ValueError, "expected shape"),
        (np.zeros(4), ValueError, "expected shape"),
        (np.full((4, 4), np.nan), ValueError, "expected finite numbers, got NaN or Inf"),
        (PIL.Image.fromarray(np.full((4, 4), np.inf, np.float32)), ValueError, "expected finite numbers"),
        (PIL.Image.fromarray(np.full((4, 4), -3.0, np.float32)), ValueError, "numbers from 0 to 1, 255 or 65535"),
        (np.full((4, 4), 10**6), ValueError, "expected numbers from 0 to 1, 255 or 65535, got numbers from 1e"),
        (np.zeros((4, 4), complex), TypeError, "expected numbers or booleans, got an array of complex128"),
        (torch.zeros(4, 4, dtype=torch.complex64), TypeError, "expected real numbers or booleans"),
        (np.array([["a"]]), TypeError, "expected numbers or booleans"),
    ],
)
def test_images_that_do_not_fit(image, error, message):
    with pytest.raises(error, match="lr_kernels.layout_retouch: control_image: .*" + message):
        preprocess(image, 16, 16, name="control_image")


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
    with pytest.raises(error, match=r"lr_kernels.layout_retouch: reference_mask\[1\]: " + message):
        as_mask(mask, (16, 16), "crop", CPU, "reference_mask[1]")


def test_fits_that_do_not_exist():
    with pytest.raises(ValueError, match="fit: expected one of crop, pad, squeeze, got 'stretch'"):
        preprocess(COLOURS, 16, 16, "stretch")
    with pytest.raises(ValueError, match="fit: expected one of crop, pad, squeeze, got None"):
        as_mask(SQUARE, (16, 16), None, CPU)
