"""A base model with the weights of one subject, loaded when its turn comes and gone after it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..pipelines.pipeline import LayoutRetouch

ADAPTER = "subject"
"""The name under which a subject's LoRA is loaded, one at a time."""


Made = TypeVar("Made")


class Weights(Protocol):
    """What a personalization consists of; None for what it does not have."""

    @property
    def unet(self) -> Path | None:
        """a folder"""

    @property
    def lora(self) -> Path | None:
        """a file"""

    @property
    def textual_inversion(self) -> Path | None:
        """a file, whose embedding becomes that of `token`"""

    @property
    def token(self) -> str | None:
        """the word by which the model knows the subject"""


@contextmanager
def personalized(base: DiffusionPipeline, kind: type[DiffusionPipeline], weights: Weights) -> Iterator[Any]:
    """A pipeline of a class with the components of `base`, while it lasts with the weights of a subject.

    A pipeline of the method gets them as its personalized model, any other as its only one.
    """
    dtype, of_method = base.dtype, issubclass(kind, LayoutRetouch)
    models: dict[str, Any] = {}
    if weights.unet is not None:
        name = "personalized_unet" if of_method else "unet"
        models[name] = UNet2DConditionModel.from_pretrained(weights.unet, dtype=dtype).to(base.device)
    if of_method and weights.lora is not None:
        models["personalized_adapters"] = [ADAPTER]
    pipe: Any = kind.from_pipe(base, dtype=dtype, **models)
    pipe.set_progress_bar_config(disable=True)
    with ExitStack() as undone:
        if weights.lora is not None:
            undone.callback(pipe.unload_lora_weights)
            pipe.load_lora_weights(weights.lora.parent, weight_name=weights.lora.name, adapter_name=ADAPTER)
        if weights.textual_inversion is not None:
            pipe.load_textual_inversion(str(weights.textual_inversion), token=weights.token)
            undone.callback(pipe.unload_textual_inversion, weights.token)
        yield pipe


def base_pipeline(
    kind: type[DiffusionPipeline], model: str, dtype: str, scheduler: str | None, device: torch.device
) -> DiffusionPipeline:
    """A base model's own pipeline on a device, with a scheduler of another class where one is named."""
    base: Any = kind.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
    if scheduler is not None:
        base.scheduler = getattr(diffusers, scheduler).from_config(base.scheduler.config)
    return base


def one_at_a_time(
    base: DiffusionPipeline,
    kind: type[DiffusionPipeline],
    weights: Mapping[str, Weights],
    make: Callable[[Any, str], Made],
) -> Callable[[str], Made]:
    """A function of a subject's name that returns make(pipe, name), the pipe with its weights; they are loaded when
    another subject came before, whose weights are then gone."""
    loaded = ExitStack()
    current: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in current:
            current.clear()
            loaded.close()
            current[name] = make(loaded.enter_context(personalized(base, kind, weights[name])), name)
        return current[name]

    return of
