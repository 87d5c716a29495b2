"""Cross-attention that also tells where the subject's tokens are looked at: 77 text keys, two tokens mapped.

Peers store the probabilities, as Attend-and-Excite and DAAM do, or leave the attention to SDPA and make them for the
maps alone; the strongest makes only the chosen ones, from the log-sum-exp that SDPA's kernel keeps.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lr_kernels import attention_with_token_maps, reference

from ..attention import BATCH, LAYERS, Layer, heads_first, sdpa
from ..harness import DTYPES, Contender, Problem, checked_error
from ..target import CPU, FLOOR, Target

KEYS = 77
TOKENS = (2, 5)
BY_SIZE = sorted(LAYERS, key=lambda layer: layer.tokens * layer.heads)

Result = tuple[Tensor, Tensor]
"""out (B, N, H, D) and maps (B, N, T)"""


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, N, M)"""
    scores = heads_first(query) @ heads_first(key).mT
    return (scores * query.shape[-1] ** -0.5).softmax(-1)


def stored(query: Tensor, key: Tensor, value: Tensor) -> Result:
    p = probabilities(query, key)
    return heads_first(p @ heads_first(value)), p[..., TOKENS].float().mean(1)


def sdpa_and_softmax(query: Tensor, key: Tensor, value: Tensor) -> Result:
    return sdpa(query, key, value), probabilities(query, key)[..., TOKENS].float().mean(1)


def sdpa_and_lse(query: Tensor, key: Tensor, value: Tensor) -> Result:
    """By the op behind SDPA, since the function does not return the log-sum-exp."""
    name = "_scaled_dot_product_flash_attention" + ("" if query.is_cuda else "_for_cpu")
    out, lse, *_ = getattr(torch.ops.aten, name)(*map(heads_first, (query, key, value)))
    chosen = heads_first(query) @ heads_first(key[:, TOKENS]).mT
    maps = (chosen.float() * query.shape[-1] ** -0.5 - lse[..., None]).exp().mean(1)
    return heads_first(out), maps


def problems(dtypes: Sequence[str], target: Target = CPU) -> list[Callable[[], list[Problem]]]:
    """One builder per layer and dtype."""
    return [functools.partial(_build, target.layer(layer), dtype, target) for layer in BY_SIZE for dtype in dtypes]


def _build(layer: Layer, dtype: str, target: Target) -> list[Problem]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = inputs = tuple(
        torch.randn(BATCH, count, layer.heads, layer.head_dim, generator=generator).to(target.device, DTYPES[dtype])
        for count in (layer.tokens, KEYS, KEYS)
    )
    tokens = torch.tensor(TOKENS, device=target.device)
    truth = reference.attention_with_token_maps(*(x.double() for x in inputs), tokens)
    low = reference.attention_with_token_maps(*inputs, tokens)

    def ours(backend: str) -> Result:
        return attention_with_token_maps(query, key, value, tokens, backend=backend)

    def error(name: str, result: Tensor | Result) -> float:
        if name.startswith(FLOOR):
            assert isinstance(result, Tensor)
            return checked_error(name, result, low[0], truth[0])
        return max(checked_error(name, *x) for x in zip(result, low, truth))

    lines = {"stored softmax": stored, "SDPA + softmax": sdpa_and_softmax}
    compiled = target.compiled({f"{name}, compiled": f for name, f in lines.items()})
    peers = {**lines, **compiled, "SDPA + its lse": sdpa_and_lse, f"{FLOOR}SDPA without maps": sdpa}
    contenders = {name: Contender(functools.partial(f, *inputs)) for name, f in peers.items()}
    return [
        Problem(
            op="attention_with_token_maps",
            layer=layer.id,
            model=layer.model,
            shape=f"{layer.shape}, {KEYS} keys",
            dtype=dtype,
            flops=4.0 * BATCH * layer.heads * layer.tokens * KEYS * layer.head_dim,
            contenders={**target.ours(ours), **contenders},
            error=error,
        )
    ]
