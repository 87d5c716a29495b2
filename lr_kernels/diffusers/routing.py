"""Row order of the retouch batch, and the row tables and group bits that say which keys each of its queries reads."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..plan import AttentionPlan, plan_attention
from ..source import Source

FOREGROUND, BACKGROUND, OWN = 1, 2, 4
"""Group bits: a target's subject, a target's surroundings, and rows that attend to themselves."""


@dataclass(frozen=True)
class RetouchBatch:
    """Rows of one UNet call. Each half of the guidance: `images` targets, `images` contexts (if any), the reference."""

    images: int
    context: bool
    guided: bool

    @property
    def half(self) -> int:
        """Rows per half of the guidance."""
        return self.images * (2 if self.context else 1) + 1

    @property
    def halves(self) -> int:
        """2 (unconditional, conditional) with guidance, else 1."""
        return 2 if self.guided else 1

    @property
    def size(self) -> int:
        return self.half * self.halves

    def targets(self, x: Tensor) -> list[Tensor]:
        """x (size, ...) -> per half the target rows (images, ...), as views."""
        return [x[start : start + self.images] for start in range(0, self.size, self.half)]

    def row_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two int32 (size,) tables: the row that each row reads as its own or context, and as reference (-1: none)."""
        own, reference = [], []
        for start in range(0, self.size, self.half):
            shift = self.images if self.context else 0
            targets = range(start, start + self.images)
            own += [row + shift for row in targets] + list(range(start + self.images, start + self.half))
            reference += [start + self.half - 1] * self.images + [-1] * (self.half - self.images)
        return tuple(torch.tensor(table, dtype=torch.int32, device=device) for table in (own, reference))


class Routing(NamedTuple):
    """What the self-attention layers of one token count pass to `multi_source_attention`; built by `route`."""

    rows: tuple[Tensor, Tensor]
    key_groups: tuple[Tensor | None, Tensor]
    query_groups: Tensor
    plan: AttentionPlan

    def sources(self, key: Tensor, value: Tensor) -> list[Source]:
        """The layer's own key and value (size, N, H, D), read twice through the row tables."""
        return [Source(key, value, rows, key_groups=groups) for rows, groups in zip(self.rows, self.key_groups)]


def route(batch: RetouchBatch, target_mask: Tensor, reference_mask: Tensor, grid: tuple[int, int]) -> Routing:
    """Routing of the retouch stage (arXiv 2407.09779) for layers with `grid` tokens.

    A target's foreground reads the reference's foreground and nothing else; its background reads the whole context.
    Without contexts the foreground reads the reference's foreground together with its own row, the background its own
    row. Context and reference rows attend to themselves.

    Args:
        target_mask: bool (images, height, width). reference_mask: bool (1, height, width), not empty.
        grid: (rows, columns) of the layer's tokens.
    """
    foreground = token_mask(target_mask, grid)
    reference = token_mask(reference_mask, grid)
    device = foreground.device
    query_groups = torch.full((batch.size, foreground.shape[1]), OWN, dtype=torch.uint8, device=device)
    for rows in batch.targets(query_groups):
        rows.copy_(torch.where(foreground, FOREGROUND, BACKGROUND))
    own_groups = torch.full_like(query_groups[:1], OWN | BACKGROUND) if batch.context else None
    key_groups = (own_groups, torch.where(reference, FOREGROUND, 0).to(torch.uint8))
    classes = (FOREGROUND, BACKGROUND, OWN)  # named, since looking for them would synchronize with a GPU
    plan = plan_attention([None, None], key_groups, query_groups, query_classes=classes)
    return Routing(batch.row_tables(device), key_groups, query_groups, plan)


def token_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool (B, height, width) -> bool (B, tokens): tokens that the mask covers by half.

    Where none is, the most covered ones: a small subject would otherwise vanish and leave its queries without keys.
    """
    area = F.adaptive_avg_pool2d(mask[:, None].float(), grid).flatten(1)
    return (area >= area.amax(1, keepdim=True).clamp(max=0.5)) & (area > 0)
