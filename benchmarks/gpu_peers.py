"""Attention peers that reach a GPU machine as wheels of their own: FlashAttention-3 and -4, and cuDNN by its frontend.

gpu_run.sh names the wheels. Each peer takes query (B, N, H, D), key and value (B, M, H, D), and returns out
(B, N, H, D). A library that is not there raises `NotRun`; one that refuses a call raises an exception of its own.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lr_kernels import Source, merge_attention_states

from .attention import heads_first
from .harness import NotRun

WHEELS = {"fa3_fwd_interface": "fa3-fwd", "flash_attn.cute": "flash-attn-4", "cudnn": "nvidia-cudnn-frontend"}
"""The package on PyPI of each module that is imported here."""


def versions() -> dict[str, str]:
    """Of the peers' packages; "-" where one is not installed."""
    found = dict.fromkeys(WHEELS.values(), "-")
    for package in found:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def library(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that does not fit this torch or driver fails here in its own way
        raise NotRun(f"{WHEELS[module]}: {type(error).__name__}: {error}") from error


def fa3(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """options: causal, window_size (keys to the left, keys to the right)."""
    return library("fa3_fwd_interface").flash_attn_func(query, key, value, **options)


def fa4(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return library("flash_attn.cute").flash_attn_func(query, key, value, **options)[0]


def fa3_padded(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """lengths: int32 (B,), how many of its first keys each row sees."""
    return library("fa3_fwd_interface").flash_attn_with_kvcache(query, key, value, cache_seqlens=lengths)


def fa4_padded(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    return library("flash_attn.cute").flash_attn_varlen_func(query, key, value, seqused_k=lengths)[0]


class KeyList(NamedTuple):
    """The visible tokens of a source's rows, as FlashAttention's page tables name them: with pages of one token."""

    table: Tensor
    """int32 (R, L): places among the source's R * M tokens, in each row first those of its visible tokens"""
    lengths: Tensor
    """int32 (R,): how many places of each row count"""


def key_list(mask: Tensor, rows: int) -> KeyList:
    """Of a source with that many rows; mask: bool (1 or rows, M)."""
    mask = mask.expand(rows, -1)
    lengths = mask.sum(1)
    visible_first = mask.byte().argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(rows, device=mask.device)[:, None] * mask.shape[1]
    table = (visible_first + starts)[:, : int(lengths.max())]
    return KeyList(table.int().contiguous(), lengths.int())


def pages(x: Tensor) -> Tensor:
    """(R, M, H, D) as pages of one token, (R * M, 1, H, D), in place."""
    return x.view(-1, 1, *x.shape[2:])


Partial = Callable[[Tensor, Tensor, Tensor, KeyList | None], tuple[Tensor, Tensor]]
"""query, key, value, visible keys (None: all) -> out and its natural-log lse, fp32 (B, H, N)"""


def fa3_partial(query: Tensor, key: Tensor, value: Tensor, keys: KeyList | None) -> tuple[Tensor, Tensor]:
    found = library("fa3_fwd_interface")
    if keys is None:
        return found.flash_attn_func(query, key, value, return_attn_probs=True)
    lists = dict(page_table=keys.table, cache_seqlens=keys.lengths)
    out, lse, *_ = found.flash_attn_with_kvcache(query, pages(key), pages(value), **lists, return_softmax_lse=True)
    return out, lse


def fa4_partial(query: Tensor, key: Tensor, value: Tensor, keys: KeyList | None) -> tuple[Tensor, Tensor]:
    found = library("flash_attn.cute")
    if keys is None:
        return found.flash_attn_func(query, key, value, return_lse=True)
    lists = dict(page_table=keys.table, seqused_k=keys.lengths)
    return found.flash_attn_varlen_func(query, pages(key), pages(value), **lists, return_lse=True)


def per_source(partial: Partial, query: Tensor, sources: Sequence[Source], lists: Sequence[KeyList | None]) -> Tensor:
    """One call of `partial` per source, where no key or value is copied, and their results merged.

    FlashAttention has no row table: where all batch rows read one source row, their queries are one long sequence.
    """
    if query.requires_grad and torch.is_grad_enabled():
        raise NotRun("neither a page table nor merge_attention_states has a backward")
    outs, lses = [], []
    for source, keys in zip(sources, lists):
        if keys is not None and keys.table.shape[1] == 0:
            continue  # no row sees a key of this source
        one_sequence = source.key.shape[0] == 1
        rows = query.flatten(0, 1)[None] if one_sequence else query
        out, lse = partial(rows, source.key, source.value, keys)
        outs.append(out.view(query.shape))
        lses.append(lse.transpose(1, 2).view(query.shape[:3]))
    if not outs:
        raise NotRun("no key is visible")
    return merge_attention_states(outs, lses)[0]


class CudnnFrontend:
    """cuDNN's attention as a graph, built once for each layout of the tensors; its workspace is kept between calls and
    is not in the peak memory of a call."""

    def __init__(self) -> None:
        self.built: dict[tuple, Callable[[Sequence[Tensor]], None]] = {}

    @functools.cached_property
    def handle(self) -> Any:
        return library("cudnn").create_handle()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.requires_grad and torch.is_grad_enabled():
            return _CudnnAttention.apply(self, query, key, value)
        return self.forward(query, key, value, with_stats=False)[0]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, with_stats: bool) -> tuple[Tensor, Tensor | None]:
        """out, and the lse (B, H, N, 1) that the backward pass needs."""
        batch, tokens, heads, _ = query.shape
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        stats = query.new_empty(batch, heads, tokens, 1, dtype=torch.float32) if with_stats else None
        results = [heads_first(out)] if stats is None else [heads_first(out), stats]
        self._run("sdpa", _named("qkv", query, key, value), results, generate_stats=with_stats)
        return out, stats

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, grad: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of query, key and value."""
        given = _named(("q", "k", "v", "o", "dO"), query, key, value, out, grad) | {"stats": stats}
        found = tuple(map(torch.empty_like, (query, key, value)))
        self._run("sdpa_backward", given, [heads_first(x) for x in found])
        return found

    def _run(self, op: str, given: Mapping[str, Tensor], results: Sequence[Tensor], **options: bool) -> None:
        tensors = (*given.values(), *results)
        layout = (op, *((x.dtype, x.shape, x.stride()) for x in tensors))
        if layout not in self.built:
            self.built[layout] = self._build(op, given, results, options)
        self.built[layout](tensors)

    def _build(
        self, op: str, given: Mapping[str, Tensor], results: Sequence[Tensor], options: Mapping[str, bool]
    ) -> Callable[[Sequence[Tensor]], None]:
        """A function that runs the operation on tensors of the same layouts, the results after the inputs."""
        cudnn, handle, query = library("cudnn"), self.handle, given["q"]
        types = {
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float16: cudnn.data_type.HALF,
            torch.float32: cudnn.data_type.FLOAT,
        }
        graph = cudnn.pygraph(
            io_data_type=types[query.dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        places = {
            name: graph.tensor(name=name, dim=list(x.shape), stride=list(x.stride()), data_type=types[x.dtype])
            for name, x in given.items()
        }
        made = getattr(graph, op)(**places, attn_scale=query.shape[-1] ** -0.5, **options)[: len(results)]
        for place, x in zip(made, results):
            place.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride())).set_data_type(types[x.dtype])
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=query.device)
        order = (*places.values(), *made)

        def run(tensors: Sequence[Tensor]) -> None:
            cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
            graph.execute(dict(zip(order, tensors)), workspace, handle=handle)

        return run


def _named(names: Sequence[str], *tensors: Tensor) -> dict[str, Tensor]:
    """(B, N, H, D) as cuDNN counts dimensions, (B, H, N, D), in place."""
    return {name: heads_first(x.detach()) for name, x in zip(names, tensors)}


class _CudnnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frontend: CudnnFrontend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, stats = frontend.forward(query, key, value, with_stats=True)
        ctx.frontend = frontend
        ctx.save_for_backward(query, key, value, out, stats)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.frontend.backward(*ctx.saved_tensors, grad)
