"""What step_blend refuses, for every backend that checks in Python. bindings/step_blend.h has the same rules."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .calls import Call, Dtypes
from .platform import KERNEL_DTYPES
from .schemas import COLUMNS, MAX_PREDICTIONS


def check_step_blend(
    sample: Tensor, predictions: Sequence[Tensor], coefficients: Tensor, step: Tensor | None, row: int,
    mask: Tensor | None, background: Tensor | None, noise: Tensor | None, history: Tensor | None,
    keep_rows: Tensor | None, out: Tensor | None, model_input: Tensor | None, history_out: Tensor | None,
    dtypes: Sequence[torch.dtype] = KERNEL_DTYPES, mask_dtypes: Dtypes = torch.float32,
) -> None:  # fmt: skip
    """ValueError for shapes, devices, strides, a row outside the table and shared memory; TypeError for dtypes.

    The arguments are those of the schema `step_blend`; inputs may have any strides. `dtypes` are those of the sample.
    """
    call = Call("step_blend", sample, "sample", dtypes)
    batch, *plane = shape = call.input("sample", sample, ("batch", "channels", "height", "width"), 0)
    count = len(predictions)
    call.require(1 <= count <= MAX_PREDICTIONS, "predictions", f"1 to {MAX_PREDICTIONS}", count)
    for i, x in enumerate(predictions):
        call.input(f"predictions[{i}]", x, shape, 0)
    table = ("steps", (batch, 1), count + len(COLUMNS))
    steps = call.input("coefficients", coefficients, table, 0, torch.float32)[0]
    if step is not None:
        call.input("step", step, (1,) * min(1, step.dim()), 0, torch.int32)
    inside = step is not None or 0 <= row < steps
    call.require(inside, "step", f"0 to {steps - 1}, the steps of coefficients", row)
    kept = " or ".join(name for name, x in (("mask", mask), ("keep_rows", keep_rows)) if x is not None)
    if kept:
        call.require(background is not None, "background", f"a tensor, since {kept} is given", None)
    elif background is not None:
        call.require(False, "mask", "a tensor (or keep_rows), since background is given", None)
    if mask is not None:
        call.input("mask", mask, ((batch, 1), *plane[1:]), 0, mask_dtypes)
    if keep_rows is not None:
        call.input("keep_rows", keep_rows, (batch,), 0, torch.bool)
    for name, given in (("background", background), ("noise", noise), ("history", history)):
        if given is not None:
            call.input(name, given, shape, 0)
    if out is not None:
        call.output("out", out, shape, 4)
    if model_input is not None:
        call.output("model_input", model_input, (f"n·{batch}", *plane), 4)
        rows = model_input.shape[0]
        fits = rows == 0 if batch == 0 else rows > 0 and rows % batch == 0
        sizes = ", ".join(map(str, plane))
        call.require(fits, "model_input", f"shape (n·{batch}, {sizes})", tuple(model_input.shape))
    if history_out is not None:
        call.output("history_out", history_out, shape, 4)
