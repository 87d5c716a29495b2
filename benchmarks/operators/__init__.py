"""Every operator of the package and the problems that time it: a new operator adds a file here and a line below."""

from collections.abc import Callable

from .. import attention, backward
from ..harness import Problem
from . import adain, correspondence, key_lists, merge, step_blend, subject_mask, token_maps

Build = Callable[[], list[Problem]]
"""Makes the inputs of problems that are measured together."""

SMALL: dict[str, Callable[..., list[Build]]] = {
    "attention_with_token_maps": token_maps.problems,
    "subject_mask": subject_mask.problems,
    "compact_keys": key_lists.problems,
    "merge_attention_states": merge.problems,
    "adain": adain.problems,
    "correspondence": correspondence.problems,
    "step_blend": step_blend.problems,
}
"""Called with the names of the dtypes and a `Target`, a CPU by default; the smallest case comes first."""

OPERATORS: dict[str, Callable[..., list[Build]]] = {
    "multi_source_attention": attention.problems,
    "multi_source_attention_backward": backward.problems,
    **SMALL,
}
