"""step_blend: the next latents of a denoising step in one pass. The tables that drive it: coefficients.py."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from .. import reference
from ..runtime import backends, modes, platform
from ..runtime.checks import check_memory, check_sequence, fail
from ..runtime.ops import kernel
from ..runtime.platform import KERNEL_DTYPES
from ..runtime.schemas import COLUMNS
from ..runtime.step_blend_checks import check_step_blend
from ..runtime.tensors import check_dense, is_plain, resolved, resolved_or_none

_OP = "step_blend"


def step_blend(
    sample: Tensor,
    predictions: Sequence[Tensor],
    coefficients: Tensor,
    step: int | Tensor,
    *,
    mask: Tensor | None = None,
    background: Tensor | None = None,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    keep_rows: Tensor | None = None,
    out: Tensor | None = None,
    model_input: Tensor | None = None,
    history_out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The next latents: guidance, model blend, scheduler update and mask blend, reading every tensor once.

        G    = Σ_k g_k·prediction_k
        next = a·sample + e·G + σ·noise + h·history
        next = m·next + (1 - m)·(p·background + q·noise)          where a mask is given

    with coefficients[step, row] = g_0 … g_{K-1}, a, e, σ, h, p, q, c, d, s; exactly: `reference.step_blend`. Sums are
    fp32, rounded once to the sample's dtype. A tensor whose coefficient is 0 is not read: a NaN in it has no effect.

    Args:
        sample: (B, C, height, width), fp32, fp16 or bf16 (the reference backend also float64).
        predictions: 1 to 6 tensors like sample, in the order of the table.
        coefficients: fp32 (steps, B or 1, K + 9), from `step_coefficients` or `sigma_coefficients`.
        step: the row of the table, an int or an int32 or int64 tensor of one element on the sample's device.
        mask: bool or float (B or 1, height, width) in [0, 1]: 1 takes the denoised latents, 0 the background.
        background: like sample; needed with mask or keep_rows.
        noise: like sample; needed where σ is not 0, and where q is not 0 and there is a background.
        history: like sample, the history_out of the step before; needed where h is not 0: by multistep solvers, except
            in their first step.
        keep_rows: bool (B,): rows that take p·background + q·noise whole, as references do; nothing else of them is
            read.
        out: like sample, receives the result; a fresh large tensor costs more time than the arithmetic.
        model_input: (n·B, C, height, width), receives the input of the next model call: s·next, n times along the batch
            (2 for classifier-free guidance). s scales the sample as the solver's model expects it.
        history_out: like sample, receives the prediction of the clean latents, c·sample + d·G, 0 in keep_rows.
        backend: "auto", "cpu", "cuda", "triton" or "reference". A name never falls back.

    Inputs may have any strides. One whose rows are contiguous is read in place ("triton": one that is contiguous), any
    other through one contiguous copy. Outputs are contiguous and share memory with no input and not with each other. On
    CUDA the values of step and coefficients are not checked, since reading them would synchronize: a step outside the
    table, or a missing tensor whose coefficient is not 0, gives NaN.

    Returns:
        (B, C, height, width) in the sample's dtype; `out` where it is given.

    Raises:
        ValueError: a shape, device, step or argument that does not fit; an output that shares memory.
        TypeError: a dtype that does not fit. NotImplementedError: a named kernel backend where a gradient is required.
        RuntimeError: the named backend is not available; the coefficients need a noise or history that is None.
    """
    if not isinstance(predictions, (list, tuple)):
        check_sequence(_OP, "predictions", predictions)
    predictions = list(predictions)
    inputs = [sample, *predictions, coefficients]
    for x in (background, noise, history, mask, keep_rows):
        if x is not None:
            inputs.append(x)
    outputs = [x for x in (out, model_input, history_out) if x is not None]
    tensors = inputs + outputs
    for x in tensors:
        if x.__class__ is not Tensor and not isinstance(x, Tensor):
            _name_other(
                sample=sample, coefficients=coefficients, mask=mask, background=background, noise=noise,
                history=history, keep_rows=keep_rows, out=out, model_input=model_input, history_out=history_out,
                **{f"predictions[{i}]": x for i, x in enumerate(predictions)},
            )  # fmt: skip
    device, training = sample.device, torch.is_grad_enabled()
    lacking = backends.forward_only(*inputs) if training or modes.forward_mode_active() else None
    name = backends.choose(_OP, backend, device, sample.dtype, lacking, "sample")
    if name == "reference" and modes.transforms_active():
        modes.refuse_vmap(_OP, {"step": step})
        if outputs:
            names, expected = "out, model_input, history_out", "None inside a torch.func transform"
            fail(_OP, names, expected, "a tensor", "use the one that is returned", NotImplementedError)
    refusal = None
    if name in ("cpu", "cuda") and background is None and mask is None and keep_rows is None:
        counter = None if type(step) is int else _counter(step, device)
        if (type(step) is int or counter is not None) and _plain(tensors, outputs, device, training):
            # The binding itself refuses what does not fit. Checking here as well would take a third of a small call, so
            # it is only done to word a refusal.
            result = torch.empty_like(sample) if out is None else out
            try:
                kernel(_OP, name)(
                    sample, predictions, coefficients, counter, 0 if counter is not None else step,
                    None, None, noise, history, None, result, model_input, history_out,
                )  # fmt: skip
                return result
            except RuntimeError as error:
                refusal = error
    sample, coefficients = resolved(_OP, "sample", sample), resolved(_OP, "coefficients", coefficients)
    predictions = [resolved(_OP, f"predictions[{i}]", x) for i, x in enumerate(predictions)]
    mask, background = resolved_or_none(_OP, "mask", mask), resolved_or_none(_OP, "background", background)
    noise, history = resolved_or_none(_OP, "noise", noise), resolved_or_none(_OP, "history", history)
    keep_rows = resolved_or_none(_OP, "keep_rows", keep_rows)
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        fail(_OP, "mask", "bool or a floating dtype", mask.dtype, error=TypeError)
    for label, x in (("out", out), ("model_input", model_input), ("history_out", history_out)):
        if x is not None:
            _check_writable(label, x)
    row, step_tensor = _split_step(step)
    check_step_blend(
        sample, predictions, coefficients, step_tensor, row, mask, background, noise, history, keep_rows,
        out, model_input, history_out,
        dtypes=(*KERNEL_DTYPES, torch.float64), mask_dtypes=() if mask is None else (mask.dtype,),
    )  # fmt: skip
    if refusal is not None:  # only the binding looks at the coefficients that need a tensor, and at the launch
        raise refusal
    if step_tensor is None and torch.compiler.is_compiling():  # an int would recompile the graph for the next step
        row, step_tensor = 0, torch.full((1,), row, dtype=torch.int32, device=device)
    _check_size(sample, [*predictions, background, noise, history], out, name)
    if name == "reference":
        result = reference.step_blend(
            sample,
            predictions,
            coefficients,
            step,
            mask=mask,
            background=background,
            noise=noise,
            history=history,
            keep_rows=keep_rows,
            model_input=model_input,
            history_out=history_out,
        )
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty_like(sample, memory_format=torch.contiguous_format)
    if name == "cpu" and not platform.ERRORS_REACH_PYTHON:
        _check_terms(coefficients, row, step_tensor, background, noise, history)
    kernel(_OP, name)(
        _dense_rows(sample),
        [x if x.is_contiguous() else _dense_rows(x) for x in predictions],
        coefficients.contiguous(),
        step_tensor,
        row,
        None if mask is None else mask.float().contiguous(),
        None if background is None else _dense_rows(background),
        None if noise is None else _dense_rows(noise),
        None if history is None else _dense_rows(history),
        None if keep_rows is None else keep_rows.contiguous(),
        out,
        model_input,
        history_out,
    )
    return out


def _name_other(**arguments: object) -> None:
    """TypeError that names the argument that is no tensor."""
    for name, x in arguments.items():
        if x is None and name not in ("sample", "coefficients") and not name.startswith("predictions"):
            continue
        if not isinstance(x, Tensor):
            fail(_OP, name, "a tensor", type(x).__name__, error=TypeError)


def _counter(step: Tensor | int, device: torch.device) -> Tensor | None:
    """The step as the kernels on a GPU read it, where it is that already."""
    if not isinstance(step, Tensor) or device.type != "cuda":
        return None
    fits = step.dtype == torch.int32 and step.numel() == 1 and step.device == device
    return step if fits and is_plain(step) else None


def _plain(tensors: list[Tensor], outputs: list[Tensor], device: torch.device, training: bool) -> bool:
    """Whether the C++ op takes the tensors as they are, and can itself check what is left to check."""
    if (
        not platform.ERRORS_REACH_PYTHON
        or torch.compiler.is_compiling()
        or (training and any(x.requires_grad for x in outputs))
    ):
        return False
    for x in tensors:
        if x.device != device or not x.is_contiguous() or x._is_zerotensor():
            return False
    return True


def _check_size(sample: Tensor, others: list[Tensor | None], out: Tensor | None, backend: str) -> None:
    """Refuse the result and the copies of inputs beyond the memory."""
    size = sample.numel() * sample.element_size()
    copies = sum(x is not None and _dense_strides(x) != x.stride()[1:] for x in (sample, *others))
    if backend == "reference":
        copies += 4 * 8 // sample.element_size()
    check_memory(_OP, "sample", size * (copies + (out is None)), sample.device)


def _dense_strides(x: Tensor) -> tuple[int, int, int]:
    _, _, height, width = x.shape
    return height * width, width, 1


def _dense_rows(x: Tensor) -> Tensor:
    """(B, C, height, width) with each row contiguous and the batch stride free."""
    if x.is_contiguous():
        return x
    return x if x.stride()[1:] == _dense_strides(x) else x.contiguous()


def _split_step(step: int | Tensor) -> tuple[int, Tensor | None]:
    """The step as an int, or as an int32 (1,) tensor that is not looked at: (0, tensor)."""
    if isinstance(step, Integral) and not isinstance(step, bool):  # NumPy's too
        return int(step), None
    if not isinstance(step, Tensor):
        fail(_OP, "step", "an int or an integer tensor", type(step).__name__, error=TypeError)
    step = resolved(_OP, "step", step)
    if step.numel() != 1:
        fail(_OP, "step", "one element", f"shape {tuple(step.shape)}")
    if step.dtype not in (torch.int32, torch.int64):
        fail(_OP, "step", "int32 or int64", step.dtype, error=TypeError)
    if step.device.type != "cpu" or torch.compiler.is_compiling():
        return 0, step.reshape(1).int()
    return int(step), None


def _check_terms(
    coefficients: Tensor,
    row: int,
    step: Tensor | None,
    background: Tensor | None,
    noise: Tensor | None,
    history: Tensor | None,
) -> None:
    """RuntimeError for a step outside the table and for a missing tensor whose coefficient is not 0, also in compiled
    graphs. The C++ op checks the same; this is for a torch in which an error of the op would end the process."""
    now = coefficients[row]
    if step is not None:
        last = coefficients.shape[0] - 1
        inside = ((step >= 0) & (step <= last)).all()
        torch._assert_async(inside, f"lr_kernels.{_OP}: step: expected 0 to {last}")
        now = coefficients.index_select(0, step.clamp(0, last))[0]
    first = coefficients.shape[2] - len(COLUMNS)
    for name, x, terms in (
        ("noise", noise, "sigma q" if background is not None else "sigma"),
        ("history", history, "h"),
    ):
        if x is None:
            unused = (now[:, [first + COLUMNS.index(term) for term in terms.split()]] == 0).all()
            expected = f"a tensor, since its coefficients of this step ({terms}) are not 0"
            torch._assert_async(unused, f"lr_kernels.{_OP}: {name}: expected {expected}, got None")


def _check_writable(name: str, x: Tensor) -> None:
    """ValueError unless x is a tensor that can take a result: with data of its own, and out of autograd's sight."""
    if not torch.compiler.is_compiling():
        check_dense(_OP, name, x)
        if not is_plain(x):
            hint = "pass torch.empty_like(sample)"
            fail(_OP, name, "a tensor with memory of its own", "a lazy negative or zero", hint)
    if x.requires_grad and torch.is_grad_enabled():
        fail(_OP, name, "a tensor that requires no gradient", "one that does")
