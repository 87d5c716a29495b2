"""CharaConsist's attention (arXiv 2507.11533): frames read an identity image, whose keys are kept before RoPE and are
rotated to where they are placed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional as F

from ....attention.api import multi_source_attention
from ....attention.plan import AttentionPlan, plan_attention
from ....features.correspondence import correspondence
from ....runtime.checks import check_integer, check_number, fail
from ....source import Source
from ...processors.joint import Tokens
from ...processors.routing import BACKGROUND, FOREGROUND

KeyValue = tuple[Tensor, Tensor]
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' positions, fp32 (N, D) each"""


class Points(NamedTuple):
    """The token of the identity image that each token of the frames is matched with."""

    token: Tensor
    """int64 (B, N) in [0, M)"""
    similarity: Tensor
    """fp32 (B, N): the cosine, averaged over the layers"""
    matched: Tensor
    """bool (B, N): the match counts; both tokens lie in the foreground and are alike"""


def match_points(
    features: Sequence[Tensor],
    identity: Sequence[Tensor],
    foreground: Tensor,
    identity_foreground: Tensor,
    threshold: float = 0.5,
) -> Points:
    """For each token of the frames the token of the identity image that is most like it.

        s[b,i,j] = mean over the layers l of cos(features_l[b,i], identity_l[0 or b,j])
        token[b,i] = argmax_j s[b,i,j],   similarity[b,i] = max_j s[b,i,j]
        matched[b,i] = foreground[b,i] and identity_foreground[token[b,i]] and similarity[b,i] > threshold

    The N x M similarities are never stored. A mean of cosines is the cosine of unit vectors written one after another,
    so `correspondence` finds the argmax; that costs a copy of the features of all layers. Of equal similarities the
    lowest index counts, where the paper's code takes what torch.max gives. The unit vectors are rounded to the
    features' dtype and their products summed in fp32, where its code rounds each layer's similarities to bf16: points
    that are alike to that rounding may be matched differently. A token with a NaN is matched with none.

    Args:
        features: of each layer (B, N, C), fp32, fp16 or bf16: attention outputs of the frames' image tokens.
            identity: of the same layers (1 or B, M, C).
        foreground: bool (B, N). identity_foreground: bool (1 or B, M).
        threshold: from -1 to 1.

    Raises:
        ValueError, TypeError: no layer; other shapes, dtypes or devices.
    """
    op = "match_points"
    if not features or features[0].dim() != 3:
        fail(op, "features", "tensors (B, N, C) of one layer at least", [tuple(x.shape) for x in features])
    if len(features) != len(identity):
        fail(op, "identity", f"features of {len(features)} layers, as the frames'", len(identity))
    (rows, tokens), others = features[0].shape[:2], identity[0].shape[1]
    for name, layers in (("features", features), ("identity", identity)):
        for i, x in enumerate(layers):
            if x.dim() != 3 or x.shape[:2] != layers[0].shape[:2] or x.dtype != features[0].dtype:
                expected = f"{features[0].dtype} of shape {(*layers[0].shape[:2], 'channels')}"
                fail(op, f"{name}[{i}]", expected, f"{x.dtype} of shape {tuple(x.shape)}")
    _check_mask(op, "foreground", foreground, (rows, tokens))
    _check_mask(op, "identity_foreground", identity_foreground, (1, others), (rows, others))
    threshold = check_number(op, "threshold", threshold, "a number from -1 to 1", -1, 1)
    token, _ = correspondence(_side_by_side(features), _side_by_side(identity))
    similarity = torch.zeros_like(token, dtype=torch.float32)
    for x, y in zip(features, identity):
        similarity += F.cosine_similarity(x.float(), _taken(y, token).float(), dim=-1)
    similarity /= len(features)
    inside = identity_foreground.expand(rows, -1).gather(1, token)
    return Points(token, similarity, foreground & inside & (similarity > threshold))


class FrameRouting(NamedTuple):
    """What the tokens of frames read of the identity image. Built by `route_frame`, once for all layers and steps while
    masks and points stay.

    | queries                         | keys that they read, in one softmax                                          |
    |---------------------------------|------------------------------------------------------------------------------|
    | text                            | the row's text and image, as in the stock model                              |
    | foreground of a frame's image   | besides, the identity's tokens of all matched points, placed at the frame's  |
    | background of a frame's image   | besides, the identity's background where the frame has background too        |
    """

    text_tokens: int
    query_groups: Tensor
    """uint8 (B, text_tokens + N)"""
    token: Tensor | None
    """int32 (B, N): the identity's token that is placed at each token of the frame; None: no foreground is read"""
    foreground: Tensor | None
    """uint8 (B, N): FOREGROUND where the point is matched"""
    background: Tensor | None
    """uint8 (B, N): BACKGROUND where both images have background; None: no background is read"""
    plan: AttentionPlan


def route_frame(
    text_tokens: int,
    foreground: Tensor,
    points: Points | None = None,
    identity_background: Tensor | None = None,
) -> FrameRouting:
    """The routing of frames with these masks.

    Args:
        text_tokens: how many tokens the text has.
        foreground: bool (B, N), of the frames.
        points: whose tokens the frames' foreground reads; it may be of an earlier mask. None: it reads none.
        identity_background: bool (1 or B, N): the identity's tokens that the frames' background reads where it lies.
            None: it reads none.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; an identity image of another size, whose background has
            no place in the frame.
    """
    op = "route_frame"
    check_integer(op, "text_tokens", text_tokens, 0, "an integer of at least 0")
    if not isinstance(foreground, Tensor) or foreground.dim() != 2:
        fail(op, "foreground", "a tensor of shape (rows, tokens)", getattr(foreground, "shape", foreground))
    rows, tokens = foreground.shape
    _check_mask(op, "foreground", foreground, (rows, tokens))
    token = of_points = of_background = None
    if points is not None:
        if not isinstance(points, Points):
            fail(op, "points", "Points from match_points, or None", type(points).__name__, error=TypeError)
        _check_mask(op, "points.matched", points.matched, (rows, tokens))
        token = points.token.int()
        of_points = torch.where(points.matched, FOREGROUND, 0).to(torch.uint8)
    if identity_background is not None:
        _check_mask(op, "identity_background", identity_background, (1, tokens), (rows, tokens))
        of_background = torch.where(identity_background & ~foreground, BACKGROUND, 0).to(torch.uint8)
    of_image = torch.where(foreground, FOREGROUND, BACKGROUND).to(torch.uint8)
    query_groups = F.pad(of_image, (text_tokens, 0))
    groups = [None, None, *(x for x in (of_points, of_background) if x is not None)]
    classes = (0, BACKGROUND, FOREGROUND)  # named, since looking for them would synchronize with a GPU
    plan = plan_attention([None] * len(groups), groups, query_groups, query_classes=classes)
    return FrameRouting(text_tokens, query_groups, token, of_points, of_background, plan)


def chara_consist_attention(
    text: Tokens | None, image: Tokens, identity: KeyValue, routing: FrameRouting, rotary: Rotary
) -> tuple[Tensor | None, Tensor]:
    """A layer's joint attention in which frames also read an identity image, as one `multi_source_attention` call.

    Keys and values are not concatenated. The identity's keys are rotated here: a matched one to the position of the
    frame's token that it is matched with, one of the background to its own. Of its values none is copied. A layer takes
    the memory of one gathered and one or two rotated copies of the identity's keys, (B, N, H, D) each.

    Args:
        text: the text's tokens with positions applied; None where both are one stream, with the text's tokens first.
        image: the frames' tokens (B, N, H, D), or the stream's, with positions applied.
        identity: keys before RoPE and values of the identity's image tokens, (1 or B, M, H, D).
        routing: of the frames; see `route_frame`.
        rotary: of the N image tokens, as the model gives them (`pos_embed` of img_ids).

    Returns:
        The result for the text (None where text is None), and for the image or the stream, (B, ·, H, D).

    Raises:
        ValueError: tokens that the routing is not of.
    """
    start, placed_at = routing.text_tokens, routing.query_groups.shape[1] - routing.text_tokens
    if text is None:
        parts = [(x[:, :start], x[:, start:]) for x in (image.key, image.value)]
        query, own = image.query, [Source(*x) for x in zip(*parts)]
    else:
        query = torch.cat([text.query, image.query], 1)
        own = [Source(text.key, text.value), Source(image.key, image.value)]
    batch = len(query)
    if routing.query_groups.shape != query.shape[:2] or own[1].key.shape[1] != placed_at:
        got = f"one of {tuple(routing.query_groups.shape)} with {start} of text"
        expected = f"a routing of {batch} rows and {own[0].key.shape[1]} + {own[1].key.shape[1]} tokens"
        fail("chara_consist_attention", "routing", expected, got)
    key, value = identity
    values, sources = value.expand(batch, -1, -1, -1), own
    if routing.token is not None:
        moved = apply_rotary_emb(_taken(key, routing.token), rotary, sequence_dim=1)
        sources.append(Source(moved, values, value_index=routing.token, key_groups=routing.foreground))
    if routing.background is not None:
        kept = apply_rotary_emb(key, rotary, sequence_dim=1).expand(batch, -1, -1, -1)
        sources.append(Source(kept, values, key_groups=routing.background))
    out = multi_source_attention(query, sources, query_groups=routing.query_groups, plan=routing.plan)
    if text is None:
        return None, out
    of_text, of_image = out.split([start, placed_at], 1)
    return of_text, of_image


def merge_points(out: Tensor, identity: Tensor, points: Points, weight: Tensor) -> Tensor:
    """Adaptive token merge: what attention gave a matched token is drawn to what it gave the identity's token.

        out[b,i] + weight · similarity[b,i] · (identity[token[b,i]] - out[b,i])   where matched, else out[b,i]

    In fp32, rounded once; the paper's code computes in bf16.

    Args:
        out: (B, N, C), of the frames' image tokens. identity: (1 or B, M, C). weight: fp32 (), from 0 to 1.
    """
    share = (weight * points.similarity)[..., None]
    merged = torch.lerp(out.float(), _taken(identity, points.token).float(), share).to(out.dtype)
    return torch.where(points.matched[..., None], merged, out)


class Words(NamedTuple):
    """The tokens of the prompts that describe the background, and those that describe the foreground."""

    background: Tensor
    """bool (B, T)"""
    foreground: Tensor
    """bool (B, T)"""
    plans: tuple[AttentionPlan, AttentionPlan]
    """of attention to the one and to the other"""


def mark_words(pairs: Tensor, text_tokens: int) -> Words:
    """The words of prompts whose first tokens describe the background and the next ones the foreground.

    Args:
        pairs: int (B, 2): of each prompt where the foreground's words begin, and where they end.
    """
    place = torch.arange(text_tokens, device=pairs.device)
    background = place < pairs[:, :1]
    foreground = ~background & (place < pairs[:, 1:])
    return Words(background, foreground, (plan_attention([background]), plan_attention([foreground])))


def foreground_share(query: Tensor, text: KeyValue, words: Words) -> Tensor:
    """How much of the attention that image tokens pay to the prompt's words goes to those of the foreground, fp32
    (B, N), averaged over the heads.

        share = mean over h of Σ_{j in foreground} P[b,i,h,j],   P = softmax over the words of both kinds of ⟨Q, K⟩

    The logits are not divided by √D, as in the paper's code. P is not stored: the sums are those of two partial
    results, share = sigmoid(lse of the foreground - lse of the background).

    Args:
        query: (B, N, H, D), of the image's tokens. text: keys and values (B, T, H, D). Both have positions applied.
    """
    lse = []
    for mask, plan in zip(words[:2], words.plans):
        sources = [Source(text[0], text[1], key_mask=mask)]
        lse.append(multi_source_attention(query, sources, scale=1.0, return_lse=True, plan=plan)[1])
    return (lse[1] - lse[0]).sigmoid().mean(-1)


def foreground_of(share: Tensor, words: Words, grid: tuple[int, int]) -> Tensor:
    """The tokens that attend to a word of the foreground, on average, at least as much as to one of the background.

    Then what is narrower than 3 tokens is taken away, and the rest grows by one token more than it shrank.

    Args:
        share: `foreground_share` (B, N), averaged over layers. grid: (rows, columns) of the N tokens.

    Returns:
        bool (B, N)
    """
    of_foreground, of_background = words.foreground.sum(1), words.background.sum(1)
    mask = share / of_foreground[:, None] >= (1 - share) / of_background[:, None]
    shrunk = -F.max_pool2d(-mask.float().unflatten(1, grid)[:, None], 3, 1, 1)
    return (F.max_pool2d(shrunk, 5, 1, 2) > 0).flatten(1)


def _side_by_side(features: Sequence[Tensor]) -> Tensor:
    """The features of all layers as unit vectors, one layer's after another's: (B, N, layers * C)."""
    widths = [x.shape[-1] for x in features]
    joined = features[0].new_empty(*features[0].shape[:2], sum(widths))
    for part, x in zip(joined.split(widths, -1), features):
        part.copy_(F.normalize(x.float(), dim=-1))
    return joined


def _taken(x: Tensor, token: Tensor) -> Tensor:
    """x (1 or B, M, …) at the tokens (B, N): (B, N, …)."""
    return x[torch.arange(len(x), device=x.device)[:, None], token]


def _check_mask(op: str, name: str, mask: object, *shapes: tuple[int, int]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        fail(op, name, "a tensor of bools", got, error=TypeError)
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(x) for x in dict.fromkeys(shapes))
        fail(op, name, f"shape {expected}", tuple(mask.shape))
