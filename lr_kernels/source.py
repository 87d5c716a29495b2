"""Source: what queries attend to, with the row table, masks and strengths of multi_source_attention."""

from typing import NamedTuple

from torch import Tensor


class Source(NamedTuple):
    """Keys and values that queries attend to, with their own number of rows R and of tokens M.

    Only `key` and `value` are needed. Strided views are read in place; only the last dimension must be contiguous. Keys
    and values may have fewer heads K than the query has, H: query head h reads head h // (H // K), and none is copied.
    """

    key: Tensor
    """(R, M, K, D), the query's device and dtype; or int8 or float8_e4m3fn, which key_scale turns into that dtype. K is
    H or a divisor of it"""
    value: Tensor
    """(R, M, K, E), the dtype of the key; E, the head_dim of the values and of the result, may differ from D"""
    rows: Tensor | None = None
    """int (B,): the row that each query row reads, -1: none. Default: row b, or row 0 where R = 1"""
    key_mask: Tensor | None = None
    """bool (R or 1, M): False leaves a key out of the softmax, for all heads"""
    key_groups: Tensor | None = None
    """uint8 bits (R or 1, M): a key is visible to queries that share a bit with it"""
    key_bias: Tensor | None = None
    """fp32 (R or 1, M): added to the logits, a log-weight per key"""
    logit_scale: float | Tensor | None = None
    """scalar, (B,) or (B, H): multiplies the logits of this source"""
    logit_bias: float | Tensor | None = None
    """scalar, (B,) or (B, H): added to the logits of this source"""
    value_index: Tensor | None = None
    """int (R or B, M): the value token read for key j. Default: j"""
    softmax_group: int = 0
    """sources with the same number share one softmax; the groups' results are added"""
    weight: float | Tensor | None = None
    """scalar, (B,) or (B, N): weight of the softmax group, taken from its first source"""
    key_scale: Tensor | None = None
    """fp32 (R or 1, M or 1, K or 1), of 8-bit keys alone: K = key · key_scale, rounded to the query's dtype"""
    value_scale: Tensor | None = None
    """fp32 (R or 1, M or 1, K or 1), of 8-bit values alone, by the values' own tokens: V = value · value_scale"""
    key_range: Tensor | None = None
    """int (B or 1, N, 2): query i sees the keys from its first number up to, and without, its second one. Numbers
    outside 0 … M count as the nearest of these"""
    block_mask: Tensor | None = None
    """bool (R or 1, H or 1, query blocks, key blocks): which blocks of keys a block of queries sees"""
    block_size: tuple[int, int] = (128, 128)
    """queries and keys in a block of block_mask; the last blocks may be shorter. Keys: a power of two"""
