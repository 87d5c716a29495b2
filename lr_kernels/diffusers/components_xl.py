"""Stable Diffusion XL with a personalized model beside the vanilla one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .components import PersonalizedPipeline
from .condition import Condition
from .pictures import Image


class PersonalizedStableDiffusionXLPipeline(PersonalizedPipeline, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with the components of `PersonalizedPipeline` and

    personalized_text_encoder, personalized_text_encoder_2: the text encoders that belong to the personalized UNet.
        Default: `text_encoder`, `text_encoder_2`.
    """

    model_cpu_offload_seq = (
        "text_encoder->text_encoder_2->personalized_text_encoder->personalized_text_encoder_2->image_encoder->unet"
        "->personalized_unet->vae"
    )
    _optional_components: ClassVar[list[str]] = [
        "image_encoder",
        "feature_extractor",
        "personalized_unet",
        "personalized_text_encoder",
        "personalized_text_encoder_2",
        "controlnet",
    ]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        personalized_unet: UNet2DConditionModel | None = None,
        personalized_text_encoder: CLIPTextModel | None = None,
        personalized_text_encoder_2: CLIPTextModelWithProjection | None = None,
        controlnet: ControlNetModel | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        personalized_adapters: list[str] | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_modules(
            personalized_unet=personalized_unet,
            personalized_text_encoder=personalized_text_encoder,
            personalized_text_encoder_2=personalized_text_encoder_2,
            controlnet=controlnet,
        )
        self.set_personalized_adapters(personalized_adapters)
        self._interrupt = False

    def text_encoders(self, personal: bool) -> list[torch.nn.Module]:
        vanilla = [self.text_encoder, self.text_encoder_2]
        own = [self.personalized_text_encoder, self.personalized_text_encoder_2]
        return [o if personal and o is not None else v for o, v in zip(own, vanilla)]

    def embed(self, prompts: Sequence[str | None], size: tuple[int, int], *, personal: bool) -> Condition:
        device = self._execution_device
        hidden, pooled = [], None
        for tokenizer, encoder in zip((self.tokenizer, self.tokenizer_2), self.text_encoders(personal)):
            texts = self.maybe_convert_prompt([prompt or "" for prompt in prompts], tokenizer)
            length = tokenizer.model_max_length
            ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            out = encoder(ids.input_ids.to(device), output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            pooled = out[0]  # of the second encoder in the end
        embeds = torch.cat(hidden, -1)
        if self.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([prompt is None for prompt in prompts], device=device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        pixels = tuple(x * self.vae_scale_factor for x in size)
        projection = self.text_encoder_2.config.projection_dim
        times = self._get_add_time_ids(pixels, (0, 0), pixels, embeds.dtype, projection).to(device)
        return Condition(embeds, {"text_embeds": pooled, "time_ids": times.expand(len(embeds), -1)})

    @contextmanager
    def vae_precision(self) -> Iterator[None]:
        """In float32 where float16 would overflow."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.to(dtype=torch.float32)
        try:
            yield
        finally:
            if upcast:
                self.vae.to(dtype=torch.float16)

    def finish(self, pixels: Tensor, output_type: str) -> tuple[Image, None]:
        if self.watermark is not None:
            pixels = self.watermark.apply_watermark(pixels)
        return super().finish(pixels, output_type)
