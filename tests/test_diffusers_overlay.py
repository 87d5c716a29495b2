"""The sheet of a pipeline's output: what is drawn where, in which colour."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from lr_kernels.diffusers.subjects import overlay
from lr_kernels.diffusers.subjects.overlay import (
    GAP,
    HEAT,
    MARGIN,
    SUBJECT_COLOURS,
    TINT,
    Row,
    draw,
    overlay_colours,
    overlay_heat,
    overlay_mask,
    sheet,
    wheel,
)

GREY = PIL.Image.new("RGB", (96, 96), (100, 100, 100))
FIRST, SECOND = (torch.tensor(colour) for colour in SUBJECT_COLOURS[:2])


def pixel(image, x, y):
    return torch.tensor(image.getpixel((x, y)))


def plain(colour, count=2, size=(32, 32)):
    """Tensor (count, 3, *size) of one colour."""
    return (torch.tensor(colour) / 255).view(1, 3, 1, 1).expand(count, 3, *size)


def close(one, other):
    torch.testing.assert_close(one.double(), torch.as_tensor(other).double(), rtol=0, atol=1)


# Overlays


def test_a_mask_is_tinted_and_outlined():
    """Tokens of 12 pixels; at 96 pixels lines are 1 pixel wide."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:6] = True  # rows 24 to 59, columns 36 to 71
    drawn = overlay_mask(GREY, mask)
    assert drawn.mode == "RGB" and drawn.size == GREY.size
    close(pixel(drawn, 50, 40), 100 + TINT * (FIRST - 100))
    for x, y in ((36, 40), (71, 40), (50, 24), (50, 59)):
        close(pixel(drawn, x, y), FIRST)
    for x, y in ((35, 40), (72, 40), (50, 23), (50, 60)):
        assert pixel(drawn, x, y).tolist() == [255, 255, 255]
    for x, y in ((34, 40), (73, 40), (5, 5)):
        assert pixel(drawn, x, y).tolist() == [100, 100, 100]


def test_an_outline_alone_leaves_the_picture_as_it_is():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:6] = True
    drawn = overlay_mask(GREY, mask, tint=0)
    assert pixel(drawn, 50, 40).tolist() == [100, 100, 100]
    close(pixel(drawn, 36, 40), FIRST)


def test_every_subject_has_its_colour():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :, :1], masks[1, :, 2:] = True, True
    drawn = overlay_mask(GREY, masks)
    close(pixel(drawn, 10, 48), 100 + TINT * (FIRST - 100))
    close(pixel(drawn, 80, 48), 100 + TINT * (SECOND - 100))
    close(pixel(drawn, 48, 48), SECOND)
    assert pixel(drawn, 36, 48).tolist() == [100, 100, 100]
    assert len(set(SUBJECT_COLOURS)) == len(SUBJECT_COLOURS) == 6


def test_a_mask_of_nothing_or_everything_has_no_outline():
    for share, expected in ((0, torch.full((3,), 100)), (1, 100 + TINT * (FIRST - 100))):
        drawn = overlay_mask(GREY.convert("L"), torch.full((8, 8), bool(share)))
        assert len(drawn.getcolors()) == 1
        close(pixel(drawn, 0, 0), expected)


def test_heat_goes_from_cold_to_hot_over_grey():
    heat = torch.linspace(0, 1, 96).expand(96, 96)
    drawn = overlay_heat(PIL.Image.new("RGB", (96, 96), "black"), heat)
    for x, colour in ((0, HEAT[0][1]), (95, HEAT[-1][1])):
        close(pixel(drawn, x, 50), 0.65 * torch.tensor(colour))
    brightness = np.asarray(drawn.convert("L"))[50].astype(int)
    assert (np.diff(brightness) >= 0).all() and brightness[-1] > brightness[0] + 100
    bright = overlay_heat(PIL.Image.new("RGB", (96, 96), "white"), heat)
    close(pixel(bright, 0, 50) - pixel(drawn, 0, 50), torch.full((3,), 0.35 * 255))


def test_heat_outside_its_range_ends_there():
    heat = torch.tensor([[-3.0, torch.nan], [0.0, 0.0]])
    assert overlay_heat(GREY, heat).tobytes() == overlay_heat(GREY, torch.zeros(2, 2)).tobytes()
    assert overlay_heat(GREY, torch.full((2, 2), 7.0)).tobytes() == overlay_heat(GREY, torch.ones(2, 2)).tobytes()


def test_colours_of_tokens():
    tokens = torch.zeros(4, 2, 2)
    tokens[:, 0, 1] = torch.tensor([1.0, 0.0, 0.5, 1.0])
    drawn = overlay_colours(GREY, tokens)
    dim = 0.45 * 100
    close(pixel(drawn, 20, 20), torch.full((3,), dim))
    close(pixel(drawn, 70, 20), 0.1 * dim + 0.9 * 255 * torch.tensor([1.0, 0.0, 0.5]))


def test_the_wheel_tells_places_apart():
    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[2:7, 3:10] = True
    mask[2, 3] = False  # still within the box
    colours = wheel(mask)
    torch.testing.assert_close(colours[:, 4, 6], torch.ones(3))
    inside = colours[:, 2:7, 3:10].flatten(1).T
    assert torch.cdist(inside, inside).add(torch.eye(len(inside))).min() > 0.02
    red = colours[:, 4, 9]
    assert red[0] == 1 and red[1] < 0.6 and red[1] == pytest.approx(red[2].item(), abs=1e-6)
    assert (colours >= 0).all() and (colours <= 1).all()
    assert torch.equal(colours[:, 4, 11], red)  # beyond the box as at its border


def test_the_wheel_of_one_token_or_none():
    one = torch.zeros(3, 3, dtype=torch.bool)
    one[1, 1] = True
    assert torch.equal(wheel(one)[:, 1, 1], torch.ones(3))
    assert wheel(torch.zeros(3, 3, dtype=torch.bool)).isfinite().all()


# Sheets


def test_where_the_pictures_of_a_sheet_are():
    """From the right and from below, where no label is."""
    rows = [Row("red", plain((255, 0, 0))), Row("blue and wide", plain((0, 0, 255), 3, (16, 32)))]
    drawn = sheet(rows, side=64)
    assert drawn.height == 2 * MARGIN + 64 + GAP + 32
    left = drawn.width - MARGIN - (3 * 64 + 2 * GAP)
    assert left > MARGIN
    pixels = np.asarray(drawn)
    red, blue = ((pixels == colour).all(2) for colour in ([255, 0, 0], [0, 0, 255]))
    expected_red, expected_blue = np.zeros_like(red), np.zeros_like(blue)
    for i in range(3):
        start = left + i * (64 + GAP)
        expected_red[MARGIN : MARGIN + 64, start : start + 64] = i < 2
        expected_blue[MARGIN + 64 + GAP : MARGIN + 96 + GAP, start : start + 64] = True
    assert (red == expected_red).all() and (blue == expected_blue).all()
    labels = pixels[:, : left - MARGIN]
    assert (labels[MARGIN : MARGIN + 64] < 100).any() and (labels[MARGIN + 64 + GAP :] < 100).any()
    assert (pixels[:, left - MARGIN : left] == 255).all()


def test_whole_pixels_of_small_pictures_stay_squares():
    image = torch.zeros(1, 3, 2, 2)
    image[0, :, 0, 0] = 1
    pixels = np.asarray(sheet([Row("", image)], side=64))[MARGIN : MARGIN + 64, -MARGIN - 64 : -MARGIN]
    assert (pixels[:32, :32] == 255).all() and pixels.sum() == 32 * 32 * 3 * 255


def test_a_row_draws_over_each_of_its_pictures():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[1, :2] = True
    cells = overlay._cells(Row("", plain((100, 100, 100)), masks), 96)
    assert cells[0].tobytes() == GREY.tobytes() and cells[1].tobytes() == overlay_mask(GREY, masks[1]).tobytes()
    two = torch.stack([masks, ~masks])
    cells = overlay._cells(Row("", plain((100, 100, 100)), two), 96)
    assert cells[1].tobytes() == overlay_mask(GREY, two[:, 1]).tobytes()
    heat = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    cells = overlay._cells(Row("", plain((100, 100, 100)), masks, heat), 96)
    assert cells[1].tobytes() == overlay_mask(overlay_heat(GREY, heat[1]), masks[1], tint=0).tobytes()


def test_labels_name_the_colours_of_subjects():
    masks = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    for shape, swatches in ((masks[0], False), (masks, True)):
        pixels = np.asarray(sheet([Row("two", plain((100, 100, 100), 1), shape)], side=64))
        assert all((pixels == colour).all(2).any() == swatches for colour in SUBJECT_COLOURS[:2])


@pytest.mark.parametrize("part", ["masks", "heat", "colours"])
def test_parts_of_other_pictures_are_refused(part):
    x = torch.zeros(3, 4, 4, dtype=torch.bool) if part == "masks" else torch.zeros(3, 4, 4, 4)
    message = f"{part}: expected one for each of the 2 images, got"
    with pytest.raises(ValueError, match=rf"^lr_kernels\.LayoutRetouchOutput\.draw: {message}"):
        sheet([Row("", plain((0, 0, 0)), **{part: x})])
    with pytest.raises(ValueError, match="rows: expected at least one row, got 0"):
        sheet([])


# Outputs of the pipelines

GRID = (4, 4)
OPTIONAL = ("layout_images", "reference_images", "subject_masks", "context_masks", "reference_mask", "maps", "matches")


def output(**fields):
    return SimpleNamespace(**{**dict.fromkeys(OPTIONAL), "images": plain((0, 0, 255)), **fields})


def whole_output():
    """Layouts show at columns 2 and 3 what the reference shows at columns 0 and 1, with a wrong match below."""
    context = torch.zeros(1, 2, *GRID, dtype=torch.bool)
    context[..., 2:] = True
    foreground = torch.zeros(1, *GRID, dtype=torch.bool)
    foreground[..., :2] = True
    index = (torch.arange(16) - 2).clamp(min=0).expand(2, 16)
    consistent = torch.ones(2, 16, dtype=torch.bool)
    consistent[:, 15] = False
    return output(
        layout_images=plain((100, 100, 100)),
        reference_images=plain((200, 0, 0), 1),
        subject_masks=context.flip(3),
        context_masks=context,
        reference_mask=foreground,
        maps=context.float(),
        matches=[(index, consistent, GRID)],
    )


def rows_of(monkeypatch, *args, **kwargs):
    """What `draw` would draw."""
    seen = []
    monkeypatch.setattr(overlay, "sheet", lambda rows, side: seen.extend([*rows, side]))
    draw(*args, **kwargs)
    return seen[:-1], seen[-1]


def test_the_rows_of_an_output(monkeypatch):
    whole = whole_output()
    rows, side = rows_of(monkeypatch, whole)
    assert side == 192
    labels = ["references", "layouts", "results", "maps", "colours\nby place", "matches"]
    assert [row.label for row in rows] == labels
    references, layouts, results, maps, key, matches = rows
    assert torch.equal(references.masks, whole.reference_mask[None])
    assert layouts.masks is whole.context_masks and results.masks is whole.subject_masks
    assert torch.equal(maps.heat, whole.maps[0]) and maps.images[0].getpixel((0, 0)) == (100, 100, 100)
    assert torch.equal(matches.masks, whole.context_masks)
    assert torch.equal(key.colours[0, 3].bool(), whole.reference_mask[0])
    shown = matches.colours[1]
    expected = torch.zeros(GRID, dtype=torch.bool)
    expected[:, 2:] = True
    expected[3, 3] = False  # not consistent
    assert torch.equal(shown[3].bool(), expected)
    for row, column in expected.nonzero().tolist():
        assert torch.equal(shown[:3, row, column], key.colours[0, :3, row, column - 2])


def test_matches_outside_the_foreground_or_the_subject_are_not_painted(monkeypatch):
    whole = whole_output()
    index = torch.full((2, 16), 3)  # not of the reference's foreground
    index[0, 2], index[0, 0] = 0, 0  # of the subject, and beside it
    whole.matches = [(index, torch.ones(2, 16, dtype=torch.bool), GRID)]
    painted = rows_of(monkeypatch, whole)[0][-1].colours[:, 3]
    assert painted[0, 0, 2] == 1 and painted.sum() == 1
    whole.context_masks = None
    painted = rows_of(monkeypatch, whole)[0][-1].colours[:, 3]
    assert painted[0, 0, 0] == painted[0, 0, 2] == 1 and painted.sum() == 2


@pytest.mark.parametrize(
    "missing, left",
    [
        (["maps"], ["references", "layouts", "results", "colours\nby place", "matches"]),
        (["matches"], ["references", "layouts", "results", "maps"]),
        (["reference_images"], ["layouts", "results", "maps"]),
        (["layout_images"], ["references", "results", "maps"]),
        (["reference_mask"], ["references", "layouts", "results", "maps"]),
        (OPTIONAL, ["results"]),
    ],
)
def test_what_an_output_does_not_have_is_left_out(monkeypatch, missing, left):
    whole = whole_output()
    for name in missing:
        setattr(whole, name, None)
    assert [row.label for row in rows_of(monkeypatch, whole)[0]] == left


def test_several_subjects_and_references(monkeypatch):
    whole = whole_output()
    for name in ("subject_masks", "context_masks", "maps"):
        setattr(whole, name, getattr(whole, name).repeat(2, 1, 1, 1))
    whole.reference_mask = whole.reference_mask.repeat(2, 1, 1)
    whole.reference_images = whole.reference_images.repeat(2, 1, 1, 1)
    whole.matches = whole.matches * 2
    for given, subjects in ((None, (0, 1)), ([1, 0], (1, 0))):
        rows, _ = rows_of(monkeypatch, whole, reference_subjects=given)
        labels = ["maps\nof subject 1", "maps\nof subject 2", "colours\nby place"]
        labels += ["matches\nof reference 1", "matches\nof reference 2"]
        assert [row.label for row in rows[3:]] == labels
        for r, s in enumerate(subjects):
            assert torch.equal(rows[0].masks[s, r], whole.reference_mask[r]) and not rows[0].masks[1 - s, r].any()
            assert torch.equal(rows[6 + r].masks[s], whole.context_masks[s]) and not rows[6 + r].masks[1 - s].any()
    whole.reference_mask, whole.matches = whole.reference_mask[:1], None
    with pytest.raises(ValueError, match="draw: reference_subjects: expected the subjects of 1 references, got None"):
        draw(whole)
    draw(whole, reference_subjects=[1])


def test_every_output_type_gives_the_same_sheet():
    images = torch.randint(0, 256, (2, 3, 16, 24), generator=torch.Generator().manual_seed(0))
    arrays = images.movedim(1, -1).numpy().astype(np.uint8)
    sheets = [
        draw(output(images=x, subject_masks=whole_output().subject_masks))
        for x in (images / 255, arrays / 255.0, [PIL.Image.fromarray(array) for array in arrays])
    ]
    assert sheets[0].tobytes() == sheets[1].tobytes() == sheets[2].tobytes()
    assert draw(output(images=images.half() / 255)).size == sheets[0].size


def test_the_scale_of_a_sheet():
    assert draw(output(), scale=3).height == 2 * MARGIN + 96
    assert draw(output()).height == 2 * MARGIN + 192
    assert draw(output(), scale=0.5).height == 2 * MARGIN + 16


def test_a_sheet_leaves_the_output_as_it_is():
    whole = whole_output()
    before = {name: x.clone() for name, x in vars(whole).items() if isinstance(x, torch.Tensor)}
    assert draw(whole).mode == "RGB"
    assert all(torch.equal(x, getattr(whole, name)) for name, x in before.items())


def test_latents_are_not_drawn():
    latents = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"draw: images: expected \(n, 3, height, width\) .*, got .*; latents are no"):
        draw(output(images=latents))
    with pytest.raises(ValueError, match=r"draw: layout_images: .* call the pipeline with another output_type"):
        draw(output(layout_images=latents))
