"""Rendered training sets of the toy world, cached as .npz files in the temporary folder."""

import multiprocessing
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lr_kernels.toy.world import (
    BACKGROUNDS,
    COLOR_NAMES,
    PLAIN,
    SHAPES,
    SUBJECT,
    TEXTURES,
    Dot,
    caption,
    random_scene,
    render,
    subject_scene,
)

CACHE = Path(tempfile.gettempdir()) / "lr_kernels_toy"
CHUNK = 500
BACKDROPS = (*BACKGROUNDS, PLAIN)


@dataclass(frozen=True)
class RenderedScenes:
    """images [N, 64, 64, 3], masks [N, 64, 64], both uint8; captions [N]; labels [N, 3]: background, shape, subject."""

    images: np.ndarray
    masks: np.ndarray
    captions: np.ndarray
    labels: np.ndarray


def base_scene(rng):
    """A captioned scene of the base model; one in twelve stands before the plain backdrop."""
    return random_scene(rng, (PLAIN,) if rng.random() < 1 / 12 else BACKGROUNDS)


def random_dot(rng):
    return Dot(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0.2, 0.5), str(rng.choice(COLOR_NAMES)))


def is_subject(scene):
    same_look = replace(scene, background=PLAIN, x=0.5, y=0.5, radius=SUBJECT.radius, angle=0.0)
    return same_look == SUBJECT


def autoencoder_scene(rng):
    """A base scene, one in three with a random dot: the autoencoder learns to draw dots without seeing the subject."""
    scene = base_scene(rng)
    return replace(scene, dot=random_dot(rng)) if rng.random() < 1 / 3 else scene


def lookalike_scene(rng):
    """A ball that shares some of the subject's traits, never all of them."""
    scene = replace(random_scene(rng, BACKDROPS), shape="ball", texture=str(rng.choice(TEXTURES)))
    if rng.random() < 0.5:
        scene = replace(scene, color="red", second_color="yellow")
    if rng.random() < 0.5:
        color = str(rng.choice(("blue", "green", "purple", "white")))
        scene = replace(scene, dot=Dot(SUBJECT.dot.x, SUBJECT.dot.y, float(rng.choice((0.25, 0.42))), color))
    colors = {scene.color, scene.second_color}
    if scene.texture == "striped" and colors == {"red", "yellow"} and scene.dot and scene.dot.color == "blue":
        scene = replace(scene, dot=None)
    return scene


def judge_scene(rng):
    """A scene of the judge's training set: the subject, a lookalike or any object, posed as freely as in the base's."""
    kind = rng.random()
    if kind < 0.3:
        pose = random_scene(rng, BACKDROPS)
        return subject_scene(rng, pose.background, pose.x, pose.y, pose.radius, pose.angle)
    return lookalike_scene(rng) if kind < 0.55 else random_scene(rng, BACKDROPS)


SAMPLERS = {"base": base_scene, "autoencoder": autoencoder_scene, "judge": judge_scene}


def render_chunk(job):
    """Render `count` scenes for a job (kind, seed, chunk index, count): one tuple of arrays."""
    kind, seed, index, count = job
    rng = np.random.default_rng((seed, index))
    images, masks, captions, labels = [], [], [], []
    for _ in range(count):
        scene = SAMPLERS[kind](rng)
        image, mask = render(scene, rng)
        images.append(image)
        masks.append(np.uint8(np.rint(mask * 255)))
        captions.append(caption(scene, rng))
        labels.append((BACKDROPS.index(scene.background), SHAPES.index(scene.shape), is_subject(scene)))
    return np.stack(images), np.stack(masks), np.array(captions), np.array(labels, dtype=np.int64)


def rendered_scenes(kind, count, seed, workers=2):
    """`count` scenes of a kind ("base", "autoencoder", "judge") as RenderedScenes, rendered once per machine."""
    path = CACHE / f"{kind}_{count}_{seed}.npz"
    if not path.exists():
        jobs = [(kind, seed, start // CHUNK, min(CHUNK, count - start)) for start in range(0, count, CHUNK)]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            chunks = pool.map(render_chunk, jobs)
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(path, *(np.concatenate(parts) for parts in zip(*chunks, strict=True)))
    with np.load(path) as arrays:
        return RenderedScenes(*(arrays[name] for name in arrays.files))
