"""Making a bank: the pass of a pipeline's references through its transformer."""

from collections.abc import Sequence
from typing import cast

import torch
from diffusers import DiffusionPipeline, Flux2KleinKVPipeline
from PIL import Image
from torch import Tensor

from ....runtime.checks import check_choice, fail
from ....source import Source
from .bank import TransformerReferenceBank, model_of
from .install import reference_layers, use_cached_references
from .references import ReadsReferences

_OP = "extract_references"
_LARGEST = 1024 * 1024
"""Pixels of a reference; Flux2KleinKVPipeline makes larger ones smaller."""


@torch.no_grad()
def extract_references(
    pipeline: DiffusionPipeline, image: Image.Image | Sequence[Image.Image], *, rotated: bool = True
) -> TransformerReferenceBank:
    """The keys and values of reference images in every layer of a pipeline's transformer, for all further calls.

    In Flux.2 klein with cached references they depend on nothing else: references see only themselves, at a fixed
    timestep. A call that reads the bank gives the images that one with these `image`s gives, to rounding, whatever
    prompt, seed, size and number of steps, and without the first step's pass over the references. (Without a height and
    width, a call takes its pipeline's default; with `image`s it would take the size of the first.)

    Args:
        pipeline: a Flux2KleinKVPipeline. image: the references, as the pipeline takes them; several see each other.
        rotated: False keeps keys before RoPE, for other positions: `TransformerReferenceBank.place`.

    Raises:
        NotImplementedError: another pipeline. Their calls need the reference images for more than these keys
            (GLM-Image, Wan-Animate 2) or compute them in one prefix with the prompt (Qwen-Image 2.1); in Flux Kontext,
            Qwen-Image-Edit and Flux.2 without a cache the references see the target, and have no keys of their own.
        ValueError: an image that is none, or smaller than the pipeline takes; no image; another `rotated`.
    """
    if not isinstance(pipeline, Flux2KleinKVPipeline):
        hint = "other pipelines need the images in every call"
        fail(_OP, "pipeline", "a Flux2KleinKVPipeline", type(pipeline).__name__, hint, NotImplementedError)
    images = [image] if isinstance(image, Image.Image) else image
    if not isinstance(images, Sequence) or not images or not all(isinstance(x, Image.Image) for x in images):
        one = isinstance(images, str) or not isinstance(images, Sequence)
        got = type(image).__name__ if one else [type(x).__name__ for x in images]
        fail(_OP, "image", "a PIL image or a list of them", got)
    check_choice(_OP, "rotated", rotated, (True, False))
    model, device = pipeline.transformer, pipeline._execution_device
    if not reference_layers(model):
        hint = "call remove() of the installation that replaced them"
        fail(_OP, "pipeline", "one whose transformer has its stock processors", "others", hint)
    prepared = [_prepared(pipeline, x) for x in images]
    latents, ids = pipeline.prepare_image_latents(prepared, 1, None, device, pipeline.vae.dtype)
    latents = latents.to(model.dtype)
    text = latents.new_zeros(1, 1, model.config.joint_attention_dim)  # references do not see it
    with use_cached_references(model) as installation:
        for processor in installation.processors.values():
            cast(ReadsReferences, processor).keeps_unrotated = not rotated
        _, cache = model(
            hidden_states=latents,
            encoder_hidden_states=text,
            timestep=latents.new_zeros(1),
            txt_ids=ids.new_zeros(1, 1, ids.shape[-1]),
            img_ids=ids,
            kv_cache_mode="extract",
            num_ref_tokens=latents.shape[1],
            return_dict=False,
        )
    pipeline.maybe_free_model_hooks()
    sources = {
        f"{kind}.{i}.attn": Source(*layer.get())
        for kind, layers in (
            ("transformer_blocks", cache.double_block_caches),
            ("single_transformer_blocks", cache.single_block_caches),
        )
        for i, layer in enumerate(layers)
    }
    return TransformerReferenceBank(sources, model=model_of(model), ids=ids[0].float(), rotated=rotated)


def _prepared(pipeline: Flux2KleinKVPipeline, image: Image.Image) -> Tensor:
    """An image as the pipeline's own call prepares it: at most a megapixel, sides that the latents' patches divide."""
    processor, side = pipeline.image_processor, pipeline.vae_scale_factor * 2
    try:
        processor.check_image_input(image)
    except ValueError as error:  # the pipeline's own limits
        fail(_OP, "image", "one that the pipeline takes", f"{image.width} x {image.height} pixels", str(error))
    if image.width * image.height > _LARGEST:
        image = processor._resize_to_target_area(image, _LARGEST)
    width, height = image.width // side * side, image.height // side * side
    if width == 0 or height == 0:
        fail(_OP, "image", f"at least {side} x {side} pixels", f"{image.width} x {image.height}")
    return processor.preprocess(image, height=height, width=width, resize_mode="crop")
