"""The two readings of the retouch stage (arXiv 2407.09779): which keys and values each query of the batch reads, as row
tables and group bits. Built once for a mask, used by all layers of one token count."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...attention.api import multi_source_attention
from ...attention.plan import AttentionPlan, plan_attention
from ...runtime.checks import fail
from ...source import Source

OWN, BACKGROUND, FOREGROUND = 1, 2, 4
"""Group bits: rows that attend to themselves, a target's surroundings, its subject (FOREGROUND << s of subject s)."""
MAX_SUBJECTS = 6


@dataclass(frozen=True)
class RetouchBatch:
    """The rows of one UNet call. Each half of the guidance has `images` targets, `images` contexts (if any, and unless
    a bank holds them), the references (unless a bank holds them)."""

    images: int
    context: bool
    guided: bool
    references: int = 1
    banked: bool = False
    """the references are in a bank"""
    context_banked: bool = False
    """the contexts are in a bank: rows (unconditional, conditional) of every image, as stage 1 computes them"""
    first_half: int = 0
    """the half of the banks that the first half of this batch reads: 1 if guidance has ended since the banks were
    filled"""

    @property
    def context_rows(self) -> int:
        """How many contexts each half of the batch has."""
        return self.images if self.context and not self.context_banked else 0

    @property
    def half(self) -> int:
        """How many rows each half of the guidance has."""
        return self.images + self.context_rows + (0 if self.banked else self.references)

    @property
    def halves(self) -> int:
        """2 (unconditional, conditional) with guidance, else 1."""
        return 2 if self.guided else 1

    @property
    def size(self) -> int:
        """How many rows all halves have together."""
        return self.half * self.halves

    def targets(self, x: Tensor) -> list[Tensor]:
        """x (size, ...) -> per half the target rows (images, ...), as views."""
        return [x[start : start + self.images] for start in range(0, self.size, self.half)]

    def own_rows(self, device: torch.device) -> Tensor:
        """int32 (size,): the row of the batch that each row reads besides references. A target reads its context: -1
        where a bank has it, itself where there is none. Other rows read themselves."""

        def row(start: int, i: int) -> int:
            if i >= self.images:
                return start + i
            return -1 if self.context_banked else start + i + self.context_rows

        halves = [[row(start, i) for i in range(self.half)] for start in range(0, self.size, self.half)]
        return self._table(halves, device)

    def banked_context_rows(self, device: torch.device) -> Tensor:
        """int32 (size,): the row that each target reads in the contexts' bank; -1: none."""
        others = [-1] * (self.half - self.images)
        first = self.first_half * self.images
        halves = [[first + half * self.images + i for i in range(self.images)] + others for half in range(self.halves)]
        return self._table(halves, device)

    def reference_rows(self, reference: int, device: torch.device) -> Tensor:
        """int32 (size,): the row that each row reads as that reference, in the batch or in the bank; -1: none."""
        per_half, first = self.half, self.half - self.references
        if self.banked:
            per_half, first = self.references, self.first_half * self.references
        halves = [
            [half * per_half + first + reference] * self.images + [-1] * (self.half - self.images)
            for half in range(self.halves)
        ]
        return self._table(halves, device)

    @staticmethod
    def _table(halves: list[list[int]], device: torch.device) -> Tensor:
        return torch.tensor(halves, dtype=torch.int32, device=device).flatten()


class Routing(NamedTuple):
    """Reading "routing": each query reads either a reference's foreground or the context. Built by `route`."""

    held: tuple[str, ...]
    """where each source is: "batch" (rows of the layer's own), "contexts" or "references" (rows of these banks)"""
    rows: tuple[Tensor, ...]
    """the row table of each source"""
    key_groups: tuple[Tensor | None, ...]
    query_groups: Tensor
    plan: AttentionPlan

    def sources(
        self, key: Tensor, value: Tensor, references: Source | None = None, contexts: Source | None = None
    ) -> list[Source]:
        """The layer's own key and value (size, N, H, D), and those of the banks, through the row tables."""
        held = {"batch": Source(key, value), "references": references, "contexts": contexts}
        found = []
        for where, rows, groups in zip(self.held, self.rows, self.key_groups):
            source = held[where]
            assert source is not None, f"the bank of {where} is not there"
            found.append(source._replace(rows=rows, key_groups=groups))
        return found

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        references: Source | None = None,
        contexts: Source | None = None,
        *,
        backend: str = "auto",
    ) -> Tensor:
        """A layer's attention, (size, N, H, D)."""
        sources = self.sources(key, value, references, contexts)
        return multi_source_attention(query, sources, query_groups=self.query_groups, plan=self.plan, backend=backend)


def route(
    batch: RetouchBatch,
    target_mask: Tensor,
    reference_mask: Tensor,
    grid: tuple[int, int],
    shows: Sequence[int] = (0,),
) -> Routing:
    """Routing of the retouch stage for layers with `grid` tokens.

    A target's subject reads the foreground of its references and nothing else; where subjects overlap, that of all of
    them. Its background reads the whole context. Without contexts a subject reads its references together with its own
    row, the background its own row. Context and reference rows attend to themselves.

    Args:
        target_mask: bool (subjects, images, height, width), or (images, height, width) of one subject.
        reference_mask: bool (references, height, width), none empty.
        grid: (rows, columns) of the layer's tokens.
        shows: the subject of each reference.
    """
    subjects = [token_mask(mask, grid) for mask in _per_subject(target_mask)]
    references = token_mask(reference_mask, grid)
    device = references.device
    bits = [FOREGROUND << s for s in range(len(subjects))]
    target_groups = torch.stack([torch.where(mask, bit, 0) for mask, bit in zip(subjects, bits)]).sum(0)
    target_groups = torch.where(target_groups == 0, BACKGROUND, target_groups).to(torch.uint8)
    query_groups = torch.full((batch.size, references.shape[1]), OWN, dtype=torch.uint8, device=device)
    for images in batch.targets(query_groups):
        images.copy_(target_groups)
    visible = torch.full_like(query_groups[:1], OWN | BACKGROUND) if batch.context else None
    held: list[str] = []
    rows: list[Tensor] = []
    key_groups: list[Tensor | None] = []
    if not (batch.banked and batch.context_banked):  # else the batch is the targets alone, and nobody reads them
        held, rows, key_groups = ["batch"], [batch.own_rows(device)], [visible]
    if batch.context_banked:
        held, rows, key_groups = [*held, "contexts"], [*rows, batch.banked_context_rows(device)], [*key_groups, visible]
    for r, (mask, s) in enumerate(zip(references, shows, strict=True)):
        held.append("references" if batch.banked else "batch")
        rows.append(batch.reference_rows(r, device))
        key_groups.append(torch.where(mask[None], bits[s], 0).to(torch.uint8))
    together = [sum(some) for size in range(1, len(bits) + 1) for some in combinations(bits, size)]
    classes = (OWN, BACKGROUND, *together)  # named, since looking for them would synchronize with a GPU
    plan = plan_attention([None] * len(key_groups), key_groups, query_groups, query_classes=classes)
    return Routing(tuple(held), tuple(rows), tuple(key_groups), query_groups, plan)


class Swap(NamedTuple):
    """Reading "swap": queries and keys of the context, values of the reference where the two match. Built by `swap`."""

    rows: Tensor
    """int32 (size,): each target's context, else the row itself"""
    halves: tuple[tuple[Tensor, int, Tensor], ...]
    """per half and reference: the rows that its targets read, the reference's row, its token for every key (size, N)"""
    key_groups: tuple[Tensor, ...]
    query_groups: Tensor
    plan: AttentionPlan

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        references: Source | None = None,
        contexts: Source | None = None,
        *,
        backend: str = "auto",
    ) -> Tensor:
        """A layer's attention, (size, N, H, D); there are no banks in this reading."""
        sources = [Source(key, value, self.rows, key_groups=self.key_groups[0])]
        for (rows, reference, match), groups in zip(self.halves, self.key_groups[1:]):
            appearance = value[reference : reference + 1].expand(value.shape)  # one row, read as every row's
            sources.append(Source(key, appearance, rows, key_groups=groups, value_index=match))
        structure = query.index_select(0, self.rows)
        return multi_source_attention(
            structure, sources, query_groups=self.query_groups, plan=self.plan, backend=backend
        )


def swap(
    batch: RetouchBatch,
    target_mask: Tensor,
    reference_mask: Tensor,
    grid: tuple[int, int],
    shows: Sequence[int],
    matches: Sequence[tuple[Tensor, Tensor]],
) -> Swap:
    """Appearance matching (arXiv 2402.09812) from the references to the contexts, for layers with `grid` tokens.

        out = softmax(Q_ctx · K_ctx^T) · V',   V'[j] = V_ref[match[j]] where matched, else V_ctx[j]

    matched: token j of the context is of the subject, its match is consistent and in the reference's foreground.

    Of several references of a subject the first that matches counts.

    Args:
        target_mask, reference_mask, grid, shows: as in `route`.
        matches: per reference what `correspondence` says of the contexts: index and consistent, (images, N) each.
    """
    subjects = [token_mask(mask, grid) for mask in _per_subject(target_mask)]
    references = token_mask(reference_mask, grid)
    device = references.device
    query_groups = torch.full((batch.size, references.shape[1]), OWN, dtype=torch.uint8, device=device)
    for rows in batch.targets(query_groups):
        rows.fill_(FOREGROUND)
    own_groups = torch.full_like(query_groups, OWN | FOREGROUND)
    free = torch.ones_like(subjects[0])
    halves, groups = [], []
    for r, (s, (index, consistent)) in enumerate(zip(shows, matches, strict=True)):
        matched = consistent & subjects[s] & references[r][index] & free
        free = free & ~matched
        for half in range(batch.halves):
            start = half * batch.half
            targets, contexts = (slice(start + k * batch.images, start + (k + 1) * batch.images) for k in (0, 1))
            table = torch.full_like(query_groups, 0, dtype=torch.int32)
            table[targets] = table[contexts] = index.int()  # for the query's row and for the row that it reads
            rows = torch.full((batch.size,), -1, dtype=torch.int32, device=device)
            rows[targets] = torch.arange(contexts.start, contexts.stop, dtype=torch.int32, device=device)
            halves.append((rows, start + batch.half - batch.references + r, table))
            shown = torch.zeros_like(query_groups)
            shown[contexts] = torch.where(matched, FOREGROUND, 0).to(torch.uint8)
            own_groups[contexts] &= ~shown[contexts]
            groups.append(shown)
    key_groups = (own_groups, *groups)
    plan = plan_attention([None] * len(key_groups), key_groups, query_groups, query_classes=(OWN, FOREGROUND))
    return Swap(batch.own_rows(device), tuple(halves), key_groups, query_groups, plan)


def _per_subject(mask: Tensor) -> Tensor:
    """(subjects, images, height, width)."""
    mask = mask[None] if mask.dim() == 3 else mask
    if mask.dim() != 4 or not 1 <= len(mask) <= MAX_SUBJECTS:
        fail("route", "target_mask", f"(1 to {MAX_SUBJECTS} subjects, images, height, width)", tuple(mask.shape))
    return mask


def in_ratio(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether square patches of some size make so many rows and columns of height and width, with less than a patch
    left over: floor(height / size) and floor(width / size)."""
    return height * columns < width * (rows + 1) and width * rows < height * (columns + 1)


def token_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks of any size at a layer's tokens: those that the mask covers by half.

    Where none is, the most covered ones: a small subject would otherwise vanish and leave its queries without keys.

    Args:
        mask: bool (B, height, width).
        grid: (rows, columns) of the layer's tokens, as from `layer_grid`.

    Returns:
        bool (B, rows · columns); a row is all False only where its mask is.

    Raises:
        ValueError: a mask of another rank.
    """
    if mask.dim() != 3:
        fail("token_mask", "mask", "shape (B, height, width)", tuple(mask.shape))
    area = F.adaptive_avg_pool2d(mask[:, None].float(), grid).flatten(1)
    return (area >= area.amax(1, keepdim=True).clamp(max=0.5)) & (area > 0)
