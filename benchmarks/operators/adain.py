"""The reference's token statistics given to queries or keys (StyleAligned) and to latents, with and without masks of
30 % of the tokens: adain against its formula in separate PyTorch operations, and against instance normalization and
gathering where these apply."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lr_kernels import adain, reference

from ..attention import BATCH, LAYERS
from ..harness import DTYPES, Contender, Problem, checked_error
from ..target import CPU, FLOOR, Target

EPS = 1e-5
MASKED = 0.3
"""Share of the tokens that the masks choose."""


class Case(NamedTuple):
    id: str
    model: str
    tokens: int
    heads: int
    channels: int
    masked: bool


CASES = (
    Case("latents", "SD1.5 64²", 4096, 4, 1, True),
    *(
        Case(f"{layer.id}{', masks' if masked else ''}", layer.model, layer.tokens, layer.heads, layer.head_dim, masked)
        for layer in LAYERS
        if layer.id in ("sd64", "xl64")
        for masked in (False, True)
    ),
)


class Inputs(NamedTuple):
    x: Tensor  # (B, N, H, D)
    reference: Tensor  # (1, N, H, D)
    mask: Tensor | None  # (1, N), which tokens of x
    reference_mask: Tensor | None  # (1, N)


def statistics(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the tokens, (B or 1, 1, H, D) each."""
    if mask is None:
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    else:
        chosen = mask[:, :, None, None]
        count = chosen.sum(1, keepdim=True)
        mean = (x * chosen).sum(1, keepdim=True) / count
        variance = ((x - mean).square() * chosen).sum(1, keepdim=True) / count
    return mean, (variance + EPS).sqrt()


def by_lines(x: Tensor, like: Tensor, mask: Tensor | None, like_mask: Tensor | None) -> Tensor:
    (mean, std), (like_mean, like_std) = statistics(x, mask), statistics(like, like_mask)
    out = (x - mean) / std * like_std + like_mean
    return out if mask is None else torch.where(mask[:, :, None, None], out, x)


def by_instance_norm(x: Tensor, like: Tensor) -> Tensor:
    mean, std = statistics(like, None)
    return F.instance_norm(x.flatten(2).mT, eps=EPS).mT.unflatten(2, x.shape[2:]) * std + mean


def by_gathering(x: Tensor, like: Tensor, chosen: Tensor, like_chosen: Tensor) -> Tensor:
    """chosen, like_chosen: the indices of the tokens, for masks that all rows share."""
    part = x.index_select(1, chosen)
    return x.index_copy(1, chosen, by_lines(part, like.index_select(1, like_chosen), None, None))


def problems(dtypes: Sequence[str], target: Target = CPU) -> list[Callable[[], list[Problem]]]:
    """One builder per case and dtype."""
    return [functools.partial(_build, case, dtype, target) for case in CASES for dtype in dtypes]


def inputs_of(case: Case, dtype: str, target: Target) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    tokens, heads = target.size(case.tokens), 2 if target.toy else case.heads

    def normal(rows: int, mean: float, deviation: float) -> Tensor:
        shape = (rows, heads, tokens) if case.channels == 1 else (rows, tokens, heads, case.channels)
        x = (mean + deviation * torch.randn(shape, generator=generator)).to(target.device, DTYPES[dtype])
        return x.mT[..., None] if case.channels == 1 else x  # latents: channels come before the pixels

    x, like = normal(BATCH, 1.0, 3.0), normal(1, -2.0, 1.0)
    masks = [(torch.rand(1, tokens, generator=generator) < MASKED).to(target.device) for _ in range(2)]
    return Inputs(x, like, *(masks if case.masked else (None, None)))


def _build(case: Case, dtype: str, target: Target) -> list[Problem]:
    inputs = x, like, mask, like_mask = inputs_of(case, dtype, target)
    masks = {"mask": mask, "reference_mask": like_mask}
    truth = reference.adain(x.double(), like.double(), **masks)
    low = reference.adain(x, like, **masks)

    def ours(backend: str) -> Tensor:
        return adain(x, like, **masks, backend=backend)

    def error(name: str, result: Tensor) -> float:
        return 0.0 if name.startswith(FLOOR) else checked_error(name, result, low, truth)

    lines = {"mean and deviation": (by_lines, inputs)}
    if mask is None or like_mask is None:
        lines["instance_norm"] = (by_instance_norm, (x, like))
    else:
        chosen = [m[0].nonzero()[:, 0] for m in (mask, like_mask)]
        lines["gather"] = (by_gathering, (x, like, *chosen))
    compiled = target.compiled({name: f for name, (f, _) in lines.items()})
    lines |= {f"{name}, compiled": (f, lines[name][1]) for name, f in compiled.items()}
    tokens, heads = x.shape[1:3]
    return [
        Problem(
            op="adain",
            layer=case.id,
            model=case.model,
            shape=f"{tokens}x{heads}x{case.channels}",
            dtype=dtype,
            flops=4.0 * x.numel() + 3.0 * like.numel(),
            contenders={
                **target.ours(ours),
                **{name: Contender(functools.partial(f, *arguments)) for name, (f, arguments) in lines.items()},
                **target.copy_of(2 * x.nbytes + like.nbytes),
            },
            error=error,
        )
    ]
