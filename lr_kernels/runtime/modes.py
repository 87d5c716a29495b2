"""Modes of PyTorch that change what a call may do: autocast, forward-mode differentiation, torch.func transforms."""

from collections.abc import Mapping

import torch
from torch.autograd import forward_ad

from .checks import fail
from .platform import KERNEL_DTYPES


def autocast(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's dtype if PyTorch's autocast would cast it, else x."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype in KERNEL_DTYPES else x


def forward_mode_active() -> bool:
    """Whether a level of forward-mode differentiation is open, so that dual tensors can exist."""
    return forward_ad._current_level >= 0 and not torch.compiler.is_compiling()


def forward_mode(*arguments: object) -> bool:
    """Whether forward-mode differentiation (torch.func.jvp, dual tensors) goes through any of them."""
    if not forward_mode_active():
        return False
    return any(isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments)


def transforms_active() -> bool:
    """Whether the call is inside a torch.func transform (grad, vjp, jvp, vmap, …), whose tensors no kernel can read."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def mapped(x: torch.Tensor | None) -> bool:
    """Whether torch.vmap, or autograd's is_grads_batched, maps over the tensor, at any level of the transforms."""
    functorch = torch._C._functorch
    while x is not None and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return x is not None and functorch.is_legacy_batchedtensor(x)


def refuse_vmap(op: str, tensors: Mapping[str, object]) -> None:
    """NotImplementedError where torch.vmap maps over one of these arguments: the reference cannot do that either."""
    for argument, x in tensors.items():
        if isinstance(x, torch.Tensor) and mapped(x):
            expected, hint = "a tensor that torch.vmap does not map over", "make the mapped dimension part of the batch"
            fail(op, argument, expected, "one that it does", hint, NotImplementedError)
