"""All self-attention of a retouch step at SD1.5's size, projections left out: six rows, a subject of 30 % of the image,
the routing that the pipeline uses. Against a processor that concatenates and masks, and two passes as in MasaCtrl."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lr_kernels import reference

from .gpu_unet import BATCH_ROWS, Shared, by_concatenation, by_lr_kernels, by_two_passes, shared
from .harness import DTYPES, OURS, Contender, Problem, checked_error

LAYERS = ((1, 8, 40, 5), (2, 8, 80, 5), (4, 8, 160, 5), (8, 8, 160, 1))
"""(latent pixels per token, heads, head_dim, layers) of SD1.5's UNet at 512²"""
LATENT = 64
CHECKED = 16
"""Queries of every row whose results are compared with float64, spread over the image."""
CONCATENATED, TWO_PASSES = "cat + SDPA with masks", "two passes (MasaCtrl)"


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

    contenders = {OURS: by_lr_kernels, CONCATENATED: by_concatenation, TWO_PASSES: by_two_passes}
    problem = Problem(
        op="retouch step",
        layer="16 layers",
        model="SD1.5 64²",
        shape=f"{BATCH_ROWS} rows",
        dtype=dtype,
        flops=flops,
        contenders={name: Contender(functools.partial(step, attend)) for name, attend in contenders.items()},
        error=error,
        share=visible / every,
        baseline=CONCATENATED,
    )
    return [problem]
