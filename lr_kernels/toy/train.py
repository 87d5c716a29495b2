"""Train the shipped toy weights on a CPU: `python -m lr_kernels.toy.train vae|judge|unet|evaluate|all --minutes N`.

Every stage runs one single-threaded process per core and averages their weights every few seconds. On small
convolutions that is 1.5x faster than one process with two threads, and it stays fast on a machine shared with others.
"""

import argparse
import copy
import json
import math
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextModel

from lr_kernels.toy import BASE, load_pipeline, models, world
from lr_kernels.toy.data import rendered_scenes
from lr_kernels.toy.judge import WEIGHTS as JUDGE_WEIGHTS
from lr_kernels.toy.judge import Judge, evaluate, overlap

MANIFEST = BASE / "manifest.json"
DEFAULT_MINUTES = {"vae": 9, "judge": 4, "unet": 70, "evaluate": 1}
CHECKPOINT_SECONDS = 240
WARMUP_STEPS = 150
AVERAGING_SECONDS = 8


@dataclass(frozen=True)
class Run:
    """What every training process is told; rank 0 also logs and saves."""

    minutes: float
    seed: int
    rank: int
    ranks: int
    samples: Path | None
    resume: bool

    @property
    def leads(self):
        return self.rank == 0


def to_images(arrays):
    """Images [N, H, W, 3] uint8 -> tensor [N, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_grid(images, path, columns=6, zoom=3):
    """Write images [N, 3, H, W] in [-1, 1] as one PNG with `columns` images per row."""
    n, _, height, width = images.shape
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = -(-n // columns)
    canvas = np.full((rows * (height + 2), columns * (width + 2), 3), 255, np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        canvas[top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).resize((canvas.shape[1] * zoom, canvas.shape[0] * zoom), Image.NEAREST).save(path)


def update_manifest(stage, **facts):
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


@dataclass
class Trainer:
    """AdamW on every rank, weights averaged over ranks and over time, and a schedule over wall-clock time."""

    run: Run
    modules: list
    learning_rate: float
    ema_decay: float
    weight_decay: float = 1e-4
    step: int = 0
    fraction: float = 0.0
    steps_of_all_ranks: int = 0
    losses: list = field(default_factory=list)

    def __post_init__(self):
        self.parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.learning_rate, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True
        )
        self.averaged = [copy.deepcopy(module).eval() for module in self.modules]
        self.average = [p for module in self.averaged for p in module.parameters() if p.requires_grad]
        torch.distributed.barrier()
        self.started = time.time()
        self.next_average = AVERAGING_SECONDS
        self.progress = tqdm(total=round(self.run.minutes * 60), unit="s", disable=not self.run.leads, mininterval=15)

    @property
    def seconds(self):
        return time.time() - self.started

    @property
    def running(self):
        return self.fraction < 1

    def schedule(self):
        """Learning rate: warm-up, constant for 40 % of the time, then a cosine down to 3 %."""
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, self.fraction - 0.4) / 0.6))
        return self.learning_rate * min(1, (self.step + 1) / WARMUP_STEPS) * (0.03 + 0.97 * decay)

    def average_over_ranks(self):
        """Average the weights over all ranks at fixed times, so that no rank waits for another in between."""
        while self.seconds >= self.next_average <= 60 * self.run.minutes:
            flat = torch.cat([p.data.flatten() for p in self.parameters] + [torch.tensor([float(self.step)])])
            torch.distributed.all_reduce(flat)
            self.steps_of_all_ranks = round(flat[-1].item())
            flat /= self.run.ranks
            offset = 0
            for parameter in self.parameters:
                parameter.data.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
                offset += parameter.numel()
            self.next_average += AVERAGING_SECONDS

    def update(self, loss):
        """One optimizer step from this rank's loss, a scalar tensor."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule()
        self.optimizer.step()
        self.average_over_ranks()
        self.fraction = min(1.0, self.seconds / (60 * self.run.minutes))
        self.losses.append(loss.item())
        self.step += 1
        decay = min(self.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.data for p in self.parameters], 1 - decay)
        self.progress.update(min(self.progress.total, int(self.seconds)) - self.progress.n)
        if self.step % 100 == 0:
            self.progress.set_postfix(step=self.step, loss=f"{self.recent_loss(100):.4f}", refresh=False)

    def recent_loss(self, window=400):
        return float(np.mean(self.losses[-window:]))

    def facts(self, batch):
        """What the manifest says about this training; batch is the number of samples per rank and step."""
        return {
            "seed": self.run.seed,
            "steps": self.step,
            "samples": self.steps_of_all_ranks * batch,
            "minutes": round(self.seconds / 60, 2),
            "threads": self.run.ranks,
            "learning_rate": self.learning_rate,
            "loss": round(self.recent_loss(), 5),
            "parameters": sum(p.numel() for p in self.parameters),
        }


def draw_batch(count, batch):
    """Random indices below count: [batch]."""
    return torch.randint(0, count, (batch,))


def autoencoder_loss(vae, images):
    """L1 on pixels and on their differences plus a light KL term, for images [B, 3, H, W]."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample.float()
    loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis))
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return loss + 1e-4 * kl


@torch.no_grad()
def encode(vae, images, batch=64):
    """Posterior means [N, C, 16, 16] of images [N, H, W, 3] uint8, scaled as the UNet sees them."""
    parts = [vae.encode(to_images(images[i : i + batch])).latent_dist.mean for i in range(0, len(images), batch)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def standardize_latents(vae, images):
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


def train_vae(run, batch=12):
    """The autoencoder, on random quarter images for the first 60 % of the time, which is 4x as fast."""
    scenes = rendered_scenes("autoencoder", 12000, seed=run.seed + 1)
    images, held_out = scenes.images[:-500], scenes.images[-500:]
    vae = AutoencoderKL.from_pretrained(BASE / "vae") if run.resume else models.build_vae()
    trainer = Trainer(run, [vae], learning_rate=2e-3, ema_decay=0.995)
    torch.manual_seed(run.seed + 1000 + 500 * run.resume + run.rank)
    size = models.SIDE // 2
    while trainer.running:
        if trainer.fraction < 0.6:
            picks, (top, left) = draw_batch(len(images), 3 * batch), torch.randint(0, size + 1, (2,)).tolist()
            pixels = images[picks.numpy(), top : top + size, left : left + size]
        else:
            pixels = images[draw_batch(len(images), batch).numpy()]
        trainer.update(autoencoder_loss(vae, to_images(pixels)))
    if not run.leads:
        return
    vae = trainer.averaged[0]
    deviation = standardize_latents(vae, images[:1000])
    with torch.no_grad():
        decoded = vae.decode(encode(vae, held_out) / vae.config.scaling_factor).sample
    error = F.mse_loss(decoded.clamp(-1, 1), to_images(held_out)).item()
    vae.half().save_pretrained(BASE / "vae", safe_serialization=True)
    facts = trainer.facts(batch) | {
        "latent_std": round(deviation, 4),
        "held_out_psnr": round(10 * math.log10(4 / error), 2),
    }
    update_manifest("vae_resumed" if run.resume else "vae", **facts)
    if run.samples:
        pairs = torch.stack([to_images(held_out[:24]), decoded[:24]], dim=1).flatten(0, 1)
        save_grid(pairs, run.samples / "vae.png", columns=12)


def distort(images):
    """Renders [B, 3, H, W] with random contrast, blur and noise, which generated images have and renders lack."""
    count = len(images)
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.lerp(images, blurred, torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5))
    images = images * (1 + 0.1 * torch.randn(count, 1, 1, 1))
    return images + torch.randn_like(images) * torch.rand(count, 1, 1, 1) * 0.15


def judge_loss(verdict, masks, labels):
    """Sum of the four tasks' losses for masks [B, H, W] in [0, 1] and labels [B, 3]."""
    background, shape, subject = labels.unbind(1)
    loss = F.binary_cross_entropy_with_logits(verdict.mask, masks)
    loss = loss + 0.5 * F.cross_entropy(verdict.background, background)
    loss = loss + 0.5 * F.cross_entropy(verdict.shape, shape)
    return loss + F.binary_cross_entropy_with_logits(verdict.subject, subject.float())


@torch.no_grad()
def judge_accuracy(judge, images, masks, labels):
    """Held-out mask IoU and accuracies of a judge."""
    verdict = judge(images)
    found, truth = (verdict.mask > 0).float(), (masks > 0.5).float()
    return {
        "held_out_mask_iou": round(overlap(found, truth).mean().item(), 4),
        "held_out_background": round((verdict.background.argmax(1) == labels[:, 0]).float().mean().item(), 4),
        "held_out_shape": round((verdict.shape.argmax(1) == labels[:, 1]).float().mean().item(), 4),
        "held_out_subject": round(((verdict.subject > 0) == (labels[:, 2] > 0)).float().mean().item(), 4),
    }


def train_judge(run, batch=32):
    """The judge, on distorted renders."""
    scenes = rendered_scenes("judge", 10000, seed=run.seed + 2)
    masks, labels = torch.from_numpy(scenes.masks), torch.from_numpy(scenes.labels)
    held_out = 500
    judge = Judge()
    if run.resume:
        judge.load_state_dict(load_file(JUDGE_WEIGHTS))
    trainer = Trainer(run, [judge], learning_rate=2e-3, ema_decay=0.99)
    torch.manual_seed(run.seed + 2000 + 500 * run.resume + run.rank)
    while trainer.running:
        picks = draw_batch(len(masks) - held_out, batch)
        verdict = judge(distort(to_images(scenes.images[picks.numpy()])))
        trainer.update(judge_loss(verdict, masks[picks].float() / 255, labels[picks]))
    if not run.leads:
        return
    judge.eval()  # batch norm keeps its statistics here, not in the average; the schedule has already annealed
    weights = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    save_file(weights, JUDGE_WEIGHTS)
    images = to_images(scenes.images[-held_out:])
    accuracy = judge_accuracy(judge, images, masks[-held_out:].float() / 255, labels[-held_out:])
    update_manifest("judge_resumed" if run.resume else "judge", **trainer.facts(batch), **accuracy)


def save_pipeline(vae, unet, text_encoder, tokenizer):
    """Write the pipeline folder in half precision, leaving the given modules as they are."""
    parts = [copy.deepcopy(part).half() for part in (vae, unet, text_encoder)]
    models.build_pipeline(*parts, tokenizer).save_pretrained(BASE, safe_serialization=True)


PREVIEW_PROMPTS = (
    *(f"{world.CLASS_PROMPT} on {name}" for name in world.BACKGROUNDS),
    *("a red ball on grass", "a striped yellow ball on night", "a striped blue box on sky"),
    *("a green cross on sand", "a ring on bricks", "a spotted white star on checker"),
)


def sample(pipeline, prompts, seed=0, guidance=3.0, steps=20):
    """Images [N, 3, 64, 64] in [-1, 1] for N prompts, each from its own part of one seed's noise."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "height": world.SIDE, "width": world.SIDE}
    images = pipeline(list(prompts), generator=generator, output_type="pt", **arguments).images
    return images.float() * 2 - 1


def train_unet(run, batch=12):
    """The UNet with the text encoder, on latents encoded once; each rank works on its own share of the scenes."""
    scenes = rendered_scenes("base", 24000, seed=run.seed + 3)
    share = slice(run.rank, None, run.ranks)
    vae = AutoencoderKL.from_pretrained(BASE / "vae").eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="")  # a loading path has no place in a saved config
    tokenizer = models.build_tokenizer()
    if run.resume:
        text_encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder", dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(BASE / "unet", torch_dtype=torch.float32)
    else:
        text_encoder, unet = models.build_text_encoder(tokenizer), models.build_unet()
    unet.set_attn_processor(AttnProcessor())  # plain batched products: faster to train here than fused attention
    ids = models.token_ids(tokenizer, scenes.captions[share].tolist())
    with torch.autocast("cpu", torch.bfloat16):
        latents = encode(vae, scenes.images[share]).float()
    no_prompt = models.token_ids(tokenizer, [""])
    alphas_cumprod = models.build_scheduler().alphas_cumprod
    rate = 5e-4 if run.resume else 1e-3
    trainer = Trainer(run, [unet.train(), text_encoder.train()], learning_rate=rate, ema_decay=0.999)
    torch.manual_seed(run.seed + 3000 + 500 * run.resume + run.rank)
    saved = 0.0
    while trainer.running:
        picks = draw_batch(len(latents), batch)
        prompts = torch.where(torch.rand(batch, 1) < 0.1, no_prompt, ids[picks])
        timesteps = models.stratified_timesteps(batch)
        noise = torch.randn_like(latents[picks])
        noisy, target = models.velocity_target(latents[picks], noise, timesteps, alphas_cumprod)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = unet(noisy, timesteps, text_encoder(prompts).last_hidden_state).sample
        trainer.update(F.mse_loss(velocity.float(), target))
        if run.leads and (trainer.seconds - saved > CHECKPOINT_SECONDS or not trainer.running):
            saved = trainer.seconds
            save_pipeline(vae, *trainer.averaged, tokenizer)
            stage = "unet_resumed" if run.resume else "unet"
            update_manifest(stage, **trainer.facts(batch), latents=len(scenes.images))
            if run.samples:
                pipeline = models.build_pipeline(vae, *trainer.averaged, tokenizer)
                save_grid(sample(pipeline, PREVIEW_PROMPTS), run.samples / f"unet_{int(saved / 60):03d}.png")


def evaluate_base(run, seed=7, per_background=6):
    """Write the judge's metrics of the saved base model on "a ball on ..." into the manifest."""
    if not run.leads:
        return
    names = [name for name in world.BACKGROUNDS for _ in range(per_background)]
    images = sample(load_pipeline(BASE), [f"{world.CLASS_PROMPT} on {name}" for name in names], seed)
    facts = {"seed": seed, "images": len(images), "guidance": 3.0, "inference_steps": 20}
    update_manifest("base_model", **facts, **evaluate(images, names))
    if run.samples:
        save_grid(images, run.samples / "base_model.png", columns=12)


STAGES = {"vae": train_vae, "judge": train_judge, "unet": train_unet, "evaluate": evaluate_base}


def work(rank, ranks, stage, minutes, seed, samples, resume):
    """One training process; all ranks start from the same weights and then draw different batches."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29517 + list(DEFAULT_MINUTES).index(stage)))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    STAGES[stage](Run(minutes, seed, rank, ranks, samples, resume))
    torch.distributed.destroy_process_group()


def main():
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
