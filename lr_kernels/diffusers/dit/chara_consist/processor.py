"""The attention processor of CharaConsist for Flux: it keeps what frames shall read, or reads it."""

from typing import NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ...processors.joint import CustomFluxAttnProcessor, Tokens, joint_attention, rotated
from ...processors.ulysses import refuse_context_parallelism
from .attention import (
    FrameRouting,
    Points,
    Rotary,
    Words,
    chara_consist_attention,
    foreground_share,
    merge_points,
)


class Kept(NamedTuple):
    """What a layer keeps of one pass, of the image's tokens."""

    key: Tensor | None
    """(B, N, H, D), before RoPE"""
    value: Tensor | None
    """(B, N, H, D)"""
    out: Tensor | None
    """(B, N, H * D): what attention gave, before the layer's last projection and before it is merged"""

    def to(self, device: torch.device) -> "Kept":
        """The same on another device."""
        key, value, out = (None if x is None else x.to(device) for x in self)
        return Kept(key, value, out)


class Task(NamedTuple):
    """What a layer does in the next pass besides the model's own attention."""

    text_tokens: int
    """how many tokens the text has"""
    keeps_keys: bool = False
    keeps_out: bool = False
    kept_on: torch.device | None = None
    """where it is kept; None: where it was computed"""
    words: Words | None = None
    """of which `share` is measured"""
    routing: FrameRouting | None = None
    """what the frames read of `identity`; None: nothing"""
    identity: Kept | None = None
    points: Points | None = None
    """whose outputs are merged with those of `identity`, by `merge`; None: none are"""
    merge: Tensor | None = None
    """fp32 ()"""


class CharaConsistFluxAttnProcessor(CustomFluxAttnProcessor):
    """Flux's joint attention that does a `Task`, in double and single blocks; without one diffusers' own, bit for bit.

    A task that reads nothing leaves the results as they are, bit for bit too: the layer's attention is then diffusers',
    on the attention backend that the layer has.

    Raises:
        NotImplementedError: with a task, what `CustomFluxAttnProcessor` refuses: an attention mask, an IP-Adapter,
            fused projections, context parallelism.
    """

    def __init__(self) -> None:
        super().__init__()
        self.task: Task | None = None
        self.kept: Kept | None = None
        """of the last pass, as the task asks"""
        self.share: Tensor | None = None
        """`foreground_share` in the last pass, where the task has words"""

    def prepare(self, task: Task | None) -> None:
        """Set what the next passes do; None: what the stock model does. Forgets what the last one left here."""
        self.task, self.kept, self.share = task, None, None
        self.attention = None if task is None else joint_attention  # not None: the layer computes `attend_rotated`

    def attend_rotated(self, text: Tokens | None, image: Tokens, rotary: Rotary | None) -> tuple[Tensor | None, Tensor]:
        """The task, for tokens before RoPE: the results of the text and of the image, with heads side by side."""
        refuse_context_parallelism(self)
        task = self.task
        assert task is not None and rotary is not None  # Flux always has positions
        start = 0 if text is not None else task.text_tokens
        unrotated, value = image.key[:, start:], image.value[:, start:]
        places = rotary[0][task.text_tokens :], rotary[1][task.text_tokens :]
        if text is None:
            image = rotated(image, rotary)
            words_key, words_value = image.key[:, :start], image.value[:, :start]
        else:
            text = rotated(text, (rotary[0][: task.text_tokens], rotary[1][: task.text_tokens]))
            image = rotated(image, places)
            words_key, words_value = text.key, text.value
        if task.words is not None:
            self.share = foreground_share(image.query[:, start:], (words_key, words_value), task.words)
        if task.routing is None:
            of_text, out = self._as_stock(text, image)
        else:
            assert task.identity is not None
            identity = task.identity.to(value.device)
            assert identity.key is not None and identity.value is not None
            of_text, out = chara_consist_attention(text, image, (identity.key, identity.value), task.routing, places)
        out = out.flatten(2).to(image.query.dtype)
        if task.keeps_keys or task.keeps_out:
            kept_out = out[:, start:] if task.keeps_out else None
            self.kept = Kept(unrotated, value, kept_out) if task.keeps_keys else Kept(None, None, kept_out)
            if task.kept_on is not None:
                self.kept = self.kept.to(task.kept_on)
        if task.points is not None:
            assert task.identity is not None and task.identity.out is not None and task.merge is not None
            of_identity = task.identity.out.to(out.device)
            merged = merge_points(out[:, start:], of_identity, task.points, task.merge)
            out = merged if start == 0 else torch.cat([out[:, :start], merged], 1)
        return None if of_text is None else of_text.flatten(2).to(out.dtype), out

    def _as_stock(self, text: Tokens | None, image: Tokens) -> tuple[Tensor | None, Tensor]:
        """diffusers' attention of all tokens over all tokens, on the layer's attention backend."""
        joined = image[:3] if text is None else tuple(torch.cat(pair, 1) for pair in zip(text[:3], image[:3]))
        out = dispatch_attention_fn(*joined, backend=self._attention_backend)
        if text is None:
            return None, out
        of_text, of_image = out.split([text.query.shape[1], image.query.shape[1]], 1)
        return of_text, of_image
