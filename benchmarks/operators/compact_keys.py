"""Masks and groups turned into the lists of visible keys that attention reads: plan_attention, on a GPU the operator
compact_keys, against torch.nonzero and a stable argsort.

A list is the visible keys in ascending order; what follows them in its row has no meaning. nonzero makes ragged lists,
one after the other, and waits for the GPU each time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lr_kernels import plan_attention

from ..harness import Contender, Problem
from ..target import CPU, Target

VISIBLE = 0.3


class Case(NamedTuple):
    id: str
    model: str
    rows: int
    tokens: int
    classes: tuple[int, ...]
    """The bytes of the query groups; empty: a mask and no groups."""


CASES = (
    Case("mask, 32²", "SD1.5", 1, 1024, ()),
    Case("mask, 64²", "SD1.5", 1, 4096, ()),
    Case("mask, 64², 16 rows", "SDXL", 16, 4096, ()),
    Case("routing, 64²", "SDXL", 2, 4096, (1, 2)),
)

Lists = list[list[Tensor]]
"""Per class and row, the visible keys."""


class Inputs(NamedTuple):
    mask: Tensor | None  # bool (R, M)
    groups: Tensor | None  # uint8 (R, M)
    query_groups: Tensor | None  # uint8 (R, M)
    classes: tuple[int, ...]

    def visible(self) -> Tensor:
        """bool (C, R, M)"""
        if self.groups is None:
            assert self.mask is not None
            return self.mask[None]
        return torch.stack([(self.groups & c) != 0 for c in self.classes])


def by_nonzero(inputs: Inputs) -> tuple[Lists, list[Tensor]]:
    """The lists, and the queries of each row class by class."""
    keys = [[row.nonzero()[:, 0].int() for row in rows] for rows in inputs.visible()]
    if inputs.query_groups is None:
        return keys, []
    order = [torch.cat([(row == c).nonzero()[:, 0].int() for c in inputs.classes]) for row in inputs.query_groups]
    return keys, order


def by_argsort(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Padded lists (C, R, M), their lengths (C, R), and the queries of each row class by class (R, M)."""
    visible = inputs.visible()
    index = visible.byte().argsort(dim=2, descending=True, stable=True).int()
    queries = inputs.query_groups
    order = None if queries is None else queries.argsort(dim=1, stable=True).int()
    return index, visible.sum(2, dtype=torch.int32), order


def problems(dtypes: Sequence[str], target: Target = CPU) -> list[Callable[[], list[Problem]]]:
    """One builder per case; masks have no dtype to choose."""
    return [functools.partial(_build, case, target) for case in CASES]


def inputs_of(case: Case, target: Target) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = (case.rows, target.size(case.tokens))
    chosen = torch.rand(shape, generator=generator) < VISIBLE
    if not case.classes:
        return Inputs(chosen.to(target.device), None, None, ())
    groups, query_groups = ((1 + (torch.rand(shape, generator=generator) < VISIBLE)).byte() for _ in range(2))
    return Inputs(None, groups.to(target.device), query_groups.to(target.device), case.classes)


def _build(case: Case, target: Target) -> list[Problem]:
    inputs = inputs_of(case, target)
    expected, expected_order = by_nonzero(Inputs(*(x.cpu() if isinstance(x, Tensor) else x for x in inputs)))

    def ours() -> tuple[Tensor, Tensor, Tensor | None]:
        plan = plan_attention([inputs.mask], [inputs.groups], inputs.query_groups, query_classes=case.classes or None)
        index, count = plan.key_index[0], plan.key_count[0]
        assert index is not None and count is not None
        return index[:, :, 0], count[..., 0], plan.query_order

    def error(name: str, result: tuple) -> float:
        keys, order = result if name == "nonzero" else (_ragged(*result[:2]), result[2])
        for wanted, got in zip((x for rows in expected for x in rows), (x for rows in keys for x in rows), strict=True):
            assert torch.equal(wanted, got.cpu()), f"{name}: another list of keys"
        for i, wanted in enumerate(expected_order):
            assert torch.equal(wanted, order[i].cpu()), f"{name}: another order of the queries"
        return 0.0

    lines = {"nonzero": by_nonzero, "argsort": by_argsort, **target.compiled({"argsort, compiled": by_argsort})}
    rows, tokens = case.rows, target.size(case.tokens)
    return [
        Problem(
            op="compact_keys",
            layer=case.id,
            model=case.model,
            shape=f"{rows}x{tokens}",
            dtype="bool" if not case.classes else "uint8",
            flops=float(rows * tokens * max(1, len(case.classes))),
            contenders={
                **target.ours(lambda backend: ours()),
                **{name: Contender(functools.partial(f, inputs)) for name, f in lines.items()},
            },
            error=error,
        )
    ]


def _ragged(index: Tensor, count: Tensor) -> Lists:
    return [[row[:n] for row, n in zip(rows, counts.tolist())] for rows, counts in zip(index, count)]
