"""How much 8 bits change attention, by dtype and by what shares a scale: `python -m benchmarks.eight_bit`.

Keys and values of four kinds: normal numbers; normal numbers with outlier channels, as they are and with keys after an
RMS norm; those of the toy UNet for a rendered subject; and for a photograph. Keys and values are quantized, multiplied
by their scales, rounded to bf16 and attended to by bf16 queries. The error is ‖out − out64‖ / ‖out64‖, where out64 is
attention in float64 of the numbers before any rounding; the line "bf16" is what rounding to bf16 alone costs.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lr_kernels.runtime.extras import require

require("bench", "rich", "matplotlib")
require("diffusers")

from matplotlib.cbook import get_sample_data
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import harness, table
from lr_kernels import Source, multi_source_attention, quantize, reference, toy
from lr_kernels.diffusers import CustomAttnProcessor, install_processors, select_layers
from lr_kernels.toy import world

EIGHT_BITS = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
CHANNELS_OF_GROUP = 32
TOKENS, HEADS, HEAD_DIM = 1024, 8, 128
OUTLIERS, OUTLIER_SCALE = 4, 20.0
"""So many channels of every head are so many times as large as the others."""
TIMESTEPS = (900, 500, 100)
PHOTO_SIDE = 128
"""Pixels; the toy UNet then has 1,024 and 256 tokens."""


class Layer(NamedTuple):
    """One layer's tensors, fp32 (rows, tokens, heads, head_dim)."""

    query: Tensor
    key: Tensor
    value: Tensor


def by_tensor(x: Tensor) -> Tensor:
    """Numbers (R, M, H, D) -> scales that multiply with them; here one for all."""
    return x.abs().amax().expand(1, 1, 1, 1)


def by_head(x: Tensor) -> Tensor:
    """One scale per head."""
    return x.abs().amax((0, 1, 3), keepdim=True)


def by_channel(x: Tensor) -> Tensor:
    """One scale per head and channel."""
    return x.abs().amax((0, 1), keepdim=True)


def by_token(x: Tensor) -> Tensor:
    """One scale per row, token and head: that of `quantize`."""
    return x.abs().amax(3, keepdim=True)


def by_group(x: Tensor) -> Tensor:
    """One scale per row, token, head and 32 channels."""
    groups = x.abs().unflatten(3, (-1, CHANNELS_OF_GROUP)).amax(4)
    return groups.repeat_interleave(CHANNELS_OF_GROUP, 3)


CHOSEN = "token and head"
GRANULARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": by_tensor,
    "head": by_head,
    "channel and head": by_channel,
    CHOSEN: by_token,
    "32 channels": by_group,
}


def stands_for(x: Tensor, dtype: torch.dtype, granularity: str) -> Tensor:
    """The fp32 numbers (R, M, H, D) that x becomes in 8 bits."""
    if granularity == CHOSEN:
        eight, scale = quantize(x, dtype)
        return eight.float() * scale[..., None]
    largest = 127.0 if dtype == torch.int8 else 448.0
    scale = GRANULARITIES[granularity](x) / largest
    steps = (x / scale).nan_to_num(0.0).clamp(-largest, largest)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype).float() * scale


def share_of_bytes(granularity: str, tokens: int, head_dim: int) -> float:
    """Bytes of numbers and scales, of those of bf16."""
    numbers = {"tensor": 0.0, "head": 0.0, "channel and head": 1 / tokens, CHOSEN: 1 / head_dim}
    return 0.5 + 2 * numbers.get(granularity, 1 / CHANNELS_OF_GROUP)


def random_layers() -> Iterator[tuple[str, str, Layer]]:
    """(kind, name, layer) of normal numbers, with and without outlier channels."""
    generator = torch.Generator().manual_seed(0)
    plain = Layer(*(torch.randn(1, TOKENS, HEADS, HEAD_DIM, generator=generator) for _ in range(3)))
    yield "normal", "", plain
    larger = torch.ones(HEADS, HEAD_DIM)
    for head in larger:
        head[torch.randperm(HEAD_DIM, generator=generator)[:OUTLIERS]] = OUTLIER_SCALE
    outliers = plain._replace(key=plain.key * larger, value=plain.value * larger)
    yield "outlier channels", "", outliers
    normed = (F.rms_norm(x, (HEAD_DIM,)) for x in outliers[:2])
    yield "outlier channels, RMS norm", "", Layer(*normed, outliers.value)


@torch.no_grad()
def toy_layers(image: Tensor, prompt: str) -> dict[str, Layer]:
    """The self-attention layers of the toy UNet for an image (1, 3, H, W) in [-1, 1], a row per timestep."""
    pipe = toy.load_pipeline()
    latents = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor(TIMESTEPS)
    noisy = pipe.scheduler.add_noise(latents.expand(len(times), -1, -1, -1), noise, times)
    text, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    found: dict[str, Layer] = {}

    def recorder(name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
        def look(query: Tensor, key: Tensor, value: Tensor) -> None:
            found[name] = Layer(query, key, value)

        return look

    layers = select_layers(pipe.unet, "self")
    with install_processors(layers, {name: CustomAttnProcessor(recorder(name)) for name in layers}):
        pipe.unet(noisy, times, encoder_hidden_states=text.expand(len(times), -1, -1))
    return found


def photograph() -> Tensor:
    """(1, 3, PHOTO_SIDE, PHOTO_SIDE) in [-1, 1]: the middle of the portrait that matplotlib ships."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        side = min(image.size)
        left, top = ((n - side) // 2 for n in image.size)
        small = image.convert("RGB").resize((PHOTO_SIDE, PHOTO_SIDE), box=(left, top, left + side, top + side))
    pixels = torch.tensor(list(small.tobytes()), dtype=torch.float32)
    return pixels.view(1, PHOTO_SIDE, PHOTO_SIDE, 3).movedim(3, 1) / 127.5 - 1


def layers_of_pictures() -> Iterator[tuple[str, str, Layer]]:
    """(kind, name, layer) of the toy UNet."""
    subject = world.references("ring")[0][:1]
    for kind, image, prompt in (
        ("toy UNet, rendered subject", subject, "a purple ring"),
        ("toy UNet, photograph", photograph(), ""),
    ):
        for name, layer in toy_layers(image, prompt).items():
            yield kind, name, layer


def errors(layer: Layer) -> list[dict[str, str]]:
    """The error of bf16, then of each dtype and granularity: of keys and values in 8 bits, and of each alone."""
    exact = reference.multi_source_attention(layer.query.double(), [Source(layer.key.double(), layer.value.double())])

    def error(key: Tensor, value: Tensor) -> str:
        query, key, value = (x.bfloat16() for x in (layer.query, key, value))
        return f"{harness.relative_error(multi_source_attention(query, [Source(key, value)]), exact):.3e}"

    plain = error(layer.key, layer.value)
    row = {"dtype": "bf16", "granularity": "", "bytes_of_bf16": "1"}
    rows = [row | {"error": plain, "error_keys": "", "error_values": ""}]
    _, tokens, _, head_dim = layer.key.shape
    for name, dtype in EIGHT_BITS.items():
        for granularity in GRANULARITIES:
            key, value = (stands_for(x, dtype, granularity) for x in (layer.key, layer.value))
            row = {"dtype": name, "granularity": granularity}
            row["bytes_of_bf16"] = f"{share_of_bytes(granularity, tokens, head_dim):.4f}"
            row["error"] = error(key, value)
            row["error_keys"], row["error_values"] = error(key, layer.value), error(layer.key, value)
            rows.append(row)
    return rows


def measure(layers: Iterator[tuple[str, str, Layer]]) -> list[dict[str, str]]:
    """The rows of the CSV."""
    found = []
    for kind, name, layer in layers:
        _, tokens, heads, head_dim = layer.key.shape
        about = {"inputs": kind, "layer": name, "tokens": str(tokens), "heads": str(heads), "head_dim": str(head_dim)}
        found += [about | row for row in errors(layer)]
    return found


def show(rows: list[dict[str, str]]) -> Table:
    """Errors in percent, means over the layers."""
    kinds = list(dict.fromkeys(row["inputs"] for row in rows))
    shown = Table("dtype", "a scale for each", *kinds, title="error in %, mean of layers")
    for dtype, granularity in dict.fromkeys((row["dtype"], row["granularity"]) for row in rows):
        cells = []
        for kind in kinds:
            key = (dtype, granularity, kind)
            same = [float(r["error"]) for r in rows if (r["dtype"], r["granularity"], r["inputs"]) == key]
            cells.append(f"{100 * statistics.mean(same):.2f}")
        shown.add_row(dtype, granularity, *cells, style="bold" if granularity == CHOSEN else None)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="write the rows there, with machine, versions and commit")
    options = parser.parse_args()
    rows = [*measure(random_layers()), *measure(layers_of_pictures())]
    Console(width=160).print(show(rows))
    if options.csv:
        table.write_csv(options.csv, rows, harness.machine())


if __name__ == "__main__":
    main()
