"""step_blend on a GPU, by Triton (interpreted where there is none) and by CUDA C++, against the specification in
float64."""

import math

import pytest
import torch

from lr_kernels import reference
from lr_kernels.runtime import ops
from lr_kernels.runtime.schemas import COLUMNS
from lr_kernels.testing import assert_matches

OPS = torch.ops.lr_kernels
NO_CUDA = pytest.mark.skipif(ops.cuda_extension_error is not None, reason="needs the CUDA C++ extension")

pytestmark = [
    pytest.mark.usefixtures("device", "poisoned"),
    pytest.mark.parametrize("op", [OPS.step_blend_triton, pytest.param(OPS.step_blend_cuda, marks=NO_CUDA)], ids=str),
]


def step_blend_arguments(case: set[str], predictions: int, dtype: torch.dtype, device: str) -> dict:
    """Arguments of the op by name; the first prediction has weight 0 in row 0 of step 3, and is NaN there."""
    g = torch.Generator().manual_seed(6)

    def latents(*names: str) -> list[torch.Tensor | None]:
        return [torch.randn(3, 4, 6, 7, generator=g).to(dtype).to(device) if x in case else None for x in names]

    case = case | {"always"}
    terms = latents(*["always"] * predictions)
    sample, background, noise, history = latents("always", "background", "noise", "history")
    coefficients = torch.randn(5, 3, predictions + len(COLUMNS), generator=g)
    absent = [x for x, tensor in (("sigma", noise), ("q", noise), ("h", history)) if tensor is None]
    coefficients[3, :, [predictions + COLUMNS.index(x) for x in absent]] = 0
    coefficients[3, 0, 0] = 0
    terms[0][0] = math.nan
    mask = torch.rand(1, 6, 7, generator=g).mul(1.5).clamp(0, 1) if "mask" in case else None
    keep_rows = torch.tensor([False, True, False]) if "keep_rows" in case else None
    shape = sample.shape
    return {
        "sample": sample,
        "predictions": terms,
        "coefficients": coefficients.to(device),
        "step": torch.tensor([3], dtype=torch.int32, device=device),
        "row": 0,
        "mask": None if mask is None else mask.to(device),
        "background": background,
        "noise": noise,
        "history": history,
        "keep_rows": None if keep_rows is None else keep_rows.to(device),
        "out": torch.full_like(sample, math.nan),
        "model_input": sample.new_full((6, *shape[1:]), math.nan) if "model_input" in case else None,
        "history_out": sample.new_full(shape, math.nan) if "history_out" in case else None,
    }


def step_blend_by_reference(arguments: dict, dtype: torch.dtype) -> dict:
    """The outputs by name, computed from latents in `dtype`."""
    kept = ("coefficients", "step", "row", "mask", "keep_rows")
    call = {k: x if k in kept or x is None or k == "predictions" else x.to(dtype) for k, x in arguments.items()}
    call["predictions"] = [x.to(dtype) for x in arguments["predictions"]]
    del call["out"], call["row"]
    outputs = {k: call[k] for k in ("model_input", "history_out") if call[k] is not None}
    call |= {k: x.clone() for k, x in outputs.items()}
    return {"out": reference.step_blend(**call)} | {k: call[k] for k in outputs}


STEP_BLEND_CASES = {
    "plain": set(),
    "noise": {"noise"},
    "mask": {"background", "mask"},
    "keep-rows": {"background", "keep_rows", "noise"},
    "history": {"history", "history_out"},
    "model-input": {"model_input"},
    "everything": {"background", "mask", "keep_rows", "noise", "history", "history_out", "model_input"},
}


@pytest.mark.parametrize("predictions", [1, 6])
@pytest.mark.parametrize("case", STEP_BLEND_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_blend_matches_the_reference(op, predictions, case, dtype, device):
    arguments = step_blend_arguments(STEP_BLEND_CASES[case], predictions, dtype, device)
    low, exact = (step_blend_by_reference(arguments, x) for x in (dtype, torch.float64))
    op(*arguments.values())
    for name in low:
        assert_matches(arguments[name], low[name], exact[name], name)
    by_number = {k: torch.full_like(x, math.nan) if k in low else x for k, x in arguments.items()}
    op(*(by_number | {"step": None, "row": 3}).values())
    assert all(torch.equal(by_number[name], arguments[name]) for name in low)
    arguments["step"] += 2  # step 5 of 5
    op(*arguments.values())
    assert all(arguments[name].isnan().all() for name in low if (name, case) != ("history_out", "everything"))


@pytest.mark.parametrize(("column", "case"), [("sigma", "plain"), ("h", "plain"), ("q", "mask")])
@pytest.mark.fault(number=16)
def test_step_blend_gives_nan_where_a_tensor_is_missing(op, column, case, device):
    arguments = step_blend_arguments(STEP_BLEND_CASES[case], 1, torch.float32, device)
    arguments["coefficients"][3, 2, 1 + COLUMNS.index(column)] = 1e-3
    if case == "mask":
        arguments["mask"].fill_(0.5)
    op(*arguments.values())
    assert arguments["out"][2].isnan().all() and arguments["out"][:2].isfinite().all()


@pytest.mark.fault(number=11)
def test_step_blend_reads_nothing_of_coefficient_zero(op, device):
    arguments = step_blend_arguments(STEP_BLEND_CASES["everything"], 2, torch.float32, device)
    unread = ("sample", "predictions", "noise", "history")
    columns = {name: arguments["coefficients"][3, 0, 2 + i : 3 + i] for i, name in enumerate(COLUMNS)}
    for name in ("a", "e", "sigma", "h", "q", "c", "d"):
        columns[name].fill_(0)  # of row 0, which is not kept
    arguments["mask"] = arguments["mask"].repeat(3, 1, 1)
    arguments["mask"][1] = math.nan  # row 1 is kept
    for name in unread:
        for x in arguments[name] if name == "predictions" else [arguments[name]]:
            x[:2] = math.nan
    arguments["coefficients"][3, 1, 2 + COLUMNS.index("q")] = 0
    op(*arguments.values())
    for name in ("out", "model_input", "history_out"):
        assert arguments[name].isfinite().all()


@pytest.mark.parametrize("size", [(2, 3, 16, 16), (1, 1, 5, 7), (3, 4, 64, 64)], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.fault(number=4)
@pytest.mark.fault(number=5)
def test_rows_and_addresses_that_vectors_do_not_fit(op, size, offset, device):
    """Batch slices, a misaligned sample and planes of odd size give what aligned ones give, bit for bit."""
    g = torch.Generator().manual_seed(0)
    table = torch.rand(2, 1, 2 + len(COLUMNS), generator=g)
    table[..., [2 + COLUMNS.index(x) for x in ("sigma", "h", "q")]] = 0
    numbers = [torch.randn(2 * math.prod(size) + offset, generator=g).half().to(device) for _ in range(4)]
    sample, first, second, background = (x[offset:].view(size[0], 2, *size[1:])[:, 1] for x in numbers)
    mask = torch.rand(1, *size[2:], generator=g).to(device)

    def blended(*tensors):
        out = torch.full(size, math.nan, dtype=torch.half, device=device)
        x, a, b, kept = tensors
        op(x, [a, b], table.to(device), None, 1, mask, kept, None, None, None, out, None, None)
        return out

    given = (sample, first, second, background)
    assert torch.equal(blended(*given), blended(*(x.clone(memory_format=torch.contiguous_format) for x in given)))
