"""Fused attention over several sources for diffusion models, and the small operators of Layout-and-Retouch."""

from .attention import Source, merge_attention_states, multi_source_attention
from .plan import AttentionPlan, plan_attention

__version__ = "0.1.0"

__all__ = ["AttentionPlan", "Source", "merge_attention_states", "multi_source_attention", "plan_attention"]
