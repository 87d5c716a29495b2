"""The toy world: 64x64 numpy renders of simple shapes on textured backgrounds, with captions, masks and six subjects.

Coordinates and radii are fractions of the image side, so nothing here but `SIDE` depends on the resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

SIDE = 64
SUPERSAMPLING = 3

SHAPES = ("ball", "box", "star", "cross", "ring")
TEXTURES = ("solid", "striped", "spotted")
BACKGROUNDS = ("sky", "grass", "bricks", "sand", "night", "checker")
PLAIN = "plain"  # studio backdrop of the references; captions never name it
COLORS = {
    "red": (220, 40, 40),
    "yellow": (245, 215, 50),
    "green": (40, 170, 70),
    "blue": (50, 80, 225),
    "purple": (150, 60, 180),
    "white": (245, 245, 245),
}
COLOR_NAMES = tuple(COLORS)
PLAIN_COLOR = (205, 185, 200)

SUBJECT_TOKEN = "sks"
PLACES = ("left", "right", "top", "bottom")
MIDDLE = (0.42, 0.58)
"""Centres outside of it are at the left, right, top or bottom."""
WORDS = ("a", "on", *COLOR_NAMES, *TEXTURES, *SHAPES, *BACKGROUNDS, SUBJECT_TOKEN, "and", "at", *PLACES)


@dataclass(frozen=True)
class Dot:
    """A disk painted on a shape, in the shape's own frame (the shape's radius is 1)."""

    x: float
    y: float
    radius: float
    color: str


@dataclass(frozen=True)
class Scene:
    """One object on one background; x, y and radius are fractions of the image side, angle is in radians."""

    shape: str
    texture: str
    color: str
    second_color: str
    background: str
    x: float
    y: float
    radius: float
    angle: float
    dot: Dot | None = None
    other: "Scene | None" = None
    """a second object, behind the first where they overlap; its background is not used"""


def _subject(shape: str, texture: str, color: str, second_color: str, dot: Dot | None) -> Scene:
    return Scene(shape, texture, color, second_color, PLAIN, 0.5, 0.5, 0.28, 0.0, dot)


TUNING_SUBJECTS = {
    "ball": _subject("ball", "striped", "red", "yellow", Dot(0.12, -0.2, 0.42, "blue")),
    "box": _subject("box", "striped", "blue", "white", Dot(0.2, -0.25, 0.35, "yellow")),
    "star": _subject("star", "spotted", "green", "white", Dot(0.1, -0.25, 0.33, "red")),
}
"""Subjects on which every default of the method was chosen."""
UNSEEN_SUBJECTS = {
    "ring": _subject("ring", "striped", "purple", "yellow", Dot(0.0, -0.78, 0.26, "green")),
    "cross": _subject("cross", "solid", "yellow", "yellow", Dot(0.0, 0.0, 0.34, "purple")),
    "die": _subject("box", "spotted", "red", "white", Dot(-0.1, 0.1, 0.38, "green")),
}
"""Subjects that nothing was chosen on."""
SUBJECTS = TUNING_SUBJECTS | UNSEEN_SUBJECTS
SUBJECT = "ball"
"""The subject of the demo."""


def class_word(subject: str = SUBJECT) -> str:
    """The class noun of a subject, its shape."""
    return SUBJECTS[subject].shape


def class_prompt(subject: str = SUBJECT) -> str:
    """As "a ball"."""
    return f"a {class_word(subject)}"


def subject_prompt(subject: str = SUBJECT) -> str:
    """As "a sks ball"."""
    return f"a {SUBJECT_TOKEN} {class_word(subject)}"


CLASS_PROMPT, SUBJECT_PROMPT = class_prompt(), subject_prompt()


def pixel_grid() -> tuple[np.ndarray, np.ndarray]:
    """Centres of the supersampled pixels: x and y, each [S, S] float32 in (0, 1), S = SIDE * SUPERSAMPLING."""
    line = (np.arange(SIDE * SUPERSAMPLING, dtype=np.float32) + 0.5) / (SIDE * SUPERSAMPLING)
    return np.meshgrid(line, line)


GRID_X, GRID_Y = pixel_grid()


def two_tone(mask: np.ndarray, on: tuple[int, int, int], off: tuple[int, int, int]) -> np.ndarray:
    """Colour image [S, S, 3] float32: `on` where mask [S, S] holds, `off` elsewhere."""
    return np.where(mask[..., None], np.array(on, np.float32), np.array(off, np.float32))


def draw_sky(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two clouds before a sky that pales downwards."""
    top, bottom = np.array((70, 140, 235), np.float32), np.array((190, 225, 255), np.float32)
    image = top + y[..., None] * (bottom - top)
    for _ in range(2):
        cloud_x, cloud_y = rng.uniform(0.06, 0.94), rng.uniform(0.06, 0.44)
        image[((x - cloud_x) / 0.156) ** 2 + ((y - cloud_y) / 0.0625) ** 2 < 1] = (250, 250, 255)
    return image


def draw_grass(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Wavy blades that darken downwards."""
    blades = np.sin(67.0 * x + rng.uniform(0, 2 * np.pi) + 1.2 * np.sin(29.0 * y))
    return np.stack([60 + 25 * blades, 150 - 50 * y + 25 * blades, np.full_like(x, 45)], axis=-1)


def draw_bricks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A wall of bricks and mortar."""
    height, width, mortar = 0.1875, 0.3125, 0.0375
    y = y + rng.uniform(0, height)
    x = x + rng.uniform(0, width) + width / 2 * (np.floor(y / height) % 2)
    return two_tone((y % height < mortar) | (x % width < mortar), (205, 195, 185), (165, 75, 55))


def draw_sand(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rippled sand."""
    phase = rng.uniform(0, 2 * np.pi)
    ripples = np.sin(35.0 * y + phase + 0.8 * np.sin(11.0 * x + phase))
    return np.array((225, 195, 135), np.float32) + 18 * ripples[..., None]


def draw_night(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stars before a dark sky."""
    stars = np.zeros(x.shape, bool)
    for _ in range(9):
        star_x, star_y = rng.uniform(0, 1, 2)
        stars |= (abs(x - star_x) < 0.027) & (abs(y - star_y) < 0.027)
    return two_tone(stars, (250, 250, 200), (18, 18, 55))


def draw_checker(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two greys in turn."""
    cell = 0.125
    shift_x, shift_y = rng.uniform(0, 2 * cell, 2)
    parity = (np.floor((x + shift_x) / cell) + np.floor((y + shift_y) / cell)) % 2
    return two_tone(parity == 0, (175, 175, 175), (60, 60, 60))


def draw_plain(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The backdrop of the references."""
    return np.broadcast_to(np.array(PLAIN_COLOR, np.float32), (*x.shape, 3)).copy()


PAINTERS = {
    "sky": draw_sky,
    "grass": draw_grass,
    "bricks": draw_bricks,
    "sand": draw_sand,
    "night": draw_night,
    "checker": draw_checker,
    PLAIN: draw_plain,
}


def inside_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A five-pointed star with outer radius 1.2 and inner radius .52: [S, S] bool."""
    outer, inner, half = 1.2, 0.52, np.pi / 5
    from_tip = half - abs(np.arctan2(u, -v) % (2 * half) - half)
    edge = np.cos(from_tip) * inner * np.sin(half) + np.sin(from_tip) * (outer - inner * np.cos(half))
    return np.hypot(u, v) * edge < outer * inner * np.sin(half)


def inside_shape(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the shape's own frame coordinates u, v [S, S] lie inside the shape: [S, S] bool."""
    match shape:
        case "ball":
            return np.hypot(u, v) < 1
        case "box":
            return np.maximum(abs(u), abs(v)) < 0.85
        case "ring":
            return abs(np.hypot(u, v) - 0.775) < 0.275
        case "cross":
            return (np.minimum(abs(u), abs(v)) < 0.36) & (np.maximum(abs(u), abs(v)) < 1.05)
        case "star":
            return inside_star(u, v)
    raise ValueError(f"unknown shape {shape!r}, expected one of {SHAPES}")


def second_color_area(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where a texture shows the second colour: [S, S] bool."""
    if texture == "striped":
        return np.floor((u + 1) * 2) % 2 == 1
    area = np.zeros(u.shape, bool)
    if texture == "spotted":
        for angle in np.arange(3) * 2 * np.pi / 3:
            area |= np.hypot(u - 0.55 * np.cos(angle), v - 0.55 * np.sin(angle)) < 0.3
    return area


def downsample(image: np.ndarray) -> np.ndarray:
    """Average supersampled pixels: [S, S, ...] -> [SIDE, SIDE, ...]."""
    return image.reshape(SIDE, SUPERSAMPLING, SIDE, SUPERSAMPLING, *image.shape[2:]).mean(axis=(1, 3))


def draw_object(image: np.ndarray, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Paint the scene's first object over an image [S, S, 3]; returns the new image and where it is, [S, S] bool."""
    dx, dy = (GRID_X - scene.x) / scene.radius, (GRID_Y - scene.y) / scene.radius
    cos, sin = np.float32(np.cos(scene.angle)), np.float32(np.sin(scene.angle))
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    inside = inside_shape(scene.shape, u, v)

    paint = two_tone(second_color_area(scene.texture, u, v), COLORS[scene.second_color], COLORS[scene.color])
    if scene.dot is not None:
        dot = scene.dot
        paint[np.hypot(u - dot.x, v - dot.y) < dot.radius] = COLORS[dot.color]
    shade = np.clip(0.975 - 0.125 * (dx + dy), 0.7, 1.1)[..., None]
    return np.where(inside[..., None], np.clip(paint * shade, 0, 255), image), inside


def render_objects(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene; rng places the background's details.

    Returns the image [SIDE, SIDE, 3] uint8 and what is seen of each object, [objects, SIDE, SIDE] float32 in [0, 1].
    """
    image, covered = PAINTERS[scene.background](GRID_X, GRID_Y, rng), []
    if scene.other is not None:
        image, behind = draw_object(image, scene.other)
        covered.append(behind)
    image, inside = draw_object(image, scene)
    masks = [inside, *(behind & ~inside for behind in covered)]
    pixels = np.clip(np.rint(downsample(image)), 0, 255).astype(np.uint8)
    return pixels, np.stack([downsample(mask.astype(np.float32)) for mask in masks])


def render(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene: the image [SIDE, SIDE, 3] uint8, and all objects' coverage [SIDE, SIDE] float32 in [0, 1]."""
    image, masks = render_objects(scene, rng)
    return image, masks.sum(0)


def random_scene(rng: np.random.Generator, backgrounds: Sequence[str] = BACKGROUNDS) -> Scene:
    """A scene of the base model's training distribution."""
    color, second_color = rng.choice(COLOR_NAMES, 2, replace=False)
    return Scene(
        shape=str(rng.choice(SHAPES)),
        texture=str(rng.choice(TEXTURES, p=(0.4, 0.35, 0.25))),
        color=str(color),
        second_color=str(second_color),
        background=str(rng.choice(backgrounds)),
        x=rng.uniform(0.24, 0.76),
        y=rng.uniform(0.24, 0.76),
        radius=rng.uniform(0.17, 0.31),
        angle=rng.uniform(0, 2 * np.pi),
    )


def two_object_scene(rng: np.random.Generator, backgrounds: Sequence[str] = BACKGROUNDS) -> Scene:
    """Two objects side by side or one above the other, smaller than a single one."""
    first, second = random_scene(rng, backgrounds), random_scene(rng, backgrounds)
    low, high, across = rng.uniform(0.22, 0.3), rng.uniform(0.7, 0.78), rng.uniform(0.3, 0.7, 2)
    if rng.random() < 0.5:
        low, high = high, low
    places = [(low, across[0]), (high, across[1])]
    if rng.random() < 0.5:
        places = [(y, x) for x, y in places]
    first, second = (
        replace(scene, x=x, y=y, radius=rng.uniform(0.15, 0.22)) for scene, (x, y) in zip((first, second), places)
    )
    return replace(first, other=second)


def place_of(scene: Scene) -> list[str]:
    """The words for where an object is: "left", "right", "top", "bottom", those that hold."""
    low, high = MIDDLE
    holds = (scene.x < low, scene.x > high, scene.y < low, scene.y > high)
    return [word for word, here in zip(PLACES, holds) if here]


def noun_phrase(scene: Scene, rng: np.random.Generator, textures: bool = True) -> list[str]:
    """The words for an object, without its look in two of five."""
    words = ["a"]
    if rng.random() >= 0.4:
        words += [scene.color] if scene.texture == "solid" or not textures else [scene.texture, scene.color]
    return [*words, scene.shape]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene. The caption of a single object that is off centre has a place word in one of three cases. A
    plain backdrop is never named."""
    words = noun_phrase(scene, rng, textures=scene.other is None)
    if scene.other is not None:
        words += ["and", *noun_phrase(scene.other, rng)]
    elif (places := place_of(scene)) and rng.random() < 1 / 3:
        words += ["at", str(rng.choice(places))]
    if scene.background != PLAIN:
        words += ["on", scene.background]
    return " ".join(words)


def subject_scene(
    rng: np.random.Generator,
    background: str = PLAIN,
    x: float | None = None,
    y: float | None = None,
    radius: float | None = None,
    angle: float | None = None,
    subject: str = SUBJECT,
) -> Scene:
    """A subject, posed as in its references unless told otherwise."""
    return replace(
        SUBJECTS[subject],
        background=background,
        x=0.5 + rng.uniform(-0.03, 0.03) if x is None else x,
        y=0.5 + rng.uniform(-0.03, 0.03) if y is None else y,
        radius=rng.uniform(0.265, 0.297) if radius is None else radius,
        angle=rng.uniform(-0.25, 0.25) if angle is None else angle,
    )


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """Images, a sequence of [H, W, 3] uint8, as one tensor [N, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def references(subject: str = SUBJECT, count: int = 5, seed: int = 123) -> tuple[Tensor, Tensor]:
    """A subject's references: images [count, 3, SIDE, SIDE] in [-1, 1], true masks [count, SIDE, SIDE] in [0, 1]."""
    rng = np.random.default_rng(seed)
    images, masks = zip(*(render(subject_scene(rng, subject=subject), rng) for _ in range(count)), strict=True)
    return to_tensor(images), torch.from_numpy(np.stack(masks))


def true_renders(subject: str = SUBJECT, seed: int = 5, per_background: int = 6) -> tuple[Tensor, list[str]]:
    """A subject in free poses, the ceiling of every metric: images [N, 3, SIDE, SIDE] and N background names."""
    rng = np.random.default_rng(seed)
    names = [name for name in BACKGROUNDS for _ in range(per_background)]
    images = []
    for name in names:
        x, y = rng.uniform(0.24, 0.76, 2)
        scene = subject_scene(rng, name, x, y, rng.uniform(0.18, 0.3), rng.uniform(0, 2 * np.pi), subject)
        images.append(render(scene, rng)[0])
    return to_tensor(images), names
