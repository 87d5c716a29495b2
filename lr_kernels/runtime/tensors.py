"""Tensors as the kernels read them: dense, and with their values in memory."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.masked import MaskedTensor

from .checks import FLOAT32_MAX, fail


def is_plain(x: Tensor) -> bool:
    """Whether x has strides, and its memory holds its values: no negative that is not computed yet, as `x.conj().imag`,
    and no zero without memory, as autograd makes them."""
    return x.layout is torch.strided and not x.is_neg() and not x._is_zerotensor()


def check_dense(op: str, argument: str, x: object) -> None:
    """TypeError unless x is a tensor, ValueError unless it has strides and data of its own kind."""
    if x.__class__ is Tensor and x.layout is torch.strided and not x.is_nested:  # isinstance with Tensor is slow
        return
    if not isinstance(x, Tensor):
        fail(op, argument, "a tensor", type(x).__name__, error=TypeError)
    if x.is_nested:
        fail(op, argument, "a dense tensor", "a nested tensor", "pad it and pass a mask")
    if x.layout is not torch.strided:
        fail(op, argument, "a dense tensor", f"layout {x.layout}", "call .to_dense()")
    if isinstance(x, MaskedTensor):
        fail(op, argument, "a dense tensor", "a MaskedTensor", "pass its data, and its mask as a mask")
    if isinstance(x, FakeTensor) and not torch._C._len_torch_dispatch_stack():
        fail(op, argument, "a tensor with data", "a FakeTensor outside its mode")


def resolved(op: str, argument: str, x: Tensor) -> Tensor:
    """x as a kernel can read it: itself, or its values written out where it is lazy."""
    if torch.compiler.is_compiling():
        return x
    check_dense(op, argument, x)
    return written_out(x)


def written_out(x: Tensor) -> Tensor:
    """x with its values in memory: itself, or a copy where it is a lazy negative or zero."""
    if torch.compiler.is_compiling():
        return x
    if x.is_neg():
        x = x.resolve_neg()
    return x.clone() if x._is_zerotensor() else x


def within_float32(x: Tensor) -> Tensor:
    """x as float32 can hold it: finite numbers of a float64 tensor beyond it become its largest or smallest one."""
    if x.dtype != torch.float64:
        return x
    return torch.where(x.isinf(), x, x.clamp(-FLOAT32_MAX, FLOAT32_MAX))


def resolved_or_none(op: str, argument: str, x: Tensor | None) -> Tensor | None:
    """`resolved` for an argument that may be None."""
    return None if x is None else resolved(op, argument, x)


def true_places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool (…, M): int32 (…, M), the places of the true entries in ascending order and then 0, and int32 (…), how
    many they are."""
    entries = x.shape[-1]
    place = torch.where(x, x.cumsum(-1) - 1, entries)  # all others land in a spare slot, which is cut off below
    index = torch.zeros(*x.shape[:-1], entries + 1, dtype=torch.int32, device=x.device)
    index.scatter_(-1, place, torch.arange(entries, dtype=torch.int32, device=x.device).expand_as(place))
    return index[..., :entries], x.sum(-1, dtype=torch.int32)
