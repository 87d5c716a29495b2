"""Sequences of different lengths, packed one after the other: the form of flash-attn's `flash_attn_varlen_func`."""

import torch
from torch import Tensor

from ..runtime.checks import check_integer, fail
from ..runtime.tensors import check_dense
from .one_source import attention_call

_OP = "variable_length_attention"


def variable_length_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of packed sequences, each to its own keys. The work follows the lengths; nothing is padded, and the
    lengths are not read by the host.

    Args:
        query: (T, H, D), the queries of all sequences. key: (U, K, D), K being H or a divisor of it. value: (U, K, E).
        cu_seqlens_q, cu_seqlens_k: int (S + 1,) on the query's device, ascending from 0 to T and to U: where each of S
            sequences starts.
        causal: the last query of a sequence sees all its keys, each one before it one key less.
        window: with causal: how many keys a query sees at most, the last of those.
        scale: default D ** -0.5.

    Returns:
        (T, H, E). A query that sees no key gets 0.

    Raises:
        ValueError, TypeError: an argument that does not fit.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_dense(_OP, name, x)
        if x.dim() != 3:
            fail(_OP, name, "shape (tokens, heads, head_dim)", tuple(x.shape))
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_dense(_OP, name, x)
        if x.dim() != 1 or x.shape[0] < 1 or x.dtype not in (torch.int32, torch.int64):
            fail(_OP, name, "int32 or int64 of shape (sequences + 1,)", f"{x.dtype} of shape {tuple(x.shape)}")
        if x.device != query.device:
            fail(_OP, name, str(query.device), x.device)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        fail(_OP, "cu_seqlens_k", f"{cu_seqlens_q.shape[0]} entries as cu_seqlens_q", cu_seqlens_k.shape[0])
    for name, x, tokens in (("cu_seqlens_q", cu_seqlens_q, query), ("cu_seqlens_k", cu_seqlens_k, key)):
        if x.device.type != "cpu":  # looking would synchronize
            continue
        expected = f"entries that ascend from 0 to {tokens.shape[0]}"
        right = (x[0] == 0) & (x[-1] == tokens.shape[0]) & (x[1:] >= x[:-1]).all()
        if torch.compiler.is_compiling():
            torch._assert_async(right, f"lr_kernels.{_OP}: {name}: expected {expected}")
        elif not right:
            fail(_OP, name, expected, x.tolist())
    if window is not None:
        window = check_integer(_OP, "window", window, 1, "a number of keys from 1 on")
        if not causal:
            fail(_OP, "window", "None without causal", window)
    seen = packed_range(cu_seqlens_q, cu_seqlens_k, query.shape[0], causal, window, from_the_end=True)
    query, key, value = (x[None] for x in (query, key, value))
    return attention_call(_OP, query, key, value, None, scale, gqa=True, key_range=seen).attend()[0]


def packed_range(
    start_q: Tensor, start_k: Tensor, queries: int, causal: bool, window: int | None, from_the_end: bool
) -> Tensor:
    """key_range (1, N, 2) int32 of packed sequences, whose starts are (S + 1,): a query sees the keys of its own one.

    With causal, those up to its own place in it, of which the window leaves the last ones. from_the_end: the last query
    of a sequence stands at its last key, and not the first one at its first.
    """
    place = torch.arange(queries, device=start_q.device)
    number = torch.searchsorted(start_q, place, right=True) - 1
    number = number.clamp(0, max(start_q.shape[0] - 2, 0))
    after = (number + 1).clamp(max=start_q.shape[0] - 1)
    begin, end = start_k[number], start_k[after]
    if causal:
        own = end - (start_q[after] - place) if from_the_end else begin + (place - start_q[number])
        end = torch.minimum(end, own + 1)
        if window is not None:
            begin = torch.maximum(begin, own + 1 - window)
    return torch.stack([begin, end], -1).int()[None]
