"""Every preset of `lr_kernels.presets` on the toy model: a row of images each, of the same prompts from the same noise.

Each runs much as in its paper, in diffusers' own StableDiffusionPipeline. The pictures attend to one another or to
further rows of the batch: a real image, noised to the level of every step, or condition images that are denoised too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .. import correspondence, presets, subject_mask, toy
from ..diffusers import AttentionState, TokenMapAttnProcessor, install_processors, select_layers
from ..diffusers.methods.sharing import sharing
from .personalize import encode_references

STEPS, GUIDANCE, SEED = 20, 3.0, 5
PLACES = ("sand", "sand", "grass", "bricks", "night", "sky")
MAP_MEMORY = 0.6
"""How much of its cross-attention maps a row keeps in each step, since the maps of single steps are noisy."""
DECODER = ("up_blocks",)


@dataclass(frozen=True)
class Method:
    """A row of the gallery; its attention gets the queries, keys and values of all rows of the UNet's batch."""

    label: str
    attention: Callable[[Tensor, Tensor, Tensor, "Batch"], Tensor] | None = None
    start: float = 0.1
    """share of the steps that run before the method starts; above 0 where it needs the previous step's masks"""
    layers: Sequence[str] | None = None
    sources: int = 0
    """how many of the pictures, from the first on, the others attend to (no `Source` objects)"""
    reference: bool = False
    conditions: bool = False


class Batch:
    """The batch rows that are denoised together: the pictures, then a condition image for each and the reference where
    the method has them. All of them come twice, as the unconditional and the conditional half of the guidance.

    Args:
        noise: (n, C, h, w), where the n pictures of the n prompts start.
    """

    def __init__(
        self, pipe: StableDiffusionPipeline, method: Method, noise: Tensor, prompts: Sequence[str], steps: int
    ):
        self.pipe, self.method, self.noise, self.steps = pipe, method, noise, steps
        copies = 2 if method.conditions else 1
        self.images = len(prompts)
        self.prompts = [*prompts] * copies + [toy.CLASS_PROMPT] * method.reference
        self.half = len(self.prompts)
        self.latents = torch.cat([noise] * copies)
        self.step, self.grid = 0, (0, 0)
        self.masks: dict[tuple[int, int], Tensor] = {}
        """the subject of every row of a half, bool (rows, N), by the grid of the N tokens"""
        self.maps: Tensor | None = None
        if method.reference:
            images, masks = toy.references()
            self.clean, self.reference_mask = encode_references(pipe, images[:1]), masks[:1]
            pipe.scheduler.set_timesteps(steps)
            self.latents = torch.cat([self.latents, self.noised_reference()])

        place = pipe.tokenizer.tokenize(toy.CLASS_PROMPT).index("ball</w>") + 1  # the first token begins the text
        tokens = torch.full((2 * self.half, 1), place, dtype=torch.int32)
        state = AttentionState(capturing=True, token_indices=tokens)
        self.cross = select_layers(pipe.unet, "cross", [1])
        self.recorders = {name: TokenMapAttnProcessor(state) for name in self.cross}

    @torch.no_grad()
    def draw(self) -> Tensor:
        """The pictures, (n, 3, height, width) in [0, 1]."""
        common = {"num_inference_steps": self.steps, "guidance_scale": GUIDANCE, "output_type": "pt"}
        if self.method.attention is None:
            return self.pipe(self.prompts, latents=self.latents, **common).images
        start = math.ceil(self.method.start * self.steps)
        method = sharing(self.pipe, self.attention, layers=self.method.layers, steps=start, rows=2 * self.half)
        with install_processors(self.cross, self.recorders), method:
            found = self.pipe(self.prompts, latents=self.latents, callback_on_step_end=self.after_step, **common)
        return found.images[: self.images]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, step: int, grid: tuple[int, int]) -> Tensor:
        """What `sharing` calls: the method's attention with this batch."""
        self.step, self.grid = step, grid
        assert self.method.attention is not None
        return self.method.attention(q, k, v, self)

    def after_step(self, pipe: StableDiffusionPipeline, step: int, timestep: Tensor, given: dict) -> dict:
        """A callback: make the masks of the next step, and noise the reference to the next step's level."""
        self.step = step + 1
        height, width = self.noise.shape[2:]
        recorded = [recorder.maps for recorder in self.recorders.values() if recorder.maps is not None]
        maps = [x[self.half :, :, 0].unflatten(1, (height, width)) for x in recorded]
        fresh = torch.stack(maps, 1)
        self.maps = fresh if self.maps is None else torch.lerp(fresh, self.maps, MAP_MEMORY)
        for scale in (1, 2):
            grid = height // scale, width // scale
            masks = subject_mask(self.maps, size=grid).flatten(1)
            if self.method.reference:
                masks[-1:] = F.adaptive_avg_pool2d(self.reference_mask, grid).flatten(1) > 0.5
            self.masks[grid] = masks
        if self.method.reference:
            given["latents"][-1:] = self.noised_reference()
        return given

    def noised_reference(self) -> Tensor:
        """Latents of the reference as the coming step expects them."""
        timestep = self.pipe.scheduler.timesteps[self.step : self.step + 1]
        return self.pipe.scheduler.add_noise(self.clean, self.noise[:1], timestep) if len(timestep) else self.clean

    def subjects(self) -> Tensor:
        """The subject of every row of the batch in this layer, bool (B, N)."""
        return self.masks[self.grid].repeat(2, 1)

    def others(self, row: int) -> Tensor:
        """The row table with which all pictures read one row of their half, and all other rows read themselves."""
        beside = range(self.images, self.half)
        return presets.guided_rows([row] * self.images + [*beside])

    def last(self, x: Tensor) -> Tensor:
        """x of the reference's batch row in each half, repeated for every row of that half: (B, …)."""
        return x[self.half - 1 :: self.half].repeat_interleave(self.half, 0)

    def conditional(self) -> Tensor:
        """bool (B,)"""
        return torch.arange(2 * self.half) >= self.half


def masactrl(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """All read the first picture."""
    return presets.masactrl(q, k, v, batch.others(0))


def masactrl_masked(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Subject from subject, background from background; the first picture itself sees all of itself."""
    return presets.masactrl(q, k, v, batch.others(0), batch.subjects(), batch.subjects())


def style_aligned(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """All follow the first picture."""
    return presets.style_aligned(q, k, v, batch.others(0))


def consistory(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """The first two pictures are the anchors."""
    return presets.consistory(q, k, v, (0, 1), batch.subjects(), halves=2)


def story_diffusion(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Half of the tokens of every picture, drawn anew for every step."""
    draw = torch.Generator().manual_seed(batch.step)
    plan = presets.story_diffusion_plan(len(q), q.shape[1], halves=2, generator=draw)
    return presets.story_diffusion(q, k, v, plan, halves=2)


def ip_adapter(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """The toy model has no image encoder: a picture's own keys stand for the text, the image tokens are those of the
    reference's subject. As in the paper, the unconditional half sees none of them."""
    subjects = batch.subjects()
    image = batch.last(k)[:, subjects[-1]], batch.last(v)[:, subjects[-1]]
    acts = batch.conditional() & (torch.arange(2 * batch.half) % batch.half < batch.images)
    return presets.ip_adapter(q, (k, v), [image], [0.5], [subjects & acts[:, None]])


def reference_only(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """All also read the reference, the unconditional half less."""
    rows = presets.guided_rows([batch.images] * batch.images + [-1])
    return presets.reference_only(q, k, v, rows, ~batch.conditional())


def dream_matcher(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Tokens match where their keys do; in the subject, where the way back ends nearby, values are the reference's."""
    match, consistent = correspondence(k.flatten(2), batch.last(k).flatten(2), radius=2.0, grid=batch.grid)
    return presets.dream_matcher(q, k, v, batch.last(v), match, (batch.subjects() & consistent).float())


def mca_ctrl(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """The subject is the reference's, the rest that of a condition image; these rows attend to themselves."""
    n, masks = batch.images, batch.subjects()
    beside = [-1] * (n + 1)
    subject, condition = (presets.guided_rows([*x, *beside]) for x in ([2 * n] * n, range(n, 2 * n)))
    return presets.mca_ctrl(q, k, v, subject, condition, masks, masks)


METHODS = {
    "stock": Method("stock model"),
    "masactrl": Method("MasaCtrl", masactrl, start=0.2, layers=DECODER, sources=1),
    "masactrl_masked": Method("MasaCtrl, masked", masactrl_masked, start=0.2, layers=DECODER, sources=1),
    "style_aligned": Method("StyleAligned", style_aligned, start=0, layers=DECODER, sources=1),
    "consistory": Method("ConsiStory", consistory, layers=DECODER, sources=2),
    "story_diffusion": Method("StoryDiffusion", story_diffusion, start=0),
    "ip_adapter": Method("IP-Adapter, masked", ip_adapter, layers=DECODER, reference=True),
    "reference_only": Method("reference-only", reference_only, start=0, reference=True),
    "dream_matcher": Method("DreamMatcher", dream_matcher, start=0.05, reference=True),
    "mca_ctrl": Method("MCA-Ctrl", mca_ctrl, reference=True, conditions=True),
}


def run(output: Path, *, seed: int = SEED, steps: int = STEPS) -> Path:
    """Draw every method and write `presets.png` into `output`; returns its path."""
    output.mkdir(parents=True, exist_ok=True)
    pipe = toy.load_pipeline()
    config, draw = pipe.unet.config, torch.Generator().manual_seed(seed)
    noise = torch.randn(len(PLACES), config.in_channels, config.sample_size, config.sample_size, generator=draw)
    prompts = [f"{toy.CLASS_PROMPT} on {place}" for place in PLACES]
    methods = tqdm(METHODS.items(), desc="presets")
    rows = {name: Batch(pipe, method, noise, prompts, steps).draw() for name, method in methods}
    path = output / "presets.png"
    ImageOps.posterize(picture(rows), 7).save(path, optimize=True)  # the eighth bit is noise, a fifth of the file
    return path


def picture(rows: dict[str, Tensor], scale: int = 2) -> Image.Image:
    """A labelled row per method, of images (n, 3, h, w) in [0, 1]; what the others read has a red frame."""
    side, gap, label, header = toy.SIDE * scale, 8, 170, 28
    font = ImageFont.load_default(16)
    step, left = side + gap, label + toy.SIDE * scale + 3 * gap
    canvas = Image.new("RGB", (left + len(PLACES) * step, header + len(rows) * step), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((label, 4), "reads", fill="red", font=font)
    for column, place in enumerate(PLACES):
        draw.text((left + column * step, 4), f"{toy.CLASS_PROMPT} on {place}", fill="black", font=font)
    reference = toy.references()[0][0] / 2 + 0.5
    for row, (name, images) in enumerate(rows.items()):
        method, top = METHODS[name], header + row * step
        draw.text((8, top + side // 2 - 8), method.label, fill="black", font=font)
        cells = [(left + i * step, image, i < method.sources) for i, image in enumerate(images)]
        if method.reference:
            cells.append((label, reference, True))
        for x, image, is_read in cells:
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            if is_read:
                draw.rectangle((x - 3, top - 3, x + side + 2, top + side + 2), fill="red")
            canvas.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, top))
    return canvas
