"""Arguments of the wrong kind are named by every operator, and numbers beyond float32 are refused or saturate."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lr_kernels import (
    Source,
    adain,
    attention_with_token_maps,
    correspondence,
    merge_attention_states,
    multi_source_attention,
    plan_attention,
    reference,
    step_blend,
    subject_mask,
)
from lr_kernels.interop import scaled_dot_product_attention, transformers_attention
from lr_kernels.testing import assert_matches

MAX = torch.finfo(torch.float32).max
Q, K, V = torch.randn(1, 3, 1, 4), torch.randn(1, 5, 1, 4), torch.randn(1, 5, 1, 4)
S = Source(K, V)
MASKED = S._replace(key_mask=torch.ones(1, 5, dtype=torch.bool))
PLAN = plan_attention([MASKED.key_mask])
SAMPLE, TABLE = torch.randn(1, 4, 8, 8), torch.zeros(3, 1, 10)
ONE = torch.tensor([0])

ATTENTION = [
    (lambda: multi_source_attention(Q, [(K, V)]), r"sources\[0\]"),
    (lambda: multi_source_attention(Q, [Source(None, V)]), r"key\[0\]"),
    (lambda: multi_source_attention(Q, None), "sources"),
    (lambda: multi_source_attention(Q, (S for _ in range(1))), "sources"),
    (lambda: multi_source_attention(Q, [S], return_lse="x"), "return_lse"),
    (lambda: multi_source_attention(Q, [S._replace(weight=torch.zeros((), device="meta"))]), r"weight\[0\]"),
]
OTHERS = [
    *(
        (lambda part=part: multi_source_attention(Q, [MASKED], plan=PLAN._replace(**part)), f"plan.{next(iter(part))}")
        for part in ({"key_masks": None}, {"key_index": None}, {"stamp": "x"})
    ),
    (lambda: plan_attention(None), "key_masks"),
    (lambda: plan_attention([None], None, torch.ones(1, 3).byte(), query_classes=1), "query_classes"),
    (lambda: plan_attention([None], None, torch.ones(1, 3).byte(), query_classes=[[1]]), "query_classes"),
    (lambda: merge_attention_states(None, [Q[..., 0]]), "outs"),
    (lambda: merge_attention_states([Q], None), "lses"),
    (lambda: step_blend(SAMPLE, None, TABLE, 0), "predictions"),
    (lambda: step_blend(SAMPLE, [None], TABLE, 0), r"predictions\[0\]"),
    (lambda: step_blend(None, [SAMPLE], TABLE, 0), "sample"),
    (lambda: step_blend(SAMPLE, [SAMPLE], TABLE.numpy(), 0), "coefficients"),
    (lambda: step_blend(SAMPLE, [SAMPLE], TABLE, 0, noise=[1]), "noise"),
    (lambda: step_blend(SAMPLE, [SAMPLE], TABLE, 0, out="x"), "out"),
    (lambda: adain(Q, Q, eps="a"), "eps"),
    *(
        (lambda x=x: subject_mask(torch.rand(1, 1, 4, 4), **x), next(iter(x)))
        for x in ({"threshold": None}, {"threshold": 1j}, {"quantile": "a"}, {"smoothing": 1.0}, {"size": (4.5, 4)})
    ),
    *((lambda x=x: correspondence(K[:, :, 0], K[:, :, 0], grid=x), "grid") for x in (5, "ab", (2.5, 2))),
    *((lambda x=x: attention_with_token_maps(Q, Q, Q, ONE, scale=x), "scale") for x in ("a", 1j, math.nan, 1e300)),
    (lambda: scaled_dot_product_attention(Q, K, V, np.ones(5)), "attn_mask"),
    (lambda: scaled_dot_product_attention(Q, None, V), "key"),
    (lambda: transformers_attention(torch.nn.Module(), Q, K, V, [1]), "attention_mask"),
]


@pytest.mark.parametrize(("call", "name"), ATTENTION + OTHERS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.fault(number=7)
def test_an_argument_of_the_wrong_kind_is_named(call, name):
    with pytest.raises((TypeError, ValueError), match=rf"lr_kernels\.\w+: {name}: expected .*, got "):
        call()


@pytest.mark.parametrize(("call", "name"), ATTENTION, ids=[name for _, name in ATTENTION])
@pytest.mark.fault(number=7)
def test_also_under_autocast_and_inside_a_transform(call, name):
    def inside(x):
        with pytest.raises((TypeError, ValueError), match=rf": {name}: expected"):
            call()
        return x

    with torch.autocast("cpu"):
        inside(Q)
    torch.func.vjp(inside, Q)


@pytest.mark.fault(number=7)
def test_token_maps_are_checked_before_autocast_rounds():
    with torch.autocast("cpu"):
        assert attention_with_token_maps(*[Q.double()] * 3, ONE)[0].dtype == torch.float64
        with pytest.raises(TypeError, match="query: expected one of float32"):
            attention_with_token_maps(Q.int(), Q, Q, ONE)


@pytest.mark.fault(number=7)
def test_a_step_of_numpy_is_an_int():
    table = torch.randn(3, 1, 10)
    table[..., 3:5] = 0  # noise and history are not needed
    assert torch.equal(step_blend(SAMPLE, [SAMPLE], table, np.int64(1)), step_blend(SAMPLE, [SAMPLE], table, 1))


@pytest.mark.parametrize("name", ["logit_scale", "logit_bias", "weight"])
@pytest.mark.parametrize("x", [1e39, -1e39, 10**400])
@pytest.mark.fault(number=4)
def test_numbers_beyond_float32_are_refused(name, x):
    with pytest.raises(ValueError, match=rf"{name}\[0\]: expected a number that float32 holds"):
        multi_source_attention(Q, [S._replace(**{name: x})])
    with pytest.raises(ValueError, match="scale: expected a number that float32 holds"):
        multi_source_attention(Q, [S], scale=x)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.fault(number=4)
def test_float64_tables_beyond_float32_saturate(backend):
    wide = torch.tensor([[1e39, 0.0, -math.inf, -1e39, 1.0]], dtype=torch.float64)
    found = multi_source_attention(Q, [S._replace(key_bias=wide)], backend=backend)
    assert torch.equal(found, multi_source_attention(Q, [S._replace(key_bias=wide.clamp(max=MAX))], backend=backend))
    assert found.isfinite().all()


@pytest.mark.fault(number=4)
def test_the_reference_computes_outside_autocast():
    target = torch.randn(1, 64, 32), torch.randn(1, 64, 32)
    q = Q.clone().requires_grad_()
    calls = (
        lambda: reference.multi_source_attention(Q, [S]),
        lambda: reference.attention_with_token_maps(Q, K, V, ONE)[1],
        lambda: reference.cosine_similarity(*target),
    )
    out = multi_source_attention(q, [S])
    grad = torch.autograd.grad(out.sum(), q, create_graph=True)[0]
    plain = [call() for call in calls]
    with torch.autocast("cpu"):
        assert all(torch.equal(call(), x) for call, x in zip(calls, plain))
        assert torch.equal(torch.autograd.grad(out.sum(), q, create_graph=True)[0], grad)


@pytest.mark.parametrize("x", [-1e30, -1e6, -MAX, MAX])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.fault(number=28)
def test_the_gradient_through_lse_beside_huge_logits(x, backend):
    bias = torch.full((1, 5), x, requires_grad=True)
    lse = multi_source_attention(Q, [S._replace(key_bias=bias)], return_lse=True, backend=backend)[1]
    found = torch.autograd.grad(lse.sum(), bias, create_graph=True)[0]
    truth = Q.new_full((1, 5), x, dtype=torch.float64) * 0 + 3 / 5  # the bias rounds the scores away
    if abs(x) >= 1e30 and x not in (-MAX, MAX):
        assert torch.allclose(found.double(), truth)
    assert torch.allclose(found.sum(), torch.tensor(3.0))


@pytest.mark.fault(number=28)
def test_queries_that_see_nothing_have_gradients_of_zero():
    bias, query = torch.full((1, 5), -math.inf, requires_grad=True), Q.clone().requires_grad_()
    source = S._replace(key_bias=bias)
    out, lse = multi_source_attention(query, [source], return_lse=True)
    merged = merge_attention_states([out, out], [lse, lse])
    for results in ((out, lse), merged):
        for graph in (False, True):
            ones = [torch.ones_like(x) for x in results]
            for grad in torch.autograd.grad(results, [query, bias], ones, retain_graph=True, create_graph=graph):
                assert not grad.any()


@pytest.mark.fault(number=28)
def test_a_gradient_without_memory():
    query = Q.clone().requires_grad_()
    out = multi_source_attention(query, [S])
    assert not torch.autograd.grad(out, query, torch._efficientzerotensor(*out.shape))[0].any()


@pytest.mark.fault(number=28)
def test_rows_that_autograd_did_not_see_change_are_checked_again():
    rows, query = np.zeros(1, dtype=np.int64), Q.clone().requires_grad_()
    out = multi_source_attention(query, [S._replace(rows=torch.from_numpy(rows))])
    rows[:] = 7
    with pytest.raises(ValueError, match=r"rows\[0\]: expected -1 to 0"):
        torch.autograd.grad(out.sum(), query, create_graph=True)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((3, 2, 4, 8), (1, 2, 7, 8), (1, 2, 7, 8)), {"attn_mask": torch.arange(21).view(3, 1, 1, 7) % 3 > 0}),
        (((3, 2, 4, 8), (1, 2, 7, 8), (3, 2, 7, 8)), {}),
        (((3, 2, 4, 8), (3, 1, 7, 8), (3, 2, 7, 8)), {}),
        (((4, 5, 8), (2, 7, 8), (2, 7, 8)), {"enable_gqa": True}),
        (((1, 2, 1, 8),) * 3, {"is_causal": True}),
    ],
    ids=["mask", "batch", "heads", "gqa", "causal"],
)
@pytest.mark.fault(number=26)
def test_what_pytorch_broadcasts(shapes, options):
    given = [torch.randn(shape) for shape in shapes]
    truth = F.scaled_dot_product_attention(*(x.double() for x in given), **options)
    assert_matches(
        scaled_dot_product_attention(*given, **options), F.scaled_dot_product_attention(*given, **options), truth
    )


@pytest.mark.fault(number=26)
def test_masks_of_float64():
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.float64)
    mask[..., :4] = torch.finfo(torch.float64).min
    given = [x.double().transpose(1, 2) for x in (Q, K, V)]
    truth = F.scaled_dot_product_attention(*given, mask)
    assert torch.allclose(scaled_dot_product_attention(*given, mask), truth)
    mask[:] = torch.finfo(torch.float64).min
    found = scaled_dot_product_attention(*(x.float() for x in given), mask)
    assert torch.allclose(found, given[2].float().mean(2, keepdim=True).expand_as(found), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda n: adain(Q, Q[:, :1].expand(1, n, 1, 4), reference_mask=torch.ones(1, 1).bool().expand(1, n)), "x"),
        (lambda n: attention_with_token_maps(Q, Q, Q, ONE.expand(n)), "token_indices"),
        (
            lambda n: correspondence(Q[:, :, 0].expand(n, 3, 4), K[:, :, 0], radius=ONE.expand(n), grid=(1, 3)),
            "radius",
        ),
    ],
    ids=["adain", "token_maps", "correspondence"],
)
@pytest.mark.fault(number=9)
def test_copies_of_expanded_tables_are_counted(call, name):
    with pytest.raises(ValueError, match=rf"{name}: expected a call that fits the memory"):
        call(1 << 42)
