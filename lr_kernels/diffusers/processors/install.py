"""Finding a UNet's attention layers, putting processors into a model's layers and back, and hooks on a UNet's pass."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor, nn

from ...runtime.checks import check_choice, fail
from .unet import OwnProcessor

_STOCK = (
    AttnProcessor, AttnProcessor2_0, FluxAttnProcessor, JointAttnProcessor2_0, Flux2AttnProcessor,
    Flux2ParallelSelfAttnProcessor, QwenDoubleStreamAttnProcessor2_0,
)  # fmt: skip


_EXECUTION = ("down_blocks", "mid_block", "up_blocks")


def attention_layers(unet: nn.Module, kind: str) -> dict[str, Attention]:
    """The "self" or "cross" attention layers of a UNet's transformer blocks by name, without other attention.

    They come in the order of execution, down, mid, up, in which methods count them. (A UNet registers its parts as
    down, up, mid.)

    Raises:
        ValueError: another kind. TypeError: no model.
    """
    check_choice("attention_layers", "kind", kind, ("self", "cross"))
    check_model("attention_layers", "unet", unet)
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps the module and renames its children
    found = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention)
        and name.rpartition(".")[2] in ("attn1", "attn2")
        and module.is_cross_attention == (kind == "cross")
    }
    places = {part: place for place, part in enumerate(_EXECUTION)}
    return dict(sorted(found.items(), key=lambda item: places.get(item[0].split(".")[0], len(places))))


def check_model(op: str, argument: str, model: object) -> None:
    """TypeError for what is no model; a pipeline is told which of its parts is."""
    if not isinstance(model, nn.Module):
        parts = [name for name in ("transformer", "unet") if hasattr(model, name)]
        hint = f"pass pipe.{parts[0]}" if parts else ""
        fail(op, argument, "a model, torch.nn.Module", type(model).__name__, hint, TypeError)


def layer_scale(unet: UNet2DConditionModel, name: str) -> int:
    """Side of a layer's token in latent pixels: 1, 2, 4 or 8 in the UNets of Stable Diffusion.

    Args:
        name: of a layer of the UNet, as from `select_layers`.
    """
    if "block_out_channels" not in unet.config:
        hint = "name layers by the beginnings of their names"
        fail("select_layers", "choice", "scales of a UNet only", type(unet).__name__, hint)
    deepest = len(unet.config.block_out_channels) - 1
    block, index = name.split(".")[:2]
    match block:
        case "down_blocks":
            return 2 ** int(index)
        case "up_blocks":
            return 2 ** (deepest - int(index))
    return 2**deepest


def layer_grid(scale: int, height: int, width: int) -> tuple[int, int]:
    """The grid of a layer's tokens, (rows, columns).

    Args:
        scale: of the layer, from `layer_scale`. height, width: of the latents, in latent pixels (the picture's divided
            by the VAE's factor, 8). A UNet rounds a side up each time it halves it.
    """
    return -(-height // scale), -(-width // scale)


def select_layers(
    unet: UNet2DConditionModel, kind: str, choice: Sequence[int | str] | None = None, name: str = "choice"
) -> dict[str, Attention]:
    """The attention layers of `kind` that match any entry of `choice`, in the order of execution.

    Args:
        choice: scales (see `layer_scale`) and beginnings of layer names such as "up_blocks.1". None: all layers.
        name: of the argument in messages.

    Raises:
        ValueError: an entry that matches no layer.
    """
    layers = attention_layers(unet, kind)
    if choice is None:
        return layers
    entries = (choice,) if isinstance(choice, Integral | str) else choice
    if not isinstance(entries, Iterable) or not all(isinstance(entry, Integral | str) for entry in entries):
        fail("select_layers", name, "scales and beginnings of layer names, at least one", choice)
    choice = tuple(entries)
    if not choice:
        fail("select_layers", name, "scales and beginnings of layer names, at least one", list(choice))
    chosen: set[str] = set()
    for entry in choice:
        if isinstance(entry, str):
            matches = beginning_with(entry, layers)
        else:
            matches = [layer for layer in layers if layer_scale(unet, layer) == entry]
        if not matches:
            scales = sorted({layer_scale(unet, layer) for layer in layers})
            expected = f"one of the scales {scales} or the beginning of a layer's name"
            fail("select_layers", name, expected, repr(entry))
        chosen |= set(matches)
    return {name: layer for name, layer in layers.items() if name in chosen}


def beginning_with(entry: str, names: Iterable[str]) -> list[str]:
    """The names of layers that begin with an entry such as "up_blocks.1", which ends where a part of a name does."""
    return [name for name in names if f"{name}.".startswith(entry.rstrip(".") + ".")]


class Installation:
    """Processors that stand in for a model's own. `install_processors` makes it; `remove`, or the end of a `with`
    block, undoes it."""

    def __init__(self, layers: Mapping[str, Attention | FluxAttention], processors: Mapping[str, object]):
        self.layers = dict(layers)
        self.processors = {name: processors[name] for name in layers}
        self.previous = {name: layer.processor for name, layer in layers.items()}
        self.also_undo = contextlib.ExitStack()
        """what else was changed in the model for these processors: closed by `remove`"""
        self._warned = False

    def replaced(self) -> list[str]:
        """The layers whose processor is no longer the installed one; none after `remove`."""
        return [name for name, layer in self.layers.items() if layer.processor is not self.processors[name]]

    def verify(self) -> None:
        """Warn, the first time only, where something replaced an installed processor."""
        replaced = self.replaced()
        if replaced and not self._warned:
            self._warned = True
            ours, now = (type(x) for x in (self.processors[replaced[0]], self.layers[replaced[0]].processor))
            warnings.warn(
                f"lr_kernels: {len(replaced)} of {len(self.layers)} attention processors were replaced after their "
                f"installation ({replaced[0]} is now {'a new ' if now is ours else ''}{now.__name__}); "
                "these layers take no part in the method",
                RuntimeWarning,
                stacklevel=3,
            )

    def before_passes(self, model: nn.Module, begin: Callable[[Tensor, Mapping[str, Any]], None] | None = None) -> None:
        """Before each pass of the model, until `remove`: `verify`. Passes that are being compiled do without.

        Args:
            begin: called with the pass's `img_ids` and all its keyword arguments where the tensor is another one than
                in the pass before. Pipelines have one for all steps, so that reading it synchronizes a GPU once.
        """
        last: Tensor | None = None

        def before(inputs: Mapping[str, Any]) -> None:
            nonlocal last
            self.verify()
            ids = inputs.get("img_ids")
            if begin is not None and ids is not None and ids is not last:
                begin(ids, inputs)
                last = ids

        whole = getattr(model, "_orig_mod", model)
        self.also_undo.callback(whole.register_forward_pre_hook(_BeforePass(before), with_kwargs=True).remove)

    def remove(self) -> None:
        """Put the previous processors back, except where something else has taken the place since: a warning, where
        `verify` gave none yet.

        A processor of this package that was replaced becomes stock for good: what replaced it may bring it back, as
        unfuse_qkv_projections() does.
        """
        try:
            self.verify()
        finally:  # a user may have made warnings errors
            self.also_undo.close()
            while self.layers:
                name, layer = self.layers.popitem()
                ours = self.processors[name]
                if layer.processor is not ours and isinstance(ours, OwnProcessor):
                    ours.make_stock()
                if layer.processor is ours or type(layer.processor) is type(ours):
                    previous = self.previous[name]
                    if hasattr(previous, "_parallel_config") and hasattr(ours, "_parallel_config"):
                        # enable_parallelism() may have come in between
                        previous._parallel_config = ours._parallel_config
                    layer.set_processor(previous)

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _BeforePass:
    """A hook of a model. Copies of the model, by deepcopy or pickle, have one that does nothing."""

    def __init__(self, call: Callable[[Mapping[str, Any]], None] | None = None):
        self._call = call

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._call is not None and not torch.compiler.is_compiling():
            self._call(kwargs)

    def __reduce__(self) -> tuple[type, tuple]:
        return _BeforePass, ()


def check_stock(
    layers: Mapping[str, Attention | FluxAttention], processors: Mapping[str, object] | None = None
) -> None:
    """NotImplementedError for a layer whose processor is not stock, unless the new processor also does what that one
    did."""
    for name, layer in layers.items():
        if processors is not None and getattr(processors.get(name), "adapter", None) is layer.processor:
            continue
        if type(layer.processor) not in _STOCK and not getattr(layer.processor, "is_stock", False):
            dispatches = hasattr(layer.processor, "_attention_backend")
            fail(
                "install_processors",
                name,
                "a stock attention processor",
                type(layer.processor).__name__,
                "undo what put it there (unfuse_qkv_projections(), disable_attention_slicing(), unload_ip_adapter()), "
                "or leave the layer out"
                + ("; models that dispatch take use_attention_backend(model)" if dispatches else ""),
                NotImplementedError,
            )


def install_processors(
    layers: Mapping[str, Attention | FluxAttention], processors: Mapping[str, object]
) -> Installation:
    """Set each layer's processor; a context manager that restores the previous ones.

    Args:
        layers: name -> layer, from `select_layers` or `joint_attention_layers`. processors: name -> the processor for
            it.

    Raises:
        ValueError: no layers. KeyError: a layer for which there is no processor.
        NotImplementedError: a layer has a processor that is not stock (IP-Adapter, attention slicing, fused
            projections). Replacing it would change what the model computes.

    Whatever is raised, all layers have their previous processors again.
    """
    if not layers:
        hint = (
            "Flux, Flux2, SD3 and Qwen-Image have joint_attention_layers(model); UNets and PixArt "
            "attention_layers(model, 'self')"
        )
        fail("install_processors", "layers", "at least one layer", "none", hint)
    check_stock(layers, processors)
    return put_processors(layers, processors)


def put_processors(layers: Mapping[str, Attention | FluxAttention], processors: Mapping[str, object]) -> Installation:
    """`install_processors` for layers whose processors were looked at. Whatever is raised, all layers have their
    previous processors again."""
    installation = Installation(layers, processors)
    try:
        for name, layer in layers.items():
            layer.set_processor(installation.processors[name])
    except BaseException:
        for name, layer in layers.items():
            layer.set_processor(installation.previous[name])
        raise
    return installation


def pass_inputs(args: tuple, kwargs: dict) -> tuple[Tensor, float | Tensor]:
    """Sample and timestep of a UNet's call."""
    sample = args[0] if args else kwargs["sample"]
    return sample, args[1] if len(args) > 1 else kwargs["timestep"]


def check_not_compiled(op: str, model: nn.Module, name: str = "unet") -> None:
    """NotImplementedError for a model that was compiled in place, since its compiled graph does not call hooks.

    Args:
        name: that of the model in its pipeline.
    """
    if getattr(getattr(model, "_orig_mod", model), "_compiled_call_impl", None) is not None:
        hint = f"use pipe.{name} = torch.compile(pipe.{name}) or pipe.{name}.compile_repeated_blocks()"
        fail(op, name, "one that is not compiled in place", f"one after {name}.compile()", hint, NotImplementedError)
