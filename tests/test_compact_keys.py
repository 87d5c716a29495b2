"""Lists of visible keys made by the kernels against those that plan.py makes with tensor operations."""

import pytest
import torch
from draw import Arguments, Draw

from lr_kernels.attention.lists import visible_lists
from lr_kernels.runtime import ops
from lr_kernels.triton import compact_keys

OPS = torch.ops.lr_kernels
pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = [
    "triton",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(ops.cuda_extension_error is not None, reason="needs the CUDA C++ extension")
    ),
]


def made_by(backend, mask, groups, classes, rows, keys, device):
    index = torch.full((len(classes), rows, keys), -1, dtype=torch.int32, device=device)
    count = torch.full((len(classes), rows), -1, dtype=torch.int32, device=device)
    getattr(OPS, f"compact_keys_{backend}")(mask, groups, classes, index, count)
    return index.cpu(), count.cpu()


def right_call(draw: Draw) -> Arguments:
    rows, keys, classes = draw.size(1, 3), draw.size(0, 40), draw.size(1, 4)
    mask = draw.bits(draw.one_or(rows), keys) if draw.often() else None
    groups = draw.below(4, draw.one_or(rows), keys).byte() if draw.often() else None
    index = torch.empty(classes, rows, keys, dtype=torch.int32)
    return [mask, groups, list(range(classes)), index, torch.empty(classes, rows, dtype=torch.int32)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [0, 1, 31, 1024, 1025, 5000])
@pytest.mark.parametrize("kind", ["mask", "groups", "both", "mask of one row", "groups of one row"])
def test_lists_match(backend, keys, kind, device):
    g = torch.Generator().manual_seed(keys)
    mask = torch.rand(1 if kind == "mask of one row" else 3, keys, generator=g) < 0.4
    groups = torch.randint(0, 8, (1 if kind == "groups of one row" else 3, keys), generator=g).to(torch.uint8)
    mask, groups = (None if kind == "groups" else mask), (None if kind == "mask" else groups)
    classes = [0] if groups is None else [1, 6, 0, 255]
    expected_index, expected_count = visible_lists(mask, groups, classes)
    on_device = [None if x is None else x.to(device) for x in (mask, groups)]
    rows = expected_count.shape[1]
    index, count = made_by(backend, *on_device, classes, rows, keys, device)
    assert torch.equal(index, expected_index) and torch.equal(count, expected_count)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_and_nothing(backend, share, device):
    mask = torch.full((2, 1500), share == 1.0)
    index, count = made_by(backend, mask.to(device), None, [0], 2, 1500, device)
    assert (count == int(1500 * share)).all()
    assert torch.equal(index, (torch.arange(1500) * int(share)).int().expand(1, 2, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.fault(number=4)
def test_masks_that_are_slices(backend, device):
    mask = (torch.rand(4, 300) < 0.5).to(device)[::2, 10:200]
    index, count = made_by(backend, mask, None, [0], 2, 190, device)
    expected = visible_lists(mask.cpu(), None, ())
    assert torch.equal(index, expected[0]) and torch.equal(count, expected[1])


@pytest.mark.fault(number=3)
def test_one_program_per_list():
    mask = torch.empty(5, 70, dtype=torch.bool)
    index, count = torch.empty(5, 70, dtype=torch.int32), torch.empty(5, dtype=torch.int32)
    assert compact_keys.launch_arguments(mask, None, 0, index, count)[2] == 5


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.fault(number=26)
@pytest.mark.fault(number=27)
def test_passes_opcheck(backend, device):
    mask = (torch.rand(2, 64) < 0.5).to(device)
    index = torch.zeros(1, 2, 64, dtype=torch.int32, device=device)
    count = torch.zeros(1, 2, dtype=torch.int32, device=device)
    torch.library.opcheck(getattr(OPS, f"compact_keys_{backend}").default, (mask, None, [0], index, count))
