"""Methods with a foreground and a background: each query reads the keys of its own side."""

import torch
from torch import Tensor

from ..attention.api import multi_source_attention
from ..attention.plan import AttentionPlan, plan_attention
from ..runtime.checks import fail
from ..source import Source
from .rows import check_mask, check_rows

OWN, BACKGROUND, FOREGROUND = 1, 2, 4
"""The group bits of rows that attend to all of themselves, of the surroundings and of the subject."""


def masactrl(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    target_mask: Tensor | None = None,
    source_mask: Tensor | None = None,
    plan: AttentionPlan | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """MasaCtrl (arXiv 2304.08465), mutual self-attention: row b's queries read the keys and values of rows[b].

        out = A(Q; K_src, V_src); with masks m·A(Q; src | fg) + (1 - m)·A(Q; src | bg)

    A side of the source without a token gives the mean of all its values, as in the authors' code: there hidden
    logits are the lowest number, and a softmax of equal numbers is even.

    Args:
        rows: int (B,), the source row of every row. A row that names itself attends to itself, with masks too to all of
            itself; -1: none, the result is 0.
        target_mask, source_mask: bool (B or 1, N), source_mask by the row that is read: foreground queries read
            foreground keys, the others the background. One softmax over the keys of the query's own side is the blend
            of two.
        plan: of `masactrl_plan` for these rows and masks, for reuse over layers and steps; the masks can be left out.
        backend: of `multi_source_attention`.
    """
    check_rows("masactrl", "rows", rows, query)
    if plan is None:
        if target_mask is None and source_mask is None:
            return multi_source_attention(query, [Source(key, value, rows)], backend=backend)
        if target_mask is None or source_mask is None:
            missing, given = ("target_mask", "source_mask") if target_mask is None else ("source_mask", "target_mask")
            fail("masactrl", missing, f"a mask beside {given}", None)
        for name, mask in (("target_mask", target_mask), ("source_mask", source_mask)):
            check_mask("masactrl", name, mask, query.shape[0], query)
        plan = masactrl_plan(target_mask, source_mask, rows)
    sides, even = plan.key_groups
    sources = [Source(key, value, rows, key_groups=sides), _evenly(key, value, rows, even)]
    return multi_source_attention(query, sources, query_groups=plan.query_groups, plan=plan, backend=backend)


def masactrl_plan(target_mask: Tensor, source_mask: Tensor, rows: Tensor) -> AttentionPlan:
    """The plan of masked MasaCtrl: foreground to foreground, background to background. Arguments are those of
    `masactrl`.
    """
    itself = rows == torch.arange(len(rows), device=rows.device)
    query_groups = torch.where(itself[:, None], OWN, _sides(target_mask)).to(torch.uint8)
    key_groups = (_sides(source_mask) | OWN).to(torch.uint8)
    even = (_empty(source_mask, FOREGROUND) | _empty(~source_mask, BACKGROUND)).to(torch.uint8)
    return plan_attention([None] * 2, [key_groups, even], query_groups, query_classes=(OWN, BACKGROUND, FOREGROUND))


def mca_ctrl(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subject: Tensor,
    condition: Tensor,
    target_mask: Tensor,
    subject_mask: Tensor,
    condition_mask: Tensor | None = None,
    plan: AttentionPlan | None = None,
    *,
    inject: bool = False,
    backend: str = "auto",
) -> Tensor:
    """MCA-Ctrl (arXiv 2505.01428) for editing, attention control by two images: the foreground is the subject image's,
    the background the condition image's.

        out = m·A(Q_S; subject | fg) + (1 - m)·A(Q_C; condition | bg)

    Local query (SALQ, equations 4 to 7): Q_S = Q_C = Q, the target's own queries. Global injection (SAGI, equations 8
    to 11): Q_S and Q_C are the queries of the two images themselves. Equation 12 says when: the authors' notebook
    injects in the first tenth of the steps, in all layers, and queries afterwards. As in their code m = 1 is the
    subject; equations 7 and 11 name the sides the other way round.

    A side of an image without a token gives the mean of all its values, as in the authors' code.

    Args:
        subject, condition: int (B,), the row that each row reads as such. A row with -1 in both attends to itself; -1
            in one: the result is 0 on that side.
        target_mask: bool (B or 1, N), the foreground queries.
        subject_mask, condition_mask: bool (B or 1, N), by the row that is read: what is kept of the subject image, and
            what is left out of the condition image. Default of the latter: target_mask, of which the condition's row
            counts, not the target's.
        plan: of `mca_ctrl_plan`.
        inject: SAGI in place of SALQ.
        backend: of `multi_source_attention`.
    """
    for name, rows in (("subject", subject), ("condition", condition)):
        check_rows("mca_ctrl", name, rows, query)
    masks = {"target_mask": target_mask, "subject_mask": subject_mask, "condition_mask": condition_mask}
    for name, mask in masks.items():
        if mask is not None:
            check_mask("mca_ctrl", name, mask, query.shape[0], query)
    plan = mca_ctrl_plan(target_mask, subject_mask, condition_mask) if plan is None else plan
    itself = torch.arange(query.shape[0], device=query.device)
    if inject:
        read_subject, read_condition = (query[torch.where(rows < 0, itself, rows)] for rows in (subject, condition))
        query = torch.where(target_mask[:, :, None, None], read_subject, read_condition)
    own = torch.where((subject < 0) & (condition < 0), itself, -1).int()
    foreground, background, everything, even_subject, even_condition = plan.key_groups
    sources = [
        Source(key, value, subject, key_groups=foreground),
        Source(key, value, condition, key_groups=background),
        Source(key, value, own, key_groups=everything),
        _evenly(key, value, subject, even_subject),
        _evenly(key, value, condition, even_condition),
    ]
    return multi_source_attention(query, sources, query_groups=plan.query_groups, plan=plan, backend=backend)


def mca_ctrl_plan(target_mask: Tensor, subject_mask: Tensor, condition_mask: Tensor | None = None) -> AttentionPlan:
    """Which keys of the two images each side of the target sees. Arguments are those of `mca_ctrl`."""
    left_out = target_mask if condition_mask is None else condition_mask
    query_groups = _sides(target_mask).to(torch.uint8)
    subject = torch.where(subject_mask, FOREGROUND, 0).to(torch.uint8)
    condition = torch.where(left_out, 0, BACKGROUND).to(torch.uint8)
    even = (_empty(subject_mask, FOREGROUND).to(torch.uint8), _empty(~left_out, BACKGROUND).to(torch.uint8))
    groups = [subject, condition, None, *even]  # rows that attend to themselves see all of themselves
    return plan_attention([None] * 5, groups, query_groups, query_classes=(BACKGROUND, FOREGROUND))


def mca_ctrl_generation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subject: Tensor,
    target_mask: Tensor,
    subject_mask: Tensor,
    *,
    inject: bool = False,
    backend: str = "auto",
) -> Tensor:
    """MCA-Ctrl (arXiv 2505.01428) for generating a subject from text: no condition image, and a soft mask of where the
    subject is to be, from the target's own cross-attention.

        out = m·A(Q_S; subject | fg) + (1 - m)·A(Q; {own tokens j with m_j < 1}, logits + m_j)

    Equations 4 to 7 with Q_S = Q, or 8 to 11 (`inject`) with the subject image's queries Q_S; the condition is the row
    itself. The term m_j is what the authors' code makes of equation 6 where the mask is soft.

    Args:
        subject: int (B,), the row that each row reads as its subject; -1: the row attends to itself alone.
        target_mask: float (B or 1, N) in [0, 1], how much each token is of the subject. The authors' is the map of the
            subject's word, stretched to [0, 1], with the highest 30 % set to 1.
        subject_mask: bool (B or 1, N), by the row that is read: the subject in its image.
        inject: SAGI in place of SALQ.
        backend: of `multi_source_attention`.
    """
    op = "mca_ctrl_generation"
    check_rows(op, "subject", subject, query)
    check_mask(op, "target_mask", target_mask, query.shape[0], query, soft=True)
    check_mask(op, "subject_mask", subject_mask, query.shape[0], query)
    soft = torch.where(subject[:, None] < 0, 0.0, target_mask.float())
    itself = torch.arange(query.shape[0], device=query.device)
    reading = query[torch.where(subject < 0, itself, subject)] if inject else query
    inside = [
        Source(key, value, subject, key_mask=subject_mask, weight=soft),
        _evenly_hidden(key, value, subject, ~subject_mask.any(1, keepdim=True)),
    ]
    around = soft < 1
    outside = [
        Source(key, value, key_mask=around, key_bias=soft, softmax_group=1, weight=1 - soft),
        _evenly_hidden(key, value, None, ~around.any(1, keepdim=True))._replace(softmax_group=1),
    ]
    if not inject:
        return multi_source_attention(query, inside + outside, backend=backend)
    # the two sides have queries of their own, so each is a call
    injected = multi_source_attention(reading, inside, backend=backend)
    return injected + multi_source_attention(query, outside, backend=backend)


def _sides(mask: Tensor) -> Tensor:
    return torch.where(mask, FOREGROUND, BACKGROUND)


def _empty(side: Tensor, bit: int) -> Tensor:
    """Group bytes that set `bit` for all tokens of a row whose side has no token, and 0 elsewhere."""
    return torch.where(side.any(1, keepdim=True), 0, bit).expand(side.shape)


def _evenly(key: Tensor, value: Tensor, rows: Tensor, groups: Tensor | None) -> Source:
    """A source that gives queries of these groups the mean of all values of a row."""
    # a tensor, since on a GPU a call with numbers is laid out anew every time
    nothing = key.new_zeros((), dtype=torch.float32)
    return Source(key, value, rows, key_groups=groups, logit_scale=nothing)


def _evenly_hidden(key: Tensor, value: Tensor, rows: Tensor | None, empty: Tensor) -> Source:
    """A source that gives the mean of all values of a row where its side is `empty`, bool (R or 1, 1)."""
    shown = empty.expand(empty.shape[0], key.shape[1]).contiguous()
    nothing = key.new_zeros((), dtype=torch.float32)
    return Source(key, value, rows, key_mask=shown, logit_scale=nothing)
