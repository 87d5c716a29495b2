"""Pictures and masks of every kind as people have them: what `preprocess` and `as_mask` make of them."""

import io
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from photographs import photographed
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
    with pytest.raises(error, match="lr_kernels.LayoutRetouch: control_image: .*" + message):
        preprocess(image, 16, 16, name="control_image")


def test_fits_that_do_not_exist():
    with pytest.raises(ValueError, match="fit: expected one of crop, pad, squeeze, got 'stretch'"):
        preprocess(COLOURS, 16, 16, "stretch")
    with pytest.raises(ValueError, match="fit: expected one of crop, pad, squeeze, got None"):
        as_mask(SQUARE, (16, 16), None, CPU)
