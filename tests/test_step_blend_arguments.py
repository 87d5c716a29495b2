"""Arguments of step_blend that do not fit are refused by name, and outputs have memory of their own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_blend_inputs import make

from lr_kernels.denoising.step_blend import step_blend
from lr_kernels.runtime.schemas import COLUMNS

SHAPE = (2, 4, 9, 11)
MASK = torch.ones(1, 9, 11)
KEEP = torch.tensor([True, False])
X = torch.zeros(SHAPE)
TABLE = torch.zeros(3, 1, 2 + len(COLUMNS))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sample": torch.zeros(2, 4, 9)}, ValueError, "sample: expected shape"),
        ({"sample": torch.zeros(SHAPE, dtype=torch.int32)}, TypeError, "sample: expected one of float32"),
        ({"predictions": []}, ValueError, "predictions: expected 1 to 6, got 0"),
        ({"predictions": [X] * 7}, ValueError, "predictions: expected 1 to 6, got 7"),
        ({"predictions": [X, torch.zeros(2, 4, 9, 10)]}, ValueError, r"predictions\[1\]: expected shape"),
        ({"predictions": [X, X.half()]}, TypeError, r"predictions\[1\]: expected torch.float32, got torch.float16"),
        ({"predictions": [X.to("meta"), X]}, ValueError, r"predictions\[0\]: expected cpu, got meta"),
        ({"coefficients": TABLE[0]}, ValueError, "coefficients: expected shape"),
        ({"coefficients": TABLE[..., 1:]}, ValueError, r"coefficients: expected shape \(steps, 2 or 1, 11\)"),
        ({"coefficients": TABLE.expand(3, 3, -1)}, ValueError, "coefficients: expected shape"),
        ({"coefficients": TABLE.double()}, TypeError, "coefficients: expected float32"),
        ({"coefficients": TABLE.to("meta")}, ValueError, "coefficients: expected cpu"),
        ({"step": 3}, ValueError, "step: expected 0 to 2, the steps of coefficients, got 3"),
        ({"step": -1}, ValueError, "step: expected 0 to 2"),
        ({"step": torch.tensor(3)}, ValueError, "step: expected 0 to 2"),
        ({"step": torch.tensor([0, 1])}, ValueError, "step: expected one element"),
        ({"step": torch.tensor(1.0)}, TypeError, "step: expected int32 or int64"),
        ({"step": 1.0}, TypeError, "step: expected an int"),
        ({"step": torch.tensor(1, device="meta")}, ValueError, "step: expected cpu, got meta"),
        ({"mask": MASK}, ValueError, "background: expected a tensor, since mask is given"),
        ({"keep_rows": KEEP}, ValueError, "background: expected a tensor, since keep_rows is given"),
        ({"background": X}, ValueError, "mask: expected a tensor .*, since background is given"),
        ({"mask": MASK[0], "background": X}, ValueError, "mask: expected shape"),
        ({"mask": MASK.expand(3, -1, -1), "background": X}, ValueError, "mask: expected shape"),
        ({"mask": MASK.long(), "background": X}, TypeError, "mask: expected bool or a floating dtype"),
        ({"mask": MASK.to("meta"), "background": X}, ValueError, "mask: expected cpu, got meta"),
        ({"mask": MASK, "background": X[:1]}, ValueError, "background: expected shape"),
        ({"keep_rows": KEEP[:1], "background": X}, ValueError, r"keep_rows: expected shape \(2,\)"),
        ({"keep_rows": KEEP.byte(), "background": X}, TypeError, "keep_rows: expected bool"),
        ({"noise": X.double()}, TypeError, "noise: expected torch.float32"),
        ({"history": X[:, :3]}, ValueError, "history: expected shape"),
        ({"out": torch.zeros(1)}, ValueError, "out: expected shape"),
        ({"out": X.to(memory_format=torch.channels_last)}, ValueError, "out: expected a contiguous tensor"),
        ({"history_out": X.bfloat16()}, TypeError, "history_out: expected torch.float32"),
        ({"model_input": torch.zeros(3, 4, 9, 11)}, ValueError, r"model_input: expected shape \(n·2, 4, 9, 11\)"),
        ({"model_input": torch.zeros(0, 4, 9, 11)}, ValueError, "model_input: expected shape"),
        ({"model_input": torch.zeros(4, 4, 9, 12)}, ValueError, "model_input: expected shape"),
        ({"model_input": torch.zeros(4, 4, 9, 11).half()}, TypeError, "model_input: expected torch.float32"),
        ({"model_input": torch.zeros(4, 4, 9, 22)[..., ::2]}, ValueError, "model_input: expected a contiguous"),
        ({"model_input": torch.zeros(2, 4, 9, 11, requires_grad=True)}, ValueError, "model_input: expected a tensor"),
        ({"backend": "mkl"}, ValueError, "backend: expected one of auto"),
        ({"backend": "cuda"}, RuntimeError, "backend: 'cuda' cannot run"),
        ({"sample": X.double(), "predictions": [X.double()] * 2, "backend": "cpu"}, TypeError, "one of float32"),
    ],
)
@pytest.mark.fault(number=7)
@pytest.mark.fault(number=17)
@pytest.mark.fault(number=18)
@pytest.mark.fault(number=34)
def test_errors_name_the_argument(changes, error, message):
    call = {"sample": X, "predictions": [X, X], "coefficients": TABLE, "step": 0} | changes
    with pytest.raises(error, match=r"^lr_kernels\.step_blend: .*" + message.removeprefix("^")):
        step_blend(**call)


PLAIN = ("sample", "predictions", "coefficients", "noise", "history")
TENSORS = (*PLAIN, "mask", "background", "keep_rows")
WRITTEN = ("out", "model_input", "history_out")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), output=st.sampled_from(WRITTEN), backend=st.sampled_from(["cpu", "reference"]))
@pytest.mark.fault(number=6)
def test_outputs_share_no_memory(data, output, backend):
    """An output that begins before another tensor ends is refused; one that begins right there is not."""
    tensors = data.draw(st.sampled_from([PLAIN, TENSORS]))
    other = data.draw(st.sampled_from([x for x in (*tensors, *WRITTEN) if x != output]))
    background = {} if tensors is PLAIN else {"mask": "float", "keep": (True, False)}
    (sample, predictions, coefficients), keywords = make(noise=True, history=True, **background)
    predictions = [x.contiguous() for x in predictions]
    call = {"sample": sample.contiguous(), "predictions": predictions, "coefficients": coefficients, "step": 0}
    call |= {k: v.contiguous() for k, v in keywords.items()} | {name: torch.zeros(SHAPE) for name in WRITTEN}
    shared = call[other][1] if other == "predictions" else call[other]
    gap, elements = shared.nbytes // 4 + 1, math.prod(SHAPE)
    offset = data.draw(st.integers(1 - elements, gap - 1) | st.sampled_from([-elements, gap]))
    memory = torch.zeros(2 * elements + gap + 1)
    fresh = memory[elements : elements + gap].view(shared.dtype)[: shared.numel()].view(shared.shape).copy_(shared)
    call[other] = [predictions[0], fresh] if other == "predictions" else fresh
    call[output] = memory[elements + offset : 2 * elements + offset].view(SHAPE)
    start, end = call[output].data_ptr(), call[output].data_ptr() + call[output].nbytes
    if fresh.data_ptr() < end and start < fresh.data_ptr() + fresh.nbytes:
        later = max(output, other, key=WRITTEN.index) if other in WRITTEN else output
        with pytest.raises(ValueError, match=f"step_blend: {later}: expected memory of its own"):
            step_blend(**call, backend=backend)
    else:
        step_blend(**call, backend=backend)


@pytest.mark.fault(number=6)
def test_out_between_the_rows_of_an_input():
    memory = torch.zeros(4, *SHAPE[1:])
    with pytest.raises(ValueError, match="step_blend: out: expected memory of its own"):
        step_blend(memory[::2], [X, X], TABLE, 0, out=memory[1:3])
    step_blend(memory[::3], [X[:2], X], TABLE, 0, out=torch.zeros(SHAPE))
