"""Methods of `lr_kernels.presets` for a whole generation with a stock pipeline, with the settings of their authors.

    with methods.masactrl(pipe, images=2):
        first, second = pipe([prompt, another], latents=same_noise).images

Each is a context manager made of `sharing` and a preset. `images` counts the pictures of one half of the guidance, all
that the pipeline is asked for together; `halves` is 2 with guidance and 1 without. If the UNet's batch
has another number of rows, a ValueError names `rows`. `layers`, `steps`: of `sharing`. `backend`: of
`multi_source_attention`.

In a compiled UNet plans of masks are made outside the graph, so that the graph breaks there. Shared group norms and
matched features need a UNet that is not compiled."""

from .recipes import consistory, ip_adapter, masactrl, reference_only, story_diffusion, style_aligned

__all__ = ["consistory", "ip_adapter", "masactrl", "reference_only", "story_diffusion", "style_aligned"]
