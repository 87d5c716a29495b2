"""`python -m benchmarks.overhead`: what a call costs before any arithmetic, at one query, one key and head_dim 8; and
what a call on a GPU costs the host without the launch: one that repeats, on Triton, and one that goes to the kernel for
Hopper as it is."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lr_kernels import AttentionPlan, Source, multi_source_attention, plan_attention, step_blend, step_coefficients
from lr_kernels.attention.tables import lay_out

CALLS, ROUNDS = 2000, 15


def microseconds(call: Callable[[], object]) -> float:
    """Median over rounds of the mean time of a call."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS)
    return statistics.median(rounds) * 1e6


def example() -> tuple[Tensor, list[Source], AttentionPlan]:
    """Three sources, one masked, one with a row table."""
    query, *parts = (torch.randn(2, 64, 8, 64).bfloat16() for _ in range(7))
    mask = torch.rand(1, 64) < 0.5
    rows = torch.tensor([0, 1], dtype=torch.int32)
    sources = [Source(*parts[:2]), Source(*parts[2:4], key_mask=mask), Source(*parts[4:], rows=rows)]
    return query, sources, plan_attention([None, mask, None])


def call_of_hopper() -> Callable[[], object]:
    """A call that goes to the op for Hopper as it is, on CPU tensors, by the emulator of the tests.

    The op does all it does on a card except the launch; the emulator makes TMA's descriptions of tensors.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import emulated

    from lr_kernels.attention import hopper
    from lr_kernels.runtime import ops

    query, sources, plan = example()
    emulated.set_timing(emulated.Timing(launches=0))
    return lambda: hopper.direct_call(ops.attention_flat_cuda, query, sources, None, None, False, plan)


def repeated_call() -> Callable[[], object]:
    """A repeated call of multi_source_attention as on a GPU with Triton.

    It does all that Python does except the launch. The tensors are on the CPU, which makes no difference to that code.
    """
    from lr_kernels.attention.repeats import signature
    from lr_kernels.triton import attention, attention_replay, replay

    query, sources, plan = example()

    def call() -> attention_replay.Call:
        decides = signature(query, sources, None, None, False, plan)
        assert decides is not None
        return attention_replay.Call(*decides, False)

    first = call()
    first.allocate(query)
    tables = lay_out(query, sources, plan, None)
    arguments, constants, programs = attention.launch_arguments(query, tables, first.out, None, 90)
    kernel = attention.multi_source_attention_forward_kernel
    launch = replay.record(kernel, None, programs, arguments, constants, first.pointers)
    assert launch is not None
    attention_replay.recorder.add(first.key, launch)

    def replayed() -> list:
        again = call()
        assert again.recorded is not None
        again.allocate(query)
        return again.recorded.arguments_of(again.pointers)

    return replayed


def call_of_op(x: Tensor, count: int) -> Callable[[], object]:
    """A direct call of the CPU's op on sources that are x itself."""
    op = torch.ops.lr_kernels.multi_source_attention_cpu.default
    none, out = [None] * count, torch.empty_like(x)
    lists = (none, none, none, [1] * count, none, none, none, none, none)  # rows … logit_bias
    arguments = (x, [x] * count, [x] * count, *lists, None, None, 0, [0] * count, [None], none, none, 1.0, out, None)
    return lambda: op(*arguments)


def main() -> None:
    x = torch.randn(1, 1, 1, 8)
    latents = torch.randn(1, 4, 8, 8)
    levels = torch.linspace(0.99, 0.01, 1000)
    table = step_coefficients(levels, [900, 800], final_alpha_cumprod=1.0, guidance_scale=7.5)

    calls = {
        "op, 1 source": call_of_op(x, 1),
        "op, 3 sources": call_of_op(x, 3),
        "multi_source_attention, 1 source": lambda: multi_source_attention(x, [Source(x, x)]),
        "multi_source_attention, 3 sources": lambda: multi_source_attention(x, [Source(x, x)] * 3),
        "step_blend": lambda: step_blend(latents, [latents, latents], table, 0),
        "SDPA, for comparison": lambda: F.scaled_dot_product_attention(x, x, x),
    }
    with torch.no_grad():
        for name, call in calls.items():
            print(f"{name:<52}{microseconds(call):7.1f} us")
        for name, build in {
            "on a GPU with Triton, repeated, but the launch": repeated_call,
            "on Hopper with CUDA C++, but the launch": call_of_hopper,
        }.items():
            print(f"{name:<52}{microseconds(build()):7.1f} us")


if __name__ == "__main__":
    main()
