"""Layers for `kernelize`. It copies a forward onto the module that it replaces: so nothing but forward, and `self` is
that module."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .interop import attention_call, refuse_unless_off, scaled_dot_product_attention
from .runtime.checks import fail


class Attention(nn.Module):
    """query (B, N, H, D), key and value (B, M, H, D) -> (B, N, H, D)."""

    has_backward = True
    can_torch_compile = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_call("Attention", query, key, value).attend()


class ScaledDotProductAttention(nn.Module):
    """`torch.nn.functional.scaled_dot_product_attention`, see `lr_kernels.interop`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention`, batched, without weights: -> (out, None).

    Raises:
        ValueError: inputs that are not batched, a key_padding_mask that is not (B, M).
        NotImplementedError: need_weights, attn_mask, is_causal; a module with bias_k, bias_v or add_zero_attn, or
            that is training with dropout.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        op = "MultiheadAttention"
        refuse_unless_off(op, need_weights=need_weights, attn_mask=attn_mask, is_causal=is_causal)
        refuse_unless_off(op, bias_k=self.bias_k, bias_v=self.bias_v, add_zero_attn=self.add_zero_attn)
        refuse_unless_off(op, dropout=self.dropout if self.training else 0.0)
        if query.dim() != 3:
            fail(op, "query", "3 dimensions", query.dim())
        if key_padding_mask is not None:
            batch, tokens = (key.shape[0], key.shape[1]) if self.batch_first else (key.shape[1], key.shape[0])
            if key_padding_mask.shape != (batch, tokens):
                fail(op, "key_padding_mask", f"the shape {(batch, tokens)}", tuple(key_padding_mask.shape))
            taken = key_padding_mask.logical_not() if key_padding_mask.dtype == torch.bool else key_padding_mask
            key_padding_mask = taken[:, None, None]
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        heads = []
        for x, weight, bias in zip((query, key, value), weights, biases):
            projected = F.linear(x if self.batch_first else x.transpose(0, 1), weight, bias)
            heads.append(projected.unflatten(-1, (self.num_heads, self.head_dim)))
        out = self.out_proj(attention_call(op, *heads, key_padding_mask).attend().flatten(2))
        return out if self.batch_first else out.transpose(0, 1), None
