"""Layout-and-Retouch for diffusers: attention processors, parts of the stages, pipeline. Importing changes nothing."""

from ..runtime.extras import require

require("diffusers")

from . import methods
from .backend import register_attention_backend, use_attention_backend
from .dit.cached.bank import TransformerReferenceBank
from .dit.cached.extract import extract_references
from .dit.cached.flux2 import MultiSourceFlux2KVAttnProcessor, MultiSourceFlux2KVParallelSelfAttnProcessor
from .dit.cached.glm_image import MultiSourceGlmImageAttnProcessor
from .dit.cached.install import use_cached_references
from .dit.cached.qwen_image21 import MultiSourceQwenImage21AttnProcessor, MultiSourceQwenImage21FlexAttnProcessor
from .dit.cached.wan_animate2 import MultiSourceWanAnimate2AttnProcessor
from .dit.chara_consist.attention import FrameRouting, Points, chara_consist_attention, match_points, route_frame
from .dit.chara_consist.driver import CharaConsist, merge_weights, prompt_words
from .dit.chara_consist.processor import CharaConsistFluxAttnProcessor
from .dit.flux.attention import (
    FluxRetouchProcessor,
    JointRouting,
    offset_rotary,
    retouch_layers,
    retouch_processors,
    route_joint,
)
from .dit.flux.output import FluxLayoutRetouchOutput
from .dit.flux.pipeline import FluxLayoutRetouchPipeline
from .dit.flux.settings import FluxSettings
from .dit.ip_adapter import MultiSourceFluxIPAdapterAttnProcessor, use_ip_adapter_masks
from .dit.regions import Regions, regional_joint_attention
from .guider import StepBlendGuidance
from .many.command import generate_from_file
from .many.distribute import GenerationReport, generate_many
from .many.items import Drawn, ImageItem
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
    CustomFlux2AttnProcessor,
    CustomFlux2ParallelSelfAttnProcessor,
    CustomFluxAttnProcessor,
    CustomQwenImageAttnProcessor,
    CustomSD3AttnProcessor,
    Tokens,
    joint_attention,
    joint_attention_layers,
    joint_processors,
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
    "CharaConsist",
    "CharaConsistFluxAttnProcessor",
    "CustomAttnProcessor",
    "CustomFlux2AttnProcessor",
    "CustomFlux2ParallelSelfAttnProcessor",
    "CustomFluxAttnProcessor",
    "CustomQwenImageAttnProcessor",
    "CustomSD3AttnProcessor",
    "Drawn",
    "FluxLayoutRetouchOutput",
    "FluxLayoutRetouchPipeline",
    "FluxRetouchProcessor",
    "FluxSettings",
    "FrameRouting",
    "GenerationReport",
    "ImageItem",
    "Installation",
    "JointRouting",
    "LayoutRetouch",
    "LayoutRetouchOutput",
    "MultiSourceAttnProcessor",
    "MultiSourceFlux2KVAttnProcessor",
    "MultiSourceFlux2KVParallelSelfAttnProcessor",
    "MultiSourceFluxIPAdapterAttnProcessor",
    "MultiSourceGlmImageAttnProcessor",
    "MultiSourceQwenImage21AttnProcessor",
    "MultiSourceQwenImage21FlexAttnProcessor",
    "MultiSourceWanAnimate2AttnProcessor",
    "PersonalizedStableDiffusionPipeline",
    "PersonalizedStableDiffusionXLPipeline",
    "Points",
    "ReferenceBank",
    "Regions",
    "RetouchBatch",
    "Routing",
    "StableDiffusionLayoutRetouchPipeline",
    "StableDiffusionXLLayoutRetouchPipeline",
    "StepBlendGuidance",
    "SubjectMaps",
    "SubjectMasks",
    "Swap",
    "TokenMapAttnProcessor",
    "Tokens",
    "TransformerReferenceBank",
    "attention_layers",
    "blend_weights",
    "chara_consist_attention",
    "ddim_table",
    "extract_references",
    "find_subjects",
    "generate_from_file",
    "generate_many",
    "install_processors",
    "invert",
    "joint_attention",
    "joint_attention_layers",
    "joint_processors",
    "layer_grid",
    "layer_scale",
    "match_points",
    "merge_weights",
    "methods",
    "noised_rows",
    "offset_rotary",
    "prompt_words",
    "reference_adain",
    "regional_joint_attention",
    "register_attention_backend",
    "renoise",
    "retouch_layers",
    "retouch_processors",
    "route",
    "route_frame",
    "route_joint",
    "select_layers",
    "shared_group_norms",
    "shared_joint_attention",
    "sharing",
    "swap",
    "token_mask",
    "use_attention_backend",
    "use_cached_references",
    "use_ip_adapter_masks",
]
