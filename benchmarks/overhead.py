"""`python -m benchmarks.overhead`: what a call costs before any arithmetic, at one query, one key and head_dim 8."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from lr_kernels import Source, multi_source_attention, step_blend, step_coefficients

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


def main() -> None:
    x = torch.randn(1, 1, 1, 8)
    out = torch.empty_like(x)
    op = torch.ops.lr_kernels.multi_source_attention_cpu.default
    latents = torch.randn(1, 4, 8, 8)
    levels = torch.linspace(0.99, 0.01, 1000)
    table = step_coefficients(levels, [900, 800], final_alpha_cumprod=1.0, guidance_scale=7.5)

    def attention_op(count: int) -> Callable[[], object]:
        none = [None] * count
        arguments = (x, [x] * count, [x] * count, *(none,) * 7, None, None, [0] * count, [None], 1.0, out, None)
        return lambda: op(*arguments)

    calls = {
        "op, 1 source": attention_op(1),
        "op, 3 sources": attention_op(3),
        "multi_source_attention, 1 source": lambda: multi_source_attention(x, [Source(x, x)]),
        "multi_source_attention, 3 sources": lambda: multi_source_attention(x, [Source(x, x)] * 3),
        "step_blend": lambda: step_blend(latents, [latents, latents], table, 0),
        "SDPA, for comparison": lambda: F.scaled_dot_product_attention(x, x, x),
    }
    with torch.no_grad():
        for name, call in calls.items():
            print(f"{name:<36}{microseconds(call):7.1f} us")


if __name__ == "__main__":
    main()
