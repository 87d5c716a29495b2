"""The inputs of a UNet beside latents and timestep, for some rows of a batch, and what a ControlNet adds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor


class Condition(NamedTuple):
    """What a UNet is told about B rows beside latents and timestep."""

    embeds: Tensor
    """(B, L, C), the embeddings of the prompts"""
    added: dict[str, Tensor]
    """further ones by their names in `added_cond_kwargs`, (B, ...) each: SDXL's text_embeds and time_ids"""
    guidance: Tensor | None = None
    """(B, time_cond_proj_dim), the guidance scale of models that are told it"""
    adapter_scale: float | None = None
    """strength of the model's adapters; None: as they are set"""

    def rows(self, rows: slice | Tensor) -> "Condition":
        """The condition of some of the rows."""
        return self._map(lambda x: x[rows])

    def replaced(self, rows: Tensor, other: "Condition") -> "Condition":
        """This condition with the rows of another one at these places."""
        return self._map(lambda x, y: x.index_copy(0, rows, y.to(x)), other)

    def _map(self, change: Callable[..., Tensor], *others: "Condition") -> "Condition":
        added = {name: change(x, *(other.added[name] for other in others)) for name, x in self.added.items()}
        embeds = change(self.embeds, *(other.embeds for other in others))
        guidance = self.guidance
        if guidance is not None:
            guidance = change(guidance, *(other.guidance for other in others))
        return Condition(embeds, added, guidance, self.adapter_scale)

    @staticmethod
    def join(parts: Sequence["Condition"]) -> "Condition":
        """One condition with the rows of all parts."""
        first, *others = parts
        return first._map(lambda *xs: torch.cat(xs), *others)


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
        """The residuals for latents (k·n, C, h, w), k repetitions of the n images."""
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
    """The UNet's prediction for latents (B, C, h, w), in their dtype: under autocast the UNet's own is another."""
    scale = condition.adapter_scale
    return unet(
        latents,
        t,
        encoder_hidden_states=condition.embeds,
        timestep_cond=condition.guidance,
        cross_attention_kwargs=None if scale is None else {"scale": scale},
        added_cond_kwargs=condition.added or None,
        return_dict=False,
        **(residuals or {}),
    )[0].to(latents.dtype)
