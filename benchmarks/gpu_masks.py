"""Masks and grouped heads on a GPU: the cases of mask_cases.py and everybody who computes them there."""

import functools
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import gpu_peers
from . import mask_cases as cases
from .attention import Layer
from .gpu_attention import SDPA
from .harness import OURS, Problem
from .mask_cases import ALL_KEYS, SHARES, TOKENS, Case
from .masks import HEADS_OF_A_KEY, REPEATED
from .target import Target

LAYERS = (Layer("h64", "", TOKENS, 24, 64), Layer("h128", "", TOKENS, 24, 128))
WIDE = Layer("h128x16", "", TOKENS, 16, 128)
"""Of the cases of grouped heads"""


def builders(target: Target) -> Iterator[Callable[[], Problem]]:
    """One for each case, in bf16."""
    found: list[Callable[[], Case]] = []
    for layer in LAYERS:
        found += [
            functools.partial(build, layer, "bf16", target) for build in (cases.causal, cases.window, cases.blocks)
        ]
    found += [functools.partial(cases.padding, LAYERS[1], "bf16", target, TOKENS, visible) for visible in SHARES]
    found += [functools.partial(cases.grouped, WIDE, "bf16", target, TOKENS, times) for times in HEADS_OF_A_KEY]
    for build in found:
        yield lambda build=build: _problem(build(), target)


def _problem(case: Case, target: Target) -> Problem:
    return case.problem("bf16", contenders(case, target))


def contenders(case: Case, target: Target) -> dict[str, Callable[[], Tensor]]:
    """Everybody by name, ours first."""
    backend = "triton" if target.toy else "auto"
    found: dict[str, Callable[[], Tensor]] = {OURS: case.ours(backend)}
    if case.mask is None:
        found[OURS + REPEATED] = lambda: case.repeated(lambda wide: wide.ours(backend)())
    else:
        found[OURS + ALL_KEYS] = case.all_keys(backend)
    how = "SDPA + mask" if "attn_mask" in case.sdpa else "SDPA"
    for name, kernel in SDPA.items():
        found[f"{how} ({name})"] = functools.partial(_forced, kernel, case)
    if case.flash is not None:
        found["FA3"] = lambda: gpu_peers.fa3(case.query, case.key, case.value, **case.flash)
        found["FA4"] = lambda: gpu_peers.fa4(case.query, case.key, case.value, **case.flash)
    if case.lengths is not None:
        padded = (case.query, case.key, case.value, case.lengths)
        found["FA3, lengths"] = functools.partial(gpu_peers.fa3_padded, *padded)
        found["FA4, lengths"] = functools.partial(gpu_peers.fa4_padded, *padded)
    if target.compiles:
        found["FlexAttention"] = case.by_flex()
    return found


def _forced(kernel: SDPBackend, case: Case) -> Tensor:
    with sdpa_kernel(kernel):
        return case.by(F.scaled_dot_product_attention, **case.sdpa)
