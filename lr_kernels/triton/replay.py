"""Recorded calls: a call whose shapes, strides and dtypes came before is launched without being checked again.

A diffusion model calls the same layers with the same shapes hundreds of times. Checking the arguments, laying them out
and Triton's own look-up of the compiled kernel take ten times as long as the launch itself. A recorded call is the
compiled kernel and its arguments; a call that repeats it only exchanges the addresses of the tensors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .launch import on_device

RECORDED_CALLS = 1024
"""When there are this many recorded calls, all are forgotten."""


class Launch(NamedTuple):
    """A compiled kernel and its arguments."""

    compiled: Any
    programs: int
    arguments: tuple
    """In the kernel's order, constants included; None where a tensor goes, which would live as long as the record."""
    single: tuple[tuple[int, int], ...]
    """(place of a pointer among the arguments, place of its tensor in the call)"""
    several: tuple[tuple[int, tuple[int, ...]], ...]
    """(place of a tuple of pointers among the arguments, places of its tensors in the call)"""

    def run(self, pointers: Sequence[int], device: torch.device) -> None:
        """Launch with the tensors of another call of the same signature, on the current stream."""
        arguments = self.arguments_of(pointers)
        if torch.cuda.current_device() != device.index:
            with on_device(device):
                self._launch(arguments, device.index)
        else:
            self._launch(arguments, device.index)

    def arguments_of(self, pointers: Sequence[int]) -> list:
        """The kernel's arguments with the tensors of another call."""
        arguments = list(self.arguments)
        for place, i in self.single:
            arguments[place] = pointers[i]
        for place, many in self.several:
            arguments[place] = tuple([pointers[i] for i in many])
        return arguments

    def _launch(self, arguments: list, device: int) -> None:
        compiled, stream, hooks = self.compiled, driver.active.get_current_stream(device), knobs.runtime
        compiled.run(
            self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata,
            compiled.launch_metadata((self.programs, 1, 1), stream, *arguments),
            hooks.launch_enter_hook, hooks.launch_exit_hook, *arguments,
        )  # fmt: skip


def record(
    kernel: Any, compiled: Any, programs: int, arguments: tuple, constants: dict, pointers: Sequence[int]
) -> Launch | None:
    """The launch `compiled = kernel[(programs,)](*arguments, **constants)` as one that can run again with other tensors
    of the same metadata, `pointers` being the addresses of this call's tensors.

    None where the arguments hold a tensor that is none of these (one that the launcher made: a table in another dtype),
    or where an address is not a multiple of 16: Triton compiles such calls apart, and their tables are passed shifted.
    """
    if any(p % 16 for p in pointers):
        return None
    place_of = {p: i for i, p in reversed([*enumerate(pointers)])}
    whole = [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])]
    single, several = [], []
    for place, x in enumerate(whole):
        tensors = (
            x if isinstance(x, tuple) and x and isinstance(x[0], Tensor) else (x,) if isinstance(x, Tensor) else ()
        )
        if any(t.data_ptr() not in place_of for t in tensors):
            return None
        if isinstance(x, Tensor):
            single.append((place, place_of[x.data_ptr()]))
        elif tensors:
            several.append((place, tuple(place_of[t.data_ptr()] for t in tensors)))
        if tensors:
            whole[place] = None
    return Launch(compiled, programs, tuple(whole), tuple(single), tuple(several))


class Recorder:
    """The recorded calls of one operator."""

    def __init__(self) -> None:
        self._launches: dict[tuple, Launch] = {}

    def get(self, key: tuple) -> Launch | None:
        """The launch of a call with this key, or None."""
        return self._launches.get(key)

    def add(self, key: tuple, launch: Launch) -> None:
        """Keep a launch; beyond RECORDED_CALLS all earlier ones are forgotten."""
        if len(self._launches) >= RECORDED_CALLS:
            self._launches.clear()
        self._launches[key] = launch
