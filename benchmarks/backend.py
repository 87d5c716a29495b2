"""lr_kernels as diffusers' attention backend, without masks, with padding masks, and in whole models.

Attention alone goes through diffusers' own dispatch, as in every model that honours it; whole models are Flux with few
layers and random weights, whose share of attention grows with the number of tokens. A backend that computes what the
stock one does pays where attention is slow, and not where a model's time is in its linear layers.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lr_kernels import Source, reference
from lr_kernels.testing import assert_matches

from .harness import DTYPES, OURS, Contender, Problem, checked_error, relative_error

STOCK = "native (stock)"
HEADS, HEAD_DIM, TEXT = 24, 128, 512
"""Of Flux"""
TOKENS = (256, 1024, 4096)
"""Of images of 256², 512² and 1024² pixels"""
CHECKED = 32
PADDING = (1.0, 0.67, 0.33)
"""Visible share of the keys under a padding mask; 1: no mask."""


def problems(dtypes: Sequence[str]) -> list[Callable[[], list[Problem]]]:
    """One builder per number of tokens and dtype for attention alone, then one per number of tokens for whole models,
    in bf16."""
    alone = [functools.partial(_attention, tokens, dtype) for tokens in TOKENS for dtype in dtypes]
    return alone + [functools.partial(_model, tokens) for tokens in TOKENS if "bf16" in dtypes]


def _attention(tokens: int, dtype: str) -> list[Problem]:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    from lr_kernels.diffusers import register_attention_backend

    register_attention_backend()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, HEADS, HEAD_DIM, generator=generator).to(DTYPES[dtype]) for _ in range(3)
    )
    some = torch.linspace(0, tokens - 1, CHECKED).long()

    def of_share(share: float) -> Problem:
        visible = torch.arange(tokens)[None] < round(share * tokens)
        mask = None if share == 1 else visible[:, None, None]

        def exact(precision: torch.dtype) -> Tensor:
            source = Source(key.to(precision), value.to(precision), key_mask=visible)
            return reference.multi_source_attention(query[:, some].to(precision), [source])

        low, truth = exact(DTYPES[dtype]), exact(torch.float64)
        return Problem(
            op="attention backend",
            layer=f"{tokens} tokens",
            model="attention of Flux",
            shape=f"{tokens}x{HEADS}x{HEAD_DIM}",
            dtype=dtype,
            flops=4.0 * HEADS * HEAD_DIM * tokens * int(visible.sum()),
            contenders={
                name: Contender(
                    functools.partial(dispatch_attention_fn, query, key, value, attn_mask=mask, backend=backend)
                )
                for name, backend in ((OURS, "lr_kernels"), (STOCK, "native"))
            },
            error=lambda name, result: checked_error(name, result[:, some], low, truth),
            visible=f"{share:.0%}",
            share=float(visible.float().mean()),
            baseline=STOCK,
        )

    return [of_share(share) for share in PADDING]


def _model(tokens: int) -> list[Problem]:
    from diffusers import FluxTransformer2DModel
    from torch.utils.flop_counter import FlopCounterMode

    from lr_kernels.diffusers import use_attention_backend

    generator, dtype = torch.Generator().manual_seed(1), torch.bfloat16
    torch.manual_seed(0)
    config = dict(in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=HEAD_DIM)
    config |= dict(num_attention_heads=HEADS, joint_attention_dim=64, pooled_projection_dim=64)
    model = FluxTransformer2DModel(**config).to(dtype).eval()

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    side = torch.arange(tokens**0.5)
    inputs = dict(hidden_states=randn(1, tokens, 64), encoder_hidden_states=randn(1, TEXT, 64))
    inputs |= dict(pooled_projections=randn(1, 64), timestep=torch.tensor([0.5], dtype=dtype))
    inputs |= dict(img_ids=torch.cartesian_prod(torch.zeros(1), side, side), txt_ids=torch.zeros(TEXT, 3))

    def run(ours: bool) -> Tensor:
        with torch.no_grad(), use_attention_backend(model) if ours else contextlib.nullcontext():
            return model(**inputs, return_dict=False)[0]

    exact = copy.deepcopy(model).float()  # in float64 a model takes minutes
    with torch.no_grad():
        truth = exact(**{name: x.float() for name, x in inputs.items()}, return_dict=False)[0].double()
    del exact
    with FlopCounterMode(display=False) as counter:
        low = run(False)

    def error(name: str, result: Tensor) -> float:
        assert_matches(result, low, truth, name)
        return relative_error(result, truth)

    problem = Problem(
        op="attention backend",
        layer=f"{TEXT} + {tokens} tokens",
        model="Flux, 2 of 57 layers",
        shape=f"{TEXT + tokens}x{HEADS}x{HEAD_DIM}",
        dtype="bf16",
        flops=float(counter.get_total_flops()),
        contenders={OURS: Contender(functools.partial(run, True)), STOCK: Contender(functools.partial(run, False))},
        error=error,
    )
    return [problem]
