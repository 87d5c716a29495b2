"""Layout-and-Retouch for diffusers: attention processors, parts of the stages, pipeline. Importing changes nothing."""

from ..runtime.extras import require

require("diffusers")

from . import methods
from .backend import register_attention_backend, use_attention_backend
from .guider import StepBlendGuidance
from .methods.features import noised_rows, reference_adain, shared_group_norms
from .methods.sharing import sharing
from .pipelines.components import PersonalizedStableDiffusionPipeline
from .pipelines.components_xl import PersonalizedStableDiffusionXLPipeline
from .pipelines.inversion import invert, renoise
from .pipelines.output import LayoutRetouchOutput
from .pipelines.pipeline import (
    LayoutRetouch,
    StableDiffusionLayoutRetouchPipeline,
    StableDiffusionXLLayoutRetouchPipeline,
)
from .pipelines.schedule import blend_weights, ddim_table
from .processors.bank import BankAttnProcessor, ReferenceBank
from .processors.install import (
    Installation,
    attention_layers,
    install_processors,
    layer_grid,
    layer_scale,
    select_layers,
)
from .processors.joint import (
    CustomFluxAttnProcessor,
    CustomSD3AttnProcessor,
    joint_attention,
    joint_attention_layers,
    shared_joint_attention,
)
from .processors.routing import BACKGROUND, FOREGROUND, OWN, RetouchBatch, Routing, Swap, route, swap, token_mask
from .processors.unet import AttentionState, CustomAttnProcessor, MultiSourceAttnProcessor, TokenMapAttnProcessor
from .subjects.subject import SubjectMaps, find_subjects
from .subjects.subject_masks import SubjectMasks

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
    "LayoutRetouch",
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
