"""Checks that the components of a pipeline belong together, before a call computes anything."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ...runtime.checks import fail
from .components import PersonalizedPipeline, context_width
from .settings import OP

_TEXT_TO_IMAGE = "load a text-to-image UNet; those of inpainting, InstructPix2Pix and upscaling have further inputs"
_CLIP = (CLIPTextModel, CLIPTextModelWithProjection)
"""The text encoders whose widths are known from their configs."""


def plain(module: Any) -> Any:
    """The module without the wrapper of torch.compile."""
    return getattr(module, "_orig_mod", module)


def check_models(pipe: PersonalizedPipeline) -> None:
    """Check what every call needs.

    Raises:
        ValueError: a component that is missing or does not fit the others, named with the remedy. NotImplementedError:
        a UNet with inputs that the method does not have.
    """
    unets = {"unet": pipe.unet}
    if pipe.personalized_unet is not None:
        unets["personalized_unet"] = pipe.personalized_unet
    for name, unet in unets.items():
        _check_unet(pipe, name, unet)
    if len(unets) == 2:
        _check_pair(pipe)
    _check_dtypes(pipe, unets)


def check_vae(pipe: PersonalizedPipeline) -> None:
    """Check what a call needs that decodes or encodes: an autoencoder that can be called as the stock pipelines call
    it."""
    vae = pipe.vae
    if vae is None:
        fail(OP, "vae", "an autoencoder", None, "pass one, or output_type='latent' where no image is encoded")
    name, config = type(plain(vae)).__name__, vae.config
    for attribute in ("scaling_factor", "latent_channels"):
        if getattr(config, attribute, None) is None:
            fail(OP, "vae", f"an autoencoder of images whose config has {attribute}", name)
    channels = pipe.unet.config.out_channels
    if config.latent_channels != channels:
        fail(OP, "vae", f"latents of {channels} channels, as unet's", f"{name} of {config.latent_channels}")
    _, *others = inspect.signature(plain(vae).decode).parameters.values()
    for parameter in others:
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            fail(OP, "vae", "an autoencoder that decodes latents alone", f"{name}, which also takes {parameter.name}")


def check_controlnet(pipe: PersonalizedPipeline) -> None:
    """Check what a call with a control_image needs: a ControlNet whose residuals fit the features of both UNets."""
    if not isinstance(plain(pipe.controlnet), ControlNetModel):
        got = type(pipe.controlnet).__name__
        fail(OP, "controlnet", "a ControlNetModel", got, error=NotImplementedError)
    config = pipe.controlnet.config
    for name, unet in (("unet", pipe.unet), (pipe.personal_name, pipe.personal_unet)):
        for key in ("block_out_channels", "layers_per_block", "cross_attention_dim"):
            wanted, has = (_hashable(getattr(x, key)) for x in (unet.config, config))
            if has != wanted:
                fail(OP, "controlnet", f"{key} {wanted}, as {name}", has, "pass a ControlNet that was made for it")
    factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    if factor != pipe.vae_scale_factor:
        expected = f"one that makes {pipe.vae_scale_factor} pixels one, as the VAE"
        fail(OP, "controlnet", expected, factor, "see its conditioning_embedding_out_channels")


def _hashable(x: object) -> object:
    """A setting in a form that can be compared: loaded configs have lists where new ones have tuples."""
    return tuple(x) if isinstance(x, list) else x


def _check_unet(pipe: PersonalizedPipeline, name: str, unet: UNet2DConditionModel) -> None:
    config = unet.config
    if config.in_channels != config.out_channels:
        fail(OP, name, f"{config.out_channels} input channels, as it has outputs", config.in_channels, _TEXT_TO_IMAGE)
    latents = getattr(getattr(pipe.vae, "config", None), "latent_channels", config.in_channels)
    if config.in_channels != latents:
        fail(OP, name, f"latents of {latents} channels, as vae's", config.in_channels)
    kind = config.encoder_hid_dim_type
    if kind not in (None, "text_proj"):
        fail(OP, name, "one without image embeddings", kind, "call unload_ip_adapter() first", NotImplementedError)
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        got = config.class_embed_type or f"{config.num_class_embeds} classes"
        fail(OP, name, "one without class labels", got, "no pipeline passes any", NotImplementedError)
    if config.addition_embed_type not in pipe.addition_embed_types:
        expected = " or ".join(f"addition_embed_type {kind!r}" for kind in pipe.addition_embed_types)
        fail(OP, name, expected, repr(config.addition_embed_type), pipe.other_class)
    width = context_width(unet)
    readers = pipe.readers(personal=name != "unet")
    if width is not None and all(isinstance(plain(reader.encoder), _CLIP) for reader in readers):
        made = sum(reader.encoder.config.hidden_size for reader in readers)
        if made != width:
            encoders = " and ".join(reader.name for reader in readers)
            hint = f"pass the text encoders that {name} was trained with"
            fail(OP, name, f"text embeddings of {made} channels, as {encoders} make them", width, hint)
    if config.addition_embed_type == "text_time" and isinstance(plain(readers[-1].encoder), _CLIP):
        projected = readers[-1].encoder.config.projection_dim
        taken, made = plain(unet).add_embedding.linear_1.in_features, 6 * config.addition_time_embed_dim + projected
        if taken != made:
            hint = f"pass the text encoders that {name} was trained with"
            fail(OP, name, f"{made} added conditions, of 6 sizes and {readers[-1].name}", taken, hint)


def _check_pair(pipe: PersonalizedPipeline) -> None:
    """Refuse a personalized UNet that cannot go on where the vanilla one stops."""
    vanilla, personal = pipe.unet, pipe.personalized_unet
    for key in ("in_channels", "time_cond_proj_dim"):
        expected, got = getattr(vanilla.config, key), getattr(personal.config, key)
        if got != expected:
            hint = "personalize the same base model"
            fail(OP, "personalized_unet", f"{key} {expected}, as unet", got, hint)
    here, there = (sorted(_block_kinds(unet)) for unet in (vanilla, personal))
    if here and there and here != there:
        hint = "what has patched one, as tomesd.apply_patch(pipe.unet), has to patch both, or to be removed"
        fail(OP, "personalized_unet", f"transformer blocks of the kind of unet's, {here}", there, hint)


def _block_kinds(unet: UNet2DConditionModel) -> Iterator[str]:
    """The classes of a UNet's transformer blocks. Patches such as ToMe replace them."""
    lists = (module for name, module in unet.named_modules() if name.endswith(".transformer_blocks"))
    kinds = {type(plain(block)) for blocks in lists for block in blocks}
    return (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)


def _check_dtypes(pipe: PersonalizedPipeline, unets: dict[str, nn.Module]) -> None:
    """Refuse models of several precisions that pass tensors on to each other. Autocast brings them to one, so it may
    have them."""
    if torch.is_autocast_enabled(pipe._execution_device.type):
        return
    readers = [*pipe.readers(personal=False), *pipe.readers(personal=True)]
    models = {**unets, **{reader.name: reader.encoder for reader in readers}, "controlnet": pipe.controlnet}
    expected = pipe.unet.dtype
    for name, model in models.items():
        got = getattr(model, "dtype", expected)
        if got != expected and {got, expected} <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
            fail(OP, name, f"{expected}, as unet", got, "bring all components to one precision: pipe.to(dtype)")
