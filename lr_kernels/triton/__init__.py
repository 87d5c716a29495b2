"""The Triton implementations of the ops: importing this registers them for CUDA, and for CPU when interpreted."""

import sys
from pathlib import Path

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from ..runtime.platform import interpreted
from . import attention_replay
from .adain import adain_triton
from .attention import multi_source_attention_triton
from .attention_backward import multi_source_attention_backward_triton
from .cache import check_cache_folder, compile_once
from .compact_keys import compact_keys_triton
from .correspondence import correspondence_triton
from .merge import merge_attention_states_triton
from .step_blend import step_blend_triton
from .subject_mask import subject_mask_triton
from .token_maps import attention_with_token_maps_triton

if not interpreted():
    check_cache_folder(Path(knobs.cache.dir))

RECORDED_CALLS = {} if interpreted() else {"multi_source_attention": attention_replay.Call}
"""By operator, the calls that are launched without being laid out again where they repeat."""

_library = torch.library.Library("lr_kernels", "IMPL")

for _launcher in (
    multi_source_attention_triton,
    multi_source_attention_backward_triton,
    attention_with_token_maps_triton,
    subject_mask_triton,
    step_blend_triton,
    merge_attention_states_triton,
    adain_triton,
    correspondence_triton,
    compact_keys_triton,
):
    for _key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
        _library.impl(_launcher.__name__, _launcher, _key)
    for _name, _kernel in vars(sys.modules[_launcher.__module__]).items():
        if _name.endswith("_kernel") and isinstance(_kernel, JITFunction):
            compile_once(_kernel)
