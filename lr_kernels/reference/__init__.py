"""The specification: every operator in plain PyTorch, the one place where shapes and formulas are defined.

Low-precision inputs are computed in float32 and rounded once at the end (in float64 where float32 cannot hold logits);
float64 stays float64, which makes this module every test's oracle. Backends are compared with it and never import it.

Sizes: B batch rows, N queries, H heads, D head_dim; a source has R rows of M keys.
"""

from .attention import *
from .denoising import *
from .features import *
