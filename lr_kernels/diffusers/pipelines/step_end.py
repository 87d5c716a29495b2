"""The callback between two steps of a stage, called as the stock pipelines call it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ...runtime.checks import fail
from .components import PersonalizedPipeline
from .condition import Condition, Control
from .settings import OP, Callback

_CONDITIONS = {"add_text_embeds": "text_embeds", "add_time_ids": "time_ids"}
"""By name of the stock pipelines' variable, the name of the condition that it is."""


class Told(NamedTuple):
    """What the models are told from one step to the next; a callback may change it."""

    latents: Tensor
    """the latents, (n, C, h, w)"""
    condition: Condition
    """the condition of the n images, with guidance the unconditional rows before them"""
    control: Control | None


def tensor_inputs(
    pipe: PersonalizedPipeline, callback: Callback, names: Sequence[str] | None, controlled: bool
) -> tuple[str, ...]:
    """The names of the tensors that a callback gets: those asked for, or those that an object of diffusers says.

    ValueError for one that the pipeline does not have.
    """
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    if names is None:
        names = ()
    if isinstance(names, str) or not isinstance(names, Sequence):
        fail(OP, "callback_on_step_end_tensor_inputs", "a list of names", repr(names))
    allowed = [name for name in pipe._callback_tensor_inputs if controlled or name != "image"]
    if unknown := [name for name in names if name not in allowed]:
        # in the stock pipelines' words
        expected = f"names of tensors; `callback_on_step_end_tensor_inputs` has to be in {allowed}"
        fail(OP, "callback_on_step_end_tensor_inputs", expected, unknown)
    return tuple(names)


def after_step(
    pipe: PersonalizedPipeline, callback: Callback, names: Sequence[str], step: int, t: Tensor, told: Told
) -> Told:
    """Run callback_on_step_end. What it returns counts from the next step on, for the model that `told` is of.

    Where it has switched guidance off (`pipe._guidance_scale`), the conditions are the conditional rows alone. The
    callbacks of diffusers then return the last row, which is that of a single image; it stands for those of all.

    Raises:
        ValueError: it returns neither a dict nor None, or something that does not fit.
    """
    if callback is None:
        return told
    images = len(told.latents)
    before = _tensors(told, images)
    returned = callback(pipe, step, t, {name: before[name] for name in names})
    if returned is None:
        returned = {}
    if not isinstance(returned, Mapping):
        fail(OP, "callback_on_step_end", "a function that returns a dict or None", type(returned).__name__)
    latents = returned.get("latents", told.latents)
    if not isinstance(latents, Tensor) or latents.shape != told.latents.shape:
        expected = f"latents of shape {tuple(told.latents.shape)} from it"
        fail(OP, "callback_on_step_end", expected, getattr(latents, "shape", type(latents).__name__))
    rows = images * (2 if pipe.do_classifier_free_guidance else 1)

    def fitted(name: str) -> Tensor:
        given, x = before[name], returned.get(name, before[name])
        assert given is not None
        if isinstance(x, Tensor) and x.dim() == given.dim():
            if rows == images and (x is given or (len(x) == 1 and x.equal(given[-1:]))):
                x = given[-images:]
            if len(x) in (1, rows):
                return x.to(given).expand(rows, *x.shape[1:])
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        fail(OP, "callback_on_step_end", f"{name} of {rows} rows from it, {given.dim()} dimensions", got)

    added = {name: fitted(variable) for variable, name in _CONDITIONS.items() if name in told.condition.added}
    guidance = told.condition.guidance
    condition = told.condition._replace(
        embeds=fitted("prompt_embeds"), added=added, guidance=None if guidance is None else guidance[-rows:]
    )
    control = told.control
    if control is not None and returned.get("image", before["image"]) is not before["image"]:
        control = replace(control, images=fitted("image")[-images:])
    return Told(latents.to(told.latents), condition, control)


def _tensors(told: Told, images: int) -> dict[str, Tensor | None]:
    """The tensors by the names of the stock pipelines' variables."""
    condition = told.condition
    halves = len(condition.embeds) // images
    tensors = {
        "latents": told.latents,
        "prompt_embeds": condition.embeds,
        "negative_prompt_embeds": condition.embeds[:images] if halves == 2 else None,
        "image": None if told.control is None else told.control.images.repeat(halves, 1, 1, 1),
    }
    return tensors | {
        variable: condition.added[name] for variable, name in _CONDITIONS.items() if name in condition.added
    }
