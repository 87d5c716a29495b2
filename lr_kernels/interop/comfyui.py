"""ComfyUI's attention, in the form that a model's `transformer_options["optimized_attention_override"]` has."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..runtime.checks import check_integer, fail
from ..runtime.tensors import check_dense
from .one_source import attention_call, refuse_unless_off

_OP = "comfyui_attention"
_CHANGE_NOTHING = frozenset(("transformer_options", "_inside_attn_wrapper", "low_precision_attention"))
"""transformer_options: what called this; low_precision_attention: it only allows other numbers."""


def comfyui_attention(
    original: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    **kwargs: object,
) -> Tensor:
    """What ComfyUI calls in place of its own attention for a model whose options hold it:

        model.model_options["transformer_options"]["optimized_attention_override"] = comfyui_attention

    Args:
        original: ComfyUI's own function, which is not called.
        q, k, v: (B, N, H · D) and (B, M, H · D) twice; with skip_reshape (B, H, N, D) and (B, H, M, D) twice.
        heads: H, of the query.
        mask: bool (True: takes part) or float (added), (N or 1, M), (B, N or 1, M) or (B, H or 1, N or 1, M), as
            attn_mask of `scaled_dot_product_attention`.
        attn_precision: the precision asked for; scores and sums are in fp32 always, so that any of it is met.
        skip_output_reshape: return (B, H, N, D) and not (B, N, H · D).
        scale: default D ** -0.5. enable_gqa: k and v may have fewer heads.

    Raises:
        ValueError: shapes that do not fit. NotImplementedError: a mask of another kind, an argument that is not known.
    """
    refuse_unless_off(_OP, **{name: x for name, x in kwargs.items() if name not in _CHANGE_NOTHING})
    heads = check_integer(_OP, "heads", heads, 1, "a number of heads from 1 on")
    dimensions = 4 if skip_reshape else 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dense(_OP, name, x)
        if x.dim() != dimensions:
            fail(_OP, name, f"{dimensions} dimensions", x.dim(), "skip_reshape says which form these have")
    if skip_reshape:
        if q.shape[1] != heads:
            fail(_OP, "heads", f"{q.shape[1]}, as q has", heads)
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    else:
        if q.shape[2] % heads:
            fail(_OP, "q", f"a multiple of {heads} channels", q.shape[2])
        query = q.unflatten(2, (heads, -1))
        head_dim = query.shape[3]
        if head_dim == 0 or k.shape[2] % head_dim or (not enable_gqa and k.shape[2] != q.shape[2]):
            fail(_OP, "k", f"{q.shape[2]} channels" + (" or a part of it, in heads" if enable_gqa else ""), k.shape[2])
        key_heads = k.shape[2] // head_dim
        if key_heads == 0 or v.shape[2] % key_heads:
            fail(_OP, "v", f"a multiple of {key_heads} channels", v.shape[2])
        key, value = (x.unflatten(2, (key_heads, -1)) for x in (k, v))
    if mask is not None:
        check_dense(_OP, "mask", mask)
        if mask.dim() == 3:
            mask = mask.unsqueeze(1)
    out = attention_call(_OP, query, key, value, mask, scale, enable_gqa, "mask").attend()
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)
