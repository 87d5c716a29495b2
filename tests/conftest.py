"""Triton's interpreter for machines without a GPU, with every access checked against the tensors of the launch.

Triton decides at import and at decoration whether it interprets, so both happen here, once, before any test. Outside
the fixture `device` the variable is unset: "auto" must not choose interpreted kernels in other tests.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as _patch:
        _patch.setenv("TRITON_INTERPRET", "1")
        import lr_kernels.triton  # noqa: F401

from triton.runtime import interpreter as _interpreter

MINUTES = {
    "test_evaluation.py",
    "test_toy.py",
    "test_benchmarks.py",
    "test_triton_compile.py",
    "test_triton_backward.py",
    "test_diffusers_compile.py",
    "test_hopper_faults.py",
    "test_cuda_compile.py",
}
"""Files that take minutes: first, so that no worker starts one when the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in MINUTES)


settings.register_profile("thorough", max_examples=2000)  # pytest --hypothesis-profile thorough

_POINTERS_AND_MASK = {"create_masked_load": (0, 1), "create_masked_store": (0, 2), "create_atomic_rmw": (1, 3)}
"""Places of the two arguments in the interpreter's builder functions."""


@pytest.fixture
def device(monkeypatch) -> str:
    """Where Triton kernels run here: the GPU, or interpreted on CPU tensors with checked accesses."""
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_accesses(monkeypatch)
    sum_exactly(monkeypatch)
    return "cpu"


@pytest.fixture
def poisoned():
    """Uninitialized memory is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.empty(2, 2).new_empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_thread():
    """For models so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_accesses(monkeypatch) -> None:
    """Make an interpreted load, store or atomic outside the tensors of its launch fail; by itself it would not."""
    builder, executor = _interpreter.InterpreterBuilder, _interpreter.GridExecutor
    ranges: list[tuple[int, int]] = []

    host_arguments = executor._init_args_hst

    def recorded(self, args_dev, kwargs):
        hosted = host_arguments(self, args_dev, kwargs)
        ranges[:] = _byte_ranges([*hosted[0], *hosted[1].values()])
        return hosted

    def checked(name: str):
        original = getattr(builder, name)

        def run(self, *args):
            pointers, mask = (args[place] for place in _POINTERS_AND_MASK[name])
            size = _interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
            addresses = np.asarray(pointers.data)[np.asarray(mask.data)].astype(np.int64)
            inside = np.zeros(addresses.shape, dtype=bool)
            for start, end in ranges:
                inside |= (addresses >= start) & (addresses + size <= end)
            if not inside.all():
                raise IndexError(f"{name}: {(~inside).sum()} of {inside.size} accesses outside the launch's tensors")
            return original(self, *args)

        monkeypatch.setattr(builder, name, run)

    monkeypatch.setattr(executor, "_init_args_hst", recorded)
    for name in _POINTERS_AND_MASK:
        checked(name)


def sum_exactly(monkeypatch) -> None:
    """Sum interpreted dot products in float64 and round once. NumPy's BLAS orders an fp32 sum as the processor and the
    place in the matrix suit it, so that a test would decide otherwise on another machine."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return _interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(_interpreter.InterpreterBuilder, "create_dot", create_dot)


def _byte_ranges(arguments) -> list[tuple[int, int]]:
    """[first byte, end) that each tensor among (nested tuples of) arguments spans."""
    found = []
    for x in arguments:
        if isinstance(x, tuple):
            found += _byte_ranges(x)
        elif isinstance(x, torch.Tensor) and x.numel():
            span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
            found.append((x.data_ptr(), x.data_ptr() + span * x.element_size()))
    return found


@pytest.fixture(scope="module")
def pipes():
    """The pipelines on tiny models, for the tests of a file."""
    from tiny_pipelines import fresh  # diffusers takes seconds to import

    return {"sd": fresh("sd"), "xl": fresh("xl")}


@pytest.fixture
def pipe(pipes):
    return pipes["sd"]
