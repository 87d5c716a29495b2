"""What methods do to a UNet beside its attention, while a `with` block lasts: group norms that are shared, features
that are matched to a reference, rows that are a picture at every step's noise level."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from ...runtime.checks import check_integer, check_number, entries_of, fail
from ..processors.install import check_not_compiled, pass_inputs

EPS = 1e-6
"""The lowest variance that is divided by, as in the community pipeline."""


@contextmanager
def shared_group_norms(unet: nn.Module, rows: Tensor) -> Iterator[None]:
    """While it lasts, each row's group norms take their statistics over the row and its reference together, as
    StyleAligned (arXiv 2312.02133) does by default. (Its shared layer norms change nothing: they look at one token.)

    Args:
        rows: int (B,), the reference of every row; a row that names itself, or -1, is normalized by itself.

    Raises:
        ValueError: another batch. NotImplementedError: a compiled UNet, which would not notice.
    """
    _check_plain("shared_group_norms", unet)
    rows = _table("shared_group_norms", rows)

    def before(norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0]
        reference = _read("shared_group_norms", rows, x)
        return (torch.cat([x, x[reference]], 2),)

    def after(norm: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out[:, :, : out.shape[2] // 2]

    with ExitStack() as hooks:
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        yield


@contextmanager
def reference_adain(
    unet: nn.Module, rows: Tensor, uncond: Tensor | None = None, fidelity: float = 0.5, weight: float = 1.0
) -> Iterator[None]:
    """While it lasts, features get their reference's mean and deviation per channel, as `reference_adain` of diffusers'
    community pipeline `stable_diffusion_reference`.

        x' = (x - mean) / std · std_ref + mean_ref;  in unconditional rows fidelity · x + (1 - fidelity) · x'

    Args:
        rows: int (B,), the reference of every row; a row that names itself, or -1, is left as it is.
        uncond: bool (B,), default: no row.
        fidelity: `style_fidelity` of the original.
        weight: `gn_auto_machine_weight` of the original: 0: only after the mid block; 1, its default: also in the half
            of the blocks that is deepest, after each of their layers; 2: in all.

    Raises:
        ValueError: another batch. NotImplementedError: a compiled UNet, which would not notice.
    """
    op = "reference_adain"
    _check_plain(op, unet)
    check_number(op, "fidelity", fidelity, "a number in [0, 1]", 0, 1)
    check_number(op, "weight", weight, "a number in [0, 2]", 0, 2)
    rows = _table(op, rows)
    if uncond is not None:
        fits = isinstance(uncond, Tensor) and uncond.dtype == torch.bool and uncond.shape == rows.shape
        if not fits:
            got = f"{uncond.dtype} {tuple(uncond.shape)}" if isinstance(uncond, Tensor) else type(uncond).__name__
            fail(op, "uncond", f"bool ({len(rows)},), one entry per row of the batch", got)

    def match(x: Tensor) -> Tensor:
        reference = _read(op, rows, x)
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
        deviation = variance.clamp(min=EPS).sqrt()
        matched = (x - mean) / deviation * deviation[reference] + mean[reference]
        if uncond is not None:
            share = torch.where(uncond.to(x.device), fidelity, 0.0).to(x.dtype)[:, None, None, None]
            matched = share * x + (1 - share) * matched
        follows = reference != torch.arange(len(x), device=x.device)
        return torch.where(follows[:, None, None, None], matched, x)

    def after(module: nn.Module, args: tuple, out: Tensor | tuple) -> Tensor | tuple:
        return match(out) if isinstance(out, Tensor) else (match(out[0]), *out[1:])

    with ExitStack() as hooks:
        for module in _matched_modules(unet, weight):
            hooks.callback(module.register_forward_hook(after).remove)
        yield


def _matched_modules(unet: UNet2DConditionModel, weight: float) -> list[nn.Module]:
    """The modules whose outputs are matched: the mid block, and the last module of each layer of the blocks that take
    part."""
    found = [] if unet.mid_block is None else [unet.mid_block]
    down, up = unet.down_blocks, unet.up_blocks
    blocks = [block for i, block in enumerate(down) if weight >= 2 * (1 - i / len(down))]
    blocks += [block for i, block in enumerate(up) if weight >= 2 * i / len(up)]
    for block in blocks:
        found += getattr(block, "attentions", None) or block.resnets
    return found


@contextmanager
def noised_rows(
    pipe: DiffusionPipeline, latents: Tensor, rows: Sequence[int] | Tensor, generator: torch.Generator | None = None
) -> Iterator[None]:
    """While it lasts, some rows of the UNet's batch are pictures, noised anew to the level of every pass.

    They replace what the pipeline has in these rows, so that other rows can read them as references. The pipeline's
    results for these rows mean nothing.

    Args:
        latents: (n, C, h, w), of the pictures, scaled as the UNet's. rows: per row the picture's number, -1: none, for
            all rows of the batch. generator: of the noise, which the halves of the guidance share.

    Raises:
        ValueError: rows of no picture; latents that are not finite; in a pass: another batch; latents of another size.
    """
    op = "noised_rows"
    check_not_compiled(op, pipe.unet)
    if not isinstance(latents, Tensor) or latents.dim() != 4 or not latents.is_floating_point() or not len(latents):
        got = f"{latents.dtype} {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        fail(op, "latents", "floating (n, C, h, w), at least one picture", got)
    if not bool(latents.isfinite().all()):
        fail(op, "latents", "finite numbers", "NaN or infinity")
    entries = entries_of(rows)
    expected = f"a list of one entry per row of the batch, -1 or a picture, 0 to {len(latents) - 1}"
    if entries is None:
        fail(op, "rows", expected, repr(rows))
    rows = [check_integer(op, "rows", row, -1, expected, len(latents) - 1) for row in entries]
    # Models of inpainting have more inputs than latents: a mask and the masked picture.
    wanted = getattr(getattr(pipe.unet, "config", None), "out_channels", latents.shape[1])
    if latents.shape[1] != wanted:
        fail(op, "latents", f"{wanted} channels, as the UNet's latents", latents.shape[1])

    def before_pass(unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        sample, timestep = pass_inputs(args, kwargs)
        if len(rows) != sample.shape[0]:
            fail(op, "rows", f"one entry for each of {sample.shape[0]} rows", len(rows))
        channels = latents.shape[1]
        if latents.shape[2:] != sample.shape[2:] or channels > sample.shape[1]:
            fail(op, "latents", f"those of size {tuple(sample.shape[2:])}", tuple(latents.shape))
        clean = latents.to(sample)
        device = clean.device if generator is None else generator.device
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=device).to(clean.device)
        at = torch.as_tensor(timestep, device=clean.device).flatten()[:1]
        noisy = pipe.scheduler.scale_model_input(pipe.scheduler.add_noise(clean, noise, at), timestep)
        sample = sample.clone()
        for row, picture in enumerate(rows):
            if picture >= 0:
                sample[row, :channels] = noisy[picture]
        if args:
            return (sample, *args[1:]), kwargs
        return args, {**kwargs, "sample": sample}

    hook = pipe.unet.register_forward_pre_hook(before_pass, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _check_plain(op: str, unet: nn.Module) -> None:
    """NotImplementedError for a model with compiled parts: they do not notice hooks."""
    if any(hasattr(x, "_orig_mod") or x._compiled_call_impl is not None for x in unet.modules()):
        fail(op, "unet", "one without compiled parts", "a compiled one", "compile later", NotImplementedError)


def _table(op: str, rows: Tensor | Sequence[int]) -> Tensor:
    """The table of rows with its numbers checked: once, before the passes."""
    entries = entries_of(rows)
    if not entries:
        fail(op, "rows", "a table of one entry per row of the batch, at least one", repr(rows), "see guided_rows")
    expected = f"-1 or a row of the batch, 0 to {len(entries) - 1}"
    entries = [check_integer(op, "rows", row, -1, expected, len(entries) - 1) for row in entries]
    return rows if isinstance(rows, Tensor) else torch.tensor(entries)


def _read(op: str, rows: Tensor, x: Tensor) -> Tensor:
    """int64 (B,): the row that each reads, itself where it reads none."""
    if rows.shape != x.shape[:1]:
        fail(op, "rows", f"shape ({x.shape[0]},), one entry per row of the batch", tuple(rows.shape))
    rows = rows.to(x.device).long()
    return torch.where(rows < 0, torch.arange(len(rows), device=x.device), rows)
