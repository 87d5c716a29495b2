"""Gradients of multi_source_attention on the kernels: one autograd node, built only when a gradient is asked for."""

from typing import Any

import torch
from torch import Tensor

from .ops import AttentionTables, attention_backward_op, attention_op


def attention_with_gradients(
    backend: str, query: Tensor, tables: AttentionTables, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The op of `backend`, differentiable in query and in the keys, values and key biases of `tables`."""
    out, lse = _Attention.apply(backend, query, tables, return_lse, *tables.key, *tables.value, *tables.key_bias)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, query: Tensor, tables: AttentionTables, return_lse: bool, *parts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """parts: the keys, values and key biases of `tables`, which autograd only sees as arguments of their own."""
        plain = len(tables.weight) == 1 and tables.weight[0] is None
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:3], dtype=torch.float64) if plain or return_lse else None
        attention_op(backend)(query, *tables, out, lse)
        strengths = (*tables.logit_scale, *tables.logit_bias, *tables.weight)  # saved: a change in place is an error
        ctx.save_for_backward(query, *parts, *((out, lse) if plain else (None, None)), *strengths)
        rest = tables._replace(key=[], value=[], key_bias=[], logit_scale=[], logit_bias=[], weight=[])
        ctx.backend, ctx.tables = backend, rest
        ctx.set_materialize_grads(False)
        return out, lse if lse is None else lse.float()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.tables.rows)
        query, *parts = ctx.saved_tensors[: 1 + 3 * count]
        out, lse, *strengths = ctx.saved_tensors[1 + 3 * count :]
        key, value, key_bias = parts[:count], parts[count : 2 * count], parts[2 * count :]
        tables = ctx.tables._replace(
            key=key,
            value=value,
            key_bias=key_bias,
            logit_scale=strengths[:count],
            logit_bias=strengths[count : 2 * count],
            weight=strengths[2 * count :],
        )
        bias_wanted = ctx.needs_input_grad[4 + 2 * count :]
        if grad_out is None:
            grad_out = torch.zeros_like(query)
        if out is not None:
            grads = _group_gradients(ctx.backend, query, tables, out, lse, grad_out, grad_lse, bias_wanted)
            return (None, grads[0], None, None, *grads[1:])
        # each group: its own softmax, its part of the sum scaled by its weight; out and lse are computed again
        grad_query = torch.zeros_like(query)
        grad_parts: list[list[Tensor | None]] = [[], [], []]
        for g, weight in enumerate(tables.weight):
            members = [i for i in range(count) if tables.softmax_group[i] == g]
            group = _group_tables(tables, members)
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
            lse = query.new_empty(query.shape[:3], dtype=torch.float64)
            attention_op(ctx.backend)(query, *group, out, lse)
            grad = grad_out if weight is None else (grad_out * weight[:, :, None, None]).to(query.dtype)
            wanted = bias_wanted[members[0] : members[-1] + 1]
            grads = _group_gradients(ctx.backend, query, group, out, lse, grad, grad_lse, wanted)
            grad_query = grad_query + grads[0]
            for i in range(3):
                grad_parts[i] += grads[1 + i * len(members) : 1 + (i + 1) * len(members)]
        return (None, grad_query, None, None, *grad_parts[0], *grad_parts[1], *grad_parts[2])


def _group_tables(tables: AttentionTables, members: list[int]) -> AttentionTables:
    """The sources of one softmax group, without its weight."""
    per_source = AttentionTables._fields[: AttentionTables._fields.index("query_order")]
    chosen: dict[str, Any] = {name: [getattr(tables, name)[i] for i in members] for name in per_source}
    return tables._replace(**chosen, softmax_group=[0] * len(members), weight=[None])


def _group_gradients(
    backend: str,
    query: Tensor,
    tables: AttentionTables,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    bias_wanted: tuple[bool, ...],
) -> tuple[Any, ...]:
    """(grad_query, S x grad_key, S x grad_value, S x grad_key_bias or None) of one softmax group without a weight."""
    heads = query.shape[2]
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (
        [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in kind]
        for kind in (tables.key, tables.value)
    )
    grad_bias = [
        query.new_zeros((heads, *bias.shape) if bias is not None and wanted else (0,), dtype=torch.float32)
        for bias, wanted in zip(tables.key_bias, bias_wanted)
    ]
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    attention_backward_op(backend)(
        grad_out, grad_lse, query, *tables[: AttentionTables._fields.index("softmax_group")], tables.scale, out, lse,
        grad_query, grad_key, grad_value, grad_bias,
    )  # fmt: skip
    return (
        grad_query,
        *(x.to(query.dtype) for x in grad_key),
        *(x.to(query.dtype) for x in grad_value),
        *(x.sum(0) if wanted else None for x, wanted in zip(grad_bias, bias_wanted)),
    )
