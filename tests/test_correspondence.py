"""correspondence: the kernels against the specification in float64, ties, zero vectors, memory, and errors for wrong
arguments."""

import math
import subprocess
import sys

import pytest
import torch
from draw import FLOATS, Arguments, Draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lr_kernels import correspondence, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "triton")
CASES = {  # B, N, R, M, C
    "square": (2, 64, 2, 64, 32),
    "shared-reference": (3, 70, 1, 45, 40),
    "many-keys": (1, 33, 1, 300, 24),
    "many-targets": (1, 300, 1, 33, 24),
    "one-of-each": (1, 1, 1, 1, 1),
    "odd": (2, 37, 2, 41, 77),
    "wide": (1, 40, 1, 50, 700),
}

pytestmark = pytest.mark.usefixtures("device", "poisoned")


def make(batch, tokens, rows, keys, channels, dtype=torch.float32, seed=0, device="cpu"):
    """Slices of wider tensors: half of the targets are noisy copies of reference tokens."""
    g = torch.Generator().manual_seed(seed)
    reference = torch.randn(rows, keys, 2, channels, generator=g)[:, :, 1]
    target = torch.randn(batch, tokens, 2, channels, generator=g)[:, :, 1]
    common = min(tokens, keys) // 2
    target[:, :common] = reference[:, :common] + 0.3 * target[:, :common]
    wide = [torch.zeros(*x.shape[:2], 3, channels, dtype=dtype) for x in (target, reference)]
    for to, x in zip(wide, (target, reference)):
        to[:, :, 1] = x
    return tuple(x.to(device)[:, :, 1] for x in wide)


def place(backend, device):
    return device if backend == "triton" else "cpu"


def check(target, key, backend, **keywords):
    """The chosen one is as similar as the best, to the tolerance of lr_kernels.testing; where the best is clear, both
    results are exact. Returns the share of clear ones."""
    index, consistent = correspondence(target, key, **keywords, backend=backend)
    assert index.dtype == torch.int64 and consistent.dtype == torch.bool
    exact = reference.cosine_similarity(target.double(), key.double())
    low = reference.cosine_similarity(target, key)
    allowed = 2 * ((low - exact).abs().max() + torch.finfo(low.dtype).eps * exact.abs().max())
    assert (exact.amax(2) - exact.gather(2, index[..., None])[..., 0] <= allowed).all()
    clear, clear_back = (_margin(x) > allowed for x in (exact, exact.mT))
    true_index, true_consistent = reference.correspondence(target.double(), key.double(), **keywords)
    assert torch.equal(index[clear], true_index[clear])
    both = clear & clear_back.gather(1, true_index)
    assert torch.equal(consistent[both], true_consistent[both])
    return both.double().mean().item()


def _margin(similarity):
    """Distance of the best to the second best."""
    if similarity.shape[2] == 1:
        return similarity.new_full(similarity.shape[:2], math.inf)
    best = similarity.topk(2, 2).values
    return best[..., 0] - best[..., 1]


def right_call(draw: Draw) -> Arguments:
    batch, channels, dtype = draw.size(0, 3), draw.size(1, 40), draw.random.choice(FLOATS)
    target = draw.tokens(batch, draw.size(0, 50), channels, dtype=dtype)
    reference = draw.tokens(draw.one_or(batch), draw.size(1, 50), channels, dtype=dtype)
    radii = draw.below(20, draw.one_or(batch)).long()
    shape = target.shape[:2]
    return [target, reference, draw.size(1, 9), radii, torch.empty(shape, dtype=torch.long), torch.empty(shape) > 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.fault(number=1)
def test_matches_the_reference(case, dtype, backend, device):
    assert check(*make(*CASES[case], dtype, device=place(backend, device)), backend) > 0.99


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 90), st.just(1), st.integers(1, 150), st.integers(1, 60)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_any_shape(sizes, dtype, seed):
    target, key = make(*sizes, dtype, seed)
    if target.numel():
        check(target, key, "cpu")
    else:
        assert correspondence(target, key, backend="cpu")[0].shape == sizes[:2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [0, 1, 1.5, math.sqrt(5), 1e30])
def test_radius_in_grid_cells(radius, backend, device):
    target, key = make(2, 48, 1, 48, 6, device=place(backend, device))
    assert check(target, key, backend, radius=radius, grid=(6, 8)) > 0.99
    _, consistent = correspondence(target, key, radius=radius, grid=(6, 8), backend=backend)
    assert consistent.all() if radius == 1e30 else not consistent.all()


@pytest.mark.parametrize("kind", ["numbers", "float32", "int64"])
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_a_radius_per_row(backend, kind, device):
    """Each row as in a call of its own; the rows differ in nothing but the radius."""
    target, key = make(1, 30, 1, 30, 6, device=place(backend, device))
    radii = [0, 2, 50]
    given = radii if kind == "numbers" else torch.tensor(radii, dtype=getattr(torch, kind), device=target.device)
    index, consistent = correspondence(target.expand(3, -1, -1), key, radius=given, grid=(5, 6), backend=backend)
    assert 0 < consistent[0].sum() < consistent[1].sum() < 30 and consistent[2].all()
    for b, radius in enumerate(radii):
        scalar = radius if kind == "numbers" else torch.tensor(radius, device=target.device)
        row = correspondence(target, key, radius=scalar, grid=(5, 6), backend=backend)
        assert torch.equal(index[b], row[0][0]) and torch.equal(consistent[b], row[1][0])


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_a_permutation_is_found_and_consistent(backend, device):
    key = make(1, 8, 1, 200, 16, device=place(backend, device))[1]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(key.device)
    index, consistent = correspondence(3 * key[:, order], key, backend=backend)
    assert torch.equal(index[0], order) and consistent.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_of_equal_similarities_the_lowest_index_counts(backend, dtype, device):
    # whole numbers: a product's sum has no rounding that could differ between two places of one vector
    target, key = (x.mul(4).round() for x in make(1, 90, 1, 70, 24, dtype, device=place(backend, device)))
    index, consistent = correspondence(target, key, backend=backend)
    twice = [torch.cat([x, x], 1) for x in (target, key)]
    index2, consistent2 = correspondence(*twice, backend=backend)
    assert torch.equal(index2, torch.cat([index, index], 1))
    assert torch.equal(consistent2, torch.cat([consistent, consistent & False], 1))


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_zero_vectors_are_similar_to_nothing_and_unlike_nothing(backend, device):
    target, key = make(1, 40, 1, 40, 8, device=place(backend, device))
    target, key = target.clone(), -target.clone()
    key[0, 7] = 0  # better than the opposite of a token
    target[0, 3] = 0  # 0 to all: the first
    index, consistent = correspondence(target[:, :4], torch.cat([key[:, :4], key[:, 7:8]], 1), backend=backend)
    similarity = reference.cosine_similarity(target[:, :4].double(), torch.cat([key[:, :4], key[:, 7:8]], 1).double())
    assert torch.equal(index, similarity.argmax(2)) and index[0, 3] == 0
    zeros = torch.zeros_like(target)
    index, consistent = correspondence(zeros, zeros, backend=backend)
    assert (index == 0).all() and consistent[0, 0] and not consistent[0, 1:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.fault(number=12)
def test_tokens_that_are_not_finite_are_never_chosen(backend, dtype, value, device):
    target, key = make(2, 40, 1, 50, 16, dtype, device=place(backend, device))
    kept = torch.tensor([j for j in range(50) if j not in (0, 3, 49)], device=key.device)
    kept_targets = torch.tensor([i for i in range(40) if i not in (0, 5)], device=key.device)
    expected, expected_consistent = correspondence(target[:, kept_targets], key[:, kept], backend=backend)
    key[:, [0, 3, 49], 2] = value
    target[:, [0, 5], 1] = value
    index, consistent = correspondence(target, key, backend=backend)
    assert (index[:, [0, 5]] == 0).all() and not consistent[:, [0, 5]].any()
    assert torch.equal(index[:, kept_targets], kept[expected])
    assert torch.equal(consistent[:, kept_targets], expected_consistent)
    index, consistent = correspondence(target, torch.full_like(key, value), backend=backend)
    assert (index == 0).all() and not consistent.any()


@pytest.mark.parametrize("factor", [2.0**120, 2.0**-120])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.fault(number=14)
def test_lengths_do_not_matter(backend, dtype, factor, device):
    target, key = make(1, 50, 1, 60, 16, dtype, device=place(backend, device))
    expected = correspondence(target, key, backend=backend)
    target[:, ::2] *= factor
    key[:, ::3] *= factor
    assert all(map(torch.equal, correspondence(target, key, backend=backend), expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.fault(number=4)
@pytest.mark.fault(number=5)
def test_strides_and_odd_offsets_are_honoured(backend, device):
    target, key = make(2, 40, 1, 50, 24, device=place(backend, device))
    expected = correspondence(target, key, backend=backend)
    odd = torch.empty(target.numel() + 1, device=target.device)[1:].view(target.shape).copy_(target)
    tokens_first = key.transpose(0, 1).contiguous().transpose(0, 1)
    for arguments in (
        (odd, key),
        (target, key.expand(2, -1, -1)),
        (target, tokens_first),
        (target, key.repeat(2, 1, 1)),
    ):
        assert all(map(torch.equal, correspondence(*arguments, backend=backend), expected))


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
@pytest.mark.fault(number=9)
def test_empty_dimensions_give_empty_or_zero_results(batch, tokens, backend, device):
    target = torch.randn(batch, tokens, 8, device=place(backend, device))
    key = torch.randn(1, 5, 8, device=target.device)
    for keywords in ({}, {"radius": 2, "grid": (1, tokens)}):
        index, consistent = correspondence(target, key, **keywords, backend=backend)
        assert index.shape == consistent.shape == (batch, tokens)


@pytest.mark.fault(number=13)
def test_nothing_is_read_past_the_ends():
    target, key = make(1, 37, 1, 41, 21)
    expected = correspondence(target, key, backend="cpu")
    padded = []
    for x in (target, key):
        memory = torch.full((1, x.shape[1] + 9, 50), math.nan)
        memory[:, : x.shape[1], :21] = x
        padded.append(memory[:, : x.shape[1], :21])
    assert all(map(torch.equal, correspondence(*padded, backend="cpu"), expected))


@pytest.mark.fault(number=30)
@pytest.mark.fault(number=31)
def test_threads_and_batch_order_do_not_change_a_bit():
    """Coarse features: many exact ties, which must not fall to the faster thread."""
    g = torch.Generator().manual_seed(0)
    target, key = (torch.randint(-1, 2, (4, n, 12), generator=g).float() for n in (700, 500))
    threads, results = torch.get_num_threads(), []
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 4)
            results.append(correspondence(target, key, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other))
    order = torch.tensor([2, 0, 3, 1])
    moved = correspondence(target[order], key[order], backend="cpu")
    assert all(torch.equal(x, y[order]) for x, y in zip(moved, results[0]))


MEMORY = """
import resource, sys
import torch
from lr_kernels import correspondence
tokens, expanded, extra = map(int, sys.argv[1:])
torch.set_num_threads(2)
x = torch.randn(1, 64, 8)
correspondence(x, x, backend="cpu")
x = torch.randn(1, tokens, 8)
key = x[:, :1].expand(1, expanded, 8) if expanded else x
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + extra, in_use + extra))
try:
    index, consistent = correspondence(x, key, backend="cpu")
    print("found", bool(consistent.all()))
except MemoryError:
    print("MemoryError")
except ValueError as error:
    print(str(error).partition("got ")[2][:26])
"""


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ((20_000, 0, 64 << 20), "found True"),  # N x M similarities would be 1.6 GB
        ((4, 1 << 25, 64 << 20), "MemoryError"),  # 8 bytes for each of 2^25 expanded reference tokens
        ((4, 1 << 28, 64 << 20), "one that needs 4.0 GiB, li"),
    ],
    ids=["bounded", "lacking", "refused"],
)
@pytest.mark.fault(number=44)
def test_memory_is_bounded_and_its_lack_an_error(arguments, printed):
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == printed, run.stderr


def test_gradients_stop():
    target, key = (x.clone().requires_grad_() for x in make(1, 10, 1, 12, 8))
    for backend in ("auto", "cpu", "reference"):
        assert not any(x.requires_grad for x in correspondence(target, key, backend=backend))


def test_float64_uses_the_reference():
    target, key = (x.double() for x in make(1, 10, 1, 12, 8))
    assert all(map(torch.equal, correspondence(target, key), reference.correspondence(target, key)))


@pytest.mark.fault(number=26)
@pytest.mark.fault(number=27)
def test_passes_opcheck():
    target, key = make(2, 20, 1, 30, 8)
    outputs = torch.full((2, 20), -1), torch.ones(2, 20, dtype=torch.bool)
    torch.library.opcheck(
        torch.ops.lr_kernels.correspondence_cpu.default, (target, key, 5, torch.tensor([4, 1]), *outputs)
    )


def test_the_op_refuses_no_reference_tokens():
    target, outputs = torch.randn(1, 4, 8), (torch.full((1, 4), -1), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="correspondence: reference: expected 1 to 2147483647 tokens, got 0"):
        torch.ops.lr_kernels.correspondence_cpu(target, target[:, :0], 1, torch.zeros(1, dtype=torch.long), *outputs)


@pytest.mark.parametrize("radius", [1.5, [1.5, 0], torch.tensor([1.5, 0])], ids=["number", "list", "tensor"])
@pytest.mark.fault(number=29)
def test_compiles_without_breaks_or_recompiles(radius):
    torch._dynamo.reset()
    compiled = torch.compile(correspondence, fullgraph=True, backend="aot_eager")
    keywords = {"radius": radius, "grid": (4, 5)}
    compiled(*make(2, 20, 1, 30, 8), **keywords)
    with torch._dynamo.config.patch(error_on_recompile=True):
        arguments = make(2, 20, 1, 30, 8, seed=1)
        assert all(map(torch.equal, compiled(*arguments, **keywords), correspondence(*arguments, **keywords)))


T, K = torch.zeros(2, 6, 8), torch.zeros(1, 5, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": T[0]}, ValueError, r"target: expected shape \(batch, tokens, channels\)"),
        ({"target": T[..., :0], "reference": K[..., :0]}, ValueError, "target: expected shape .*at least one channel"),
        ({"target": T.int()}, TypeError, "target: expected one of float32"),
        ({"target": torch.zeros(2, 8, 6).mT}, ValueError, "target: expected a contiguous last dimension"),
        ({"reference": K[0]}, ValueError, r"reference: expected shape \(2 or 1, tokens, 8\), at least one token"),
        ({"reference": K[:, :0]}, ValueError, r"reference: expected shape \(2 or 1, tokens, 8\), at least one token"),
        ({"reference": K.expand(3, -1, -1)}, ValueError, r"reference: expected shape \(2 or 1, tokens, 8\)"),
        ({"reference": K[..., :4]}, ValueError, r"reference: expected shape \(2 or 1, tokens, 8\)"),
        ({"reference": K.half()}, TypeError, "reference: expected torch.float32, got torch.float16"),
        ({"reference": K.to("meta")}, ValueError, "reference: expected cpu, got meta"),
        ({"reference": K[:, :1].expand(1, 2**31, 8)}, ValueError, "reference: expected fewer than 2147483648 tokens"),
        ({"radius": -1.0}, ValueError, "radius: expected a finite number, at least 0, got -1.0"),
        ({"radius": math.nan}, ValueError, "radius: expected a finite number"),
        ({"radius": math.inf}, ValueError, "radius: expected a finite number"),
        ({"radius": [1.0]}, ValueError, "radius: expected a number, or 2 for the rows, got 1 numbers"),
        ({"radius": [1.0, -1.0]}, ValueError, r"radius\[1\]: expected a finite number, at least 0, got -1.0"),
        ({"radius": "far"}, ValueError, "radius: expected a finite number, at least 0, got 'far'"),
        ({"radius": torch.ones(3)}, ValueError, r"radius: expected a number, shape \(\) or \(2,\), got shape \(3,\)"),
        (
            {"radius": torch.tensor([1, math.nan])},
            ValueError,
            r"radius: expected finite numbers, at least 0, got \[1.0, nan",
        ),
        ({"radius": torch.ones(2) > 0}, TypeError, "radius: expected a floating or integer dtype, got torch.bool"),
        ({"radius": torch.ones(2, device="meta")}, ValueError, "radius: expected cpu, got meta"),
        ({"radius": torch.zeros(2)}, ValueError, r"grid: expected \(rows, columns\) for a radius above 0"),
        ({"radius": 1.0}, ValueError, r"grid: expected \(rows, columns\) for a radius above 0, got None"),
        ({"grid": (2, 4)}, ValueError, r"grid: expected \(rows, columns\) of 6 tokens, got \(2, 4\)"),
        ({"grid": (-2, -3)}, ValueError, r"grid: expected \(rows, columns\) of 6 tokens"),
        ({"backend": "flash"}, ValueError, "backend: expected one of auto"),
        ({"backend": "cuda"}, RuntimeError, "backend: 'cuda' cannot run"),
        (
            {"target": T.double(), "reference": K.double(), "backend": "cpu"},
            TypeError,
            "target: expected one of float32",
        ),
    ],
)
@pytest.mark.fault(number=7)
@pytest.mark.fault(number=17)
@pytest.mark.fault(number=18)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=rf"^lr_kernels\.correspondence: {message}"):
        correspondence(**({"target": T, "reference": K} | changes))
