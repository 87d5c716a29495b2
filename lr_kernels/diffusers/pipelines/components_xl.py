"""Stable Diffusion XL with a personalized model beside the vanilla one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
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
from transformers.modeling_outputs import BaseModelOutput

from .components import PersonalizedPipeline
from .condition import Condition
from .latents import upcast
from .pictures import Images
from .stock import StockArguments
from .text import Embeds, TextReader, hidden_states


class PersonalizedStableDiffusionXLPipeline(PersonalizedPipeline, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with the components of `PersonalizedPipeline` and

    personalized_text_encoder, personalized_text_encoder_2: the text encoders that belong to the personalized UNet.
        Default: `text_encoder`, `text_encoder_2`.
    """

    stock_module = StableDiffusionXLPipeline.__module__
    pools = True
    addition_embed_types = ("text_time",)
    other_class = "Stable Diffusion 1.x and 2.x have a pipeline of their own, StableDiffusionLayoutRetouchPipeline"
    _callback_tensor_inputs: ClassVar[list[str]] = [*StableDiffusionXLPipeline._callback_tensor_inputs, "image"]
    model_cpu_offload_seq = (
        "text_encoder->text_encoder_2->personalized_text_encoder->personalized_text_encoder_2->image_encoder->unet"
        "->personalized_unet->vae"
    )
    _optional_components: ClassVar[list[str]] = [
        *StableDiffusionXLPipeline._optional_components,
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

    def readers(self, personal: bool) -> list[TextReader]:
        """The two text encoders, or the personalized ones where there are such."""
        found = []
        for suffix in ("", "_2"):
            name = f"text_encoder{suffix}"
            if personal and getattr(self, f"personalized_{name}") is not None:
                name = f"personalized_{name}"
            found.append(TextReader(name, getattr(self, f"tokenizer{suffix}"), getattr(self, name)))
        first, second = found
        if first.encoder is None and first.tokenizer is None and second.encoder is not None:
            return [second]  # as of a refiner
        return found

    def embed(self, texts: Sequence[str], *, personal: bool, clip_skip: int | None = None) -> Embeds:
        """Hidden states of both text encoders side by side, and the pooled embeddings of the second."""

        def last(out: BaseModelOutput) -> Tensor:
            return out.hidden_states[-2 - (clip_skip or 0)]

        found = [hidden_states(self, reader, texts, last) for reader in self.readers(personal)]
        pooled = found[-1][1]  # of the second encoder
        return Embeds(torch.cat([tokens for tokens, _ in found], -1).to(self.prompt_dtype), pooled)

    def zeroes(self, negatives: Sequence[str | None]) -> bool:
        """Whether they are all without text and the model was trained with zeros for that."""
        return self.config.force_zeros_for_empty_prompt and all(text is None for text in negatives)

    def condition(
        self, embeds: Embeds, size: tuple[int, int], stock: StockArguments, *, negative: bool = False
    ) -> Condition:
        """The prompts with the pooled embeddings and the sizes."""
        told = super().condition(embeds, size, stock)
        assert embeds.pooled is not None
        height, width = (x * self.vae_scale_factor for x in size)
        sizes = stock.sizes((height, width), negative=negative)
        times = self._get_add_time_ids(*sizes, embeds.tokens.dtype, embeds.pooled.shape[-1]).to(embeds.tokens.device)
        return told._replace(added={"text_embeds": embeds.pooled, "time_ids": times.expand(len(embeds.tokens), -1)})

    def vae_precision(self) -> AbstractContextManager:
        """In float32 where float16 would overflow."""
        return upcast(self.vae)

    def finish(self, pixels: Tensor, output_type: str) -> tuple[Images, list[bool] | None]:
        """Images with the watermark, where there is one."""
        if self.watermark is not None:
            pixels = self.watermark.apply_watermark(pixels)
        return super().finish(pixels, output_type)
