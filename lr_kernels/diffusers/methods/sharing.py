"""sharing: run a method that shares attention inside a stock pipeline, from a given step on and in given layers."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from ...runtime.checks import check_choice, check_integer, fail, plain_number
from ..processors.install import (
    attention_layers,
    check_not_compiled,
    install_processors,
    layer_grid,
    layer_scale,
    pass_inputs,
    select_layers,
)
from ..processors.unet import CustomAttnProcessor, Pass, asked

Layers = int | str | Sequence[int | str] | Mapping[str, Attention]


@contextmanager
def sharing(
    pipe: DiffusionPipeline,
    method: Callable[..., Tensor],
    *,
    kind: str = "self",
    layers: Layers | None = None,
    steps: int | Collection[int] | None = None,
    rows: int | None = None,
) -> Iterator[Pass]:
    """While it lasts, attention layers of a pipeline's UNet call `method`; afterwards, also after an exception,
    everything is as before.

        with sharing(pipe, method, layers=10, steps=4):
            images = pipe(prompts).images

    Steps are counted as diffusers counts them: the place of the pass's timestep among `pipe.scheduler.timesteps`, over
    the passes that the scheduler makes per step (2 of Heun's). Nothing is counted up, so a run may be interrupted,
    repeated or start late (img2img keeps the numbers of the whole schedule). Outside the steps the layers are stock.

    With gradient checkpointing the blocks run again in the backward pass, in the step of the last forward pass: call
    backward() within the `with` block and before a pass of another step.

    Args:
        pipe: with `unet` and `scheduler`: StableDiffusionPipeline, SDXL's, their relatives. The UNet may be wrapped by
            torch.compile() or have compile_repeated_blocks().
        method: the function of a `CustomAttnProcessor`: of (query, key, value) and by keyword of what it asks for among
            step, layer, grid, key_bias and images. It gets all rows of the UNet's batch: with guidance the images once
            as the unconditional half and once more as the conditional one.
        kind: "self" or "cross".
        layers: None: all; a number: from that layer on, counted from 0 in the order of execution, as MasaCtrl counts; a
            range or list of such numbers and of beginnings of names ("up_blocks"); layers from `select_layers`.
        steps: None: all; a number: from that step on, counted from 0; a range or list of steps.
        rows: the batch that the method's tables are made for, halves times images. Default: any.

    Raises:
        ValueError: layers that do not exist, or are of another kind or UNet; in a pass: another batch than `rows`; a
            schedule that ends before the first of the steps; a timestep that the scheduler does not have.
        NotImplementedError: layers with a processor that is not stock, except a loaded IP-Adapter where the method
            asks for images; a UNet that was compiled in place by its `compile()`; with gradient checkpointing a
            backward() after the block or after a pass of another step.
    """
    for name in ("unet", "scheduler"):
        if getattr(pipe, name, None) is None:
            fail("sharing", "pipe", "a pipeline with a UNet and a scheduler", type(pipe).__name__)
    check_choice("sharing", "kind", kind, ("self", "cross"))
    check_not_compiled("sharing", pipe.unet)
    wanted = _steps(steps)
    chosen = _layers(pipe.unet, kind, layers)
    asks = asked(method)
    run = Pass(active=steps is None)
    scales = {name: layer_scale(pipe.unet, name) for name in chosen} if "grid" in asks else {}
    clock = Clock(pipe, _first(wanted))
    size: tuple[int, int] | None = None
    ended = False

    def before_pass(unet: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal size
        installation.verify()
        sample, timestep = pass_inputs(args, kwargs)
        if rows is not None and sample.shape[0] != rows:
            hint = "without guidance say halves=1; the pipeline repeats prompts for num_images_per_prompt"
            fail("sharing", "rows", f"a UNet's batch of {rows} rows", sample.shape[0], hint)
        if sample.shape[2:] != size:
            height, width = size = sample.shape[2], sample.shape[3]
            run.grids = {name: layer_grid(scale, height, width) for name, scale in scales.items()}
        if steps is not None or "step" in asks:
            step = clock.step(timestep)
            run.active = step in wanted
            run.step = step if "step" in asks else None

    def after_pass(unet: nn.Module, args: tuple, out: Any) -> None:
        if not (torch.is_grad_enabled() and unet.training and getattr(unet, "is_gradient_checkpointing", False)):
            return
        result = out[0] if isinstance(out, tuple) else out.sample
        state = run.active, run.step, run.grids

        def before_backward(grad: Tensor) -> None:
            if ended or state != (run.active, run.step, run.grids):
                got = "one after the `with` block" if ended else "one after a pass of another step"
                hint = "gradient checkpointing runs the blocks again, which would share otherwise"
                fail(
                    "sharing",
                    "backward",
                    "one right after its pass, within the `with` block",
                    got,
                    hint,
                    NotImplementedError,
                )

        if result.requires_grad:
            result.register_hook(before_backward)

    adapters = {n: x.processor for n, x in chosen.items() if isinstance(x.processor, IPAdapterAttnProcessor2_0)}
    processors = {name: CustomAttnProcessor(method, layer=name, run=run, adapter=adapters.get(name)) for name in chosen}
    with install_processors(chosen, processors) as installation:
        hooks = [pipe.unet.register_forward_pre_hook(before_pass, with_kwargs=True)]
        hooks.append(pipe.unet.register_forward_hook(after_pass))
        try:
            yield run
        finally:
            ended = True
            for hook in hooks:
                hook.remove()


class Clock:
    """Says which step a pass of a pipeline's UNet belongs to. The schedule must have the step `first`."""

    def __init__(self, pipe: DiffusionPipeline, first: int = 0):
        self._pipe, self._first = pipe, first
        self._schedule: Tensor | None = None
        self._values: list[float] = []

    def step(self, timestep: float | Tensor) -> int:
        """The number of the step, from 0. ValueError for a timestep that the scheduler does not have, and for a
        schedule that is too short."""
        scheduler = self._pipe.scheduler
        order = getattr(scheduler, "order", 1)
        if scheduler.timesteps is not self._schedule:  # set_timesteps makes a new tensor for every run
            self._schedule = scheduler.timesteps
            self._values = scheduler.timesteps.tolist()
            steps = -(-len(self._values) // order)
            if self._first >= steps:
                expected, got = f"some of 0 to {steps - 1} of the schedule", f"{self._first} as the first"
                fail("sharing", "steps", expected, got, "choose earlier steps, or more num_inference_steps")
        value = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        places = [place for place, other in enumerate(self._values) if other == value]
        if not places:
            fail("sharing", "steps", "a timestep of pipe.scheduler", value, "call its set_timesteps() first")
        # Where a timestep occurs twice (Heun, PNDM) the scheduler knows at which of them it is.
        at = getattr(scheduler, "step_index", getattr(scheduler, "counter", None))
        place = at if at in places else places[0]
        return place // order


def _steps(steps: int | Collection[int] | None) -> Collection[int]:
    if steps is None:
        return range(sys.maxsize)
    if plain_number(steps) is not None:
        first = check_integer("sharing", "steps", steps, 0, "the first step, from 0, or a range or list of steps")
        return range(first, sys.maxsize)
    if not isinstance(steps, Collection) or isinstance(steps, str) or not len(steps):
        fail("sharing", "steps", "the first step, from 0, or a range or list of steps", repr(steps))
    if isinstance(steps, range):
        check_integer("sharing", "steps", _first(steps), 0, "numbers of steps, from 0")
        return steps
    return frozenset(check_integer("sharing", "steps", step, 0, "numbers of steps, from 0") for step in steps)


def _first(steps: Collection[int]) -> int:
    return min(steps[0], steps[-1]) if isinstance(steps, range) else min(steps)


def _layers(unet: nn.Module, kind: str, layers: Layers | None) -> dict[str, Attention]:
    """The chosen layers by name, in the order of execution."""
    every = attention_layers(unet, kind)
    if layers is None:
        return every
    if isinstance(layers, Mapping):
        for name, layer in layers.items():
            if layer is not every.get(name):
                expected = f"{kind}-attention layers of pipe.unet by name"
                hint = f"take them from select_layers(pipe.unet, {kind!r})"
                fail("sharing", "layers", expected, f"{name!r}: {type(layer).__name__}, which is none", hint)
        return {name: layer for name, layer in every.items() if name in layers}
    names = list(every)
    entries = layers.tolist() if hasattr(layers, "tolist") else layers  # arrays and their numbers
    if isinstance(entries, str):
        entries = (entries,)
    elif plain_number(entries) is not None:
        entries = range(entries, len(names)) if isinstance(entries, int) and 0 <= entries < len(names) else [entries]
    expected = f"numbers of layers from 0 to {len(names) - 1}, or beginnings of their names, at least one"
    if not isinstance(entries, Sequence) or not len(entries):
        fail("sharing", "layers", expected, repr(layers))
    chosen = set()
    for entry in entries:
        if isinstance(entry, str):
            chosen |= set(select_layers(unet, kind, entry, "layers"))
        else:
            chosen.add(names[check_integer("sharing", "layers", entry, 0, expected, len(names) - 1)])
    return {name: layer for name, layer in every.items() if name in chosen}
