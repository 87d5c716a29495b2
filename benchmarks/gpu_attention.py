"""One case of attention on a GPU: its inputs, everybody who computes it, and what float64 says of the results.

Contenders are named by what they do to three sources: "cat" concatenates keys and values, "gather" does so with the
visible ones alone, "SDPA + mask" hides the others by a mask, and "per source" calls its library once for each source
and merges the results.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lr_kernels import Source, multi_source_attention, plan_attention, reference

from . import attention as layers
from . import gpu_peers
from .harness import OURS, checked_error

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHECKED = 64
"""Queries whose results are compared with float64."""
BACKENDS = {OURS: "auto", f"{OURS} (Triton)": "triton", f"{OURS} (CUDA)": "cuda"}
"""Ours, by the backend that is asked for."""
SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NAIVE_UP_TO = 1024
"""Tokens of the largest layer that the explicit softmax computes, which stores all scores."""


def forced(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    with sdpa_kernel(backend):
        return layers.sdpa(query, key, value, mask)


def by_xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if mask is None:
        return memory_efficient_attention(query, key, value)
    keys = mask.shape[-1]
    bias = query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], -(-keys // 8) * 8)[..., :keys]
    return memory_efficient_attention(query, key, value, bias.masked_fill_(~mask, -torch.inf))


ONE_CALL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    **{f"SDPA ({name})": functools.partial(forced, backend) for name, backend in SDPA.items()},
    "FA3": gpu_peers.fa3,
    "FA4": gpu_peers.fa4,
    "cuDNN frontend": gpu_peers.CudnnFrontend(),
}
"""Peers that want the keys of all sources as one tensor."""
PER_SOURCE: dict[str, gpu_peers.Partial] = {"FA3": gpu_peers.fa3_partial, "FA4": gpu_peers.fa4_partial}


class Case:
    """Self, context and reference keys; `readers` batch rows, all of which read the one reference row.

    shares: the visible share of each source's keys. training: the inputs are leaves that require a gradient.
    """

    def __init__(
        self, layer: layers.Layer, dtype: str, shares: Sequence[float], readers: int, device: str, training: bool
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(0)

        def randn(rows: int) -> Tensor:
            shape = (rows, layer.tokens, layer.heads, layer.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])

        def draw(share: float) -> Tensor | None:
            return None if share == 1 else torch.rand(1, layer.tokens, generator=generator, device=device) < share

        self.layer, self.readers, self.training = layer, readers, training
        self.query, self.upstream = randn(readers), randn(readers)
        pairs = [(randn(rows), randn(rows)) for rows in (readers, readers, 1)]
        self.sources = [Source(key, value, key_mask=draw(share)) for (key, value), share in zip(pairs, shares)]
        self.masks = [s.key_mask for s in self.sources]
        self.masked = any(mask is not None for mask in self.masks)
        self.plan = plan_attention(self.masks)
        self.leaves = [self.query, *(x for pair in pairs for x in pair)]
        for leaf in self.leaves:
            leaf.requires_grad_(training)

    @functools.cached_property
    def visible(self) -> Tensor:
        """bool (1, M of all sources)"""
        whole = self.query.new_ones(1, self.layer.tokens, dtype=torch.bool)
        return torch.cat([whole if mask is None else mask for mask in self.masks], 1)

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """bool (B, 1, 1, M of all sources), as SDPA takes it"""
        return self.visible[:, None, None].expand(self.readers, 1, 1, -1) if self.masked else None

    @functools.cached_property
    def kept(self) -> list[Tensor | None]:
        """int64, the visible keys of each source, for "gather"."""
        return [None if mask is None else mask[0].nonzero()[:, 0] for mask in self.masks]

    @functools.cached_property
    def lists(self) -> list[gpu_peers.KeyList | None]:
        """The same for "per source"."""
        return [None if s.key_mask is None else gpu_peers.key_list(s.key_mask, len(s.key)) for s in self.sources]

    @property
    def flops(self) -> float:
        """Of the visible pairs, forward; a backward pass takes two and a half times as many."""
        forward = 4.0 * self.readers * self.layer.heads * self.layer.tokens * self.layer.head_dim
        return forward * int(self.visible.sum()) * (3.5 if self.training else 1.0)

    def ours(self, backend: str) -> Tensor:
        return multi_source_attention(self.query, self.sources, plan=self.plan, backend=backend)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """query and the concatenated keys and values"""
        parts = ([s.key for s in self.sources], [s.value for s in self.sources])
        return self.query, *(layers.concatenate(x, self.readers) for x in parts)

    def gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same without the hidden keys."""

        def chosen(parts: Sequence[Tensor]) -> Tensor:
            seen = [x if index is None else x.index_select(1, index) for x, index in zip(parts, self.kept)]
            return layers.concatenate(seen, self.readers)

        return self.query, chosen([s.key for s in self.sources]), chosen([s.value for s in self.sources])

    def trained(self, call: Callable[[], Tensor], upstream: Tensor | None = None) -> list[Tensor]:
        """out, then the gradients of the leaves"""
        out = call()
        return [out, *torch.autograd.grad(out, self.leaves, self.upstream if upstream is None else upstream)]

    def expected(self, dtype: torch.dtype) -> list[Tensor]:
        """By the specification in dtype: out of the first queries, and in training the gradients of the leaves where
        these queries alone have an upstream gradient."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype).requires_grad_(self.training)

        query = leaf(self.query[:, :CHECKED])
        sources = [s._replace(key=leaf(s.key), value=leaf(s.value)) for s in self.sources]
        out = reference.multi_source_attention(query, sources)
        if not self.training:
            return [out]
        wanted = [query, *(x for s in sources for x in (s.key, s.value))]
        return [out.detach(), *torch.autograd.grad(out, wanted, self.upstream[:, :CHECKED].to(dtype))]

    @functools.cached_property
    def truth_and_low(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.expected(torch.float64), self.expected(self.query.dtype)

    def error(self, name: str, result: Tensor) -> float:
        """Of a result without gradients."""
        (truth,), (low,) = self.truth_and_low
        return checked_error(name, result[:, :CHECKED], low, truth)

    def error_of_gradients(self, name: str, call: Callable[[], Tensor]) -> float:
        """The largest error of out and of the gradients, of a run in which the first queries alone have an upstream
        gradient, so that float64 has to compute these alone."""
        few = torch.zeros_like(self.upstream)
        few[:, :CHECKED] = self.upstream[:, :CHECKED]
        out, of_query, *rest = self.trained(call, few)
        found = [out.detach()[:, :CHECKED], of_query[:, :CHECKED], *rest]
        truth, low = self.truth_and_low
        return max(checked_error(name, *x) for x in zip(found, low, truth))


def contenders(case: Case, *, with_flex: bool = False) -> dict[str, Callable[[], Tensor]]:
    """Everybody by name, ours first. FlexAttention compiles every mask anew, for many seconds."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, backend in BACKENDS.items():
        found[name] = functools.partial(case.ours, backend)
    how, one_tensor = ("gather", case.gathered) if case.masked else ("cat", case.joined)
    for name, attend in ONE_CALL.items():
        found[f"{how} + {name}"] = lambda attend=attend: attend(*one_tensor())
    if case.masked:
        found |= _with_mask(case)
    for name, partial in PER_SOURCE.items():
        found[f"per source + {name}"] = functools.partial(
            gpu_peers.per_source, partial, case.query, case.sources, case.lists
        )
    found["xformers"] = lambda: by_xformers(*case.joined(), case.mask)
    if with_flex:
        flex = layers.Flex(layers.block_mask_of_keys(case.visible, case.layer.tokens) if case.masked else None)
        found["FlexAttention"] = lambda: flex(*case.joined())
    if case.layer.tokens <= NAIVE_UP_TO:
        found["naive"] = lambda: layers.naive(*case.joined(), case.mask)
    return found


def _with_mask(case: Case) -> Mapping[str, Callable[[], Tensor]]:
    """SDPA's kernels that take a mask."""
    return {
        f"SDPA + mask ({name})": lambda backend=backend: forced(backend, *case.joined(), case.mask)
        for name, backend in SDPA.items()
        if name != "flash"
    }
