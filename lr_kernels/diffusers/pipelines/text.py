"""Embedding texts with the text encoders of one of the models."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_peft_available
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


class TextReader(NamedTuple):
    """A text encoder of one of the models, and the tokenizer that it shares with the other model's."""

    name: str
    """the name of the encoder among the components"""
    tokenizer: PreTrainedTokenizerBase
    encoder: PreTrainedModel


class Embeds(NamedTuple):
    """Embeddings of B prompts."""

    tokens: Tensor
    """(B, L, C), hidden states of the tokens"""
    pooled: Tensor | None = None
    """(B, P), pooled embeddings, which SDXL has"""

    @staticmethod
    def join(parts: Sequence["Embeds"]) -> "Embeds":
        """One `Embeds` with the rows of all parts."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Embeds(torch.cat([part.tokens for part in parts]), torch.cat(pooled) if pooled else None)


def tokenized(pipe: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> BatchEncoding:
    """As the stock pipelines tokenize prompts: padded or cut to the tokenizer's length."""
    texts = pipe.maybe_convert_prompt(list(texts), tokenizer)
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def hidden_states(
    pipe: DiffusionPipeline, reader: TextReader, texts: Sequence[str], last: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor]:
    """(what `last` takes of the encoder's output, the output's first entry), with the call's strength of adapters."""
    _, tokenizer, encoder = reader
    inputs = tokenized(pipe, tokenizer, texts)
    uses_mask = getattr(encoder.config, "use_attention_mask", False)
    device = pipe._execution_device
    mask = inputs.attention_mask.to(device) if uses_mask else None
    with _adapters_at(encoder, pipe.adapter_scale):
        out = encoder(inputs.input_ids.to(device), attention_mask=mask, output_hidden_states=True)
    return last(out), out[0]


@contextmanager
def _adapters_at(encoder: nn.Module, scale: float | None) -> Iterator[None]:
    """While it lasts the encoder's adapters have this strength."""
    if scale is None or not is_peft_available():
        yield
        return
    scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(encoder, scale)
