"""Regional prompts in a DiT: which text and image tokens see each other, as group bits instead of a dense mask."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...attention.api import multi_source_attention
from ...attention.plan import plan_attention
from ...runtime.checks import check_integer, check_pair, fail
from ...source import Source
from ..processors.bank_values import check_device
from ..processors.joint import Tokens
from ..processors.routing import in_ratio, token_mask

MAX_REGIONS = 7
_IMAGE = 1 << MAX_REGIONS
"""The bit of all image keys, for the queries that see them all"""
_EVERY = 0xFF


class Regions:
    """Which tokens of the text and of the image lie in which of up to 7 regions.

    With the regions t of a text token (none: the base prompt's) and i of an image token (none: the background), a query
    in the row sees a key in the column

        query, key    base prompt   text in t             image in i
        base prompt   yes           no                    yes
        text in t'    yes           t and t' overlap      t' and i overlap
        image in i'   yes           i' and t overlap      yes; with `apart`, i and i' overlap or both are none

    This is the mask of regional prompting for Flux (arXiv 2411.02395) with two differences: there image tokens are
    always `apart`, and the base prompt has a pass of its own, whose result is blended with the regions'.

    Args:
        text: uint8 (T,) or (B, T): bit r of a token is set where it describes region r; 0: the base prompt.
        image: uint8 (N,) or (B, N): bit r is set where the token lies in region r; 0: the background.
        apart: whether image tokens see only those of their own regions.

    The groups and the plan are built here, once, and serve all layers and steps.

    Raises:
        TypeError, ValueError: other dtypes, shapes or devices; bit 7; 7 regions and a background that is to be apart.
    """

    def __init__(self, text: Tensor, image: Tensor, apart: bool = False):
        text, image = (_bits(name, x) for name, x in (("text", text), ("image", image)))
        if text.device != image.device:
            fail("Regions", "image", str(text.device), image.device)
        if 1 not in (len(text), len(image)) and len(text) != len(image):
            fail("Regions", "image", f"{len(text)} rows or 1, as text", len(image))
        for name, x in (("text", text), ("image", image)):
            if (x >= _IMAGE).any():
                fail("Regions", name, f"bits of regions 0 to {MAX_REGIONS - 1}", x.max().item())
        self.text, self.image, self.apart = text, image, apart
        seen = image | _background_bit(text, image) if apart else image | _IMAGE
        self.text_keys = torch.where(text == 0, _EVERY, text).to(torch.uint8)
        self.image_keys = seen | _IMAGE
        rows = max(len(text), len(image))
        queries = (torch.where(text == 0, _IMAGE, text).to(torch.uint8), seen)
        self.queries = torch.cat([x.expand(rows, -1) for x in queries], 1)
        self.image_queries = seen
        self.classes = tuple(self.queries.unique().tolist())
        self.plan = plan_attention([None, None], [self.text_keys, self.image_keys], self.queries)
        self.image_plan = plan_attention([None], [self.image_keys], self.image_queries)

    @classmethod
    def from_masks(cls, masks: Tensor, tokens: Sequence[int], grid: tuple[int, int], apart: bool = False) -> "Regions":
        """Regions of masks, for a text that is a base prompt followed by one prompt per region.

        Args:
            masks: of regions 0, 1, …: bool, or float from 0 to 1, (n, height, width), or (B, n, height, width) with
                masks of each row. A token lies in a region that covers half of it (see `token_mask`), in several where
                they overlap.
            tokens: how many tokens of the text the base prompt and each region's prompt have, n + 1 numbers. The base
                prompt may have none.
            grid: (rows, columns) of the image's tokens: its height and width in pixels divided by 16 for Flux, Flux2,
                SD3 and Qwen-Image.
            apart: see `Regions`.

        Raises:
            ValueError, TypeError: other shapes, numbers or dtypes; an empty mask.
        """
        op = "Regions.from_masks"
        if not isinstance(masks, Tensor) or not (masks.dtype == torch.bool or masks.is_floating_point()):
            got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
            fail(op, "masks", "a tensor of bools or of floats from 0 to 1", got, error=TypeError)
        regions = masks.shape[-3] if masks.dim() in (3, 4) else 0
        if not 1 <= regions <= MAX_REGIONS:
            expected = f"shape (n, height, width) or (B, n, height, width) with n from 1 to {MAX_REGIONS}"
            fail(op, "masks", expected, tuple(masks.shape))
        if not ((masks >= 0) & (masks <= 1)).all():
            fail(op, "masks", "numbers from 0 to 1", f"{masks.min():g} to {masks.max():g}")
        if not masks.flatten(-2).any(-1).all():
            fail(op, "masks", "masks that are not empty", "an empty one", "leave the region and its prompt out")
        if not isinstance(tokens, Sequence) or len(tokens) != regions + 1:
            given = len(tokens) if isinstance(tokens, Sequence) else type(tokens).__name__
            fail(op, "tokens", f"{regions + 1} numbers, of the base prompt and of each region's", given)
        for i, number in enumerate(tokens):
            check_integer(op, f"tokens[{i}]", number, min(i, 1), f"an integer of at least {min(i, 1)}")
        grid = check_pair(op, "grid", grid, 1, "(rows, columns) of the image's tokens")
        height, width = masks.shape[-2:]
        if not in_ratio(*grid, height, width):
            fail(op, "grid", f"(rows, columns) in the ratio of the masks, {height} x {width}", grid)
        inside = token_mask(masks.flatten(0, -3), grid).unflatten(0, (-1, regions))
        bits = torch.tensor([1 << r for r in range(regions)], dtype=torch.uint8, device=masks.device)
        text = torch.cat([bits.new_zeros(1), bits]).repeat_interleave(torch.tensor(tokens, device=masks.device))
        return cls(text, (inside * bits[:, None]).sum(1, dtype=torch.uint8), apart)

    def to(self, device: torch.device | str) -> "Regions":
        """The regions on another device; these where they are there already. ValueError: a device that is none."""
        check_device("Regions.to", device)
        text = self.text.to(device)
        return self if text is self.text else Regions(text, self.image.to(device), self.apart)


def _bits(name: str, x: Tensor) -> Tensor:
    """The bits as (rows, tokens)."""
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        fail("Regions", name, "a tensor of torch.uint8", got, error=TypeError)
    if x.dim() not in (1, 2):
        fail("Regions", name, "shape (tokens,) or (rows, tokens)", tuple(x.shape))
    return x.clone() if x.dim() == 2 else x[None].clone()  # the plan is of the numbers as they are now


def _background_bit(text: Tensor, image: Tensor) -> Tensor:
    """A bit that no region has, where an image token lies in no region; 0 elsewhere."""
    background = image == 0
    used = set(text.unique().tolist()) | set(image.unique().tolist())
    free = [r for r in range(MAX_REGIONS) if not any(bits >> r & 1 for bits in used)]
    if not free and background.any():
        hint = "let the regions cover the image"
        fail("Regions", "image", f"at most {MAX_REGIONS - 1} regions and a background that is apart", MAX_REGIONS, hint)
    return background.to(torch.uint8) << free[0] if free else torch.zeros_like(image)


def regional_joint_attention(text: Tokens | None, image: Tokens, regions: Regions) -> tuple[Tensor | None, Tensor]:
    """Joint attention in which tokens see each other as `Regions` says, for the processors of `joint_processors`:
    `partial(regional_joint_attention, regions=regions)`.

    Padding of the text (`text.mask`) is hidden besides; the plan is then built in every layer, since the mask is the
    call's. Where text and image are one stream, the text's tokens are its first; a stream of as many tokens as the
    image (SD3's second attention) is the image alone.

    Raises:
        TypeError: regions of another type.
        ValueError: other numbers of tokens or rows than the regions have, another device.
    """
    op, device = "regional_joint_attention", image.query.device
    if not isinstance(regions, Regions):
        fail(op, "regions", "Regions", type(regions).__name__, error=TypeError)
    if regions.queries.device != device:
        fail(op, "regions", f"regions on {device}", regions.queries.device, "call regions.to(device)")
    rows = len(regions.queries)
    if rows not in (1, len(image.query)):
        fail(op, "regions", f"regions of {len(image.query)} rows, or of 1 for all", rows)
    texts, images = regions.text.shape[1], regions.image.shape[1]
    given = image.query.shape[1] if text is None else text.query.shape[1], image.query.shape[1]
    if text is None and given[1] == images:
        return None, _of_image(image, regions)
    if given != ((texts + images,) * 2 if text is None else (texts, images)):
        expected = f"{texts} tokens of text and {images} of the image"
        got = f"{given[1]} in one stream" if text is None else f"{given[0]} and {given[1]}"
        fail(op, "regions", f"regions of {got}", expected)
    if text is None:
        sources = [Source(image.key[:, :texts], image.value[:, :texts], key_groups=regions.text_keys)]
        sources.append(Source(image.key[:, texts:], image.value[:, texts:], key_groups=regions.image_keys))
        return None, multi_source_attention(image.query, sources, query_groups=regions.queries, plan=regions.plan)
    plan = regions.plan
    if text.mask is not None:
        groups = [regions.text_keys, regions.image_keys]
        plan = plan_attention([text.mask, None], groups, regions.queries, query_classes=regions.classes)
    sources = [Source(text.key, text.value, key_mask=text.mask, key_groups=regions.text_keys)]
    sources.append(Source(image.key, image.value, key_groups=regions.image_keys))
    query = torch.cat([text.query, image.query], 1)
    out = multi_source_attention(query, sources, query_groups=regions.queries, plan=plan)
    of_text, of_image = out.split([texts, images], 1)
    return of_text, of_image


def _of_image(image: Tokens, regions: Regions) -> Tensor:
    """Attention among the image's tokens."""
    if not regions.apart:
        return multi_source_attention(image.query, [Source(image.key, image.value)])
    source = Source(image.key, image.value, key_groups=regions.image_keys)
    return multi_source_attention(image.query, [source], query_groups=regions.image_queries, plan=regions.image_plan)
