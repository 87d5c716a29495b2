"""Matches between the features of a context and of a reference, and whether the way back agrees within 1.5 cells:
correspondence against the PyTorch code of DIFT and DreamMatcher, which store the similarities of all pairs."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lr_kernels import correspondence, reference

from ..harness import DTYPES, OURS, Contender, NotRun, Problem
from ..target import CPU, FLOOR, Target

RADIUS = 1.5
BLOCK = 1024
"""Target tokens whose similarities are stored at a time."""
CHECKED = 256
"""Targets of each row that are compared with float64."""


class Case(NamedTuple):
    id: str
    model: str
    side: int
    channels: int


CASES = (
    Case("32²", "SD1.5, middle up block", 32, 1280),
    Case("64²", "SDXL, middle up block", 64, 1280),
)

Match = tuple[Tensor, Tensor]
"""index int64 (B, N) and consistent bool (B, N)"""


def near(back: Tensor, index: Tensor, side: int) -> Tensor:
    """Whether the way there and back, through back (B, M), ends within RADIUS cells."""
    start = torch.arange(index.shape[1], device=index.device)
    end = back.gather(1, index)
    return (end // side - start // side) ** 2 + (end % side - start % side) ** 2 <= RADIUS**2


def stored(target: Tensor, like: Tensor, side: int) -> Match:
    similarity = F.normalize(target, dim=2) @ F.normalize(like, dim=2).mT
    index, back = similarity.argmax(2), similarity.argmax(1)
    return index, near(back, index, side)


def in_blocks(target: Tensor, like: Tensor, side: int) -> Match:
    target, like = F.normalize(target, dim=2), F.normalize(like, dim=2)
    index, best, back = [], None, None
    for start in range(0, target.shape[1], BLOCK):
        similarity = target[:, start : start + BLOCK] @ like.mT
        index.append(similarity.argmax(2))
        top, where = similarity.max(1)
        if best is None or back is None:
            best, back = top, where
        else:
            back = torch.where(top > best, where + start, back)
            best = torch.maximum(best, top)
    joined = torch.cat(index, 1)
    assert back is not None
    return joined, near(back, joined, side)


def widened(target: Tensor, like: Tensor, side: int) -> Match:
    """For processors that multiply fp32 faster."""
    return in_blocks(target.float(), like.float(), side)


def by_distance(target: Tensor, like: Tensor, side: int) -> Match:
    try:
        distance = torch.cdist(F.normalize(target, dim=2), F.normalize(like, dim=2))
    except RuntimeError as error:
        raise NotRun(str(error).splitlines()[0]) from error
    index, back = distance.argmin(2), distance.argmin(1)
    return index, near(back, index, side)


def problems(dtypes: Sequence[str], target: Target = CPU) -> list[Callable[[], list[Problem]]]:
    """One builder per case and dtype."""
    return [functools.partial(_build, case, dtype, target) for case in CASES for dtype in dtypes]


def features(side: int, channels: int, dtype: str, target: Target) -> tuple[Tensor, Tensor]:
    """Target and reference (1, N, C). The target is the reference moved by two rows of the grid, with noise; every
    fourth of its tokens is noise alone and has no match."""
    generator = torch.Generator().manual_seed(0)
    like = torch.randn(1, side**2, channels, generator=generator)
    noise = torch.randn(1, side**2, channels, generator=generator)
    moved = like.roll(2 * side, 1) + noise
    moved[:, ::4] = noise[:, ::4]
    return moved.to(target.device, DTYPES[dtype]), like.to(target.device, DTYPES[dtype])


def best(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, M) -> the index of the largest and its distance to the second largest, (B, N) each."""
    top = similarity.topk(2, 2)
    return top.indices[..., 0], top.values[..., 0] - top.values[..., 1]


def checker(x: Tensor, like: Tensor, side: int) -> Callable[[str, Match], float]:
    """The share of the checked targets whose results differ from float64's. They may where the best and the second best
    similarity, there or on the way back, are closer than the tolerance rule allows; elsewhere that is an error."""
    some = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))[:CHECKED].to(x.device)
    exact = reference.cosine_similarity(x[:, some].double(), like.double())
    index, margin = best(exact)
    found = like.double()[0][index]
    end, margin_back = best(reference.cosine_similarity(found, x.double()))
    consistent = (end // side - some // side) ** 2 + (end % side - some % side) ** 2 <= RADIUS**2
    low = reference.cosine_similarity(x[:, some], like)

    def error(name: str, result: Match) -> float:
        if name.startswith(FLOOR):
            return 0.0
        similarity = low if name.startswith(OURS) else low.to(x.dtype)
        rounding = torch.finfo(similarity.dtype).eps * exact.abs().max()
        allowed = 2 * ((similarity.double() - exact).abs().max() + rounding)
        clear = margin > allowed
        wrong = result[0][:, some] != index
        assert not (wrong & clear).any(), f"{name}: {int((wrong & clear).sum())} clear matches differ"
        clear = clear & (margin_back > allowed)
        other = result[1][:, some] != consistent
        assert not (other & clear).any(), f"{name}: {int((other & clear).sum())} clear ways back differ"
        assert clear.double().mean() > 0.5, f"{name}: too few matches are clear enough to check"
        return (wrong | other).double().mean().item()

    return error


def _build(case: Case, dtype: str, target: Target) -> list[Problem]:
    side, channels = (8, 32) if target.toy else (case.side, case.channels)
    x, like = features(side, channels, dtype, target)

    def ours(backend: str) -> Match:
        return correspondence(x, like, radius=RADIUS, grid=(side, side), backend=backend)

    lines = {"normalize + product + argmax": stored, "the same in blocks": in_blocks}
    compiled = target.compiled({f"{name}, compiled": f for name, f in lines.items()})
    peers = {**lines, **compiled, "cdist + argmin": by_distance}
    if x.dtype != torch.float32:
        peers["widened to fp32, in blocks"] = widened
    contenders = {name: Contender(functools.partial(f, x, like, side)) for name, f in peers.items()}
    units = F.normalize(x, dim=2), F.normalize(like, dim=2).mT
    return [
        Problem(
            op="correspondence",
            layer=case.id,
            model=case.model,
            shape=f"{side**2}x{channels}",
            dtype=dtype,
            flops=2.0 * side**4 * channels,
            contenders={
                **target.ours(ours),
                **contenders,
                f"{FLOOR}the product alone": Contender(lambda: torch.matmul(*units)),
            },
            error=checker(x, like, side),
        )
    ]
