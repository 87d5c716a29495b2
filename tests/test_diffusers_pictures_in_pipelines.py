"""Pictures and masks as people have them, through the pipelines: cut-outs, control maps, photos that are turned."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from tiny_models import tiny_controlnet, tiny_unet
from tiny_pipelines import IMAGES, MASK, fresh, run

PHOTO = np.full((30, 52, 3), 120, np.uint8)
PHOTO[2:12, 3:20] = (250, 250, 20)
SUBJECT = np.zeros((30, 52), bool)
SUBJECT[2:12, 3:20] = True
"""As the sensor saw it."""


def turned(array):
    """The PIL image of a camera that was held upright; a viewer turns it by a quarter."""
    image = PIL.Image.fromarray(array)
    image.getexif()[0x112] = 6
    return image


@pytest.fixture(scope="module")
def pipe():
    return fresh()


def test_a_transparent_control_image_keeps_its_lines():
    lines = np.zeros((16, 16, 4), np.uint8)
    lines[4:12, 8] = 255  # white on black that is transparent
    pipe = fresh(controlnet=tiny_controlnet(tiny_unet(0)))
    stock = VaeImageProcessor(vae_scale_factor=2, do_convert_rgb=True, do_normalize=False)
    expected = stock.preprocess(PIL.Image.fromarray(lines), 16, 16)
    tensor = torch.from_numpy(lines).permute(2, 0, 1)
    for image in (PIL.Image.fromarray(lines), lines, lines / 255.0, tensor):
        found = pipe.control(image, 1.0, 1, (8, 8), torch.float32).images
        torch.testing.assert_close(found, expected)


def test_masks_are_turned_as_their_photo_or_refused(pipe):
    expected = run(pipe, turned(PHOTO), reference_mask=np.rot90(SUBJECT, -1).copy()).reference_mask
    with_exif = run(pipe, turned(PHOTO), reference_mask=turned(SUBJECT.astype(np.uint8) * 255)).reference_mask
    assert torch.equal(with_exif, expected) and 0 < expected.float().mean() < 1
    for mask in (SUBJECT, PIL.Image.fromarray(SUBJECT), torch.from_numpy(SUBJECT)):
        with pytest.raises(ValueError, match=r"reference_mask: expected .*, 52 x 30, got 30 x 52; .*exif_transpose"):
            run(pipe, turned(PHOTO), reference_mask=mask)


@pytest.mark.parametrize("image", [PHOTO, PIL.Image.fromarray(PHOTO), torch.from_numpy(PHOTO).permute(2, 0, 1)])
def test_masks_of_the_pictures_or_the_latents_proportions_are_taken(pipe, image):
    for shape in ((30, 52), (61, 103), (8, 8), (512, 512)):
        run(pipe, image, reference_mask=np.ones(shape, bool))
    with pytest.raises(ValueError, match="the proportions of its picture, 30 x 52, got 52 x 30"):
        run(pipe, image, reference_mask=SUBJECT.T)


def test_a_turned_mask_is_refused_where_it_has_the_proportions_of_what_is_made(pipe):
    with pytest.raises(ValueError, match=r"got 52 x 30; both height x width; .*exif_transpose"):
        run(pipe, PHOTO, reference_mask=SUBJECT.T, height=28, width=16)


def test_a_subject_that_is_cut_off_and_masks_that_are_no_list(pipe):
    left = np.zeros((30, 52), bool)
    left[:, :4] = True
    with pytest.raises(ValueError, match=r"a foreground, got none; .*cut off: see reference_fit"):
        run(pipe, PHOTO, reference_mask=left)
    run(pipe, PHOTO, reference_mask=left, reference_fit="pad")
    with pytest.raises(ValueError, match="expected 2 masks, one per reference, got 1; several are a list"):
        run(pipe, [PHOTO, PHOTO], reference_mask=np.stack([SUBJECT, SUBJECT]))
    run(pipe, [PHOTO, PHOTO], reference_mask=torch.from_numpy(np.stack([SUBJECT, SUBJECT]))[:, None])


def test_a_mask_of_labels_says_what_it_is_read_as(pipe):
    labels = SUBJECT.astype(np.uint16) * 1000
    with pytest.raises(ValueError, match=r"a foreground, got none; what is above half of the range .* pass mask > 0"):
        run(pipe, PHOTO, reference_mask=PIL.Image.fromarray(labels))


def test_layout_masks_may_be_a_batch_of_any_kind(pipe):
    pair = np.stack([MASK, np.roll(MASK, 4, 1)])
    expected = run(pipe, layout_mask=list(pair)).context_masks
    assert not torch.equal(expected[0, 0], expected[0, 1])
    for masks in (pair, torch.from_numpy(pair), pair[..., None], PIL.Image.fromarray(MASK)):
        found = run(pipe, layout_mask=masks).context_masks
        assert torch.equal(found[0, 0], expected[0, 0])
        assert isinstance(masks, PIL.Image.Image) or torch.equal(found, expected)


def test_premultiplied_grey_is_a_picture_too(pipe):
    grey = PIL.Image.new("LA", (30, 52), (90, 255))
    assert torch.equal(run(pipe, grey.convert("La")).latents, run(pipe, grey).latents)


def test_a_unet_without_a_size_asks_for_one():
    pipe = fresh()
    for unet in (pipe.unet, pipe.personalized_unet):
        unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="height: expected height and width, since the UNet has no sample_size"):
        run(pipe, latents=None)
    assert torch.equal(run(pipe, IMAGES[:1]).latents, run(pipe, IMAGES[:1], height=16, width=16).latents)
