"""Fused attention over several sources for diffusion models, and the small operators of Layout-and-Retouch."""

from .adain import adain
from .attention import multi_source_attention
from .coefficients import blend_schedule, sigma_coefficients, step_coefficients
from .correspondence import correspondence
from .masks import subject_mask
from .merge import merge_attention_states
from .plan import AttentionPlan, plan_attention
from .source import Source
from .step_blend import step_blend
from .token_maps import attention_with_token_maps

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
    "sigma_coefficients",
    "step_blend",
    "step_coefficients",
    "subject_mask",
]
