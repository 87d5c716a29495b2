"""Methods that share attention between images, each as sources of `multi_source_attention`.

A preset is a function of the queries, keys and values of one attention layer, all rows of the batch together,
(B, N, H, D) each; it returns the (B, N, H, D) that the layer goes on with. Keys and values of other rows are read in
place. A row table says which other row each row reads: int (B,), -1 for none. Make it once (`guided_rows`) and keep
it on the query's device; int32 is not copied. A table or a mask that was made for another batch is a ValueError that
names it.

To run one for a whole generation as its authors do, see `lr_kernels.diffusers.methods`; with settings of your own, see
`lr_kernels.diffusers.sharing` (docs/own-method.md).

The formulas are those of the papers and of the authors' code, tested against plain transcriptions of them
(tests/test_presets.py).
"""

from .added import dream_matcher, ip_adapter
from .masked import masactrl, masactrl_plan, mca_ctrl, mca_ctrl_generation, mca_ctrl_plan
from .rows import guided_rows
from .shared import consistory, consistory_plan, reference_only, story_diffusion, story_diffusion_plan, style_aligned

__all__ = [
    "consistory",
    "consistory_plan",
    "dream_matcher",
    "guided_rows",
    "ip_adapter",
    "masactrl",
    "masactrl_plan",
    "mca_ctrl",
    "mca_ctrl_generation",
    "mca_ctrl_plan",
    "reference_only",
    "story_diffusion",
    "story_diffusion_plan",
    "style_aligned",
]
