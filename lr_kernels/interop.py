"""Attention under the signatures that other libraries call: PyTorch's, xformers', transformers' and diffusers'.

These functions compute attention over one source of keys, with masks that hide keys from all queries alike (padding).
What the operator cannot express is refused by name and never dropped: causal and per-pair masks, dropout, and every
argument that is not known here."""

from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention.api import multi_source_attention
from .attention.plan import plan_attention
from .runtime.checks import fail, one_of
from .runtime.extras import require
from .runtime.tensors import check_dense, within_float32
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
    """`torch.nn.functional.scaled_dot_product_attention` for tensors of 2 to 4 dimensions.

    Args:
        query: (B, H, N, D), (B, N, D) or (N, D). key: (B, H, M, D), (B, M, D) or (M, D). value: like key; its head_dim
            may differ.
        attn_mask: bool (True: takes part) or float (added), broadcastable to (B, H, N, M), the same for all heads and
            queries: of size 1 or expanded in these dimensions. A mask that holds numbers of its own for each head or
            query is compared with its first ones, which synchronizes with a GPU; under torch.compile and while a CUDA
            graph is captured the device compares them, and a difference fails an assertion there.
        enable_gqa: key and value have fewer heads, each for several of the query's: they are repeated, which copies.

    Returns:
        like query, of value's head_dim. A query that sees no key gets 0.

    Raises:
        ValueError: other numbers of dimensions, shapes that do not fit.
        TypeError: a mask that is neither bool nor floating.
        NotImplementedError: is_causal with more than one query or key, dropout_p, a mask that differs between heads or
            queries, or that holds numbers for each of them and requires a gradient.
    """
    op = "scaled_dot_product_attention"
    _check_mask_type(op, "attn_mask", attn_mask)
    _check_dimensions(op, query, key, value, "2, 3 or 4 dimensions", (2, 3, 4))
    refuse_unless_off(op, dropout_p=dropout_p, is_causal=is_causal and not query.shape[-2] == key.shape[-2] == 1)
    if enable_gqa and query.dim() == 3:  # PyTorch counts the first of three dimensions as heads here
        query, key, value = (x[None] for x in (query, key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask, 0.0, False, scale, True)[0]
    if query.dim() < 4:
        heads = query.dim() - 2  # where the dimension of heads goes
        query, key, value = (x.unsqueeze(heads) for x in (query, key, value))
        if attn_mask is not None and attn_mask.dim() > 2:
            attn_mask = attn_mask.unsqueeze(heads)
        out = scaled_dot_product_attention(query, key, value, attn_mask, 0.0, False, scale, enable_gqa)
        return out.squeeze(heads)
    query, key, value = (x.transpose(1, 2) for x in _broadcast(query, key, value, attn_mask))
    return attend(op, query, key, value, attn_mask, scale, enable_gqa).transpose(1, 2)


def _broadcast(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Expand batches of 1, and heads of 1 in key and value, to those of the other tensors, as PyTorch does.

    Where only the query has several rows nothing is expanded: the operator reads the one row of the others for each."""
    sizes = [x.shape[0] for x in (query, key, value)]
    rows_of_mask = mask.shape[0] if mask is not None and mask.dim() == 4 else 1
    batch = max(1, *sizes, rows_of_mask) if 0 not in sizes else 0
    if sizes[0] == 1 != batch:
        query = query.expand(batch, -1, -1, -1)
    if max(sizes[1:]) > 1 or rows_of_mask > 1:
        key, value = (x.expand(batch, -1, -1, -1) if x.shape[0] == 1 != batch else x for x in (key, value))
    heads = query.shape[1]
    key, value = (x.expand(-1, heads, -1, -1) if x.shape[1] == 1 != heads else x for x in (key, value))
    return query, key, value


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
    """`xformers.ops.memory_efficient_attention` for tensors of 3 to 5 dimensions.

    Args:
        query: (B, N, H, D), (B, N, D), or (B, N, G, H, D) in groups of heads. key: (B, M, H, D), (B, M, D) or
            (B, M, G, H, D), which is copied where it is expanded over the heads. value: like key, of a head_dim of its
            own.
        attn_bias: float (added) or bool (True: takes part), the same for all heads and queries. It broadcasts to
            (B, H, N, M) or, with 5 dimensions, to (B, G, H, N, M). With 3 dimensions it is (B or 1, N, M) or
            (B * H, N, M), where N may be 1.

    Returns:
        like query, of value's head_dim.

    Raises:
        ValueError: other numbers of dimensions, shapes that do not fit.
        NotImplementedError: p (dropout), an AttentionBias object, a bias that differs between heads or queries, op,
            output_dtype other than the query's.
    """
    name = "memory_efficient_attention"
    refuse_unless_off(name, p=p, op=op)
    check_dense(name, "query", query)
    if output_dtype not in (None, query.dtype):
        _not_implemented(name, "output_dtype", f"None or {query.dtype}", output_dtype)
    if attn_bias is not None and not isinstance(attn_bias, Tensor):
        _not_implemented(name, "attn_bias", "a tensor or None", type(attn_bias).__name__)
    _check_dimensions(name, query, key, value, "3, 4 or 5 dimensions", (3, 4, 5))
    batch, groups = query.shape[0], query.shape[2:-1]  # (), (H,) or (G, H)
    query, key, value = (x.unsqueeze(2) if x.dim() == 3 else x.flatten(2, -2) for x in (query, key, value))
    heads = query.shape[2]
    if attn_bias is not None:
        if attn_bias.dim() == 5:
            if len(groups) != 2 or not all(map(one_of, attn_bias.shape[1:3], (1, 1), groups)):
                expected = f"at most 4 dimensions, or (B, {', '.join(map(str, groups))}, N, M) in groups of heads"
                fail(name, "attn_bias", expected, tuple(attn_bias.shape))
            attn_bias = attn_bias.expand(-1, *groups, -1, -1).flatten(1, 2)
        elif attn_bias.dim() == 3 and attn_bias.shape[0] == batch * heads:
            attn_bias = attn_bias.unflatten(0, (batch, heads))
        elif attn_bias.dim() == 3:
            attn_bias = attn_bias.unsqueeze(1)
    out = attend(name, query, key, value, attn_bias, scale, mask_name="attn_bias")
    return out.reshape(*out.shape[:2], *groups, out.shape[3])


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
    keys whatever is_causal says, as in decoding. Arguments that concern other parts of the model (position_ids,
    use_cache and the like) are ignored.

    Raises:
        NotImplementedError: a causal module without a mask, dropout, a mask that differs between heads or queries, and
            every other argument that is on: attention sinks (s_aux), softcap, sliding_window, position_bias, packed
            sequences (cu_seq_lens_q), output_attentions.
    """
    name = "transformers_attention"
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    refuse_unless_off(name, **{argument: x for argument, x in kwargs.items() if argument not in _CHANGE_NOTHING})
    _check_mask_type(name, "attention_mask", attention_mask)
    _check_dimensions(name, query, key, value, "4 dimensions", (4,))
    refuse_unless_off(name, dropout=dropout, is_causal=bool(causal) and query.shape[2] > 1 and attention_mask is None)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend(name, query, key, value, attention_mask, scaling, gqa=True, mask_name="attention_mask"), None


_CHANGE_NOTHING = frozenset(
    "cache_position deterministic num_items_in_batch output_hidden_states output_router_logits position_ids "
    "return_dict use_cache".split()
)
"""What transformers' models hand through to the attention function, though it concerns other parts of the model.
position_ids: the positions are in the queries and keys already; deterministic: this attention always is."""


def register_with_transformers(name: str = "lr_kernels") -> None:
    """Make `model.set_attn_implementation(name)` and `attn_implementation=name` work. Calling it again changes
    nothing."""
    require("diffusers", "transformers")
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
    mask_name: str = "attn_mask",
) -> Tensor:
    """`multi_source_attention` of one source: (B, N, H, D), (B, M, H, D) x 2 and a mask as in
    `scaled_dot_product_attention`; `op` and `mask_name` are the names in errors. Where value has another head_dim than
    key, zeros fill the smaller one up, which copies it, and with key also query."""
    return _of_one_source(op, query, key, value, mask, scale, gqa, mask_name, return_lse=False)[0]


def attend_with_lse(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attend`, and the lse (B, N, H) in fp32."""
    out, lse = _of_one_source(op, query, key, value, mask, scale, gqa, "attn_mask", return_lse=True)
    assert lse is not None
    return out, lse


def _of_one_source(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    gqa: bool,
    mask_name: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    heads, key_heads = query.shape[2], key.shape[2]
    if heads != key_heads:
        if not gqa or key_heads == 0 or heads % key_heads:
            fail(op, "key", f"{heads} heads" + (" or a divisor of it" if gqa else ""), key_heads)
        if value.shape[2] != key_heads:
            fail(op, "value", f"{key_heads} heads, as key has", value.shape[2])
        key, value = (x.repeat_interleave(heads // key_heads, 2) for x in (key, value))
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    columns, value_columns = query.shape[3], value.shape[3]
    if columns == 0:
        fail(op, "query", "head_dim of at least 1", 0)
    if key.shape[3] != columns:
        fail(op, "key", f"head_dim {columns}, as query has", key.shape[3])
    if value_columns < columns:
        value = F.pad(value, (0, columns - value_columns))
    elif value_columns > columns:
        scale = columns**-0.5 if scale is None else scale
        query, key = (F.pad(x, (0, value_columns - columns)) for x in (query, key))
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    source, plan = Source(key, value), None
    if mask is not None:
        per_key = _per_key(op, mask_name, mask, (query.shape[0], heads, query.shape[1], key.shape[1]))
        if per_key.dtype == torch.bool:
            source = source._replace(key_mask=per_key)
            plan = plan_attention([per_key])
        elif per_key.is_floating_point():
            bias = per_key if query.dtype == torch.float64 else within_float32(per_key).float()
            source = source._replace(key_bias=bias)
        else:
            fail(op, mask_name, "bool or a floating dtype", per_key.dtype, error=TypeError)
    found = multi_source_attention(query, [source], scale=scale, plan=plan, return_lse=return_lse)
    out, lse = found if isinstance(found, tuple) else (found, None)
    return out[..., :value_columns] if value_columns < columns else out, lse


def _per_key(op: str, name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B or 1, M) of a mask that is broadcastable to `shape`, (B, H, N, M), and the same for all heads and queries."""
    if not 1 <= mask.dim() <= 4:
        fail(op, name, "1 to 4 dimensions", mask.dim())
    mask = mask[(None,) * (4 - mask.dim())]
    if not all(one_of(n, 1, wanted) for n, wanted in zip(mask.shape, shape)):
        fail(op, name, f"a shape that broadcasts to {shape}", tuple(mask.shape))
    if 0 in mask.shape[1:3]:  # no query could see a difference
        mask = mask.new_ones(1, 1, 1, 1)
    for dim, what in ((1, "head"), (2, "query")):
        first = mask.narrow(dim, 0, 1)
        if mask.shape[dim] != 1 and mask.stride(dim) != 0:
            if mask.requires_grad and torch.is_grad_enabled():  # each copy has a gradient of its own
                _not_implemented(op, name, f"the same for every {what}", "copies that require gradients")
            same = (mask == first).all()
            if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
                torch._assert_async(same, f"lr_kernels.{op}: {name}: expected the same for every {what}")
            elif not same:
                _not_implemented(op, name, f"the same for every {what}", f"different ones, {tuple(mask.shape)}")
        mask = first
    return mask[:, 0, 0].expand(mask.shape[0], shape[3])


def _check_mask_type(op: str, name: str, mask: object) -> None:
    if mask is not None:
        check_dense(op, name, mask)


def _check_dimensions(op: str, query: Tensor, key: Tensor, value: Tensor, expected: str, allowed: tuple) -> None:
    check_dense(op, "query", query)
    if query.dim() not in allowed:
        fail(op, "query", expected, query.dim())
    for name, x in (("key", key), ("value", value)):
        check_dense(op, name, x)
        if x.dim() != query.dim():
            fail(op, name, f"{query.dim()} dimensions, as query has", x.dim())


def refuse_unless_off(op: str, /, **arguments: object) -> None:
    """Refuse every argument except None, False and 0, which mean off."""
    for name, x in arguments.items():
        if x is not None and x is not False and not (isinstance(x, Real) and x == 0):
            _not_implemented(op, name, "none", f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else x)


def _not_implemented(op: str, argument: str, expected: str, got: object) -> NoReturn:
    fail(op, argument, expected, got, "the operator has no such thing; use PyTorch's attention", NotImplementedError)
