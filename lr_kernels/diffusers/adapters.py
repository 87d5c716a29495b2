"""LoRA adapters as the personalization: the vanilla model is the same one with them off."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..checks import fail


@contextmanager
def adapters_off(models: Sequence[nn.Module], names: Sequence[str] | None = None) -> Iterator[None]:
    """Models without their active adapters of these names, or without any; all is as before afterwards.

    Raises:
        ValueError: a name that no layer has active.
    """
    layers = [module for model in models for module in model.modules() if hasattr(module, "active_adapters")]
    active = {name for layer in layers for name in layer.active_adapters}
    for name in names or ():
        if name not in active:
            fail("layout_retouch", "personalized_adapters", f"among the active adapters {sorted(active)}", repr(name))
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            kept = [] if names is None else [name for name in layer.active_adapters if name not in names]
            # Not set_adapter and enable_adapters: they also change which parameters require a gradient.
            layer._active_adapter = kept
            layer._disable_adapters = layer._disable_adapters or not kept
        yield
    finally:
        for layer, names_before, disabled in before:
            layer._active_adapter, layer._disable_adapters = names_before, disabled
