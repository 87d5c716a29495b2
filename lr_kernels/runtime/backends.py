"""Which backend runs a call. An explicit name never falls back; "auto" takes the first that can serve the call."""

from collections.abc import Mapping, Sequence

import torch

from . import ops
from .checks import fail
from .modes import forward_mode, transforms_active
from .platform import KERNEL_DTYPES

BACKENDS = (*ops.BACKENDS, "reference")
"""All backends. "auto" tries those with kernels in this order and takes "reference" where none of them can serve. It
never takes Triton's interpreter, which runs only where "triton" is named."""

_OF_DEVICE = {
    device_type: [(name, about) for name, about in ops.BACKENDS.items() if about.device_type == device_type]
    for device_type in {about.device_type for about in ops.BACKENDS.values()}
}
"""The backends that "auto" tries, by the tensors' device type. Looking at all of them would cost 0.4 us a call."""


def unavailable(backend: str, op: str, device_type: str | None = None) -> str | None:
    """Why `backend` cannot run `op` on this machine (and device), or None."""
    if backend == "reference":
        return None
    about = ops.BACKENDS[backend]
    if op not in about.operators:
        return f"{op} has no CUDA C++ kernel; the GPU backend is 'triton'"
    return about.unavailable(device_type)


def forward_only(*tensors: torch.Tensor | None) -> dict[str, list[str]]:
    """What the kernels of an operator that has no gradients lack of this call, by backend, as `choose` takes it."""
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
            for name, about in _OF_DEVICE.get(device_type, ()):
                if op in about.operators and not lacking.get(name) and about.unavailable(device_type) is None:
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
