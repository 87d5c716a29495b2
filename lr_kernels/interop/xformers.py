"""xformers' `memory_efficient_attention`, with tensors and with its objects of causal order and packed sequences."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.checks import fail, one_of
from ..runtime.tensors import check_dense
from .one_source import attention_call, causal_range, check_dimensions, not_implemented, refuse_unless_off
from .varlen import packed_range


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: object = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`xformers.ops.memory_efficient_attention` for tensors of 3 to 5 dimensions.

    Args:
        query: (B, N, H, D), (B, N, D), or (B, N, G, H, D) in groups of heads. key: (B, M, H, D), (B, M, D) or
            (B, M, G, H, D), of which groups that are expanded over the heads are read in place. value: like key, of a
            head_dim of its own.
        attn_bias: float (added) or bool (True: takes part), as attn_mask of `scaled_dot_product_attention`. It
            broadcasts to (B, H, N, M) or, with 5 dimensions, to (B, G, H, N, M). With 3 dimensions it is
            (B or 1, N, M) or (B * H, N, M), where N may be 1. Or an object of xformers: LowerTriangularMask,
            LowerTriangularFromBottomRightMask, LocalAttentionFromBottomRightMask, BlockDiagonalMask,
            BlockDiagonalCausalMask, BlockDiagonalCausalFromBottomRightMask and
            BlockDiagonalCausalLocalAttentionMask, whose packed sequences lie in one batch row.

    Returns:
        like query, of value's head_dim.

    Raises:
        ValueError: other numbers of dimensions, shapes that do not fit.
        NotImplementedError: p (dropout), another AttentionBias object, a bias of another kind, op, output_dtype other
            than the query's.
    """
    name = "memory_efficient_attention"
    refuse_unless_off(name, p=p, op=op)
    check_dense(name, "query", query)
    if output_dtype not in (None, query.dtype):
        not_implemented(name, "output_dtype", f"None or {query.dtype}", output_dtype)
    check_dimensions(name, query, key, value, "3, 4 or 5 dimensions", (3, 4, 5))
    batch, groups = query.shape[0], query.shape[2:-1]  # (), (H,) or (G, H)
    key, value = _without_copies(key, value)
    query, key, value = (x.unsqueeze(2) if x.dim() == 3 else x.flatten(2, -2) for x in (query, key, value))
    heads = query.shape[2]
    order = bias = None
    if isinstance(attn_bias, Tensor):
        bias = attn_bias
        if bias.dim() == 5:
            if len(groups) != 2 or not all(map(one_of, bias.shape[1:3], (1, 1), groups)):
                expected = f"at most 4 dimensions, or (B, {', '.join(map(str, groups))}, N, M) in groups of heads"
                fail(name, "attn_bias", expected, tuple(bias.shape))
            bias = bias.expand(-1, *groups, -1, -1).flatten(1, 2)
        elif bias.dim() == 3 and bias.shape[0] == batch * heads:
            bias = bias.unflatten(0, (batch, heads))
        elif bias.dim() == 3:
            bias = bias.unsqueeze(1)
    elif attn_bias is not None:
        order = _range_of(name, attn_bias, query, key)
    gqa = key.shape[2] != heads and len(groups) == 2
    out = attention_call(name, query, key, value, bias, scale, gqa, "attn_bias", order).attend()
    return out.reshape(*out.shape[:2], *groups, out.shape[3])


def _without_copies(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M, G, H, D) that are expanded over the heads -> (B, M, G, 1, D), from which the operator reads for each."""
    if key.dim() == 5 and key.stride(3) == value.stride(3) == 0:
        return key.narrow(3, 0, min(1, key.shape[3])), value.narrow(3, 0, min(1, value.shape[3]))
    return key, value


class _Order(NamedTuple):
    """How a class of xformers orders the keys of each query."""

    packed: bool
    causal: bool = False
    from_the_end: bool = False
    """Whether the last query sees the last key, and not the first one the first."""
    left: str | None = None
    """The attribute that holds how many keys before its own one a query sees."""
    right: str | None = None


_ORDERS = {
    "LowerTriangularMask": _Order(False, True),
    "LowerTriangularFromBottomRightMask": _Order(False, True, True),
    "LocalAttentionFromBottomRightMask": _Order(False, False, True, "window_left", "window_right"),
    "BlockDiagonalMask": _Order(True),
    "BlockDiagonalCausalMask": _Order(True, True),
    "BlockDiagonalCausalFromBottomRightMask": _Order(True, True, True),
    "BlockDiagonalCausalLocalAttentionMask": _Order(True, True, False, "_window_size"),
}
"""By the name of the class: these objects are read without importing xformers."""


def _range_of(op: str, bias: object, query: Tensor, key: Tensor) -> Tensor:
    """The key_range (1, N, 2) of an object of xformers."""
    kind = type(bias).__name__
    if kind not in _ORDERS:
        not_implemented(op, "attn_bias", "a tensor, None or one of " + ", ".join(_ORDERS), kind)
    order = _ORDERS[kind]
    queries, keys, device = query.shape[1], key.shape[1], query.device
    if not order.packed:
        offset = keys - queries if order.from_the_end else 0
        if order.causal:
            return causal_range(queries, device, offset)
        place = torch.arange(queries, dtype=torch.int32, device=device) + offset
        left, right = (int(getattr(bias, str(side))) for side in (order.left, order.right))
        return torch.stack([place - left, place + right + 1], -1)[None]
    if query.shape[0] != 1 or key.shape[0] != 1:
        fail(op, "query", f"one batch row of packed sequences, as {kind} needs", query.shape[0])
    starts = []
    for name, tokens in (("q_seqinfo", queries), ("k_seqinfo", keys)):
        lengths = getattr(bias, name)
        start = torch.as_tensor(lengths.seqstart_py, dtype=torch.int32)
        if int(start[-1]) != tokens:
            fail(op, "attn_bias", f"{name} of {tokens} tokens in all", int(start[-1]))
        starts.append(start.to(device))
    window = None if order.left is None else int(getattr(bias, order.left))
    return packed_range(starts[0], starts[1], queries, order.causal, window, order.from_the_end)
