"""Ulysses, a kind of context parallelism (arXiv 2309.14509), in this package's own processors.

Each card holds a part of a layer's tokens with all heads. Before attention the cards exchange these for all tokens with
a part of the heads, and afterwards back. Attention treats each head by itself, so that masks, groups, row tables and
further sources mean what they mean on one card; of keys that every card holds whole, it reads its own heads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from diffusers.models.attention_dispatch import SeqAllToAllDim
from torch import Tensor, distributed

from ...runtime.checks import fail
from ...source import Source


class Ulysses(NamedTuple):
    """The cards that divide a layer's heads among them."""

    group: Any
    """their process group"""
    degree: int
    """how many they are"""
    rank: int
    """which of them this one is"""

    def gathered(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Of each kind of tokens (B, N / degree, H, C) of this card -> (B, N, H / degree, C), those of all cards in
        order."""
        sizes = [x.shape[1] for x in parts]
        whole = SeqAllToAllDim.apply(self.group, torch.cat(list(parts), 1), 2, 1)
        of_cards = whole.unflatten(1, (self.degree, -1)).split(sizes, 2)
        return [x.flatten(1, 2) for x in of_cards]

    def scattered(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The way back: of each kind of tokens (B, N, H / degree, C) -> (B, N / degree, H, C)."""
        of_cards = [x.unflatten(1, (self.degree, -1)) for x in results]
        own = SeqAllToAllDim.apply(self.group, torch.cat(of_cards, 2).flatten(1, 2), 1, 2)
        return list(own.split([x.shape[2] for x in of_cards], 1))

    def gathered_mask(self, mask: Tensor) -> Tensor:
        """(B, N / degree) of this card's tokens -> (B, N)."""
        parts = [torch.empty_like(mask, memory_format=torch.contiguous_format) for _ in range(self.degree)]
        distributed.all_gather(parts, mask.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the cards of what each found in its heads."""
        total = x.clone()
        distributed.all_reduce(total, group=self.group)
        return total / self.degree

    def heads_of(self, source: Source) -> Source:
        """This card's heads of a source with all of them: views, without communication."""
        share = source.key.shape[2] // self.degree

        def own(x: Tensor) -> Tensor:
            return x.narrow(2, self.rank * share, share)

        return source._replace(
            key=own(source.key),
            value=own(source.value),
            key_scale=None if source.key_scale is None else own(source.key_scale),
            value_scale=None if source.value_scale is None else own(source.value_scale),
        )


def ulysses_of(processor: object, heads: int = 0, op: str | None = None) -> Ulysses | None:
    """The cards of a processor under Ulysses; None without context parallelism.

    Args:
        heads: of the processor's layer, which the cards must divide. op: the name in errors; None: the processor's.

    Raises:
        NotImplementedError: ring attention, unified attention and `ulysses_anything`; heads that the cards do not
            divide.
    """
    parallel_config = getattr(processor, "_parallel_config", None)
    if parallel_config is None:
        return None
    config = getattr(parallel_config, "context_parallel_config", None)
    op = op or type(processor).__name__
    if config is None or config.ring_degree > 1 or config.ulysses_anything:
        _refuse(op, "None, or ulysses_degree alone, while the processor is active", config)
    if heads % config.ulysses_degree:
        expected = f"heads that ulysses_degree={config.ulysses_degree} divides"
        fail(op, "attn", expected, heads, "choose a smaller ulysses_degree", NotImplementedError)
    return Ulysses(config._ulysses_mesh.get_group(), config.ulysses_degree, config._ulysses_local_rank)


def refuse_context_parallelism(processor: object) -> None:
    """NotImplementedError where the tokens that an active processor attends to lie on several cards."""
    parallel_config = getattr(processor, "_parallel_config", None)
    if parallel_config is not None:
        config = getattr(parallel_config, "context_parallel_config", None)
        _refuse(type(processor).__name__, "None while the processor is active", config)


def _refuse(op: str, expected: str, config: Any) -> NoReturn:
    degrees = "" if config is None else f", ring_degree={config.ring_degree}, ulysses_degree={config.ulysses_degree}"
    anything = ", ulysses_anything" if config is not None and config.ulysses_anything else ""
    hint = "run the model on one card, or with the stock processors"
    got = f"context parallelism{degrees}{anything}"
    fail(op, "_parallel_config", expected, got, hint, NotImplementedError)
