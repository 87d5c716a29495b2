"""Methods in which a layer reads images, or their values, besides what it reads anyway."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.api import multi_source_attention
from ..runtime.checks import fail
from ..source import Source
from .rows import check_mask, check_strength


def ip_adapter(
    query: Tensor,
    text: tuple[Tensor, Tensor],
    images: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float | Tensor],
    masks: Sequence[Tensor | None] | None = None,
    *,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """IP-Adapter (arXiv 2308.06721) with masks: a softmax per image beside the text's.

        out = A(Q; text) + Σ_i s_i · m_i(q) · A(Q; image_i)

    Args:
        text, images: (key, value) each, (B or 1, M, H, D). Images: up to 15.
        scales: one per image: a number or scalar; (B,), one per row; (B, N), one per query.
        masks: one per image: float or bool (B or 1, N), where it acts; None: everywhere.
        key_bias: (B or 1, M), added to the logits of the text's keys: the encoder's attention mask.
        backend: of `multi_source_attention`.

    Raises:
        ValueError: other shapes; lists of different lengths.
    """
    masks = [None] * len(images) if masks is None else masks
    for name, x in (("scales", scales), ("masks", masks)):
        sized = isinstance(x, Sequence) or (isinstance(x, Tensor) and x.dim() > 0)
        if not sized or len(x) != len(images):
            fail("ip_adapter", name, f"a list of {len(images)}, one per image", len(x) if sized else repr(x))
    sources = [Source(*text, key_bias=key_bias)]
    for i, ((key, value), scale, mask) in enumerate(zip(images, scales, masks)):
        sources.append(Source(key, value, softmax_group=i + 1, weight=_weight(i, scale, mask, query)))
    return multi_source_attention(query, sources, backend=backend)


def _weight(i: int, scale: float | Tensor, mask: Tensor | None, query: Tensor) -> float | Tensor:
    """The weight of the image's `Source`: scale times mask."""
    check_strength("ip_adapter", f"scales[{i}]", scale, query, query.shape[1])
    if mask is None:
        return scale
    check_mask("ip_adapter", f"masks[{i}]", mask, query.shape[0], query, soft=True)
    if isinstance(scale, Tensor) and scale.dim() == 1:
        scale = scale[:, None]
    return (mask.float() * scale).expand(query.shape[:2])


def dream_matcher(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference: Tensor,
    match: Tensor,
    blend: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """DreamMatcher (arXiv 2402.09812), appearance matching self-attention: the target's structure, with values that are
    warped from the reference where the two match.

        out = softmax(Q·K^T)·V', V' = V + w·(V_ref[match] - V)

    Args:
        query, key, value: of the targets. reference: values of the reference, (R, M, H, D), R = B or 1.
        match: int (B, N): the reference token of every target token, from `correspondence`.
        blend: float (B, N): foreground times confidence of the match, w.
        backend: of `multi_source_attention`.

    V' is made once before the softmax, which costs M rows against the N x M pairs of a second softmax.
    """
    batch, tokens = value.shape[:2]
    if reference.dim() != 4 or reference.shape[0] not in (1, batch) or reference.shape[2:] != value.shape[2:]:
        expected = f"shape ({batch} or 1, tokens, {value.shape[2]}, {value.shape[3]})"
        fail("dream_matcher", "reference", expected, tuple(reference.shape))
    for name, x in (("match", match), ("blend", blend)):
        if x.shape != (batch, tokens):
            fail("dream_matcher", name, f"shape ({batch}, {tokens})", tuple(x.shape))
    values = reference.expand(batch, *reference.shape[1:])
    places = match.long()[:, :, None, None].expand(*match.shape, *value.shape[2:])
    warped = torch.lerp(value, values.gather(1, places), blend[:, :, None, None].to(value.dtype))
    return multi_source_attention(query, [Source(key, warped)], backend=backend)
