"""multi_source_attention on the CPU backend, every argument drawn at random, against the float64 reference.

100 draws by default; `make properties` makes 2,000 (the profile "thorough" of conftest.py).
"""

import math
from collections.abc import Iterator

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lr_kernels import Source, multi_source_attention, plan_attention, reference
from lr_kernels.testing import AttentionInputs, assert_lse_matches, assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("fused", "heads first", "every other token", "heads shared", "rows shared", "element offset 1")
HEAD_DIMS = st.integers(1, 24) | st.sampled_from([32, 40, 64, 80, 128, 160, 256]) | st.integers(1, 256)
COUNTS = st.integers(1, 4) | st.integers(1, 4) | st.integers(1, 16)
FACTORS = st.sampled_from([0.0, 1.0, -0.5]) | st.floats(0.01, 2)
LOWEST = torch.finfo(torch.float32).min
ROWS = 512
"""Rows of logits (query times head) that a comparison should have."""


class Draw:
    """Choices come from Hypothesis and can be replayed, numbers from a generator."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
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

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator)

    def tokens(self, shape: tuple[int, int, int, int], dtype: torch.dtype, label: str) -> Tensor:
        """(rows, tokens, heads, head_dim) in one of the layouts that callers have."""
        rows, tokens, heads, head_dim = shape
        gain = 20.0 if self.rarely(f"{label}: large") else 1.5
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
        if x.numel() and self.rarely(f"{label}: not finite"):
            place = self.below(x.numel(), 1)
            x.view(-1)[place] = self(st.sampled_from([math.nan, math.inf, -math.inf]), f"{label}: poison")
        return {
            "fused": lambda: x[:, :, 1],
            "heads first": lambda: x.transpose(1, 2),
            "every other token": lambda: x[:, 1::2, :, 1:-1],
            "heads shared": lambda: x.expand(shape),
            "rows shared": lambda: x.expand(shape),
            "element offset 1": lambda: x[1:].view(shape),
        }[layout]()

    def bits(self, rows: int, columns: int) -> Tensor:
        """uint8 (rows, columns): groups of three bits, 0 among them."""
        return self.below(8, rows, columns).byte()

    def per_head(self, batch: int, heads: int, label: str) -> Tensor | float | None:
        """None, a scalar, (B,) or (B, H)"""
        shape = self(st.sampled_from([None, "number", (), (batch,), (batch, heads)]), label)
        if shape is None:
            return None
        return self(FACTORS, label) if shape == "number" else self.randn(*shape)

    def key_bias(self, rows: int, keys: int) -> Tensor:
        bias = 3 * self.randn(rows, keys)
        if self.rarely("key_bias: extreme"):
            bias[torch.rand(bias.shape, generator=self.generator) < 0.5] = self(
                st.sampled_from([-math.inf, LOWEST, -1e30, 1e4]), "key_bias: extreme"
            )
        return bias

    def weight(self, batch: int, queries: int, label: str) -> Tensor | float | None:
        shape = self(st.sampled_from([None, "number", (), (batch,), (batch, queries)]), label)
        if shape is None:
            return None
        return self(FACTORS, label) if shape == "number" else self.randn(*shape)

    def source(self, query: Tensor, i: int, grouped: bool) -> Source:
        batch, _, heads, head_dim = query.shape
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
            self.tokens((rows, keys, heads, head_dim), query.dtype, f"key[{i}]"),
            self.tokens((rows, values, heads, head_dim), query.dtype, f"value[{i}]"),
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
        return source._replace(
            logit_scale=self.per_head(batch, heads, f"logit_scale[{i}]"),
            logit_bias=self.per_head(batch, heads, f"logit_bias[{i}]"),
        )

    def inputs(self) -> AttentionInputs:
        batch, queries = self(st.integers(0, 3), "batch"), self(st.integers(0, 70), "queries")
        heads, head_dim = self(st.integers(1, 3), "heads"), self(HEAD_DIMS, "head_dim")
        dtype = self(st.sampled_from(DTYPES), "dtype")
        query = self.tokens((batch, queries, heads, head_dim), dtype, "query")
        groups = None
        if self.often("query_groups"):
            groups = self.bits(batch if self.often("query_groups: a row each") else 1, queries)
        sources = [self.source(query, i, groups is not None) for i in range(self(COUNTS, "sources"))]
        if self.rarely("softmax_group"):
            numbers = [self(st.integers(0, 2), f"softmax_group[{i}]") for i in range(len(sources))]
            weights = [self.weight(batch, queries, f"weight[{i}]") for i in range(len(sources))]
            sources = [
                s._replace(softmax_group=g, weight=w if g not in numbers[:i] else None)  # a group has one weight
                for i, (s, g, w) in enumerate(zip(sources, numbers, weights))
            ]
        return AttentionInputs(query, sources, groups)


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_01_any_call_matches_the_reference(data):
    draw = Draw(data)
    inputs = draw.inputs()
    planned, scale = data.draw(st.booleans(), "plan"), data.draw(st.none() | FACTORS, "scale")
    found = [results(inputs, scale, planned)]
    assert found[0][0][0].dtype == inputs.query.dtype
    # The rule compares the largest and the mean error, and a row of large logits errs in all channels alike: luck in
    # few rows. So more problems of the same shape, until enough rows are finite (NaN is drawn too) or it is in vain;
    # and 16 times as many before a difference counts.
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


def results(inputs: AttentionInputs, scale: float | None, planned: bool) -> list[tuple[Tensor, ...]]:
    """(out, lse) of the kernel, of the reference in the working dtype, and in float64; without lse, which several
    softmaxes do not have in common, (out,)."""
    groups, sources = inputs.query_groups, inputs.sources
    keywords = {"scale": scale, "return_lse": len({s.softmax_group for s in sources}) == 1}
    plan = None
    if planned:
        plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], groups)
    found = [multi_source_attention(inputs.query, sources, query_groups=groups, plan=plan, backend="cpu", **keywords)]
    wide, queries = repeated(inputs), inputs.query.shape[1]
    for x in (wide, wide.to(torch.float64)):
        result = reference.multi_source_attention(x.query, x.sources, query_groups=x.query_groups, **keywords)
        found.append(tuple(y[:, :queries] for y in (result if keywords["return_lse"] else (result,))))
    return [x if isinstance(x, tuple) else (x,) for x in found]


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
    return AttentionInputs(inputs.query.repeat(1, times, 1, 1), sources, groups)
