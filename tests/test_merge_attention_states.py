"""merge_attention_states: the kernels against the specification in float64, and errors for wrong arguments."""

import math

import pytest
import torch
from draw import FLOATS, Arguments, Draw

from lr_kernels import merge_attention_states, reference
from lr_kernels.testing import assert_matches, strided_randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "triton")
CASES = {  # K, (B, N, H, D)
    "one-part": (1, (2, 9, 2, 16)),
    "three-d40": (3, (2, 70, 3, 40)),
    "sixteen-d64": (16, (1, 20, 2, 64)),
    "d1": (2, (2, 5, 3, 1)),
    "d7": (5, (1, 33, 2, 7)),
    "d160": (2, (3, 12, 1, 160)),
}

pytestmark = pytest.mark.usefixtures("device", "poisoned")


def make(parts, shape, dtype=torch.float32, seed=0, device="cpu"):
    """Strided outs and lses; every fourth row of a part is empty."""
    g = torch.Generator().manual_seed(seed)
    outs = [strided_randn(shape, g, dtype).to(device) for _ in range(parts)]
    lses = [3 * torch.randn(*shape[:2], 2, shape[2], generator=g)[:, :, 1] for _ in range(parts)]
    for lse in lses:
        lse[torch.rand(lse.shape, generator=g) < 0.25] = -math.inf
    return outs, [x.to(device) for x in lses]


def place(backend, device):
    return device if backend == "triton" else "cpu"


def doubled(outs, lses):
    return [x.double() for x in outs], [x.double() for x in lses]


def check(outs, lses, backend):
    out, lse = merge_attention_states(outs, lses, backend=backend)
    assert out.dtype == outs[0].dtype and lse.dtype == torch.float32
    out64, lse64 = reference.merge_attention_states(*doubled(outs, lses))
    low = reference.merge_attention_states(outs, lses)
    assert_matches(out, low[0], out64, "out")
    assert_matches(lse, low[1], lse64, "lse")
    kinds = torch.stack([lse64.isnan(), lse64 == math.inf, lse64 == -math.inf])
    assert torch.equal(torch.stack([lse.isnan(), lse == math.inf, lse == -math.inf]), kinds)


def right_call(draw: Draw) -> Arguments:
    shape, dtype = (draw.size(0, 3), draw.size(0, 20), draw.size(1, 3), draw.size(1, 40)), draw.random.choice(FLOATS)
    parts = draw.size(1, 4)
    outs, lses = (
        [draw.tokens(*shape, dtype=dtype) for _ in range(parts)],
        [draw.tensor(*shape[:3]) for _ in range(parts)],
    )
    return [outs, lses, torch.empty(shape, dtype=dtype), torch.empty(shape[:3])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.fault(number=1)
def test_matches_the_reference(case, dtype, backend, device):
    check(*make(*CASES[case], dtype, device=place(backend, device)), backend)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.fault(number=10)
def test_all_parts_empty(backend, device):
    outs, _ = make(3, (2, 4, 2, 8), device=place(backend, device))
    out, lse = merge_attention_states(outs, [torch.full_like(outs[0][..., 0], -math.inf)] * 3, backend=backend)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.fault(number=12)
def test_nan_and_inf_in_parts_and_lses(backend, device):
    """A NaN in a part stays, also without a share; an Inf without a share goes; a NaN lse reaches its row only."""
    outs, lses = make(2, (1, 12, 1, 20), device=place(backend, device))
    for lse in lses:
        lse.zero_()
    for row, (value, other) in enumerate(
        (x, y) for x in (math.nan, math.inf, -math.inf) for y in (0.0, -math.inf, -1000.0)
    ):
        outs[0][0, row, 0, 3] = value
        lses[0][0, row, 0] = other
    lses[0][0, 9, 0], lses[0][0, 10, 0], lses[0][0, 11, 0] = math.nan, math.inf, math.inf
    lses[1][0, 11, 0] = math.nan
    check(outs, lses, backend)
    out, _ = merge_attention_states(outs, lses, backend=backend)
    assert out[0, :3, 0, 3].isnan().all() and out[0, [4, 5, 7, 8]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.fault(number=14)
def test_lses_far_from_zero(backend, device):
    outs, lses = make(3, (2, 6, 2, 16), device=place(backend, device))
    check(outs, [x + offset for x, offset in zip(lses, (3e4, 3e4 + 2, -3e38))], backend)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)], ids=["B=0", "N=0", "H=0"])
@pytest.mark.fault(number=9)
def test_empty_dimensions_give_empty_or_zero_results(shape, backend, device):
    outs, lses = make(2, shape, device=place(backend, device))
    out, lse = merge_attention_states(outs, lses, backend=backend)
    assert out.shape == shape and lse.shape == shape[:3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.fault(number=4)
@pytest.mark.fault(number=5)
def test_strides_and_odd_offsets_are_honoured(backend, device):
    outs, lses = make(2, (2, 9, 3, 24), device=place(backend, device))
    expected = merge_attention_states(outs, lses, backend=backend)
    memory = torch.empty(outs[0].numel() + 1, device=outs[0].device)
    outs[0] = memory[1:].view(outs[0].shape).copy_(outs[0])
    outs[1] = outs[1].transpose(1, 2).contiguous().transpose(1, 2)
    lses[1] = lses[1].transpose(0, 2).contiguous().transpose(0, 2)
    assert all(map(torch.equal, merge_attention_states(outs, lses, backend=backend), expected))
    shared = [lses[0], lses[0][:1, :, :1].expand(2, -1, 3)]
    expected = merge_attention_states(outs, [shared[0], shared[1].clone()], backend=backend)
    assert all(map(torch.equal, merge_attention_states(outs, shared, backend=backend), expected))


@pytest.mark.fault(number=30)
def test_threads_do_not_change_a_bit():
    outs, lses = make(3, (2, 300, 4, 40), torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(merge_attention_states(outs, lses, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other))


@pytest.mark.fault(number=28)
def test_gradients_use_the_reference():
    outs, lses = make(2, (1, 4, 2, 8))
    lses[0] = lses[0].clamp(min=-5).requires_grad_()
    merge_attention_states(outs, lses)[0].sum().backward()
    assert lses[0].grad.isfinite().all()
    with pytest.raises(NotImplementedError, match=r"merge_attention_states: gradients: .*'cpu'.*'reference'"):
        merge_attention_states(outs, lses, backend="cpu")


def test_float64_uses_the_reference():
    out, lse = merge_attention_states(*doubled(*make(2, (1, 4, 2, 8))))
    assert out.dtype == lse.dtype == torch.float64


@pytest.mark.fault(number=26)
@pytest.mark.fault(number=27)
def test_passes_opcheck():
    outs, lses = make(2, (2, 5, 2, 8))
    outputs = torch.full((2, 5, 2, 8), math.nan), torch.full((2, 5, 2), math.nan)
    torch.library.opcheck(torch.ops.lr_kernels.merge_attention_states_cpu.default, (outs, lses, *outputs))


@pytest.mark.fault(number=29)
def test_compiles_without_breaks_or_recompiles():
    compiled = torch.compile(merge_attention_states, fullgraph=True, backend="aot_eager")
    compiled(*make(2, (2, 9, 2, 16)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        arguments = make(2, (2, 9, 2, 16), seed=1)
        assert all(map(torch.equal, compiled(*arguments), merge_attention_states(*arguments)))


OUT, LSE = torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "outs: expected 1 to 16 tensors, got 0"),
        ([OUT] * 17, [LSE] * 17, ValueError, "outs: expected 1 to 16 tensors, got 17"),
        ([OUT] * 2, [LSE], ValueError, "lses: expected 2 tensors, got 1"),
        ([OUT[0]], [LSE[0]], ValueError, r"outs\[0\]: expected shape \(batch, tokens, heads, head_dim\)"),
        ([OUT, OUT[:1]], [LSE] * 2, ValueError, r"outs\[1\]: expected shape \(2, 5, 3, 8\) as of outs\[0\]"),
        ([OUT, OUT.half()], [LSE] * 2, TypeError, r"outs\[1\]: expected torch.float32, got torch.float16"),
        ([OUT.int()], [LSE], TypeError, r"outs\[0\]: expected one of float32"),
        ([OUT, OUT.to("meta")], [LSE] * 2, ValueError, r"outs\[1\]: expected cpu, got meta"),
        ([torch.zeros(2, 5, 8, 3).mT], [LSE], ValueError, r"outs\[0\]: expected a contiguous last dimension"),
        ([OUT] * 2, [LSE, LSE[:, :4]], ValueError, r"lses\[1\]: expected shape \(2, 5, 3\), got \(2, 4, 3\)"),
        ([OUT] * 2, [LSE, LSE.half()], TypeError, r"lses\[1\]: expected torch.float32, got torch.float16"),
        ([OUT] * 2, [LSE, LSE.to("meta")], ValueError, r"lses\[1\]: expected cpu, got meta"),
    ],
)
@pytest.mark.fault(number=7)
@pytest.mark.fault(number=17)
@pytest.mark.fault(number=18)
def test_errors_name_the_argument(outs, lses, error, message):
    with pytest.raises(error, match=rf"^lr_kernels\.merge_attention_states: {message}"):
        merge_attention_states(outs, lses)


@pytest.mark.fault(number=42)
def test_a_backend_that_cannot_run_is_named():
    with pytest.raises(ValueError, match="backend: expected one of auto"):
        merge_attention_states([OUT], [LSE], backend="flash")
    with pytest.raises(RuntimeError, match="backend: 'cuda' cannot run"):
        merge_attention_states([OUT], [LSE], backend="cuda")
    with pytest.raises(TypeError, match=r"outs\[0\]: expected one of float32, float16, bfloat16, got torch.float64"):
        merge_attention_states([OUT.double()], [LSE.double()], backend="cpu")
