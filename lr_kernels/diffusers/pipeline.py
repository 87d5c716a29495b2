"""Layout-and-Retouch (arXiv 2407.09779) as diffusers pipelines for Stable Diffusion 1.x, 2.x and XL."""

from .components import PersonalizedStableDiffusionPipeline
from .components_xl import PersonalizedStableDiffusionXLPipeline
from .stages import LayoutRetouch


class StableDiffusionLayoutRetouchPipeline(LayoutRetouch, PersonalizedStableDiffusionPipeline):
    """Layout-and-Retouch for Stable Diffusion 1.x and 2.x: `LayoutRetouch` says what the calls do, the base what it
    is made of. Nothing in the models is changed after a call."""


class StableDiffusionXLLayoutRetouchPipeline(LayoutRetouch, PersonalizedStableDiffusionXLPipeline):
    """Layout-and-Retouch for Stable Diffusion XL: as `StableDiffusionLayoutRetouchPipeline`."""
