"""lr_kernels as an attention backend of diffusers, for every model that dispatches: Flux, Wan, Qwen-Image, LTX and
others."""

import contextlib
from collections.abc import Iterator

from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from ..checks import fail
from ..interop import _refuse, attend

NAME = "lr_kernels"


def register_attention_backend() -> None:
    """Make `model.set_attention_backend("lr_kernels")` and `with attention_backend("lr_kernels")` work.

    Importing this package does not; calling it again changes nothing. diffusers knows a closed list of backends: a
    member is added to it. UNet2DConditionModel and SD3 do not dispatch; for them there are processors.
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
    _AttentionBackendRegistry.register(member, constraints=checks)(attention)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """What diffusers calls: query (B, N, H, D), key and value (B, M, H, D) -> (B, N, H, D), and the lse (B, N, H).

    Raises:
        NotImplementedError: dropout_p, is_causal, context parallelism, a mask that differs between heads or queries.
    """
    _refuse("attention_backend", dropout_p=dropout_p, is_causal=is_causal, _parallel_config=_parallel_config)
    return attend("attention_backend", query, key, value, attn_mask, scale, enable_gqa, return_lse)


@contextlib.contextmanager
def use_attention_backend(model: nn.Module) -> Iterator[nn.Module]:
    """lr_kernels in this model alone, for the duration of a `with` block; everything is as before after it, also
    after an exception. `model.set_attention_backend` changes the default of all other models as well.

    Raises:
        ValueError: a model none of whose attention layers dispatches.
    """
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    register_attention_backend()
    processors = [
        module.processor
        for module in model.modules()
        if isinstance(module, (Attention, AttentionModuleMixin)) and hasattr(module.processor, "_attention_backend")
    ]
    if not processors:
        got, hint = f"{type(model).__name__}, which has none", "UNets take lr_kernels.diffusers.install_processors"
        fail("use_attention_backend", "model", "attention layers that dispatch", got, hint)
    before = [vars(p).get("_attention_backend", _MISSING) for p in processors]
    try:
        for p in processors:
            p._attention_backend = AttentionBackendName(NAME)
        yield model
    finally:
        for p, backend in zip(processors, before):
            if backend is _MISSING:
                vars(p).pop("_attention_backend", None)
            else:
                p._attention_backend = backend


_MISSING = object()
