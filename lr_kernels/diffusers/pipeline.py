"""Layout-and-Retouch (arXiv 2407.09779) as diffusers pipelines for Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import fail
from .bank import ReferenceBank
from .components import OP, Callback, Generator, Image, PersonalizedStableDiffusionPipeline, as_list
from .components_xl import PersonalizedStableDiffusionXLPipeline
from .layout import LayoutStage
from .output import LayoutRetouchOutput
from .request import retouch_request
from .retouch import RetouchStage
from .schedule import Blend


class LayoutRetouch(LayoutStage, RetouchStage):
    """Personalized text-to-image in two stages: lay out with the vanilla model, retouch with the personalized one.

    `layout` denoises the first steps with the vanilla model and a prompt without the subject, the rest with the
    personalized one. `retouch` denoises targets in parallel with these layouts and with reference images; in the chosen
    self-attention layers a target's subject reads its references and its background reads the layout. `__call__` runs
    both. `reference_bank` computes what the references contribute, once for many prompts.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        layout_prompt: str | list[str],
        reference_image: Image | list[Image] | None = None,
        reference_prompt: str | list[str] | None = None,
        subject_tokens: str | Sequence[str] | Sequence[Sequence[str]] = (),
        *,
        reference_mask: Image | list[Image | None] | None = None,
        reference_subjects: Sequence[int] | None = None,
        reference_bank: ReferenceBank | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        layout_steps: int | None = None,
        layout_blend: Blend = "hard",
        retouch_start: int | None = None,
        retouch_end: int | None = None,
        retouch_layers: Sequence[int | str] | None = None,
        reading: str = "routing",
        sources: str = "inversion",
        mask_blending: bool = False,
        mask_threshold: float | str = "otsu",
        control_image: Image | list[Image] | None = None,
        control_scale: float = 1.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        backend: str = "auto",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
    ) -> LayoutRetouchOutput | tuple:
        """Both stages.

        Args:
            prompt: with the subject's token, as "a sks ball on sand". A list gives several images; the references serve
                them all.
            layout_prompt: the same scene with the class noun alone, as "a ball on sand"; one for all or one per prompt.
            reference_image: an image of the subject, or several. reference_prompt: as "a sks ball"; one for all or one
                per reference.
            subject_tokens: words that stand for the subject in `prompt` and `reference_prompt`, as ("sks", "ball"). Of
                several subjects a list of such lists, as [("sks", "dog"), ("abc", "cat")], up to 6; the prompts have
                them all, a reference's prompt that of its own.
            reference_mask: (height, width) of any size, above half its range on the subject; of several references a
                list. None: from cross-attention.
            reference_subjects: which subject each reference shows. Default: the only one, or one reference for each.
            reference_bank: from the method of that name, in place of reference_image, reference_prompt, reference_mask.
            negative_prompt: one for all, or one per prompt. num_images_per_prompt: images of each prompt, in order.
            height, width: pixels, multiples of the VAE's factor. Default: the UNet's sample size.
            guidance_scale: classifier-free guidance in both stages; at most 1: none. eta: η of DDIM, 0 to 1.
            layout_steps: λ1, steps of the vanilla model: all of them give the vanilla image, 0 the personalized one.
                Default: 0.3 of the steps.
            layout_blend: weight of the personalized model at each step, see `blend_weights`: "hard" switches after
                layout_steps, "linear" and "cosine" ramp up from there.
            retouch_start: step at which the targets leave the layouts' latents. Default: 0.3 of the steps.
            retouch_end: step from which the images no longer share attention. Default: the number of steps.
            retouch_layers: self-attention layers that share, by scale (1: tokens as fine as the latents, 2: half as
                fine) or by the beginning of their name, as "up_blocks.2". Default: all.
            reading: of the paper's attention swapping. "routing": the target's queries attend to the references'
                subject or to the layout, by the mask. "swap": the layout's queries and keys, with values of the
                references where their tokens match the layout's (appearance matching, arXiv 2402.09812).
            sources: latents of layout and references at each step: by "inversion" (DDIM; keeps the layout better) or
                "renoise" (one noise for all steps; faster, and brings more of the subject back).
            mask_blending: adaptive mask blending. False: the layout's mask throughout. True: it moves to the target's
                own mask, and outside of both masks the latents are the layout's.
            mask_threshold: of `subject_mask`.
            control_image: what the pipeline's `controlnet` follows in both stages, for layouts and targets: one image
                for all or one per prompt. control_scale: its strength.
            generator: one, or one per image; latents: initial noise (n, C, height/f, width/f).
            backend: of all lr_kernels operators, see `multi_source_attention`.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called in both stages as (pipe, step, timestep, {"latents": …}); may return a dict
                with other latents.

        Returns:
            `LayoutRetouchOutput`, or (images, layout_images) where return_dict is False. If the layout stage was
            interrupted (`pipe._interrupt = True` in a callback), the images are the layouts as they were then.

        Raises:
            ValueError: an argument that does not fit, named; a bank built for something else. NotImplementedError: a
            scheduler or an attention processor that the method cannot use; "swap" without layouts or with a bank.
        """
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            fail(OP, "num_images_per_prompt", "a positive integer", num_images_per_prompt)
        prompt = [p for p in as_list(prompt) for _ in range(num_images_per_prompt)]

        def per_image(texts: str | list[str], name: str) -> list[str]:
            texts = as_list(texts, name=name)
            return texts if len(texts) == 1 else [p for p in texts for _ in range(num_images_per_prompt)]

        if isinstance(control_image, (list, tuple)) and len(control_image) > 1:
            control_image = [image for image in control_image for _ in range(num_images_per_prompt)]
        shared = {
            "negative_prompt": None if negative_prompt is None else per_image(negative_prompt, "negative_prompt"),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "eta": eta,
            "control_image": control_image,
            "control_scale": control_scale,
            "generator": generator,
            "backend": backend,
            "output_type": output_type,
            "callback_on_step_end": callback_on_step_end,
        }
        second = {
            "reference_mask": reference_mask,
            "reference_subjects": reference_subjects,
            "reference_bank": reference_bank,
            "retouch_start": retouch_start,
            "retouch_end": retouch_end,
            "retouch_layers": retouch_layers,
            "reading": reading,
            "sources": sources,
        }
        references = (reference_image, reference_prompt, subject_tokens)
        names = ("num_inference_steps", "guidance_scale", "generator", "negative_prompt")
        size = self.latent_size(height, width, latents)
        retouch_request(
            self, prompt, *references, size, **second, **{name: shared[name] for name in names}
        )  # or raises
        layout = self.layout(
            prompt,
            per_image(layout_prompt, "layout_prompt"),
            height=height,
            width=width,
            layout_steps=layout_steps,
            layout_blend=layout_blend,
            latents=latents,
            **shared,
        )
        if self.interrupt:
            output = layout
        else:
            output = self.retouch(
                prompt,
                *references,
                context_latents=layout.latents,
                mask_blending=mask_blending,
                mask_threshold=mask_threshold,
                **second,
                **shared,
            )
        output.layout_images = layout.images
        output.layout_nsfw_content_detected = layout.nsfw_content_detected
        if output is not layout:
            for stage, taken in layout.seconds.items():
                output.seconds[stage] = output.seconds.get(stage, 0.0) + taken
        return output if return_dict else (output.images, output.layout_images)


class StableDiffusionLayoutRetouchPipeline(LayoutRetouch, PersonalizedStableDiffusionPipeline):
    """Layout-and-Retouch for Stable Diffusion 1.x and 2.x: `LayoutRetouch` says what the calls do,
    `PersonalizedStableDiffusionPipeline` what it is made of. Nothing in the models is changed after a call."""


class StableDiffusionXLLayoutRetouchPipeline(LayoutRetouch, PersonalizedStableDiffusionXLPipeline):
    """Layout-and-Retouch for Stable Diffusion XL: as `StableDiffusionLayoutRetouchPipeline`."""
