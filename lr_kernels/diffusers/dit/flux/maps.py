"""Where the subject is: how much of each image token's joint attention goes to the subject's words, in Flux's double
blocks, which have text and image apart."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....attention.api import multi_source_attention
from ....runtime.checks import fail
from ....source import Source
from ...processors.joint import Tokens
from ...subjects.subject import SubjectTokens, mean_of_layers, stretched
from .settings import OP

DOUBLE_BLOCKS = "transformer_blocks"
"""Beginning of the names of the layers whose maps are taken."""


class WordMaps(NamedTuple):
    """The maps of the subject's words, for the first n rows of a pass.

        map[i] = mean over heads of  Σ_t w_t · exp(q_i · k_t / √D - lse_i)

    The lse is that of the layer's whole softmax, over text and image; so nothing is concatenated or computed twice.
    """

    tokens: SubjectTokens
    """the places of one subject's words in the prompts of these rows"""
    grid: tuple[int, int]
    """rows and columns of the image's tokens"""
    backend: str = "auto"
    """of the layers' attention"""

    def of_layer(self, query: Tensor, text_key: Tensor, lse: Tensor) -> Tensor:
        """The map of a layer, fp32 (n, N).

        Args:
            query: (B, N, H, D) of the image. text_key: (B, T, H, D). lse: (B, N, H), of the image's queries.
        """
        indices, (weights,) = self.tokens
        n = len(indices)
        keys = text_key[:n].gather(1, indices.long()[:, :, None, None].expand(-1, -1, *text_key.shape[2:]))
        logits = torch.einsum("nihd,nthd->niht", query[:n].float(), keys.float()) * query.shape[3] ** -0.5
        probabilities = (logits - lse[:n, :, :, None]).exp().mean(2)
        return (probabilities * weights[:, None]).sum(2)

    def mean(self, layers: Sequence[Tensor]) -> Tensor:
        """The mean over layers of their maps, each stretched to [0, 1]: fp32 (1, n, rows, columns).

        Raises:
            RuntimeError: no layers, as where a cache has skipped them all.
        """
        if not layers:
            hint = "call transformer.disable_cache()"
            fail(OP, "transformer", "layers that compute their attention", "none in this pass", hint, RuntimeError)
        return mean_of_layers(stretched(torch.stack(list(layers)).unflatten(2, self.grid)[:, None]))


def stock_attention(text: Tokens, image: Tokens, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The attention of a stock layer with text and image apart: its results for the text and for the image, and the lse
    of the image's queries, fp32 (B, N, H)."""
    sources = [Source(text.key, text.value), Source(image.key, image.value)]
    query = torch.cat([text.query, image.query], 1)
    out, lse = multi_source_attention(query, sources, return_lse=True, backend=backend)
    start = text.query.shape[1]
    return out[:, :start], out[:, start:], lse[:, start:]
