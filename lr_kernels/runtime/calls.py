"""How a call's arguments are checked: shapes, dtypes, one device, dense last dimensions, memory of the outputs.

The C++ ops have the same rules (bindings/arguments.h). Contents are not looked at: on a GPU that would synchronize.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import fail, one_of
from .platform import KERNEL_DTYPES

Extent = int | tuple[int, ...] | str
"""What a dimension may be: one size, one of several sizes, or any size, then given by the name of the dimension."""
Dtypes = torch.dtype | tuple[torch.dtype, ...]


class Call:
    """The checks of one call. The tensor that decides dtype and device comes first, outputs come after the inputs."""

    def __init__(self, op: str, first: Tensor, argument: str, dtypes: Sequence[torch.dtype] = KERNEL_DTYPES) -> None:
        self.op, self.dtype, self.device, self.index = op, first.dtype, first.device, first.get_device()
        self._inputs: list[tuple[str, Tensor]] = []
        self._spans: list[tuple[int, int]] = []
        if first.dtype not in dtypes:
            expected = ", ".join(map(_bare, dtypes))
            fail(op, argument, f"one of {expected}", first.dtype, error=TypeError)

    def require(self, fits: bool, argument: str, expected: str, got: object) -> None:
        """ValueError unless it fits."""
        if not fits:
            fail(self.op, argument, expected, got)

    def lists(self, count: int, **lists: Sequence[object]) -> None:
        """Every list has so many entries."""
        for name, x in lists.items():
            if len(x) != count:
                fail(self.op, name, f"{count} entries", len(x))

    def input(
        self, name: str, x: Tensor, shape: Sequence[Extent], dense: int = 1, dtype: Dtypes | None = None
    ) -> torch.Size:
        """A tensor that is read, its last `dense` dimensions without gaps; returns its sizes.

        dtype: None for that of the first tensor.
        """
        self._look(name, x, shape, dense, dtype)
        self._inputs.append((name, x))
        return x.shape

    def output(
        self, name: str, x: Tensor, shape: Sequence[Extent], dense: int = 1, dtype: Dtypes | None = None
    ) -> None:
        """A tensor that is written: its elements share no memory with each other and with no other tensor."""
        self._look(name, x, shape, dense, dtype)
        if torch.compiler.is_compiling():
            return  # a traced tensor has no address
        start, end = self._span(name, x)
        if start == end:
            return
        reach = 0  # along the dimensions with smaller strides, first to last element
        for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride()) if size > 1):
            self.require(stride > reach, name, "elements that share no memory", x.stride())
            reach += (size - 1) * stride
        while self._inputs:
            self._spans.append(self._span(*self._inputs.pop()))
        for first, last in self._spans:
            if start < last and first < end:
                shared = "memory that another tensor of the call shares"
                fail(self.op, name, "memory of its own", shared, "pass another tensor")
        self._spans.append((start, end))

    def _look(self, name: str, x: Tensor, shape: Sequence[Extent], dense: int, dtype: Dtypes | None) -> None:
        """Dtype, device and shape fit, and the last dimensions are dense."""
        if dtype is None:
            if x.dtype != self.dtype:
                fail(self.op, name, str(self.dtype), x.dtype, "cast all tensors to one dtype", TypeError)
        elif x.dtype not in (dtype if isinstance(dtype, tuple) else (dtype,)):
            expected = " or ".join(map(_bare, dtype if isinstance(dtype, tuple) else (dtype,)))
            fail(self.op, name, expected, x.dtype, error=TypeError)
        if x.get_device() != self.index or (self.index < 0 and x.device != self.device):  # -1: CPU or meta
            fail(self.op, name, str(self.device), x.device)
        sizes = x.shape
        if sizes == shape and x.is_contiguous():  # so are most tensors, and this check precedes every launch
            return
        if len(sizes) != len(shape) or not all(map(_fits, sizes, shape)):
            fail(self.op, name, f"shape {_text(shape)}", tuple(sizes))
        if x.numel() == 0:
            return
        packed, strides = 1, x.stride()
        for i in range(len(sizes) - 1, len(sizes) - 1 - dense, -1):
            if sizes[i] > 1 and strides[i] != packed:
                last = f"a tensor with no gaps in the last {dense} dimensions"
                expected = "a contiguous tensor, with no gaps" if dense == len(sizes) else last
                fail(self.op, name, expected, f"strides {strides}")
            packed *= sizes[i]

    def _span(self, name: str, x: Tensor) -> tuple[int, int]:
        """[first byte, end) of the memory from the first to the last element."""
        if x.numel() == 0:
            return 0, 0
        start = x.data_ptr()
        self.require(start != 0, name, "a tensor with memory", "one whose memory was released")
        if x.is_contiguous():
            return start, start + x.nbytes
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        return start, start + (reach + 1) * x.element_size()


def _fits(size: int, wanted: Extent) -> bool:
    if isinstance(wanted, str):
        return True
    return one_of(size, *wanted) if isinstance(wanted, tuple) else size == wanted


def _text(shape: Sequence[Extent]) -> str:
    sizes = (" or ".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in shape)
    return f"({', '.join(sizes)}{',' * (len(shape) == 1)})"


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
