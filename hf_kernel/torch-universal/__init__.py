"""lr_kernels for `kernels.get_local_kernel`: the functions of the installed package, and layers for `kernelize`."""

from lr_kernels import Source, merge_attention_states, multi_source_attention, quantize, step_blend
from lr_kernels.interop import memory_efficient_attention, scaled_dot_product_attention

from . import layers

__all__ = [
    "Source",
    "layers",
    "memory_efficient_attention",
    "merge_attention_states",
    "multi_source_attention",
    "quantize",
    "scaled_dot_product_attention",
    "step_blend",
]
