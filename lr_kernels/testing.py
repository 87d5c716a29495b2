"""What tests and benchmarks share: the attention cases, their inputs, and the tolerance rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .source import Source


@dataclass(frozen=True)
class AttentionCase:
    """One configuration of multi_source_attention; `keys` and `rows` have an entry per source."""

    id: str
    batch: int = 2
    queries: int = 70
    heads: int = 2
    head_dim: int = 40
    keys: tuple[int, ...] = (70, 45)
    rows: tuple[tuple[int, ...] | int | None, ...] = (None, 1)
    """Per source: None: one source row per batch row; an int R: R source rows, where 1 is shared by all batch rows; a
    tuple: the row table, in which -1 means no row."""
    visible: float | None = None
    """Share of the keys that key_mask lets through; None: no masks."""
    groups: int = 0
    """Number of group bits that route queries to keys; 0: no groups."""
    key_bias: bool = False
    logit_scale: tuple[float, ...] | None = None
    logit_bias: tuple[float, ...] | None = None
    value_index: bool = False
    softmax_groups: tuple[int, ...] | None = None
    """Per source; every group's first source gets a weight per query, except group 0."""
    key_heads: tuple[int, ...] | None = None
    """Heads of the keys of each source; None: those of the query."""
    value_dim: int | None = None
    """head_dim of the values; None: that of the keys."""
    order: tuple[str | None, ...] | None = None
    """Per source, which keys a query sees by key_range: an entry of ORDERS, or None for all."""
    blocks: tuple[int, int] | None = None
    """Queries and keys in a block of the block masks, of which half is visible; sources of an even number have one."""


ORDERS = {
    "causal": lambda i, keys: (0 * i, i + 1),
    "prefix": lambda i, keys: (0 * i, torch.maximum(i + 1, torch.tensor(20))),
    "window": lambda i, keys: (i - 12, i + 9),
    "packed": lambda i, keys: (i // 25 * 25, i // 25 * 25 + 25),
    "shrinking": lambda i, keys: (i, keys - i),
    "nothing": lambda i, keys: (keys + i, 0 * i),
}
"""(first key, end) of query i, of M keys: also beyond them, and empty."""


CASES = (
    AttentionCase("self", keys=(70,), rows=(None,)),
    AttentionCase("one-query-one-key", batch=1, queries=1, heads=1, head_dim=8, keys=(1,), rows=(None,)),
    AttentionCase("shared-reference"),
    AttentionCase("three-sources-d64", head_dim=64, keys=(33, 64, 100), rows=(None, 1, None)),
    AttentionCase("d80", head_dim=80),
    AttentionCase("d160", head_dim=160, heads=1),
    AttentionCase("d128-long", head_dim=128, heads=1, batch=1, queries=150, keys=(300, 33), rows=(None, 1)),
    AttentionCase("d1", head_dim=1),
    AttentionCase("d37", head_dim=37),
    AttentionCase("d256", head_dim=256, heads=1),
    AttentionCase("rows-minus-one", batch=4, rows=(None, (0, -1, 1, -1))),
    AttentionCase("cfg-halves", batch=6, keys=(40, 40, 40), rows=(None, (1, 1, 1, 4, 4, 4), (-1, -1, 0, -1, -1, 0))),
    AttentionCase("no-row-at-all", batch=2, keys=(30,), rows=((-1, 0),)),
    AttentionCase("masked-67", visible=0.67, keys=(70, 70, 70), rows=(None, None, 1)),
    AttentionCase("masked-10", visible=0.1, keys=(128, 90), rows=(None, 1), head_dim=64),
    AttentionCase("masked-empty", visible=0.0),
    AttentionCase("groups-2", groups=2, keys=(70, 64), rows=(None, 1)),
    AttentionCase("groups-3-masked", groups=3, visible=0.5, keys=(70, 64, 31), rows=(None, 1, None), head_dim=64),
    AttentionCase("key-bias", key_bias=True),
    AttentionCase("key-bias-masked", key_bias=True, visible=0.4, head_dim=80),
    AttentionCase("logit-scale-and-bias", logit_scale=(1.0, 0.6), logit_bias=(0.0, 0.9)),
    AttentionCase("negative-logit-scale", logit_scale=(1.0, -0.5), logit_bias=(-3.0, 2.0), head_dim=64),
    AttentionCase("warped-values", value_index=True, rows=(None, (1, -1)), visible=0.6),
    AttentionCase("decoupled", keys=(77, 16), rows=(None, 1), softmax_groups=(0, 1), head_dim=64),
    AttentionCase("interleaved-groups", keys=(33, 70, 20), rows=(None, 1, None), softmax_groups=(4, 1, 4)),
    AttentionCase(
        "everything-grouped",
        batch=3,
        keys=(70, 90, 33, 40),
        rows=(None, (1, -1, 0), 1, (0, -1, -1)),
        visible=0.5,
        groups=2,
        key_bias=True,
        logit_scale=(1.0, 1.2, 0.8, 1.0),
        logit_bias=(0.0, 0.3, -0.2, 0.0),
        value_index=True,
        softmax_groups=(0, 1, 0, 2),
    ),
    AttentionCase(
        "everything",
        batch=3,
        keys=(70, 90, 33),
        rows=(None, (1, -1, 0), 1),
        visible=0.5,
        groups=2,
        key_bias=True,
        logit_scale=(1.0, 1.2, 0.8),
        logit_bias=(0.0, 0.3, -0.2),
    ),
    AttentionCase(
        "grouped-heads", heads=4, head_dim=64, keys=(70, 45, 40), rows=(None, 1, (1, -1)), key_heads=(2, 4, 1)
    ),
    AttentionCase("grouped-heads-masked", batch=1, heads=6, visible=0.5, groups=2, key_bias=True, key_heads=(3, 2)),
)

ORDERED_CASES = (
    AttentionCase("causal", keys=(70,), rows=(None,), order=("causal",), head_dim=64),
    AttentionCase("causal-long", batch=1, queries=200, keys=(220,), rows=(None,), order=("causal",), head_dim=32),
    AttentionCase("prefix-causal", keys=(70, 45), order=("prefix", None)),
    AttentionCase("window-masked", visible=0.6, keys=(90, 45), order=("window", "causal"), key_bias=True),
    AttentionCase("packed-groups", groups=2, keys=(70, 64), order=("packed", "shrinking"), head_dim=80),
    AttentionCase("sees-nothing", keys=(70, 45), order=("nothing", "window"), softmax_groups=(0, 1)),
    AttentionCase("blocks", keys=(70, 45), blocks=(32, 16), head_dim=64),
    AttentionCase("blocks-of-heads-masked", visible=0.7, keys=(90, 45, 33), rows=(None, 1, 1), blocks=(16, 32)),
    AttentionCase("blocks-causal", queries=120, keys=(120,), rows=(None,), blocks=(50, 8), order=("causal",)),
    AttentionCase("values-wider", value_dim=72, head_dim=40, order=("causal", None)),
    AttentionCase("values-narrower", value_dim=16, head_dim=80, visible=0.5, key_heads=(1, 2)),
    AttentionCase(
        "everything-ordered",
        batch=3,
        queries=50,
        keys=(70, 45, 33),
        rows=(None, (1, -1, 0), 1),
        visible=0.7,
        key_bias=True,
        logit_scale=(1.0, 1.2, -0.8),
        logit_bias=(0.0, 0.3, -0.2),
        key_heads=(1, 2, 1),
        value_dim=24,
        order=("causal", "window", "packed"),
        blocks=(32, 8),
    ),
)
"""Cases that the kernel for Hopper leaves to the others."""


@dataclass
class AttentionInputs:
    """The tensors of a case."""

    query: Tensor
    sources: list[Source]
    query_groups: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "AttentionInputs":
        """The same inputs with query, keys and values in another dtype, but for those in 8 bits."""
        sources = [
            s._replace(key=s.key.to(dtype), value=s.value.to(dtype)) if s.key_scale is None else s for s in self.sources
        ]
        return AttentionInputs(self.query.to(dtype), sources, self.query_groups)


def strided_randn(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
    """Random (rows, tokens, heads, head_dim) as a view into a wider fused buffer: only the last dimension is dense."""
    rows, tokens, heads, head_dim = shape
    fused = gain * torch.randn(rows, tokens, 3, heads, head_dim, generator=generator)
    return fused.to(dtype)[:, :, 1]


def attention_inputs(case: AttentionCase, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> AttentionInputs:
    """Random non-contiguous inputs of a case, reproducible by seed."""
    g = torch.Generator().manual_seed(seed)
    query = strided_randn((case.batch, case.queries, case.heads, case.head_dim), g, dtype, gain=2.0)
    sources = []
    for i, (keys, rows) in enumerate(zip(case.keys, case.rows)):
        count = case.batch if rows is None else rows if isinstance(rows, int) else max(max(rows) + 1, 1)
        shape = (count, keys, case.heads if case.key_heads is None else case.key_heads[i])
        table = torch.tensor(rows, dtype=torch.int32) if isinstance(rows, tuple) else None
        key = strided_randn((*shape, case.head_dim), g, dtype)
        source = Source(key, strided_randn((*shape, case.value_dim or case.head_dim), g, dtype), table)
        mask_rows = 1 if i % 2 else count
        if case.visible is not None:
            source = source._replace(key_mask=torch.rand(mask_rows, keys, generator=g) < case.visible)
        if case.groups:
            source = source._replace(key_groups=_random_bits((mask_rows, keys), case.groups, g))
        if case.key_bias:
            source = source._replace(key_bias=torch.randn(mask_rows, keys, generator=g))
        if case.logit_scale is not None:
            source = source._replace(logit_scale=case.logit_scale[i])
        if case.logit_bias is not None:
            source = source._replace(logit_bias=torch.full((case.batch, case.heads), case.logit_bias[i]))
        if case.value_index:
            source = source._replace(value_index=torch.randint(keys, (mask_rows, keys), generator=g))
        if case.softmax_groups is not None:
            group = case.softmax_groups[i]
            first = group > 0 and group not in case.softmax_groups[:i]
            weight = torch.rand(case.batch, case.queries, generator=g) if first else None
            source = source._replace(softmax_group=group, weight=weight)
        order = None if case.order is None else case.order[i]
        if order is not None:
            ends = torch.stack(ORDERS[order](torch.arange(case.queries), keys), -1)
            source = source._replace(key_range=ends.expand(case.batch if i % 2 else 1, -1, -1))
        if case.blocks is not None and i % 2 == 0:
            blocks = (-(-case.queries // case.blocks[0]), -(-keys // case.blocks[1]))
            seen = torch.rand(mask_rows, case.heads if i else 1, *blocks, generator=g) < 0.5
            source = source._replace(block_mask=seen, block_size=case.blocks)
        sources.append(Source._make(x.to(device) if isinstance(x, Tensor) else x for x in source))
    groups = _random_bits((case.batch, case.queries), case.groups, g).to(device) if case.groups else None
    return AttentionInputs(query.to(device), sources, groups)


EXTREMES = (
    *(("key_bias", x) for x in (torch.finfo(torch.float32).min, -1e38, -1e30, -1e4, 1e30)),
    *(("logit_bias", x) for x in (-1e38, -1e30, 1e30)),
    *(("products", x) for x in (1e8, 1e15)),
)
"""The ways in which `extreme_inputs` makes all logits of a problem huge."""


def extreme_inputs(extreme: tuple[str, float], dtype: torch.dtype, device: str = "cpu", **case: Any) -> AttentionInputs:
    """Inputs whose biases all have the value, or whose queries and keys are each multiplied by it (fp16: up to 1e3)."""
    kind, value = extreme
    inputs = attention_inputs(AttentionCase("extreme", **case), dtype, device=device)
    if kind == "products":
        inputs.query *= min(value, 1e3) if dtype == torch.float16 else value
    for i, s in enumerate(inputs.sources):
        match kind:
            case "key_bias":
                bias = torch.full((1 if i % 2 else s.key.shape[0], s.key.shape[1]), value, device=device)
                inputs.sources[i] = s._replace(key_bias=bias)
            case "logit_bias":
                inputs.sources[i] = s._replace(logit_bias=value)
            case "products":
                s.key.mul_(min(value, 1e3) if dtype == torch.float16 else value)
    return inputs


def _random_bits(shape: tuple[int, int], bits: int, generator: torch.Generator) -> Tensor:
    """uint8 with one bit set each, and now and then two."""
    one, other = (1 << torch.randint(bits, shape, generator=generator) for _ in range(2))
    both = torch.rand(shape, generator=generator) < 0.1
    return torch.where(both, one | other, one).to(torch.uint8)


def assert_matches(
    out: Tensor, lowp: Tensor, ref64: Tensor, what: str = "out", dtype: torch.dtype | None = None
) -> None:
    """The tolerance rule: `out` is finite exactly where `ref64`, the specification in float64, is, and its error is at
    most 2 times (maximum) and 1.5 times (mean) that of the specification in the working dtype, plus rounding.

        max |out - ref64|  <= 2   · (max |lowp - ref64|  + eps · max |ref64|)
        mean |out - ref64| <= 1.5 · (mean |lowp - ref64| + eps · mean |ref64|)

    `lowp` is the reference computed in the working dtype, eps that dtype's machine epsilon; `dtype`: the working dtype,
    where `lowp` has another one.
    """
    assert out.shape == ref64.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    finite = ref64.isfinite()
    same = out.isfinite() == finite
    assert same.all(), f"{what}: {(~same).sum()} elements are finite on one side only"
    if not finite.any():
        return
    eps = torch.finfo(dtype or lowp.dtype).eps
    truth = ref64[finite]
    error = (out[finite].double() - truth).abs()
    allowed = (lowp[finite].double() - truth).abs()
    for name, measure, factor in (("max", Tensor.max, 2.0), ("mean", Tensor.mean, 1.5)):
        got, limit = measure(error).item(), factor * (measure(allowed) + eps * measure(truth.abs())).item()
        assert got <= limit, f"{what}: {name} error {got:.3e} > {limit:.3e}"


def check_attention(run: Callable[..., tuple[Tensor, Tensor]], inputs: AttentionInputs, **kwargs: Any) -> None:
    """Compare run(query, sources, query_groups=…, return_lse=…) with the reference: out, and lse of a single softmax
    group."""
    one_group = len({s.softmax_group for s in inputs.sources}) == 1
    kwargs = {**kwargs, "query_groups": inputs.query_groups, "return_lse": one_group}
    exact = inputs.to(torch.float64)
    results = (
        reference.multi_source_attention(exact.query, exact.sources, **kwargs),
        reference.multi_source_attention(inputs.query, inputs.sources, **kwargs),
        run(inputs.query, inputs.sources, **kwargs),
    )
    pairs = results if one_group else [(x, None) for x in results]
    (out64, out_low, out), (lse64, lse_low, lse) = zip(*pairs)
    assert out.dtype == inputs.query.dtype
    assert_matches(out, out_low, out64, "out")
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_lse_matches(lse, lse_low, lse64, inputs.query.dtype)


def assert_lse_matches(lse: Tensor, lowp: Tensor, ref64: Tensor, dtype: torch.dtype) -> None:
    """-inf and finite where the oracle is, and there error <= 2 · (that of `lowp` + eps of `dtype` · max(1, |lse|))."""
    finite = ref64.isfinite()
    assert torch.equal(lse == -torch.inf, ref64 == -torch.inf), "lse: -inf at other places"
    assert torch.equal(lse.isfinite(), finite), "lse: finite at other places"
    if finite.any():
        error = (lse[finite].double() - ref64[finite]).abs().max().item()
        scale_of_lse = max(1.0, ref64[finite].abs().max().item())
        allowed = (lowp[finite].double() - ref64[finite]).abs().max().item()
        assert error <= 2 * (allowed + torch.finfo(dtype).eps * scale_of_lse), f"lse: error {error:.3e}"


def check_attention_backward(run: Callable[..., Tensor], *problems: AttentionInputs, **kwargs: Any) -> None:
    """Compare the gradients of run(query, sources, query_groups=…, return_lse=…) with the reference's formula, those of
    all problems (of one case) and all sources of one kind together: the largest error of few elements is mostly luck.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed, inputs in enumerate(problems):
        for kind, ours, lowp, ref64 in _gradients(run, inputs, seed, kwargs):
            found.setdefault(kind, []).append((ours.flatten(), lowp.flatten(), ref64.flatten()))
    for kind, parts in found.items():
        ours, lowp, ref64 = (torch.cat(column) for column in zip(*parts))
        assert_matches(ours, lowp, ref64, f"grad_{kind}", problems[0].query.dtype)


def _gradients(
    run: Callable[..., Tensor], inputs: AttentionInputs, seed: int, kwargs: dict
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(kind of tensor, its gradient by run, by the formula in the working dtype, by the formula in float64) of each.

    In the working dtype the formula starts from the same rounded out as the kernel: where few keys carry all the
    weight, dP and <grad_out, out> cancel, and the rounding of out is what remains.
    """
    one_group = len({s.softmax_group for s in inputs.sources}) == 1
    g = torch.Generator().manual_seed(seed)
    shape = (*inputs.query.shape[:3], inputs.sources[0].value.shape[3])
    grad_out = torch.randn(shape, generator=g).to(inputs.query)
    grad_lse = torch.randn(inputs.query.shape[:3], generator=g).to(grad_out.device) if one_group else None
    kwargs = {**kwargs, "query_groups": inputs.query_groups}

    def expected(x: AttentionInputs, out: Tensor | None = None) -> list[Tensor]:
        lse = None if grad_lse is None else grad_lse.to(torch.promote_types(x.query.dtype, torch.float32))
        grad_query, grads = reference.multi_source_attention_backward(
            grad_out.to(x.query.dtype), x.query, x.sources, grad_lse=lse, out=out, **kwargs
        )
        return [grad_query, *(y for per_source in grads for y in per_source if y is not None)]

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()

    query = leaf(inputs.query)
    sources = [
        s._replace(key=leaf(s.key), value=leaf(s.value), key_bias=None if s.key_bias is None else leaf(s.key_bias))
        for s in inputs.sources
    ]
    leaves = [query, *(x for s in sources for x in (s.key, s.value, s.key_bias) if x is not None)]
    result = run(query, sources, return_lse=one_group, **kwargs)
    if grad_lse is not None:
        seen = result[1] > -torch.inf
        grads = torch.autograd.grad((result[0], result[1][seen]), leaves, (grad_out, grad_lse[seen]))
    else:
        grads = torch.autograd.grad(result, leaves, grad_out)
    for leaf_, grad in zip(leaves, grads):
        assert grad.shape == leaf_.shape and grad.dtype == leaf_.dtype
    kinds = ["query", *(k for s in sources for k in ("key", "value", "key_bias") if getattr(s, k) is not None)]
    low = expected(inputs, result[0].detach() if one_group else None)
    return list(zip(kinds, grads, low, expected(inputs.to(torch.float64)), strict=True))
