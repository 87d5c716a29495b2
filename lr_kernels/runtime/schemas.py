"""The schemas of the torch ops, the limits of their arguments, and the arguments of attention as a named tuple.

Every op writes into preallocated outputs and returns nothing, so one no-op fake serves all of them. Names are
`lr_kernels::<operator>_<backend>`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_TOKENS = 2**31 - 1
"""The most tokens that int32 index tables can number."""
MAX_SOURCES = 16
MAX_HEAD_DIM = 256
MAX_KEY_BLOCK = 65536
"""The most keys that an entry of an index list stands for."""
MAX_PREDICTIONS = 6
MAX_PARTS = 16
"""The most partial results that merge_attention_states joins."""
EIGHT_BIT_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The dtypes in which a source may hold keys and values in 8 bits, and the largest number that `quantize` writes."""
COLUMNS = ("a", "e", "sigma", "h", "p", "q", "c", "d", "s")
"""The columns after the weights g_0 … g_{K-1} of the predictions in step_blend's coefficient table; their meaning is in
`reference.step_blend`."""

# B batch rows of N tokens, S sources of R rows, M keys and K heads, a divisor of H, C query classes (see plan.py), G
# softmax groups. Keys and values have K heads; head h of the query reads their head h // (H // K).
_ATTENTION_INPUTS = (
    "Tensor query, Tensor[] key, Tensor[] value, "  # (B, N, H, D), S x (R, M, K, D or E), forward also 8 bits
    "Tensor?[] rows, "  # int32 (B,)
    "Tensor?[] key_index, Tensor?[] key_count, "  # int32 (C or 1, R or 1, H or 1, ⌈M / key_block⌉), the same without M
    "int[] key_block, "  # S powers of two: keys of an entry of key_index
    "Tensor?[] key_range, "  # int32 (B or 1, N, 2)
    "Tensor?[] value_index, "  # int32 (R or B or 1, M)
    "Tensor?[] key_bias, "  # fp32 (R or 1, M)
    "Tensor?[] logit_scale, Tensor?[] logit_bias, "  # fp32 (B, H), strides free
    "Tensor? query_order, Tensor? class_start, "  # int32 (B or 1, N), (B or 1, C + 1)
    "int query_block, "  # not 0: class c is of the queries from c · query_block on, in place of these two
)

SCHEMAS = {
    "multi_source_attention": f"({_ATTENTION_INPUTS}"
    "int[] softmax_group, Tensor?[] weight, "  # S numbers that ascend from 0 to G - 1, G x fp32 (B, N), strides free
    "Tensor?[] key_scale, Tensor?[] value_scale, "  # fp32 (R or 1, M or 1, K or 1), strides free; beside 8-bit keys
    "float scale, Tensor(a!) out, Tensor(b!)? lse) -> ()",  # (B, N, H, E), fp32 or fp64 (B, N, H), which needs G = 1
    # of one softmax group without weight; out and lse (fp64) are those of the forward pass
    "multi_source_attention_backward": "(Tensor grad_out, Tensor? grad_lse, "  # (B, N, H, E), fp32 (B, N, H)
    f"{_ATTENTION_INPUTS}float scale, Tensor out, Tensor lse, "
    "Tensor(a!) grad_query, "  # (B, N, H, D) contiguous
    "Tensor(b!)[] grad_key, Tensor(c!)[] grad_value, "  # S x fp32 (R, M, K, D or E) contiguous, added to
    "Tensor(d!)[] grad_key_bias) -> ()",  # S x fp32 (H, R or 1, M) contiguous, added to; empty: not wanted
    "attention_with_token_maps": "("
    "Tensor query, Tensor key, Tensor value, Tensor token_indices, "  # (B, N, H, D), (B, M, H, D) x 2, int32 (B, T)
    "float scale, Tensor(a!) out, Tensor(b!) maps) -> ()",  # (B, N, H, D), fp32 (B, N, T)
    "subject_mask": "("
    "Tensor maps, float? threshold, float? quantile, int smoothing, "  # fp32 (B, L, h, w), both None: Otsu
    "Tensor(a!) out) -> ()",  # bool (B, H, W)
    "step_blend": "("
    "Tensor sample, Tensor[] predictions, "  # (B, C, h, w) each
    "Tensor coefficients, Tensor? step, int row, "  # fp32 (steps, B or 1, K + 9), int32 (1,); None: step is `row`
    "Tensor? mask, Tensor? background, Tensor? noise, Tensor? history, "  # fp32 (B or 1, h, w), (B, C, h, w) x 3
    "Tensor? keep_rows, Tensor(a!) out, "  # bool (B,), (B, C, h, w)
    "Tensor(b!)? model_input, Tensor(c!)? history_out) -> ()",  # (n * B, C, h, w), (B, C, h, w)
    "compact_keys": "("
    "Tensor? mask, Tensor? groups, int[] classes, "  # bool (R or 1, M), uint8 (R or 1, M), C query group bytes
    "Tensor(a!) index, Tensor(b!) count) -> ()",  # int32 (C, R, M), (C, R)
    "merge_attention_states": "("
    "Tensor[] outs, Tensor[] lses, "  # K x (B, N, H, D), K x fp32 (B, N, H)
    "Tensor(a!) out, Tensor(b!) lse) -> ()",
    "adain": "("
    "Tensor x, Tensor reference, "  # (B, N, H, D), (B or 1, M, H, D)
    "Tensor? mask, Tensor? reference_mask, "  # bool (B or 1, N), (B or 1, M), tokens contiguous
    "float eps, Tensor(a!) out) -> ()",
    "correspondence": "("
    "Tensor target, Tensor reference, "  # (B, N, C), (B or 1, M, C)
    "int columns, Tensor radius_squared, "  # of the target's grid; int64 (B,) or (1,), in its cells
    "Tensor(a!) index, Tensor(b!) consistent) -> ()",  # int64 (B, N), bool (B, N)
}

OPERATORS_WITH_CUDA = frozenset({"step_blend", "compact_keys", "multi_source_attention"})
"""The operators with a CUDA C++ kernel: small ones, whose time on a GPU is mostly that of the launch."""


class AttentionTables(NamedTuple):
    """The arguments of multi_source_attention between query and out, in the order of its schema."""

    key: Sequence[Tensor]
    value: Sequence[Tensor]
    rows: Sequence[Tensor | None]
    key_index: Sequence[Tensor | None]
    key_count: Sequence[Tensor | None]
    key_block: Sequence[int]
    key_range: Sequence[Tensor | None]
    value_index: Sequence[Tensor | None]
    key_bias: Sequence[Tensor | None]
    logit_scale: Sequence[Tensor | None]
    logit_bias: Sequence[Tensor | None]
    query_order: Tensor | None
    class_start: Tensor | None
    query_block: int
    softmax_group: Sequence[int]
    weight: Sequence[Tensor | None]
    key_scale: Sequence[Tensor | None]
    value_scale: Sequence[Tensor | None]
    scale: float
