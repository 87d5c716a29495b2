"""Reading "routing" of the retouch stage (arXiv 2407.09779) in Flux's joint attention: which keys each token of the
targets reads, as row tables and group bits of one `multi_source_attention` call per layer."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from ....attention.api import multi_source_attention
from ....attention.plan import AttentionPlan, plan_attention
from ....runtime.checks import fail
from ....source import Source
from ...processors.install import beginning_with, check_stock
from ...processors.joint import CustomFluxAttnProcessor, JointAttention, Stream, Tokens, joint_attention_layers
from ...processors.routing import BACKGROUND, FOREGROUND, OWN, token_mask
from ...processors.ulysses import ulysses_of
from .maps import WordMaps, stock_attention

MAX_REFERENCES = 13
"""A call reads at most 16 sources; the text, the rows' own image and the contexts are three."""

Rotary = tuple[Tensor, Tensor]


class JointRouting(NamedTuple):
    """What every token of a retouch batch reads in Flux's joint attention. Built by `route_joint`.

    The batch has n targets, then their n contexts, then R references; each row has its own text.

    | queries                               | keys that they read, in one softmax                               |
    |---------------------------------------|-------------------------------------------------------------------|
    | text, and images of the other rows    | their row's text and image, as in the stock model                 |
    | foreground of a target's image        | their row's text and image, and the references' foreground        |
    | background of a target's image        | their row's text and image, and the whole image of their context  |

    In UNets (`route`) a target's image does not read itself, since the prompt and the rest of the image come to it by
    other layers. In Flux there are no others: a token learns what lies around it from this attention alone. So the own
    image is read too; without `own_keys` it is not, and the two readings agree but for the text.

    References are read at other positions than their own, which are those of the target. At equal positions a DiT's
    queries attend to what lies at their own place in the reference, whatever it shows (arXiv 2503.12590).
    """

    images: int
    references: int
    text_tokens: int
    own_groups: Tensor | None
    """uint8 (1, N); None: every query reads its row's own image"""
    context_rows: Tensor
    """int32 (2n + R,): the context of each target; -1: none"""
    context_groups: Tensor
    """uint8 (1, N)"""
    reference_rows: Tensor
    """int32 (2n + R,): 0 for targets; -1: none"""
    reference_groups: tuple[Tensor, ...]
    """uint8 (1, N) of each reference"""
    rotary: Rotary | None
    """cos and sin (R, D) of how far the references' keys are moved; None: they stay"""
    query_groups: Tensor
    """uint8 (2n + R, text_tokens + N)"""
    plan: AttentionPlan
    backend: str

    @property
    def key_groups(self) -> tuple[Tensor | None, ...]:
        """The groups of each source: the text, the rows' own images, the contexts, the references."""
        return None, self.own_groups, self.context_groups, *self.reference_groups

    def for_targets(self, mask: Tensor, grid: tuple[int, int]) -> "JointRouting":
        """The same with another foreground of the targets, bool (n, height, width). It does not synchronize with a GPU,
        so that the mask may change in every step."""
        query_groups = self.query_groups.clone()
        foreground = token_mask(mask, grid)
        query_groups[: self.images, self.text_tokens :] = torch.where(foreground, FOREGROUND, BACKGROUND)
        return self._replace(query_groups=query_groups, plan=_plan(self.key_groups, query_groups))

    def attend(self, text: Tokens | None, image: Tokens) -> tuple[Tensor | None, Tensor]:
        """A layer's attention, as `CustomFluxAttnProcessor` calls it; without a text the first tokens are text."""
        if text is not None:
            return self.attend_with_lse(text, image)[:2]
        start = self.text_tokens
        own = Tokens(*(x[:, :start] for x in image[:3])), Tokens(*(x[:, start:] for x in image[:3]))
        return None, self._attention(image.query, *own)

    def attend_with_lse(self, text: Tokens, image: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a layer with text and image apart, and the lse of the image's queries, fp32 (B, N, H)."""
        out, lse = self._attention(torch.cat([text.query, image.query], 1), text, image, return_lse=True)
        start = self.text_tokens
        return out[:, :start], out[:, start:], lse[:, start:]

    def _attention(self, query: Tensor, text: Tokens, image: Tokens, *, return_lse: bool = False) -> Any:
        """Attention of all queries to the keys of text and image; with the lse a pair."""
        key, value = image.key, image.value
        sources = [
            Source(text.key, text.value),
            Source(key, value, key_groups=self.own_groups),
            Source(key, value, self.context_rows, key_groups=self.context_groups),
        ]
        for r, groups in enumerate(self.reference_groups):
            row = slice(2 * self.images + r, 2 * self.images + r + 1)
            offered = key[row]
            if self.rotary is not None:
                moved = self.rotary[0][r : r + 1], self.rotary[1][r : r + 1]
                offered = apply_rotary_emb(offered, moved, sequence_dim=1)
            sources.append(Source(offered, value[row], self.reference_rows, key_groups=groups))
        groups, plan = self.query_groups, self.plan
        return multi_source_attention(
            query, sources, query_groups=groups, return_lse=return_lse, plan=plan, backend=self.backend
        )


def route_joint(
    target_mask: Tensor,
    reference_mask: Tensor,
    grid: tuple[int, int],
    text_tokens: int,
    *,
    own_keys: bool = True,
    rotary: Rotary | None = None,
    backend: str = "auto",
) -> JointRouting:
    """The routing of a retouch batch: n targets, their n contexts, R references.

    Args:
        target_mask: bool (n, height, width), the foreground of the targets, of any size. reference_mask: bool (R,
            height, width), none empty.
        grid: (rows, columns) of the image's tokens. text_tokens: how many tokens a prompt has.
        own_keys: whether the images of targets also read themselves. False: their text, and the references or the
            context.
        rotary: from `offset_rotary`. None: the references' keys stay where they are.
        backend: of `multi_source_attention`.

    Raises:
        ValueError: masks of another rank, a reference without a foreground, more than 13 references.
    """
    foreground, shown = token_mask(target_mask, grid), token_mask(reference_mask, grid)
    n, references, tokens, device = len(foreground), len(shown), shown.shape[1], shown.device
    if not 1 <= references <= MAX_REFERENCES:
        fail("route_joint", "reference_mask", f"1 to {MAX_REFERENCES} references", references)
    if not shown.any(1).all():
        fail("route_joint", "reference_mask", "a foreground in each reference", "none")
    query_groups = torch.full((2 * n + references, text_tokens + tokens), OWN, dtype=torch.uint8, device=device)
    query_groups[:n, text_tokens:] = torch.where(foreground, FOREGROUND, BACKGROUND)

    def everywhere(bits: int) -> Tensor:
        return torch.full((1, tokens), bits, dtype=torch.uint8, device=device)

    def table(of_targets: Sequence[int]) -> Tensor:
        return torch.tensor([*of_targets, *[-1] * (n + references)], dtype=torch.int32, device=device)

    own_groups, context_groups = None if own_keys else everywhere(OWN), everywhere(BACKGROUND)
    reference_groups = tuple(torch.where(mask[None], FOREGROUND, 0).to(torch.uint8) for mask in shown)
    return JointRouting(
        images=n,
        references=references,
        text_tokens=text_tokens,
        own_groups=own_groups,
        context_rows=table(range(n, 2 * n)),
        context_groups=context_groups,
        reference_rows=table([0] * n),
        reference_groups=reference_groups,
        rotary=rotary,
        query_groups=query_groups,
        plan=_plan((None, own_groups, context_groups, *reference_groups), query_groups),
        backend=backend,
    )


def _plan(key_groups: Sequence[Tensor | None], query_groups: Tensor) -> AttentionPlan:
    classes = (OWN, BACKGROUND, FOREGROUND)  # named, since looking for them would synchronize with a GPU
    return plan_attention([None] * len(key_groups), key_groups, query_groups, query_classes=classes)


def offset_rotary(
    transformer: nn.Module, offset: Sequence[float], references: int, device: torch.device
) -> Rotary | None:
    """How far the keys of references are moved: reference r by (r + 1)·offset, so that several stand in a row.

    Rotations add up: a key at position p that is rotated by an offset is the key at position p + offset. In bf16 it is
    rounded once more than one that was rotated there at once.

    Args:
        transformer: a FluxTransformer2DModel, for its `pos_embed`.
        offset: three numbers, in units of its img_ids: index of the picture, row, column.

    Returns:
        cos and sin, fp32 (references, D); None where the offset is zero.
    """
    if not any(offset):
        return None
    pos_embed: Any = transformer.pos_embed
    steps = torch.arange(1, references + 1, device=device, dtype=torch.float32)
    return pos_embed(steps[:, None] * torch.tensor(offset, device=device, dtype=torch.float32))


class FluxRetouchProcessor(CustomFluxAttnProcessor):
    """Flux's joint attention over the rows of a retouch batch; without a routing diffusers' own, bit for bit.

    Raises:
        NotImplementedError: while it shares or keeps maps, what `CustomFluxAttnProcessor` refuses.
    """

    def __init__(self, attention: JointAttention | None = None):
        super().__init__(attention)
        self.map: Tensor | None = None
        """of the last pass, fp32 (n, N)"""

    def share(self, routing: JointRouting | None, words: WordMaps | None = None) -> None:
        """What the next passes read; None: what the stock model reads. With words the layer, which then must have text
        and image apart, keeps their maps."""
        ulysses = ulysses_of(self)
        if routing is not None and ulysses is not None:
            self.stream.text_tokens = routing.text_tokens // ulysses.degree
        if words is not None:
            self.attention = partial(self._attend_and_keep, routing, words)
        else:
            self.attention = None if routing is None else routing.attend

    def _attend_and_keep(
        self, routing: JointRouting | None, words: WordMaps, text: Tokens | None, image: Tokens
    ) -> tuple[Tensor, Tensor]:
        assert text is not None, "only layers with text and image apart have maps"
        if routing is None:
            of_text, of_image, lse = stock_attention(text, image, words.backend)
        else:
            of_text, of_image, lse = routing.attend_with_lse(text, image)
        # Kept here and not in a list of all layers, on whose length a compiled block would depend.
        found = words.of_layer(image.query, text.key, lse)
        ulysses = ulysses_of(self)
        self.map = found if ulysses is None else ulysses.mean(found)
        return of_text, of_image


def take_maps(words: WordMaps, processors: Iterable[FluxRetouchProcessor]) -> Tensor:
    """The mean of the maps that the layers kept in the last pass, see `WordMaps.mean`; they forget them."""
    found = []
    for processor in processors:
        if processor.map is not None:
            found.append(processor.map)
        processor.map = None
    return words.mean(found)


def check_replaceable(layers: Mapping[str, FluxAttention], op: str) -> None:
    """NotImplementedError, in the name of a function, for layers whose attention a `FluxRetouchProcessor` would refuse
    to compute: processors that are not stock, fused projections, context parallelism other than Ulysses."""
    check_stock(layers)
    for name, layer in layers.items():
        if getattr(layer, "fused_projections", False):
            hint = "call unfuse_qkv_projections()"
            fail(op, name, "separate projections", "fused ones", hint, NotImplementedError)
        ulysses_of(layer.processor, layer.heads, op)


def retouch_layers(
    transformer: nn.Module, choice: str | Sequence[str] | None = None, op: str = "retouch_layers"
) -> dict[str, FluxAttention]:
    """The attention layers of a Flux transformer that match any entry of `choice`, in the order of execution.

    Args:
        choice: beginnings of layer names, as "single_transformer_blocks" or "transformer_blocks.3". None: all layers.
        op: the function that messages name.

    Raises:
        ValueError: a model without Flux's attention, an entry that matches no layer.
    """
    joint = joint_attention_layers(transformer)
    layers = {name: layer for name, layer in joint.items() if isinstance(layer, FluxAttention)}
    if not layers:
        fail(op, "transformer", "a Flux transformer", type(transformer).__name__)
    if choice is None:
        return layers
    entries = [choice] if isinstance(choice, str) else choice
    if not isinstance(entries, list | tuple) or not entries or not all(isinstance(x, str) for x in entries):
        fail(op, "retouch_layers", "beginnings of layer names, at least one, or None", repr(choice))
    chosen = set()
    for entry in entries:
        matches = beginning_with(entry, layers)
        if not matches:
            blocks = sorted({name.rpartition(".attn")[0] for name in layers})
            fail(op, "retouch_layers", f"the beginning of a layer's name, of {blocks[0]} to {blocks[-1]}", repr(entry))
        chosen |= set(matches)
    return {name: layer for name, layer in layers.items() if name in chosen}


def retouch_processors(layers: Mapping[str, FluxAttention]) -> dict[str, FluxRetouchProcessor]:
    """A processor for each layer, with the attention backend and the parallelism of the one that it stands in for."""
    found, stream = {}, Stream()
    for name, layer in layers.items():
        found[name] = processor = FluxRetouchProcessor()
        processor.stand_in_for(layer.processor)
        processor.stream = stream
    return found
