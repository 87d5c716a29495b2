"""Numbers at the ends of fp32, tensors whose memory does not hold their values, stale plans and oversized requests."""

import copy
import math

import pytest
import torch
from attention_oracle import attention

from lr_kernels import (
    Source,
    adain,
    attention_with_token_maps,
    blend_schedule,
    correspondence,
    merge_attention_states,
    multi_source_attention,
    plan_attention,
    reference,
    sigma_coefficients,
    step_blend,
    step_coefficients,
    subject_mask,
)
from lr_kernels.testing import assert_lse_matches, assert_matches

MAX = torch.finfo(torch.float32).max
BACKENDS = ("cpu", "triton", "reference")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = randn(2, 8, 2, 16), randn(2, 9, 2, 16, seed=1), randn(2, 9, 2, 16, seed=2)


def bias(first: float, rest: float = 0.0) -> torch.Tensor:
    return torch.tensor([[first] + [rest] * 8])


def source(**changes) -> Source:
    return Source(K, V)._replace(**changes)


CALLS = {
    **{f"logit_bias {x:.3g}": ([source(logit_bias=x)], {}) for x in (-2e38, -3e38, -MAX, MAX, 1e30)},
    "two shifts": ([source(logit_bias=-2.5e38), source(logit_bias=-3e38)], {}),
    "largest and smallest shift": ([source(logit_bias=-MAX), source(logit_bias=MAX)], {}),
    "smallest key_bias": ([source(key_bias=bias(-MAX, -MAX))], {}),
    "one smallest key_bias": ([source(key_bias=bias(-MAX))], {}),
    "one largest key_bias": ([source(key_bias=bias(MAX))], {}),
    "biases beyond fp32": ([source(key_bias=bias(-3e38, -MAX), logit_bias=-MAX)], {}),
    "biases that cancel": ([source(key_bias=bias(-MAX, -MAX), logit_bias=MAX)], {}),
    "largest scores": ([source(key=1.5e18 * K)], {"query": 1e19 * Q, "scale": 1.0}),
    "smallest scores": ([source(key=-1.5e18 * K.abs())], {"query": 1e19 * Q.abs(), "scale": 1.0}),
    "products beyond fp32": ([source(key=1e19 * K)], {"query": 1e19 * Q}),
    "one query of largest scores": (
        [source(key=1e19 * K)],
        {"query": torch.cat([1e19 * Q[:, :1], 1e-19 * Q[:, 1:]], 1)},
    ),
    "values whose sum is beyond fp32": ([Source(randn(2, 200, 2, 16), torch.full((2, 200, 2, 16), 1e37))], {}),
    "largest scale": ([source()], {"scale": MAX}),
    "smallest scale": ([source()], {"scale": -MAX}),
    "tiny scale": ([source()], {"scale": 1e-40}),
    "a late peak": ([source(key=torch.cat([0 * K[:, :8], 40 * K[:, 8:]], 1))], {"query": 4 * Q.sign(), "scale": 1.0}),
    "softmax groups": (
        [source(logit_bias=-MAX), source(softmax_group=1), source(key_bias=bias(MAX), softmax_group=2)],
        {},
    ),
    "infinite key_bias": ([source(key_bias=bias(math.inf))], {}),
    "key_bias NaN": ([source(key_bias=bias(math.nan))], {}),
    "infinities that cancel": ([source(key_bias=bias(math.inf), logit_bias=-math.inf)], {}),
    "infinities that cancel, of one row": (
        [source(key_bias=bias(-math.inf), logit_bias=torch.tensor([math.inf, 0]))],
        {},
    ),
    "all hidden by -inf": ([source(logit_bias=-math.inf)], {}),
    "a NaN with a payload": ([source(key=K.clone())], {}),
}
CALLS["a NaN with a payload"][0][0].key[0, 3, 0, 0] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.fault(number=15)
def test_the_ends_of_fp32(name, backend, device):
    """Finite logits of any size keep their order; what is not finite reaches the rows that see it."""
    sources, arguments = CALLS[name]
    arguments = {"query": Q, "scale": None} | arguments
    one_group = len({s.softmax_group for s in sources}) == 1
    out, lse, _ = attention(sources=sources, **arguments)
    truth, lse = torch.from_numpy(out), torch.from_numpy(lse)
    lse = torch.where(lse.isinf(), lse, lse.clamp(-MAX, MAX))  # saturates: -inf is a query that sees nothing
    query, scale = arguments["query"], arguments["scale"]
    low = reference.multi_source_attention(query, sources, scale=scale, return_lse=True)
    if backend == "triton":
        query = query.to(device)
        sources = [Source(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in s)) for s in sources]
    found = multi_source_attention(query, sources, scale=scale, return_lse=one_group, backend=backend)
    assert_matches((found[0] if one_group else found).cpu(), low[0], truth)
    if one_group:
        assert_lse_matches(found[1].cpu(), low[1], lse, torch.float32)
        assert torch.equal(found[1].cpu() == math.inf, lse == math.inf)


TEXT, SUM = randn(1, 200, 1, 16), torch.full((1, 200, 1, 16), 1e37)
MAPS = {  # query, key, value, scale
    "values whose sum is beyond fp32": (Q[:1, :, :1], TEXT, SUM, None),
    "largest scores": (1e19 * Q, 1.5e18 * K, V, 1.0),
    "smallest scores": (1e19 * Q.abs(), -1.5e18 * K.abs(), V, 1.0),
    "products beyond fp32": (1e19 * Q, 1e19 * K, V, None),
    "largest scale": (Q, K, V, MAX),
    "smallest scale": (Q, K, V, -MAX),
    "tiny scale": (Q, K, V, 1e-40),
    "scale 0": (Q, K, V, 0.0),
    "negative scale": (Q, K, V, -0.5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.fault(number=15)
def test_token_maps_at_the_ends_of_fp32(name, backend, device):
    *inputs, scale = MAPS[name]
    chosen = torch.tensor([3, 5])
    low = reference.attention_with_token_maps(*inputs, chosen, scale=scale)
    truth = reference.attention_with_token_maps(*(x.double() for x in inputs), chosen, scale=scale)
    assert all(x.isfinite().all() for x in truth)
    where = device if backend == "triton" else "cpu"
    inputs = [x.to(where) for x in (*inputs, chosen)]
    found = attention_with_token_maps(*inputs, scale=scale, backend=backend)
    for ours, spec, exact in zip(found, low, truth):
        assert_matches(ours.cpu(), spec, exact)


@pytest.mark.fault(number=15)
def test_a_scale_that_fp32_cannot_hold_is_refused():
    for scale in (1e300, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale: expected a number that float32 holds"):
            multi_source_attention(Q, [source()], scale=scale)


# ---- tensors whose memory does not hold their values ----

TABLE = step_coefficients(
    torch.linspace(0.9, 0.1, 10), [7, 4, 1], final_alpha_cumprod=1.0, guidance_scale=None, eta=1.0
)
SAMPLE = randn(2, 4, 8, 8)
LATENTS = {"background": SAMPLE, "mask": SAMPLE[:, 0].sigmoid(), "noise": SAMPLE}
INTEGERS = torch.tensor([1, 0])


def blend(**changes):
    arguments = {"sample": SAMPLE, "predictions": [SAMPLE], "coefficients": TABLE, "step": 0, **LATENTS} | changes
    return step_blend(**arguments)


def grouped(groups: torch.Tensor):
    return multi_source_attention(Q, [source(key_groups=torch.ones(1, 9, dtype=torch.uint8))], query_groups=groups)


def attend(**changes):
    arguments = {"query": Q} | {k: v for k, v in changes.items() if k == "query"}
    return multi_source_attention(**arguments, sources=[source(**{k: v for k, v in changes.items() if k != "query"})])


ARGUMENTS = {
    **{name: (lambda x, name=name: attend(**{name: x}), value) for name, value in {
        "query": Q, "key": K, "value": V, "rows": INTEGERS, "key_bias": randn(1, 9), "logit_scale": randn(2),
        "logit_bias": randn(2, 2), "weight": randn(2, 8), "value_index": torch.arange(9)[None].flip(1),
    }.items()},
    **{name: (lambda x, name=name: blend(**{name: x}), value) for name, value in {
        "sample": SAMPLE, "coefficients": TABLE, **LATENTS,
    }.items()},
    "predictions": (lambda x: blend(predictions=[x]), SAMPLE),
    "step": (lambda x: blend(step=x), torch.tensor(1)),
    "x": (lambda x: adain(x, K), Q),
    "reference": (lambda x: adain(Q, x), K),
    "outs": (lambda x: merge_attention_states([x, Q], [Q[..., 0]] * 2), Q),
    "lses": (lambda x: merge_attention_states([Q, -Q], [x, Q[..., 0]]), Q[..., 0]),
    "target": (lambda x: correspondence(x, K[:, :, 0]), Q[:, :, 0]),
    "features": (lambda x: correspondence(Q[:, :, 0], x), K[:, :, 0]),
    "maps": (subject_mask, SAMPLE),
    "token query": (lambda x: attention_with_token_maps(x, K, V, INTEGERS), Q),
    "token key": (lambda x: attention_with_token_maps(Q, x, V, INTEGERS), K),
    "token value": (lambda x: attention_with_token_maps(Q, K, x, INTEGERS), V),
    "token_indices": (lambda x: attention_with_token_maps(Q, K, V, x), INTEGERS),
    "sigmas": (lambda x: sigma_coefficients(x, solver="euler", guidance_scale=None), torch.tensor([3.0, 2.0, 0.5])),
    "timesteps": (
        lambda x: step_coefficients(TABLE[0, 0].sigmoid(), x, final_alpha_cumprod=1.0, guidance_scale=1.0),
        INTEGERS[:1],
    ),
}  # fmt: skip


def same(found, expected) -> bool:
    found, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected))
    return all(torch.equal(x, y) for x, y in zip(found, expected))


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.fault(number=4)
def test_a_lazy_negative_counts_as_its_value(name):
    run, x = ARGUMENTS[name]
    assert same(run(torch._neg_view(-x)), run(x))


@pytest.mark.parametrize("name", [x for x in ARGUMENTS if x not in ("sigmas", "timesteps")])
@pytest.mark.fault(number=4)
def test_a_zero_without_memory_counts_as_zeros(name):
    run, x = ARGUMENTS[name]
    assert same(run(torch._efficientzerotensor(x.shape, dtype=x.dtype)), run(torch.zeros_like(x)))


@pytest.mark.fault(number=4)
def test_imaginary_parts_of_conjugates_and_parameters():
    weight = torch.complex(randn(2, 8), randn(2, 8, seed=1)).conj().imag
    assert weight.is_neg() and torch.equal(attend(weight=weight), attend(weight=-randn(2, 8, seed=1)))
    with torch.no_grad():
        assert torch.equal(attend(key=torch.nn.Parameter(V)), attend(key=V))


@pytest.mark.fault(number=4)
def test_an_output_must_have_memory():
    with pytest.raises(ValueError, match="out: expected a tensor with memory of its own"):
        blend(out=torch._neg_view(torch.empty_like(SAMPLE)))


@pytest.mark.parametrize(
    "odd",
    [lambda x: x.to_sparse(), lambda x: torch.nested.nested_tensor(list(x.unbind()))],
    ids=["sparse", "nested"],
)
@pytest.mark.parametrize("name", [x for x in ARGUMENTS if x not in ("step", "timesteps", "sigmas", "rows")])
@pytest.mark.fault(number=4)
def test_a_tensor_without_strides_is_refused_by_name(name, odd):
    run, x = ARGUMENTS[name]
    with pytest.raises((ValueError, TypeError), match=r"lr_kernels\.\w+: [\w\[\]']+: expected .* tensor, got"):
        run(odd(x))


@pytest.mark.fault(number=18)
def test_tensors_without_data_are_refused_by_name():
    with pytest.raises(ValueError, match="query: expected a tensor with data, got one on the device meta"):
        multi_source_attention(Q.to("meta"), [Source(K.to("meta"), V.to("meta"))])
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(2, 9, 2, 16)
    with pytest.raises(ValueError, match=r"key\[0\]: expected a tensor with data, got a FakeTensor"):
        attend(key=fake)


# ---- plans ----


def mask() -> torch.Tensor:
    return torch.arange(9)[None] < 4


def planned(mask: torch.Tensor, plan) -> torch.Tensor:
    return multi_source_attention(Q, [source(key_mask=mask)], plan=plan)


def assign(x: torch.Tensor, data: torch.Tensor) -> None:
    x.data = data


CHANGES = {
    "in place": lambda x: x.logical_not_(),
    "through a view": lambda x: x[:, :1].fill_(False),
    "other data": lambda x: assign(x, ~mask()),
    "other shape": lambda x: assign(x, mask().expand(2, 9)),
    "resized": lambda x: x.resize_(2, 9),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.fault(number=33)
def test_a_plan_of_a_changed_mask_is_refused(change, backend):
    x = mask()
    plan = plan_attention([x])
    planned(x, plan)
    CHANGES[change](x)
    with pytest.raises(
        ValueError, match=r"plan: expected a plan of key_mask\[0\] as it is now, got .*; build the plan"
    ):
        multi_source_attention(Q, [source(key_mask=x)], plan=plan, backend=backend)
    assert torch.equal(planned(x, plan_attention([x])), multi_source_attention(Q, [source(key_mask=x)]))


@pytest.mark.fault(number=33)
def test_a_plan_of_changed_groups_is_refused():
    queries, keys = torch.ones(1, 8, dtype=torch.uint8), torch.ones(1, 9, dtype=torch.uint8)
    plan = plan_attention([None], [keys], queries)
    queries.add_(1)
    with pytest.raises(ValueError, match="a plan of query_groups as it is now"):
        multi_source_attention(Q, [source(key_groups=keys)], query_groups=queries, plan=plan)


@pytest.mark.fault(number=33)
def test_plans_of_inference_tensors_and_copies_of_plans_work():
    with torch.inference_mode():
        x = mask()
        plan = plan_attention([x])
        inside = planned(x, plan)
    copied = copy.deepcopy(plan)
    assert torch.equal(inside, planned(x, plan)) and torch.equal(inside, planned(copied.key_masks[0], copied))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"key_index": ()}, "key_index: expected 1 entries, got 0"),
        (lambda p: {"key_index": (None,)}, r"key_index\[0\]: expected a tensor, got NoneType"),
        (lambda p: {"key_index": (p.key_index[0][..., :5],)}, r"key_index\[0\]: expected shape \(1, 1, \d, 9\)"),
        (lambda p: {"key_index": (p.key_index[0].long(),)}, r"key_index\[0\]: expected torch.int32, got torch.int64"),
        (lambda p: {"key_index": (p.key_index[0].to("meta"),)}, r"key_index\[0\]: expected cpu, got meta"),
        (lambda p: {"key_count": ([4],)}, r"key_count\[0\]: expected a tensor, got list"),
        (lambda p: {"key_count": (torch.ones(2, 3, dtype=torch.int32),)}, r"key_count\[0\]: expected shape \(1, 1, \d"),
        (lambda p: {"query_order": torch.zeros(1, 8, dtype=torch.int32)}, "query_order: expected None, got Tensor"),
    ],
)
@pytest.mark.fault(number=7)
def test_replaced_lists_of_a_plan_are_checked(change, message):
    x = mask()
    plan = plan_attention([x])
    with pytest.raises((ValueError, TypeError), match=r"plan\." + message):
        planned(x, plan._replace(**change(plan)))


# ---- memory ----

WIDE = torch.zeros(1, 1, 1, 64).expand(2**20, 2**12, 8, 64)
FLAT = torch.zeros(1, 1, 8).expand(2**20, 2**14, 8)
LONG = torch.zeros(1, 1, 8).expand(1, 2**20, 8)
OVERSIZED = {
    "multi_source_attention": lambda: multi_source_attention(WIDE, [Source(WIDE[:1], WIDE[:1])]),
    "plan_attention": lambda: plan_attention([torch.ones(1, 1, dtype=torch.bool).expand(2**20, 2**20)]),
    "adain": lambda: adain(WIDE, WIDE[:1]),
    "correspondence": lambda: correspondence(FLAT, FLAT),
    "correspondence reference": lambda: correspondence(LONG, LONG, backend="reference"),
    "subject_mask": lambda: subject_mask(WIDE),
    "subject_mask size": lambda: subject_mask(torch.zeros(1, 1, 2, 2), size=(2**22, 2**22)),
    "merge_attention_states": lambda: merge_attention_states([WIDE], [WIDE[..., 0]]),
    "attention_with_token_maps": lambda: attention_with_token_maps(WIDE, WIDE[:, :2], WIDE[:, :2], INTEGERS),
    "attention_with_token_maps reference": lambda: attention_with_token_maps(
        WIDE[:256], WIDE[:256], WIDE[:256], INTEGERS, backend="reference"
    ),
    "step_blend": lambda: step_blend(WIDE, [WIDE], TABLE, 0),
    "step_coefficients": lambda: step_coefficients(
        TABLE[0, 0].sigmoid(), INTEGERS[:1].expand(2**40), final_alpha_cumprod=1.0, guidance_scale=None
    ),
    "sigma_coefficients": lambda: sigma_coefficients(torch.ones(1).expand(2**40), solver="euler", guidance_scale=None),
    "blend_schedule": lambda: blend_schedule("hard", 2**40, 1),
}


@pytest.mark.parametrize("name", OVERSIZED)
@pytest.mark.fault(number=44)
def test_a_request_beyond_the_memory_is_refused(name):
    with pytest.raises(ValueError, match=r"expected a call that fits the memory, got one that needs [\d.]+ GiB, limit"):
        OVERSIZED[name]()
