"""The methods, one context manager each; lr_kernels.diffusers.methods says what they share."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from torch import Tensor

from ... import presets
from ...attention.plan import AttentionPlan
from ...presets.shared import MAX_OTHERS
from ...runtime.checks import check_integer, check_number, fail
from ..pipelines.latents import encoded, upcast
from ..processors.routing import token_mask
from ..processors.unet import Pass
from ..subjects.subject_masks import SubjectMasks
from .checks import (
    as_mask,
    check_anchors,
    check_backend,
    check_images,
    check_later,
    check_list,
    check_seed,
    check_strength,
    stacked_masks,
)
from .features import noised_rows, reference_adain, shared_group_norms
from .sharing import Layers, sharing

Steps = int | Collection[int] | None


@contextmanager
def masactrl(
    pipe: DiffusionPipeline,
    images: int,
    *,
    source: int = 0,
    masks: Tensor | Sequence[Tensor] | None = None,
    layers: Layers | None = 10,
    steps: Steps = 4,
    halves: int = 2,
    backend: str = "auto",
) -> Iterator[Pass]:
    """MasaCtrl (arXiv 2304.08465): all images read the source's keys and values, from step 4 and layer 10 of 16 on.

    Args:
        source: the number of the image that is read and left as it is.
        masks: bool (images, height, width), or a list of (height, width), at any size: the subject of every image,
            which reads the source's subject and whose surroundings read the source's; the authors' mask-guided form.
            Default: none.
        layers: from 10 on, which is for Stable Diffusion 1 and 2; the authors take 44 of 70 for SDXL.
    """
    images = check_images("masactrl", images, backend)
    source = check_integer("masactrl", "source", source, 0, f"an image, 0 to {images - 1}", images - 1)
    device, rows = _table(pipe, [source] * images, halves)
    if masks is not None:
        masks = stacked_masks("masactrl", masks, images).to(device)

    @torch.compiler.disable
    @cache
    def plan(grid: tuple[int, int]) -> AttentionPlan:
        assert masks is not None
        sides = token_mask(masks, grid).repeat(halves, 1)
        return presets.masactrl_plan(sides, sides, rows)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return presets.masactrl(query, key, value, rows, backend=backend)

    def masked(query: Tensor, key: Tensor, value: Tensor, *, grid: tuple[int, int]) -> Tensor:
        return presets.masactrl(query, key, value, rows, plan=plan(grid), backend=backend)

    method = attention if masks is None else masked
    with sharing(pipe, method, layers=layers, steps=steps, rows=len(rows)) as run:
        yield run


@contextmanager
def style_aligned(
    pipe: DiffusionPipeline,
    images: int,
    *,
    reference: int = 0,
    shift: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    group_norms: bool = True,
    layers: Layers | None = None,
    steps: Steps = None,
    halves: int = 2,
    backend: str = "auto",
) -> Iterator[Pass]:
    """StyleAligned (arXiv 2312.02133): all images also read the first one, with queries, keys and group norms
    matched to its, in all layers and steps.

    Args:
        reference: the number of the image whose style the others get.
        shift, scale: of `presets.style_aligned`.
        group_norms: whether they see the reference too, see `shared_group_norms`; in all steps and layers.
    """
    op = "style_aligned"
    images = check_images(op, images, backend)
    reference = check_integer(op, "reference", reference, 0, f"an image, 0 to {images - 1}", images - 1)
    _, rows = _table(pipe, [reference] * images, halves)
    for name, x in (("shift", shift), ("scale", scale)):
        if x is not None:
            check_strength(op, name, x)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return presets.style_aligned(query, key, value, rows, shift, scale, backend=backend)

    norms = shared_group_norms(pipe.unet, rows) if group_norms else nullcontext()
    with sharing(pipe, attention, layers=layers, steps=steps, rows=len(rows)) as run, norms:
        yield run


@contextmanager
def reference_only(
    pipe: DiffusionPipeline,
    picture: PipelineImageInput,
    images: int,
    *,
    fidelity: float = 0.5,
    adain: bool = True,
    generator: torch.Generator | None = None,
    layers: Layers | None = None,
    steps: Steps = None,
    halves: int = 2,
    backend: str = "auto",
) -> Iterator[Pass]:
    """Reference-only, as diffusers' community pipeline `stable_diffusion_reference` with both of its parts ("adain" and
    "attn"): all images read a picture that is noised anew to the level of every step.

    The picture takes the last row of each half, so the pipeline is asked for one image more, whose prompt is the
    picture's; what comes out for it means nothing.

        with methods.reference_only(pipe, picture, images=1):
            image = pipe([prompt, prompt]).images[0]

    Args:
        picture: one, as diffusers takes them, of the size of the images.
        images: without the picture.
        fidelity: the original's `style_fidelity`.
        adain: whether features are matched to the picture's, see `reference_adain`; in all steps.
        generator: of the picture's noise.
    """
    images = check_images("reference_only", images, backend)
    check_number("reference_only", "fidelity", fidelity, "a number in [0, 1]", 0, 1)
    device, rows = _table(pipe, [images] * images + [-1], halves)
    uncond = torch.arange(len(rows), device=device) < (images + 1 if halves == 2 else 0)
    latents = _encoded(pipe, picture, device, generator)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return presets.reference_only(query, key, value, rows, uncond, fidelity, backend=backend)

    held = noised_rows(pipe, latents, ([-1] * images + [0]) * halves, generator)
    features = reference_adain(pipe.unet, rows, uncond, fidelity) if adain else nullcontext()
    with sharing(pipe, attention, layers=layers, steps=steps, rows=len(rows)) as run, held, features:
        yield run


@contextmanager
def ip_adapter(
    pipe: DiffusionPipeline,
    scales: Sequence[float | Tensor],
    masks: Sequence[Tensor | None] | None = None,
    *,
    layers: Layers | None = None,
    steps: Steps = None,
    backend: str = "auto",
) -> Iterator[Pass]:
    """IP-Adapter (arXiv 2308.06721) with masks: the pipeline's loaded adapters, each image in a softmax of its own.

        pipe.load_ip_adapter(…)
        with methods.ip_adapter(pipe, scales=[0.6, 0.8], masks=[left, right]):
            images = pipe(prompts, ip_adapter_image=[[one, another]]).images

    Args:
        scales: one per image, of all adapters in their order: of `presets.ip_adapter`; those of set_ip_adapter_scale()
            do not count.
        masks: one per image: bool or float (height, width) or (1 or B, height, width), at any size; None: everywhere.
            A token takes the mean of its part.
    """
    check_backend("ip_adapter", backend)
    scales = check_list("ip_adapter", "scales", scales)
    for i, scale in enumerate(scales):
        check_strength("ip_adapter", f"scales[{i}]", scale)
    if masks is not None:
        masks = check_list("ip_adapter", "masks", masks, len(scales))
        masks = [x if x is None else as_mask("ip_adapter", f"masks[{i}]", x) for i, x in enumerate(masks)]

    @torch.compiler.disable
    @cache
    def parts(grid: tuple[int, int], device: torch.device) -> list[Tensor | None] | None:
        if masks is None:
            return None
        pool = torch.nn.functional.adaptive_avg_pool2d
        return [x if x is None else pool(x[:, None].to(device, torch.float32), grid).flatten(1) for x in masks]

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: tuple[int, int],
        images: list[tuple[Tensor, Tensor]],
        key_bias: Tensor | None,
    ) -> Tensor:
        where = parts(grid, query.device)
        return presets.ip_adapter(query, (key, value), images, scales, where, key_bias=key_bias, backend=backend)

    with sharing(pipe, attention, kind="cross", layers=layers, steps=steps) as run:
        yield run


@contextmanager
def consistory(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    subject_tokens: str | Sequence[str],
    anchors: Sequence[int] = (0, 1),
    *,
    dropout: float = 0.5,
    seed: int = 0,
    layers: Layers | None = ("up_blocks",),
    steps: Steps = 1,
    halves: int = 2,
    backend: str = "auto",
) -> Iterator[SubjectMasks]:
    """ConsiStory (arXiv 2402.03286), its subject-driven extended attention: all images read the subjects of the
    anchors, in the decoder from step 1 on. (Not its feature injection, nor its blend of queries.)

    Args:
        prompts: of the images; the pipeline is to be called with the same.
        subject_tokens, and the masks: of `SubjectMasks`, which it gives.
        anchors: numbers of the images that are read.
        dropout: share of a subject's tokens that are hidden at random, anew in each step. seed: of that.
    """
    check_number("consistory", "dropout", dropout, "a number in [0, 1]", 0, 1)
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        fail("consistory", "prompts", "a list of prompts, one per image", repr(prompts))
    images = check_images("consistory", len(prompts), backend)
    anchors, seed = check_anchors(anchors, images), check_seed("consistory", seed)
    check_later("consistory", steps)
    _, rows = _table(pipe, [-1] * images, halves)
    found = SubjectMasks(pipe, prompts, subject_tokens, halves=halves)
    kept: dict[tuple[int, int], tuple[Tensor, AttentionPlan]] = {}

    @torch.compiler.disable
    def plan(step: int, grid: tuple[int, int]) -> AttentionPlan:
        masks = found.masks(grid)
        if grid not in kept or kept[grid][0] is not masks:
            shown = _drawn(seed, step, masks.shape, 1 - dropout).to(masks.device)
            kept[grid] = masks, presets.consistory_plan(anchors, masks & shown, halves=halves, batch=len(rows))
        return kept[grid][1]

    def attention(query: Tensor, key: Tensor, value: Tensor, *, step: int, grid: tuple[int, int]) -> Tensor:
        shown = plan(step, grid)
        return presets.consistory(query, key, value, anchors, plan=shown, halves=halves, backend=backend)

    with found, sharing(pipe, attention, layers=layers, steps=steps, rows=len(rows)):
        yield found


@contextmanager
def story_diffusion(
    pipe: DiffusionPipeline,
    images: int,
    *,
    share: float = 0.5,
    seed: int = 0,
    layers: Layers | None = ("up_blocks",),
    steps: Steps = 5,
    halves: int = 2,
    backend: str = "auto",
) -> Iterator[Pass]:
    """StoryDiffusion (arXiv 2405.01434), consistent self-attention: all images read half of the tokens of all others,
    drawn anew for every step, in the decoder from step 5 on. (The authors' demo also skips layers at random.)

    Args:
        share: of the tokens that are drawn. seed: of that; a step's draw is the same in every run and layer of a size.
    """
    check_number("story_diffusion", "share", share, "a number in [0, 1]", 0, 1)
    images, seed = check_images("story_diffusion", images, backend, MAX_OTHERS), check_seed("story_diffusion", seed)
    _, rows = _table(pipe, [-1] * images, halves)
    drawn: dict[int, AttentionPlan] = {}
    of_step = -1

    @torch.compiler.disable
    def plan(step: int, tokens: int, device: torch.device) -> AttentionPlan:
        nonlocal of_step
        if step != of_step:
            drawn.clear()
            of_step = step
        if tokens not in drawn:
            draw = _generator(seed, step)
            drawn[tokens] = presets.story_diffusion_plan(
                len(rows), tokens, share, halves=halves, generator=draw, device=device
            )
        return drawn[tokens]

    def attention(query: Tensor, key: Tensor, value: Tensor, *, step: int) -> Tensor:
        shown = plan(step, query.shape[1], query.device)
        return presets.story_diffusion(query, key, value, shown, halves=halves, backend=backend)

    with sharing(pipe, attention, layers=layers, steps=steps, rows=len(rows)) as run:
        yield run


def _table(pipe: DiffusionPipeline, rows: Sequence[int], halves: int) -> tuple[torch.device, Tensor]:
    """The device of the UNet's inputs, and the table of rows there."""
    device = pipe._execution_device
    return device, presets.guided_rows(rows, halves, device)


@torch.no_grad()
def _encoded(
    pipe: DiffusionPipeline, picture: PipelineImageInput, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Latents of a picture, as the UNet reads them."""
    vae = getattr(pipe, "vae", None)
    if vae is None or getattr(vae.config, "scaling_factor", None) is None:
        fail("reference_only", "pipe", "a pipeline with an autoencoder of images", f"one with {type(vae).__name__}")
    pixels = pipe.image_processor.preprocess(picture)
    if len(pixels) != 1:
        fail("reference_only", "picture", "one picture", len(pixels), "noised_rows takes several")
    with upcast(vae):
        return encoded(vae, pixels.to(device, vae.dtype), lambda distribution: distribution.sample(generator))


def _generator(seed: int, step: int) -> torch.Generator:
    """A generator for one step. It does not depend on what was drawn before, so a run can be interrupted or
    repeated."""
    return torch.Generator().manual_seed(1000 * seed + step)


def _drawn(seed: int, step: int, shape: torch.Size, share: float) -> Tensor:
    return torch.rand(shape, generator=_generator(seed, step), dtype=torch.float32) < share
