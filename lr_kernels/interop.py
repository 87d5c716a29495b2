"""Attention under the signatures that other libraries call: PyTorch's, xformers', transformers' and diffusers'.

One source of keys, masks that hide keys from all queries alike (padding). What the operator cannot express is refused
by name, never dropped: causal and per-pair masks, dropout.
"""

from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor, nn

from .attention import multi_source_attention
from .checks import fail, one_of
from .plan import plan_attention
from .source import Source


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, of 3 or 4 dimensions.

    Args:
        query: (B, H, N, D) or (B, N, D). key, value: (B, H, M, D) or (B, M, D).
        attn_mask: bool (True: takes part) or float (added), broadcastable to (B, H, N, M), the same for all heads and
            queries: of size 1 or expanded in these dimensions. Copies are compared, which synchronizes with a GPU;
            under torch.compile and while a CUDA graph is captured the device compares them, and stops at a difference.
        enable_gqa: key and value have fewer heads, each for several of the query's: they are repeated, which copies.

    Returns:
        like query. A query that sees no key gets 0.

    Raises:
        NotImplementedError: is_causal, dropout_p, a mask that differs between heads or queries, copies that require
            gradients.
    """
    op = "scaled_dot_product_attention"
    if query.dim() == 3:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        mask = attn_mask if attn_mask is None or attn_mask.dim() < 3 else attn_mask.unsqueeze(1)
        return scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa).squeeze(1)
    if query.dim() != 4:
        fail(op, "query", "3 or 4 dimensions", query.dim())
    _refuse(op, dropout_p=dropout_p, is_causal=is_causal)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend(op, query, key, value, attn_mask, scale, enable_gqa).transpose(1, 2)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`xformers.ops.memory_efficient_attention`, of 3 or 4 dimensions.

    Args:
        query: (B, N, H, D) or (B, N, D). key, value: (B, M, H, D) or (B, M, D).
        attn_bias: float, added, broadcastable to (B, H, N, M), the same for all heads and queries.

    Raises:
        NotImplementedError: p (dropout), an AttentionBias object, a bias that differs between heads or queries, op,
            grouped heads (5 dimensions), output_dtype other than the query's.
    """
    name = "memory_efficient_attention"
    _refuse(name, p=p, op=op)
    if output_dtype not in (None, query.dtype):
        _not_implemented(name, "output_dtype", f"None or {query.dtype}", output_dtype)
    if attn_bias is not None and not isinstance(attn_bias, Tensor):
        _not_implemented(name, "attn_bias", "a tensor or None", type(attn_bias).__name__)
    if query.dim() == 5:
        _not_implemented(name, "query", "3 or 4 dimensions", "5 (grouped heads)")
    if query.dim() == 3:
        return attend(name, *(x.unsqueeze(2) for x in (query, key, value)), attn_bias, scale).squeeze(2)
    return attend(name, query, key, value, attn_bias, scale)


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """An attention function for `transformers.AttentionInterface`; `register_with_transformers` installs it.

    query (B, H, N, D), key and value (B, H or fewer, M, D) -> ((B, N, H, D), None: no weights). One query may see all
    keys whatever is_causal says, as in decoding.
    """
    name = "transformers_attention"
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    _refuse(name, dropout=dropout, is_causal=bool(causal) and query.shape[2] > 1 and attention_mask is None)
    for argument in ("softcap", "sliding_window", "position_bias"):
        _refuse(name, **{argument: kwargs.get(argument)})
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend(name, query, key, value, attention_mask, scaling, gqa=True), None


def register_with_transformers(name: str = "lr_kernels") -> None:
    """Make `model.set_attn_implementation(name)` and `attn_implementation=name` work. Calling it again changes
    nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, transformers_attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`multi_source_attention` of one source: (B, N, H, D), (B, M, H, D) x 2 and a mask as in
    `scaled_dot_product_attention`; `op` is the name in errors."""
    heads, key_heads = query.shape[2], key.shape[2]
    if heads != key_heads:
        if not gqa or key_heads == 0 or heads % key_heads:
            fail(op, "key", f"{heads} heads" + (" or a divisor of it" if gqa else ""), key_heads)
        key, value = (x.repeat_interleave(heads // key_heads, 2) for x in (key, value))
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    source, plan = Source(key, value), None
    if mask is not None:
        per_key = _per_key(op, mask, (query.shape[0], heads, query.shape[1], key.shape[1]))
        if per_key.dtype == torch.bool:
            source = source._replace(key_mask=per_key)
            plan = plan_attention([per_key])
        elif per_key.is_floating_point():
            source = source._replace(key_bias=per_key.float())
        else:
            fail(op, "attn_mask", "bool or a floating dtype", per_key.dtype, error=TypeError)
    return multi_source_attention(query, [source], scale=scale, plan=plan, return_lse=return_lse)


def _per_key(op: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B or 1, M) of a mask that is broadcastable to `shape`, (B, H, N, M), and the same for all heads and queries."""
    if not 1 <= mask.dim() <= 4:
        fail(op, "attn_mask", "1 to 4 dimensions", mask.dim())
    mask = mask[(None,) * (4 - mask.dim())]
    if not all(one_of(n, 1, wanted) for n, wanted in zip(mask.shape, shape)):
        fail(op, "attn_mask", f"a shape that broadcasts to {shape}", tuple(mask.shape))
    if 0 in mask.shape[1:3]:  # no query that could see it
        mask = mask.new_ones(1, 1, 1, 1)
    for dim, what in ((1, "head"), (2, "query")):
        first = mask.narrow(dim, 0, 1)
        if mask.shape[dim] != 1 and mask.stride(dim) != 0:
            if mask.requires_grad and torch.is_grad_enabled():  # each copy has a gradient of its own
                _not_implemented(op, "attn_mask", f"the same for every {what}", "copies that require gradients")
            same = (mask == first).all()
            if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
                torch._assert_async(same, f"lr_kernels.{op}: attn_mask: expected the same for every {what}")
            elif not same:
                _not_implemented(op, "attn_mask", f"the same for every {what}", f"different ones, {tuple(mask.shape)}")
        mask = first
    return mask[:, 0, 0].expand(mask.shape[0], shape[3])


def _refuse(op: str, /, **arguments: object) -> None:
    """Refuse every argument that is not off: None, False or 0."""
    for name, x in arguments.items():
        if x is not None and x is not False and not (isinstance(x, Real) and x == 0):
            _not_implemented(op, name, "none", x)


def _not_implemented(op: str, argument: str, expected: str, got: object) -> NoReturn:
    fail(op, argument, expected, got, "the operator has no such thing; use PyTorch's attention", NotImplementedError)
