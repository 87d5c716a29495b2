"""Layout-and-Retouch (arXiv 2407.09779) as a diffusers pipeline for Flux."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ....runtime.backends import choose
from ....runtime.checks import fail
from ...pipelines.pictures import Image
from .attention import MAX_REFERENCES, check_replaceable, retouch_layers
from .inputs import (
    Prompt,
    Text,
    count_prompts,
    encoded,
    image_size,
    read_masks,
    read_pictures,
    subject_places,
    token_grid,
)
from .maps import DOUBLE_BLOCKS
from .models import PersonalizedFluxPipeline, check_models
from .output import FluxLayoutRetouchOutput, FluxLayouts
from .retouch import References, retouch
from .settings import OP, FluxSettings
from .stages import check_scheduler, decode, lay_out, set_schedule

Generator = torch.Generator | list[torch.Generator] | None
Size = tuple[int, int]


class FluxLayoutRetouchPipeline(PersonalizedFluxPipeline):
    """Personalized text-to-image in two stages: lay out with the vanilla model, retouch with the personalized one.

    `layout` denoises the first steps with the vanilla model and a prompt without the subject, the rest with the
    personalized one. `retouch` denoises targets in parallel with these layouts and with reference images; in the chosen
    attention layers and steps a target's foreground reads the references' foreground, its background the layout
    (`JointRouting`). `__call__` runs both. `PersonalizedFluxPipeline` says what the pipeline is made of, `FluxSettings`
    which numbers and choices every method takes by keyword.

        pipe = FluxLayoutRetouchPipeline.from_pipe(FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", …))
        pipe.load_lora_weights("my-lora", adapter_name="subject")
        result = pipe("a sks dog on sand", "a dog on sand", photo, "a sks dog", subject_tokens="dog")
        control = pipe(…, sharing=False)

    Of what the pipelines of Stable Diffusion offer this one lacks the reading "swap", banks of references, several
    subjects, layouts from elsewhere and guidance by negative prompts.

    Tested with small models of random weights only. Which steps, layers and offset suit FLUX.1, whether its attention
    finds the subject (`WordMaps`), and how good its images become, was not measured.
    """

    stage: str | None = None
    """what a call is doing, "layout" or "retouch"; for callbacks"""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Text,
        layout_prompt: Text,
        reference_image: Image | list[Image],
        reference_prompt: Text,
        *,
        reference_mask: Image | list[Image] | None = None,
        layout_mask: Image | list[Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generator = None,
        latents: Tensor | None = None,
        return_dict: bool = True,
        **settings: object,
    ) -> FluxLayoutRetouchOutput | tuple:
        """Both stages.

        Args:
            prompt: with the subject's token, as "a sks dog on sand". A list gives several images; the references serve
                them all. In place of text, here and below: a tuple of embeddings (n, T, C) and pooled embeddings (n,
                P), as `encode_prompt` makes them; all prompts of a call must have equally many tokens.
            layout_prompt: the same scene with the class noun alone, as "a dog on sand"; one for all or one per prompt.
            reference_image: an image of the subject, or several, at most 13, of any kind and size, see `preprocess`;
                those of another aspect ratio are fitted as reference_fit, one of the settings, says.
            reference_prompt: as "a sks dog"; one for all or one per reference.
            reference_mask: where the subject is in the references, one for all or one each, see `as_mask`.
                layout_mask: where it is in the layouts, likewise, of the whole image; to look at them first, call
                `layout`, then `retouch`. None: by the model's attention to subject_tokens, one of the settings.
            height, width: pixels, multiples of 16 with FLUX.1's VAE. Default: as FluxPipeline.
            generator: one, or a list of one per image. latents: initial noise, packed, (n, N, C).
            return_dict: False: (images, layout_images).
            settings: the fields of `FluxSettings`.

        Returns:
            `FluxLayoutRetouchOutput`. If a callback interrupted the layout stage, the images are the layouts as they
            were then.

        Raises:
            ValueError, TypeError: an argument that does not fit, named. NotImplementedError: a scheduler, an attention
            processor or an argument of FluxPipeline that the method cannot use. RuntimeError: a backend that cannot run
            here; a model whose LoRAs another call has off.
        """
        given = FluxSettings.given(settings, self._callback_tensor_inputs)
        self._check_models(lays_out=True)
        self._check_layers(given)
        size = image_size(self, height, width)
        images = self._count_images(given, prompt, layout_prompt)
        self._check_noise(images, size, generator, latents)
        texts = prompt, reference_prompt
        personal, references = self._read(given, images, size, texts, reference_image, reference_mask, layout_mask)
        layout = self._laid_out(given, layout_prompt, personal, size, generator, latents)
        layouts, output = layout.layouts, layout
        if layouts is not None:
            output = self._retouched(given, personal, layouts, references)
        self.maybe_free_model_hooks()
        if not return_dict:
            return output.images, layout.images
        return replace(output, layout_images=layout.images, layouts=layouts)

    @torch.no_grad()
    def layout(
        self,
        prompt: Text,
        layout_prompt: Text,
        *,
        height: int | None = None,
        width: int | None = None,
        generator: Generator = None,
        latents: Tensor | None = None,
        **settings: object,
    ) -> FluxLayoutRetouchOutput:
        """Stage 1, step-blended denoising: first the vanilla model with layout_prompt, then the personalized one.

        Arguments as in `__call__`; images and latents of the output are the layouts.
        """
        given = FluxSettings.given(settings, self._callback_tensor_inputs)
        self._check_models(lays_out=True)
        size = image_size(self, height, width)
        images = self._count_images(given, prompt, layout_prompt)
        self._check_noise(images, size, generator, latents)
        personal = encoded(self, prompt, images, given.max_sequence_length)
        output = self._laid_out(given, layout_prompt, personal, size, generator, latents)
        self.maybe_free_model_hooks()
        return output

    @torch.no_grad()
    def retouch(
        self,
        prompt: Text,
        reference_image: Image | list[Image],
        reference_prompt: Text,
        *,
        layout: FluxLayoutRetouchOutput,
        reference_mask: Image | list[Image] | None = None,
        layout_mask: Image | list[Image] | None = None,
        **settings: object,
    ) -> FluxLayoutRetouchOutput:
        """Stage 2: targets take their layout from the contexts and their appearance from the references.

        Arguments as in `__call__`, and

        Args:
            prompt: one per image of the layout, or a number that num_images_per_prompt makes to it.
            layout: what `layout` has returned.
        """
        given = FluxSettings.given(settings, self._callback_tensor_inputs)
        self._check_models(lays_out=False)
        self._check_layers(given)
        layouts = layout.layouts if isinstance(layout, FluxLayoutRetouchOutput) else None
        if layouts is None:
            got = "an interrupted one" if isinstance(layout, FluxLayoutRetouchOutput) else type(layout).__name__
            fail(OP, "layout", "what layout() has returned", got, error=TypeError)
        images = len(layouts.latents)
        if images % given.num_images_per_prompt:
            fail(OP, "num_images_per_prompt", f"a divisor of {images}, the layouts", given.num_images_per_prompt)
        count_prompts(self, "prompt", prompt, (images // given.num_images_per_prompt,))
        self._check_schedule(given, layouts)
        texts = prompt, reference_prompt
        personal, references = self._read(
            given, images, layouts.size, texts, reference_image, reference_mask, layout_mask
        )
        output = self._retouched(given, personal, layouts, references)
        self.maybe_free_model_hooks()
        return output

    def _laid_out(
        self,
        settings: FluxSettings,
        layout_prompt: Text,
        personal: Prompt,
        size: Size,
        generator: Generator,
        latents: Tensor | None,
    ) -> FluxLayoutRetouchOutput:
        """The layout stage for prompts of the personalized model that are encoded."""
        with self.as_vanilla():
            vanilla = encoded(self, layout_prompt, len(personal.embeds), settings.max_sequence_length)
        with self._in_stage("layout", settings):
            found, layouts = lay_out(self, settings, vanilla, personal, size, generator, latents)
            images = decode(self, found, size, settings.output_type)
        return FluxLayoutRetouchOutput(images=images, latents=found, layouts=layouts)

    def _retouched(
        self, settings: FluxSettings, personal: Prompt, layouts: FluxLayouts, references: References
    ) -> FluxLayoutRetouchOutput:
        """The retouch stage for prompts and references that are read."""
        with self._in_stage("retouch", settings):
            found = retouch(self, settings, personal, layouts, references)
            images = decode(self, found.latents, layouts.size, settings.output_type)
        return FluxLayoutRetouchOutput(
            images=images,
            latents=found.latents,
            masks=found.masks,
            context_masks=found.context_masks,
            reference_mask=found.reference_masks,
        )

    @contextmanager
    def _in_stage(self, stage: str, settings: FluxSettings) -> Iterator[None]:
        """While it lasts, `stage` and the attributes of FluxPipeline say what the pipeline is doing."""
        self.stage, self._interrupt = stage, False
        self._guidance_scale, self._joint_attention_kwargs = settings.guidance_scale, None
        try:
            yield
        finally:
            self.stage = self._current_timestep = None

    def _check_models(self, *, lays_out: bool) -> None:
        """Refuse a scheduler, models and LoRAs that the method cannot use."""
        check_scheduler(self.scheduler)
        check_models(self)
        self.check_adapters(lays_out=lays_out)

    def _check_layers(self, settings: FluxSettings) -> None:
        """Refuse layers whose attention the retouch stage cannot replace, and a backend that cannot compute it here."""
        chosen = retouch_layers(self.personal_transformer, settings.retouch_layers, OP)
        layers = chosen if settings.share else {}
        if settings.subject_tokens:
            layers = layers | retouch_layers(self.personal_transformer, DOUBLE_BLOCKS, OP)
        check_replaceable(layers, OP)
        if layers:
            choose("multi_source_attention", settings.backend, self._execution_device, torch.float32)

    def _count_images(self, settings: FluxSettings, prompt: Text, layout_prompt: Text) -> int:
        prompts = count_prompts(self, "prompt", prompt)
        count_prompts(self, "layout_prompt", layout_prompt, (1, prompts))
        return prompts * settings.num_images_per_prompt

    def _check_noise(self, images: int, size: Size, generator: Generator, latents: Tensor | None) -> None:
        several = generator if isinstance(generator, list) else [generator]
        for x in several:
            if generator is not None and not isinstance(x, torch.Generator):
                fail(OP, "generator", "a torch.Generator, or a list of them", type(x).__name__)
        if isinstance(generator, list) and len(generator) != images:
            fail(OP, "generator", f"one, or {images}, one per image", len(generator))
        rows, columns = token_grid(self, size)
        expected = images, rows * columns, self.transformer.config.in_channels
        if latents is not None and (not isinstance(latents, Tensor) or latents.shape != expected):
            got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            fail(OP, "latents", f"shape {expected}, packed", got)
        if latents is not None and not bool(latents.isfinite().all()):
            fail(OP, "latents", "finite numbers", "NaN or Inf")

    def _check_schedule(self, settings: FluxSettings, layouts: FluxLayouts) -> None:
        """Refuse another schedule than the layouts had."""
        steps = settings.num_inference_steps
        if steps != layouts.steps:
            fail(OP, "num_inference_steps", f"{layouts.steps}, as the layouts had", steps)
        if not set_schedule(self, steps, layouts.latents.shape[1]).equal(layouts.sigmas):
            fail(OP, "scheduler", "the one that the layouts were made with", "another one, or set otherwise")

    def _read(
        self,
        settings: FluxSettings,
        images: int,
        size: Size,
        texts: tuple[Text, Text],
        pictures: Image | list[Image],
        reference_mask: Image | list[Image] | None,
        layout_mask: Image | list[Image] | None,
    ) -> tuple[Prompt, References]:
        """The prompts of the images, and what the retouch stage is given. All is checked before a text encoder runs;
        `texts` are the prompts of images and references."""
        length, words, fit = settings.max_sequence_length, settings.subject_tokens, settings.reference_fit
        several, pixels = read_pictures(pictures, size, fit)
        count = len(pixels)
        if count > MAX_REFERENCES:
            fail(OP, "reference_image", f"at most {MAX_REFERENCES} references", count)
        count_prompts(self, "reference_prompt", texts[1], (1, count))
        for name, mask in (("reference_mask", reference_mask), ("layout_mask", layout_mask)):
            if mask is None and not words:
                fail(OP, name, "a mask, since there are no subject_tokens", None)
        of_references = of_layouts = None
        if reference_mask is not None:
            of_references = read_masks(self, "reference_mask", reference_mask, size, count, fit, several)
        if layout_mask is not None:
            of_layouts = read_masks(self, "layout_mask", layout_mask, size, images, "squeeze")
        tokens = own_tokens = None
        if words and (of_layouts is None or settings.mask_blending):
            tokens = subject_places(self, "prompt", texts[0], images, words, length)
        if words and of_references is None:
            own_tokens = subject_places(self, "reference_prompt", texts[1], count, words, length)
        expected, got = (text[0].shape[1] if isinstance(text, tuple) else length for text in texts)
        if got != expected:
            fail(OP, "reference_prompt", f"{expected} tokens, as the prompts have", got)
        personal, prompt = (encoded(self, text, rows, length) for text, rows in zip(texts, (images, count)))
        return personal, References(pixels, prompt, of_references, of_layouts, tokens, own_tokens)
