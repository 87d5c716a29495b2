"""Rendered training sets of the toy world, cached as .npz files in the temporary folder."""

import multiprocessing
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .world import (
    BACKGROUNDS,
    COLOR_NAMES,
    PLAIN,
    SHAPES,
    SIDE,
    SUBJECTS,
    TEXTURES,
    Dot,
    Scene,
    caption,
    inside_shape,
    random_scene,
    render,
    render_objects,
    subject_scene,
    to_tensor,
    two_object_scene,
)

CACHE = Path(tempfile.gettempdir()) / "lr_kernels_toy"
CHUNK = 500
BACKDROPS = (*BACKGROUNDS, PLAIN)
NO_DOT = len(COLOR_NAMES)
"""The dot label of an object without a dot; a dot's label is the index of its colour."""
IGNORED = -1
"""The label of a trait that a scene does not show."""
TRAITS = ("shape", "texture", "colors", "dot", "no dot")
"""What tells a subject from its near misses."""
LEAST_SEEN = 0.01  # of the image area; less of an object is not asked about


@dataclass(frozen=True)
class RenderedScenes:
    """images [N, 64, 64, 3] and masks [N, 64, 64] of all objects, both uint8; captions [N]."""

    images: np.ndarray
    masks: np.ndarray
    captions: np.ndarray


@dataclass(frozen=True)
class JudgedScenes:
    """Scenes with one object each that is asked about.

    images [N, 64, 64, 3], masks [N, 64, 64] of all objects and asked [N, 64, 64] of the one, all uint8;
    labels [N, 4] int64: background, shape, texture, dot; colors [N, 6] float32: 1 for the colours of its texture.
    """

    images: np.ndarray
    masks: np.ndarray
    asked: np.ndarray
    labels: np.ndarray
    colors: np.ndarray


def base_scene(rng: np.random.Generator) -> Scene:
    """A captioned scene of the base model, one in twelve before the plain backdrop, one in six with two objects."""
    draw = two_object_scene if rng.random() < 1 / 6 else random_scene
    return draw(rng, (PLAIN,) if rng.random() < 1 / 12 else BACKGROUNDS)


def random_dot(rng: np.random.Generator) -> Dot:
    """A dot anywhere within an object."""
    return Dot(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0.2, 0.5), str(rng.choice(COLOR_NAMES)))


def autoencoder_scene(rng: np.random.Generator) -> Scene:
    """A base scene, one in two with a random dot: the autoencoder learns to draw dots without seeing a subject."""
    scene = base_scene(rng)
    return replace(scene, dot=random_dot(rng)) if rng.random() < 1 / 2 else scene


def colors_of(scene: Scene) -> set[str]:
    """The names of the colours of an object's texture, one or two; a dot's colour is not among them."""
    return {scene.color} if scene.texture == "solid" else {scene.color, scene.second_color}


def other_choice(rng: np.random.Generator, options: Sequence[str], taken: Collection[str | None]) -> str:
    """One of the options that are not taken."""
    return str(rng.choice([option for option in options if option not in taken]))


DISK_X, DISK_Y = np.meshgrid(np.linspace(-1, 1, 15), np.linspace(-1, 1, 15))
DISK_X, DISK_Y = (grid[np.hypot(DISK_X, DISK_Y) < 1] for grid in (DISK_X, DISK_Y))
"""Points spread evenly over the unit disk, [P] each."""


def seen_of_dot(dot: Dot, shape: str) -> float:
    """The share of a dot's area that lies inside a shape."""
    return inside_shape(shape, dot.x + dot.radius * DISK_X, dot.y + dot.radius * DISK_Y).mean()


def dot_on(scene: Scene, rng: np.random.Generator, color: str | None = None) -> Dot:
    """A dot of another colour than the object's texture, somewhere on the object and in view for the most part."""
    color = other_choice(rng, COLOR_NAMES, colors_of(scene)) if color is None else color
    while True:
        dot = Dot(rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8), rng.uniform(0.24, 0.46), color)
        if seen_of_dot(dot, scene.shape) > 0.7:
            return dot


def near_miss(scene: Scene, trait: str, rng: np.random.Generator) -> Scene:
    """The scene with one of its object's TRAITS changed. For the trait "dot" the object must have a dot. A dot that
    a new shape would cut off is moved."""
    dot_color = None if scene.dot is None else scene.dot.color
    match trait:
        case "shape":
            scene = replace(scene, shape=other_choice(rng, SHAPES, {scene.shape}))
            if scene.dot is not None and seen_of_dot(scene.dot, scene.shape) < 0.7:
                scene = replace(scene, dot=dot_on(scene, rng, dot_color))
        case "texture":
            second = scene.second_color
            if scene.texture == "solid":
                second = other_choice(rng, COLOR_NAMES, {scene.color, dot_color})
            scene = replace(scene, texture=other_choice(rng, TEXTURES, {scene.texture}), second_color=second)
        case "colors":
            names = ["color"] if scene.texture == "solid" else ["color", "second_color"]
            changed = [str(rng.choice(names))] if rng.random() < 0.5 else names
            for name in changed:
                taken = {scene.color, scene.second_color, dot_color}
                other = other_choice(rng, COLOR_NAMES, taken)
                scene = replace(scene, color=other) if name == "color" else replace(scene, second_color=other)
        case "dot":
            assert scene.dot is not None
            color = other_choice(rng, COLOR_NAMES, {*colors_of(scene), dot_color})
            scene = replace(scene, dot=replace(scene.dot, color=color))
        case "no dot":
            scene = replace(scene, dot=None)
        case _:
            raise ValueError(f"trait: expected one of {TRAITS}, got {trait!r}")
    return scene


def dressed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene, in 45 % of the draws with its own look (half of these get a dot), in 25 % with that of a subject, and
    in 30 % with that of a near miss of a subject."""
    kind = rng.random()
    if kind < 0.45:
        return replace(scene, dot=dot_on(scene, rng)) if rng.random() < 0.5 else scene
    look = SUBJECTS[str(rng.choice(list(SUBJECTS)))]
    if kind > 0.7:
        look = near_miss(look, str(rng.choice(TRAITS)), rng)
    return replace(
        scene, shape=look.shape, texture=look.texture, color=look.color, second_color=look.second_color, dot=look.dot
    )


def near_miss_renders(subject: str, trait: str, seed: int = 6, per_background: int = 4) -> Tensor:
    """A subject's near misses in one of TRAITS, posed freely: images [N, 3, 64, 64] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    images = []
    for name in BACKGROUNDS * per_background:
        pose = random_scene(rng, (name,))
        scene = near_miss(subject_scene(rng, name, pose.x, pose.y, pose.radius, pose.angle, subject), trait, rng)
        images.append(render(scene, rng)[0])
    return to_tensor(images)


def judge_scene(rng: np.random.Generator) -> Scene:
    """A scene of the judge's training set: one object, at times cut by the border, two objects, or none in view."""
    kind = rng.random()
    if kind < 0.3:
        scene = two_object_scene(rng, BACKDROPS)
        assert scene.other is not None
        return replace(dressed(scene, rng), other=dressed(scene.other, rng))
    scene = dressed(random_scene(rng, BACKDROPS), rng)
    if kind < 0.34:
        return replace(scene, x=-9.0)  # out of view
    if kind < 0.5:
        return replace(scene, x=rng.uniform(0.08, 0.92), y=rng.uniform(0.08, 0.92), radius=rng.uniform(0.13, 0.34))
    return scene


def to_bytes(mask: np.ndarray) -> np.ndarray:
    """A coverage in [0, 1] as uint8."""
    return np.rint(mask * 255).astype(np.uint8)


def render_captioned(draw: Callable[[np.random.Generator], Scene], rng: np.random.Generator) -> tuple:
    """One row of RenderedScenes for a scene of draw(rng)."""
    scene = draw(rng)
    image, mask = render(scene, rng)
    return image, to_bytes(mask), caption(scene, rng)


def dot_label(scene: Scene, mask: np.ndarray) -> int:
    """The dot label of a scene's first object; IGNORED where the dot's centre is not seen in mask [64, 64]."""
    dot = scene.dot
    if dot is None:
        return NO_DOT
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    x = scene.x + scene.radius * (dot.x * cos - dot.y * sin)
    y = scene.y + scene.radius * (dot.x * sin + dot.y * cos)
    in_image = 0 <= x < 1 and 0 <= y < 1
    seen = in_image and mask[int(y * SIDE), int(x * SIDE)] > 0.5
    return COLOR_NAMES.index(dot.color) if seen else IGNORED


def render_judged(rng: np.random.Generator) -> tuple:
    """One row of JudgedScenes; of two objects either is asked about where enough of it is seen."""
    scene = judge_scene(rng)
    image, masks = render_objects(scene, rng)
    objects = [scene] if scene.other is None else [scene, scene.other]
    seen = [index for index, mask in enumerate(masks) if mask.mean() > LEAST_SEEN]
    background = BACKDROPS.index(scene.background)
    colors = np.zeros(len(COLOR_NAMES), np.float32)
    if not seen:
        return image, to_bytes(masks.sum(0)), to_bytes(masks[0]), (background, IGNORED, IGNORED, IGNORED), colors
    index = int(rng.choice(seen))
    asked = objects[index]
    colors[[COLOR_NAMES.index(name) for name in colors_of(asked)]] = 1
    labels = background, SHAPES.index(asked.shape), TEXTURES.index(asked.texture), dot_label(asked, masks[index])
    return image, to_bytes(masks.sum(0)), to_bytes(masks[index]), labels, colors


RENDERERS: dict[str, tuple[type, Callable[[np.random.Generator], tuple]]] = {
    "base": (RenderedScenes, partial(render_captioned, base_scene)),
    "autoencoder": (RenderedScenes, partial(render_captioned, autoencoder_scene)),
    "judge": (JudgedScenes, render_judged),
}


def render_chunk(job: tuple) -> tuple[np.ndarray, ...]:
    """Render `count` scenes for a job (kind, seed, chunk index, count): one tuple of arrays."""
    kind, seed, index, count = job
    rng = np.random.default_rng((seed, index))
    _, render_one = RENDERERS[kind]
    return tuple(np.stack(column) for column in zip(*(render_one(rng) for _ in range(count)), strict=True))


def rendered_scenes(kind: str, count: int, seed: int, workers: int = 2) -> Any:
    """`count` scenes of a kind, rendered once per machine: JudgedScenes of "judge", RenderedScenes of the others."""
    path = CACHE / f"{kind}_scenes_{count}_{seed}.npz"
    if not path.exists():
        jobs = [(kind, seed, start // CHUNK, min(CHUNK, count - start)) for start in range(0, count, CHUNK)]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            chunks = pool.map(render_chunk, jobs)
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(path, *(np.concatenate(parts) for parts in zip(*chunks, strict=True)))
    container, _ = RENDERERS[kind]
    with np.load(path) as arrays:
        return container(*(arrays[name] for name in arrays.files))
