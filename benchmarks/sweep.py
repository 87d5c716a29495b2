"""How the time grows: with tokens, with the visible share and with the number of sources; batch 1, 8 heads of 64.

One quantity varies at a time. The first source is the query's own keys, the others are as long.
"""

import functools
from collections.abc import Callable, Sequence

from .attention import Layer, problem, tensors
from .harness import Problem

HEADS, HEAD_DIM = 8, 64
TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
SOURCES = (1, 2, 3, 4, 6, 8)


def points() -> list[tuple[str, int, float, int]]:
    """(what varies, tokens, visible share of every source, sources)"""
    return (
        [("tokens", n, 1.0, 2) for n in TOKENS]
        + [("visible", 2048, share, 2) for share in SHARES]
        + [("sources", 1024, 1.0, count) for count in SOURCES]
    )


def problems(dtypes: Sequence[str]) -> list[Callable[[], list[Problem]]]:
    """One builder per point and dtype."""
    return [functools.partial(_build, *point, dtype) for point in points() for dtype in dtypes]


def _build(varies: str, tokens: int, share: float, sources: int, dtype: str) -> list[Problem]:
    layer = Layer(varies, f"{sources} sources", tokens, HEADS, HEAD_DIM)
    inputs = tensors(layer, dtype, rows=(1,) * sources)
    return [problem(layer, dtype, f"{share:.0%}", (share,) * sources, inputs, op="sweep")]
