"""Gradients of multi_source_attention."""

import math
import resource
import subprocess
import sys

import pytest
import torch
from draw import Arguments, Draw, drawn_attention
from torch._dynamo.testing import CompileCounterWithBackend

from lr_kernels import Source, multi_source_attention, plan_attention, reference
from lr_kernels.testing import (
    CASES,
    EXTREMES,
    ORDERED_CASES,
    AttentionCase,
    attention_inputs,
    check_attention_backward,
    extreme_inputs,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on(backend):
    def run(query, sources, **kwargs):
        return multi_source_attention(query, sources, backend=backend, **kwargs)

    return run


def random_source(rows, keys, heads=2, head_dim=16, dtype=torch.float32):
    return Source(*(torch.randn(rows, keys, heads, head_dim, dtype=dtype) for _ in range(2)))


def right_call(draw: Draw) -> Arguments:
    shape, inputs = drawn_attention(draw)
    query, key, value, bias = inputs[0], inputs[1], inputs[2], inputs[9]
    grad_lse = draw.tensor(*shape[:3]) if draw.rarely() else None
    out, grad_out = (draw.tokens(*shape, dtype=query.dtype) for _ in range(2))
    lse = draw.tensor(*shape[:3]).double()
    gradients = [[torch.zeros(x.shape) for x in kind] for kind in (key, value)]
    of_bias = [torch.zeros(shape[2], *x.shape) if x is not None and draw.often() else torch.zeros(0) for x in bias]
    grad_query = torch.empty(query.shape, dtype=query.dtype)
    return [grad_out, grad_lse, *inputs, 0.3, out, lse, grad_query, *gradients, of_bias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (*CASES, *ORDERED_CASES), ids=lambda c: c.id)
@pytest.mark.fault(number=28)
def test_gradients_match_the_formula(case, dtype):
    check_attention_backward(on("cpu"), attention_inputs(case, dtype))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.fault(number=28)
def test_a_bias_that_rows_share_in_memory_has_a_gradient_per_row(rows):
    """A leaf that was expanded before it required gradients: its rows lie in one place, their gradients do not."""
    torch.manual_seed(0)
    query, source = torch.randn(3, 5, 2, 16), random_source(3, 7)
    shared = torch.randn(1, 7).expand(rows, 7)
    found = {}
    for backend in ("cpu", "reference"):
        bias = shared.detach().requires_grad_()
        assert rows == 1 or bias.stride(0) == 0
        out = multi_source_attention(query, [source._replace(key_bias=bias)], backend=backend)
        (found[backend],) = torch.autograd.grad(out.square().sum(), bias)
    torch.testing.assert_close(found["cpu"], found["reference"])


@pytest.mark.parametrize("case", (*CASES, *ORDERED_CASES), ids=lambda c: c.id)
@pytest.mark.fault(number=28)
def test_the_formula_is_the_derivative_of_the_reference(case):
    """The explicit backward formula against autograd through the reference, both in float64."""
    inputs = attention_inputs(case, torch.float64)
    leaves = [inputs.query.requires_grad_()]
    sources = []
    for s in inputs.sources:
        own = {
            k: getattr(s, k).double().requires_grad_()
            for k in ("key", "value", "key_bias")
            if getattr(s, k) is not None
        }
        leaves += own.values()
        sources.append(s._replace(**own))
    out = reference.multi_source_attention(inputs.query, sources, query_groups=inputs.query_groups)
    grad_out = torch.randn_like(out)
    query, parts = reference.multi_source_attention_backward(
        grad_out, inputs.query, sources, query_groups=inputs.query_groups
    )
    formula = [query, *(x for per_source in parts for x in per_source if x is not None)]
    for expected, got in zip(torch.autograd.grad(out, leaves, grad_out), formula, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.fault(number=28)
def test_gradcheck_of_the_reference():
    inputs = attention_inputs(
        AttentionCase("small", queries=4, keys=(5, 3), head_dim=3, key_bias=True, visible=0.7), torch.float64
    )
    leaves = [inputs.query.requires_grad_()]
    for s in inputs.sources:
        leaves += [s.key.requires_grad_(), s.value.requires_grad_(), s.key_bias.double().requires_grad_()]

    def run(query, *parts):
        sources = [
            s._replace(key=parts[3 * i], value=parts[3 * i + 1], key_bias=parts[3 * i + 2])
            for i, s in enumerate(inputs.sources)
        ]
        return multi_source_attention(query, sources, return_lse=True)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
@pytest.mark.fault(number=28)
def test_every_instruction_set(isa, monkeypatch):
    code = (
        "import torch, lr_kernels as lr; from lr_kernels.testing import *\n"
        "run = lambda *a, **k: lr.multi_source_attention(*a, backend='cpu', **k)\n"
        "for case in CASES + ORDERED_CASES:\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        check_attention_backward(run, attention_inputs(case, dtype))\n"
    )
    monkeypatch.setenv("LR_KERNELS_ISA", isa)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
@pytest.mark.fault(number=28)
def test_extreme_logits_of_all_visible_keys(extreme, dtype):
    """Where the log of the sum is lost beside the largest logit: a softmax of what the rounding leaves."""
    check_attention_backward(on("cpu"), extreme_inputs(extreme, dtype, visible=0.6))


@pytest.mark.fault(number=28)
def test_extreme_logits_of_some_queries_leave_the_others_alone():
    """One tile holds both: batch row 1 and a class of queries see extreme biases only, or one among ordinary ones."""
    inputs = extreme_inputs(("key_bias", -1e30), torch.float32, groups=2)
    for s in inputs.sources:
        s.key_bias[0], s.key_bias[-1, ::3] = 0.5, 1.0
    check_attention_backward(on("cpu"), inputs)


@pytest.mark.fault(number=28)
def test_only_what_asks_for_a_gradient_gets_one():
    query, source = torch.randn(1, 5, 2, 16), random_source(1, 7)
    assert not multi_source_attention(query, [source], backend="cpu").requires_grad
    with torch.no_grad():
        assert not multi_source_attention(query.clone().requires_grad_(), [source], backend="cpu").requires_grad
    key = source.key.clone().requires_grad_()
    out = multi_source_attention(query, [source._replace(key=key)], backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), key)
    assert grad.shape == key.shape and grad.dtype == key.dtype


@pytest.mark.parametrize("name", ["logit_scale", "logit_bias", "weight"])
@pytest.mark.fault(number=28)
def test_a_gradient_that_the_kernel_lacks_is_refused_or_goes_to_the_reference(name):
    query, source = torch.randn(1, 5, 2, 16), random_source(1, 7)
    source = source._replace(**{name: torch.ones(1, requires_grad=True)})
    with pytest.raises(
        NotImplementedError,
        match=rf"gradients of {name}\[0\]: not supported by backend 'cpu'; supported by 'reference'",
    ):
        multi_source_attention(query, [source], backend="cpu")
    out = multi_source_attention(query, [source])
    (grad,) = torch.autograd.grad(out.square().sum(), getattr(source, name))
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["logit_scale", "logit_bias", "weight"])
@pytest.mark.fault(number=28)
def test_strengths_changed_before_the_backward_pass_are_an_error(name):
    query, source, strength = torch.randn(1, 5, 2, 16, requires_grad=True), random_source(1, 7), torch.ones(1)
    out = multi_source_attention(query, [source._replace(**{name: strength})], backend="cpu")
    strength.fill_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.fault(number=10)
def test_a_query_that_sees_nothing_gets_and_gives_no_gradient():
    query = torch.randn(2, 6, 2, 16, requires_grad=True)
    key, value = (x.requires_grad_() for x in random_source(2, 9)[:2])
    groups = torch.tensor([[1, 2, 1, 2, 0, 1]], dtype=torch.uint8)
    source = Source(key, value, key_groups=torch.ones(1, 9, dtype=torch.uint8))
    out, lse = multi_source_attention(query, [source], query_groups=groups, return_lse=True, backend="cpu")
    assert (lse[:, groups[0] != 1] == -math.inf).all()
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, groups[0] != 1] == 0).all()
    nobody = Source(key, value, key_mask=torch.zeros(1, 9, dtype=torch.bool))
    grads = torch.autograd.grad(multi_source_attention(query, [nobody], backend="cpu").sum(), (query, key, value))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=11)
def test_nan_in_hidden_keys_leaves_gradients_alone(dtype):
    inputs = attention_inputs(AttentionCase("masked", visible=0.5, groups=2), dtype)

    def gradients(poison):
        leaves, sources = [], []
        for s in inputs.sources:
            hidden = ~s.key_mask.expand(s.key.shape[0], -1)
            parts = [x.clone() for x in (s.key, s.value)]
            if poison:
                parts[0][hidden], parts[1][hidden] = math.nan, math.inf
            leaves += [x.requires_grad_() for x in parts]
            sources.append(s._replace(key=parts[0], value=parts[1]))
        out = multi_source_attention(inputs.query, sources, query_groups=inputs.query_groups, backend="cpu")
        return torch.autograd.grad(out.square().sum(), leaves)

    for clean, poisoned in zip(gradients(False), gradients(True)):
        assert torch.equal(clean, poisoned)


@pytest.mark.fault(number=26)
@pytest.mark.fault(number=27)
def test_the_backward_op_passes_opcheck():
    inputs = attention_inputs(CASES[-1], torch.float32)
    query, sources = inputs.query, inputs.sources
    plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], inputs.query_groups)
    out, lse = multi_source_attention(query, sources, query_groups=inputs.query_groups, return_lse=True)
    none = [None] * len(sources)
    arguments = (
        torch.randn_like(out), torch.randn_like(lse), query, [s.key for s in sources], [s.value for s in sources],
        [s.rows for s in sources], list(plan.key_index), list(plan.key_count), [1] * len(sources), none, none,
        [s.key_bias for s in sources], none, none, plan.query_order, plan.class_start, 0, 0.3,
        out, lse.double(), torch.empty_like(out),
        *([torch.zeros(getattr(s, name).shape) for s in sources] for name in ("key", "value")),
        [torch.zeros(query.shape[2], *s.key_bias.shape) for s in sources],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.lr_kernels.multi_source_attention_backward_cpu.default, arguments)


@pytest.mark.fault(number=29)
def test_a_training_step_compiles_without_break_or_recompile():
    def loss(query, key, value, mask):
        sources = [Source(key, value), Source(key[:1], value[:1], key_mask=mask)]
        return multi_source_attention(query, sources, backend="cpu").square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        leaves = [torch.randn(2, 32, 2, 16, generator=g, requires_grad=True) for _ in range(3)]
        mask = torch.rand(1, 32, generator=g) < 0.5
        grads = torch.autograd.grad(compiled(*leaves, mask), leaves)
        for got, expected in zip(grads, torch.autograd.grad(loss(*leaves, mask), leaves)):
            assert torch.equal(got, expected)
    assert counter.frame_count == 1


@pytest.mark.fault(number=30)
def test_gradients_are_bitwise_the_same_over_runs_and_threads():
    inputs = attention_inputs(CASES[-1], torch.float32)
    leaves = [x.clone().requires_grad_() for s in inputs.sources for x in (s.key, s.value)]
    sources = [s._replace(key=leaves[2 * i], value=leaves[2 * i + 1]) for i, s in enumerate(inputs.sources)]
    threads, results = torch.get_num_threads(), []
    try:
        for run in range(12):
            torch.set_num_threads(1 + run % 4)
            out = multi_source_attention(inputs.query, sources, query_groups=inputs.query_groups, backend="cpu")
            results.append(torch.autograd.grad(out.square().sum(), leaves))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.fault(number=44)
def test_a_training_step_stores_no_scores():
    """4,096 queries and 8,192 keys with 4 heads: the scores alone take 512 MiB; the process gets 300."""
    code = (
        "import resource, torch, lr_kernels as lr\n"
        "torch.set_num_threads(2)\n"
        "def step(n):\n"
        "    q, k, v = (torch.randn(1, m, 4, 32, requires_grad=True) for m in (n, 2 * n, 2 * n))\n"
        "    out = lr.multi_source_attention(q, [lr.Source(k, v)], backend='cpu')\n"
        "    return torch.autograd.grad(out.sum(), (q, k, v))\n"
        "step(64)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))\n"
        "assert all(g.isfinite().all() for g in step(4096))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.fault(number=44)
def test_a_request_beyond_the_memory_is_refused_before_allocating():
    query = torch.randn(1, 1, 1, 256).expand(2**15, 2**12, 8, 256)
    source = Source(torch.randn(1, 7, 8, 256), torch.randn(1, 7, 8, 256))
    with pytest.raises(ValueError, match=r"query: expected a call that fits the memory, got one that needs 1024.0 GiB"):
        multi_source_attention(query, [source])
    wide = torch.randn(1, 1, 1, 8).expand(1, 2**18, 1, 8)
    with pytest.raises(
        ValueError, match=r"backend 'reference': expected .* needs 768.0 GiB, limit .*; split the batch"
    ):
        multi_source_attention(wide, [Source(wide, wide)], backend="reference")


@pytest.mark.fault(number=44)
def test_the_limit_of_the_process_counts():
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (40 * 2**30, limit[1]))
    try:
        from lr_kernels.runtime.checks import memory_limit

        assert memory_limit(torch.device("cpu")) <= 40 * 2**30
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
