"""lr_kernels as an attention backend of diffusers, for every model that dispatches: Flux, Wan, Qwen-Image, LTX and
others."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence

from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from torch import Tensor, nn

from ..interop import attention_call, causal_order, check_dimensions, check_mask_type, refuse_unless_off
from ..runtime.checks import fail
from .context_parallel import context_parallel_attention
from .processors.install import check_model, install_processors
from .processors.joint import CustomSD3AttnProcessor, joint_attention, joint_processors

NAME = "lr_kernels"


def register_attention_backend() -> None:
    """Make `model.set_attention_backend("lr_kernels")` and `with attention_backend("lr_kernels")` work.

    Importing this package does not; calling it again changes nothing. diffusers knows a closed list of backends: a
    member is added to it. UNet2DConditionModel, SD3 and PixArt do not dispatch: SD3 takes `use_attention_backend`, the
    others processors.
    """
    if NAME in {member.value for member in AttentionBackendName}:
        return
    member = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    AttentionBackendName._member_names_.append(member._name_)
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[NAME] = member
    type.__setattr__(AttentionBackendName, member._name_, member)
    checks = [attention_dispatch._check_device, attention_dispatch._check_shape]
    _AttentionBackendRegistry.register(member, constraints=checks, supports_context_parallel=True)(attention)
    _AttentionBackendRegistry._supported_arg_names[member] = _AnyName(inspect.signature(attention).parameters)


class _AnyName(frozenset):
    """A signature that accepts every keyword. diffusers drops keywords that a backend's signature does not name; so it
    hands over all of them, and this backend refuses those that it lacks."""

    def __contains__(self, name: object) -> bool:
        return True


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: object = None,
    **attention_kwargs: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """What diffusers calls: query (B, N, H, D), key (B, M, H, D), value (B, M, H, E) -> (B, N, H, E), and the lse
    (B, N, H).

    attn_mask, is_causal and enable_gqa are those of `lr_kernels.interop.scaled_dot_product_attention`; a mask (B, M) is
    padding, as in other backends of diffusers.

    Raises:
        NotImplementedError: dropout_p, a mask of another kind, is_causal beside a mask, and every other argument that
            is on, such as window_size and softcap, which other backends take; with `_parallel_config` also is_causal
            and what `context_parallel_attention` names.
    """
    op = "attention_backend"
    refuse_unless_off(op, dropout_p=dropout_p, **attention_kwargs)
    check_dimensions(op, query, key, value, "4 dimensions", (4,))
    check_mask_type(op, "attn_mask", attn_mask)
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    if _parallel_config is not None:
        refuse_unless_off(op, is_causal=is_causal)
        return context_parallel_attention(op, query, key, value, attn_mask, scale, return_lse, _parallel_config)
    order = causal_order(op, is_causal, attn_mask, query.shape[1], query.device)
    call = attention_call(op, query, key, value, attn_mask, scale, enable_gqa, key_range=order)
    return call.attend_with_lse() if return_lse else call.attend()


@contextlib.contextmanager
def use_attention_backend(model: nn.Module) -> Iterator[nn.Module]:
    """lr_kernels in this model alone, for the duration of a `with` block; everything is as before after it, also
    after an exception. `model.set_attention_backend` changes the default of all other models as well.

    Layers that dispatch their attention take the backend. SD3's do not: they have `CustomSD3AttnProcessor` meanwhile.

    Raises:
        ValueError: a model none of whose attention layers is of these kinds; the message says what serves it.
        NotImplementedError: a layer of SD3 whose processor is an IP-Adapter's or one of fused projections.
        TypeError: no model.
    """
    check_model("use_attention_backend", "model", model)
    register_attention_backend()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, (Attention, AttentionModuleMixin))
    }
    dispatching = [layer.processor for layer in layers.values() if hasattr(layer.processor, "_attention_backend")]
    sd3 = {name: layer for name, layer in layers.items() if isinstance(layer.processor, _SD3)}
    if not dispatching and not sd3:
        got = f"{type(model).__name__}, which has none"
        hint = _what_serves([layer.processor for layer in layers.values()])
        fail("use_attention_backend", "model", "attention layers that dispatch, or SD3's", got, hint)
    before = [vars(p).get("_attention_backend", _MISSING) for p in dispatching]
    others = {name: layer for name, layer in sd3.items() if not _is_ours(layer)}
    ours = joint_processors(others, joint_attention)
    with install_processors(others, ours) if others else contextlib.nullcontext():
        try:
            for p in dispatching:
                p._attention_backend = AttentionBackendName(NAME)
            yield model
        finally:
            for p, backend in zip(dispatching, before):
                if backend is _MISSING:
                    vars(p).pop("_attention_backend", None)
                else:
                    p._attention_backend = backend


_SD3 = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0)


def _is_ours(layer: nn.Module) -> bool:
    """Whether an installed processor computes the layer's attention with lr_kernels already."""
    return isinstance(layer.processor, CustomSD3AttnProcessor) and layer.processor.attention is not None


def _what_serves(processors: Sequence[object]) -> str:
    """Which processors of this package serve a model that does not dispatch its attention."""
    if any(isinstance(p, AttnProcessor | AttnProcessor2_0) for p in processors):
        return (
            "UNets take lr_kernels.diffusers.install_processors, and so do models with plain attention (PixArt): "
            "attention_layers(model, 'self') with CustomAttnProcessor"
        )
    kinds = ", ".join(sorted({type(p).__name__ for p in processors})) or "it has no attention of diffusers"
    return f"this package has no processor in place of its own: {kinds}"


_MISSING = object()
