"""Methods that share attention between images, each as sources of `multi_source_attention`.

A preset is a function of the queries, keys and values of one self-attention layer, all rows of the batch together,
(B, N, H, D) each; it returns the (B, N, H, D) that the layer goes on with. What it reads of other rows it reads in
place. Tables of rows say which row is whose source: int (B,), -1 for none, made once and kept (int32 is not copied).
To run one inside a model, let an attention processor call it (docs/own-method.md).

The formulas are those of the papers, tested against plain transcriptions of them (tests/test_presets.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adain import adain
from .attention import multi_source_attention
from .checks import fail
from .plan import AttentionPlan, plan_attention
from .source import Source

OWN, BACKGROUND, FOREGROUND = 1, 2, 4
"""Group bits: rows that attend to all of themselves, the surroundings, the subject."""
MAX_OTHERS = 15
"""Sources beside a row's own."""


def masactrl(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    target_mask: Tensor | None = None,
    source_mask: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """MasaCtrl (arXiv 2304.08465), mutual self-attention: row b's queries read the keys and values of rows[b].

        out = A(Q; K_src, V_src); with masks m·A(Q; src | fg) + (1 - m)·A(Q; src | bg)

    Args:
        rows: int (B,), the source row of every row. A row that names itself attends to itself, with masks too to all of
            itself; -1: none, the result is 0.
        target_mask, source_mask: bool (B or 1, N), source_mask by the row that is read: foreground queries read
            foreground keys, the others the background. One softmax over the keys of the query's own side is the blend
            of two.
        plan: of `masactrl_plan` for these rows and masks, for reuse over layers and steps; the masks can be left out.
    """
    if plan is None:
        if target_mask is None and source_mask is None:
            return multi_source_attention(query, [Source(key, value, rows)])
        if target_mask is None or source_mask is None:
            fail("masactrl", "source_mask", "a mask with target_mask and none without", "one")
        plan = masactrl_plan(target_mask, source_mask, rows)
    source = Source(key, value, rows, key_groups=plan.key_groups[0])
    return multi_source_attention(query, [source], query_groups=plan.query_groups, plan=plan)


def masactrl_plan(target_mask: Tensor, source_mask: Tensor, rows: Tensor) -> AttentionPlan:
    """The plan of masked MasaCtrl: foreground to foreground, background to background. Arguments are those of
    `masactrl`.
    """
    itself = rows == torch.arange(len(rows), device=rows.device)
    query_groups = torch.where(itself[:, None], OWN, _sides(target_mask)).to(torch.uint8)
    key_groups = (_sides(source_mask) | OWN).to(torch.uint8)
    return plan_attention([None], [key_groups], query_groups, query_classes=(OWN, BACKGROUND, FOREGROUND))


def _sides(mask: Tensor) -> Tensor:
    return torch.where(mask, FOREGROUND, BACKGROUND)


def style_aligned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference: Tensor,
    shift: float | Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """StyleAligned (arXiv 2312.02133): every row attends to itself and to its reference, its Q and K matched to the
    reference's by AdaIN.

        out = A(AdaIN(Q, Q_ref); {AdaIN(K, K_ref), K_ref}, {V, V_ref}), the reference's logits times scale plus shift

    Args:
        reference: int (B,), the reference row of every row; a row that names itself, or -1, attends to itself alone.
        shift, scale: strength of the reference: scalar, (B,) or (B, H).
    """
    own = torch.arange(query.shape[0], device=query.device)
    reference = torch.where(reference < 0, own, reference.long())
    follows = (reference != own)[:, None].expand(query.shape[:2])
    matched_query, matched_key = (adain(x, x[reference], mask=follows) for x in (query, key))
    rows = torch.where(reference != own, reference, -1).int()
    sources = [Source(matched_key, value), Source(key, value, rows, logit_scale=scale, logit_bias=shift)]
    return multi_source_attention(matched_query, sources)


def consistory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    anchors: Sequence[int],
    masks: Tensor,
    plan: AttentionPlan | None = None,
    *,
    halves: int = 1,
) -> Tensor:
    """ConsiStory (arXiv 2402.03286), subject-driven extended attention: every row attends to itself and to the subjects
    of the anchor images.

        out_i = A(Q_i; {own tokens} ∪ {tokens of anchor j in its subject, j != i})

    Args:
        anchors: up to 15 images, by their numbers within a half. masks: bool (B, N), the subject of every row.
        plan: of `consistory_plan`.
        halves: the batch is that many halves of the guidance, with the same images each; a row reads its own half only.

    Raises:
        ValueError: halves that do not divide the batch; anchors outside a half, or too many.
    """
    half = _images("consistory", query.shape[0], halves, anchors)
    plan = consistory_plan(anchors, masks, halves=halves) if plan is None else plan
    return _reading_others(query, key, value, anchors, half, plan)


def consistory_plan(anchors: Sequence[int], masks: Tensor, *, halves: int = 1) -> AttentionPlan:
    """The visible keys of every anchor. Arguments and errors are those of `consistory`."""
    _images("consistory_plan", masks.shape[0], halves, anchors)
    return plan_attention([None, *[masks] * len(anchors)])


def story_diffusion(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, *, halves: int = 1) -> Tensor:
    """StoryDiffusion (arXiv 2405.01434), consistent self-attention: every row attends to all of its own tokens and to a
    random part of the tokens of all others.

    Args:
        plan: of `story_diffusion_plan` with the same halves, drawn anew for every step.
        halves: the batch is that many halves of the guidance, with the same images each; a row reads its own half only.

    Raises:
        ValueError: halves that do not divide the batch; more than 15 images.
    """
    half = _images("story_diffusion", query.shape[0], halves)
    return _reading_others(query, key, value, range(half), half, plan)


def story_diffusion_plan(
    batch: int,
    tokens: int,
    share: float = 0.5,
    *,
    halves: int = 1,
    generator: torch.Generator | None = None,
    device: str = "cpu",
) -> AttentionPlan:
    """Draws the tokens of each image that the others read, the same for its row in every half of the guidance.

    Args:
        batch: all rows, halves times the images. share: of the tokens that are drawn.
        halves, errors: as in `story_diffusion`.
    """
    half = _images("story_diffusion_plan", batch, halves)
    drawn = torch.rand(half, tokens, generator=generator) < share
    return plan_attention([None, *[drawn.to(device).repeat(halves, 1)] * half])


def _images(op: str, batch: int, halves: int, anchors: Sequence[int] | None = None) -> int:
    """Rows per half of the guidance; checks those that the others read, default: all."""
    if halves < 1 or batch % halves:
        fail(op, "halves", f"a divisor of the batch's {batch} rows", halves)
    half = batch // halves
    name, others = ("batch", range(half)) if anchors is None else ("anchors", anchors)
    if len(others) > MAX_OTHERS:
        fail(op, name, f"at most {MAX_OTHERS} images to read", len(others), "split the story")
    if any(not 0 <= other < half for other in others) or len(set(others)) != len(others):
        fail(op, name, f"some of 0 to {half - 1}, the images of a half, each once", list(others))
    return half


def _reading_others(
    query: Tensor, key: Tensor, value: Tensor, others: Sequence[int], half: int, plan: AttentionPlan
) -> Tensor:
    """Every row attends to itself and to what `plan` shows of the `others` in its half, which do not read themselves
    twice."""
    first = torch.arange(query.shape[0], dtype=torch.int32, device=query.device) // half * half
    sources = [Source(key, value)]
    for other in others:
        rows = first + other
        rows[other::half] = -1
        sources.append(Source(key, value, rows, key_mask=plan.key_masks[-1]))
    return multi_source_attention(query, sources, plan=plan)


def ip_adapter(
    query: Tensor,
    text: tuple[Tensor, Tensor],
    images: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float | Tensor],
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """IP-Adapter (arXiv 2308.06721) with masks: a softmax per image beside the text's.

        out = A(Q; text) + Σ_i s_i · m_i(q) · A(Q; image_i)

    Args:
        text, images: (key, value) each, (B or 1, M, H, D). scales: one per image.
        masks: float or bool (B, N) per image: where it acts; None: everywhere.
    """
    masks = [None] * len(images) if masks is None else masks
    sources = [Source(*text)]
    for i, ((key, value), scale, mask) in enumerate(zip(images, scales, masks, strict=True)):
        weight = scale if mask is None else mask.float() * scale
        sources.append(Source(key, value, softmax_group=i + 1, weight=weight))
    return multi_source_attention(query, sources)


def reference_only(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, uncond: Tensor | None = None, fidelity: float = 0.5
) -> Tensor:
    """Reference-only attention: every row also attends to its reference; unconditional rows blend with attending to
    themselves alone.

        out = A(Q; {own, ref}); in unconditional rows fidelity · A(Q; own) + (1 - fidelity) · A(Q; {own, ref})

    Args:
        rows: int (B,), the reference row of every row, -1: none. uncond: bool (B,), default: no row.
    """
    both = [Source(key, value), Source(key, value, rows)]
    if uncond is None:
        return multi_source_attention(query, both)
    alone = torch.where(uncond, fidelity, 0.0)
    first = both[0]._replace(weight=1 - alone)
    blended = [first, both[1], Source(key, value, softmax_group=1, weight=alone)]
    return multi_source_attention(query, blended)


def dream_matcher(query: Tensor, key: Tensor, value: Tensor, reference: Tensor, match: Tensor, blend: Tensor) -> Tensor:
    """DreamMatcher (arXiv 2402.09812), appearance matching self-attention: the target's structure, with values that are
    warped from the reference where the two match.

        out = softmax(Q·K^T)·V', V' = V + w·(V_ref[match] - V)

    Args:
        query, key, value: of the targets. reference: values of the reference, (R, M, H, D), R = B or 1.
        match: int (B, N): the reference token of every target token, from `correspondence`.
        blend: float (B, N): foreground times confidence of the match, w.

    V' is made once, M rows against N x M pairs, so one softmax serves both parts of it.
    """
    values = reference.expand(value.shape[0], *reference.shape[1:])
    places = match.long()[:, :, None, None].expand(*match.shape, *value.shape[2:])
    warped = torch.lerp(value, values.gather(1, places), blend[:, :, None, None].to(value.dtype))
    return multi_source_attention(query, [Source(key, warped)])


def mca_ctrl(
    query: Tensor, key: Tensor, value: Tensor, subject: Tensor, condition: Tensor,
    target_mask: Tensor, subject_mask: Tensor, condition_mask: Tensor | None = None, plan: AttentionPlan | None = None,
) -> Tensor:  # fmt: skip
    """MCA-Ctrl (arXiv 2505.01428), attention control by two images: foreground queries read the subject image's
    foreground, the others the condition image's background.

        out = m·A(Q; subject | fg) + (1 - m)·A(Q; condition | bg)

    Args:
        subject, condition: int (B,), the row that each row reads as such. A row with -1 in both attends to itself; -1
            in one: the result is 0 on that side.
        target_mask: bool (B or 1, N), the foreground queries.
        subject_mask, condition_mask: bool (B or 1, N), by the row that is read: what is kept of the subject image, and
            what is left out of the condition image. Default of the latter: target_mask, of which the condition's row
            counts, not the target's.
        plan: of `mca_ctrl_plan`.
    """
    plan = mca_ctrl_plan(target_mask, subject_mask, condition_mask) if plan is None else plan
    itself = torch.arange(query.shape[0], device=query.device)
    own = torch.where((subject < 0) & (condition < 0), itself, -1).int()
    sources = [Source(key, value, r, key_groups=g) for r, g in zip((subject, condition, own), plan.key_groups)]
    return multi_source_attention(query, sources, query_groups=plan.query_groups, plan=plan)


def mca_ctrl_plan(target_mask: Tensor, subject_mask: Tensor, condition_mask: Tensor | None = None) -> AttentionPlan:
    """Which keys of the two images each side of the target sees. Arguments are those of `mca_ctrl`."""
    left_out = target_mask if condition_mask is None else condition_mask
    query_groups = _sides(target_mask).to(torch.uint8)
    subject = torch.where(subject_mask, FOREGROUND, 0).to(torch.uint8)
    condition = torch.where(left_out, 0, BACKGROUND).to(torch.uint8)
    groups = [subject, condition, None]  # rows that attend to themselves see all of themselves
    return plan_attention([None] * 3, groups, query_groups, query_classes=(BACKGROUND, FOREGROUND))
