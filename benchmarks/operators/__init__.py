"""Every operator and the problems that time it: a new operator is a file here that is called as the operator."""

from collections.abc import Callable
from importlib import import_module

from lr_kernels.runtime.schemas import SCHEMAS

from .. import attention, backward
from ..harness import Problem

Build = Callable[[], list[Problem]]
"""Makes the inputs of problems that are measured together."""

ATTENTION: dict[str, Callable[..., list[Build]]] = {
    "multi_source_attention": attention.problems,
    "multi_source_attention_backward": backward.problems,
}

SMALL: dict[str, Callable[..., list[Build]]] = {
    name: import_module(f".{name}", __name__).problems for name in SCHEMAS if name not in ATTENTION
}
"""Called with the names of the dtypes and a `Target`, a CPU by default; the smallest case comes first."""

OPERATORS = {**ATTENTION, **SMALL}
