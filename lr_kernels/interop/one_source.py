"""Attention over one source, with a mask in PyTorch's form."""

import functools
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..attention.api import multi_source_attention
from ..attention.plan import AttentionPlan
from ..runtime.checks import fail
from ..runtime.tensors import check_dense
from ..source import Source
from .masks import read_mask


class AttentionCall(NamedTuple):
    """What `multi_source_attention` takes for attention over one source of keys, and `more` beside it."""

    query: Tensor
    sources: Sequence[Source]
    query_groups: Tensor | None
    scale: float | None
    plan: AttentionPlan | None

    def attend(self) -> Tensor:
        """(B, N, H, E)."""
        query, sources, groups, scale, plan = self
        return multi_source_attention(query, sources, query_groups=groups, scale=scale, plan=plan)

    def attend_with_lse(self) -> tuple[Tensor, Tensor]:
        """(B, N, H, E), and the lse (B, N, H) in fp32."""
        query, sources, groups, scale, plan = self
        found = multi_source_attention(query, sources, query_groups=groups, scale=scale, plan=plan, return_lse=True)
        assert isinstance(found, tuple)
        return found


def attention_call(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    gqa: bool = False,
    mask_name: str = "attn_mask",
    key_range: Tensor | None = None,
    more: Sequence[Source] = (),
) -> AttentionCall:
    """Attention over one source: (B, N, H, D), (B, M, H, D), (B, M, H, E) and a mask as in
    `scaled_dot_product_attention`; with gqa keys and values may have fewer heads. `op` and `mask_name` are the names in
    errors; key_range is that of the source, beside the mask; `more` are sources in the same softmax."""
    heads, key_heads = query.shape[2], key.shape[2]
    if heads != key_heads:
        if not gqa or key_heads == 0 or heads % key_heads:
            fail(op, "key", f"{heads} heads" + (" or a divisor of it" if gqa else ""), key_heads)
        if value.shape[2] != key_heads:
            fail(op, "value", f"{key_heads} heads, as key has", value.shape[2])
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    if key.shape[0] not in (1, query.shape[0]):
        fail(op, "key", f"a batch of {query.shape[0]}, as query has, or of 1", key.shape[0])
    if query.shape[3] == 0:
        fail(op, "query", "head_dim of at least 1", 0)
    if key.shape[3] != query.shape[3]:
        fail(op, "key", f"head_dim {query.shape[3]}, as query has", key.shape[3])
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    source, plan, query_groups = Source(key, value, key_range=key_range), None, None
    if mask is not None:
        if mask.device != query.device:
            fail(op, mask_name, str(query.device), mask.device)
        shape = (query.shape[0], heads, query.shape[1], key.shape[1])
        parts = read_mask(op, mask_name, mask, shape, query.dtype)
        query_groups = parts.query_groups
        plan = parts.plan if not more else None
        source = source._replace(
            key_mask=parts.key_mask,
            key_bias=parts.key_bias,
            key_groups=parts.key_groups,
            key_range=intersect(key_range, parts.key_range),
        )
    return AttentionCall(query, [source, *more], query_groups, scale, plan)


def intersect(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The key_range (B or 1, N, 2) of what both hold; None holds all."""
    if first is None or second is None:
        return second if first is None else first
    begin = torch.maximum(first[..., 0], second[..., 0])
    return torch.stack([begin, torch.minimum(first[..., 1], second[..., 1])], -1)


def causal_range(queries: int, device: torch.device, offset: int = 0, window: int | None = None) -> Tensor:
    """key_range (1, N, 2) int32 of causal order: query i sees keys 0 … i + offset, of which with a window the last
    `window` ones."""
    if torch.compiler.is_compiling():
        return _causal_range(queries, device, offset, window)
    return _remembered_causal_range(queries, device, offset, window)


def causal_order(op: str, is_causal: bool, mask: Tensor | None, queries: int, device: torch.device) -> Tensor | None:
    """`causal_range` where is_causal is on, which is refused beside a mask attn_mask; else None."""
    if not is_causal:
        return None
    if mask is not None:
        hint = "put the causal order into the mask"
        fail(op, "attn_mask", "None beside is_causal", "a tensor", hint, NotImplementedError)
    return causal_range(queries, device)


def _causal_range(queries: int, device: torch.device, offset: int, window: int | None) -> Tensor:
    end = torch.arange(1, queries + 1, dtype=torch.int32, device=device) + offset
    begin = torch.zeros_like(end) if window is None else end - window
    return torch.stack([begin, end], -1)[None]


_remembered_causal_range = functools.lru_cache(maxsize=16)(_causal_range)


def check_mask_type(op: str, name: str, mask: object) -> None:
    """TypeError unless the mask is None or a tensor."""
    if mask is not None:
        check_dense(op, name, mask)


def check_dimensions(op: str, query: Tensor, key: Tensor, value: Tensor, expected: str, allowed: tuple) -> None:
    """Refuse tensors of other numbers of dimensions."""
    check_dense(op, "query", query)
    if query.dim() not in allowed:
        fail(op, "query", expected, query.dim())
    for name, x in (("key", key), ("value", value)):
        check_dense(op, name, x)
        if x.dim() != query.dim():
            fail(op, name, f"{query.dim()} dimensions, as query has", x.dim())


def refuse_unless_off(op: str, /, **arguments: object) -> None:
    """Refuse every argument except None, False and 0, which mean off."""
    for name, x in arguments.items():
        if x is not None and x is not False and not (isinstance(x, Real) and x == 0):
            not_implemented(op, name, "none", f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else x)


def not_implemented(op: str, argument: str, expected: str, got: object) -> NoReturn:
    """Refuse what the operator has no form for."""
    fail(op, argument, expected, got, "the operator has no such thing; use PyTorch's attention", NotImplementedError)
