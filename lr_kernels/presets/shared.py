"""Methods in which an image attends to itself and to others in one softmax."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.api import multi_source_attention
from ..attention.plan import AttentionPlan, plan_attention
from ..features.adain import adain
from ..runtime.checks import check_number, fail, has_shape, one_of
from ..source import Source
from .rows import check_halves, check_mask, check_rows, check_strength

MAX_OTHERS = 15
"""The most other images that a row reads: a call has 16 sources, and one is the row itself."""


def style_aligned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference: Tensor,
    shift: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """StyleAligned (arXiv 2312.02133): every row attends to itself and to its reference, its Q and K matched to the
    reference's by AdaIN.

        out = A(AdaIN(Q, Q_ref); {AdaIN(K, K_ref), K_ref}, {V, V_ref}), the reference's logits times scale plus shift

    Beside this the authors let group norms see the reference: `lr_kernels.diffusers.shared_group_norms`.

    Args:
        reference: int (B,), the reference row of every row; a row that names itself, or -1, attends to itself alone.
        shift, scale: strength of the reference: scalar, (B,) or (B, H).
        backend: of `multi_source_attention` and `adain`.
    """
    check_rows("style_aligned", "reference", reference, query)
    for name, x in (("shift", shift), ("scale", scale)):
        if x is not None:
            check_strength("style_aligned", name, x, query, query.shape[2])
    own = torch.arange(query.shape[0], device=query.device)
    reference = torch.where(reference < 0, own, reference.long())
    follows = (reference != own)[:, None].expand(query.shape[:2])
    matched_query, matched_key = (adain(x, x[reference], mask=follows, backend=backend) for x in (query, key))
    rows = torch.where(reference != own, reference, -1).int()
    sources = [Source(matched_key, value), Source(key, value, rows, logit_scale=scale, logit_bias=shift)]
    return multi_source_attention(matched_query, sources, backend=backend)


def reference_only(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    uncond: Tensor | None = None,
    fidelity: float = 0.5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Reference-only attention (diffusers' community pipeline `stable_diffusion_reference`): every row also attends to
    its reference; unconditional rows blend with attending to themselves alone.

        out = A(Q; {own, ref}); in unconditional rows fidelity · A(Q; own) + (1 - fidelity) · A(Q; {own, ref})

    Beside this the original matches features to the reference's: `lr_kernels.diffusers.reference_adain`.

    Args:
        rows: int (B,), the reference row of every row, -1: none.
        uncond: bool (B,), default: no row.
        fidelity: `style_fidelity` of the original, in [0, 1].
        backend: of `multi_source_attention`.
    """
    check_rows("reference_only", "rows", rows, query)
    check_number("reference_only", "fidelity", fidelity, "a number in [0, 1]", 0, 1)
    both = [Source(key, value), Source(key, value, rows)]
    if uncond is None:
        return multi_source_attention(query, both, backend=backend)
    if uncond.dtype != torch.bool or not has_shape(uncond, (query.shape[0],)):
        got = f"{uncond.dtype} {tuple(uncond.shape)}"
        fail("reference_only", "uncond", f"bool ({query.shape[0]},), one entry per row of the batch", got)
    alone = torch.where(uncond, fidelity, 0.0)
    first = both[0]._replace(weight=1 - alone)
    blended = [first, both[1], Source(key, value, softmax_group=1, weight=alone)]
    return multi_source_attention(query, blended, backend=backend)


def consistory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    anchors: Sequence[int],
    masks: Tensor | None = None,
    plan: AttentionPlan | None = None,
    *,
    halves: int = 1,
    backend: str = "auto",
) -> Tensor:
    """ConsiStory (arXiv 2402.03286), subject-driven extended attention: every row attends to itself and to the subjects
    of the anchor images.

        out_i = A(Q_i; {own tokens} ∪ {tokens of anchor j in its subject, j != i})

    Args:
        anchors: up to 15 images, by their numbers within a half.
        masks: bool (images, N), (B, N) or (1, N), the subject of every image, of every row, of all. The
            authors drop half of the subject's tokens at random.
        plan: of `consistory_plan` with the same halves; the masks can be left out.
        halves: the batch is that many halves of the guidance, with the same images each; a row reads its own half only.
        backend: of `multi_source_attention`.

    Raises:
        ValueError: halves that do not divide the batch; anchors outside a half, or too many; masks of other images.
    """
    batch = query.shape[0]
    images = check_halves("consistory", halves, batch)
    if plan is None:
        if masks is None:
            fail("consistory", "masks", "masks, or a plan of them", None)
        check_mask("consistory", "masks", masks, images if masks.shape[0] == images else batch, query)
        plan = _anchor_plan("consistory", anchors, masks, images, batch)
    else:
        _check_others("consistory", "anchors", anchors, images)
    return _reading_others(query, key, value, anchors, images, plan, backend)


def consistory_plan(
    anchors: Sequence[int], masks: Tensor, *, halves: int = 1, batch: int | None = None
) -> AttentionPlan:
    """The visible keys of every anchor. Arguments and errors are those of `consistory`.

    Args:
        batch: all rows, where the masks are those of one half. Default: masks are of all rows.
    """
    rows = masks.shape[0]
    batch = rows if batch is None else batch
    images = check_halves("consistory_plan", halves, batch)
    if not one_of(rows, 1, images, batch):
        fail("consistory_plan", "masks", f"{images} rows, one per image, or {batch}, one per row", rows)
    return _anchor_plan("consistory_plan", anchors, masks, images, batch)


def _anchor_plan(op: str, anchors: Sequence[int], masks: Tensor, images: int, batch: int) -> AttentionPlan:
    _check_others(op, "anchors", anchors, images)
    every = masks.repeat(batch // images, 1) if masks.shape[0] == images else masks
    return plan_attention([None, *[every] * len(anchors)])


def story_diffusion(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, *, halves: int = 1, backend: str = "auto"
) -> Tensor:
    """StoryDiffusion (arXiv 2405.01434), consistent self-attention: every row attends to all of its own tokens and to a
    random part of the tokens of all others.

    Args:
        plan: of `story_diffusion_plan` with the same halves, drawn anew for every step.
        halves: the batch is that many halves of the guidance, with the same images each; a row reads its own half only.
        backend: of `multi_source_attention`.

    Raises:
        ValueError: halves that do not divide the batch; more than 15 images; a plan of others.
    """
    batch, tokens = query.shape[:2]
    images = check_halves("story_diffusion", halves, batch)
    _check_others("story_diffusion", "query", range(images), images)
    drawn = plan.key_masks[-1]
    if len(plan.key_masks) != images + 1:
        got, hint = f"one for {len(plan.key_masks)}", "draw it with the same halves"
        fail("story_diffusion", "plan", f"a plan for {images + 1} sources", got, hint)
    if drawn is not None and not has_shape(drawn, (batch, tokens)):
        fail("story_diffusion", "plan", f"one for {batch} rows of {tokens} tokens", tuple(drawn.shape))
    return _reading_others(query, key, value, range(images), images, plan, backend)


def story_diffusion_plan(
    batch: int,
    tokens: int,
    share: float = 0.5,
    *,
    halves: int = 1,
    generator: torch.Generator | None = None,
    device: str | torch.device = "cpu",
) -> AttentionPlan:
    """Draw the tokens of each image that the others read, the same for its row in every half of the guidance.

    Args:
        batch: all rows, halves times the images.
        tokens: of the layer.
        share: of the tokens that are drawn, in [0, 1].
        generator: on the CPU, where the numbers are drawn.
        device: of the queries.
        halves, errors: as in `story_diffusion`.
    """
    images = check_halves("story_diffusion_plan", halves, batch)
    _check_others("story_diffusion_plan", "batch", range(images), images)
    check_number("story_diffusion_plan", "share", share, "a number in [0, 1]", 0, 1)
    drawn = torch.rand(images, tokens, generator=generator, dtype=torch.float32) < share
    return plan_attention([None, *[drawn.to(device).repeat(halves, 1)] * images])


def _check_others(op: str, name: str, others: Sequence[int], images: int) -> None:
    if len(others) > MAX_OTHERS:
        fail(op, name, f"at most {MAX_OTHERS} images to read", len(others), "split the story")
    if any(not 0 <= other < images for other in others) or len(set(others)) != len(others):
        fail(op, name, f"some of 0 to {images - 1}, the images of a half, each once", list(others))


def _reading_others(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    others: Sequence[int],
    images: int,
    plan: AttentionPlan,
    backend: str,
) -> Tensor:
    """Every row attends to itself and to what `plan` shows of the `others` in its half, which do not read themselves
    twice."""
    first = torch.arange(query.shape[0], dtype=torch.int32, device=query.device) // images * images
    sources = [Source(key, value)]
    for other in others:
        rows = first + other
        rows[other::images] = -1
        sources.append(Source(key, value, rows, key_mask=plan.key_masks[-1]))
    return multi_source_attention(query, sources, plan=plan, backend=backend)
