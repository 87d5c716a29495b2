"""A call of multi_source_attention until it can run: cast, check, plan, choose the backend, lay out the tables."""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real

import torch
from torch import Tensor

from .. import reference
from ..runtime import backends, modes, ops
from ..runtime.checks import FLOAT32_MAX, check_memory, check_sequence, fail
from ..runtime.schemas import EIGHT_BIT_LARGEST, MAX_SOURCES, AttentionTables
from ..source import Source
from . import hopper
from .checks import OP, check, check_copies, check_gradient_memory, check_reference_memory, check_types, resolve
from .grad import Options, attention_with_gradients
from .plan import AttentionPlan, build_plan
from .repeats import signature
from .tables import lay_out

Result = Tensor | tuple[Tensor, Tensor]
"""out, or (out, lse)"""


def prepare(
    query: Tensor,
    sources: Sequence[Source],
    query_groups: Tensor | None,
    scale: float | None,
    return_lse: bool,
    plan: AttentionPlan | None,
    backend: str,
) -> Callable[[], Result]:
    """What is left of a call of multi_source_attention once its arguments fit: a function that computes the result.

    Raises:
        As `multi_source_attention`, before anything is computed.
    """
    scale = _check_options(query, sources, scale, return_lse)
    transforms, autocast = modes.transforms_active(), torch.is_autocast_enabled(query.device.type)
    if transforms or autocast:
        check_types(query, sources)
    if transforms:
        fields = {f"{name}[{i}]": x for i, s in enumerate(sources) for name, x in zip(Source._fields, s)}
        modes.refuse_vmap(OP, {"query": query, **fields, "query_groups": query_groups})
        plan = None  # the reference needs none, and inside a transform its masks may be wrapped: other tensors
    if autocast:
        check_copies(query, sources)
        query, sources = _autocast(query, sources)
    repeat = None
    if query.is_cuda and backend in ("auto", "triton") and not torch.compiler.is_compiling():
        decides = signature(query, sources, query_groups, scale, return_lse, plan)
        if decides is not None:
            repeat = ops.recorded_call(OP, "triton", *decides, return_lse)
        if repeat is not None and repeat.recorded is not None:
            return partial(repeat.replay, query)
    facts = check(query, sources, query_groups, plan)
    if facts.lazy:
        query, sources = resolve(query, sources)
    if return_lse and facts.groups > 1:
        fail(OP, "return_lse", "one softmax group", "several", "each group has its own lse")
    cells = query.shape[:3].numel()
    result_bytes = cells * (sources[0].value.shape[3] * query.element_size() + return_lse * 4)
    check_memory(OP, "query", result_bytes, query.device)
    gradients = torch.is_grad_enabled() and facts.requires_grad
    lacking = _lacking(sources) if gradients else {}
    if modes.forward_mode_active() and modes.forward_mode(query, *(x for s in sources for x in s)):
        lacking = {name: [*lacking.get(name, ()), "forward-mode gradients"] for name in ("cpu", "cuda", "triton")}
    if query.is_cuda and backend in ("auto", "cuda"):
        of_cuda = hopper.lacks(query, sources, gradients, hopper.is_hopper(query.get_device()))
        lacking = {**lacking, "cuda": [*lacking.get("cuda", ()), *of_cuda], "triton": lacking.get("triton", [])}
    name = backends.choose(OP, backend, query.device, query.dtype, lacking)
    if name == "reference":
        check_reference_memory(query, sources)
        return partial(
            reference.multi_source_attention,
            query, sources, query_groups=query_groups, scale=scale, return_lse=return_lse,
        )  # fmt: skip
    if plan is None:
        plan = _plan(sources, query_groups)
    if gradients:
        check_gradient_memory(query, sources)
        options = Options(name, backend == "auto", scale, return_lse)
        return partial(attention_with_gradients, options, query, sources, query_groups, plan)
    tables = lay_out(query, sources, plan, scale)
    if repeat is not None and name == "triton":
        return partial(repeat.run, query, tables)
    return partial(_run, name, query, tables, return_lse)


def _plan(sources: Sequence[Source], query_groups: Tensor | None) -> AttentionPlan:
    masks, groups = [s.key_mask for s in sources], [s.key_groups for s in sources]
    blocks = [s.block_mask for s in sources]
    if query_groups is None and all(x is None for x in (*masks, *groups, *blocks)):
        return _EVERY_KEY[len(sources)]
    sizes = [s.block_size for s in sources if s.block_mask is not None]
    if not sizes:
        return build_plan(masks, groups, query_groups)
    return build_plan(masks, groups, query_groups, None, blocks, sizes[0])


def _every_key(count: int) -> AttentionPlan:
    none = (None,) * count
    return AttentionPlan(none, none, None, none, none, None, None)


_EVERY_KEY = [_every_key(count) for count in range(MAX_SOURCES + 1)]
"""The plans of calls without masks, by the number of sources."""


def _run(backend: str, query: Tensor, tables: AttentionTables, return_lse: bool) -> Result:
    out = query.new_empty(*query.shape[:3], tables.value[0].shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
    ops.kernel(OP, backend)(query, *tables, out, lse)
    return out if lse is None else (out, lse)


def _check_options(query: Tensor, sources: Sequence[Source], scale: float | None, return_lse: bool) -> float | None:
    """Check the types of the arguments before anything else looks at them; returns the scale."""
    if not isinstance(query, Tensor):
        fail(OP, "query", "a tensor", type(query).__name__, error=TypeError)
    if query.is_meta:
        fail(OP, "query", "a tensor with data", "one on the device meta", "FakeTensorMode shows shapes without data")
    if scale is not None and not torch.compiler.is_compiling():
        if not isinstance(scale, Real):
            fail(OP, "scale", "a number", type(scale).__name__, error=TypeError)
        if not abs(scale) <= FLOAT32_MAX:
            fail(OP, "scale", "a number that float32 holds", scale)
        scale = float(scale)
    if not isinstance(sources, (list, tuple)):
        check_sequence(OP, "sources", sources)
    if not isinstance(return_lse, bool):
        fail(OP, "return_lse", "True or False", repr(return_lse), error=TypeError)
    return scale


def _autocast(query: Tensor, sources: Sequence[Source]) -> tuple[Tensor, list[Source]]:
    cast = modes.autocast
    return cast(query), [s._replace(key=cast(s.key), value=cast(s.value)) for s in sources]


def _lacking(sources: Sequence[Source]) -> dict[str, list[str]]:
    """What each kernel backend lacks of this call with gradients; the reference implements all."""
    cpu, triton = [], []
    for i, source in enumerate(sources):
        if source.key.dtype in EIGHT_BIT_LARGEST:
            cpu.append(f"gradients beside an 8-bit key[{i}]")
        for name in ("logit_scale", "logit_bias", "weight"):
            x = getattr(source, name)
            if isinstance(x, Tensor) and x.requires_grad:
                cpu.append(f"gradients of {name}[{i}]")
        if source.value_index is not None:
            triton.append(f"gradients through value_index[{i}]")
    return {"cpu": cpu, "triton": [*cpu, *triton]}
