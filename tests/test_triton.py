"""The Triton kernels against the specification in float64, interpreted on CPU tensors or on a GPU if there is one."""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from lr_kernels import Source, multi_source_attention, plan_attention, reference
from lr_kernels.attention.tables import lay_out
from lr_kernels.runtime.schemas import AttentionTables
from lr_kernels.testing import CASES, ORDERED_CASES, AttentionCase, assert_matches, attention_inputs, check_attention
from lr_kernels.triton import attention, launch, tiles

OPS = torch.ops.lr_kernels
MINIMUM = torch.finfo(torch.float32).min

pytestmark = pytest.mark.usefixtures("device", "poisoned")


def by_triton(*args, **kwargs):
    return multi_source_attention(*args, **kwargs, backend="triton")


def check(case: AttentionCase, dtype: torch.dtype, device: str) -> None:
    check_attention(by_triton, attention_inputs(case, dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", (*CASES, *ORDERED_CASES), ids=lambda c: c.id)
@pytest.mark.fault(number=1)
def test_matches_the_reference(case, dtype, device):
    if device == "cpu" and dtype != torch.float32:  # half the interpreter's time; heads differ in addresses alone
        case = replace(case, heads=1, key_heads=None)
    check(case, dtype, device)


def test_classes_of_several_tiles(device):
    check(AttentionCase("", batch=1, queries=200, heads=1, keys=(70,), rows=(None,), groups=2), torch.float32, device)


@pytest.mark.parametrize("head_dim", [2, 17, 24, 33, 48, 65, 96, 130, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.fault(number=23)
def test_odd_head_dims_match_the_reference(head_dim, dtype, device):
    keys = 35 if dtype == torch.float32 else 135  # beyond one tile of each
    case = AttentionCase("", batch=1, queries=20, heads=1, head_dim=head_dim, keys=(keys,), rows=(None,))
    check(case, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.fault(number=4)
@pytest.mark.fault(number=5)
def test_layouts_and_views_at_element_offset_1(dtype, device):
    g = torch.Generator().manual_seed(3)

    def shifted(*shape):
        flat = torch.randn(math.prod(shape) + 1, generator=g).to(dtype).to(device)
        return flat[1:].view(shape)

    query = shifted(2, 2, 21, 40).transpose(1, 2)  # heads outside tokens
    shared = shifted(1, 33, 2, 40).expand(2, 33, 2, 40)  # stride 0
    every_other = shifted(2, 80, 2, 40)[:, ::2]
    bias = torch.randn(2, 80, generator=g).to(device)[:, ::2]
    sources = [Source(shared, shared), Source(every_other, every_other, key_bias=bias)]
    check_attention(by_triton, type(attention_inputs(CASES[0], dtype))(query, sources))


@pytest.mark.fault(number=4)
def test_strided_row_table_and_per_head_tables(device):
    case = AttentionCase("", batch=3, keys=(30, 20), rows=((2, 0, 1), None))
    inputs = attention_inputs(case, torch.float32, device=device)
    rows = torch.tensor([[1, 9], [-1, 9], [0, 9]], dtype=torch.int32, device=device)[:, 0]
    scale = torch.rand(2, 3, device=device).t() + 0.5
    shift = torch.randn(3, device=device)
    inputs.sources[0] = inputs.sources[0]._replace(rows=rows, logit_scale=scale, logit_bias=shift)
    check_attention(by_triton, inputs)


def test_a_source_without_rows_is_read_by_nobody(device):
    case = AttentionCase("", batch=2, keys=(30,), rows=(None,))
    inputs = attention_inputs(case, torch.float32, device=device)
    none = torch.full((2,), -1, dtype=torch.int32, device=device)
    first = inputs.sources[0]
    mask = torch.ones(0, 30, dtype=torch.bool, device=device)
    inputs.sources.append(Source(first.key[:0], first.value[:0], none, key_mask=mask))
    check_attention(by_triton, inputs)


@pytest.mark.fault(number=2)
def test_token_offsets_beyond_int32_are_computed(tmp_path, device):
    token, count = 2**31 + 64, 2
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=token * (count - 1) + 16, dtype=torch.float16)
    key = memory.as_strided((1, count, 1, 16), (0, token, 16, 1)).to(device)
    key.copy_(torch.randn(count, 16)[None, :, None])
    query = torch.randn(1, 5, 1, 16, device=device).half()
    far = by_triton(query, [Source(key, key)])
    assert torch.equal(far, by_triton(query, [Source(key.clone(), key.clone())]))


def masked_inputs(device: str, dtype=torch.float32):
    return attention_inputs(AttentionCase("", visible=0.6, keys=(40, 35)), dtype, device=device)


def with_plan(inputs, sources):
    plan = plan_attention([s.key_mask for s in sources])
    return by_triton(inputs.query, sources, plan=plan, return_lse=True)


@pytest.mark.fault(number=11)
def test_nan_in_hidden_keys_and_values_changes_no_bit(device):
    inputs = masked_inputs(device)
    clean = with_plan(inputs, inputs.sources)
    dirty = []
    for s in inputs.sources:
        hidden = ~s.key_mask[:, :, None, None]
        dirty.append(s._replace(key=s.key.masked_fill(hidden, math.nan), value=s.value.masked_fill(hidden, math.inf)))
    for a, b in zip(clean, with_plan(inputs, dirty)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "bias"])
@pytest.mark.fault(number=12)
def test_live_nan_and_inf_reach_only_the_rows_that_see_them(where, bad, device):
    case = AttentionCase("", visible=0.7, groups=2, keys=(40, 33), rows=(None, None), key_bias=where == "bias")
    inputs = attention_inputs(case, torch.float32, device=device)
    source = inputs.sources[0]
    if where == "query":
        inputs.query = inputs.query.clone()
        inputs.query[0, 3, 1, 5] = bad
    else:
        name = {"bias": "key_bias"}.get(where, where)
        table = getattr(source, name).clone()
        j = source.key_mask[0].nonzero()[4].item()
        table[(0, j, 1, 5) if table.dim() == 4 else (0, j)] = bad
        inputs.sources[0] = source._replace(**{name: table})
    exact = inputs.to(torch.float64)
    ref64 = reference.multi_source_attention(exact.query, exact.sources, query_groups=inputs.query_groups)
    out = by_triton(inputs.query, inputs.sources, query_groups=inputs.query_groups)
    assert ref64.isfinite().any() and (bad == -math.inf or not ref64.isfinite().all())
    low = reference.multi_source_attention(inputs.query, inputs.sources, query_groups=inputs.query_groups)
    assert_matches(out, low, ref64)


@pytest.mark.parametrize("head_dim", [40, 80])
@pytest.mark.fault(number=13)
def test_nan_past_the_tail_changes_no_bit(head_dim, device):
    case = AttentionCase("", heads=1, head_dim=head_dim, queries=35, keys=(37, 45), rows=(None, 1))
    inputs = attention_inputs(case, torch.float32, device=device)

    def surrounded(x, fill):
        """The same values inside a buffer of `fill`: more tokens, more columns."""
        big = torch.full((x.shape[0], x.shape[1] + 40, x.shape[2], x.shape[3] + 24), fill, device=device)
        view = big[:, : x.shape[1], :, : x.shape[3]]
        view.copy_(x)
        return view

    def run(fill):
        sources = [s._replace(key=surrounded(s.key, fill), value=surrounded(s.value, fill)) for s in inputs.sources]
        return by_triton(surrounded(inputs.query, fill), sources, return_lse=True)

    for a, b in zip(run(0.0), run(math.nan)):
        assert torch.equal(a, b)


@pytest.mark.fault(number=14)
def test_large_fp16_scores_stay_finite(device):
    q = torch.full((1, 8, 1, 64), 300.0, dtype=torch.float16, device=device)
    out = by_triton(q, [Source(q, q)])
    assert torch.equal(out, q)


@pytest.mark.parametrize("low", [MINIMUM, -math.inf, -1e38])
@pytest.mark.parametrize("share", [0.5, 1.0], ids=["some keys", "all keys"])
@pytest.mark.fault(number=15)
def test_bias_at_the_end_of_the_range(low, share, device):
    case = AttentionCase("", keys=(40,), rows=(None,), heads=1, queries=20)
    inputs = attention_inputs(case, torch.float32, device=device)
    g = torch.Generator().manual_seed(5)
    bias = torch.where(torch.rand(2, 40, generator=g) < share, low, 0.0).to(device)
    inputs.sources[0] = inputs.sources[0]._replace(key_bias=bias)
    check_attention(by_triton, inputs)


@pytest.mark.parametrize("low", [MINIMUM, -math.inf])
@pytest.mark.fault(number=15)
def test_logit_bias_at_the_end_of_the_range(low, device):
    case = AttentionCase("", keys=(40, 33), rows=(None, 1), queries=20)
    inputs = attention_inputs(case, torch.float32, device=device)
    inputs.sources[0] = inputs.sources[0]._replace(logit_bias=torch.tensor([low, 0.5], device=device))
    check_attention(by_triton, inputs)
    alone = attention_inputs(AttentionCase("", keys=(40,), rows=(None,), queries=20), torch.float32, device=device)
    alone.sources[0] = alone.sources[0]._replace(logit_bias=torch.tensor([low, 0.5], device=device))
    check_attention(by_triton, alone)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale_that_is_not_positive(scale, device):
    inputs = attention_inputs(CASES[2], torch.float32, device=device)
    check_attention(by_triton, inputs, scale=scale)


@pytest.mark.fault(number=10)
def test_a_source_of_hidden_and_of_no_keys(device):
    inputs = masked_inputs(device)
    nothing = [s._replace(key_mask=torch.zeros_like(s.key_mask)) for s in inputs.sources]
    out, lse = with_plan(inputs, nothing)
    assert (out == 0).all() and (lse == -math.inf).all()
    empty = Source(inputs.sources[0].key[:, :0], inputs.sources[0].value[:, :0])
    expected = by_triton(inputs.query, inputs.sources[:1])
    assert torch.equal(by_triton(inputs.query, [empty, inputs.sources[0]]), expected)


@pytest.mark.parametrize("batch, queries, keys", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.fault(number=9)
def test_empty_dimensions_give_empty_or_zero_results(batch, queries, keys, device):
    q = torch.randn(batch, queries, 2, 16, device=device)
    k = torch.randn(batch, keys, 2, 16, device=device)
    out, lse = by_triton(q, [Source(k, k)], return_lse=True)
    assert out.shape == q.shape and (out == 0).all() and (lse == -math.inf).all()


def test_rows_beyond_the_source_read_nothing(device):
    inputs = attention_inputs(AttentionCase("", batch=3, keys=(30,), rows=((0, 0, 0),)), torch.float32, device=device)
    source, nothing = inputs.sources[0], [None]

    def run(*rows):
        out = torch.full_like(inputs.query, math.nan, memory_format=torch.contiguous_format)
        table = [torch.tensor(rows, dtype=torch.int32, device=device)]
        OPS.multi_source_attention_triton(
            inputs.query, [source.key], [source.value], table, nothing, nothing, [1], nothing, nothing, nothing,
            nothing, nothing, None, None, 0, [0], nothing, nothing, nothing, 0.2, out, None,
        )  # fmt: skip
        return out

    assert torch.equal(run(0, 7, -9), run(0, -1, -1))


def by_op(query, key, value, value_index):
    """The op of one source with values of their own, without the checks of the public function."""
    out, nothing = torch.full_like(query, math.nan, memory_format=torch.contiguous_format), [None]
    OPS.multi_source_attention_triton(
        query, [key], [value], nothing, nothing, nothing, [1], nothing, [value_index], nothing, nothing, nothing,
        None, None, 0, [0], nothing, nothing, nothing, 0.2, out, None,
    )  # fmt: skip
    return out


def test_value_index_beyond_the_values_reads_the_nearest(device):
    g = torch.Generator().manual_seed(8)
    query, key = (torch.randn(2, 70, 2, 40, generator=g).to(device) for _ in range(2))
    value = torch.randn(2, 9, 2, 40, generator=g).to(device)
    index = torch.randint(-4, 14, (2, 70), generator=g, dtype=torch.int32).to(device)
    index[0, 3], index[1, 69] = 2**31 - 1, -(2**31)
    assert torch.equal(by_op(query, key, value, index), by_op(query, key, value, index.clamp(0, 8)))
    assert (by_op(query, key, value[:, :0], index) == 0).all()  # no value to read: as if there were no key


@pytest.mark.parametrize("values", [5, 90], ids=["fewer values than keys", "more"])
@pytest.mark.parametrize("index_rows", ["source rows", "batch rows", "one"])
def test_value_index_of_every_shape(index_rows, values, device):
    g = torch.Generator().manual_seed(9)
    query, key = (torch.randn(n, 70, 2, 24, generator=g).to(device) for n in (3, 2))
    value = torch.randn(2, values, 2, 24, generator=g).to(device)
    count = {"source rows": 2, "batch rows": 3, "one": 1}[index_rows]
    index = torch.randint(values, (count, 140), generator=g).to(device)[:, ::2]
    rows, mask = torch.tensor([1, -1, 0], device=device), (torch.rand(2, 70, generator=g) < 0.7).to(device)
    moved = Source(key, value, rows, key_mask=mask, value_index=index)
    plain = Source(torch.randn(1, 33, 2, 24, generator=g).to(device), torch.randn(1, 33, 2, 24, generator=g).to(device))
    check_attention(by_triton, type(masked_inputs(device))(query, [moved, plain]))


@pytest.mark.fault(number=11)
def test_nan_in_values_that_no_key_reads_changes_no_bit(device):
    inputs = masked_inputs(device)
    read = torch.arange(40, device=device)[None] // 2 * 2
    source = inputs.sources[0]._replace(value_index=read)
    unread = (torch.arange(40, device=device) % 2 == 1)[None, :, None, None]
    dirty = source._replace(value=source.value.masked_fill(unread, math.nan))
    others = inputs.sources[1:]
    for a, b in zip(with_plan(inputs, [source, *others]), with_plan(inputs, [dirty, *others])):
        assert torch.equal(a, b)


def grouped_inputs(device: str, *weights, groups=(0, 1, 0)):
    """Sources in softmax groups, with these weights."""
    inputs = attention_inputs(
        AttentionCase("", heads=1, queries=20, keys=(20, 33, 17), rows=(None, 1, None)), torch.float32, device=device
    )
    weights += (None,) * (3 - len(weights))
    table = zip(inputs.sources, groups, weights)
    inputs.sources[:] = [s._replace(softmax_group=g, weight=w) for s, g, w in table]
    return inputs


@pytest.mark.parametrize("groups", [(0, 0, 0), (0, 1, 0)], ids=str)
def test_weights_of_every_shape(groups, device):
    schedule = torch.rand(7, 2, 20, generator=torch.Generator().manual_seed(4)).to(device)
    for weight in (0.3, schedule[3, 1, 5], schedule[1, :, 9], schedule[5], schedule.permute(1, 2, 0)[..., 3]):
        other = (-2.0,) if groups[1] else ()
        check_attention(by_triton, grouped_inputs(device, weight, *other, groups=groups))


@pytest.mark.fault(number=10)
def test_a_softmax_group_that_sees_no_key_adds_nothing(device):
    inputs = grouped_inputs(device, 0.7, 1e30)
    hidden = inputs.sources[1]._replace(key_mask=torch.zeros(1, 33, dtype=torch.bool, device=device))
    first = [inputs.sources[0], inputs.sources[2]]
    alone = by_triton(inputs.query, first)
    assert torch.equal(by_triton(inputs.query, [*first, hidden]), alone)
    before = [s._replace(softmax_group=2) for s in first]
    assert torch.equal(by_triton(inputs.query, [hidden, *before]), alone)
    rowless = inputs.sources[1]._replace(rows=torch.tensor([-1, 0], device=device), weight=1.0)
    both = by_triton(inputs.query, [*first, rowless])
    assert torch.equal(both[0], alone[0]) and not torch.equal(both[1], alone[1])


@pytest.mark.parametrize("where", ["weight", "value"])
@pytest.mark.fault(number=12)
def test_live_nan_in_a_softmax_group(where, device):
    weight = torch.rand(2, 20, generator=torch.Generator().manual_seed(4)).to(device)
    inputs = grouped_inputs(device, None, weight)
    if where == "weight":
        weight[1, 3] = math.nan
    else:
        value = inputs.sources[1].value.clone()
        value[0, 4, 0, 7] = math.nan
        inputs.sources[1] = inputs.sources[1]._replace(value=value)
    exact = inputs.to(torch.float64)
    ref64 = reference.multi_source_attention(exact.query, exact.sources)
    low = reference.multi_source_attention(inputs.query, inputs.sources)
    assert ref64.isfinite().any() and not ref64.isfinite().all()
    assert_matches(by_triton(inputs.query, inputs.sources), low, ref64)


SMALL = AttentionCase(
    "", 2, 20, 1, keys=(20, 33), rows=(None, 1), visible=0.6, groups=2, value_index=True, softmax_groups=(0, 1)
)


@pytest.mark.fault(number=30)
def test_several_softmax_groups_are_bitwise_deterministic(device):
    inputs = attention_inputs(SMALL, torch.bfloat16, device=device)
    results = [by_triton(inputs.query, inputs.sources, query_groups=inputs.query_groups) for _ in range(5)]
    assert results[0].isfinite().all() and all(torch.equal(results[0], x) for x in results)


@pytest.mark.fault(number=29)
def test_one_compilation_for_every_step_weight_and_grouping(device):
    """Arguments of two launches are alike for Triton: same types, constants and alignments."""
    kernel, specialize = attention.multi_source_attention_forward_kernel, native_specialize_impl
    unspecialized = getattr(kernel, "kwargs", None) or vars(kernel)
    g = torch.Generator().manual_seed(4)
    schedule, strengths = torch.rand(9, 2, 70, generator=g).to(device), torch.rand(9, generator=g).to(device)

    def compilation(step: int, groups: list[int]):
        inputs = attention_inputs(
            AttentionCase("", keys=(40, 33, 70), rows=(None, (1, 0), 1), value_index=True), torch.bfloat16
        )
        q, sources, weights = inputs.query, inputs.sources, [schedule[step], strengths[step].expand(2, 70), None]
        strength = strengths[step].expand(2, 2)
        tables = AttentionTables(
            [s.key for s in sources],
            [s.value for s in sources],
            [s.rows for s in sources],
            [None] * 3,
            [None] * 3,
            [1] * 3,
            [None] * 3,
            [s.value_index.int() for s in sources],
            [None] * 3,
            [strength, None, None],
            [None, strength, strength],
            None,
            None,
            0,
            groups,
            weights[: groups[-1] + 1],
            [None] * 3,
            [None] * 3,
            0.1 * (step + 1),
        )
        arguments, constants, _ = attention.launch_arguments(q, tables, torch.empty_like(q), None, 90)
        kinds = [
            specialize(CUDABackend, x, False, name not in unspecialized["do_not_specialize"], True)
            for name, x in zip(kernel.arg_names, arguments)
        ]
        return kinds, constants

    assert schedule[1].data_ptr() % 16 == 0 and strengths[1].data_ptr() % 16 != 0
    first = compilation(0, [0, 0, 1])
    assert all(compilation(step, [0, 0, 1]) == first for step in range(1, 9))
    assert compilation(3, [0, 1, 1]) == first and compilation(3, [0, 1, 2]) == first
    assert compilation(3, [0, 0, 0]) != first


@pytest.mark.parametrize("softmax_groups", [None, (0, 1)], ids=["one group", "two"])
@pytest.mark.fault(number=26)
@pytest.mark.fault(number=27)
def test_passes_opcheck(softmax_groups, device):
    inputs = attention_inputs(replace(SMALL, softmax_groups=softmax_groups), torch.float32, device=device)
    query, sources = inputs.query, inputs.sources
    plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], inputs.query_groups)
    tables = lay_out(query, sources, plan, 0.3)
    lse = None if len(tables.weight) > 1 else torch.full(query.shape[:3], math.nan, device=device)
    out = torch.full_like(query, math.nan, memory_format=torch.contiguous_format)
    torch.library.opcheck(OPS.multi_source_attention_triton.default, (query, *tables, out, lse))


@pytest.mark.fault(number=31)
def test_permuting_the_batch_permutes_the_output(device):
    inputs = attention_inputs(AttentionCase("", batch=3, keys=(40, 33), rows=(None, 1)), torch.float32, device=device)
    order = torch.tensor([2, 0, 1], device=device)
    own, shared = inputs.sources
    moved = [own._replace(key=own.key[order], value=own.value[order]), shared]
    assert torch.equal(by_triton(inputs.query[order], moved), by_triton(inputs.query, inputs.sources)[order])


@pytest.mark.fault(number=3)
def test_more_tiles_than_a_grid_holds_are_refused():
    assert launch.check_grid("multi_source_attention", 2**31 - 1) == (2**31 - 1,)
    with pytest.raises(ValueError, match="at most 2147483647 tiles"):
        launch.check_grid("multi_source_attention", 2**31)


def test_tiles_cover_every_head_dim():
    for head_dim in range(1, 257):
        D0, D1 = tiles.split_head_dim(head_dim)
        assert D0 + D1 >= head_dim and D0 >= 16 and (D1 == 0 or (16 <= D1 < D0 and D0 < head_dim))


@triton.jit
def overread_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i + 1))


def test_access_checks_catch_an_overread():
    from conftest import check_accesses
    from triton.runtime.interpreter import InterpretedFunction

    kernel = overread_kernel
    if not isinstance(kernel, InterpretedFunction):
        kernel = InterpretedFunction(kernel.fn)
    x, y = torch.zeros(17), torch.zeros(16)
    with pytest.MonkeyPatch.context() as patch:
        check_accesses(patch)
        kernel[(1,)](x, y, 16)
        with pytest.raises(Exception, match="1 of 16 accesses outside"):
            kernel[(1,)](x[:16], y, 16)
