"""The denoiser of the retouch stage: one UNet call for targets, contexts and references, with shared self-attention."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...runtime.checks import fail
from ..processors.install import Installation, install_processors, layer_grid, layer_scale
from ..processors.routing import RetouchBatch, Routing, Swap
from ..processors.unet import AttentionState, MultiSourceAttnProcessor
from ..subjects.subject import SubjectMaps, TargetMasks
from .condition import Condition, Control, placed, predict
from .contexts import Contexts
from .output import Costs
from .request import Request
from .settings import OP


class RetouchDenoiser:
    """Predictions for the targets of the retouch stage (arXiv 2407.09779); a context manager around the loop.

    Entering it puts processors into the UNet, leaving it restores the previous ones. In steps that do not share, the
    batch is the targets alone.

    Args:
        batch: the rows of steps that share. condition: of batch.size rows.
        reading: (batch, masks, grid) -> what layers with these tokens read.
        mask: bool (subjects, n, h, w): the targets' foreground, None while unknown: nothing is shared until then.
        tracker: makes the mask of the next step; None: the mask stays.
        contexts: with a bank of them, which are then not in the batch. The references' bank is the request's.
        control: of the targets and contexts.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        batch: RetouchBatch,
        condition: Condition,
        request: Request,
        *,
        reading: Callable[[RetouchBatch, Tensor, tuple[int, int]], Routing | Swap],
        mask: Tensor | None,
        tracker: TargetMasks | None,
        contexts: Contexts | None,
        control: Control | None,
    ):
        self.unet, self.request, self.reading, self.mask, self.tracker = unet, request, reading, mask, tracker
        self.contexts, self.control = contexts, control
        self.references = request.references.bank
        rows = torch.cat(batch.targets(torch.arange(batch.size, device=condition.embeds.device)))
        self._set_batch(batch, condition, condition.rows(rows))
        self._state = AttentionState(backend=request.settings.backend)
        self._stack = ExitStack()
        self._installed: list[Installation] = []
        self._maps: SubjectMaps | None = None

    def __enter__(self) -> "RetouchDenoiser":
        layers = self.request.layers
        of_contexts = None if self.contexts is None else self.contexts.bank
        with ExitStack() as stack:
            processors = {
                name: MultiSourceAttnProcessor(
                    self._state,
                    None if self.references is None else self.references.layer(name),
                    None if of_contexts is None else of_contexts.layer(name),
                    tokens=math.prod(self._grid(name)),
                )
                for name in layers
            }
            self._installed.append(stack.enter_context(install_processors(layers, processors)))
            if self.tracker is not None:
                self._maps = stack.enter_context(SubjectMaps(self.unet, self._state, self.request.size, processors))
                if self._maps.installation is not None:
                    self._installed.append(self._maps.installation)
                self._state.capturing = True
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _set_batch(self, batch: RetouchBatch, condition: Condition, of_targets: Condition) -> None:
        alone = RetouchBatch(batch.images, context=False, guided=batch.guided, references=0)
        self._batches = {True: (batch, condition), False: (alone, of_targets)}  # by whether it shares
        self._routed: Tensor | None = None
        """the mask for which `_state.routings` were built"""

    @property
    def told(self) -> Condition:
        """What the targets' rows are told, with guidance the unconditional ones before the others."""
        return self._batches[False][1]

    def tell(self, of_targets: Condition) -> None:
        """Tell the targets something else from the next step on. Half of the rows: guidance ends."""
        if of_targets is self.told:
            return
        batch, condition = self._batches[True]
        if batch.guided and len(of_targets.embeds) == batch.images:
            condition = condition.rows(slice(batch.half, None))
            batch = replace(batch, guided=False, first_half=1)
        rows = torch.cat(batch.targets(torch.arange(batch.size, device=condition.embeds.device)))
        if len(of_targets.embeds) != len(rows) or of_targets.embeds.shape[1:] != condition.embeds.shape[1:]:
            expected = f"prompt_embeds of shape {(len(rows), *condition.embeds.shape[1:])} from it"
            fail(OP, "callback_on_step_end", expected, tuple(of_targets.embeds.shape))
        self._set_batch(batch, condition.replaced(rows, of_targets), of_targets)

    def predict(self, latents: Tensor, others: Sequence[Tensor], step: int, costs: Costs) -> list[Tensor]:
        """(unconditional, conditional) predictions, each (n, C, h, w); the same one twice without guidance.

        Args:
            latents: (n, C, h, w) of the targets. others: those of the contexts and references in the batch, at the same
                noise level; not read in a step that does not share.
        """
        for installation in self._installed:
            installation.verify()
        sharing = step in self.request.share and self.mask is not None
        batch, condition = self._batches[sharing]
        self._state.sharing = sharing
        if sharing and self.mask is not self._routed:
            self._state.routings = self._route(batch)
            self._routed = self.mask
        rows = [latents, *others] if sharing else [latents]
        inputs = torch.cat(rows * batch.halves) * self.request.solver.input_scales[step]
        t = self.request.solver.timesteps[step]
        if self._maps is not None:
            self._state.token_indices = self._tokens(batch)
        with ExitStack() as banks:
            if sharing and self.references is not None:
                assert self.request.references.bank_steps is not None
                banks.enter_context(self.references.read(self.request.references.bank_steps[step]))
            if sharing and self.contexts is not None:
                assert self.contexts.bank is not None
                banks.enter_context(self.contexts.bank.read(step - self.contexts.bank_start))
            out = predict(self.unet, inputs, t, condition, self._controlled(inputs, t, batch, condition))
        costs.count("retouch", len(inputs))
        if self._maps is not None and self.tracker is not None and self.request.tokens is not None:
            start = batch.size - batch.half  # the conditional half
            conditional = slice(start, start + batch.images)
            maps = self._maps.collect(conditional, self.request.tokens.weights, backend=self._state.backend)
            self.mask = self.tracker.update(maps)
        targets = batch.targets(out)
        return [targets[0], targets[-1]]

    def _tokens(self, batch: RetouchBatch) -> Tensor:
        """Token indices of all rows; only the targets' are used."""
        assert self.request.tokens is not None
        indices = self.request.tokens.indices
        rows = torch.arange(batch.size, device=indices.device) % batch.half
        return indices[rows % batch.images]

    def _controlled(self, inputs: Tensor, t: Tensor, batch: RetouchBatch, condition: Condition) -> dict | None:
        """What a ControlNet adds to the rows of targets and contexts."""
        if self.control is None:
            return None
        row = torch.arange(batch.size, device=inputs.device)
        rows = row[row % batch.half < batch.images + batch.context_rows]
        residuals = self.control.residuals(inputs[rows], t, condition.rows(rows))
        return placed(residuals, rows, batch.size)

    def _route(self, batch: RetouchBatch) -> dict[int, Routing | Swap]:
        assert self.mask is not None
        grids = {self._grid(name) for name in self.request.layers}
        return {math.prod(grid): self.reading(batch, self.mask, grid) for grid in grids}

    def _grid(self, layer: str) -> tuple[int, int]:
        return layer_grid(layer_scale(self.unet, layer), *self.request.size)
