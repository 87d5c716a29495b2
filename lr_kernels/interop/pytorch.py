"""PyTorch's `scaled_dot_product_attention`."""

from torch import Tensor

from .one_source import (
    attention_call,
    causal_order,
    check_dimensions,
    check_mask_type,
    refuse_unless_off,
)


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
        attn_mask: bool (True: takes part) or float (added), broadcastable to (B, H, N, M). Of size 1 or expanded over
            heads and queries it is taken as it is. Otherwise it is looked into, once as long as it does not change,
            which synchronizes with a GPU: it must be the same for all heads, and for the queries of a batch row hold
            an interval of keys each (causal order, windows, packed sequences) beside keys that none sees, or at most 8
            different rows; numbers are one for each key. Under torch.compile, while a CUDA graph is captured and where
            it requires a gradient it must be the same for all queries, which an assertion on the device checks.
        is_causal: query i sees keys 0 … i; without attn_mask.
        enable_gqa: key and value may have fewer heads, each for several of the query's. None is copied.

    Returns:
        like query, of value's head_dim. A query that sees no key gets 0.

    Raises:
        ValueError: other numbers of dimensions, shapes and devices that do not fit.
        TypeError: a mask that is neither bool nor floating.
        NotImplementedError: dropout_p, a mask of another kind, is_causal beside attn_mask.
    """
    op = "scaled_dot_product_attention"
    check_mask_type(op, "attn_mask", attn_mask)
    check_dimensions(op, query, key, value, "2, 3 or 4 dimensions", (2, 3, 4))
    refuse_unless_off(op, dropout_p=dropout_p)
    if enable_gqa and query.dim() == 3:  # PyTorch counts the first of three dimensions as heads here
        query, key, value = (x[None] for x in (query, key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale, True)[0]
    if query.dim() < 4:
        heads = query.dim() - 2  # where the dimension of heads goes
        query, key, value = (x.unsqueeze(heads) for x in (query, key, value))
        if attn_mask is not None and attn_mask.dim() > 2:
            attn_mask = attn_mask.unsqueeze(heads)
        out = scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
        return out.squeeze(heads)
    order = causal_order(op, is_causal, attn_mask, query.shape[2], query.device)
    query, key, value = (x.transpose(1, 2) for x in _broadcast(query, key, value, attn_mask, enable_gqa))
    call = attention_call(op, query, key, value, attn_mask, scale, enable_gqa, key_range=order)
    return call.attend().transpose(1, 2)


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
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
    if not gqa or key.shape[1] != value.shape[1]:
        key, value = (x.expand(-1, heads, -1, -1) if x.shape[1] == 1 != heads else x for x in (key, value))
    return query, key, value
