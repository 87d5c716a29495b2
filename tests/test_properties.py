"""multi_source_attention on the CPU backend, every argument drawn at random, against an oracle of its own: forward and
backward, with numbers at the ends of fp32, lazy tensors and plans that have become stale.

By default 30 draws of the forward and 9 of the backward pass, a handful of calls each; `make properties` makes 2,000
and 900 (the profile "thorough" of conftest.py) and prints the number of calls.
"""

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from attention_oracle import attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lr_kernels import AttentionPlan, Source, multi_source_attention, plan_attention, reference
from lr_kernels.testing import AttentionInputs, assert_lse_matches, assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("fused", "heads first", "every other token", "heads shared", "rows shared", "element offset 1")
HEAD_DIMS = st.integers(1, 24) | st.sampled_from([32, 40, 64, 80, 128, 160, 256]) | st.integers(1, 256)
COUNTS = st.integers(1, 4) | st.integers(1, 4) | st.integers(1, 16)
FACTORS = st.sampled_from([0.0, 1.0, -0.5]) | st.floats(0.01, 2)
LARGEST = torch.finfo(torch.float32).max
EXTREME = st.sampled_from([-LARGEST, -3e38, -1e30, -1e5, 1e5, 1e30, 3e38, LARGEST])
FAR = st.sampled_from([-LARGEST, -3e38, -1e30, 1e30])
"""Biases of gradients. Logits near 1e5 are rounded to 1/128, by the kernels in log2 units, by the reference in natural
ones: two roundings of P, of which neither is the other's measure."""
NOT_FINITE = st.sampled_from([-math.inf, -math.inf, math.inf, math.nan])
GAINS = {torch.float32: (1e19, 1e37), torch.bfloat16: (1e19, 1e37), torch.float16: (1e3, 1e4)}
"""Of queries and keys, whose products are then near the end of fp32; of values, whose sums would be beyond it."""
calls: Counter = Counter()
ROWS = 512
"""Rows of logits (query times head) that a comparison should have."""


class Draw:
    """Choices come from Hypothesis and can be replayed, numbers from a generator."""

    def __init__(self, data: st.DataObject, finite: bool = False) -> None:
        self.data = data
        self.finite = finite
        """For gradients: no NaN, no Inf but a bias of -inf, no factors whose products leave fp32, scores of ordinary
        size, so no head_dim below 4, whose scores are products of few normal numbers. P is computed again beside an lse
        that was rounded apart, so its error grows with the scores; that of the reference, whose P is one softmax, does
        not: at head_dim 1 it is 1.1 to 2.1 times as large."""
        self.chosen: list = []
        self.replay: Iterator = iter(())
        self.generator = torch.Generator().manual_seed(self(st.integers(0, 2**16), "seed"))

    def again(self) -> AttentionInputs:
        """`inputs` with the choices of before and other numbers."""
        self.replay = iter(self.chosen[1:])
        return self.inputs()

    def __call__(self, strategy: st.SearchStrategy, label: str):
        for value in self.replay:
            return value
        self.chosen.append(self.data.draw(strategy, label))
        return self.chosen[-1]

    def often(self, label: str) -> bool:
        return self(st.booleans(), label)

    def rarely(self, label: str) -> bool:
        return self(st.integers(0, 7), label) == 7

    def seldom(self, label: str) -> bool:
        return self(st.integers(0, 39), label) == 39

    def lazy(self, x: Tensor, label: str) -> Tensor:
        """x, now and then as a negative that is not computed yet."""
        return torch._neg_view(-x) if self.seldom(f"{label}: lazy") else x

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator)

    def tokens(self, shape: tuple[int, int, int, int], dtype: torch.dtype, label: str) -> Tensor:
        """(rows, tokens, heads, head_dim) in one of the layouts that callers have."""
        rows, tokens, heads, head_dim = shape
        large = self.rarely(f"{label}: large") and not (self.finite and not label.startswith("value"))
        gain = 20.0 if large else 1.5
        if not self.finite and self.seldom(f"{label}: extreme"):
            gain = GAINS[dtype][label.startswith("value")]
        layout = self(st.sampled_from(LAYOUTS), f"{label}: layout")
        wide = {
            "fused": (rows, tokens, 3, heads, head_dim),
            "heads first": (rows, heads, tokens, head_dim),
            "every other token": (rows, 2 * tokens, heads, head_dim + 2),
            "heads shared": (rows, tokens, 1, head_dim),
            "rows shared": (1, tokens, heads, head_dim),
            "element offset 1": (math.prod(shape) + 1,),
        }[layout]
        x = (gain * self.randn(*wide)).to(dtype)
        if x.numel() and not self.finite and self.rarely(f"{label}: not finite"):
            place = self.below(x.numel(), 1)
            x.view(-1)[place] = self(st.sampled_from([math.nan, math.inf, -math.inf]), f"{label}: poison")
        view = {
            "fused": lambda: x[:, :, 1],
            "heads first": lambda: x.transpose(1, 2),
            "every other token": lambda: x[:, 1::2, :, 1:-1],
            "heads shared": lambda: x.expand(shape),
            "rows shared": lambda: x.expand(shape),
            "element offset 1": lambda: x[1:].view(shape),
        }[layout]()
        return self.lazy(view, label)

    def bits(self, rows: int, columns: int) -> Tensor:
        """uint8 (rows, columns): groups of three bits, 0 among them."""
        return self.below(8, rows, columns).byte()

    def strength(self, label: str, shapes: list) -> Tensor | float | None:
        """None, a number or a tensor of one of the shapes."""
        shape = self(st.sampled_from([None, "number", *shapes]), label)
        if shape is None:
            return None
        special = None
        if self.seldom(f"{label}: extreme") and not (self.finite and not label.startswith("logit_bias")):
            special = self(FAR if self.finite else EXTREME, f"{label}: extreme")
        elif not self.finite and self.seldom(f"{label}: not finite"):
            special = self(NOT_FINITE, f"{label}: not finite")
        if shape == "number":
            return self(FACTORS, label) if special is None else special
        x = self.randn(*shape)
        if self.finite and label.startswith("logit_scale"):
            x = x.tanh()  # scores of ordinary size
        if special is not None:
            x = torch.where(torch.rand(shape, generator=self.generator) < 0.5, special, x)
        return self.lazy(x, label)

    def key_bias(self, rows: int, keys: int) -> Tensor:
        bias = 3 * self.randn(rows, keys)
        if self.rarely("key_bias: extreme"):
            share = self(st.sampled_from([0.1, 0.5, 1.0]), "key_bias: share")
            some = FAR | st.just(-math.inf) if self.finite else EXTREME | NOT_FINITE
            bias[torch.rand(bias.shape, generator=self.generator) < share] = self(some, "key_bias: extreme")
        return self.lazy(bias, "key_bias")

    def source(self, query: Tensor, i: int, grouped: bool, value_dim: int, blocks: tuple[int, int] | None) -> Source:
        batch, queries, heads, head_dim = query.shape
        shared = self(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]), f"heads of key[{i}]")
        keys = self(st.integers(0, 80), f"keys[{i}]")
        table = None
        if self.often(f"rows[{i}]"):
            rows = self(st.integers(0, 4), f"rows of key[{i}]")
            table = (self.below(rows + 1, batch) - 1).to(self(st.sampled_from([torch.int32, torch.int64]), "rows"))
        else:
            rows = self(st.sampled_from([1, batch]), f"rows of key[{i}]")
        table_rows = rows if self.often(f"tables[{i}]: a row each") else 1
        values, index = keys, None
        if self.rarely(f"value_index[{i}]"):
            values = self(st.integers(1, 80), f"values[{i}]")
            index = self.below(values, self(st.sampled_from([rows, batch]), f"value_index[{i}]"), keys)
        source = Source(
            self.tokens((rows, keys, shared, head_dim), query.dtype, f"key[{i}]"),
            self.tokens((rows, values, shared, value_dim), query.dtype, f"value[{i}]"),
            table,
            value_index=index,
        )
        if self.often(f"key_mask[{i}]"):
            share = self(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), f"visible[{i}]")
            source = source._replace(key_mask=torch.rand(table_rows, keys, generator=self.generator) < share)
        if grouped and self.often(f"key_groups[{i}]"):
            source = source._replace(key_groups=self.bits(table_rows, keys))
        if self.rarely(f"key_bias[{i}]"):
            source = source._replace(key_bias=self.key_bias(table_rows, keys))
        if self.rarely(f"key_range[{i}]"):
            ends = self.below(keys + 9, self(st.sampled_from([1, batch]), f"key_range[{i}]"), queries, 2) - 4
            source = source._replace(key_range=ends.int() if self.often(f"key_range[{i}]: int32") else ends)
        if blocks is not None and self.often(f"block_mask[{i}]"):
            counts = (-(-queries // blocks[0]), -(-keys // blocks[1]))
            sizes = (table_rows, self(st.sampled_from([1, heads]), f"heads of block_mask[{i}]"), *counts)
            mask = torch.rand(sizes, generator=self.generator) < 0.5
            source = source._replace(block_mask=mask, block_size=blocks)
        if not self.finite and self.rarely(f"8 bits[{i}]"):
            source = self.in_8_bits(source, i)
        return source._replace(
            logit_scale=self.strength(f"logit_scale[{i}]", [(), (batch,), (batch, heads)]),
            logit_bias=self.strength(f"logit_bias[{i}]", [(), (batch,), (batch, heads)]),
        )

    def in_8_bits(self, source: Source, i: int) -> Source:
        """The source with any bits, NaN of e4m3 rarely, and with scales that now and then bring them to fp32's end."""
        kind, fields = self(st.sampled_from([torch.int8, torch.float8_e4m3fn]), f"8 bits[{i}]: dtype"), {}
        for name, x in (("key", source.key), ("value", source.value)):
            gain = {torch.int8: 40.0, torch.float8_e4m3fn: 1.5}[kind]
            numbers = (gain * self.randn(*x.shape)).clamp(-127, 127).to(kind)
            if x.numel() and kind != torch.int8 and self.rarely(f"{name}[{i}]: not a number"):
                numbers.view(-1)[self.below(x.numel(), 1)] = math.nan
            scale = self.randn(*(self(st.sampled_from([1, n]), f"{name}_scale[{i}]") for n in x.shape[:3])) * 1.5 / gain
            if self.seldom(f"{name}_scale[{i}]: extreme"):
                scale = scale * {"key": 1e17, "value": 1e34}[name] if x.dtype != torch.float16 else scale * 100
            if self.often(f"{name}[{i}]: heads first"):
                numbers = numbers.transpose(1, 2).contiguous().transpose(1, 2)
            fields |= {name: numbers, f"{name}_scale": scale}
        return source._replace(**fields)

    def inputs(self) -> AttentionInputs:
        batch, queries = self(st.integers(0, 3), "batch"), self(st.integers(0, 70), "queries")
        head_dims = HEAD_DIMS.filter(lambda d: d >= 4) if self.finite else HEAD_DIMS
        heads, head_dim = self(st.integers(1, 3), "heads"), self(head_dims, "head_dim")
        dtype = self(st.sampled_from(DTYPES), "dtype")
        query = self.tokens((batch, queries, heads, head_dim), dtype, "query")
        groups = None
        if self.often("query_groups"):
            groups = self.bits(batch if self.often("query_groups: a row each") else 1, queries)
        value_dim = self(HEAD_DIMS, "head_dim of values") if self.rarely("values of their own head_dim") else head_dim
        blocks = None
        if groups is None and self.rarely("block masks"):
            blocks = (self(st.integers(1, 40), "block of queries"), 2 ** self(st.integers(0, 5), "block of keys"))
        count = self(COUNTS, "sources")
        sources = [self.source(query, i, groups is not None, value_dim, blocks) for i in range(count)]
        if self.rarely("softmax_group"):
            numbers = [self(st.integers(0, 2), f"softmax_group[{i}]") for i in range(len(sources))]
            shapes = [(), (batch,), (batch, queries)]
            weights = [self.strength(f"weight[{i}]", shapes) for i in range(len(sources))]
            sources = [
                s._replace(softmax_group=g, weight=w if g not in numbers[:i] else None)  # a group has one weight
                for i, (s, g, w) in enumerate(zip(sources, numbers, weights))
            ]
        return AttentionInputs(query, sources, groups)

    def scale(self) -> float | None:
        if self.finite:
            return None
        if self.seldom("scale: extreme"):
            return self(st.sampled_from([1e-40, -1e30, 1e30, LARGEST]), "scale: extreme")
        return self(st.none() | FACTORS, "scale")


THOROUGH = settings.default.max_examples >= 2000
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\ncalls compared:", dict(calls))


@settings(**SETTINGS, max_examples=2000 if THOROUGH else 30)
@given(data=st.data())
@pytest.mark.fault(number=1)
def test_any_call_matches_the_oracle(data):
    draw = Draw(data)
    inputs = draw.inputs()
    planned, scale = data.draw(st.booleans(), "plan"), draw.scale()
    stale = planned and data.draw(st.integers(0, 15), "plan: stale") == 15
    found = [results(inputs, scale, planned, stale)]
    assert found[0][0][0].dtype == inputs.query.dtype
    # The tolerance rule compares the largest and the mean error. The channels of a row with large logits have related
    # errors, so with few rows the comparison is left to chance. So problems of the same shape are added until enough
    # rows are finite (NaN is drawn too) or a limit is reached. A difference fails only with 16 times as many rows.
    rows = inputs.query[..., 0].numel()
    for wanted in (ROWS, 16 * ROWS):
        for _ in range(2 * wanted // rows if rows else 0):
            if sum(int(x[2][0].isfinite().all(-1).sum()) for x in found) >= wanted:
                break
            found.append(results(draw.again(), scale, planned))
        try:
            compare(found)
            break
        except AssertionError:
            if wanted > ROWS:
                raise


def compare(found: list[list[tuple[Tensor, ...]]]) -> None:
    """`results` of several problems together."""
    out, low, truth = (torch.cat([x[0].flatten() for x in column]) for column in zip(*found))
    assert_matches(out, low, truth)
    if len(found[0][0]) > 1:
        lse, low, truth = (torch.cat([x[1].flatten() for x in column]) for column in zip(*found))
        assert_lse_matches(lse, low, truth, out.dtype)


def results(
    inputs: AttentionInputs, scale: float | None, planned: bool, stale: bool = False
) -> list[tuple[Tensor, ...]]:
    """(out, lse) of the kernel, of the reference in the working dtype, and of the oracle; without lse, which several
    softmaxes do not have in common, (out,)."""
    calls["forward"] += 1
    groups, sources = inputs.query_groups, inputs.sources
    one_group = len({s.softmax_group for s in sources}) == 1
    keywords = {"scale": scale, "return_lse": one_group}
    plan = plan_of(inputs) if planned else None
    if stale:
        plan = refuse_stale(inputs, plan)
    found = [multi_source_attention(inputs.query, sources, query_groups=groups, plan=plan, backend="cpu", **keywords)]
    wide, queries = repeated(inputs), inputs.query.shape[1]
    result = reference.multi_source_attention(wide.query, wide.sources, query_groups=wide.query_groups, **keywords)
    found.append(tuple(y[:, :queries] for y in (result if one_group else (result,))))
    out, lse, _ = attention(inputs.query, sources, groups, scale)
    limit = torch.finfo(torch.float32).max
    truth = torch.from_numpy(out)
    truth[truth.abs() > torch.finfo(inputs.query.dtype).max] = math.inf  # by a large weight
    lse = torch.from_numpy(lse)
    found.append((truth, torch.where(lse.isinf(), lse, lse.clamp(-limit, limit))) if one_group else (truth,))
    return [x if isinstance(x, tuple) else (x,) for x in found]


def plan_of(inputs: AttentionInputs) -> AttentionPlan:
    sources = inputs.sources
    blocks, size = [s.block_mask for s in sources], [s.block_size for s in sources if s.block_mask is not None]
    return plan_attention(
        [s.key_mask for s in sources],
        [s.key_groups for s in sources],
        inputs.query_groups,
        block_masks=blocks,
        block_size=size[0] if size else (128, 128),
    )


def refuse_stale(inputs: AttentionInputs, plan: AttentionPlan) -> AttentionPlan:
    """Change a mask in place: the plan is refused. Returns the plan of what the masks are now."""
    masks = [x for s in inputs.sources for x in (s.key_mask, s.key_groups) if x is not None]
    if not masks:
        return plan
    masks[-1].copy_(masks[-1].flip(1))
    with pytest.raises(ValueError, match=r"plan: expected a plan of key_(mask|groups)"):
        multi_source_attention(inputs.query, inputs.sources, query_groups=inputs.query_groups, plan=plan, backend="cpu")
    calls["stale plans"] += 1
    return plan_of(inputs)


def repeated(inputs: AttentionInputs) -> AttentionInputs:
    """The queries over and over, 16 at least: BLAS (MKL) sums the products of fewer rows in an order of its own, three
    times more exactly than those of more, and than the kernels."""
    times = max(1, math.ceil(16 / max(1, inputs.query.shape[1])))
    groups = inputs.query_groups
    sources = [
        s._replace(weight=s.weight.repeat(1, times)) if isinstance(s.weight, Tensor) and s.weight.dim() == 2 else s
        for s in inputs.sources
    ]
    groups = None if groups is None else groups.repeat(1, times)
    for i, s in enumerate(sources):
        if s.key_range is not None:
            sources[i] = s = s._replace(key_range=s.key_range.repeat(1, times, 1))
        if s.block_mask is not None:  # as blocks of one query each
            rows = s.block_mask.repeat_interleave(s.block_size[0], 2)[:, :, : inputs.query.shape[1]]
            sources[i] = s._replace(block_mask=rows.repeat(1, 1, times, 1), block_size=(1, s.block_size[1]))
    return AttentionInputs(inputs.query.repeat(1, times, 1, 1), sources, groups)


@settings(**SETTINGS, max_examples=900 if THOROUGH else 9)
@given(data=st.data())
@pytest.mark.fault(number=28)
def test_the_gradients_of_any_call_match_the_oracle(data):
    draw = Draw(data, finite=True)
    inputs = draw.inputs()
    planned, scale = data.draw(st.booleans(), "plan"), draw.scale()
    found = [gradients(inputs, draw, scale, planned)]
    rows = inputs.query[..., 0].numel()
    for wanted in (ROWS // 2, 8 * ROWS):
        for _ in range(wanted // rows if rows else 0):
            if len(found) * rows >= wanted:
                break
            found.append(gradients(draw.again(), draw, scale, planned))
        try:
            for kind in found[0]:
                ours, low, truth = (torch.cat(column) for column in zip(*(x[kind] for x in found)))
                assert_matches(ours, low, truth, f"grad_{kind}", inputs.query.dtype)
            break
        except AssertionError:
            if wanted > ROWS:
                raise


def gradients(
    inputs: AttentionInputs, draw: Draw, scale: float | None, planned: bool
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per kind of tensor: the kernel's gradients, those of the reference's formula in the working dtype (the oracle's,
    rounded, where that has none) and of the oracle, flattened and joined over the sources."""
    calls["backward"] += 1
    groups, one_group = inputs.query_groups, len({s.softmax_group for s in inputs.sources}) == 1

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().requires_grad_()

    query = leaf(inputs.query)
    sources = [s._replace(key=leaf(s.key), value=leaf(s.value), key_bias=leaf(s.key_bias)) for s in inputs.sources]
    leaves = [query, *(getattr(s, kind) for kind in ("key", "value", "key_bias") for s in sources)]
    plan = plan_of(inputs) if planned else None
    result = multi_source_attention(
        query, sources, query_groups=groups, scale=scale, plan=plan, return_lse=one_group, backend="cpu"
    )
    out, lse = result if one_group else (result, None)
    grad_out = draw.randn(*out.shape).to(query.dtype)
    grad_lse = draw.randn(*query.shape[:3]) if one_group else None
    seen = None if lse is None else lse.detach() > -math.inf
    grads = torch.autograd.grad(
        (out,) if lse is None else (out, lse[seen]),
        [x for x in leaves if x is not None],
        (grad_out,) if lse is None else (grad_out, grad_lse[seen]),
    )
    ours = iter(grads)
    low_query, low = reference.multi_source_attention_backward(
        grad_out, inputs.query, inputs.sources, query_groups=groups, scale=scale, grad_lse=grad_lse,
        out=out.detach() if one_group else None,
    )  # fmt: skip
    truth = attention(inputs.query, inputs.sources, groups, scale, grad_out, grad_lse)[2]
    found = {"query": [(next(ours), low_query, truth.query)]}
    for kind in ("key", "value", "key_bias"):
        found[kind] = [
            (next(ours), getattr(x, kind), y) for x, y in zip(low, getattr(truth, kind)) if getattr(x, kind) is not None
        ]
    return {
        kind: tuple(torch.cat(x) for x in zip(*(flat(*parts, query.dtype) for parts in several)))
        for kind, several in found.items()
        if several
    }


def flat(ours: Tensor, low: Tensor, truth, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    truth, ours, low = torch.from_numpy(truth).flatten(), ours.flatten().float(), low.flatten()
    end = torch.finfo(dtype).max / 2  # beyond it rounding may decide between the largest number and infinity
    beyond = (truth.abs() > end) & ~(ours.abs() < end / 2)
    truth, ours, low = (x.masked_fill(beyond, 0.0) for x in (truth, ours, low))
    return ours, torch.where(low.isfinite(), low, truth.to(low.dtype)).float(), truth
