"""The one line that lets a transformer read its cached references, or a bank's, where they lie."""

from collections.abc import Mapping
from typing import Any

from diffusers import WanAnimate2Transformer3DModel
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ....runtime.checks import fail
from ...processors.bank_values import EIGHT_BITS
from ...processors.install import Installation, put_processors
from . import flux2, glm_image, qwen_image21, wan_animate2
from .bank import TransformerReferenceBank, model_of

_REPLACES: dict[type, type] = {**flux2.REPLACES, **qwen_image21.REPLACES, **glm_image.REPLACES, **wan_animate2.REPLACES}


def reference_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a transformer that have a stock processor of cached references, by name."""
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module and renames its children
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention | AttentionModuleMixin) and type(module.processor) in _REPLACES
    }


def use_cached_references(model: nn.Module, bank: TransformerReferenceBank | None = None) -> Installation:
    """Replace stock processors that concatenate cached references by ones that read them in place.

    Results are stock's to rounding. Nothing else of the pipeline changes: it fills its cache, and clears it, as before.
    With a bank the model needs no cache: call the pipeline without reference images.

    Args:
        model: the transformer of a loaded pipeline: Flux2Transformer2DModel with the processors of
            Flux2KleinKVPipeline, QwenImage21Transformer2DModel, GlmImageTransformer2DModel or
            WanAnimate2Transformer3DModel.
        bank: of references that the model reads in every pass; see `extract_references`. Flux2KleinKVPipeline only.

    Returns:
        The installation, also a context manager: `remove()`, or the end of a `with` block, restores the model.

    Raises:
        ValueError: a model without such processors; a bank of another model, of other layers, heads or precision, or
            one that is not placed.
    """
    if not isinstance(model, nn.Module):
        fail("use_cached_references", "model", "a transformer", type(model).__name__, "pass pipe.transformer")
    layers = reference_layers(model)
    if not layers:
        hint = (
            "Flux2KleinKVPipeline gives its transformer such processors; where they are replaced already, "
            "call remove() of that installation first"
        )
        expected = "a transformer with a stock processor of cached references"
        fail("use_cached_references", "model", expected, type(model).__name__, hint)
    if bank is not None:
        _check_bank(model, layers, bank)
    processors: dict[str, Any] = {}
    for name, layer in layers.items():
        processors[name] = processor = _REPLACES[type(layer.processor)]()
        processor.stand_in_for(layer.processor)
        if bank is not None:
            processor.reference = bank.sources[name]
    installation = put_processors(layers, processors)
    installation.before_passes(model, None if bank is None else _refuse_other_references)
    whole = getattr(model, "_orig_mod", model)
    if isinstance(whole, WanAnimate2Transformer3DModel):
        before, whole.block_masks = whole.block_masks, wan_animate2.NoBlockMasks()
        installation.also_undo.callback(setattr, whole, "block_masks", before)
    return installation


def _refuse_other_references(ids: Tensor, inputs: Mapping[str, Any]) -> None:
    """NotImplementedError for a pass of Flux2 with references among its image's tokens: it would have a bank's, too."""
    if inputs.get("kv_cache_mode") is None and bool((ids[..., 0] != 0).any()):
        hint = "call the pipeline without reference images, or remove() the bank"
        expected, got = "the target's tokens alone while a bank is read", "those of references besides"
        fail("use_cached_references", "img_ids", expected, got, hint, NotImplementedError)


def _check_bank(model: nn.Module, layers: dict[str, Any], bank: TransformerReferenceBank) -> None:
    op = "use_cached_references"
    if not isinstance(bank, TransformerReferenceBank):
        fail(op, "bank", "a TransformerReferenceBank or None", type(bank).__name__)
    if any(type(layer.processor) not in flux2.REPLACES for layer in layers.values()):
        hint = "extract_references says why"
        fail(op, "bank", "None for this model", f"a bank for {type(model).__name__}", hint, NotImplementedError)
    if bank.model != model_of(model):
        fail(op, "bank", f"one of {model_of(model)}", f"one of {bank.model}", "extract the references with this model")
    if not bank.rotated:
        fail(op, "bank", "keys that are placed", "keys before RoPE", "call bank.place(model)")
    for name in layers.keys() ^ bank.sources.keys():
        fail(op, "bank", f"the layers of {type(model).__name__}", f"{name} in one of them only")
    for name, layer in layers.items():
        expected, found = (layer.heads, layer.head_dim), tuple(bank.sources[name].key.shape[2:])
        if found != expected:
            fail(op, "bank", f"(heads, head_dim) = {expected} in {name}", found)
    dtype = getattr(model, "_orig_mod", model).dtype  # in which it computes: weights may be stored in another one
    if bank.dtype not in (*EIGHT_BITS, dtype):
        fail(op, "bank", f"{dtype} as the model, or 8 bits", bank.dtype, "use dequantized(dtype)")
