"""Masks and grouped heads on the CPU: causal order, a window, blocks, padding, and fewer heads of keys than of queries.

Padding goes through diffusers' dispatch, against every attention backend of diffusers; those that refuse masks, need a
GPU or are not installed are rows with that reason. All else is compared with PyTorch's SDPA and FlexAttention.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lr_kernels import interop

from . import mask_cases as cases
from .attention import Layer, sdpa
from .harness import OURS, NotRun, Problem
from .mask_cases import ALL_KEYS, SHARES, TOKENS, Case
from .target import CPU, Target

LAYERS = (Layer("h64", "", TOKENS, 4, 64), Layer("h128", "", TOKENS, 4, 128))
WIDE = Layer("h64x16", "", TOKENS, 16, 64)
"""Of the cases of grouped heads"""
HEADS_OF_A_KEY = (4, 16)
PADDED_QUERIES, GROUPED_QUERIES = 512, 1024
STOCK = "native"
"""diffusers' default backend"""
SLOW = "flex"
"""The backend that takes seconds where the model is not compiled; it is timed in the first case of padding alone."""
REPEATED = ", repeated keys"
"""The keys and values of every head stored for itself before the call"""


def problems(dtypes: Sequence[str], target: Target = CPU) -> list[Callable[[], list[Problem]]]:
    """One builder per case and dtype, but one for all cases of padding, which are measured together."""
    found: list[Callable[[str, Target], list[Problem]]] = [
        *(functools.partial(_causal, layer) for layer in LAYERS),
        *(functools.partial(_masked, build) for build in (cases.window, cases.blocks)),
        _padding,
        *(functools.partial(_grouped, times) for times in HEADS_OF_A_KEY),
    ]
    return [functools.partial(build, dtype, target) for build in found for dtype in dtypes]


def _causal(layer: Layer, dtype: str, target: Target) -> list[Problem]:
    case = cases.causal(layer, dtype, target)
    contenders = {
        OURS: lambda: case.by(interop.scaled_dot_product_attention, is_causal=True),
        OURS + ALL_KEYS: case.all_keys(target.backend),
        "SDPA": lambda: case.by(F.scaled_dot_product_attention, **case.sdpa),
        "SDPA" + ALL_KEYS: lambda: case.by(F.scaled_dot_product_attention),
    }
    return [case.problem(dtype, contenders, "SDPA")]


def _masked(build: Callable[..., Case], dtype: str, target: Target) -> list[Problem]:
    """A window or blocks."""
    case = build(LAYERS[0], dtype, target)
    contenders: dict[str, Callable[[], object]] = {OURS: case.ours(target.backend)}
    if case.mask is not None and case.mask.shape[1] == 1:  # PyTorch's form of a mask that is the same for all heads
        contenders[f"{OURS}, from the mask"] = lambda: case.by(interop.scaled_dot_product_attention, **case.sdpa)
    contenders[OURS + ALL_KEYS] = case.all_keys(target.backend)
    contenders["SDPA + mask"] = lambda: case.by(F.scaled_dot_product_attention, **case.sdpa)
    if target.compiles:
        contenders["FlexAttention"] = case.by_flex()
    return [case.problem(dtype, contenders, "SDPA + mask")]


def _grouped(heads_of_a_key: int, dtype: str, target: Target) -> list[Problem]:
    case = cases.grouped(WIDE, dtype, target, GROUPED_QUERIES, heads_of_a_key)
    ways = {OURS: interop.scaled_dot_product_attention, "SDPA": F.scaled_dot_product_attention}
    contenders: dict[str, Callable[[], object]] = {
        name: functools.partial(case.by, function, **case.sdpa) for name, function in ways.items()
    }
    for name, function in ways.items():
        contenders[name + REPEATED] = lambda function=function: case.repeated(lambda wide: wide.by(function))
    return [case.problem(dtype, contenders, "SDPA")]


def _padding(dtype: str, target: Target) -> list[Problem]:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    from lr_kernels.diffusers import register_attention_backend
    from lr_kernels.diffusers.backend import NAME

    register_attention_backend()

    def flex(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return dispatch_attention_fn(query, key, value, mask, backend=AttentionBackendName(SLOW))

    compiled = target.compiled({f"{SLOW}, compiled": flex})

    def problem(visible: str) -> Problem:
        case = cases.padding(LAYERS[0], dtype, target, PADDED_QUERIES, visible)
        tensors, mask = (case.query, case.key, case.value), case.sdpa["attn_mask"]
        contenders: dict[str, Callable[[], object]] = {
            OURS: functools.partial(dispatch_attention_fn, *tensors, mask, backend=NAME),
            OURS + ALL_KEYS: functools.partial(dispatch_attention_fn, *tensors, backend=NAME),
        }
        for backend in AttentionBackendName:
            if backend.value == SLOW and visible != next(iter(SHARES)):
                contenders[SLOW] = _too_slow
            elif backend.value != NAME:
                contenders[backend.value] = functools.partial(_by_backend, backend, *tensors, mask)
        for name, function in compiled.items():
            contenders[name] = functools.partial(function, *tensors, mask)
        contenders["SDPA, row by row"] = functools.partial(_row_by_row, *tensors, case.lengths.tolist())
        return case.problem(dtype, contenders, STOCK)

    return [problem(visible) for visible in SHARES]


def _by_backend(backend: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention by a backend of diffusers, as a model calls it."""
    from diffusers.models import attention_dispatch as dispatch

    kernel_of_hub = dispatch._HUB_KERNELS_REGISTRY.get(backend)
    if kernel_of_hub is not None and kernel_of_hub.kernel_fn is None:
        raise NotRun("its kernel is on the Hugging Face Hub, compiled for GPUs")
    try:
        dispatch._check_attention_backend_requirements(backend)
        return dispatch.dispatch_attention_fn(query, key, value, mask, backend=backend)
    except Exception as reason:  # each refuses in its own way
        raise NotRun(f"{type(reason).__name__}: {str(reason).strip().splitlines()[0]}") from reason


def _too_slow() -> Tensor:
    raise NotRun(f"takes seconds a call where the model is not compiled; timed with {next(iter(SHARES))} visible")


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """SDPA over the visible keys of each row, which are its first ones."""
    rows = enumerate(lengths)
    return torch.cat([sdpa(query[b : b + 1], key[b : b + 1, :n], value[b : b + 1, :n]) for b, n in rows])
