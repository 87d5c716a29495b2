"""A Stable Diffusion pipeline with a personalized UNet beside the vanilla one, and the steps that its stages share."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..checks import fail
from .inversion import add_noise, invert
from .output import timed
from .processors import AttentionState
from .routing import token_mask
from .schedule import check_scheduler
from .subject import SubjectMaps, SubjectTokens, find_subject

OP = "layout_retouch"
MAP_TIMES = (0.25, 0.4, 0.55)
"""Noise levels, as shares of the training timesteps, at which the maps of given images are taken."""

REFERENCE_SEED = 0
"""The reference is noised by a seed of its own, so that its mask and latents are the same for every image."""

Image = PIL.Image.Image | np.ndarray | Tensor
Generator = torch.Generator | list[torch.Generator] | None
Callback = Callable[[StableDiffusionPipeline, int, Tensor, dict], dict] | None


class GivenImages(NamedTuple):
    """Images that the retouch stage reads: contexts, if any, then the reference; m rows."""

    latents: Tensor
    """(m, C, h, w), clean"""
    noise: Tensor
    """(m, C, h, w)"""
    embeds: Tensor
    """(m, L, C) of their prompts"""
    tokens: SubjectTokens
    """the subject in their prompts"""


class PersonalizedStableDiffusionPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` with two more components.

        personalized_unet: the UNet after DreamBooth, LoRA or another personalization.
        personalized_text_encoder: the text encoder that belongs to it. Default: `text_encoder`.

    The scheduler must be a `DDIMScheduler` with epsilon or v_prediction and without clipping.
    """

    model_cpu_offload_seq = "text_encoder->personalized_text_encoder->image_encoder->unet->personalized_unet->vae"
    _optional_components: ClassVar[list[str]] = [
        *StableDiffusionPipeline._optional_components,
        "personalized_text_encoder",
    ]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        personalized_unet: UNet2DConditionModel,
        personalized_text_encoder: CLIPTextModel | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(personalized_unet=personalized_unet, personalized_text_encoder=personalized_text_encoder)
        self._interrupt = False

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: object) -> "PersonalizedStableDiffusionPipeline":
        """Build the pipeline from the components of another one: `from_pipe(pipe, personalized_unet=…)`.

        The components keep their dtype unless another one is given (diffusers casts them to float32). ValueError where
        they have several and none is given.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            components = {**pipeline.components, **kwargs}.values()
            dtypes = {x.dtype for x in components if isinstance(x, torch.nn.Module)}
            if len(dtypes) > 1:
                fail("from_pipe", "dtype", "a dtype, since the components have several", sorted(map(str, dtypes)))
            kwargs["dtype"] = dtypes.pop()
        return super().from_pipe(pipeline, **kwargs)

    @property
    def personal_encoder(self) -> CLIPTextModel:
        """The text encoder for prompts with the subject."""
        return self.text_encoder if self.personalized_text_encoder is None else self.personalized_text_encoder

    def encode_images(self, images: Image | list[Image], height: int, width: int) -> Tensor:
        """Images in any form of `VaeImageProcessor`, resized -> clean latents (n, C, height/f, width/f)."""
        pixels = self.image_processor.preprocess(images, height, width)
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor, output_type: str, seconds: dict[str, float]) -> tuple[Image, list[bool] | None]:
        """Latents (n, C, h, w) -> images, and what the safety checker found."""
        if output_type == "latent":
            return latents, None
        with timed(seconds, "decode", latents.device):
            pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
            pixels, nsfw = self.run_safety_checker(pixels, latents.device, latents.dtype)
            denormalize = None if nsfw is None else [not flag for flag in nsfw]
            images = self.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=denormalize)
        return images, nsfw

    def given_images(
        self,
        context_latents: Tensor | None,
        reference_image: Image,
        size: tuple[int, int],
        embeds: Tensor,
        tokens: SubjectTokens,
        generator: Generator,
    ) -> GivenImages:
        """Contexts, if any, and the reference, resized to `size` latents; embeds and tokens end with theirs."""
        reference = self.encode_images(reference_image, *(x * self.vae_scale_factor for x in size)).to(embeds.dtype)
        if len(reference) != 1:
            fail(OP, "reference_image", "one image", len(reference))
        noise = noise_like(reference, torch.Generator(reference.device).manual_seed(REFERENCE_SEED))
        latents = reference
        if context_latents is not None:
            latents = torch.cat([context_latents, reference])
            noise = torch.cat([noise_like(context_latents, generator), noise])
        rows = slice(-len(latents), None)
        return GivenImages(latents, noise, embeds[rows], tokens.rows(rows))

    @torch.no_grad()
    def subject_maps(self, images: GivenImages, *, backend: str = "auto") -> Tensor:
        """Cross-attention maps of the subject in given images: fp32 (m, layers x 3 noise levels, rows, columns)."""
        state = AttentionState(capturing=True, token_indices=images.tokens.indices, backend=backend)
        maps = []
        with SubjectMaps(self.personalized_unet, state, images.latents.shape[2:]) as recorder:
            for share in MAP_TIMES:
                t = round(share * self.scheduler.config.num_train_timesteps)
                noised = add_noise(images.latents, images.noise, self.scheduler.alphas_cumprod[t])
                self.personalized_unet(noised, t, encoder_hidden_states=images.embeds)
                maps.append(recorder.collect(slice(None), images.tokens.weights))
        return torch.cat(maps, 1)

    @torch.no_grad()
    def invert(self, images: GivenImages, *, start: int = 0, backend: str = "auto") -> list[Tensor]:
        """DDIM inversion of images by the personalized UNet: see `inversion.invert`."""
        embeds = images.embeds
        with self.progress_bar(total=len(self.scheduler.timesteps) - start) as bar:
            return invert(
                lambda x, t: self.personalized_unet(x, t, encoder_hidden_states=embeds, return_dict=False)[0],
                images.latents,
                self.scheduler,
                start=start,
                backend=backend,
                after_step=bar.update,
            )

    def begin(self, num_inference_steps: int, device: torch.device) -> Tensor:
        """Check the scheduler and set its timesteps, which are returned."""
        check_scheduler(self.scheduler)
        self._interrupt = False
        self._num_timesteps = num_inference_steps
        self.scheduler.set_timesteps(num_inference_steps)
        return self.scheduler.timesteps.to(device)

    def embed(self, encoder: CLIPTextModel, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Prompts -> hidden states (n, L, C), in the text encoder's dtype."""
        prompts = self.maybe_convert_prompt(list(prompts), self.tokenizer)
        length = self.tokenizer.model_max_length
        inputs = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        use_mask = getattr(encoder.config, "use_attention_mask", False)
        mask = inputs.attention_mask.to(device) if use_mask else None
        return encoder(inputs.input_ids.to(device), attention_mask=mask)[0]

    def subject_tokens(self, prompts: Sequence[str], words: Sequence[str], device: torch.device) -> SubjectTokens:
        """Where the subject's words are in each prompt, as `embed` tokenizes it."""
        prompts, words = (self.maybe_convert_prompt(list(x), self.tokenizer) for x in (prompts, words))
        return find_subject(self.tokenizer, prompts, words, device)

    def initial_latents(
        self,
        count: int,
        height: int | None,
        width: int | None,
        dtype: torch.dtype,
        generator: Generator,
        latents: Tensor | None,
    ) -> Tensor:
        """Given or random noise (count, C, height/f, width/f)."""
        f, side = self.vae_scale_factor, self.unet.config.sample_size
        default = (side, side) if isinstance(side, int) else side
        size = []
        for name, pixels, latent_side in zip(("height", "width"), (height, width), default):
            if pixels is not None and pixels % f:
                fail(OP, name, f"a multiple of {f}", pixels)
            size.append(latent_side * f if pixels is None else pixels)
        channels, device = self.unet.config.in_channels, self._execution_device
        if latents is not None:
            given_size = latents.shape[2:] if height is None and width is None else [x // f for x in size]
            shape = (count, channels, *given_size)
            if latents.shape != shape:
                fail(OP, "latents", f"shape {shape}", tuple(latents.shape))
            latents = latents.to(dtype)
        return self.prepare_latents(count, channels, *size, dtype, device, generator, latents)

    def after_step(self, callback: Callback, step: int, t: Tensor, latents: Tensor) -> Tensor:
        """Run callback_on_step_end; the latents, or those it returns."""
        if callback is None:
            return latents
        return (callback(self, step, t, {"latents": latents}) or {}).get("latents", latents)


def noise_like(latents: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise (n, C, h, w) from one generator, or from one per row."""
    return randn_tensor(latents.shape, generator, latents.device, latents.dtype)


def as_list(x: str | Sequence[str] | None, count: int | None = None, name: str = "prompt") -> list[str]:
    """One string or several -> a list of `count`."""
    x = [x] if isinstance(x, str) else list(x)
    if count is None or len(x) == count:
        return x
    if len(x) != 1:
        fail(OP, name, f"1 or {count} strings, as there are prompts", len(x))
    return x * count


def as_mask(mask: Image, size: tuple[int, int], device: torch.device) -> Tensor:
    """A mask of any size, above half its range (255 for images, else 1) on the subject -> bool (1, *size)."""
    if isinstance(mask, PIL.Image.Image):
        mask = np.asarray(mask.convert("L")) > 127
    mask = torch.as_tensor(mask).squeeze()
    if mask.dim() != 2:
        fail(OP, "reference_mask", "shape (height, width)", tuple(mask.shape))
    return token_mask(mask[None] > 0.5, tuple(size)).unflatten(1, tuple(size)).to(device)
