"""Methods that share attention between images, each as sources of `multi_source_attention`.

A preset is a function of the queries, keys and values of one self-attention layer, all rows of the batch together,
(B, N, H, D) each; it returns the (B, N, H, D) that the layer goes on with. What it reads of other rows it reads in
place. `rows` say which row is whose source: int32 (B,), -1 for none, made once and kept. To run one inside a model,
let an attention processor call it (docs/own-method.md).

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

FOREGROUND, BACKGROUND = 1, 2


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
        rows: the source row of every row; a row that attends to itself names itself.
        target_mask, source_mask: bool (B or 1, N): foreground queries read foreground keys, the others the background.
            One softmax over the keys of the query's own side is the blend of two.
        plan: of `masactrl_plan`, for reuse over layers and steps.
    """
    if (target_mask is None) != (source_mask is None):
        fail("masactrl", "source_mask", "a mask with target_mask and none without", "one")
    if target_mask is None:
        return multi_source_attention(query, [Source(key, value, rows)])
    plan = masactrl_plan(target_mask, source_mask) if plan is None else plan
    source = Source(key, value, rows, key_groups=plan.key_groups[0])
    return multi_source_attention(query, [source], query_groups=plan.query_groups, plan=plan)


def masactrl_plan(target_mask: Tensor, source_mask: Tensor) -> AttentionPlan:
    """The plan of masked MasaCtrl: foreground to foreground, background to background."""
    query_groups, key_groups = (
        torch.where(m, FOREGROUND, BACKGROUND).to(torch.uint8) for m in (target_mask, source_mask)
    )
    return plan_attention([None], [key_groups], query_groups, query_classes=(FOREGROUND, BACKGROUND))


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
        reference: int64 (B,): the reference row of every row; a reference names itself and attends to itself alone.
        shift, scale: strength of the reference.
    """
    own = torch.arange(query.shape[0], device=query.device)
    follows = (reference != own)[:, None].expand(query.shape[:2])
    matched_query, matched_key = (adain(x, x[reference], mask=follows) for x in (query, key))
    rows = torch.where(reference != own, reference, -1).int()
    sources = [Source(matched_key, value), Source(key, value, rows, logit_scale=scale, logit_bias=shift)]
    return multi_source_attention(matched_query, sources)


def consistory(
    query: Tensor, key: Tensor, value: Tensor, anchors: Sequence[int], masks: Tensor, plan: AttentionPlan | None = None
) -> Tensor:
    """ConsiStory (arXiv 2402.03286), subject-driven extended attention: every row attends to itself and to the subjects
    of the anchor images.

        out_i = A(Q_i; {own tokens} ∪ {tokens of anchor j in its subject, j != i})

    Args:
        anchors: row numbers. masks: bool (B, N), the subject of every row.
        plan: of `consistory_plan`.
    """
    plan = consistory_plan(anchors, masks) if plan is None else plan
    return _reading_others(query, key, value, anchors, plan)


def consistory_plan(anchors: Sequence[int], masks: Tensor) -> AttentionPlan:
    """The visible keys of every anchor."""
    return plan_attention([None, *(masks[anchor : anchor + 1] for anchor in anchors)])


def story_diffusion(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """StoryDiffusion (arXiv 2405.01434), consistent self-attention: every row attends to all of its own tokens and to a
    random part of the tokens of all others.

    Args:
        plan: of `story_diffusion_plan`, drawn anew for every step.
    """
    return _reading_others(query, key, value, range(query.shape[0]), plan)


def _reading_others(query: Tensor, key: Tensor, value: Tensor, others: Sequence[int], plan: AttentionPlan) -> Tensor:
    """Every row attends to itself and to what `plan` shows of the rows `others`, which do not read themselves twice."""
    sources = [Source(key, value)]
    for other, mask in zip(others, plan.key_masks[1:]):
        rows = torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)
        rows[other] = -1
        one = slice(other, other + 1)
        sources.append(Source(key[one], value[one], rows, key_mask=mask))
    return multi_source_attention(query, sources, plan=plan)


def story_diffusion_plan(
    batch: int, tokens: int, share: float = 0.5, *, generator: torch.Generator | None = None, device: str = "cpu"
) -> AttentionPlan:
    """Draws the tokens of each of up to 15 rows that the others read."""
    if not 1 <= batch <= 15:
        fail("story_diffusion_plan", "batch", "1 to 15 rows", batch, "split the story")
    masks = [(torch.rand(1, tokens, generator=generator) < share).to(device) for _ in range(batch)]
    return plan_attention([None, *masks])


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
        rows: int32 (B,): the reference row of every row, -1: none. uncond: bool (B,).
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
    query: Tensor, key: Tensor, value: Tensor, subject: Tensor, condition: Tensor, target_mask: Tensor, subject_mask:
    Tensor, plan: AttentionPlan | None = None,
) -> Tensor:  # fmt: skip
    """MCA-Ctrl (arXiv 2505.01428), attention control by two images: foreground queries read the subject image's
    foreground, the others the condition image's background.

        out = m·A(Q; subject | fg) + (1 - m)·A(Q; condition | not m)

    Args:
        subject, condition: int32 (B,): the row that each row reads as such, -1: none.
        target_mask, subject_mask: bool (B or 1, N), also which part of the condition image is kept: that outside of
            target_mask.
        plan: of `mca_ctrl_plan`.
    """
    plan = mca_ctrl_plan(target_mask, subject_mask) if plan is None else plan
    sources = [Source(key, value, r, key_groups=g) for r, g in zip((subject, condition), plan.key_groups)]
    return multi_source_attention(query, sources, query_groups=plan.query_groups, plan=plan)


def mca_ctrl_plan(target_mask: Tensor, subject_mask: Tensor) -> AttentionPlan:
    """Which keys of the two images each side of the target sees."""
    query_groups = torch.where(target_mask, FOREGROUND, BACKGROUND).to(torch.uint8)
    subject = torch.where(subject_mask, FOREGROUND, 0).to(torch.uint8)
    condition = torch.where(target_mask, 0, BACKGROUND).to(torch.uint8)
    return plan_attention([None, None], [subject, condition], query_groups, query_classes=(FOREGROUND, BACKGROUND))
