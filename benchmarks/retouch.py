"""A retouch step at SD1.5's size: all its self-attention, projections left out, and the whole UNet. Six rows, a subject
of 30 % of the image, the routing that the pipeline uses. Against a processor that concatenates and masks, and against
two passes as in MasaCtrl."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lr_kernels import reference
from lr_kernels.testing import assert_matches

from . import gpu_unet
from .gpu_unet import BATCH_ROWS, CONTENDERS, Shared, by_concatenation, shared
from .harness import DTYPES, Contender, Problem, checked_error, relative_error

LAYERS = ((1, 8, 40, 5), (2, 8, 80, 5), (4, 8, 160, 5), (8, 8, 160, 1))
"""(latent pixels per token, heads, head_dim, layers) of SD1.5's UNet at 512²"""
LATENT = 64
CHECKED = 16
"""Queries of every row whose results are compared with float64, spread over the image."""
STOCK = "nothing shared (stock)"
CONCATENATED = "cat + SDPA with masks"


def problems(dtypes: Sequence[str]) -> list[Callable[[], list[Problem]]]:
    """One builder per dtype."""
    return [functools.partial(_build, dtype) for dtype in dtypes]


def _build(dtype: str) -> list[Problem]:
    generator = torch.Generator().manual_seed(0)
    per_tokens = shared(LATENT, tuple(scale for scale, *_ in LAYERS), "cpu")
    layers: list[tuple[tuple[Tensor, ...], Shared, int]] = []
    flops = visible = every = 0.0
    for scale, heads, head_dim, count in LAYERS:
        tokens = (LATENT // scale) ** 2
        x = torch.randn(3, BATCH_ROWS, heads, tokens, head_dim, generator=generator).to(DTYPES[dtype])
        layers.append((x.unbind(), per_tokens[tokens], count))
        pairs = float(per_tokens[tokens].mask.sum())
        flops += 4.0 * heads * head_dim * count * pairs
        visible, every = visible + pairs * count, every + per_tokens[tokens].mask.numel() * count

    def step(attend: Callable[..., Tensor]) -> list[Tensor]:
        return [attend(*x, about) for x, about, count in layers for _ in range(count)]

    def exact(precision: torch.dtype) -> list[Tensor]:
        found = []
        for x, about, _ in layers:
            query, key, value = (y.to(precision).transpose(1, 2) for y in x)
            some = torch.linspace(0, query.shape[1] - 1, CHECKED).long()
            routing = about.routing
            out = reference.multi_source_attention(
                query[:, some], routing.sources(key, value), query_groups=routing.query_groups[:, some]
            )
            found.append(out)
        return found

    truth, low = exact(torch.float64), exact(DTYPES[dtype])
    firsts = [sum(count for *_, count in layers[:i]) for i in range(len(layers))]

    def error(name: str, result: list[Tensor]) -> float:
        errors = []
        for first, low_, truth_ in zip(firsts, low, truth):
            out = result[first].transpose(1, 2)
            some = torch.linspace(0, out.shape[1] - 1, CHECKED).long()
            errors.append(checked_error(name, out[:, some], low_, truth_))
        return max(errors)

    problem = Problem(
        op="retouch step",
        layer="16 layers",
        model="SD1.5 64²",
        shape=f"{BATCH_ROWS} rows",
        dtype=dtype,
        flops=flops,
        contenders={name: Contender(functools.partial(step, attend)) for name, attend in CONTENDERS.items()},
        error=error,
        share=visible / every,
        baseline=CONCATENATED,
    )
    return [problem]


def whole_steps(dtypes: Sequence[str]) -> list[Callable[[], list[Problem]]]:
    """One builder per dtype."""
    return [functools.partial(_build_unet, dtype) for dtype in dtypes]


def _build_unet(dtype: str) -> list[Problem]:
    from lr_kernels.diffusers import select_layers

    model = gpu_unet.models(dry=False)[0]
    per_tokens = shared(model.latent, tuple(scale for scale, *_ in LAYERS), "cpu")
    exact = gpu_unet.build(model, "cpu", torch.float32)
    rounded = copy.deepcopy(exact).bfloat16()

    def step(attend: Callable[..., Tensor] | None, name: str) -> Tensor:
        unet = exact if name == "fp32" else rounded
        for layer in select_layers(unet, "self").values():
            layer.set_processor(gpu_unet.processor(attend, per_tokens))
        with torch.no_grad():
            return unet(**gpu_unet.inputs(model, "cpu", DTYPES[name]), return_dict=False)[0]

    with FlopCounterMode(display=False) as counter:
        truth = step(by_concatenation, "fp32").double()
    low = step(by_concatenation, "bf16")

    def error(name: str, result: Tensor) -> float:
        if name != STOCK:  # which computes something else
            assert_matches(result, low, truth, name)
        return relative_error(result, truth)

    contenders = {**CONTENDERS, STOCK: None}
    problem = Problem(
        op="whole step",
        layer="UNet",
        model="SD1.5 64²",
        shape=f"{BATCH_ROWS} rows",
        dtype=dtype,
        flops=float(counter.get_total_flops()),
        contenders={name: Contender(functools.partial(step, x, dtype)) for name, x in contenders.items()},
        error=error,
    )
    return [problem]
