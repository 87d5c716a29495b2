"""Pictures as cameras save them: turned, with the EXIF number that says how."""

import io

import PIL.Image

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
