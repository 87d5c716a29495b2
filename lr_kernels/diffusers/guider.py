"""Step-blended denoising, stage 1 of Layout-and-Retouch, as a guider of diffusers' modular pipelines."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import BlockState
from torch import Tensor, nn

from ..runtime.checks import check_number, fail, plain_number
from .pipelines.adapters import active_adapters, adapters_off
from .pipelines.schedule import DEFAULT_SWITCH, Blend, blend_weights, step_in_schedule

_OP = "StepBlendGuidance"
_ABSENT = object()
_acting_on: WeakKeyDictionary[nn.Module, weakref.ref] = WeakKeyDictionary()
"""By denoiser, the guider that prepared it last."""


class StepBlendGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance in which the vanilla model lays out the image and the personalized one finishes it.

        cond, uncond = (1 - w_i)·vanilla + w_i·personalized, of both
        pred         = uncond + guidance_scale·(cond - uncond)

    with w_i the weight of step i. A model of weight 0 does not run, so w = 0 and w = 1 are `ClassifierFreeGuidance`
    of one model, bit for bit; else everything is computed in fp32 and rounded once. (The switch of "hard" is stage 1
    of arXiv 2407.09779; the other weights are this library's.)

    The pipeline's denoiser is the personalized model. It acts as the vanilla one where a batch needs that: with its
    adapters off, or by calling `vanilla`. Only this instance changes, and only from `prepare_models` to
    `cleanup_models`. A denoiser that raises in between is restored by the next `set_state` or `prepare_models`, also of
    another `StepBlendGuidance`; call `reset()` to have it back at once, as before a run with diffusers' own guiders.

    Args:
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: of `ClassifierFreeGuidance`,
            start and stop too: outside them there is no unconditional pass. The models are blended all the same.
        layout_steps: λ1, steps of the vanilla model: all of them give the vanilla image, 0 the personalized one.
            Default: 0.3 of the steps.
        layout_blend: weights w, see `blend_weights`. "hard" switches after layout_steps, "linear" and "cosine" ramp up
            from there; or step -> weight, or one weight per step.
        adapters: names of the denoiser's adapters (LoRA and others of peft) to switch off for the vanilla model. None:
            all that are active. Not used where there is `vanilla`.
        vanilla: a whole vanilla UNet or transformer, on the denoiser's device and in its dtype. It can also be set
            later, as an attribute; it is not part of the config.

    Raises:
        ValueError: guidance_scale is not finite, layout_blend is None. At the first step of a run: a weight that is NaN
            or outside [0, 1], layout_steps outside 0 to steps, a wrong number of weights. Where the vanilla model runs:
            a denoiser without active adapters, or with fused ones, an adapter that is not active, layout inputs that do
            not fit.
    """

    _input_predictions: ClassVar[list[str]] = ["layout_cond", "layout_uncond", "pred_cond", "pred_uncond"]
    ignore_for_config: ClassVar[list[str]] = ["vanilla"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        layout_steps: int | None = None,
        layout_blend: Blend = "hard",
        adapters: Sequence[str] | None = None,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        vanilla: nn.Module | None = None,
    ):
        guidance_scale = check_number(_OP, "guidance_scale", guidance_scale)
        if layout_blend is None:
            fail(_OP, "layout_blend", "a name, weights or a function", None, "a function is not saved: pass it again")
        if not isinstance(layout_blend, str) and not callable(layout_blend):
            layout_blend = [float(w) for w in layout_blend]
        if adapters is not None:
            adapters = [adapters] if isinstance(adapters, str) else list(adapters)
        super().__init__(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
            enabled=enabled,
        )
        # The config is written as JSON, which has no NumPy numbers.
        number: Any = plain_number(layout_steps)
        layout_steps = layout_steps if number is None else number
        kept = None if callable(layout_blend) else layout_blend
        numbers = {"guidance_scale": guidance_scale, "layout_steps": layout_steps}
        self.register_to_config(layout_blend=kept, adapters=adapters, **numbers)
        self.layout_steps = layout_steps
        self.layout_blend = layout_blend
        self.adapters = adapters
        self.vanilla = vanilla
        self._weight = 1.0
        self._layout_inputs: dict[str, Tensor] = {}
        self._acting = ExitStack()  # the contexts that make the denoiser the vanilla model

    def new(self, **kwargs: Any) -> "StepBlendGuidance":
        """A guider of the same configuration and vanilla model, but for `kwargs`; without layout inputs."""
        vanilla = kwargs.pop("vanilla", self.vanilla)
        guider = super().new(**{"layout_blend": self.layout_blend, **kwargs})
        guider.vanilla = vanilla
        return guider

    def set_layout_inputs(self, **inputs: Tensor) -> None:
        """Conditional inputs of the vanilla model in place of the pipeline's: those of a prompt without the subject.

        Args:
            inputs: by the names that the pipeline's denoising block gives its guider: prompt_embeds and text_embeds of
                SDXL, encoder_hidden_states and text_embeds of SD3. One row per image, as the pipeline's, in its dtype
                and on its device. They replace those of an earlier call and stay for later runs; none: all inputs are
                the pipeline's. A name or a number of rows that the pipeline does not have is a ValueError when it runs.
        """
        self._layout_inputs = inputs

    def reset(self) -> None:
        """Make the denoiser the personalized model again, exactly as it was. Only needed where the denoiser raised."""
        self._acting.close()

    # Methods that modular pipelines call

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Which step the loop is at, and with it the weight of the personalized model."""
        self.reset()
        if not 0 <= step < num_inference_steps:
            hint = "a scheduler that calls the model more than once per step does not fit"
            fail(_OP, "step", f"0 to {num_inference_steps - 1}", step, hint)
        default = round(DEFAULT_SWITCH * num_inference_steps)
        switch = step_in_schedule("layout_steps", self.layout_steps, default, 0, num_inference_steps)
        self._weight = blend_weights(self.layout_blend, switch, num_inference_steps)[step].item()
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: dict[str, Tensor | tuple[Tensor, Tensor]]) -> list[BlockState]:
        """The batches of a step: those of the personalized model, then those of the vanilla one."""
        return self._layout_batches([self._prepare_batch(data, *batch) for batch in self._batches()])

    def prepare_inputs_from_block_state(
        self, data: BlockState, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[BlockState]:
        """The same from the state of modular pipelines."""
        batches = [self._prepare_batch_from_block_state(input_fields, data, *batch) for batch in self._batches()]
        return self._layout_batches(batches)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Make the denoiser run the model of the next batch."""
        self.reset()
        other = _acting_on.get(denoiser, lambda: None)()  # whose denoiser raised in its run
        if other is not None:
            other.reset()
        _acting_on[denoiser] = weakref.ref(self)
        super().prepare_models(denoiser)
        if not self._current.startswith("layout"):
            return
        if self.vanilla is denoiser:
            fail(_OP, "vanilla", "another module than the denoiser, which is the personalized model", "the same")
        if self.vanilla is not None:
            self._acting.enter_context(_calling(denoiser, self.vanilla))
            return
        if not active_adapters([denoiser]):
            fail(_OP, "vanilla", "a model, or a denoiser that has active adapters", "neither")
        self._acting.enter_context(adapters_off(_OP, [denoiser], self.adapters))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Give the denoiser back as it was."""
        self.reset()

    def forward(
        self,
        layout_cond: Tensor | None = None,
        layout_uncond: Tensor | None = None,
        pred_cond: Tensor | None = None,
        pred_uncond: Tensor | None = None,
    ) -> GuiderOutput:
        """Predictions of the models that ran -> the guided one, and the blended ones that it is made of."""
        if layout_cond is None:
            return super().forward(pred_cond, pred_uncond)
        if pred_cond is None:
            return super().forward(layout_cond, layout_uncond)
        dtype = pred_cond.dtype
        output = super().forward(self._blend(layout_cond, pred_cond), self._blend(layout_uncond, pred_uncond))
        return GuiderOutput(**{name: None if x is None else x.to(dtype) for name, x in output.items()})

    @property
    def num_conditions(self) -> int:
        """Batches of this step."""
        return len(self._batches())

    @property
    def is_conditional(self) -> bool:
        """Whether the batch that is prepared now has the prompts, not the negative ones."""
        return self._count_prepared > 0 and not self._current.endswith("uncond")

    # Private

    def _batches(self) -> list[tuple[int, str]]:
        """(0 for the conditional inputs, 1 for the unconditional ones; name of the prediction) of each model call.

        The conditional one of a model comes first: guess mode of ControlNets needs it.
        """
        models = [name for name, runs in (("layout", self._weight < 1), ("pred", self._weight > 0)) if runs]
        kinds = ["cond", "uncond"] if self._is_cfg_enabled() else ["cond"]
        return [(i, f"{model}_{kind}") for model in models for i, kind in enumerate(kinds)]

    @property
    def _current(self) -> str:
        return self._batches()[self._count_prepared - 1][1]

    def _layout_batches(self, batches: list[BlockState]) -> list[BlockState]:
        """The batches, with the layout inputs in the vanilla model's conditional one."""
        if batches[0][self._identifier_key] != "layout_cond":
            return batches
        first = batches[0].as_dict()
        known = [name for name, x in first.items() if name != self._identifier_key and x is not None]
        for name, x in self._layout_inputs.items():
            if name not in known:
                fail(_OP, f"set_layout_inputs({name})", "one of " + ", ".join(known), name)
            if len(x) != len(first[name]):
                fail(_OP, f"set_layout_inputs({name})", f"{len(first[name])} rows, one per image", len(x))
            batches[0][name] = x
        return batches

    def _blend(self, layout: Tensor | None, personalized: Tensor | None) -> Tensor | None:
        if layout is None or personalized is None:
            return None
        dtype = torch.promote_types(layout.dtype, torch.float32)
        return torch.lerp(layout.to(dtype), personalized.to(dtype), self._weight)


@contextmanager
def _calling(denoiser: nn.Module, vanilla: nn.Module) -> Iterator[None]:
    """While it lasts this instance of the denoiser runs the vanilla model."""
    before = vars(denoiser).get("forward", _ABSENT)
    vars(denoiser)["forward"] = vanilla  # not by setattr: nn.Module would make it a submodule
    try:
        yield
    finally:
        if before is _ABSENT:
            del vars(denoiser)["forward"]
        else:
            vars(denoiser)["forward"] = before
