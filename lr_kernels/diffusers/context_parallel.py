"""Context parallelism of the attention backend: diffusers' templates exchange tokens between the cards, and each card
attends to what it then holds.

Under Ulysses a card has all tokens and some of the heads. Under ring attention it has its own queries and, one after
the other, every card's keys, whose results are merged by their lse. Unified is one inside the other.
"""

from typing import Any, NoReturn

import torch
from diffusers.models.attention_dispatch import (
    SeqAllToAllDim,
    TemplatedRingAttention,
    _templated_context_parallel_attention,
)
from torch import Tensor, distributed

from ..interop import attention_call
from ..runtime import modes
from ..runtime.checks import fail


def context_parallel_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    return_lse: bool,
    parallel_config: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` for tokens that are spread over several cards: query (B, N, H, D), key and value (B, M, H, D) of this
    card's tokens -> (B, N, H, D), and the lse (B, N, H) in fp32. `op` is the name in errors.

    Args:
        mask: under Ulysses as in `attend`, for this card's keys or for those of all cards.
        parallel_config: diffusers' ParallelConfig, after its `setup`.

    Raises:
        NotImplementedError: a mask under ring attention, a mask that requires a gradient; heads that the cards do not
            divide, or that key and value lack; under Ulysses gradients of queries and keys of different numbers; a
            gradient of the lse, gradients of gradients.
        TypeError: another parallel_config.
    """
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        got = type(parallel_config).__name__
        fail(op, "_parallel_config", "a ParallelConfig with a context_parallel_config", got, error=TypeError)
    if torch.is_autocast_enabled(query.device.type):  # before the exchange, and alike in the backward pass
        query, key, value = (modes.autocast(x) for x in (query, key, value))
    _check_tokens(op, query, key, value, config)
    if mask is not None:
        mask = _checked_mask(op, mask, config)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if gradients and config.ring_degree > 1 and not config.ring_anything:
        found = _ring_with_gradients(query, key, value, scale, return_lse, parallel_config)
    else:
        found = _templated_context_parallel_attention(
            query, key, value, mask, 0.0, False, scale, False, return_lse,
            forward_op=_forward, backward_op=_backward, _parallel_config=parallel_config,
        )  # fmt: skip
    if not return_lse:
        return found
    out, lse = found
    if lse.requires_grad:  # the templates drop its gradient
        lse.register_hook(lambda x: None if x is None else _refuse(op, "return_lse", "no gradient of the lse", "one"))
    return out, lse.float()


def _check_tokens(op: str, query: Tensor, key: Tensor, value: Tensor, config: Any) -> None:
    if query.dim() != 4:
        fail(op, "query", "4 dimensions", query.dim())
    rows, tokens, heads, dim = query.shape
    for name, x in (("key", key), ("value", value)):
        if x.dim() != 4 or x.shape[0] != rows or x.shape[2:] != query.shape[2:]:
            expected = f"shape ({rows}, M, {heads}, {dim}) under context parallelism"
            _refuse(op, name, expected, tuple(x.shape), "repeat the heads or rows that it lacks")
    degree = config.ulysses_degree
    share = -(-heads // degree)  # "anything" fills the last card's heads up, and leaves it at least one
    if share * degree != heads and not (config.ulysses_anything and share * degree - heads < share):
        _refuse(op, "query", f"heads that ulysses_degree={degree} divides", heads, "choose a smaller ulysses_degree")
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if gradients and degree > 1 and key.shape[1] != tokens:
        expected = f"{tokens} tokens, as query has, for gradients under Ulysses"
        _refuse(op, "key", expected, key.shape[1], "use ring_degree")


def _checked_mask(op: str, mask: Tensor, config: Any) -> Tensor:
    """The mask as the templates can gather it: written out, but for heads and queries that share its numbers."""
    if config.ring_degree > 1:
        hint = "each step of the ring has other keys; ulysses_degree alone serves masks"
        _refuse(op, "attn_mask", "None under ring attention", tuple(mask.shape), hint)
    if mask.requires_grad and torch.is_grad_enabled():
        _refuse(op, "attn_mask", "no gradient under context parallelism", "one that is required")
    for dim in range(mask.dim() - 1):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask.contiguous()


def _forward(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What the templates call with the tokens and heads that attend to each other on this card."""
    if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] > 1:
        config = _parallel_config.context_parallel_config
        share = -(-attn_mask.shape[1] // config.ulysses_degree)
        attn_mask = attn_mask[:, config._ulysses_local_rank * share :][:, :share]
    if _save_ctx:
        ctx.save_for_backward(query, key, value, attn_mask)
        ctx.scale = scale
    call = attention_call("attention_backend", query, key, value, attn_mask, scale)
    return call.attend_with_lse() if return_lse else call.attend()


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key and value under Ulysses. The result is computed again: what is kept for that goes through
    `save_for_backward`, so that gradient checkpointing frees it."""
    _refuse_second_gradients()
    *given, mask = ctx.saved_tensors
    query, key, value = (x.detach().requires_grad_() for x in given)
    with torch.enable_grad():
        out = attention_call("attention_backend", query, key, value, mask, ctx.scale).attend()
    return torch.autograd.grad(out, (query, key, value), grad_out)


def _ring_with_gradients(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, return_lse: bool, parallel_config: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """What diffusers' templates of ring and unified attention compute, with the gradients of `_Ring`."""
    config = parallel_config.context_parallel_config
    if config.ulysses_degree == 1:
        out, lse = _Ring.apply(query, key, value, scale, parallel_config)
        return (out, lse) if return_lse else out
    group = config._ulysses_mesh.get_group()
    query, key, value = (SeqAllToAllDim.apply(group, x, 2, 1) for x in (query, key, value))
    out, lse = _Ring.apply(query, key, value, scale, parallel_config)
    out = SeqAllToAllDim.apply(group, out, 1, 2)
    return (out, SeqAllToAllDim.apply(group, lse[..., None], 1, 2)[..., 0]) if return_lse else out


class _Ring(torch.autograd.Function):
    """diffusers' ring attention with a backward pass of its own. (That of diffusers 0.42.1 gives the gradients of keys
    and values to other cards than those that hold them, where the ring has more than two.)"""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, parallel_config: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = TemplatedRingAttention.apply(
            query, key, value, None, 0.0, False, scale, False, True, _forward, _backward, parallel_config
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.config = scale, parallel_config.context_parallel_config
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Each card computes the gradients of its queries with every card's keys, and sends those of the keys home."""
        _refuse_second_gradients()
        query, key, value, out, lse = ctx.saved_tensors
        group, cards = ctx.config._ring_mesh.get_group(), ctx.config.ring_degree
        of_cards = key.new_empty(2 * cards, *key.shape)
        distributed.all_gather_into_tensor(of_cards, torch.stack([key, value]), group=group)
        grad_query = torch.zeros_like(query, dtype=torch.float32)
        sent = torch.empty_like(of_cards, dtype=torch.float32).unflatten(0, (cards, 2))
        for card, (key, value) in enumerate(of_cards.unflatten(0, (cards, 2))):
            of_query, of_key, of_value = _of_step(query, key, value, out, lse, grad_out, ctx.scale)
            grad_query += of_query
            sent[card, 0], sent[card, 1] = of_key, of_value
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=group)
        grad_key, grad_value = received.sum(0)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _of_step(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    """The part of grad_query, grad_key and grad_value of a step of the ring with these keys.

    A step with the results o and l has the share p = exp(l - lse) of the merged results out and lse, so that

        grad_o = p · grad_out        grad_l = p · ⟨grad_out, o - out⟩
    """
    query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
    with torch.enable_grad():
        part, part_lse = attention_call("attention_backend", query, key, value, None, scale).attend_with_lse()
    share = (part_lse.detach() - lse).exp()[..., None]
    grad_part = (share * grad_out).to(part.dtype)
    grad_lse = (share * grad_out * (part.detach() - out)).sum(-1).to(part_lse.dtype)
    return torch.autograd.grad((part, part_lse), (query, key, value), (grad_part, grad_lse))


def _refuse_second_gradients() -> None:
    if torch.is_grad_enabled():
        _refuse("attention_backend", "_parallel_config", "no gradients of gradients", "create_graph=True")


def _refuse(op: str, argument: str, expected: str, got: object, hint: str = "") -> NoReturn:
    fail(op, argument, expected, got, hint, NotImplementedError)
