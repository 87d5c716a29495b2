"""One denoising step with two models and guidance, DDIM: step_blend against the PyTorch code that a user
writes, as it is and compiled."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lr_kernels import reference, step_blend, step_coefficients

from ..harness import DTYPES, Contender, Problem, checked_error, relative_error
from ..target import CPU, FLOOR, Target

SHAPES = {"SD1.5 64²": (2, 4, 64, 64), "SDXL 128²": (8, 4, 128, 128), "16 channels 256²": (8, 16, 256, 256)}
GUIDANCE, WEIGHT = 7.5, 0.4
LEVELS = torch.linspace(0.999, 0.005, 1000)
TIMESTEPS = (600, 580)


def by_hand(
    sample: Tensor,
    vanilla_uncond: Tensor,
    vanilla_cond: Tensor,
    personal_uncond: Tensor,
    personal_cond: Tensor,
    level: Tensor,
    next_level: Tensor,
) -> Tensor:
    """Guidance of both models, their blend, and DDIM's step from ᾱ = level to next_level."""
    vanilla = vanilla_uncond + GUIDANCE * (vanilla_cond - vanilla_uncond)
    personal = personal_uncond + GUIDANCE * (personal_cond - personal_uncond)
    noise = (1 - WEIGHT) * vanilla + WEIGHT * personal
    clean = (sample - (1 - level) ** 0.5 * noise) / level**0.5
    return next_level**0.5 * clean + (1 - next_level) ** 0.5 * noise


def problems(dtypes: Sequence[str], target: Target = CPU) -> list[Callable[[], list[Problem]]]:
    """One builder per shape and dtype."""
    return [
        functools.partial(_build, model, shape, dtype, target) for model, shape in SHAPES.items() for dtype in dtypes
    ]


def _build(model: str, shape: tuple[int, ...], dtype: str, target: Target) -> list[Problem]:
    generator = torch.Generator().manual_seed(0)
    shape = (*shape[:2], 8, 8) if target.toy else shape
    tensors = [torch.randn(shape, generator=generator).to(target.device, DTYPES[dtype]) for _ in range(5)]
    sample, predictions = tensors[0], tensors[1:]
    now, after = (LEVELS[t].to(target.device) for t in TIMESTEPS)
    table = step_coefficients(
        LEVELS, TIMESTEPS, final_alpha_cumprod=1.0, guidance_scale=GUIDANCE, blend_weights=[WEIGHT, WEIGHT]
    ).to(target.device)
    out = torch.empty_like(sample)

    def ours(backend: str) -> None:  # into memory of the caller, as a sampling loop does
        step_blend(sample, predictions, table, 0, out=out, backend=backend)

    peers = {"eager": by_hand, **target.compiled({"torch.compile": by_hand})}
    doubles = [x.double() for x in tensors]
    truth = reference.step_blend(doubles[0], doubles[1:], table, 0)
    low = reference.step_blend(sample, predictions, table, 0)
    checked_error("by_hand", by_hand(*(x.float() for x in tensors), now, after), low, truth)

    def error(name: str, result: Tensor | None) -> float:
        if name.startswith(FLOOR):
            return 0.0
        # In bf16 a peer rounds after every operation, on numbers up to 7.5 times as large as the result. So `by_hand`
        # is checked once above, in fp32, and here only its error is reported.
        return checked_error(name, out, low, truth) if result is None else relative_error(result, truth)

    problem = Problem(
        op="step_blend",
        layer="x".join(map(str, shape)),
        model=model,
        shape="x".join(map(str, shape)),
        dtype=dtype,
        flops=2.0 * len(tensors) * sample.numel(),
        contenders={
            **target.ours(ours, has_cuda=True),
            **{name: Contender(functools.partial(f, *tensors, now, after)) for name, f in peers.items()},
            **target.copy_of(6 * sample.nbytes),
        },
        error=error,
    )
    return [problem]
