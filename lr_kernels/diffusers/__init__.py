"""Layout-and-Retouch for diffusers: attention processors, parts of the stages, pipeline. Importing changes nothing."""

from ..extras import require

require("diffusers")

from . import methods
from .backend import register_attention_backend, use_attention_backend
from .bank import BankAttnProcessor, ReferenceBank
from .components import PersonalizedStableDiffusionPipeline
from .components_xl import PersonalizedStableDiffusionXLPipeline
from .features import noised_rows, reference_adain, shared_group_norms
from .guider import StepBlendGuidance
from .install import Installation, attention_layers, install_processors, layer_grid, layer_scale, select_layers
from .inversion import invert, renoise
from .joint import (
    CustomFluxAttnProcessor,
    CustomSD3AttnProcessor,
    joint_attention,
    joint_attention_layers,
    shared_joint_attention,
)
from .output import LayoutRetouchOutput
from .pipeline import StableDiffusionLayoutRetouchPipeline, StableDiffusionXLLayoutRetouchPipeline
from .processors import AttentionState, CustomAttnProcessor, MultiSourceAttnProcessor, TokenMapAttnProcessor
from .routing import BACKGROUND, FOREGROUND, OWN, RetouchBatch, Routing, Swap, route, swap, token_mask
from .schedule import blend_weights, ddim_table
from .sharing import sharing
from .subject import SubjectMaps, find_subjects
from .subject_masks import SubjectMasks

__all__ = [
    "BACKGROUND",
    "FOREGROUND",
    "OWN",
    "AttentionState",
    "BankAttnProcessor",
    "CustomAttnProcessor",
    "CustomFluxAttnProcessor",
    "CustomSD3AttnProcessor",
    "Installation",
    "LayoutRetouchOutput",
    "MultiSourceAttnProcessor",
    "PersonalizedStableDiffusionPipeline",
    "PersonalizedStableDiffusionXLPipeline",
    "ReferenceBank",
    "RetouchBatch",
    "Routing",
    "StableDiffusionLayoutRetouchPipeline",
    "StableDiffusionXLLayoutRetouchPipeline",
    "StepBlendGuidance",
    "SubjectMaps",
    "SubjectMasks",
    "Swap",
    "TokenMapAttnProcessor",
    "attention_layers",
    "blend_weights",
    "ddim_table",
    "find_subjects",
    "install_processors",
    "invert",
    "joint_attention",
    "joint_attention_layers",
    "layer_grid",
    "layer_scale",
    "methods",
    "noised_rows",
    "reference_adain",
    "register_attention_backend",
    "renoise",
    "route",
    "select_layers",
    "shared_group_norms",
    "shared_joint_attention",
    "sharing",
    "swap",
    "token_mask",
    "use_attention_backend",
]
