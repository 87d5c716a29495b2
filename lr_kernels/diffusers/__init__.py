"""Layout-and-Retouch for diffusers: attention processors, parts of the stages, pipeline. Importing changes nothing."""

from ..extras import require

require("diffusers")

from .backend import register_attention_backend, use_attention_backend
from .bank import BankAttnProcessor, ReferenceBank
from .components import PersonalizedStableDiffusionPipeline
from .components_xl import PersonalizedStableDiffusionXLPipeline
from .guider import StepBlendGuidance
from .install import Installation, attention_layers, install_processors, select_layers
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
from .routing import BACKGROUND, FOREGROUND, OWN, RetouchBatch, Routing, Swap, route, swap
from .schedule import blend_weights, ddim_table
from .subject import SubjectMaps, find_subjects

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
    "register_attention_backend",
    "renoise",
    "route",
    "select_layers",
    "shared_joint_attention",
    "swap",
    "use_attention_backend",
]
