"""Stable Diffusion pipelines with a personalized model beside the vanilla one, and the steps that the stages share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..checks import check_integer, fail
from .adapters import adapters_off, check_free
from .condition import Condition, Control, predict
from .matching import FeatureRecorder
from .output import Costs
from .pictures import Image, preprocess
from .processors import AttentionState
from .schedule import Solver, check_scheduler, solver
from .settings import OP, Callback, Generator
from .subject import SubjectMaps, SubjectTokens, find_subjects, stretched

MAP_TIMES = (0.1, 0.3, 0.5)
"""Noise levels, as shares of the training timesteps, at which the maps of given images are taken."""


class PersonalizedPipeline:
    """What the stages need of a Stable Diffusion pipeline that has, besides its own components,

        personalized_unet: the UNet after DreamBooth or another personalization. None: `unet` itself, whose LoRA
            adapters then are the personalization: the vanilla model is the same one with them off. Without adapters
            (textual inversion) the models differ in their prompts only.
        personalized_adapters: names of the adapters that the vanilla model does not have. None: all.
        controlnet: follows `control_image`.

    The scheduler is a `DDIMScheduler` without clipping, an `EulerDiscreteScheduler` or a `DPMSolverMultistepScheduler`
    of DPM-Solver++ 2M, with epsilon or v_prediction.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    stage: str | None = None
    """what a call is doing, "layout" or "retouch"; for callbacks"""

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

    @torch.no_grad()
    def encode_images(self, images: Image | list[Image], height: int, width: int, fit: str = "crop") -> Tensor:
        """Images of any kind, brought to the size as `fit` says, see `preprocess` -> clean latents (n, C, h, w)."""
        self.latent_size(height, width, None)  # refuses what is no multiple of the VAE's factor
        return self.encode_pixels(preprocess(images, height, width, fit))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, height, width) in [-1, 1] -> clean latents (n, C, height/f, width/f)."""
        with self.vae_precision():
            pixels = pixels.to(self._execution_device, self.vae.dtype)
            latents = self.vae.encode(pixels).latent_dist.mode()
        mean, scale = self._latent_statistics(latents)
        return (latents - mean) * scale

    def decode(self, latents: Tensor, output_type: str, costs: Costs) -> tuple[Image, list[bool] | None]:
        """Latents (n, C, h, w) -> images, and what the safety checker found."""
        if output_type == "latent":
            return latents, None
        with costs.of("decode"):
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

    @torch.no_grad()
    def subject_maps(
        self, latents: Tensor, noise: Tensor, condition: Condition, tokens: SubjectTokens, *, backend: str = "auto"
    ) -> Tensor:
        """Where the subjects are in given images: fp32 (S, m, rows, columns) in [0, 1], the mean over noise levels.

        Args:
            latents: (m, C, h, w), clean. noise: likewise. condition, tokens: of their prompts.
        """
        state = AttentionState(capturing=True, token_indices=tokens.indices, backend=backend)
        found = []
        with (
            SubjectMaps(self.personal_unet, state, latents.shape[2:], {}) as maps,
            self.stage_bar("masks", len(MAP_TIMES)) as bar,
        ):
            for share in MAP_TIMES:
                predict(self.personal_unet, *self.noised(latents, noise, share), condition)
                found.append(stretched(maps.collect(slice(None), tokens.weights, backend=backend)))
                bar.update()
        return torch.stack(found).mean(0)

    @torch.no_grad()
    def features(self, latents: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """Features (m, C, h, w) of given images for `matching`, at the lowest noise level of the maps."""
        with FeatureRecorder(self.personal_unet) as recorder:
            predict(self.personal_unet, *self.noised(latents, noise, MAP_TIMES[0]), condition)
        return recorder.features

    def noised(self, latents: Tensor, noise: Tensor, share: float) -> tuple[Tensor, int]:
        """The UNet's input and timestep for clean latents at a share of the training timesteps."""
        t = round(share * self.scheduler.config.num_train_timesteps)
        level = float(self.scheduler.alphas_cumprod[t])
        return (level**0.5 * latents + (1 - level) ** 0.5 * noise).to(latents.dtype), t

    def begin(self, num_inference_steps: int, device: torch.device) -> Solver:
        """Check the models and the scheduler, and set its timesteps."""
        check_scheduler(self.scheduler)
        check_free(OP, [self.unet, self.personal_unet])
        for unet in (self.unet, self.personal_unet):
            if unet.config.encoder_hid_dim_type is not None:
                got, hint = unet.config.encoder_hid_dim_type, "call unload_ip_adapter() first"
                fail(OP, "unet", "one without image embeddings", got, hint, NotImplementedError)
        self._interrupt = False
        self._num_timesteps = num_inference_steps
        return solver(self.scheduler, num_inference_steps, device)

    def stage_bar(self, stage: str, total: int) -> tqdm:
        """A progress bar with the stage's name, with what `set_progress_bar_config` says."""
        return tqdm(total=total, **{"desc": stage, **getattr(self, "_progress_bar_config", {})})

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
        if latents is not None:
            if not isinstance(latents, Tensor) or latents.dim() != 4 or not latents.is_floating_point():
                got = f"{latents.dtype} " if isinstance(latents, Tensor) else ""
                got += str(tuple(latents.shape)) if hasattr(latents, "shape") else type(latents).__name__
                fail(OP, "latents", "a floating tensor (n, C, height, width)", got)
            if height is None and width is None:
                default = latents.shape[2:]
        size = []
        for name, pixels, latent_side in zip(("height", "width"), (height, width), default):
            if pixels is not None:
                check_integer(OP, name, pixels, f, f"a multiple of {f}")
                if pixels % f:
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
        height, width = (x * self.vae_scale_factor for x in size)
        pixels = preprocess(image, height, width, "squeeze", normalize=False, name="control_image")
        if len(pixels) not in (1, count):
            fail(OP, "control_image", f"1 or {count} images, as there are prompts", len(pixels))
        pixels = pixels.expand(count, -1, -1, -1).to(self._execution_device, dtype)
        return Control(self.controlnet, pixels, scale)

    def after_step(self, callback: Callback, step: int, t: Tensor, latents: Tensor) -> Tensor:
        """Run callback_on_step_end; the latents, or those it returns, in the dtype and on the device of the stage."""
        returned = None if callback is None else callback(self, step, t, {"latents": latents})
        if returned is None:
            return latents
        if not isinstance(returned, Mapping):
            fail(OP, "callback_on_step_end", "a function that returns a dict or None", type(returned).__name__)
        changed = returned.get("latents", latents)
        if not isinstance(changed, Tensor) or changed.shape != latents.shape:
            expected = f"latents of shape {tuple(latents.shape)} from it"
            fail(OP, "callback_on_step_end", expected, getattr(changed, "shape", type(changed).__name__))
        return changed.to(latents)


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


def as_list(x: str | Sequence[str], count: int | None = None, name: str = "prompt") -> list[str]:
    """One string or several -> a list of `count`."""
    texts = [x] if isinstance(x, str) else list(x) if isinstance(x, (list, tuple)) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        fail(OP, name, "a string or several", repr(x))
    x = texts
    if count is None or len(x) == count:
        return x
    if len(x) != 1:
        fail(OP, name, f"1 or {count} strings, as there are prompts", len(x))
    return x * count
