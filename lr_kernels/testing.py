"""What tests and benchmarks share: the attention cases, their inputs, and the tolerance rule."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Source


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
    """Per source: None: one row per query row; an int R: R rows, 1 shared by all; a tuple: the row table, -1: none."""
    visible: float | None = None
    """Share of the keys that key_mask lets through; None: no masks."""
    groups: int = 0
    """Number of group bits that route queries to keys; 0: no groups."""
    key_bias: bool = False
    logit_scale: tuple[float, ...] | None = None
    logit_bias: tuple[float, ...] | None = None


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
)


@dataclass
class AttentionInputs:
    query: Tensor
    sources: list[Source]
    query_groups: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "AttentionInputs":
        """The same inputs with query, keys and values in another dtype."""
        sources = [s._replace(key=s.key.to(dtype), value=s.value.to(dtype)) for s in self.sources]
        return AttentionInputs(self.query.to(dtype), sources, self.query_groups)


def strided_randn(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
    """Random (rows, tokens, heads, head_dim) as a slice of a wider fused buffer: no dimension but the last is dense."""
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
        shape = (count, keys, case.heads, case.head_dim)
        table = torch.tensor(rows, dtype=torch.int32) if isinstance(rows, tuple) else None
        source = Source(strided_randn(shape, g, dtype), strided_randn(shape, g, dtype), table)
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
        sources.append(Source(*(x.to(device) if isinstance(x, Tensor) else x for x in source)))
    groups = _random_bits((case.batch, case.queries), case.groups, g).to(device) if case.groups else None
    return AttentionInputs(query.to(device), sources, groups)


def _random_bits(shape: tuple[int, int], bits: int, generator: torch.Generator) -> Tensor:
    """uint8 with one bit set each, and now and then two."""
    one, other = (1 << torch.randint(bits, shape, generator=generator) for _ in range(2))
    both = torch.rand(shape, generator=generator) < 0.1
    return torch.where(both, one | other, one).to(torch.uint8)


def assert_matches(out: Tensor, lowp: Tensor, ref64: Tensor, what: str = "out") -> None:
    """The tolerance rule: finite where the oracle is, and no further from it than the reference in the working dtype.

        max |out - ref64|  <= 2   · (max |lowp - ref64|  + eps · max |ref64|)
        mean |out - ref64| <= 1.5 · (mean |lowp - ref64| + eps · mean |ref64|)

    `lowp` is the reference computed in the working dtype, eps that dtype's machine epsilon.
    """
    assert out.shape == ref64.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    finite = ref64.isfinite()
    same = out.isfinite() == finite
    assert same.all(), f"{what}: {(~same).sum()} elements are finite on one side only"
    if not finite.any():
        return
    eps = torch.finfo(lowp.dtype).eps
    truth = ref64[finite]
    error = (out[finite].double() - truth).abs()
    allowed = (lowp[finite].double() - truth).abs()
    for name, measure, factor in (("max", Tensor.max, 2.0), ("mean", Tensor.mean, 1.5)):
        got, limit = measure(error).item(), factor * (measure(allowed) + eps * measure(truth.abs())).item()
        assert got <= limit, f"{what}: {name} error {got:.3e} > {limit:.3e}"


def check_attention(run: Callable[..., tuple[Tensor, Tensor]], inputs: AttentionInputs, **kwargs) -> None:
    """Compare run(query, sources, query_groups=…, return_lse=True) with the reference: out and lse."""
    from . import reference

    kwargs = {**kwargs, "query_groups": inputs.query_groups, "return_lse": True}
    exact, low = inputs.to(torch.float64), inputs
    out64, lse64 = reference.multi_source_attention(exact.query, exact.sources, **kwargs)
    out_low, lse_low = reference.multi_source_attention(low.query, low.sources, **kwargs)
    out, lse = run(inputs.query, inputs.sources, **kwargs)
    assert out.dtype == inputs.query.dtype and lse.dtype == torch.float32
    assert_matches(out, out_low, out64, "out")
    finite = lse64.isfinite()
    assert torch.equal(lse[~finite].double(), lse64[~finite]) or lse64.isnan().any(), "lse: infinities differ"
    eps = torch.finfo(inputs.query.dtype).eps
    if finite.any():
        error = (lse[finite].double() - lse64[finite]).abs().max().item()
        scale_of_lse = max(1.0, lse64[finite].abs().max().item())
        allowed = (lse_low[finite].double() - lse64[finite]).abs().max().item()
        assert error <= 2 * (allowed + eps * scale_of_lse), f"lse: error {error:.3e}"
