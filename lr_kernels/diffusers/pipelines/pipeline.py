"""Layout-and-Retouch (arXiv 2407.09779) as diffusers pipelines for Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...runtime.checks import check_integer, fail
from ..processors.bank import ReferenceBank
from .components import PersonalizedStableDiffusionPipeline
from .components_xl import PersonalizedStableDiffusionXLPipeline
from .layout import LayoutStage, lay_out
from .output import LayoutRetouchOutput
from .pictures import Image, one_by_one
from .prompts import read_prompts
from .request import build_request
from .retouch import RetouchStage, retouch
from .schedule import Blend
from .settings import OP, Callback, Generator, Settings, one_or
from .stock import StockArguments


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
        reference_fit: str = "crop",
        layout_mask: Image | list | Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        retouch_guidance_scale: float | None = None,
        eta: float = 0.0,
        layout_steps: int | None = None,
        layout_blend: Blend = "hard",
        retouch_start: int | None = None,
        retouch_end: int | None = None,
        retouch_layers: Sequence[int | str] | None = None,
        reading: str = "routing",
        contexts_from: str = "trajectory",
        targets_from: str = "renoise",
        context_storage: str | None = "device",
        context_limit: int | None = None,
        context_dtype: torch.dtype | None = None,
        mask_blending: bool = False,
        mask_threshold: float | str = "otsu",
        return_maps: bool = False,
        control_image: Image | list[Image] | None = None,
        control_scale: float = 1.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        backend: str = "auto",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **stock: object,
    ) -> LayoutRetouchOutput | tuple:
        """Both stages.

        Args:
            prompt: with the subject's token, as "a sks ball on sand". A list gives several images; the references serve
                them all.
            layout_prompt: the same scene with the class noun alone, as "a ball on sand"; one for all or one per prompt.
            reference_image: an image of the subject, or several. reference_prompt: as "a sks ball"; one for all or one
                per reference.
            subject_tokens: the words by which the model finds the subject in `prompt` and `reference_prompt`, best the
                class noun alone, as "ball": the maps of a rare token are less sharp. Of several subjects a list of
                lists, as [["dog"], ["cat"]], up to 6; the prompts have them all, a reference's prompt that of its own.
            reference_mask: of any kind and size, see `pictures.as_mask`; of several references a list. None: by the
                model's attention.
            reference_subjects: which subject each reference shows. Default: the only one, or one reference for each.
            reference_bank: from the method of that name, in place of reference_image, reference_prompt, reference_mask.
            reference_fit: how a reference of another aspect ratio is brought to the size: "crop" cuts what is too much
                on both sides, "pad" repeats its border, "squeeze" changes the aspect ratio. Its mask likewise.
            layout_mask: where the subject is in the layouts: a mask for all images as `reference_mask`, a list of one
                per image, an array (n, h, w, C), a tensor (n, h, w) or (n, C, h, w); of several subjects a list of
                such. Default: by the model's attention in the last steps of the layout stage.
            negative_prompt: one for all, or one per prompt. num_images_per_prompt: images of each prompt, in order.
            height, width: pixels, multiples of the VAE's factor. Default: the UNet's sample size.
            guidance_scale: classifier-free guidance; at most 1: none. retouch_guidance_scale: that of the retouch
                stage. Default: the same.
            eta: η of DDIM, 0 to 1; other schedulers take 0.
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
            contexts_from: latents of the layouts at each step: "trajectory", as the layout stage went through them;
                "renoise", the finished layouts with the noise that they started from; "inversion" of the finished
                layouts (DDIM). References are re-noised.
            targets_from: where the targets start: "renoise", the finished layouts with their noise; "contexts", the
                latents of the layouts at that step, which keeps the layout better and brings back less of the subject.
            context_storage: where the keys and values of the layouts stay from the layout stage on: "device" or "cpu"
                (copied step by step). None: they are computed again, in rows of the retouch stage's batch; so they are
                where contexts_from is not "trajectory", and with "swap".
            context_limit: bytes that they may take. context_dtype: torch.int8 or torch.float8_e4m3fn keep them in 8
                bits, about half the bytes of bf16; None: in the model's dtype.
            mask_blending: adaptive mask blending. False: the layout's mask throughout. True: it moves to the target's
                own mask, and outside of both masks the latents are the layout's.
            mask_threshold: of `subject_mask`.
            return_maps: whether the output has `maps` and `matches`.
            control_image: what the pipeline's `controlnet` follows in both stages, for layouts and targets: one image
                for all or one per prompt. control_scale: its strength.
            generator: one, or a list of one per image; latents: initial noise (n, C, height/f, width/f).
            backend: of all lr_kernels operators, see `multi_source_attention`.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called in both stages as (pipe, step, timestep, tensors), with a step's number in the
                schedule; a function or one of `diffusers.callbacks`. `pipe.stage` says which stage it is. What it
                returns in a dict counts from the next step on, and so do the attributes that the callbacks of
                diffusers change: `_guidance_scale` (also to end guidance), `_guidance_rescale`, `_interrupt`. Each
                stage starts with its own guidance scale.
            callback_on_step_end_tensor_inputs: names of these tensors, as in the stock pipelines and "image", that of
                the ControlNet. Those of prompts belong to the model of the larger weight in this step; in the retouch
                stage they are the targets'.
            stock: what the stock pipelines also take, by the same names: see `StockArguments`.

        Returns:
            `LayoutRetouchOutput`, or (images, layout_images) where return_dict is False. If the layout stage was
            interrupted (`pipe._interrupt = True` in a callback), the images are the layouts as they were then.

        Raises:
            ValueError: an argument or a component that does not fit, named; a bank built for something else.
            NotImplementedError: a scheduler, a UNet or an attention processor that the method cannot use; "swap"
            without layouts or with a bank. TypeError: an unknown argument.
        """
        copies = check_integer(OP, "num_images_per_prompt", num_images_per_prompt, 1, "a positive integer")
        arguments = StockArguments.given(stock, xl=self.pools)
        prompts = read_prompts(self, arguments, prompt, layout_prompt, negative_prompt, copies=copies)
        if control_image is not None:
            control_image = one_by_one(control_image)
            count = prompts.images // copies
            if len(control_image) not in (1, count):
                fail(OP, "control_image", f"{one_or(count)} images, as there are prompts", len(control_image))
            if len(control_image) > 1:
                control_image = [image for image in control_image for _ in range(copies)]
        request = build_request(
            self,
            Settings.given(locals()),
            arguments,
            prompts,
            self.latent_size(height, width, latents),
            latents=latents,
            control_image=control_image,
            subject_tokens=subject_tokens,
            layout_mask=layout_mask,
            reference_image=reference_image,
            reference_prompt=reference_prompt,
            reference_mask=reference_mask,
            reference_subjects=reference_subjects,
            reference_bank=reference_bank,
        )
        layout = lay_out(self, request)
        output = layout if self.interrupt else retouch(self, request, layout.contexts)
        seconds, rows = dict(layout.seconds), dict(layout.rows)
        if output is not layout:
            for stage, cost in output.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + cost
            for stage, count in output.rows.items():
                rows[stage] = rows.get(stage, 0) + count
        # without the contexts' keys and values, which may take gigabytes
        contexts = None if layout.contexts is None else replace(layout.contexts, bank=None)
        output = replace(  # what is set afterwards would be no entry of it
            output,
            layout_images=layout.images,
            contexts=contexts,
            layout_nsfw_content_detected=layout.nsfw_content_detected,
            seconds=seconds,
            rows=rows,
        )
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images, output.layout_images)


class StableDiffusionLayoutRetouchPipeline(LayoutRetouch, PersonalizedStableDiffusionPipeline):
    """Layout-and-Retouch for Stable Diffusion 1.x and 2.x: `LayoutRetouch` says what the calls do,
    `PersonalizedStableDiffusionPipeline` what it is made of. Nothing in the models is changed after a call."""


class StableDiffusionXLLayoutRetouchPipeline(LayoutRetouch, PersonalizedStableDiffusionXLPipeline):
    """Layout-and-Retouch for Stable Diffusion XL: as `StableDiffusionLayoutRetouchPipeline`."""
