"""Training: forward with backward, and backward alone, through attention over three sources, fp32.

The peer concatenates keys and values, so its backward pass also splits their gradients and sums those of the reference
over the batch. "SDPA alone" starts from tensors that are concatenated already: it is the peer without the copies.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lr_kernels import Source, multi_source_attention, reference

from .attention import CHECKED, Layer, concatenate, sdpa, tensors
from .harness import OURS, Contender, NotRun, Problem, checked_error

Leaves = tuple[Tensor, ...]
"""query, then the keys, then the values"""


def ours(query: Tensor, *rest: Tensor) -> Tensor:
    count = len(rest) // 2
    sources = [Source(k, v) for k, v in zip(rest[:count], rest[count:])]
    try:
        return multi_source_attention(query, sources, backend="cpu")
    except NotImplementedError as error:
        raise NotRun(str(error)) from error


def cat_and_sdpa(query: Tensor, *rest: Tensor) -> Tensor:
    count, batch = len(rest) // 2, len(query)
    return sdpa(query, concatenate(rest[:count], batch), concatenate(rest[count:], batch))


def both(forward: Callable[..., Tensor], leaves: Leaves, upstream: Tensor) -> Leaves:
    return torch.autograd.grad(forward(*leaves), leaves, upstream)


def backward_only(forward: Callable[..., Tensor], leaves: Leaves, upstream: Tensor) -> Callable[[], Leaves]:
    """The graph is built at the first call and kept."""
    graph = functools.cache(lambda: forward(*leaves))
    return lambda: torch.autograd.grad(graph(), leaves, upstream, retain_graph=True)


def problems(layers: Sequence[Layer]) -> list[Callable[[], list[Problem]]]:
    """One builder per layer; each builds the forward with the backward, and the backward alone."""
    return [functools.partial(_build, layer) for layer in layers]


def _build(layer: Layer) -> list[Problem]:
    inputs = tensors(layer, "fp32")
    batch, count = len(inputs.query), len(inputs.keys)
    leaves = tuple(x.requires_grad_() for x in (inputs.query, *inputs.keys, *inputs.values))
    pairs = (concatenate(x, batch).detach().requires_grad_() for x in (inputs.keys, inputs.values))
    joined = (inputs.query.detach().requires_grad_(), *pairs)
    contenders = {OURS: (ours, leaves), "cat + SDPA": (cat_and_sdpa, leaves), "SDPA alone": (sdpa, joined)}

    upstream = torch.randn(inputs.query.shape, generator=torch.Generator().manual_seed(2))
    # Only the first queries get an upstream gradient, so that float64 has to compute these queries alone. All keys and
    # values get gradients from them.
    few = torch.zeros_like(upstream)
    few[:, :CHECKED] = upstream[:, :CHECKED]
    truth, low = (_gradients(leaves, few, dtype) for dtype in (torch.float64, torch.float32))

    def error(name: str, result: Leaves) -> float:
        found = both(*contenders[name], few)
        found = (found[0][:, :CHECKED], *found[1:])
        if name == "SDPA alone":  # its keys and values are joined; the query's gradient is comparable
            return checked_error(name, found[0], low[0], truth[0])
        return max(checked_error(name, *x) for x in zip(found, low, truth))

    product = 2.0 * batch * layer.heads * layer.tokens * count * layer.tokens * layer.head_dim
    makers = {
        "forward + backward": (lambda f, x: lambda: both(f, x, upstream), 7),
        "backward": (lambda f, x: backward_only(f, x, upstream), 5),
    }
    return [
        Problem(
            op=what,
            layer=layer.id,
            model=layer.model,
            shape=layer.shape,
            dtype="fp32",
            flops=products * product,
            contenders={name: Contender(make(*function)) for name, function in contenders.items()},
            error=error,
            baseline="cat + SDPA",
        )
        for what, (make, products) in makers.items()
    ]


def _gradients(leaves: Leaves, upstream: Tensor, dtype: torch.dtype) -> Leaves:
    """By the reference, of the first queries alone, whose upstream gradient is not zero."""
    query, *rest = (x.detach().to(dtype).requires_grad_() for x in (leaves[0][:, :CHECKED], *leaves[1:]))
    count = len(rest) // 2
    out = reference.multi_source_attention(query, [Source(k, v) for k, v in zip(rest[:count], rest[count:])])
    return torch.autograd.grad(out, (query, *rest), upstream[:, :CHECKED].to(dtype))
