"""What the processes of tests/test_context_parallel.py compute, and the same on one card: tables of cases."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from tiny_parallel import (
    FUNCTIONS,
    MASKS,
    SHARED,
    attended,
    attended_here,
    compiled,
    documented_script,
    flux,
    flux2,
    from_bank,
    from_cache,
    layout_and_retouch,
    one_kind,
    parallel_config,
    qwen_image,
    refused_call,
    retouched,
    spread,
    stock,
    wan,
    with_function,
)

from lr_kernels.diffusers import joint_attention


class Case(NamedTuple):
    """A computation on some cards, and the same on one."""

    world: int
    here: Callable[[], dict]
    """on this card of several"""
    alone: Callable[[torch.dtype], dict] | None = None
    """on one card"""
    dtype: torch.dtype = torch.float32
    parts: bool = False
    """whether each card has its tokens' part of every tensor; else outputs are whole, and gradients parts of a sum"""


def world_of(degrees):
    return degrees.get("ring", 1) * degrees.get("ulysses", 1)


def call(degrees, mask=None, dtype=torch.float32, **arguments):
    def here():
        return attended_here(dtype, parallel_config(**degrees), mask, **arguments)

    alone = functools.partial(attended, mask=mask, **arguments)
    return Case(world_of(degrees), here, alone, dtype, parts=True)


def same(degrees, function, *arguments, alone=None, **keywords):
    """A case of a function of dtype and degrees; alone: of a dtype, by default the same without degrees."""
    here = functools.partial(function, torch.float32, degrees, *arguments, **keywords)
    if alone is None:

        def alone(dtype):
            return function(dtype, {}, *arguments, **keywords)

    return Case(world_of(degrees), here, alone)


def whole(degrees, build, **arguments):
    """A model with the backend; alone: diffusers' own attention."""
    return same(degrees, spread, build, alone=functools.partial(stock, build=build, **arguments), **arguments)


ULYSSES, RING, UNIFIED = {"ulysses": 2}, {"ring": 2}, {"ring": 2, "ulysses": 2}
FOUR_ULYSSES, FOUR_RING = {"ulysses": 4}, {"ring": 4}
ANY_ULYSSES, ANY_RING = ULYSSES | {"ulysses_anything": True}, RING | {"ring_anything": True}
ANY = [ANY_ULYSSES, ANY_RING, FOUR_ULYSSES | {"ulysses_anything": True}, FOUR_RING | {"ring_anything": True}]


def told(degrees):
    """The degrees in words, as "ring 2 x ulysses 2"."""
    words = " x ".join(f"{kind} {degrees[kind]}" for kind in ("ring", "ulysses") if kind in degrees)
    return words + (" anything" if len(degrees) > 1 and True in degrees.values() else "")


CASES = {}
for _degrees in (ULYSSES, RING, FOUR_ULYSSES, FOUR_RING, UNIFIED):
    CASES[f"a call, {told(_degrees)}"] = call(_degrees)
    for _build in (flux, flux2, wan):
        CASES[f"{_build.__name__}, {told(_degrees)}"] = whole(_degrees, _build)
    CASES[f"qwen_image without padding, {told(_degrees)}"] = whole(_degrees, qwen_image, padded=False)
for _degrees in (RING, UNIFIED):
    CASES[f"bf16, {told(_degrees)}"] = call(_degrees, dtype=torch.bfloat16)
    CASES[f"bf16 merged in bf16, {told(_degrees)}"] = call(
        _degrees | {"convert_to_fp32": False}, dtype=torch.bfloat16, gradients=False
    )
CASES["queries and keys of different numbers, ring 2"] = call(RING, keys=24)
CASES["queries and keys of different numbers, ulysses 2"] = call(ULYSSES, keys=24, gradients=False)
for _degrees in ANY:
    CASES[f"a call, {told(_degrees)}"] = call(_degrees, tokens=19, keys=19, gradients=False)
    CASES[f"flux, {told(_degrees)}"] = whole(_degrees, flux, text=7, gradients=False)
CASES["three heads, ulysses 2 anything"] = call(ANY_ULYSSES, tokens=19, keys=19, heads=3, gradients=False)
for _mask in MASKS:
    CASES[f"a mask {_mask}, ulysses 2"] = call(ULYSSES, mask=_mask)
    CASES[f"a mask {_mask}, ulysses 2 anything"] = call(ANY_ULYSSES, mask=_mask, tokens=19, keys=19, gradients=False)
for _degrees in (ULYSSES, FOUR_ULYSSES):
    CASES[f"qwen_image with padding, {told(_degrees)}"] = whole(_degrees, qwen_image)
    for _build in (flux, flux2, qwen_image):
        for _name, _function in FUNCTIONS.items():
            _case = same(_degrees, with_function, _build, _function)
            CASES[f"{_name} attention in {_build.__name__}, {told(_degrees)}"] = _case
    CASES[f"flux's retouch, {told(_degrees)}"] = same(_degrees, retouched)
for _degrees in (ULYSSES, RING):
    CASES[f"flux with checkpoints, {told(_degrees)}"] = whole(_degrees, flux, checkpointing=True)
    CASES[f"bf16 by autocast, {told(_degrees)}"] = call(_degrees, dtype=torch.bfloat16, autocast=True)
CASES["flux in one graph, ring 2"] = same(RING, compiled)
CASES["shared attention in one graph, ulysses 2"] = same(ULYSSES, compiled, SHARED)
for _words in ({}, {"subject_tokens": "sks ball", "reference_mask": None, "layout_mask": None}):
    _name = f"Layout-and-Retouch on flux{' by words' if _words else ''}, ulysses 2"
    CASES[_name] = same(ULYSSES, layout_and_retouch, **_words)
CASES["flux's retouch in single blocks, ulysses 2"] = same(ULYSSES, retouched, "single_transformer_blocks")
CASES["parallelism switched on later, ulysses 2"] = same(ULYSSES, with_function, flux, SHARED, later=True)
CASES["a bank, ulysses 2"] = same(ULYSSES, from_bank)
CASES["a bank in 8 bits, ulysses 2"] = same(ULYSSES, from_bank, torch.int8)
CASES["the model's cache, ulysses 2"] = same(ULYSSES, from_cache)


SCRIPT = Case(2, documented_script)


def refused(degrees, run, *arguments, **keywords):
    return Case(world_of(degrees), functools.partial(run, torch.float32, degrees, *arguments, **keywords))


REFUSALS = {
    "a mask": refused(RING, refused_call, mask=True),
    "a mask, unified": refused(UNIFIED, refused_call, mask=True),
    "a causal mask": refused(ULYSSES, refused_call, is_causal=True),
    "dropout": refused(RING, refused_call, dropout_p=0.1),
    "fewer heads of keys": refused(ULYSSES, refused_call, key_heads=2, enable_gqa=True),
    "heads that two cards do not divide": refused(ULYSSES, refused_call, heads=3),
    "heads too few for four cards": refused(FOUR_ULYSSES | {"ulysses_anything": True}, refused_call, heads=2),
    "another backend's argument": refused(RING, refused_call, attention_kwargs={"window_size": (2, 2)}),
    "a gradient of the mask": refused(ULYSSES, refused_call, mask=True, needs=("attn_mask",)),
    "a gradient of the lse": refused(RING, refused_call, needs=("query",), attention_kwargs={"return_lse": True}),
    "gradients of gradients": refused(ULYSSES, refused_call, needs=("query",)),
    "gradients of gradients, ring": refused(RING, refused_call, needs=("query",)),
    "gradients of other keys": refused(ULYSSES, refused_call, keys=24, needs=("query",)),
    "a function, ring": refused(RING, with_function, flux, joint_attention),
    "a function, unified": refused(UNIFIED, with_function, qwen_image, joint_attention),
    "a function, anything": refused(ANY_ULYSSES, with_function, flux2, joint_attention),
    "a function, switched on later": refused(RING, with_function, flux, joint_attention, later=True),
    "a function in single blocks alone": refused(ULYSSES, one_kind),
    "a retouch, ring": refused(RING, retouched),
    "a bank, ring": refused(RING, from_bank),
    "a pass that fills a cache": refused(ULYSSES, from_cache, "extract"),
    "heads that four cards do not divide": refused(FOUR_ULYSSES, from_bank),
}
