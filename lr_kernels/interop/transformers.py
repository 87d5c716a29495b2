"""An attention function for transformers."""

from torch import Tensor, nn

from ..runtime.checks import check_integer, fail
from ..runtime.extras import require
from ..runtime.tensors import check_dense
from ..source import Source
from .one_source import attention_call, causal_range, check_dimensions, check_mask_type, refuse_unless_off


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """An attention function for `transformers.AttentionInterface`; `register_with_transformers` installs it.

    query (B, H, N, D), key (B, H or fewer, M, D), value (B, H or fewer, M, E) -> ((B, N, H, E), None: no weights).
    Arguments that concern other parts of the model (position_ids, use_cache and the like) are ignored.

    Args:
        attention_mask: as attn_mask of `scaled_dot_product_attention`.
        is_causal: default: the module's own is_causal. Without a mask query i sees keys 0 … i, and one query alone all
            keys, as in decoding; a mask holds the order itself.
        s_aux: (H,) attention sinks, a logit of one more key for each head, whose value is 0.
        sliding_window: in causal order without a mask, how many keys a query sees at most, the last ones.

    Raises:
        NotImplementedError: dropout, a mask of another kind, and every other argument that is on: softcap,
            position_bias, packed sequences (cu_seq_lens_q), output_attentions.
        ValueError: s_aux that is not (H,).
    """
    name = "transformers_attention"
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    refuse_unless_off(name, **{argument: x for argument, x in kwargs.items() if argument not in _CHANGE_NOTHING})
    check_mask_type(name, "attention_mask", attention_mask)
    check_dimensions(name, query, key, value, "4 dimensions", (4,))
    refuse_unless_off(name, dropout=dropout)
    queries = query.shape[2]
    order = window = None
    if sliding_window is not None:
        window = check_integer(name, "sliding_window", sliding_window, 1, "a number of keys from 1 on")
    if causal and attention_mask is None and (queries > 1 or window is not None):
        offset = key.shape[2] - 1 if queries == 1 else 0
        order = causal_range(queries, query.device, offset, window)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    sinks = () if s_aux is None else (_sink(name, s_aux, query, value),)
    call = attention_call(name, query, key, value, attention_mask, scaling, True, "attention_mask", order, sinks)
    return call.attend(), None


def _sink(op: str, s_aux: Tensor, query: Tensor, value: Tensor) -> Source:
    """A source of one key whose logit is that of each head's sink."""
    batch, _, heads, head_dim = query.shape
    check_dense(op, "s_aux", s_aux)
    if s_aux.shape != (heads,) or not s_aux.is_floating_point():
        fail(op, "s_aux", f"a floating dtype and shape ({heads},)", f"{s_aux.dtype} and {tuple(s_aux.shape)}")
    key = query.new_zeros(1, 1, 1, head_dim)
    logits = s_aux.float().expand(batch, heads)
    return Source(key, key.new_zeros(1, 1, 1, value.shape[3]), logit_bias=logits)


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
