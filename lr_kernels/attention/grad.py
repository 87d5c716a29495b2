"""Gradients of multi_source_attention on the kernels: one autograd node, built only when a gradient is asked for.

The node takes and saves the tensors of the call itself, so that a change in place before the backward pass is an error,
and lays them out for the kernel a second time in its backward pass.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..runtime import modes
from ..runtime.ops import kernel
from ..runtime.schemas import AttentionTables
from ..runtime.tensors import written_out
from ..source import Source
from .checks import OP, check, check_reference_memory
from .plan import AttentionPlan
from .tables import lay_out

_FIELDS = len(Source._fields)
_DIFFERENTIABLE = tuple(map(Source._fields.index, ("key", "value", "key_bias")))


class Options(NamedTuple):
    """The parts of a call that are not tensors."""

    backend: str
    by_reference: bool
    """Whether the backend was "auto", so that the specification may compute what the kernel cannot."""
    scale: float | None
    return_lse: bool


def attention_with_gradients(
    options: Options, query: Tensor, sources: Sequence[Source], query_groups: Tensor | None, plan: AttentionPlan
) -> Tensor | tuple[Tensor, Tensor]:
    """multi_source_attention on a kernel backend, differentiable in query, keys, values and key biases."""
    return _Attention.apply(options, query, query_groups, plan, *(x for s in sources for x in s))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: Options, query: Tensor, query_groups: Tensor | None, plan: AttentionPlan, *fields: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """fields: those of each source, which autograd only sees as arguments of their own."""
        tables = lay_out(query, _sources(fields), plan, options.scale)
        plain = len(tables.weight) == 1 and tables.weight[0] is None
        out = query.new_empty(*query.shape[:3], tables.value[0].shape[3])
        lse = query.new_empty(query.shape[:3], dtype=torch.float64) if plain or options.return_lse else None
        kernel("multi_source_attention", options.backend)(query, *tables, out, lse)
        given = (
            query, query_groups, plan.query_order, plan.class_start, *((out, lse) if plain else (None, None)),
            *plan.key_index, *plan.key_count, *fields,
        )  # fmt: skip
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in given))
        ctx.numbers = tuple(None if isinstance(x, Tensor) else x for x in given)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return (out, lse.float()) if options.return_lse and lse is not None else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # unpacked once: gradient checkpointing allows no more
        given = [number if x is None else x for x, number in zip(saved, ctx.numbers)]
        query, query_groups, order, start, out, lse, *rest = given
        count = len(rest) // (2 + _FIELDS)
        sources = _sources(rest[2 * count :])
        wanted = ctx.needs_input_grad[4:]
        if grad_out is None:
            grad_out = query.new_zeros(*query.shape[:3], sources[0].value.shape[3])
        grad_out = written_out(grad_out)
        grad_lse = None if grad_lse is None else written_out(grad_lse)
        if _beyond_kernels(grad_out, grad_lse):
            call = (ctx.options, query, sources, query_groups)
            found = _gradients_of_reference(*call, grad_out, grad_lse, (ctx.needs_input_grad[1], *wanted))
            return (None, found[0], None, None, *found[1:])
        plan = _plan_of_lists(sources, rest[:count], rest[count : 2 * count], order, start)
        tables = lay_out(query, sources, plan, ctx.options.scale)
        places = sorted(
            range(count), key=lambda i: sources[i].softmax_group
        )  # the sources' fields, in the order of the tables
        bias_wanted = tuple(wanted[i * _FIELDS + _DIFFERENTIABLE[2]] for i in places)
        if out is not None:
            parts = list(group_gradients(ctx.options.backend, query, tables, out, lse, grad_out, grad_lse, bias_wanted))
        else:
            parts = _sum_of_groups(ctx.options.backend, query, tables, grad_out, grad_lse, bias_wanted)
        grads: list[Tensor | None] = [None] * len(wanted)
        for kind, field in enumerate(_DIFFERENTIABLE):
            for i, x in zip(places, parts[1 + kind * count :]):
                if wanted[i * _FIELDS + field]:
                    argument: Any = sources[i][field]
                    grads[i * _FIELDS + field] = x.to(argument.dtype)
        return (None, parts[0], None, None, *grads)


def _sources(fields: Sequence[Any]) -> list[Source]:
    return [Source(*fields[i : i + _FIELDS]) for i in range(0, len(fields), _FIELDS)]


def _plan_of_lists(
    sources: Sequence[Source],
    key_index: Sequence[Tensor | None],
    key_count: Sequence[Tensor | None],
    query_order: Tensor | None,
    class_start: Tensor | None,
) -> AttentionPlan:
    """The plan of a forward pass, from its lists."""
    masks, blocks = (tuple(getattr(s, name) for s in sources) for name in ("key_mask", "block_mask"))
    size = next((s.block_size for s in sources if s.block_mask is not None), None)
    lists = tuple(key_index), tuple(key_count), query_order, class_start
    return AttentionPlan(masks, (), None, *lists, None if size is None else blocks, size)


def _beyond_kernels(grad_out: Tensor, grad_lse: Tensor | None) -> bool:
    """Whether this backward pass is itself to be differentiated, or is one of several that torch.vmap makes at once."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or modes.mapped(grad_out) or modes.mapped(grad_lse)


def _gradients_of_reference(
    options: Options,
    query: Tensor,
    sources: list[Source],
    query_groups: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of query and of the sources' fields, computed so that autograd can differentiate them."""
    if not options.by_reference:
        name = options.backend
        raise NotImplementedError(
            f"lr_kernels.{OP}: gradients of gradients (create_graph=True), torch.vmap over the backward pass: "
            f"not supported by backend {name!r}; supported by 'reference', which \"auto\" takes for them"
        )
    check(query, sources, query_groups, None)  # an index may have changed since where autograd cannot see it
    check_reference_memory(query, sources)
    with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
        # views: one tensor may be given in several places, each of which has its own gradient
        given: list[Any] = [query, *(x for s in sources for x in s)]
        query, *fields = (x.view_as(x) if asked else x for x, asked in zip(given, wanted))
        results = reference.multi_source_attention(
            query, _sources(fields), query_groups=query_groups, scale=options.scale, return_lse=grad_lse is not None
        )
        outputs, grads = (results, grad_out) if grad_lse is None else (results, (grad_out, grad_lse))
        inputs = [x for x, asked in zip((query, *fields), wanted) if asked]
        found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True))
    return [next(found) if asked else None for asked in wanted]


def _sum_of_groups(
    backend: str,
    query: Tensor,
    tables: AttentionTables,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    bias_wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of several softmax groups or of a weighted one: each has its own softmax, and its part of the sum
    is scaled by its weight; out and lse are computed again."""
    grad_query = torch.zeros_like(query)
    parts: list[list[Tensor | None]] = [[], [], []]
    for g, weight in enumerate(tables.weight):
        members = [i for i, group in enumerate(tables.softmax_group) if group == g]
        group = _group_tables(tables, members)
        out = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:3], dtype=torch.float64)
        kernel("multi_source_attention", backend)(query, *group, out, lse)
        grad = grad_out if weight is None else (grad_out * weight[:, :, None, None]).to(query.dtype)
        wanted = bias_wanted[members[0] : members[-1] + 1]
        grads = group_gradients(backend, query, group, out, lse, grad, grad_lse, wanted)
        grad_query = grad_query + grads[0]
        for i in range(3):
            parts[i] += grads[1 + i * len(members) : 1 + (i + 1) * len(members)]
    return [grad_query, *parts[0], *parts[1], *parts[2]]


def _group_tables(tables: AttentionTables, members: list[int]) -> AttentionTables:
    """The sources of one softmax group, without its weight."""
    per_source = AttentionTables._fields[: AttentionTables._fields.index("query_order")]
    chosen: dict[str, Any] = {name: [getattr(tables, name)[i] for i in members] for name in per_source}
    none = [None] * len(members)
    return tables._replace(**chosen, softmax_group=[0] * len(members), weight=[None], key_scale=none, value_scale=none)


def group_gradients(
    backend: str,
    query: Tensor,
    tables: AttentionTables,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    bias_wanted: tuple[bool, ...],
) -> tuple[Any, ...]:
    """(grad_query, S x grad_key, S x grad_value, S x grad_key_bias or None) of one softmax group without a
    weight; all but the first in fp32."""
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
    kernel("multi_source_attention_backward", backend)(
        grad_out, grad_lse, query, *tables[: AttentionTables._fields.index("softmax_group")], tables.scale, out, lse,
        grad_query, grad_key, grad_value, grad_bias,
    )  # fmt: skip
    return (
        grad_query,
        *grad_key,
        *grad_value,
        *(x.sum(0) if wanted else None for x, wanted in zip(grad_bias, bias_wanted)),
    )
