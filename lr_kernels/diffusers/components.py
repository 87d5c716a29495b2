"""Stable Diffusion pipelines with a personalized model beside the vanilla one, and the steps that the stages share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar, NamedTuple

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..checks import fail
from .adapters import adapters_off, check_free
from .condition import Condition, Control, predict
from .inversion import add_noise, invert
from .matching import FeatureRecorder
from .output import timed
from .processors import AttentionState
from .routing import token_mask
from .schedule import check_scheduler
from .subject import SubjectMaps, SubjectTokens, find_subjects

OP = "layout_retouch"
MAP_TIMES = (0.25, 0.4, 0.55)
"""Noise levels, as shares of the training timesteps, at which the maps of given images are taken."""

REFERENCE_SEED = 0
"""References are noised by a seed of its own, so that their masks and latents are the same for every image."""

Image = PIL.Image.Image | np.ndarray | Tensor
Generator = torch.Generator | list[torch.Generator] | None
Callback = Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None


class GivenImages(NamedTuple):
    """Images that the retouch stage reads: contexts, if any, then references; m rows."""

    latents: Tensor
    """(m, C, h, w), clean"""
    noise: Tensor
    """(m, C, h, w)"""
    condition: Condition
    """of their prompts"""
    tokens: SubjectTokens
    """the subjects in their prompts"""


class PersonalizedPipeline:
    """What the stages need of a Stable Diffusion pipeline that has, besides its own components,

        personalized_unet: the UNet after DreamBooth or another personalization. None: `unet` itself, whose LoRA
            adapters then are the personalization: the vanilla model is the same one with them off. Without adapters
            (textual inversion) the models differ in their prompts only.
        personalized_adapters: names of the adapters that the vanilla model does not have. None: all.
        controlnet: follows `control_image`.

    The scheduler must be a `DDIMScheduler` with epsilon or v_prediction and without clipping.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: object) -> "PersonalizedPipeline":
        """Build the pipeline from the components of another one: `from_pipe(pipe, personalized_unet=…)`.

        The components keep their dtype unless another one is given (diffusers casts them to float32). ValueError where
        they have several and none is given.
        """
        controlnet = kwargs.get("controlnet", pipeline.components.get("controlnet"))
        if controlnet is not None and not isinstance(controlnet, ControlNetModel):
            got = type(controlnet).__name__
            fail("from_pipe", "controlnet", "a ControlNetModel or None", got, "pass controlnet=", NotImplementedError)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            components = {**pipeline.components, **kwargs}.values()
            dtypes = {x.dtype for x in components if isinstance(x, torch.nn.Module)}
            if len(dtypes) > 1:
                fail("from_pipe", "dtype", "a dtype, since the components have several", sorted(map(str, dtypes)))
            kwargs["dtype"] = dtypes.pop()
        return super().from_pipe(pipeline, **kwargs)

    # To be said by each kind of pipeline

    def text_encoders(self, personal: bool) -> list[torch.nn.Module]:
        """Those of the vanilla or the personalized model."""
        raise NotImplementedError

    def embed(self, prompts: Sequence[str | None], size: tuple[int, int], *, personal: bool) -> Condition:
        """Prompts, None for no text, -> conditions, for latents of that size."""
        raise NotImplementedError

    def vae_precision(self) -> AbstractContextManager:
        """In which the VAE runs."""
        return nullcontext()

    def finish(self, pixels: Tensor, output_type: str) -> tuple[Image, list[bool] | None]:
        """Decoded pixels (n, 3, H, W) in [-1, 1] -> images, and what a safety checker found."""
        return self.image_processor.postprocess(pixels, output_type=output_type), None

    # Shared

    def set_personalized_adapters(self, names: str | list[str] | None) -> None:
        """Which adapters of `unet` only the personalized model has; None: all."""
        if names is not None and self.personalized_unet is not None:
            fail(OP, "personalized_adapters", "None, since personalized_unet is given", names)
        names = [names] if isinstance(names, str) else names
        self.register_to_config(personalized_adapters=None if names is None else list(names))

    @property
    def personal_unet(self) -> UNet2DConditionModel:
        """The UNet for prompts with the subject."""
        return self.unet if self.personalized_unet is None else self.personalized_unet

    @contextmanager
    def as_vanilla(self) -> Iterator[None]:
        """While it lasts `unet` and the text encoders are the vanilla model's."""
        if self.personalized_unet is not None:
            yield
            return
        with adapters_off(OP, [self.unet, *self.text_encoders(personal=False)], self.config.personalized_adapters):
            yield

    def encode_images(self, images: Image | list[Image], height: int, width: int) -> Tensor:
        """Images in any form of `VaeImageProcessor`, resized -> clean latents (n, C, height/f, width/f)."""
        pixels = preprocess(self.image_processor, images, height, width)
        with self.vae_precision():
            pixels = pixels.to(self._execution_device, self.vae.dtype)
            latents = self.vae.encode(pixels).latent_dist.mode()
        mean, scale = self._latent_statistics(latents)
        return (latents - mean) * scale

    def decode(self, latents: Tensor, output_type: str, seconds: dict[str, float]) -> tuple[Image, list[bool] | None]:
        """Latents (n, C, h, w) -> images, and what the safety checker found."""
        if output_type == "latent":
            return latents, None
        with timed(seconds, "decode", latents.device):
            mean, scale = self._latent_statistics(latents)
            with self.vae_precision():
                pixels = self.vae.decode((latents / scale + mean).to(self.vae.dtype), return_dict=False)[0]
            return self.finish(pixels, output_type)

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean of what the VAE makes, and what it is multiplied by: (made - mean) * scale are latents."""
        config = self.vae.config
        mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or deviation is None:
            return 0.0, config.scaling_factor
        mean, deviation = (torch.tensor(x).view(1, -1, 1, 1).to(like) for x in (mean, deviation))
        return mean, config.scaling_factor / deviation

    def given_images(
        self, contexts: Tensor | None, references: Tensor, condition: Condition, tokens: SubjectTokens,
        generator: Generator,
    ) -> GivenImages:  # fmt: skip
        """Latents of contexts, if any, and references, (R, C, h, w), R may be 0; condition and tokens are theirs."""
        parts, noise = [references], []
        if contexts is not None:
            parts, noise = [contexts, references], [noise_like(contexts, generator)]
        one = noise_like(references[:1], torch.Generator(references.device).manual_seed(REFERENCE_SEED))
        noise.append(one.expand_as(references))
        return GivenImages(torch.cat(parts), torch.cat(noise), condition, tokens)

    @torch.no_grad()
    def subject_maps(
        self, images: GivenImages, features: FeatureRecorder | None = None, *, backend: str = "auto"
    ) -> Tensor:
        """Cross-attention maps of the subjects in m given images: fp32 (S, m, layers x 3 noise levels, rows, columns).

        features: records what `matching` needs at the lowest of the noise levels.
        """
        state = AttentionState(capturing=True, token_indices=images.tokens.indices, backend=backend)
        maps = []
        with SubjectMaps(self.personal_unet, state, images.latents.shape[2:]) as recorder:
            for share in MAP_TIMES:
                t = round(share * self.scheduler.config.num_train_timesteps)
                noised = add_noise(images.latents, images.noise, self.scheduler.alphas_cumprod[t])
                with nullcontext() if features is None or share != MAP_TIMES[0] else features:
                    predict(self.personal_unet, noised, t, images.condition)
                maps.append(recorder.collect(slice(None), images.tokens.weights))
        return torch.cat(maps, 2)

    @torch.no_grad()
    def invert(self, images: GivenImages, *, start: int = 0, backend: str = "auto") -> list[Tensor]:
        """DDIM inversion of images by the personalized UNet: see `inversion.invert`."""
        with self.progress_bar(total=len(self.scheduler.timesteps) - start) as bar:
            return invert(
                lambda x, t: predict(self.personal_unet, x, t, images.condition),
                images.latents,
                self.scheduler,
                start=start,
                backend=backend,
                after_step=bar.update,
            )

    def begin(self, num_inference_steps: int, device: torch.device) -> Tensor:
        """Check the scheduler and set its timesteps, which are returned."""
        check_scheduler(self.scheduler)
        check_free(OP, [self.unet, self.personal_unet])
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            fail(OP, "num_inference_steps", "a positive integer", num_inference_steps)
        for unet in (self.unet, self.personal_unet):
            if unet.config.encoder_hid_dim_type is not None:
                got, hint = unet.config.encoder_hid_dim_type, "call unload_ip_adapter() first"
                fail(OP, "unet", "one without image embeddings", got, hint, NotImplementedError)
        self._interrupt = False
        self._num_timesteps = num_inference_steps
        self.scheduler.set_timesteps(num_inference_steps)
        return self.scheduler.timesteps.to(device)

    def subject_tokens(
        self, prompts: Sequence[str], subjects: Sequence[Sequence[str]], shows: Sequence[int | None]
    ) -> SubjectTokens:
        """Where the subjects' words are in each prompt, as `embed` tokenizes it."""
        prompts = self.maybe_convert_prompt(list(prompts), self.tokenizer)
        subjects = [self.maybe_convert_prompt(list(words), self.tokenizer) for words in subjects]
        return find_subjects(self.tokenizer, prompts, subjects, self._execution_device, shows)

    def latent_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """(height, width) of the latents. Default: those given, or the UNet's sample size."""
        f, side = self.vae_scale_factor, self.unet.config.sample_size
        default = (side, side) if isinstance(side, int) else side
        if latents is not None and height is None and width is None:
            default = latents.shape[2:]
        size = []
        for name, pixels, latent_side in zip(("height", "width"), (height, width), default):
            if pixels is not None and (pixels % f or pixels < f):
                fail(OP, name, f"a multiple of {f}", pixels)
            size.append(latent_side if pixels is None else pixels // f)
        return tuple(size)

    def initial_latents(
        self, count: int, size: tuple[int, int], dtype: torch.dtype, generator: Generator, latents: Tensor | None
    ) -> Tensor:
        """Given or random noise (count, C, *size)."""
        channels = self.unet.config.in_channels
        if latents is not None:
            shape = (count, channels, *size)
            if latents.shape != shape:
                fail(OP, "latents", f"shape {shape}", tuple(latents.shape))
            latents = latents.to(dtype)
        pixels = (x * self.vae_scale_factor for x in size)
        return self.prepare_latents(count, channels, *pixels, dtype, self._execution_device, generator, latents)

    def control(
        self, image: Image | list[Image] | None, scale: float, count: int, size: tuple[int, int], dtype: torch.dtype
    ) -> Control | None:
        """What the ControlNet follows: one image for all, or one for each of `count`."""
        if image is None:
            return None
        if self.controlnet is None:
            fail(OP, "control_image", "None, since the pipeline has no controlnet", type(image).__name__)
        processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)
        pixels = preprocess(processor, image, *(x * self.vae_scale_factor for x in size))
        if len(pixels) not in (1, count):
            fail(OP, "control_image", f"1 or {count} images, as there are prompts", len(pixels))
        pixels = pixels.expand(count, -1, -1, -1).to(self._execution_device, dtype)
        return Control(self.controlnet, pixels, scale)

    def after_step(self, callback: Callback, step: int, t: Tensor, latents: Tensor) -> Tensor:
        """Run callback_on_step_end; the latents, or those it returns."""
        if callback is None:
            return latents
        return (callback(self, step, t, {"latents": latents}) or {}).get("latents", latents)


class PersonalizedStableDiffusionPipeline(PersonalizedPipeline, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with the components of `PersonalizedPipeline` and

    personalized_text_encoder: the text encoder that belongs to the personalized UNet. Default: `text_encoder`.
    """

    model_cpu_offload_seq = "text_encoder->personalized_text_encoder->image_encoder->unet->personalized_unet->vae"
    _optional_components: ClassVar[list[str]] = [
        *StableDiffusionPipeline._optional_components,
        "personalized_unet",
        "personalized_text_encoder",
        "controlnet",
    ]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        personalized_unet: UNet2DConditionModel | None = None,
        personalized_text_encoder: CLIPTextModel | None = None,
        controlnet: ControlNetModel | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
        personalized_adapters: list[str] | None = None,
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
        self.register_modules(
            personalized_unet=personalized_unet,
            personalized_text_encoder=personalized_text_encoder,
            controlnet=controlnet,
        )
        self.set_personalized_adapters(personalized_adapters)
        self._interrupt = False

    def text_encoders(self, personal: bool) -> list[torch.nn.Module]:
        own = self.personalized_text_encoder
        return [own if personal and own is not None else self.text_encoder]

    def embed(self, prompts: Sequence[str | None], size: tuple[int, int], *, personal: bool) -> Condition:
        (encoder,) = self.text_encoders(personal)
        device = self._execution_device
        prompts = self.maybe_convert_prompt([prompt or "" for prompt in prompts], self.tokenizer)
        length = self.tokenizer.model_max_length
        inputs = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        use_mask = getattr(encoder.config, "use_attention_mask", False)
        mask = inputs.attention_mask.to(device) if use_mask else None
        return Condition(encoder(inputs.input_ids.to(device), attention_mask=mask)[0], {})

    def finish(self, pixels: Tensor, output_type: str) -> tuple[Image, list[bool] | None]:
        pixels, nsfw = self.run_safety_checker(pixels, pixels.device, self.unet.dtype)
        denormalize = None if nsfw is None else [not flag for flag in nsfw]
        return self.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=denormalize), nsfw


def noise_like(latents: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise (n, C, h, w) from one generator, or from one per row."""
    return randn_tensor(latents.shape, generator, latents.device, latents.dtype)


def as_negatives(x: str | Sequence[str] | None, count: int) -> list[str | None]:
    """Negative prompts of `count` images; None: no text."""
    return [None] * count if x is None else as_list(x, count, "negative_prompt")


def preprocess(processor: VaeImageProcessor, images: Image | list[Image], height: int, width: int) -> Tensor:
    """One image or several of any kind, resized -> (n, 3, height, width)."""
    single = images if isinstance(images, (list, tuple)) else [images]
    return torch.cat([processor.preprocess(as_pixels(image), height, width) for image in single])


def as_pixels(image: Image) -> Image:
    """Of any mode or integer dtype -> as `VaeImageProcessor` expects: RGB, or numbers in [0, 1]."""
    if isinstance(image, PIL.Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray):
        image = image if np.issubdtype(image.dtype, np.floating) else image.astype(np.float32) / _largest(image)
        return image[None] if image.ndim == 3 else image
    if not isinstance(image, Tensor):
        fail(OP, "image", "a PIL image, an array or a tensor", type(image).__name__, error=TypeError)
    return image if image.is_floating_point() else image.float() / _largest(image)


def _largest(image: np.ndarray | Tensor) -> int:
    """The number that is white in an image of booleans or bytes."""
    name = str(image.dtype).removeprefix("torch.")
    if name not in ("bool", "uint8"):
        fail(OP, "image", "floating numbers in [0, 1], bytes or booleans", name, error=TypeError)
    return 1 if name == "bool" else 255


def as_list(x: str | Sequence[str], count: int | None = None, name: str = "prompt") -> list[str]:
    """One string or several -> a list of `count`."""
    texts = [x] if isinstance(x, str) else list(x or ())
    if not texts or not all(isinstance(text, str) for text in texts):
        fail(OP, name, "a string or several", x)
    x = texts
    if count is None or len(x) == count:
        return x
    if len(x) != 1:
        fail(OP, name, f"1 or {count} strings, as there are prompts", len(x))
    return x * count


def as_mask(mask: Image, size: tuple[int, int], device: torch.device) -> Tensor:
    """A mask of any size, above half its range (255 for images, else 1) on the subject -> bool (1, *size)."""
    if isinstance(mask, PIL.Image.Image):
        mask = np.asarray(mask.convert("L"))
    mask = torch.as_tensor(np.ascontiguousarray(mask) if isinstance(mask, np.ndarray) else mask)
    while mask.dim() > 2 and 1 in mask.shape:
        mask = mask.squeeze(mask.shape.index(1))
    if mask.dim() != 2:
        fail(OP, "reference_mask", "shape (height, width)", tuple(mask.shape))
    half = 0.5 if mask.is_floating_point() else _largest(mask) // 2
    return token_mask(mask[None] > half, tuple(size)).unflatten(1, tuple(size)).to(device)
