"""adain: the kernels against the specification in float64, masks, latents, and errors for wrong arguments."""

import math

import pytest
import torch
from draw import FLOATS, Arguments, Draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lr_kernels import adain, reference
from lr_kernels.testing import assert_matches, strided_randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "triton")
CASES = {  # (B, N, H, D), (R, M), share of x's tokens chosen, of the reference's
    "plain": ((2, 70, 3, 40), (2, 45), None, None),
    "shared-reference": ((3, 33, 2, 16), (1, 50), None, None),
    "masked": ((2, 60, 2, 24), (1, 45), 0.4, None),
    "both-masked": ((2, 200, 2, 7), (2, 90), 0.7, 0.3),
    "reference-masked": ((1, 9, 1, 160), (1, 300), None, 0.5),
    "one-token": ((2, 1, 2, 8), (2, 1), None, None),
    "d1": ((2, 40, 5, 1), (2, 41), 0.5, 0.5),
}

pytestmark = pytest.mark.usefixtures("device", "poisoned")


def make(case="masked", dtype=torch.float32, seed=0, device="cpu", mean=2.0):
    """Strided x and reference, and the masks as keyword arguments."""
    shape, (rows, tokens), own, other = CASES[case]
    g = torch.Generator().manual_seed(seed)
    x = mean + strided_randn(shape, g, torch.float32, gain=3.0)
    r = strided_randn((rows, tokens, *shape[2:]), g, torch.float32) - mean
    wide = torch.empty(rows, tokens, 2, *shape[2:], dtype=dtype)
    wide[:, :, 1] = r
    masks = {
        "mask": None if own is None else torch.rand(shape[0], shape[1], generator=g) < own,
        "reference_mask": None if other is None else torch.rand(1, tokens, generator=g) < other,
    }
    masks = {name: mask if mask is None else mask.to(device) for name, mask in masks.items()}
    return (x.to(dtype).to(device), wide.to(device)[:, :, 1]), masks


def place(backend, device):
    return device if backend == "triton" else "cpu"


def check(arguments, masks, backend):
    out = adain(*arguments, **masks, backend=backend)
    assert out.dtype == arguments[0].dtype
    exact = reference.adain(*(x.double() for x in arguments), **masks)
    assert_matches(out, reference.adain(*arguments, **masks), exact)
    return out


def right_call(draw: Draw) -> Arguments:
    batch, tokens, others = draw.size(0, 3), draw.size(0, 40), draw.size(0, 40)
    heads, channels, dtype = draw.size(1, 3), draw.size(1, 40), draw.random.choice(FLOATS)
    rows = draw.one_or(batch)
    x, reference = (draw.tokens(r, n, heads, channels, dtype=dtype) for r, n in ((batch, tokens), (rows, others)))
    masks = [draw.bits(draw.one_or(batch), n) if draw.often() else None for n in (tokens, others)]
    return [x, reference, *masks, 1e-5, torch.empty(x.shape, dtype=dtype)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.fault(number=1)
def test_matches_the_reference(case, dtype, backend, device):
    check(*make(case, dtype, device=place(backend, device)), backend)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 80), st.integers(0, 3), st.integers(0, 70)),
    tokens=st.integers(0, 80),
    share=st.none() | st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_any_shape(sizes, tokens, share, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x, r = torch.randn(sizes, generator=g).to(dtype), torch.randn(1, tokens, *sizes[2:], generator=g).to(dtype)
    mask = None if share is None else torch.rand(1, sizes[1], generator=g) < share
    check((x, r), {"mask": mask}, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_chosen_tokens_get_the_statistics_of_the_reference(backend, device):
    (x, r), masks = make("both-masked", device=place(backend, device))
    out = adain(x, r, **masks, eps=1e-12, backend=backend)
    for b in range(2):
        got, wanted = out[b][masks["mask"][b]].double(), r[b][masks["reference_mask"][0]].double()
        low = reference.adain(x, r, **masks, eps=1e-12)[b][masks["mask"][b]]
        assert_matches(got.mean(0).float(), low.mean(0), wanted.mean(0), "mean")
        assert_matches(got.std(0, False).float(), low.std(0, False), wanted.std(0, False), "deviation")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mean", [1e3, 1e5])
@pytest.mark.fault(number=14)
def test_a_mean_far_from_zero_does_not_cancel(mean, backend, device):
    check(*make("both-masked", device=place(backend, device), mean=mean), backend)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("empty", ["mask", "reference_mask"])
@pytest.mark.fault(number=10)
def test_an_empty_choice_leaves_its_row(empty, backend, device):
    (x, r), masks = make("both-masked", device=place(backend, device))
    expected = adain(x, r, **masks, backend=backend)
    masks["reference_mask"] = masks["reference_mask"].repeat(2, 1)
    masks[empty][1] = False
    out = adain(x, r, **masks, backend=backend)
    assert torch.equal(out[1], x[1]) and torch.equal(out[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.fault(number=11)
def test_other_tokens_are_unchanged_and_without_effect(backend, dtype, device):
    (x, r), masks = make("both-masked", dtype, device=place(backend, device))
    expected = adain(x, r, **masks, backend=backend)
    hidden, hidden_r = ~masks["mask"], ~masks["reference_mask"][0]
    assert torch.equal(expected[hidden], x[hidden])
    x[hidden], r[:, hidden_r] = math.nan, math.inf
    out = adain(x, r, **masks, backend=backend)
    assert torch.equal(out[~hidden], expected[~hidden]) and out[hidden].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.fault(number=12)
def test_live_nan_reaches_its_row_head_and_channel(value, backend, device):
    (x, r), masks = make("both-masked", device=place(backend, device))
    x[0, masks["mask"][0].nonzero()[5], 1, 3] = value
    r[1, masks["reference_mask"][0].nonzero()[5], 0, 2] = value
    out = check((x, r), masks, backend)
    broken = ~out.isfinite()
    expected = torch.zeros_like(broken)
    expected[0, masks["mask"][0], 1, 3] = expected[1, masks["mask"][1], 0, 2] = True
    assert torch.equal(broken, expected)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("sizes", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (2, 5, 2, 0)])
@pytest.mark.fault(number=9)
def test_empty_dimensions_give_empty_or_zero_results(sizes, backend, device):
    x = torch.randn(sizes, device=place(backend, device))
    assert adain(x, x, backend=backend).shape == sizes


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.fault(number=9)
def test_no_reference_tokens(backend, device):
    x = torch.randn(2, 5, 2, 8, device=place(backend, device))
    assert torch.equal(adain(x, x[:, :0], backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.fault(number=4)
@pytest.mark.fault(number=5)
def test_strides_and_odd_offsets_are_honoured(backend, device):
    (x, r), masks = make("masked", device=place(backend, device))
    expected = adain(x, r, **masks, backend=backend)
    odd = torch.empty(x.numel() + 1, device=x.device)[1:].view(x.shape).copy_(x)
    heads_first = r.transpose(1, 2).contiguous().transpose(1, 2)
    columns = torch.stack([masks["mask"], ~masks["mask"]], -1)[..., 0]
    for arguments in ((odd, r), (x.transpose(1, 2).contiguous().transpose(1, 2), r), (x, heads_first)):
        assert torch.equal(adain(*arguments, mask=masks["mask"], backend=backend), expected)
        assert torch.equal(adain(*arguments, mask=columns, backend=backend), expected)
    shared = masks["mask"][:1].expand(2, -1)
    expected = adain(x, r, mask=shared.clone(), backend=backend)
    for mask in (shared, shared[:1]):
        assert torch.equal(adain(x, r.expand(2, -1, -1, -1), mask=mask, backend=backend), expected)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_as_a_view(backend, dtype, masked, device):
    """(B, C, h, w) in and out without a copy: tokens are contiguous, channels are heads of one channel."""
    g = torch.Generator().manual_seed(0)
    latents, styled = (torch.randn(2, 4, 9, 11, generator=g).to(dtype).to(place(backend, device)) for _ in range(2))
    region = torch.rand(2, 9, 11, generator=g).to(latents.device) < 0.5
    views = [x.flatten(2).mT[..., None] for x in (latents, 2 * styled + 1)]
    masks = {"mask": region.flatten(1)} if masked else {}
    out = check(views, masks, backend)
    assert out.stride() == views[0].stride()
    back = out[..., 0].mT.unflatten(2, (9, 11))
    assert back.is_contiguous() and back.data_ptr() == out.data_ptr()
    if masked:
        assert torch.equal(back.permute(0, 2, 3, 1)[~region], latents.permute(0, 2, 3, 1)[~region])


@pytest.mark.fault(number=13)
def test_nothing_is_read_past_the_ends():
    (x, r), masks = make("masked")
    expected = adain(x, r, **masks, backend="cpu")
    padded = []
    for tensor in (x, r):
        memory = torch.full((tensor.shape[0], tensor.shape[1] + 9, 4, 50), math.nan)
        memory[:, : tensor.shape[1], :2, :24] = tensor
        padded.append(memory[:, : tensor.shape[1], :2, :24])
    assert torch.equal(adain(*padded, **masks, backend="cpu"), expected)


@pytest.mark.fault(number=30)
@pytest.mark.fault(number=31)
def test_threads_and_batch_order_do_not_change_a_bit():
    g = torch.Generator().manual_seed(0)
    x, r = (torch.randn(4, n, 4, 40, generator=g) for n in (300, 200))
    mask = torch.rand(4, 300, generator=g) < 0.5
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(adain(x, r, mask=mask, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(adain(x[order], r[order], mask=mask[order], backend="cpu"), results[0][order])


@pytest.mark.fault(number=28)
def test_gradients_use_the_reference():
    (x, r), masks = make("masked")
    r.requires_grad_()
    adain(x, r, **masks).square().sum().backward()
    assert r.grad.isfinite().all() and (r.grad != 0).any()
    with pytest.raises(NotImplementedError, match=r"adain: gradients: .*'cpu'.*'reference'"):
        adain(x, r, backend="cpu")
    small = torch.randn(1, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[True, True, False, True]])
    assert torch.autograd.gradcheck(lambda x, y: adain(x, y, mask=chosen, eps=0.1), (small, small.detach().exp()))


def test_float64_uses_the_reference():
    x = torch.randn(1, 4, 1, 2, dtype=torch.float64)
    assert adain(x, x).dtype == torch.float64


@pytest.mark.parametrize("case", ["plain", "both-masked"])
@pytest.mark.fault(number=26)
@pytest.mark.fault(number=27)
def test_passes_opcheck(case):
    (x, r), masks = make(case)
    out = torch.full(x.shape, math.nan)
    torch.library.opcheck(torch.ops.lr_kernels.adain_cpu.default, (x, r, *masks.values(), 1e-5, out))


@pytest.mark.fault(number=29)
def test_compiles_without_breaks_or_recompiles():
    compiled = torch.compile(adain, fullgraph=True, backend="aot_eager")
    (x, r), masks = make("both-masked")
    compiled(x, r, **masks)
    with torch._dynamo.config.patch(error_on_recompile=True):
        (x, r), masks = make("both-masked", seed=1)
        assert torch.equal(compiled(x, r, **masks), adain(x, r, **masks))


X, R = torch.zeros(2, 6, 3, 8), torch.zeros(1, 5, 3, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x: expected shape \(batch, tokens, heads, channels\)"),
        ({"x": X.int()}, TypeError, "x: expected one of float32"),
        ({"x": torch.zeros(2, 6, 8, 3).mT}, ValueError, "x: expected a contiguous last dimension"),
        ({"reference": R[0]}, ValueError, r"reference: expected shape \(2 or 1, tokens, 3, 8\)"),
        ({"reference": R.expand(3, -1, -1, -1)}, ValueError, r"reference: expected shape \(2 or 1, tokens, 3, 8\)"),
        ({"reference": R[..., :4]}, ValueError, r"reference: expected shape \(2 or 1, tokens, 3, 8\)"),
        ({"reference": R.half()}, TypeError, "reference: expected torch.float32, got torch.float16"),
        ({"reference": R.to("meta")}, ValueError, "reference: expected cpu, got meta"),
        ({"mask": torch.ones(2, 6)}, TypeError, "mask: expected torch.bool, got torch.float32"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2 or 1, 6\)"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2 or 1, 6\)"),
        ({"mask": torch.ones(1, 6, dtype=torch.bool, device="meta")}, ValueError, "mask: expected cpu, got meta"),
        ({"reference_mask": torch.ones(3, 5) > 0}, ValueError, r"reference_mask: expected shape \(2 or 1, 5\)"),
        ({"eps": 0.0}, ValueError, "eps: expected a number above 0, got 0.0"),
        ({"eps": math.nan}, ValueError, "eps: expected a number above 0, got nan"),
        ({"backend": "flash"}, ValueError, "backend: expected one of auto"),
        ({"backend": "cuda"}, RuntimeError, "backend: 'cuda' cannot run"),
        (
            {"x": X.double(), "reference": R.double(), "backend": "cpu"},
            TypeError,
            "x: expected one of float32, float16",
        ),
    ],
)
@pytest.mark.fault(number=7)
@pytest.mark.fault(number=17)
@pytest.mark.fault(number=18)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=rf"^lr_kernels\.adain: {message}"):
        adain(**({"x": X, "reference": R} | changes))
