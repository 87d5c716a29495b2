"""Train the shipped toy weights on a CPU: `python -m lr_kernels.toy.train vae|judge|unet|evaluate|all --minutes N`.

Every training stage runs `--ranks` single-threaded processes (default 2) and averages their weights every few seconds.
On small convolutions two such processes are 1.5x as fast as one process with two threads, and they stay fast on a
machine shared with others. The stage "evaluate" trains nothing: its first process measures the saved model.
"""

import argparse
import copy
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from . import BASE, load_pipeline, models, world
from .data import IGNORED, TRAITS, JudgedScenes, near_miss_renders, rendered_scenes
from .judge import WEIGHTS as JUDGE_WEIGHTS
from .judge import Judge, Verdict, crop, evaluate, identity, load_judge, overlap, shape_rates
from .trainer import Run, Trainer

MANIFEST = BASE / "manifest.json"
DEFAULT_MINUTES = {"vae": 9, "judge": 20, "unet": 70, "evaluate": 1}
CHECKPOINT_SECONDS = 600
OBJECT_WEIGHT = 4.0


def to_images(arrays: np.ndarray) -> Tensor:
    """Images [N, H, W, 3] uint8 -> tensor [N, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_grid(images: Tensor, path: Path, columns: int = 6, zoom: int = 3) -> None:
    """Write images [N, 3, H, W] in [-1, 1] as one PNG with `columns` images per row."""
    n, _, height, width = images.shape
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = -(-n // columns)
    canvas = np.full((rows * (height + 2), columns * (width + 2), 3), 255, np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        canvas[top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).resize((canvas.shape[1] * zoom, canvas.shape[0] * zoom), Image.Resampling.NEAREST).save(
        path
    )


def update_manifest(stage: str, **facts: object) -> None:
    """Replace one stage's entry in the manifest beside the weights."""
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    manifest[stage] = facts
    manifest["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")


def draw_batch(count: int, batch: int) -> Tensor:
    """Random indices below count: [batch]."""
    return torch.randint(0, count, (batch,))


def on_objects(masks: Tensor) -> Tensor:
    """Weights of mean 1 per image for masks [B, H, W] in [0, 1]: objects are small and have all the detail."""
    weights = 1 + OBJECT_WEIGHT * masks
    return (weights / weights.mean((1, 2), keepdim=True))[:, None]


def autoencoder_loss(vae: AutoencoderKL, images: Tensor, masks: Tensor) -> Tensor:
    """L1 and L2 on pixels, L1 on the differences of neighbouring pixels, and a KL term of small weight.

    images: [B, 3, H, W]; masks: [B, H, W], which give the pixels of objects more weight.
    """
    with models.training_precision():
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample.float()
    weights, wrong = on_objects(masks), decoded - images
    loss = (weights * (wrong.abs() + wrong**2)).mean()
    for axis in (2, 3):
        loss = loss + 0.5 * (weights.narrow(axis, 1, weights.shape[axis] - 1) * wrong.diff(dim=axis).abs()).mean()
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return loss + 1e-4 * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> Tensor:
    """Posterior means [N, C, 16, 16] of images [N, H, W, 3] uint8, scaled as the UNet sees them."""
    parts = [vae.encode(to_images(images[i : i + batch])).latent_dist.mean for i in range(0, len(images), batch)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Fold the latents' mean and deviation per channel into the 1x1 convolutions around them.

    The standard deviation is then 1, so the scaling factor stays 1; returns it as measured.
    """
    latents = encode(vae, images)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    c = latents.shape[1]
    inner, outer = vae.post_quant_conv, vae.quant_conv
    inner.bias += inner.weight[:, :, 0, 0] @ mean
    inner.weight *= deviation.view(1, c, 1, 1)
    outer.bias[:c] = (outer.bias[:c] - mean) / deviation
    outer.weight[:c] /= deviation.view(c, 1, 1, 1)
    outer.bias[c:] -= 2 * deviation.log()
    return encode(vae, images).std().item()


def train_vae(run: Run, batch: int = 12) -> None:
    """The autoencoder, on random quarter images for the first 60 % of the time, which is 4x as fast."""
    scenes = rendered_scenes("autoencoder", 12000, seed=run.seed + 1 + 10 * run.resume)
    images, held_out = scenes.images[:-500], scenes.images[-500:]
    vae = AutoencoderKL.from_pretrained(BASE / "vae") if run.resume else models.build_vae()
    trainer = Trainer(run, [vae], learning_rate=1e-3 if run.resume else 2e-3, ema_decay=0.995)
    torch.manual_seed(run.seed + 1000 + 500 * run.resume + run.rank)
    size = models.SIDE // 2
    while trainer.running:
        if trainer.fraction < 0.6:
            picks, (top, left) = draw_batch(len(images), 3 * batch), torch.randint(0, size + 1, (2,)).tolist()
            part: Any = picks.numpy(), slice(top, top + size), slice(left, left + size)
        else:
            part = draw_batch(len(images), batch).numpy()
        masks = torch.from_numpy(scenes.masks[part]).float() / 255
        trainer.update(autoencoder_loss(vae, to_images(images[part]), masks))
    if not run.leads:
        return
    vae = trainer.averaged[0]
    deviation = standardize_latents(vae, images[:1000])
    with torch.no_grad():
        decoded = vae.decode(encode(vae, held_out) / vae.config.scaling_factor).sample
    error = F.mse_loss(decoded.clamp(-1, 1), to_images(held_out)).item()
    vae.register_to_config(_name_or_path="")  # a loading path has no place in a saved config
    vae.half().save_pretrained(BASE / "vae", safe_serialization=True)
    facts = trainer.facts(batch) | {
        "latent_std": round(deviation, 4),
        "held_out_psnr": round(10 * math.log10(4 / error), 2),
    }
    update_manifest("vae_resumed" if run.resume else "vae", **facts)
    if run.samples:
        pairs = torch.stack([to_images(held_out[:24]), decoded[:24]], dim=1).flatten(0, 1)
        save_grid(pairs, run.samples / "vae.png", columns=12)


@torch.no_grad()
def decode(vae: AutoencoderKL, images: np.ndarray, batch: int = 16) -> np.ndarray:
    """What the autoencoder makes of images [N, H, W, 3] uint8, in the same form."""
    parts = []
    for start in range(0, len(images), batch):
        latents = encode(vae, images[start : start + batch]) / vae.config.scaling_factor
        decoded = (vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
        parts.append(decoded.round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def distort(images: Tensor) -> Tensor:
    """Renders [B, 3, H, W] with random contrast, tint, blur and noise, which generated images have and renders lack."""
    count = len(images)
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.lerp(images, blurred, torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5))
    images = images * (1 + 0.1 * torch.randn(count, 1, 1, 1)) + 0.04 * torch.randn(count, 3, 1, 1)
    return images + torch.randn_like(images) * torch.rand(count, 1, 1, 1) * 0.15


def roughen(masks: Tensor) -> Tensor:
    """Masks [B, H, W], each as it is, grown by one or two pixels, or shrunk by one: a found mask is never exact."""
    grown = F.max_pool2d(masks, 3, 1, 1)
    choices = torch.stack([masks, grown, F.max_pool2d(grown, 3, 1, 1), -F.max_pool2d(-masks, 3, 1, 1)])
    return choices[torch.randint(len(choices), (len(masks),)), torch.arange(len(masks))]


def judged_batch(scenes: JudgedScenes, picks: np.ndarray, mirrored: bool = False) -> tuple[Tensor, ...]:
    """Tensors of the picked JudgedScenes: images [B, 3, H, W] in [-1, 1], masks and asked [B, H, W], labels, colors."""
    parts = [to_images(scenes.images[picks]), *(torch.from_numpy(m[picks]) / 255 for m in (scenes.masks, scenes.asked))]
    if mirrored:
        parts = [part.flip(-1) for part in parts]
    return *parts, torch.from_numpy(scenes.labels[picks]), torch.from_numpy(scenes.colors[picks])


def judge_loss(judge: Judge, images: Tensor, masks: Tensor, asked: Tensor, labels: Tensor, colors: Tensor) -> Tensor:
    """Sum of the six tasks' losses for a judged batch.

    One in two scenes with a single object is read inside the mask that the judge finds, as in use, and all others
    inside roughened true masks. Scenes without an object count for mask and background alone.
    """
    found, background = judge.finder(images)
    alone = (masks == asked).flatten(1).all(1) & (torch.rand(len(masks)) < 0.5)
    within = torch.where(alone[:, None, None], (found.detach() > 0).float(), roughen(asked))
    verdict = Verdict(found, background, *judge.namer(crop(images, within)))
    loss = 2 * F.binary_cross_entropy_with_logits(verdict.mask, masks)
    for logits, truth in zip((verdict.background, verdict.shape, verdict.texture, verdict.dot), labels.T, strict=True):
        loss = loss + 0.5 * F.cross_entropy(logits, truth, ignore_index=IGNORED)
    shown = labels[:, 1] != IGNORED
    return loss + 2 * F.binary_cross_entropy_with_logits(verdict.colors[shown], colors[shown])


@torch.no_grad()
def judge_accuracy(judge: Judge, scenes: JudgedScenes, picks: np.ndarray) -> dict[str, float]:
    """A judge on the picked JudgedScenes, read inside the mask of the object asked about.

    Returns its mask IoU where an object is shown, and the shares of right backgrounds, shapes, textures, dots, and sets
    of colours.
    """
    images, masks, asked, labels, colors = judged_batch(scenes, picks)
    verdict = judge(images, asked)
    shown = labels[:, 1] != IGNORED
    shares = {"mask_iou": overlap((verdict.mask > 0).float(), (masks > 0.5).float())[shown].mean()}
    for name, truth in zip(("background", "shape", "texture", "dot"), labels.T, strict=True):
        right = getattr(verdict, name).argmax(1) == truth
        shares[name] = right[truth != IGNORED].float().mean()
    shares["colors"] = ((verdict.colors > 0) == (colors > 0)).all(1)[shown].float().mean()
    return {name: round(share.item(), 4) for name, share in shares.items()}


@torch.no_grad()
def judge_identities(vae: AutoencoderKL) -> dict[str, object]:
    """Mean identity, by the shipped judge, of what it has to tell apart.

    Per subject: its true renders, and these through the autoencoder; per trait: all subjects' near misses in it.
    """

    def mean_identity(images: Tensor, subject: str) -> float:
        return round(identity(images, subject).mean().item(), 4)

    renders = {subject: world.true_renders(subject)[0] for subject in world.SUBJECTS}
    decoded = {subject: vae.decode(vae.encode(images).latent_dist.mean).sample for subject, images in renders.items()}
    misses = {
        trait: [mean_identity(near_miss_renders(subject, trait), subject) for subject in world.SUBJECTS]
        for trait in TRAITS
    }
    return {
        "identity_of_true_renders": {subject: mean_identity(images, subject) for subject, images in renders.items()},
        "identity_of_decoded_renders": {subject: mean_identity(images, subject) for subject, images in decoded.items()},
        "identity_of_near_misses": {trait: round(float(np.mean(found)), 4) for trait, found in misses.items()},
    }


def train_judge(run: Run, batch: int = 32, held_out: int = 1000) -> None:
    """The judge, on distorted renders, one in four of them through the autoencoder; each rank has its own share."""
    scenes = rendered_scenes("judge", 20000, seed=run.seed + 2)
    vae = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float32).eval()
    train = np.arange(len(scenes.images) - held_out)[run.rank :: run.ranks]
    scenes.images[train[::4]] = decode(vae, scenes.images[train[::4]])
    judge = Judge()
    if run.resume:
        judge.load_state_dict(load_file(JUDGE_WEIGHTS))
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stub leaves it out
    trainer = Trainer(run, [judge], learning_rate=1e-3 if run.resume else 3e-3, ema_decay=0.99)
    torch.manual_seed(run.seed + 2000 + 500 * run.resume + run.rank)
    while trainer.running:
        picks = train[draw_batch(len(train), batch).numpy()]
        images, *truth = judged_batch(scenes, picks, mirrored=trainer.step % 2 == 1)
        images = distort(images).contiguous(memory_format=torch.channels_last)
        trainer.update(judge_loss(judge, images, *truth))
    if not run.leads:
        return
    judge.eval()  # batch norm keeps its statistics here, not in the average; the schedule has already annealed
    weights = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in judge.state_dict().items()
    }
    save_file(weights, JUDGE_WEIGHTS)
    load_judge.cache_clear()
    test = np.arange(len(scenes.images) - held_out, len(scenes.images))
    facts = {"scenes": len(scenes.images), "held_out": judge_accuracy(judge, scenes, test)}
    scenes.images[test] = decode(vae, scenes.images[test])
    facts["held_out_decoded"] = judge_accuracy(judge, scenes, test)
    update_manifest(
        "judge_resumed" if run.resume else "judge", **trainer.facts(batch), **facts, **judge_identities(vae)
    )


def save_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Write the pipeline folder in half precision, leaving the given modules as they are."""
    halves = (copy.deepcopy(part).half() for part in (vae, unet, text_encoder))
    half_vae, half_unet, half_encoder = halves
    models.build_pipeline(half_vae, half_unet, half_encoder, tokenizer).save_pretrained(BASE, safe_serialization=True)


PREVIEW_PROMPTS = (
    *(f"{world.CLASS_PROMPT} on {name}" for name in world.BACKGROUNDS),
    *("a red ball on grass", "a striped yellow ball on night", "a striped blue box on sky"),
    *("a green cross on sand", "a ring on bricks", "a spotted white star on checker"),
)


def sample(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int = 0, guidance: float = 3.0, steps: int = 20
) -> Tensor:
    """Images [N, 3, 64, 64] in [-1, 1] for N prompts, each from its own part of one seed's noise."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "height": world.SIDE, "width": world.SIDE}
    images = pipeline(list(prompts), generator=generator, output_type="pt", **arguments).images
    return images.float() * 2 - 1


def train_unet(run: Run, batch: int = 12) -> None:
    """The UNet with the text encoder, on latents encoded once; each rank works on its own share of the scenes."""
    scenes = rendered_scenes("base", 24000, seed=run.seed + 3 + 10 * run.resume)
    share = slice(run.rank, None, run.ranks)
    vae = AutoencoderKL.from_pretrained(BASE / "vae").eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="")  # a loading path has no place in a saved config
    tokenizer = models.build_tokenizer()
    if run.resume:
        text_encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder", dtype=torch.float32)
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # where words have come since
        unet = UNet2DConditionModel.from_pretrained(BASE / "unet", torch_dtype=torch.float32)
    else:
        text_encoder, unet = models.build_text_encoder(tokenizer), models.build_unet()
    ids = models.token_ids(tokenizer, scenes.captions[share].tolist())
    with models.training_precision():
        latents = encode(vae, scenes.images[share]).float()
    weights = on_objects(F.avg_pool2d(torch.from_numpy(scenes.masks[share]).float() / 255, models.DOWNSAMPLING))
    no_prompt = models.token_ids(tokenizer, [""])
    alphas_cumprod = models.build_scheduler().alphas_cumprod
    trainer = Trainer(run, [unet.train(), text_encoder.train()], learning_rate=1e-3, ema_decay=0.999)
    torch.manual_seed(run.seed + 3000 + 500 * run.resume + run.rank)
    saved = 0.0
    while trainer.running:
        picks = draw_batch(len(latents), batch)
        prompts = torch.where(torch.rand(batch, 1) < 0.1, no_prompt, ids[picks])
        timesteps = models.stratified_timesteps(batch)
        noise = torch.randn_like(latents[picks])
        noisy, target = models.velocity_target(latents[picks], noise, timesteps, alphas_cumprod)
        with models.training_precision():
            velocity = unet(noisy, timesteps, text_encoder(prompts).last_hidden_state).sample
        trainer.update((weights[picks] * (velocity.float() - target) ** 2).mean())
        if run.leads and (trainer.seconds - saved > CHECKPOINT_SECONDS or not trainer.running):
            saved = trainer.seconds
            averaged_unet, averaged_encoder = trainer.averaged
            save_pipeline(vae, averaged_unet, averaged_encoder, tokenizer)
            stage = "unet_resumed" if run.resume else "unet"
            update_manifest(stage, **trainer.facts(batch), latents=len(scenes.images))
            if run.samples:
                pipeline = models.build_pipeline(vae, averaged_unet, averaged_encoder, tokenizer)
                save_grid(sample(pipeline, PREVIEW_PROMPTS), run.samples / f"unet_{int(saved / 60):03d}.png")


def evaluate_base(run: Run, seed: int = 7, per_background: int = 6) -> None:
    """Write into the manifest how often "a ball on ..." of the saved base model is judged a ball, for every class."""
    if not run.leads:
        return
    names = [name for name in world.BACKGROUNDS for _ in range(per_background)]
    pipeline = load_pipeline(BASE)
    images = {shape: sample(pipeline, [f"a {shape} on {name}" for name in names], seed) for shape in world.SHAPES}
    rates = {shape: round(shape_rates(x, shape), 4) for shape, x in images.items()}
    facts = {"seed": seed, "images_per_class": len(names), "guidance": 3.0, "inference_steps": 20}
    backgrounds = [evaluate(x, names)["background"] for x in images.values()]
    update_manifest("base_model", **facts, class_rates=rates, background=round(float(np.mean(backgrounds)), 4))
    if run.samples:
        save_grid(torch.cat([x[::3] for x in images.values()]), run.samples / "base_model.png", columns=12)


STAGES: dict[str, Callable[[Run], None]] = {
    "vae": train_vae,
    "judge": train_judge,
    "unet": train_unet,
    "evaluate": evaluate_base,
}


def work(rank: int, ranks: int, stage: str, minutes: float, seed: int, samples: Path | None, resume: bool) -> None:
    """One training process; all ranks start from the same weights and then draw different batches."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29517 + list(DEFAULT_MINUTES).index(stage)))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    STAGES[stage](Run(minutes, seed, rank, ranks, samples, resume))
    torch.distributed.destroy_process_group()


def main() -> None:
    """Train the stages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--minutes", type=float, help=f"per stage; default {DEFAULT_MINUTES}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="training processes, one core each")
    parser.add_argument("--resume", action="store_true", help="start from the saved weights (vae, judge, unet)")
    parser.add_argument("--samples", type=Path, help="folder for sample pictures")
    args = parser.parse_args()
    for stage in STAGES if args.stage == "all" else (args.stage,):
        minutes = args.minutes or DEFAULT_MINUTES[stage]
        settings = (args.ranks, stage, minutes, args.seed, args.samples, args.resume)
        torch.multiprocessing.spawn(work, settings, nprocs=args.ranks)


if __name__ == "__main__":
    main()
