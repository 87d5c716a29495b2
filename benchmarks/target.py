"""Where the contenders of an operator run, and at which sizes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Layer
from .harness import OURS, Contender, NotRun

FLOOR = "floor: "
"""The prefix of a contender's name that marks a lower bound: it does only part of the operator's work, so it is no
peer."""


@dataclass(frozen=True)
class Target:
    device: str = "cpu"
    backend: str = "cpu"
    """Ours: "cpu" or "triton"."""
    toy: bool = False
    """Sizes that Triton's interpreter and a test can afford."""
    compiles: bool = True
    """Whether torch.compile is among the peers; it takes 5 to 15 seconds per case."""

    def size(self, full: int) -> int:
        """A number of tokens."""
        return max(16, full // 64) if self.toy else full

    def layer(self, full: Layer) -> Layer:
        return dataclasses.replace(full, tokens=self.size(full.tokens), heads=2) if self.toy else full

    def ours(self, call: Callable[[str], object], *, has_cuda: bool = False) -> dict[str, Contender]:
        """The package's contenders of an operator, given what calls it with a backend. has_cuda: its kernel on a GPU
        is CUDA C++, and Triton's is timed besides."""
        if self.backend == "cpu" or not has_cuda:
            return {OURS: Contender(lambda: call(self.backend))}
        return {OURS: Contender(lambda: call("cuda")), f"{OURS} (Triton)": Contender(lambda: call("triton"))}

    def compiled(self, lines: dict[str, Callable[..., object]]) -> dict[str, Callable[..., object]]:
        """torch.compile of peers' lines; nothing where nothing is to be compiled."""
        if not self.compiles:
            return {}
        torch._dynamo.reset()  # a recompilation too many would silently run uncompiled
        return {name: _compiled(function) for name, function in lines.items()}

    def copy_of(self, read_and_written: int) -> dict[str, Contender]:
        """A copy of as many bytes as the operator reads and writes at least."""
        source = torch.empty(read_and_written // 2, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)

        def copy() -> Tensor:
            return target.copy_(source)

        return {f"{FLOOR}copy of the same bytes": Contender(copy)}


CPU = Target()


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    compiled = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*arguments: object) -> object:
        try:
            return compiled(*arguments)
        except Exception as error:  # whatever the compiler cannot do on this machine
            raise NotRun(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error

    return call
