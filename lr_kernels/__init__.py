"""Fused attention over several sources for diffusion models, and the small operators of Layout-and-Retouch."""

from .attention.api import multi_source_attention
from .attention.eight_bit import quantize
from .attention.merge import merge_attention_states
from .attention.plan import AttentionPlan, plan_attention
from .attention.token_maps import attention_with_token_maps
from .denoising.coefficients import blend_schedule, sigma_coefficients, step_coefficients
from .denoising.step_blend import step_blend
from .features.adain import adain
from .features.correspondence import correspondence
from .features.subject_mask import subject_mask
from .source import Source

__version__ = "0.1.0"

__all__ = [
    "AttentionPlan",
    "Source",
    "adain",
    "attention_with_token_maps",
    "blend_schedule",
    "correspondence",
    "merge_attention_states",
    "multi_source_attention",
    "plan_attention",
    "quantize",
    "sigma_coefficients",
    "step_blend",
    "step_coefficients",
    "subject_mask",
]
