"""The precision in which the reference computes."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(operator: Callable[_P, _R]) -> Callable[_P, _R]:
    """The operator in the precision that it states: autocast would round inside einsum and matmul."""

    @functools.wraps(operator)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = next(iter((*args, *kwargs.values())))
        device = (first if isinstance(first, Tensor) else first[0]).device.type  # type: ignore[index]
        if device == "meta" or not torch.is_autocast_enabled(device):
            return operator(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return operator(*args, **kwargs)

    return run
