"""What only a GPU can show: streams, graphs, large offsets, the order of launches.

Everything else that runs there is in test_triton*.py, whose tests use a GPU where there is one.
"""

import functools
from dataclasses import replace

import pytest
import torch
from eight_bit_inputs import of_kinds

from lr_kernels import Source, multi_source_attention, plan_attention, step_blend, step_coefficients
from lr_kernels.attention import hopper
from lr_kernels.runtime import ops
from lr_kernels.testing import (
    CASES,
    EXTREMES,
    ORDERED_CASES,
    AttentionCase,
    attention_inputs,
    check_attention,
    extreme_inputs,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LEVELS = torch.linspace(0.999, 0.005, 1000)


ON_HOPPER = torch.cuda.is_available() and hopper.is_hopper(0) and ops.cuda_extension_error is None
BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper card"))]


@pytest.fixture(params=BACKENDS)
def attend(request):
    return functools.partial(multi_source_attention, backend=request.param)


def case(dtype=torch.bfloat16, **keywords) -> tuple:
    inputs = attention_inputs(AttentionCase("gpu", queries=256, keys=(256, 128), **keywords), dtype, device="cuda")
    plan = plan_attention(
        [s.key_mask for s in inputs.sources], [s.key_groups for s in inputs.sources], inputs.query_groups
    )
    return inputs, plan


MIXED = (torch.int8, torch.float8_e4m3fn, None)
"""What the sources of a call in 8 bits are in turn."""


@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.fault(number=1)
def test_a_few_small_calls_for_compute_sanitizer(head_dim, dtype, attend):
    """Few and small: compute-sanitizer runs these 50 times slower."""
    if dtype == torch.float32 and attend.keywords["backend"] == "cuda":
        inputs, _ = case(dtype, head_dim=head_dim)
        with pytest.raises(NotImplementedError, match="float32"):
            attend(inputs.query, inputs.sources)
        return
    for keywords in ({}, {"visible": 0.4, "groups": 2}, {"key_bias": True}, {"softmax_groups": (0, 1)}):
        check_attention(attend, case(dtype, head_dim=head_dim, **keywords)[0])
    check_attention(attend, of_kinds(case(dtype, head_dim=head_dim, visible=0.4)[0], *MIXED))


def test_graph_of_a_layer_serves_new_inputs_and_masks(attend):
    inputs, plan = case(visible=0.5, head_dim=64)
    query, sources = inputs.query.contiguous(), inputs.sources
    attend(query, sources, plan=plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(query, sources, plan=plan)
    for _ in range(2):
        query.normal_()
        for s in sources:
            s.key.normal_()
        for count in plan.key_count:  # fewer keys: the count is read from the device
            count.sub_(1)
        graph.replay()
        assert torch.equal(out, attend(query, sources, plan=plan))


def test_graph_of_a_denoising_step_counts_by_itself():
    table = step_coefficients(LEVELS, [900, 600, 300], final_alpha_cumprod=1.0, guidance_scale=5.0).cuda()
    step = torch.zeros(1, dtype=torch.int32, device="cuda")
    sample, *predictions = (torch.randn(2, 4, 64, 64, device="cuda") for _ in range(3))
    start, out = sample.clone(), torch.empty_like(sample)
    step_blend(sample, predictions, table, step, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_blend(sample, predictions, table, step, out=out)
        sample.copy_(out)
        step += 1
    step.zero_()
    sample.copy_(start)
    expected = start
    for i in range(3):
        graph.replay()
        expected = step_blend(expected, predictions, table, i)
        assert torch.equal(sample, expected)


def test_a_side_stream_is_used(attend):
    inputs, plan = case(head_dim=64)
    expected = attend(inputs.query, inputs.sources, plan=plan)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(inputs.query)
        torch.cuda._sleep(50_000_000)
        late.copy_(inputs.query)
        out = attend(late, inputs.sources, plan=plan)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_no_host_synchronization(attend):
    inputs, plan = case(visible=0.5, groups=2)
    attend(inputs.query, inputs.sources, query_groups=inputs.query_groups, plan=plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(inputs.query, inputs.sources, query_groups=inputs.query_groups, plan=plan)
        plan_attention(
            [s.key_mask for s in inputs.sources], [s.key_groups for s in inputs.sources], inputs.query_groups,
            query_classes=range(8),
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.fault(number=2)
def test_offsets_beyond_int32_are_computed(attend):
    """Keys of a view whose last rows lie 2^31 elements behind the first."""
    rows, tokens = 2, 2**21
    wide = torch.empty(rows, tokens, 8, 80, dtype=torch.bfloat16, device="cuda")
    assert wide.numel() > 2**31
    key = wide[:, -64:].normal_()
    query = torch.randn(rows, 64, 8, 80, device="cuda").bfloat16()
    expected = attend(query, [Source(key.contiguous(), key.contiguous())])
    assert torch.equal(attend(query, [Source(key, key)]), expected)


@pytest.mark.fault(number=30)
def test_the_same_bits_every_time():
    attend = functools.partial(multi_source_attention, backend="triton")
    inputs, _ = case(visible=0.5, groups=2, key_bias=True)
    leaves = [x.clone().requires_grad_() for s in inputs.sources for x in (s.key, s.value)]
    sources = [s._replace(key=leaves[2 * i], value=leaves[2 * i + 1]) for i, s in enumerate(inputs.sources)]
    runs = []
    for _ in range(5):
        out = attend(inputs.query, sources, query_groups=inputs.query_groups)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


HEAD_DIMS = (40, 64, 80, 128, 160, 256)


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.fault(number=1)
def test_every_case_on_hopper(head_dim, dtype):
    run = functools.partial(multi_source_attention, backend="cuda")
    for one in (*CASES, *ORDERED_CASES):
        inputs = attention_inputs(replace(one, head_dim=head_dim), dtype, device="cuda")
        check_attention(run, inputs)
        check_attention(run, of_kinds(inputs, *MIXED))
    small = AttentionCase("small", queries=256, heads=8, head_dim=head_dim, keys=(256, 256, 256), rows=(None, None, 1))
    check_attention(run, attention_inputs(small, dtype, device="cuda"))  # split by keys


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper card")
@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
@pytest.mark.fault(number=14)
def test_numbers_that_leave_fp32_on_hopper(extreme):
    run = functools.partial(multi_source_attention, backend="cuda")
    for head_dim in HEAD_DIMS:
        check_attention(run, extreme_inputs(extreme, torch.bfloat16, "cuda", head_dim=head_dim, visible=0.5))


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper card")
def test_auto_takes_the_hopper_kernel_and_goes_there_as_it_is():
    inputs, plan = case(head_dim=64)
    call = (inputs.query, inputs.sources, None, None, False, plan)
    assert hopper.op_for(inputs.query) is ops.attention_flat_cuda
    direct = hopper.direct_call(ops.attention_flat_cuda, *call)
    assert direct is not None
    for backend in ("auto", "cuda"):
        assert torch.equal(multi_source_attention(inputs.query, inputs.sources, plan=plan, backend=backend), direct)
    leaf = inputs.query.clone().requires_grad_()
    multi_source_attention(leaf, inputs.sources, plan=plan).sum().backward()  # by Triton
    assert leaf.grad.isfinite().all()


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper card")
def test_a_compiled_call_on_hopper():
    inputs, plan = case(head_dim=64)
    compiled = torch.compile(lambda q: multi_source_attention(q, inputs.sources, plan=plan), fullgraph=True)
    expected = multi_source_attention(inputs.query, inputs.sources, plan=plan, backend="cuda")
    assert torch.equal(compiled(inputs.query), expected)
