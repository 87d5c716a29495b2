"""subject_mask: the kernel against the specification in float64, known masks, and errors for wrong arguments."""

import math

import pytest
import torch
from draw import Arguments, Draw
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lr_kernels import reference
from lr_kernels.features.subject_mask import subject_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "plain": {"shape": (2, 5, 16, 16)},
    "upsampled-smoothed": {"shape": (3, 4, 16, 16), "size": (64, 64), "smoothing": 3},
    "downsampled": {"shape": (2, 2, 33, 20), "size": (7, 12)},
    "fixed-threshold": {"shape": (2, 3, 20, 30), "threshold": 0.3, "smoothing": 5},
    "threshold-0": {"shape": (1, 1, 9, 9), "threshold": 0},
    "threshold-1": {"shape": (1, 1, 9, 9), "threshold": 1.0},
    "filter-as-wide-as-the-mask": {"shape": (1, 2, 3, 5), "smoothing": 5},
    "one-row": {"shape": (2, 1, 1, 40), "size": (1, 64)},
    "one-pixel": {"shape": (2, 2, 1, 1)},
    "one-pixel-resized": {"shape": (1, 2, 1, 1), "size": (4, 4)},
    "to-one-pixel": {"shape": (1, 2, 6, 6), "size": (1, 1), "threshold": 0.4},
}


def blobs(shape, seed=0):
    """Noise with a bright square, in a slice of a wider tensor."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape[0], shape[1], 2, *shape[2:], generator=g)[:, :, 1]
    x[..., shape[2] // 4 : shape[2] // 2, shape[3] // 4 : shape[3] // 2] += 1.5
    return x


def check(maps, **keywords):
    """In double, the kernel has the oracle's very pixels."""
    out = subject_mask(maps, **keywords, backend="cpu")
    assert out.dtype == torch.bool
    assert torch.equal(out, reference.subject_mask(maps.double(), **keywords))


def right_call(draw: Draw) -> Arguments:
    maps = draw.tensor(draw.size(0, 3), draw.size(1, 3), draw.size(1, 12), draw.size(1, 12))
    level = draw.random.choice(((None, None), (0.4, None), (None, 0.7)))
    out = torch.empty(maps.shape[0], draw.size(3, 20), draw.size(3, 20), dtype=torch.bool)
    return [maps, *level, draw.random.choice((1, 3)), out]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype):
    keywords = dict(CASES[case])
    check(blobs(keywords.pop("shape")).to(dtype), **keywords)


@pytest.mark.fault(number=5)
def test_view_at_an_odd_element():
    maps = blobs((2, 3, 11, 13))
    odd = torch.empty(maps.numel() + 1)[1:].view(maps.shape).copy_(maps)
    assert torch.equal(subject_mask(odd, backend="cpu"), subject_mask(maps, backend="cpu"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 24), st.integers(1, 24)),
    size=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    threshold=st.just("otsu") | st.floats(0, 1),
    smoothing=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, size, threshold, smoothing, seed):
    assume(smoothing <= max(size or shape[2:]))
    check(blobs(shape, seed), size=size, threshold=threshold, smoothing=smoothing)


def check_quantile(maps, quantile, backend, **keywords):
    """Pixels that differ lie as close to the level as the tolerance of lr_kernels.testing allows."""
    out = subject_mask(maps, quantile=quantile, **keywords, backend=backend)
    expected = reference.subject_mask(maps.double(), quantile=quantile, **keywords)
    exact = reference.subject_map(maps.double(), **keywords)
    low = exact if backend == "cpu" else reference.subject_map(maps.float(), **keywords)  # the CPU computes in double
    rank = math.floor(quantile * (exact[0].numel() - 1))
    level = exact.flatten(1).sort(1).values[:, rank, None, None]
    allowed = 2 * ((low - exact).abs().max() + torch.finfo(low.dtype).eps * exact.max())
    assert ((out == expected) | ((exact - level).abs() <= allowed)).all()
    return out


@pytest.mark.parametrize("quantile", [0, 0.25, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("case", [x for x in CASES if not x.startswith("threshold")])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_quantiles_match_reference(backend, case, quantile, device):
    keywords = {k: v for k, v in CASES[case].items() if k != "threshold"}
    maps = blobs(keywords.pop("shape"))
    check_quantile(maps.to(device) if backend == "triton" else maps, quantile, backend, **keywords)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 24), st.integers(1, 24)),
    size=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    quantile=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_quantile(shape, size, quantile, seed):
    check_quantile(blobs(shape, seed), quantile, "cpu", size=size)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_a_quantile_is_the_share_below(backend, device):
    """Of P different pixels, those above rank floor(q (P - 1)), as with the interpolated level of torch.quantile."""
    place = device if backend == "triton" else "cpu"
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0)).to(place)
    maps = order.float().view(1, 1, 1, 101)
    for quantile, rank in ((0, 0), (0.004, 0), (0.25, 25), (0.8, 80), (0.999, 99), (1, 100)):
        mask = subject_mask(maps, quantile=quantile, backend=backend)
        assert torch.equal(mask.view(-1), order > rank)
        assert torch.equal(mask.view(-1), maps.view(-1) > maps.view(-1).quantile(quantile))
    ties = torch.tensor([0.0, 1, 1, 1, 1, 1, 2, 3], device=place).view(1, 1, 2, 4)
    assert subject_mask(ties, quantile=0.5, backend=backend).sum() == 2
    assert not subject_mask(torch.ones(2, 1, 4, 4, device=place), quantile=0.3, backend=backend).any()


@pytest.mark.parametrize("keywords", [{"threshold": 0.4}, {}, {"quantile": 0.6}], ids=["fixed", "otsu", "quantile"])
@pytest.mark.parametrize("signed", [False, True], ids=["positive", "signed"])
@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.fault(number=14)
def test_maps_near_the_largest_float(backend, signed, keywords, device):
    """Finite maps have a finite mean and range."""
    maps = blobs((2, 3, 16, 12)) / 2.5 * torch.finfo(torch.float32).max
    maps = 2 * (maps - maps.max() / 2) if signed else maps
    assert maps.isfinite().all()
    maps = maps.to(device) if backend == "triton" else maps
    for smoothing in (1, 3):
        out = subject_mask(maps, **keywords, smoothing=smoothing, backend=backend)
        assert torch.equal(out, reference.subject_mask(maps.double(), **keywords, smoothing=smoothing))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bright_square_is_found(backend):
    maps = torch.zeros(1, 3, 16, 16)
    maps[:, :, 4:12, 6:10] = torch.tensor([1.0, 0.5, 2.0]).view(1, 3, 1, 1)
    mask = subject_mask(maps, backend=backend)
    assert torch.equal(mask[0], maps[0, 0] > 0)
    large = subject_mask(maps, size=(32, 32), threshold=0.5, backend=backend)
    assert torch.equal(large[0], (maps[0, 0] > 0).repeat_interleave(2, 0).repeat_interleave(2, 1))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_lone_pixel_is_smoothed_away(backend):
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, 4, 4] = 1
    assert subject_mask(maps, threshold=0.5, backend=backend).sum() == 1
    assert subject_mask(maps, threshold=0.5, smoothing=3, backend=backend).sum() == 0


@pytest.mark.parametrize("threshold", ["otsu", 0.0, 0.5])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_a_constant_map_has_no_foreground(value, backend, threshold):
    maps = torch.full((2, 3, 8, 8), value)
    assert not subject_mask(maps, size=(16, 16), threshold=threshold, smoothing=3, backend=backend).any()


@pytest.mark.parametrize("threshold", ["otsu", 0.0, 0.5])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.fault(number=12)
def test_a_row_that_is_not_finite_has_no_foreground(value, backend, threshold):
    maps = blobs((3, 2, 12, 12))
    expected = subject_mask(maps, threshold=threshold, backend=backend)
    maps[1, 0, 5, 5] = value
    mask = subject_mask(maps, threshold=threshold, backend=backend)
    assert not mask[1].any() and torch.equal(mask[0], expected[0]) and torch.equal(mask[2], expected[2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.fault(number=9)
def test_an_empty_batch_gives_an_empty_mask(backend):
    assert subject_mask(torch.zeros(0, 2, 8, 8), size=(4, 4), backend=backend).shape == (0, 4, 4)


@pytest.mark.fault(number=31)
def test_permuting_the_batch_permutes_the_masks():
    maps, order = blobs((4, 3, 16, 16)), torch.tensor([2, 3, 1, 0])
    keywords = {"size": (24, 24), "smoothing": 3, "backend": "cpu"}
    assert torch.equal(subject_mask(maps[order], **keywords), subject_mask(maps, **keywords)[order])


def test_gradients_stop_at_the_mask():
    maps = blobs((1, 2, 8, 8)).requires_grad_()
    assert not subject_mask(maps).requires_grad and not subject_mask(maps, backend="reference").requires_grad


@pytest.mark.parametrize(("threshold", "quantile"), [(None, None), (0.4, None), (None, 0.7)])
@pytest.mark.fault(number=26)
def test_passes_opcheck(threshold, quantile):
    out = torch.ones(2, 12, 12, dtype=torch.bool)
    maps = blobs((2, 3, 8, 8)).contiguous()
    torch.library.opcheck(torch.ops.lr_kernels.subject_mask_cpu.default, (maps, threshold, quantile, 3, out))


def test_the_op_writes_every_element():
    maps = blobs((2, 3, 8, 8)).contiguous()
    results = []
    for poison in (False, True):
        results.append(torch.full((2, 12, 12), poison))
        torch.ops.lr_kernels.subject_mask_cpu(maps, None, None, 3, results[-1])
    assert torch.equal(*results)


@pytest.mark.parametrize("keywords", [{}, {"quantile": 0.7}], ids=["otsu", "quantile"])
@pytest.mark.fault(number=29)
def test_compiles_without_breaks_or_recompiles(keywords):
    compiled = torch.compile(subject_mask, fullgraph=True, backend="aot_eager")
    keywords = {"size": (24, 24), "smoothing": 3, **keywords}
    compiled(blobs((2, 3, 16, 16)), **keywords)
    with torch._dynamo.config.patch(error_on_recompile=True):
        maps = blobs((2, 3, 16, 16), seed=1)
        assert torch.equal(compiled(maps, **keywords), subject_mask(maps, **keywords))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"maps": torch.zeros(2, 8, 8)}, ValueError, "maps: expected shape"),
        ({"maps": torch.zeros(2, 0, 8, 8)}, ValueError, "maps: expected shape .* at least one map"),
        ({"maps": torch.zeros(2, 1, 8, 0)}, ValueError, "maps: expected shape"),
        ({"maps": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, TypeError, "maps: expected a floating dtype"),
        ({"size": (0, 8)}, ValueError, "size: expected"),
        ({"size": (8,)}, ValueError, "size: expected"),
        ({"threshold": "mean"}, ValueError, "threshold: expected 'otsu' or a number in"),
        ({"threshold": 1.5}, ValueError, "threshold: expected 'otsu' or a number in"),
        ({"threshold": math.nan}, ValueError, "threshold: expected 'otsu' or a number in"),
        ({"quantile": 1.5}, ValueError, r"quantile: expected a number in \[0, 1\], got 1.5"),
        ({"quantile": math.nan}, ValueError, "quantile: expected a number in"),
        ({"quantile": 0.5, "threshold": 0.5}, ValueError, "quantile: expected None beside a threshold, got 0.5"),
        ({"smoothing": 2}, ValueError, "smoothing: expected an odd number"),
        ({"smoothing": 9}, ValueError, "smoothing: expected an odd number from 1 to 8, the mask's longer side, got 9"),
        ({"smoothing": 9, "size": (2, 8)}, ValueError, "smoothing: expected an odd number from 1 to 8"),
        ({"smoothing": -1}, ValueError, "smoothing: expected an odd number"),
        ({"backend": "cv2"}, ValueError, "backend: expected one of auto"),
        ({"backend": "cuda"}, RuntimeError, "backend: 'cuda' cannot run"),
        ({"maps": torch.zeros(1, 1, 8, 8).double(), "backend": "cpu"}, TypeError, "one of float32"),
    ],
)
def test_rows7_17_errors(changes, error, message):
    with pytest.raises(error, match=rf"^lr_kernels\.subject_mask: .*{message}"):
        subject_mask(**({"maps": torch.zeros(1, 2, 8, 8)} | changes))
