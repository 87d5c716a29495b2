"""The Triton implementations of the ops: importing this registers them for CUDA, and for CPU when interpreted."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from .._ops import ops
from ..runtime.platform import interpreted
from ..runtime.schemas import SCHEMAS
from . import attention_replay
from .cache import check_cache_folder, compile_once

if not interpreted():
    check_cache_folder(Path(knobs.cache.dir))

RECORDED_CALLS = {} if interpreted() else {"multi_source_attention": attention_replay.Call}
"""By operator, the class of its recorded calls (see replay.py)."""

_library = torch.library.Library(ops.name, "IMPL")

_FILES = {
    "multi_source_attention": "attention",
    "multi_source_attention_backward": "attention_backward",
    "attention_with_token_maps": "token_maps",
    "merge_attention_states": "merge",
}
"""The files of operators with long names. All others have a file of their own name."""


def file_of(operator: str) -> ModuleType:
    """The module of an operator: its kernels, `<operator>_triton`, and the launches that the report compiles."""
    return import_module(f".{_FILES.get(operator, operator)}", __name__)


for _operator in SCHEMAS:
    _module = file_of(_operator)
    for _key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
        _library.impl(f"{_operator}_triton", getattr(_module, f"{_operator}_triton"), _key)
    for _name, _kernel in vars(_module).items():
        if _name.endswith("_kernel") and isinstance(_kernel, JITFunction):
            compile_once(_kernel)
