"""From the predictions of a step to the next latents, with the guidance that the pipeline's attributes say."""

from collections.abc import Sequence

from torch import Tensor

from .components import PersonalizedPipeline
from .request import Request
from .schedule import Stepper


class GuidedStepper:
    """A `Stepper` whose guidance may change between steps, as callbacks change it: `guidance_scale`,
    `do_classifier_free_guidance` and `guidance_rescale` of the pipeline count from the next step on.

    Args:
        weights: (steps,) of the personalized model beside the vanilla one; None: there is one model.
    """

    def __init__(self, pipe: PersonalizedPipeline, request: Request, weights: Tensor | None = None):
        self._pipe, self._request, self._weights = pipe, request, weights
        self._scale = self.scale
        self._stepper = Stepper(request.solver, self._table(), backend=request.settings.backend)

    @property
    def scale(self) -> float:
        """The guidance scale of this step; 1 where there are no unconditional predictions."""
        return self._pipe.guidance_scale if self._pipe.do_classifier_free_guidance else 1

    def step(self, i: int, latents: Tensor, models: Sequence[Sequence[Tensor]], **keywords: Tensor | None) -> Tensor:
        """Latents (n, C, h, w) before step i -> those after it.

        Args:
            models: per model its (unconditional, conditional) predictions, the same one twice without guidance.
            keywords: of `Stepper.step`.
        """
        if self.scale != self._scale:
            self._scale = self.scale
            self._stepper.table = self._table()
        rescale = self._pipe.guidance_rescale
        if rescale > 0 and self._pipe.do_classifier_free_guidance:
            models = [rescaled(negative, positive, self.scale, rescale) for negative, positive in models]
        return self._stepper.step(i, latents, [x for model in models for x in model], **keywords)

    def _table(self) -> Tensor:
        settings, solver = self._request.settings, self._request.solver
        return solver.table(guidance_scale=self._scale, eta=settings.eta, weights=self._weights)


def rescaled(unconditional: Tensor, conditional: Tensor, scale: float, rescale: float) -> list[Tensor]:
    """Predictions (n, C, h, w) whose guided combination has, by the share `rescale`, the deviation of the conditional
    one (arXiv 2305.08891, 3.4). Both are multiplied by what that one would be, since a table is linear in them."""
    guided = unconditional + scale * (conditional - unconditional)
    expected, got = (x.std(dim=(1, 2, 3), keepdim=True) for x in (conditional, guided))
    factor = rescale * (expected / got) + (1 - rescale)
    return [factor * unconditional, factor * conditional]
