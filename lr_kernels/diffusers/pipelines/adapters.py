"""LoRA adapters as the personalization: the vanilla model is the personalized one with its adapters off."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.utils import is_peft_available
from torch import nn

from ...runtime.checks import fail

_busy: set[int] = set()
"""The layers whose adapters a running call has switched off. Another call on them is refused, since it would take that
for their usual state."""


def active_adapters(models: Sequence[nn.Module]) -> set[str]:
    """Names of the adapters (LoRA and others of peft) that act in any layer of the models."""
    return _active(_layers(models))


def check_free(op: str, models: Sequence[nn.Module], model: str = "unet") -> None:
    """RuntimeError, which names the component `model`, while another call has the models' adapters off."""
    _check_free(op, _layers(models), model)


@contextmanager
def adapters_off(
    op: str,
    models: Sequence[nn.Module],
    names: Sequence[str] | None = None,
    *,
    argument: str = "adapters",
    model: str = "unet",
) -> Iterator[None]:
    """While it lasts the models are without the active adapters of these names; None: without any.

    Args:
        op: the function that messages name. argument: what the names are called there. model: the component whose
            adapters they are.

    Raises:
        ValueError: a name that is not active, adapters that are fused. RuntimeError: another call has them off.
    """
    layers = _layers(models)
    _check_free(op, layers, model)
    active = _active(layers)
    off = active if names is None else set(names)
    if off - active or (names is not None and not off):
        fail(op, argument, f"some of the active ones, {sorted(active)}", sorted(off))
    if any(layer.merged for layer in layers):
        fail(op, argument, "adapters that are not fused", "fused ones", "call unfuse_lora() first")
    before = [(layer, layer._active_adapter) for layer in layers]
    _busy.update(map(id, layers))
    try:
        for layer in layers:
            # peft's set_adapter and enable_adapters would also change which weights require a gradient.
            layer._active_adapter = [name for name in layer.active_adapters if name not in off]
        yield
    finally:
        for layer, names_before in before:
            layer._active_adapter = names_before
        _busy.difference_update(map(id, layers))


def _active(layers: Sequence[Any]) -> set[str]:
    return {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}


def _check_free(op: str, layers: Sequence[nn.Module], model: str) -> None:
    if _busy.intersection(map(id, layers)):
        hint = "models that pipelines share serve one call at a time"
        fail(op, model, "a model that no other call is using", "one whose adapters are off", hint, RuntimeError)


def _layers(models: Sequence[nn.Module]) -> list[Any]:
    """All layers of peft in the models."""
    if not is_peft_available():
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
