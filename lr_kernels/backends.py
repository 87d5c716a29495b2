"""Which backend runs a call. An explicit name never falls back; "auto" takes the first that can serve the call."""

import importlib.util
import os
from collections.abc import Mapping, Sequence

import torch
from torch.autograd import forward_ad

from . import ops
from .checks import fail

BACKENDS = ("cuda", "triton", "cpu", "reference")
_AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""In the order that "auto" tries them, by device type; the reference serves the rest, the interpreter only by name."""

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), which also serves CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(backend: str, op: str, device_type: str | None = None) -> str | None:
    """Why `backend` cannot run `op` on this machine (and device), or None."""
    match backend:
        case "cpu":
            if ops.extension_error is not None:
                return ops.extension_error
            return "runs on cpu tensors only" if device_type not in (None, "cpu") else None
        case "triton":
            if not _HAS_TRITON:
                return "the package triton is not installed"
            if device_type == "cuda" or (interpreted() and device_type in (None, "cpu")):
                return None
            if device_type is None and torch.cuda.is_available():
                return None
            return "needs a CUDA device, or TRITON_INTERPRET=1 to interpret on cpu tensors"
        case "cuda":
            if op not in ops.OPERATORS_WITH_CUDA:
                return f"{op} has no CUDA C++ kernel; the GPU backend is 'triton'"
            if ops.cuda_extension_error is not None:
                return ops.cuda_extension_error
            if device_type == "cuda" or (device_type is None and torch.cuda.is_available()):
                return None
            return "needs a CUDA device"
    return None


def autocast(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's dtype, where PyTorch's own autocast casts it."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype in KERNEL_DTYPES else x


def forward_mode_active() -> bool:
    """Whether dual tensors can exist."""
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


def forward_only(*tensors: torch.Tensor | None) -> dict[str, list[str]]:
    """What the kernel backends lack of a call of an operator without gradients: see `choose`."""
    if (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)) or forward_mode(*tensors):
        return {name: ["gradients"] for name in BACKENDS if name != "reference"}
    return {}


def choose(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    lacking: Mapping[str, Sequence[str]] | None = None,
    argument: str = "query",
) -> str:
    """Resolve `backend` for a call of `op`.

    Args:
        lacking: per backend, what it does not implement of this call; the reference implements all.
        argument: the one whose dtype counts, for the message.

    Raises:
        ValueError: an unknown name. RuntimeError: the named backend is not available, with the cause.
        TypeError: the named backend does not support the dtype. NotImplementedError: it lacks an argument of the call.
    """
    device_type = device.type  # 0.2 us a look
    lacking = lacking or {}
    if transforms_active():
        lacking = {name: [*lacking.get(name, ()), "torch.func transforms"] for name in BACKENDS if name != "reference"}
    if backend == "auto":
        if dtype in KERNEL_DTYPES:
            for name in _AUTO.get(device_type, ()):
                if not lacking.get(name) and unavailable(name, op, device_type) is None:
                    return name
        return "reference"
    if backend not in BACKENDS:
        fail(op, "backend", "one of auto, " + ", ".join(BACKENDS), repr(backend))
    reason = unavailable(backend, op, device_type)
    if reason is not None:
        raise RuntimeError(f"lr_kernels.{op}: backend: {backend!r} cannot run: {reason}")
    if backend == "reference":
        return backend
    if dtype not in KERNEL_DTYPES:
        fail(op, argument, "one of float32, float16, bfloat16", dtype, f"backend {backend!r}", TypeError)
    if lacking.get(backend):
        able = [name for name in ("cpu", "triton") if name in lacking and not lacking[name]]
        raise NotImplementedError(
            f"lr_kernels.{op}: {', '.join(lacking[backend])}: not supported by backend {backend!r}; "
            f"supported by {', '.join(map(repr, [*able, 'reference']))}"
        )
    return backend
