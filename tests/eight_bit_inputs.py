"""Sources in 8 bits, and the plain ones that they stand for."""

import torch

from lr_kernels import Source, quantize
from lr_kernels.testing import AttentionCase, AttentionInputs, attention_inputs


def in_8_bits(source: Source, dtype: torch.dtype) -> Source:
    (key, key_scale), (value, value_scale) = quantize(source.key, dtype), quantize(source.value, dtype)
    return source._replace(key=key, value=value, key_scale=key_scale, value_scale=value_scale)


def as_numbers(source: Source, dtype: torch.dtype) -> Source:
    """The plain source that an 8-bit one stands for."""
    if source.key_scale is None:
        return source
    key = (source.key.float() * source.key_scale[..., None]).to(dtype)
    value = (source.value.float() * source.value_scale[..., None]).to(dtype)
    return source._replace(key=key, value=value, key_scale=None, value_scale=None)


def problem(case: AttentionCase, dtype: torch.dtype, *kinds: torch.dtype | None, seed: int = 0) -> AttentionInputs:
    """The inputs of a case, its sources in 8 bits of these kinds, again and again in this order; None: plain."""
    return of_kinds(attention_inputs(case, dtype, seed), *kinds)


def of_kinds(inputs: AttentionInputs, *kinds: torch.dtype | None) -> AttentionInputs:
    """The inputs with sources in 8 bits of these kinds, again and again in this order; None: as they are."""
    pairs = [(s, kinds[i % len(kinds)]) for i, s in enumerate(inputs.sources)]
    sources = [s if kind is None else in_8_bits(s, kind) for s, kind in pairs]
    return AttentionInputs(inputs.query, sources, inputs.query_groups)
