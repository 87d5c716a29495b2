"""Attention under the signatures that other libraries call: PyTorch's, xformers', transformers', ComfyUI's and
diffusers'.

These functions compute attention over one source of keys. Masks are read as what they hold: padding, an interval of
keys for each query (causal order, windows, packed sequences) or a few groups of queries. What the operator cannot
express is refused by name and never dropped: other masks, dropout, and every argument that is not known here."""

from .comfyui import comfyui_attention
from .one_source import (
    attention_call,
    causal_order,
    causal_range,
    check_dimensions,
    check_mask_type,
    refuse_unless_off,
)
from .pytorch import scaled_dot_product_attention
from .transformers import register_with_transformers, transformers_attention
from .varlen import variable_length_attention
from .xformers import memory_efficient_attention

__all__ = [
    "attention_call",
    "causal_order",
    "causal_range",
    "check_dimensions",
    "check_mask_type",
    "comfyui_attention",
    "memory_efficient_attention",
    "refuse_unless_off",
    "register_with_transformers",
    "scaled_dot_product_attention",
    "transformers_attention",
    "variable_length_attention",
]
