"""What a UNet is told beside latents and timestep, for some rows of a batch; and a ControlNet's part of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor


class Condition(NamedTuple):
    """Conditions of B rows."""

    embeds: Tensor
    """(B, L, C), of the prompts"""
    added: dict[str, Tensor]
    """further ones by their names in `added_cond_kwargs`, (B, ...) each: SDXL's text_embeds and time_ids"""

    def rows(self, rows: slice | Tensor) -> "Condition":
        """Those of some of the rows."""
        return Condition(self.embeds[rows], {name: x[rows] for name, x in self.added.items()})

    @staticmethod
    def join(parts: Sequence["Condition"]) -> "Condition":
        """The rows of all parts."""
        added = {name: torch.cat([part.added[name] for part in parts]) for name in parts[0].added}
        return Condition(torch.cat([part.embeds for part in parts]), added)


Residuals = dict[str, Tensor | tuple[Tensor, ...]]
"""What a ControlNet adds to a UNet's features, as keyword arguments of the UNet."""


@dataclass(frozen=True)
class Control:
    """A ControlNet with the images that it follows."""

    controlnet: ControlNetModel
    images: Tensor
    """(n, 3, height, width) in [0, 1]"""
    scale: float = 1.0

    def residuals(self, latents: Tensor, t: Tensor, condition: Condition) -> Residuals:
        """For latents (k·n, C, h, w), k repetitions of the n images."""
        down, mid = self.controlnet(
            latents,
            t,
            encoder_hidden_states=condition.embeds,
            controlnet_cond=self.images.repeat(len(latents) // len(self.images), 1, 1, 1),
            conditioning_scale=self.scale,
            added_cond_kwargs=condition.added or None,
            return_dict=False,
        )
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}


def placed(residuals: Residuals, rows: Tensor, size: int) -> Residuals:
    """Residuals of some rows of a batch of `size`; the other rows get zeros."""

    def place(x: Tensor) -> Tensor:
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, rows, x)

    return {name: tuple(map(place, x)) if isinstance(x, tuple) else place(x) for name, x in residuals.items()}


def predict(
    unet: UNet2DConditionModel,
    latents: Tensor,
    t: Tensor | int,
    condition: Condition,
    residuals: Residuals | None = None,
) -> Tensor:
    """The UNet's prediction for latents (B, C, h, w)."""
    return unet(
        latents,
        t,
        encoder_hidden_states=condition.embeds,
        added_cond_kwargs=condition.added or None,
        return_dict=False,
        **(residuals or {}),
    )[0]
