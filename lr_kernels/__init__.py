"""Fused attention over several sources for diffusion models, and the small operators of Layout-and-Retouch."""

from .attention import Source, merge_attention_states, multi_source_attention
from .masks import subject_mask
from .plan import AttentionPlan, plan_attention
from .step_blend import blend_schedule, step_blend, step_coefficients
from .token_maps import attention_with_token_maps

__version__ = "0.1.0"

__all__ = [
    "AttentionPlan",
    "Source",
    "attention_with_token_maps",
    "blend_schedule",
    "merge_attention_states",
    "multi_source_attention",
    "plan_attention",
    "step_blend",
    "step_coefficients",
    "subject_mask",
]
