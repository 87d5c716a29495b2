"""Methods of `lr_kernels.presets` for a whole generation with a stock pipeline, with the settings of their authors.

    with methods.masactrl(pipe, images=2):
        source, target = pipe([prompt, another], latents=same_noise).images

Each is a context manager made of `sharing` and a preset. `images` counts the pictures of one half of the guidance, all
that the pipeline is asked for together; `halves` is 2 with guidance and 1 without. A UNet's batch of other rows is a
ValueError that names `rows`. `layers`, `steps`: of `sharing`. `backend`: of `multi_source_attention`.

In a compiled UNet plans of masks are made outside the graph, which breaks there. Shared group norms and matched
features need a UNet that is not compiled.
"""

from .recipes import consistory, ip_adapter, masactrl, reference_only, story_diffusion, style_aligned

__all__ = ["consistory", "ip_adapter", "masactrl", "reference_only", "story_diffusion", "style_aligned"]
