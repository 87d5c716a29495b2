"""Partial results over three disjoint sets of keys joined into one, as in ring attention or where a cached reference is
attended to in a call of its own: merge_attention_states against PyTorch code for the two usual formulas."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lr_kernels import merge_attention_states, reference

from ..attention import BATCH, LAYERS, Layer
from ..harness import DTYPES, Contender, NotRun, Problem, checked_error
from ..target import CPU, FLOOR, Target

PARTS = 3
CASES = ("sd32", "sd64", "xl64")

Result = tuple[Tensor, Tensor]
"""out (B, N, H, D) and lse (B, N, H)"""


def by_logsumexp(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Result:
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    share = (stacked - lse).exp()[..., None]
    return sum(w * out for w, out in zip(share, outs)).to(outs[0].dtype), lse


def by_sigmoid(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Result:
    """One part after the other, as ring attention receives them."""
    out, lse = outs[0].float(), lses[0]
    for part, its_lse in zip(outs[1:], lses[1:]):
        out = out - torch.sigmoid(its_lse - lse)[..., None] * (out - part)
        lse = lse - F.logsigmoid(lse - its_lse)
    return out.to(outs[0].dtype), lse


def by_xformers(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Result:
    try:
        from xformers.ops.fmha import merge_attentions
    except ImportError as error:
        raise NotRun(str(error)) from error
    out, lse = merge_attentions(list(outs), [x.mT for x in lses])
    return out, lse.mT


def problems(dtypes: Sequence[str], target: Target = CPU) -> list[Callable[[], list[Problem]]]:
    """One builder per layer and dtype."""
    layers = [layer for name in CASES for layer in LAYERS if layer.id == name]
    return [functools.partial(_build, target.layer(layer), dtype, target) for layer in layers for dtype in dtypes]


def _build(layer: Layer, dtype: str, target: Target) -> list[Problem]:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, layer.tokens, layer.heads, layer.head_dim)
    outs = [torch.randn(shape, generator=generator).to(target.device, DTYPES[dtype]) for _ in range(PARTS)]
    lses = [3 * torch.randn(shape[:3], generator=generator).to(target.device) for _ in range(PARTS)]
    truth = reference.merge_attention_states([x.double() for x in outs], [x.double() for x in lses])
    low = reference.merge_attention_states(outs, lses)

    def ours(backend: str) -> Result:
        return merge_attention_states(outs, lses, backend=backend)

    def error(name: str, result: Result) -> float:
        return 0.0 if name.startswith(FLOOR) else max(checked_error(name, *x) for x in zip(result, low, truth))

    lines = {"logsumexp": by_logsumexp, "sigmoid (ring attention)": by_sigmoid}
    compiled = target.compiled({f"{name}, compiled": f for name, f in lines.items()})
    peers = {**lines, **compiled, "xformers": by_xformers}
    contenders = {name: Contender(functools.partial(f, outs, lses)) for name, f in peers.items()}
    moved = (PARTS + 1) * (outs[0].nbytes + lses[0].nbytes)
    return [
        Problem(
            op="merge_attention_states",
            layer=layer.id,
            model=layer.model,
            shape=f"{PARTS} x {layer.shape}",
            dtype=dtype,
            flops=2.0 * PARTS * outs[0].numel(),
            contenders={**target.ours(ours), **contenders, **target.copy_of(moved)},
            error=error,
        )
    ]
