"""What the Flux pipeline returns, and what its retouch stage reads of the layouts."""

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor

from ...pipelines.pictures import Images


def noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(1 - σ)·clean + σ·noise, in the dtype of clean."""
    return ((1 - sigma) * clean.float() + sigma * noise.float()).to(clean.dtype)


@dataclass(frozen=True)
class FluxLayouts:
    """The layouts (contexts) of a retouch stage, as `layout` leaves them. Latents are packed, (n, N, C)."""

    trajectory: tuple[Tensor, ...]
    """(steps + 1): before every step, and the clean ones"""
    sigmas: Tensor
    """fp32 (steps + 1,) on the CPU: the schedule's σ; latents are (1 - σ)·clean + σ·noise"""
    size: tuple[int, int]
    """height and width in pixels"""

    @property
    def latents(self) -> Tensor:
        """The clean latents."""
        return self.trajectory[-1]

    @property
    def noise(self) -> Tensor:
        """The noise that they started from."""
        return self.trajectory[0]

    def at(self, step: int, contexts_from: str) -> Tensor:
        """The contexts' latents before a step, see `FluxSettings.contexts_from`."""
        if contexts_from == "trajectory":
            return self.trajectory[step]
        return noised(self.latents, self.noise, self.sigmas[step].item())

    @property
    def steps(self) -> int:
        """How many the schedule has."""
        return len(self.sigmas) - 1


@dataclass
class FluxLayoutRetouchOutput(BaseOutput):
    """Result of `FluxLayoutRetouchPipeline` or of one of its stages; entries that a stage does not make are None."""

    images: Images
    """n images in the requested output type"""
    latents: Tensor
    """(n, N, C), packed: the latents of `images`"""
    layout_images: Images | None = None
    """n layout (context) images of the first stage"""
    layouts: FluxLayouts | None = None
    """of the layout stage, for `retouch`; None where it was interrupted"""
    masks: Tensor | None = None
    """bool (n, rows, columns), in tokens: the targets' foreground in the last step"""
    context_masks: Tensor | None = None
    """bool (n, rows, columns): the layouts' foreground"""
    reference_mask: Tensor | None = None
    """bool (references, rows, columns): the references' foreground"""
