"""lr_kernels as a kernel for Hugging Face's `kernels`: attention over several sources, attention under other libraries'
signatures, one denoising step, and layers for `kernelize`."""

from . import layers
from .attention.api import multi_source_attention
from .attention.eight_bit import quantize
from .attention.merge import merge_attention_states
from .attention.plan import plan_attention
from .denoising.coefficients import blend_schedule, sigma_coefficients, step_coefficients
from .denoising.step_blend import step_blend
from .interop import memory_efficient_attention, scaled_dot_product_attention, variable_length_attention
from .source import Source

__all__ = [
    "Source",
    "blend_schedule",
    "layers",
    "memory_efficient_attention",
    "merge_attention_states",
    "multi_source_attention",
    "plan_attention",
    "quantize",
    "scaled_dot_product_attention",
    "sigma_coefficients",
    "step_blend",
    "step_coefficients",
    "variable_length_attention",
]
