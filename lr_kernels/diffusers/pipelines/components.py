"""Stable Diffusion pipelines with a personalized model beside the vanilla one, and the steps that the stages share."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.modeling_outputs import BaseModelOutput

from ...runtime.checks import check_integer, fail
from ..processors.unet import AttentionState
from ..subjects.matching import FeatureRecorder
from ..subjects.subject import SubjectMaps, SubjectTokens, find_subjects, stretched
from .adapters import adapters_off
from .condition import Condition, Control, predict
from .latents import encoded, latent_statistics
from .output import Costs
from .pictures import Image, Images, preprocess
from .schedule import Solver, solver
from .settings import OP, Generator, Settings, check_numbers, one_or
from .stock import StockArguments
from .switches import Switches
from .text import Embeds, TextReader, hidden_states

MAP_TIMES = (0.1, 0.3, 0.5)
"""Noise levels, as shares of the training timesteps, at which the maps of given images are taken."""


class PersonalizedPipeline(Switches):
    """What the stages need of a Stable Diffusion pipeline that has, besides its own components,

        personalized_unet: the UNet after DreamBooth or another personalization. None: `unet` itself, whose LoRA
            adapters then are the personalization: the vanilla model is the same one with them off. Without adapters
            (textual inversion) the models differ in their prompts only.
        personalized_adapters: names of the adapters that the vanilla model does not have. None: all.
        controlnet: follows `control_image`.

    The scheduler is a `DDIMScheduler` without clipping, an `EulerDiscreteScheduler` or a `DPMSolverMultistepScheduler`
    of DPM-Solver++ 2M, with epsilon or v_prediction. What switches something on in `unet` (`enable_freeu`,
    `fuse_qkv_projections`) does so in both UNets, and `load_textual_inversion` gives an embedding to both models.
    Adapters (`load_lora_weights`) are those of `unet` alone; `personalized_unet` has a method of its own for them.
    """

    stage: str | None = None
    """what a call is doing, "layout", "retouch" or "references"; for callbacks"""
    stock_module: ClassVar[str]
    """module of the stock pipeline; its warnings are given under that name"""
    pools: ClassVar[bool] = False
    """whether prompts have pooled embeddings"""
    addition_embed_types: ClassVar[tuple[str | None, ...]]
    """the `addition_embed_type`s that the UNets may have"""
    other_class: ClassVar[str]
    """what to use for a UNet of another type, for the error"""

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "PersonalizedPipeline":
        """Build the pipeline from the components of another one: `from_pipe(pipe, personalized_unet=…)`.

        The components keep their dtype unless another one is given (diffusers casts them to float32). ValueError where
        they have several and none is given.
        """
        expected, _ = cls._get_signature_keys(cls)
        # those of other classes than the signature says, as tiny autoencoders, would be left out
        given = {name: x for name, x in pipeline.components.items() if name in expected}
        kwargs = given | kwargs
        controlnet = kwargs.get("controlnet")
        if controlnet is not None and not isinstance(controlnet, ControlNetModel):
            got = type(controlnet).__name__
            fail(
                "LayoutRetouch.from_pipe",
                "controlnet",
                "a ControlNetModel or None",
                got,
                "pass controlnet=",
                NotImplementedError,
            )
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            models = {name: kwargs[name] for name in sorted(expected) if isinstance(kwargs.get(name), torch.nn.Module)}
            dtypes = {name: model.dtype for name, model in models.items()}
            if len(set(dtypes.values())) > 1:
                got = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
                hint = "pass dtype=, which casts them all, or bring them to one before"
                fail("LayoutRetouch.from_pipe", "dtype", "a dtype, since the components have several", got, hint)
            kwargs["dtype"] = next(iter(dtypes.values()), None)
        return super().from_pipe(pipeline, **kwargs)

    # What each kind of pipeline defines

    def readers(self, personal: bool) -> list[TextReader]:
        """The text encoders of the vanilla or the personalized model, each with its tokenizer."""
        raise NotImplementedError

    def embed(self, texts: Sequence[str], *, personal: bool, clip_skip: int | None = None) -> Embeds:
        """The embeddings of texts by a model's text encoders."""
        raise NotImplementedError

    def zeroes(self, negatives: Sequence[str | None]) -> bool:
        """Whether these negative prompts are zeros instead of embeddings of no text."""
        return False

    def condition(
        self, embeds: Embeds, size: tuple[int, int], stock: StockArguments, *, negative: bool = False
    ) -> Condition:
        """The condition that a UNet gets for prompts, for latents of a size (h, w)."""
        return Condition(embeds.tokens, {}, self._guidance_embedding(embeds.tokens), self.adapter_scale)

    def vae_precision(self) -> AbstractContextManager:
        """A context manager in which the VAE has the precision that it needs."""
        return nullcontext()

    def vae_keywords(self, generator: Generator) -> dict:
        """The keywords that the VAE's `decode` gets beside the latents."""
        return {}

    def finish(self, pixels: Tensor, output_type: str) -> tuple[Images, list[bool] | None]:
        """Decoded pixels (n, 3, H, W) in [-1, 1] -> images, and what a safety checker found."""
        return self.image_processor.postprocess(pixels, output_type=output_type), None

    # What all kinds share

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

    @property
    def personal_name(self) -> str:
        """The name of `personal_unet` among the components."""
        return "unet" if self.personalized_unet is None else "personalized_unet"

    @property
    def prompt_dtype(self) -> torch.dtype:
        """The dtype of embeddings and latents: that of the text encoders, as in the stock pipelines."""
        encoder = self.readers(personal=False)[-1].encoder
        return self.unet.dtype if encoder is None else encoder.dtype

    @property
    def attention_dtype(self) -> torch.dtype:
        """The dtype of keys and values in the personalized UNet."""
        device = self._execution_device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.personal_unet.dtype

    @property
    def text_length(self) -> int | None:
        """How many tokens a prompt has that is given as text; None without a tokenizer."""
        return getattr(self.readers(personal=True)[0].tokenizer, "model_max_length", None)

    @property
    def adapter_scale(self) -> float | None:
        """The call's strength of the adapters."""
        return (self.cross_attention_kwargs or {}).get("scale")

    def context_widths(self, *, personal: bool) -> tuple[int | None, str]:
        """Channels of the text embeddings that a model's UNet takes, and its name."""
        unet, name = (self.personal_unet, self.personal_name) if personal else (self.unet, "unet")
        return context_width(unet), name

    def guides(self, scale: float) -> bool:
        """Whether a guidance scale needs unconditional predictions. A UNet that is told the scale needs none."""
        return scale > 1 and self.unet.config.time_cond_proj_dim is None

    def _guidance_embedding(self, like: Tensor) -> Tensor | None:
        """The embedding of the guidance scale, one row per prompt, for UNets that have learned to follow it (arXiv
        2310.04378); None for others."""
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return None
        scales = torch.full((len(like),), self.guidance_scale - 1, dtype=torch.float32)
        return self.get_guidance_scale_embedding(scales, embedding_dim=width).to(like)

    def embed_negatives(self, texts: Sequence[str | None], prompts: Embeds, *, personal: bool) -> Embeds:
        """The embeddings of negative prompts, None for no text, that go with the prompts'."""
        if not self.zeroes(texts):
            return self.embed([text or "" for text in texts], personal=personal)

        def zeros(like: Tensor) -> Tensor:
            return like.new_zeros(len(texts), *like.shape[1:])

        return Embeds(zeros(prompts.tokens), None if prompts.pooled is None else zeros(prompts.pooled))

    @contextmanager
    def in_stage(self, stage: str, guidance_scale: float) -> Iterator[None]:
        """While it lasts, `stage` and the attributes of the stock pipelines say what the pipeline is doing."""
        before, self.stage, self._guidance_scale = self.stage, stage, guidance_scale
        try:
            yield
        finally:
            self.stage = before

    @contextmanager
    def as_vanilla(self) -> Iterator[None]:
        """While it lasts `unet` and the text encoders are the vanilla model's."""
        if self.personalized_unet is not None:
            yield
            return
        with adapters_off(OP, [self.unet, *self.text_encoders(personal=False)], self.config.personalized_adapters):
            yield

    def text_encoders(self, personal: bool) -> list[torch.nn.Module]:
        """Those of the vanilla or the personalized model."""
        return [reader.encoder for reader in self.readers(personal) if reader.encoder is not None]

    @torch.no_grad()
    def encode_images(self, images: Image | list[Image], height: int, width: int, fit: str = "crop") -> Tensor:
        """Images of any kind, brought to the size as `fit` says, see `preprocess` -> clean latents (n, C, h, w)."""
        self.latent_size(height, width, None)  # refuses what is no multiple of the VAE's factor
        return self.encode_pixels(preprocess(images, height, width, fit))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, height, width) in [-1, 1] -> clean latents (n, C, height/f, width/f)."""
        with self.vae_precision():
            pixels = pixels.to(self._execution_device, self.vae.dtype)
            return encoded(self.vae, pixels, lambda distribution: distribution.mode())

    def decode(
        self, latents: Tensor, output_type: str, costs: Costs, generator: Generator = None
    ) -> tuple[Images, list[bool] | None]:
        """Latents (n, C, h, w) -> images, and what the safety checker found."""
        if output_type == "latent":
            return latents, None
        with costs.of("decode"):
            mean, scale = latent_statistics(self.vae, latents)
            with self.vae_precision():
                latents = (latents / scale + mean).to(self.vae.dtype)
                pixels = self.vae.decode(latents, return_dict=False, **self.vae_keywords(generator))[0]
            return self.finish(pixels, output_type)

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
            SubjectMaps(self.personal_unet, state, (latents.shape[2], latents.shape[3]), {}) as maps,
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
        assert recorder.features is not None
        return recorder.features

    def noised(self, latents: Tensor, noise: Tensor, share: float) -> tuple[Tensor, int]:
        """The UNet's input and timestep for clean latents at a share of the training timesteps."""
        t = round(share * self.scheduler.config.num_train_timesteps)
        level = float(self.scheduler.alphas_cumprod[t])
        return (level**0.5 * latents + (1 - level) ** 0.5 * noise).to(latents.dtype), t

    def begin(self, settings: Settings, stock: StockArguments) -> Solver:
        """Set the scheduler's timesteps, and the attributes by which the stock pipelines describe a call."""
        self._interrupt = False
        self._guidance_scale, self._guidance_rescale = settings.guidance_scale, stock.guidance_rescale
        self._clip_skip, self._cross_attention_kwargs = stock.clip_skip, stock.cross_attention_kwargs
        self._denoising_end = None
        result = solver(
            self.scheduler,
            settings.num_inference_steps,
            self._execution_device,
            timesteps=stock.timesteps,
            sigmas=stock.sigmas,
        )
        self._num_timesteps = result.steps
        return result

    def stage_bar(self, stage: str, total: int) -> tqdm:
        """A progress bar with the stage's name, with what `set_progress_bar_config` says."""
        return tqdm(total=total, **{"desc": stage, **getattr(self, "_progress_bar_config", {})})

    def subject_tokens(
        self, prompts: Sequence[str], subjects: Sequence[Sequence[str]], shows: Sequence[int | None]
    ) -> SubjectTokens:
        """Where the subjects' words are in each prompt, as `embed` tokenizes it."""
        tokenizer = self.readers(personal=True)[0].tokenizer
        if tokenizer is None:
            fail(OP, "tokenizer", "one, since it finds subject_tokens in prompts", None, "pass the component")
        prompts = self.maybe_convert_prompt(list(prompts), tokenizer)
        subjects = [self.maybe_convert_prompt(list(words), tokenizer) for words in subjects]
        return find_subjects(tokenizer, prompts, subjects, self._execution_device, shows)

    def latent_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """(height, width) of the latents. Default: those given, or the UNet's sample size."""
        if self.unet is None:
            fail(OP, "unet", "a UNet", None, "pass the component")
        f, side = self.vae_scale_factor, self.unet.config.sample_size
        default = (side, side) if isinstance(side, int) else side
        if default is None and latents is None and (height is None or width is None):
            fail(OP, "height", "height and width, since the UNet has no sample_size", height)
        default = (0, 0) if default is None else default
        if latents is not None:
            if not isinstance(latents, Tensor) or latents.dim() != 4 or not latents.is_floating_point():
                got = f"{latents.dtype} " if isinstance(latents, Tensor) else ""
                got += str(tuple(latents.shape)) if hasattr(latents, "shape") else type(latents).__name__
                fail(OP, "latents", "a floating tensor (n, C, height, width)", got)
            check_numbers("latents", latents)
            if height is None and width is None:
                default = latents.shape[2:]
        size = []
        for name, pixels, latent_side in zip(("height", "width"), (height, width), default):
            if pixels is not None:
                pixels = check_integer(OP, name, pixels, f, f"a multiple of {f}")
                if pixels % f:
                    fail(OP, name, f"a multiple of {f}", pixels)
            size.append(latent_side if pixels is None else pixels // f)
        return tuple(size)

    def initial_latents(
        self, count: int, size: tuple[int, int], dtype: torch.dtype, generator: Generator, latents: Tensor | None
    ) -> Tensor:
        """The initial noise (count, C, *size): given, or random."""
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
        """The ControlNet with the images that it follows: one for all, or one for each of `count`; None without an
        image."""
        if image is None:
            return None
        if self.controlnet is None:
            fail(OP, "control_image", "None, since the pipeline has no controlnet", type(image).__name__)
        height, width = (x * self.vae_scale_factor for x in size)
        pixels = preprocess(image, height, width, "squeeze", normalize=False, opaque=True, name="control_image")
        if len(pixels) not in (1, count):
            fail(OP, "control_image", f"{one_or(count)} images, as there are prompts", len(pixels))
        pixels = pixels.expand(count, -1, -1, -1).to(self._execution_device, dtype)
        return Control(self.controlnet, pixels, scale)


class PersonalizedStableDiffusionPipeline(PersonalizedPipeline, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with the components of `PersonalizedPipeline` and

    personalized_text_encoder: the text encoder that belongs to the personalized UNet. Default: `text_encoder`.
    """

    stock_module = StableDiffusionPipeline.__module__
    addition_embed_types = (None, "text")
    other_class = "Stable Diffusion XL has a pipeline of its own, StableDiffusionXLLayoutRetouchPipeline"
    _callback_tensor_inputs: ClassVar[list[str]] = [*StableDiffusionPipeline._callback_tensor_inputs, "image"]
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

    def readers(self, personal: bool) -> list[TextReader]:
        """The one text encoder, or the personalized one where there is one."""
        own = personal and self.personalized_text_encoder is not None
        name = "personalized_text_encoder" if own else "text_encoder"
        return [TextReader(name, self.tokenizer, getattr(self, name))]

    def embed(self, texts: Sequence[str], *, personal: bool, clip_skip: int | None = None) -> Embeds:
        """The last hidden states of the text encoder, or those `clip_skip` layers earlier."""
        (reader,) = self.readers(personal)

        def last(out: BaseModelOutput) -> Tensor:
            if clip_skip is None:
                return out[0]
            encoder: Any = getattr(
                reader.encoder, "text_model", reader.encoder
            )  # transformers before 5 has another module
            return encoder.final_layer_norm(out.hidden_states[-(clip_skip + 1)])

        return Embeds(hidden_states(self, reader, texts, last)[0].to(self.prompt_dtype))

    def vae_keywords(self, generator: Generator) -> dict:
        """The generator, as the stock pipeline passes it."""
        return {"generator": generator}

    def finish(self, pixels: Tensor, output_type: str) -> tuple[Images, list[bool] | None]:
        """Images after the safety checker, and what it found."""
        pixels, nsfw = self.run_safety_checker(pixels, pixels.device, self.prompt_dtype)
        denormalize = None if nsfw is None else [not flag for flag in nsfw]
        return self.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=denormalize), nsfw


def context_width(unet: UNet2DConditionModel) -> int | None:
    """Channels of the text embeddings that a UNet takes; None: its layers take different ones."""
    config = unet.config
    width = config.encoder_hid_dim if config.encoder_hid_dim_type == "text_proj" else config.cross_attention_dim
    return width if isinstance(width, int) else None


def noise_like(latents: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise (n, C, h, w) from one generator, or from one per row."""
    return randn_tensor(latents.shape, generator, latents.device, latents.dtype)
