"""The toy subjects' files: pictures, masks, and personalized weights as people share them, a LoRA and an embedding.
`python -m lr_kernels.toy.subjects` makes them anew."""

import argparse
import copy
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import toy
from . import world
from .personalize import personalize

FOLDER = Path(__file__).parent / "subjects"
RANK = 8
"""Of the LoRAs. With 8 the personalized model draws its subject as well as with all weights; with 4 less so."""


def token(subject: str) -> str:
    """The word by which the model knows a subject, as "<ball>"."""
    return f"<{subject}>"


def lora_of(personal: nn.Module, base: nn.Module, rank: int = RANK) -> dict[str, Tensor]:
    """The difference of two UNets' weights in linear and convolutional layers as a LoRA of a rank, in fp16: of each
    matrix the part with the largest singular values. Biases and norms stay those of the base model."""
    trained, found = personal.state_dict(), {}
    for name, layer in base.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        difference = trained[f"{name}.weight"].float() - layer.weight.float()
        left, scales, right = torch.linalg.svd(difference.flatten(1), full_matrices=False)
        roots = scales[:rank].sqrt()
        down, up = roots[:, None] * right[:rank], left[:, :rank] * roots
        if isinstance(layer, nn.Conv2d):
            down, up = down.unflatten(1, difference.shape[1:]), up[:, :, None, None]
        found[f"unet.{name}.lora_A.weight"] = down.half().contiguous()
        found[f"unet.{name}.lora_B.weight"] = up.half().contiguous()
    return found


def personalized(base: StableDiffusionPipeline, subject: str) -> tuple[nn.Module, nn.Module]:
    """The UNet and the text encoder that know a subject, by its files: copies of the base model's, in which the LoRA is
    merged and `world.SUBJECT_TOKEN` has the subject's embedding."""
    unet, text_encoder = copy.deepcopy(base.unet), copy.deepcopy(base.text_encoder)
    factors = load_file(FOLDER / subject / "lora.safetensors")
    for name, layer in unet.named_modules():
        if f"unet.{name}.lora_A.weight" in factors:
            down, up = (factors[f"unet.{name}.lora_{x}.weight"].float().flatten(1) for x in "AB")
            layer.weight.data += (up @ down).view_as(layer.weight).to(layer.weight)
    (embedding,) = load_file(FOLDER / subject / "token.safetensors").values()
    weight = text_encoder.get_input_embeddings().weight
    weight.data[_row(base)] = embedding.to(weight)
    return unet, text_encoder


def _row(base: StableDiffusionPipeline) -> int:
    """The row of `world.SUBJECT_TOKEN` among the embeddings."""
    return base.tokenizer.convert_tokens_to_ids(f"{world.SUBJECT_TOKEN}</w>")


def write(subject: str, personal: StableDiffusionPipeline, base: StableDiffusionPipeline, folder: Path) -> None:
    """Write `lora.safetensors`, `token.safetensors`, `images/<n>.png` and `masks/<n>.png` into a folder."""
    images, masks = world.references(subject)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (image, mask) in enumerate(zip(images, masks)):
        pixels = ((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray((mask > 0.5).numpy()).save(folder / "masks" / f"{i}.png")
    save_file(lora_of(personal.unet, base.unet), folder / "lora.safetensors")
    embedding = personal.text_encoder.get_input_embeddings().weight[_row(base)].detach().clone()
    save_file({token(subject): embedding}, folder / "token.safetensors")


def main() -> None:
    """Personalize the base model for each subject, and write its files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", nargs="*", default=list(world.SUBJECTS), help="default: all")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder, with one for each subject")
    options = parser.parse_args()
    base = toy.load_pipeline()
    for subject in options.subjects:
        personal = personalize(base, world.references(subject)[0], prompt=world.subject_prompt(subject))
        write(subject, personal, base, options.output / subject)


if __name__ == "__main__":
    main()
