"""What the method costs beside plain generation, at SD1.5's size on this machine: `python -m benchmarks.price`.

One image with guidance, random weights, default settings. Both stages run with a reference bank, which is filled before
the timing, and with the reference in the batch. They are compared with the time that the UNet takes in diffusers' own
pipeline with the same steps. The three runs take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lr_kernels.runtime.extras import require

require("bench", "rich")
require("diffusers")

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from transformers import CLIPTextConfig, CLIPTextModel

from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline
from lr_kernels.toy import models

from . import harness, table

PLAIN, WITH_BANK, WITHOUT = "plain generation (UNet only)", "both stages, with a bank", "both stages, without a bank"
GOALS = {WITH_BANK: 2.0, WITHOUT: 2.6}
TEXT = 77


def pipelines(side: int) -> tuple[StableDiffusionPipeline, StableDiffusionLayoutRetouchPipeline]:
    """diffusers' own and ours on the same models; one set of weights serves as vanilla and personalized UNet."""
    torch.manual_seed(0)
    tokenizer = models.build_tokenizer()
    tokenizer.model_max_length = TEXT
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=768, num_hidden_layers=1, num_attention_heads=12,
        max_position_embeddings=TEXT, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    four = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=four[0], up_block_types=four[1], norm_num_groups=4,
        latent_channels=4, sample_size=side,
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=side // 8, cross_attention_dim=768).eval()
    parts = {
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    stock, ours = (
        StableDiffusionPipeline(**parts),
        StableDiffusionLayoutRetouchPipeline(**parts, personalized_unet=unet),
    )
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
    return stock, ours


def timed_unet(stock: StableDiffusionPipeline, steps: int) -> tuple[float, int]:
    """Seconds and rows of the UNet in a plain generation."""
    seconds, rows, started = 0.0, 0, 0.0

    def before(module: object, inputs: tuple) -> None:
        nonlocal started, rows
        rows += len(inputs[0])
        started = time.perf_counter()

    def after(module: object, inputs: object, output: object) -> None:
        nonlocal seconds
        seconds += time.perf_counter() - started

    hooks = stock.unet.register_forward_pre_hook(before), stock.unet.register_forward_hook(after)
    stock("a sks ball on sand", num_inference_steps=steps, output_type="latent")
    for hook in hooks:
        hook.remove()
    return seconds, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="write the rows there, with machine, versions and commit")
    options = parser.parse_args()
    stock, ours = pipelines(options.side)
    prompts, words = ("a sks ball on sand", "a ball on sand"), ("sks", "ball")
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, options.side, options.side, generator=generator)
    mask = torch.zeros(options.side, options.side, dtype=torch.bool)
    mask[options.side // 4 : -options.side // 4, options.side // 4 : -options.side // 4] = True
    common = {"num_inference_steps": options.steps}
    bank = ours.reference_bank(picture, "a sks ball", words, reference_mask=mask, **common)

    def both_stages(**reference: object) -> tuple[float, int]:
        out = ours(*prompts, subject_tokens=words, output_type="latent", **reference, **common)
        return sum(out.seconds.values()), sum(out.rows.values())

    runs: dict[str, Callable[[], tuple[float, int]]] = {
        PLAIN: lambda: timed_unet(stock, options.steps),
        WITH_BANK: lambda: both_stages(reference_bank=bank),
        WITHOUT: lambda: both_stages(reference_image=picture, reference_prompt="a sks ball"),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            found[name].append(run())
    plain = statistics.median(seconds for seconds, _ in found[PLAIN])
    about = {"side": str(options.side), "steps": str(options.steps), "threads": str(torch.get_num_threads())}
    shown, rows = Table("run", "UNet rows", "seconds", "times plain", "goal"), []
    for name, measured in found.items():
        seconds = statistics.median(x for x, _ in measured)
        rows.append(
            {**about, "run": name, "rows": str(measured[0][1]), "seconds": f"{seconds:.2f}",
             "times_plain": f"{seconds / plain:.2f}"}
        )  # fmt: skip
        goal = f"{GOALS[name]:.1f}" if name in GOALS else ""
        shown.add_row(name, rows[-1]["rows"], rows[-1]["seconds"], rows[-1]["times_plain"], goal)
    Console(width=120).print(shown)
    if options.csv:
        table.write_csv(options.csv, rows, harness.machine())


if __name__ == "__main__":
    main()
