"""multi_source_attention on the reference and the CPU backend."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from draw import Arguments, Draw, drawn_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lr_kernels import Source, merge_attention_states, multi_source_attention, plan_attention, reference
from lr_kernels.testing import (
    CASES,
    ORDERED_CASES,
    AttentionCase,
    AttentionInputs,
    assert_matches,
    attention_inputs,
    check_attention,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
sizes = dict(max_examples=40, deadline=None)


def on(backend):
    def run(query, sources, **kwargs):
        return multi_source_attention(query, sources, backend=backend, **kwargs)

    return run


def random_source(rows, keys, heads=2, head_dim=16, dtype=torch.float32):
    return Source(
        torch.randn(rows, keys, heads, head_dim, dtype=dtype), torch.randn(rows, keys, heads, head_dim, dtype=dtype)
    )


def right_call(draw: Draw) -> Arguments:
    shape, inputs = drawn_attention(draw)
    groups = [0]
    for _ in inputs[1][1:]:
        groups.append(groups[-1] + draw.rarely())
    weights = [draw.tensor(*shape[:2]) if draw.rarely() else None for _ in range(groups[-1] + 1)]
    lse = torch.empty(shape[:3], dtype=draw.random.choice((torch.float32, torch.float64)))
    out = torch.empty(shape, dtype=inputs[0].dtype)
    lse = lse if groups[-1] == 0 and draw.often() else None
    scales: list[list] = [[None] * len(groups) for _ in range(2)]
    for i in range(len(groups)):
        if draw.rarely():
            dtype = draw.random.choice((torch.int8, torch.float8_e4m3fn))
            for kind, scale in zip(inputs[1:3], scales):
                kind[i], scale[i] = draw.eight_bits(kind[i], dtype)
    return [*inputs, groups, weights, *scales, 0.3, out, lse]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (*CASES, *ORDERED_CASES), ids=lambda c: c.id)
@pytest.mark.fault(number=1)
def test_matches_the_reference(case, dtype):
    check_attention(on("cpu"), attention_inputs(case, dtype))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.fault(number=1)
def test_every_instruction_set(isa):
    """LR_KERNELS_ISA is read once, so each runs in its own process; one that is missing falls to the best there is."""
    code = (
        "import torch, lr_kernels as lr; from lr_kernels.testing import *\n"
        "run = lambda *a, **k: lr.multi_source_attention(*a, backend='cpu', **k)\n"
        "for case in CASES + ORDERED_CASES:\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "        check_attention(run, attention_inputs(case, dtype))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LR_KERNELS_ISA": isa})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.fault(number=1)
def test_long_sequence_crosses_blocks_and_tiles(dtype):
    case = AttentionCase(
        "long", batch=1, queries=1100, heads=1, head_dim=40, keys=(1000, 700), rows=(None, 1), visible=0.6
    )
    check_attention(on("cpu"), attention_inputs(case, dtype))


@pytest.mark.fault(number=1)
def test_growing_logits_redo_the_block():
    """Logits that rise by far more than 2^60 between blocks force the lazy maximum to move."""
    inputs = attention_inputs(AttentionCase("rising", keys=(600,), rows=(None,), head_dim=16), torch.float32)
    key = inputs.sources[0].key * torch.linspace(0.1, 60, 600)[None, :, None, None]
    check_attention(on("cpu"), AttentionInputs(inputs.query, [inputs.sources[0]._replace(key=key)]))


@pytest.mark.parametrize("scale", [1e9, 1e12, 1e16, -1e12])
@pytest.mark.fault(number=1)
def test_huge_finite_logits_pick_the_largest(scale):
    query, source = torch.randn(2, 40, 2, 16), random_source(2, 300)
    out, lse = on("cpu")(query, [source], scale=scale, return_lse=True)
    scores = torch.einsum("bnhd,bmhd->bhnm", query.double(), source.key.double()) * scale
    picked = source.value.gather(1, scores.argmax(-1).transpose(1, 2)[..., None].expand(-1, -1, -1, 16))
    clear = scores.topk(2).values.diff(dim=-1)[..., 0].abs() > 1e-5 * scores.abs().amax(-1)
    clear = clear.transpose(1, 2)
    assert clear.float().mean() > 0.9 and lse.isfinite().all()
    assert_matches(out[clear], picked[clear], picked[clear].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["rows", "tokens", "heads"])
@pytest.mark.fault(number=2)
def test_offsets_beyond_int32_are_computed(dimension, dtype, tmp_path):
    """Views whose second row, token or head lies 2^31 elements away, in a sparse file that holds the touched pages."""
    strides = [64, 32, 16, 1]
    strides[dimension] = 2**31 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**31 + 256, dtype=dtype)
    far = memory.as_strided((2, 2, 2, 16), strides)
    far.copy_(torch.randn(far.shape))
    near = far.clone(memory_format=torch.contiguous_format)
    for mask in (None, torch.tensor([[False, True]])):
        by_view, by_copy = (on("cpu")(x, [Source(x, x, torch.tensor([1, 0]), mask)]) for x in (far, near))
        assert torch.equal(by_view, by_copy)


@settings(**sizes)
@given(data=st.data())
@pytest.mark.fault(number=4)
def test_strides_are_honoured(data):
    """Permuted, sliced, expanded and fused-QKV views give bitwise what their compact copies give."""
    heads, head_dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    tokens, rows = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    kind = data.draw(st.sampled_from(["heads-first", "fused", "sliced", "expanded", "offset-1"]))
    dtype = data.draw(st.sampled_from(DTYPES))

    def view():
        if kind == "heads-first":
            return torch.randn(rows, heads, tokens, head_dim).to(dtype).transpose(1, 2)
        if kind == "fused":
            return (
                torch.randn(rows, tokens, 3 * heads * head_dim)
                .to(dtype)
                .chunk(3, -1)[1]
                .unflatten(-1, (heads, head_dim))
            )
        if kind == "sliced":
            return torch.randn(rows * 2, tokens * 3, heads + 1, head_dim + 2).to(dtype)[::2, 1::3, 1:, 1:-1]
        if kind == "expanded":
            return torch.randn(1, tokens, 1, head_dim).to(dtype).expand(rows, tokens, heads, head_dim)
        flat = torch.randn(rows * tokens * heads * head_dim + 1).to(dtype)
        return flat[1:].view(rows, tokens, heads, head_dim)

    query, key, value = view(), view(), view()
    out = multi_source_attention(query, [Source(key, value)], backend="cpu")
    compact = multi_source_attention(
        query.clone(memory_format=torch.contiguous_format),
        [Source(key.contiguous(), value.contiguous())],
        backend="cpu",
    )
    assert torch.equal(out, compact)


@pytest.mark.fault(number=4)
def test_last_dimension_must_be_contiguous():
    x = torch.randn(1, 4, 2, 8)
    strided = torch.randn(1, 4, 8, 2).mT
    for argument, query, source in (
        ("query", strided, Source(x, x)),
        (r"key\[0\]", x, Source(strided, x)),
        (r"value\[0\]", x, Source(x, strided)),
    ):
        with pytest.raises(ValueError, match=f"{argument}: expected a contiguous last dimension"):
            multi_source_attention(query, [source])


@pytest.mark.parametrize("head_dim", [1, 16, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=5)
def test_views_at_an_odd_element(dtype, head_dim):
    """Pointers aligned to the element and to nothing more, read in place and gathered."""
    aligned, odd = [], []
    for tokens in (33, 50, 50):
        x = torch.randn(2, tokens, 2, head_dim).to(dtype)
        memory = torch.empty(x.numel() + 1, dtype=dtype)
        aligned.append(x)
        odd.append(memory[1:].view(x.shape).copy_(x))
    assert all(x.data_ptr() % (2 * x.element_size()) for x in odd)
    for mask in (None, torch.rand(1, 50) < 0.5):
        by_odd, by_aligned = (on("cpu")(q, [Source(k, v, key_mask=mask)]) for q, k, v in (odd, aligned))
        assert torch.equal(by_odd, by_aligned)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.fault(number=8)
def test_one_source_is_plain_self_attention(backend):
    source = random_source(2, 33)
    query = torch.randn(2, 33, 2, 16)
    q, k, v = (x.transpose(1, 2).double() for x in (query, source.key, source.value))
    truth = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert_matches(on(backend)(query, [source]), reference.multi_source_attention(query, [source]), truth)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.fault(number=9)
def test_empty_dimensions_give_empty_or_zero_results(backend):
    run = on(backend)
    for batch, queries in ((0, 5), (2, 0)):
        out, lse = run(torch.randn(batch, queries, 2, 16), [random_source(1, 7)], return_lse=True)
        assert out.shape == (batch, queries, 2, 16) and lse.shape == (batch, queries, 2)
    query = torch.randn(2, 5, 2, 16)
    out, lse = run(query, [random_source(2, 0)], return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    some = random_source(2, 9)
    assert torch.equal(run(query, [some, random_source(1, 0)]), run(query, [some]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.fault(number=9)
def test_empty_groups_and_a_source_without_rows(backend):
    groups = torch.zeros(2, 0, dtype=torch.uint8)
    out = on(backend)(torch.randn(2, 0, 2, 16), [random_source(2, 7)], query_groups=groups)
    assert out.shape == (2, 0, 2, 16)
    nobody = random_source(0, 7)._replace(rows=torch.tensor([-1, -1]))
    assert (on(backend)(torch.randn(2, 5, 2, 16), [nobody]) == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.fault(number=10)
def test_query_that_sees_nothing(backend):
    query, source = torch.randn(2, 6, 2, 16), random_source(2, 9)
    groups = torch.tensor([[1, 2, 1, 2, 0, 1]], dtype=torch.uint8)
    only_1 = source._replace(key_groups=torch.ones(1, 9, dtype=torch.uint8))
    out, lse = on(backend)(query, [only_1], query_groups=groups, return_lse=True)
    blind = groups[0] != 1
    assert (out[:, blind] == 0).all() and (lse[:, blind] == -math.inf).all()
    assert_matches(
        out[:, ~blind], out[:, ~blind], reference.multi_source_attention(query, [source]).double()[:, ~blind]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=11)
def test_nan_in_hidden_keys_is_ignored_bitwise(dtype):
    case = AttentionCase("masked", visible=0.5, keys=(70, 45), rows=(None, 1), groups=2)
    inputs = attention_inputs(case, dtype)
    clean = multi_source_attention(inputs.query, inputs.sources, query_groups=inputs.query_groups, backend="cpu")
    poisoned = []
    for source in inputs.sources:
        hidden = ~source.key_mask.expand(source.key.shape[0], -1)
        key, value = source.key.clone(), source.value.clone()
        key[hidden], value[hidden] = math.nan, math.inf
        poisoned.append(source._replace(key=key, value=value))
    out = multi_source_attention(inputs.query, poisoned, query_groups=inputs.query_groups, backend="cpu")
    assert torch.equal(out, clean)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=12)
def test_live_nan_reaches_only_queries_that_see_it(dtype, where, poison):
    inputs = attention_inputs(AttentionCase("routed", groups=2, keys=(70, 45), rows=(None, 1)), dtype)
    source = inputs.sources[0]
    x = getattr(source, where).clone()
    x[0, 5, 0, 3] = poison
    live = [source._replace(**{where: x}), inputs.sources[1]]
    out = multi_source_attention(inputs.query, live, query_groups=inputs.query_groups, backend="cpu")
    exact = [s._replace(key=s.key.double(), value=s.value.double()) for s in live]
    truth = reference.multi_source_attention(inputs.query.double(), exact, query_groups=inputs.query_groups)
    assert torch.equal(out.isfinite(), truth.isfinite())
    assert truth.isfinite().any() and (poison != math.nan or not truth.isfinite().all())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=15)
def test_a_logit_bias_of_minus_infinity_hides_the_source(dtype, biased):
    """For batch row 0 alone: it sees nothing, or only the other source; no gradient is NaN."""
    query, key, value = (torch.randn(2, 37, 2, 16).to(dtype).requires_grad_() for _ in range(3))
    bias = torch.zeros(1, 37) if biased else None
    off = Source(key, value, key_bias=bias, logit_bias=torch.tensor([-math.inf, 0.0]))
    for sources in ([off], [off, Source(key, value, key_mask=torch.zeros(1, 37, dtype=torch.bool))]):
        out, lse = on("cpu")(query, sources, return_lse=True)
        assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and lse[1].isfinite().all()
        grads = torch.autograd.grad(out.sum(), (query, key, value))
        assert all(g.isfinite().all() and (g[0] == 0).all() for g in grads)
    with torch.no_grad():
        check_attention(on("cpu"), AttentionInputs(query, [off, Source(key, value)]))


@pytest.mark.parametrize("keys", [1, 31, 200])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=12)
def test_an_infinite_query_meets_no_padding(dtype, biased, keys):
    """All its logits are -inf: it sees nothing. Against the zeros of a padded block it would get NaN."""
    query = torch.ones(1, 40, 1, 1, dtype=dtype)
    query[0, 3] = math.inf
    source = Source(torch.full((1, keys, 1, 1), -1.0, dtype=dtype), torch.ones(1, keys, 1, 1, dtype=dtype))
    if biased:
        source = source._replace(key_bias=torch.zeros(1, keys))
    out, lse = on("cpu")(query, [source], return_lse=True)
    assert out[0, 3] == 0 and lse[0, 3] == -math.inf
    assert (out[0, :3] == 1).all() and (out[0, 4:] == 1).all() and lse[0, 4:].isfinite().all()


@pytest.mark.parametrize("head_dim", [16, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=13)
def test_garbage_past_the_tail_is_not_read(dtype, head_dim):
    """NaN after the last token, the last head and the last channel of query, keys and values."""
    shapes = [(2, tokens, 2, head_dim) for tokens in (5, 71, 71)]
    copies = [torch.randn(shape).to(dtype) for shape in shapes]
    views = []
    for x in copies:
        wide = torch.full([n + 1 for n in x.shape], math.nan, dtype=dtype)
        views.append(wide[:-1, :-1, :-1, :-1].copy_(x))
    for mask in (None, torch.rand(1, 71) < 0.5):
        by_view, by_copy = (on("cpu")(q, [Source(k, v, key_mask=mask)]) for q, k, v in (views, copies))
        assert torch.equal(by_view, by_copy) and by_copy.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.fault(number=14)
def test_fp16_scores_do_not_overflow(backend):
    x = torch.full((1, 8, 1, 64), 300.0, dtype=torch.float16)
    value = torch.randn(1, 8, 1, 64).half()
    out, lse = on(backend)(x, [Source(x, value)], return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()


@settings(**sizes)
@given(
    bias=st.lists(st.sampled_from([0.0, -1.5, -math.inf, torch.finfo(torch.float32).min]), min_size=1, max_size=12),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.fault(number=15)
def test_infinite_and_smallest_bias(bias, dtype):
    source = random_source(1, len(bias), dtype=dtype)._replace(key_bias=torch.tensor([bias]))
    check_attention(on("cpu"), AttentionInputs(torch.randn(2, 3, 2, 16).to(dtype), [source]))


@pytest.mark.parametrize("head_dim", range(1, 257))
@pytest.mark.fault(number=23)
def test_every_head_dim(head_dim):
    dtype = DTYPES[head_dim % 3]
    case = AttentionCase("", batch=1, queries=20, heads=1, head_dim=head_dim, keys=(11, 6), rows=(None, 1), visible=0.7)
    check_attention(on("cpu"), attention_inputs(case, dtype))


@settings(**sizes)
@given(seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES))
@pytest.mark.fault(number=31)
def test_permuting_the_batch_permutes_the_output_bitwise(seed, dtype):
    case = AttentionCase("permuted", batch=4, queries=40, groups=2, visible=0.6, rows=(None, (2, -1, 0, 1)))
    inputs = attention_inputs(case, dtype, seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    run = on("cpu")
    out = run(inputs.query, inputs.sources, query_groups=inputs.query_groups)
    first, second = inputs.sources
    mask_rows = {name: getattr(first, name)[order] for name in ("key_mask", "key_groups")}
    shuffled = [
        first._replace(key=first.key[order], value=first.value[order], **mask_rows),
        second._replace(rows=second.rows[order]),
    ]
    assert torch.equal(run(inputs.query[order], shuffled, query_groups=inputs.query_groups[order]), out[order])


@settings(**sizes)
@given(cuts=st.lists(st.integers(0, 90), min_size=1, max_size=4), seed=st.integers(0, 99), masked=st.booleans())
@pytest.mark.fault(number=32)
def test_splitting_and_merging_sources_changes_no_result(cuts, seed, masked):
    """Any partition of the keys, as sources of one call or as merged calls, is the attention over all of them."""
    inputs = attention_inputs(
        AttentionCase("whole", keys=(90,), rows=(None,), visible=0.7 if masked else None), torch.float32, seed
    )
    whole, edges = inputs.sources[0], [0, *sorted(cuts), 90]
    parts = [
        Source(
            whole.key[:, a:b], whole.value[:, a:b], key_mask=None if whole.key_mask is None else whole.key_mask[:, a:b]
        )
        for a, b in itertools.pairwise(edges)
    ]
    exact = inputs.to(torch.float64)
    truth = reference.multi_source_attention(exact.query, exact.sources)
    low = reference.multi_source_attention(inputs.query, inputs.sources)
    assert_matches(on("cpu")(inputs.query, parts), low, truth)
    outs, lses = zip(*(on("cpu")(inputs.query, [part], return_lse=True) for part in parts))
    merged, lse = merge_attention_states(outs, lses)
    assert_matches(merged, low, truth)
    expected = reference.merge_attention_states([x.double() for x in outs], [x.double() for x in lses])
    assert_matches(lse, reference.merge_attention_states(outs, lses)[1], expected[1])


@pytest.mark.fault(number=32)
def test_the_order_of_sources_changes_no_result():
    inputs = attention_inputs(AttentionCase("three", keys=(33, 64, 100), rows=(None, 1, None)), torch.float32)
    exact = inputs.to(torch.float64)
    truth = reference.multi_source_attention(exact.query, exact.sources)
    low = reference.multi_source_attention(inputs.query, inputs.sources)
    assert_matches(on("cpu")(inputs.query, inputs.sources[::-1]), low, truth)


def test_plan_is_reused_and_bound_to_its_masks():
    inputs = attention_inputs(
        AttentionCase("planned", visible=0.5, groups=2, keys=(70, 45), rows=(None, 1)), torch.float32
    )
    plan = plan_attention(
        [s.key_mask for s in inputs.sources], [s.key_groups for s in inputs.sources], inputs.query_groups
    )
    expected = on("cpu")(inputs.query, inputs.sources, query_groups=inputs.query_groups)
    for _ in range(2):
        assert torch.equal(
            on("cpu")(inputs.query, inputs.sources, query_groups=inputs.query_groups, plan=plan), expected
        )
    other = [s._replace(key_mask=s.key_mask.clone()) for s in inputs.sources]
    with pytest.raises(ValueError, match=r"plan: expected a plan built from key_mask\[0\]"):
        multi_source_attention(inputs.query, other, query_groups=inputs.query_groups, plan=plan)
    with pytest.raises(ValueError, match="plan: expected a plan for 1 sources, got one for 2"):
        multi_source_attention(inputs.query, inputs.sources[:1], query_groups=inputs.query_groups, plan=plan)
    with pytest.raises(ValueError, match="plan: expected a plan built from query_groups"):
        multi_source_attention(inputs.query, inputs.sources, query_groups=inputs.query_groups.clone(), plan=plan)


def test_plan_with_named_classes_refuses_a_missing_byte():
    groups = torch.tensor([[1, 2, 4]], dtype=torch.uint8)
    keys = torch.ones(1, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="query_classes: a byte of query_groups is missing"):
        plan_attention([None], [keys], groups, query_classes=(1, 2))


def test_plan_with_named_classes_checks_and_merges_them():
    groups = torch.randint(0, 4, (2, 64), dtype=torch.uint8)
    plan = plan_attention([None], None, groups, query_classes=[0, 1, 2, 3, 3, 3])
    assert (plan.class_start[:, -1] == 64).all()
    for wrong in (-1, 256, 3.5):
        with pytest.raises(ValueError, match="query_classes: expected integers from 0 to 255"):
            plan_attention([None], None, groups, query_classes=[0, wrong])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_softmax_groups_add_and_value_index_moves(backend):
    """IP-Adapter's decoupled sum, and V read through a correspondence."""
    query, text, image = torch.randn(2, 5, 2, 16), random_source(2, 7), random_source(1, 4)
    weighted = [text, image._replace(softmax_group=1, weight=0.6)]
    parts = [reference.multi_source_attention(query, [s]) for s in (text, image)]
    torch.testing.assert_close(on(backend)(query, weighted), parts[0] + 0.6 * parts[1])
    index = torch.randint(4, (1, 4))
    warped = image._replace(value=image.value[:, index[0]])
    assert torch.equal(on(backend)(query, [image._replace(value_index=index)]), on(backend)(query, [warped]))
    with pytest.raises(ValueError, match="return_lse: expected one softmax group"):
        multi_source_attention(query, weighted, return_lse=True)
    second = [text, image._replace(weight=0.6)]
    with pytest.raises(ValueError, match=r"weight\[1\]: expected None, since softmax group 0 takes weight\[0\]"):
        multi_source_attention(query, second)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=rf"value_index\[0\]: expected 0 to 3, got {wrong} to {wrong}"):
            on(backend)(query, [image._replace(value_index=torch.full((1, 4), wrong))])


def test_autocast_brings_all_tensors_to_one_dtype():
    query, source = torch.randn(1, 5, 2, 16), random_source(1, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = multi_source_attention(query.bfloat16(), [source])
    assert out.dtype == torch.bfloat16
