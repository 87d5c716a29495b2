"""Every preset of `lr_kernels.presets` on the toy model: a row of images each, of the same prompts from the same noise.

Each runs much as its paper has it, in diffusers' own StableDiffusionPipeline. What the pictures read besides one
another is in further rows of the batch: a real image noised to every step, or condition images denoised beside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from . import Source, correspondence, multi_source_attention, presets, subject_mask, toy
from .diffusers import AttentionState, CustomAttnProcessor, TokenMapAttnProcessor, install_processors, select_layers
from .toy.personalize import encode_references

STEPS, GUIDANCE, SEED = 20, 3.0, 5
PLACES = ("sand", "sand", "grass", "bricks", "night", "sky")
MAP_MEMORY = 0.6
"""How much of its cross-attention maps a row keeps in each step, since the maps of single steps are noisy."""
DECODER = ("up_blocks",)


@dataclass(frozen=True)
class Method:
    """A row of the gallery; its attention gets the queries, keys and values of one half of the guidance."""

    label: str
    attention: Callable[[Tensor, Tensor, Tensor, "Batch"], Tensor] | None = None
    start: float = 0.1
    """share of the steps that come before it; above 0 where it needs masks, which the step before makes"""
    layers: Sequence[str] | None = None
    sources: int = 0
    """how many of the pictures the others read"""
    reference: bool = False
    conditions: bool = False


class Batch:
    """The rows that are denoised together: the pictures, a condition image for each (if any), the reference (if any).

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
        self.latents = torch.cat([noise] * copies)
        self.step, self.unconditional = 0, False
        self.masks: dict[int, Tensor] = {}
        """the subject of every row, bool (rows, N), by the number of tokens N"""
        self.maps: Tensor | None = None
        if method.reference:
            images, masks = toy.references()
            self.clean, self.reference_mask = encode_references(pipe, images[:1]), masks[:1]
            pipe.scheduler.set_timesteps(steps)
            self.latents = torch.cat([self.latents, self.noised_reference()])

        place = pipe.tokenizer.tokenize(toy.CLASS_PROMPT).index("ball</w>") + 1  # the first token begins the text
        tokens = torch.full((2 * len(self.prompts), 1), place, dtype=torch.int32)
        state = AttentionState(capturing=True, token_indices=tokens)
        shared, cross = select_layers(pipe.unet, "self", method.layers), select_layers(pipe.unet, "cross", [1])
        self.layers = shared | cross
        self.recorders = {name: TokenMapAttnProcessor(state) for name in cross}
        self.processors = {name: CustomAttnProcessor(self.attention) for name in shared} | self.recorders

    @torch.no_grad()
    def draw(self) -> Tensor:
        """The pictures, (n, 3, height, width) in [0, 1]."""
        common = {"num_inference_steps": self.steps, "guidance_scale": GUIDANCE, "output_type": "pt"}
        if self.method.attention is None:
            return self.pipe(self.prompts, latents=self.latents, **common).images
        with install_processors(self.layers, self.processors):
            found = self.pipe(self.prompts, latents=self.latents, callback_on_step_end=self.after_step, **common)
        return found.images[: self.images]

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each half of the guidance by itself: no row reads one of the other half."""
        if self.step < self.method.start * self.steps:
            return alone(q, k, v)
        halves = []
        for self.unconditional, *half in zip((True, False), *(x.chunk(2) for x in (q, k, v))):
            halves.append(self.method.attention(*half, self))
        return torch.cat(halves)

    def after_step(self, pipe: StableDiffusionPipeline, step: int, timestep: Tensor, given: dict) -> dict:
        """The next step's masks, and its noise level in the reference."""
        self.step = step + 1
        size = self.noise.shape[2:]
        maps = [recorder.maps[len(self.prompts) :, :, 0].unflatten(1, size) for recorder in self.recorders.values()]
        fresh = torch.stack(maps, 1)
        self.maps = fresh if self.maps is None else torch.lerp(fresh, self.maps, MAP_MEMORY)
        for scale in (1, 2):
            grid = tuple(x // scale for x in size)
            masks = subject_mask(self.maps, size=grid).flatten(1)
            if self.method.reference:
                masks[-1:] = F.adaptive_avg_pool2d(self.reference_mask, grid).flatten(1) > 0.5
            self.masks[masks.shape[1]] = masks
        if self.method.reference:
            given["latents"][-1:] = self.noised_reference()
        return given

    def noised_reference(self) -> Tensor:
        """Latents of the reference as the coming step expects them."""
        timestep = self.pipe.scheduler.timesteps[self.step : self.step + 1]
        return self.pipe.scheduler.add_noise(self.clean, self.noise[:1], timestep) if len(timestep) else self.clean


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every row attends to itself."""
    return multi_source_attention(q, [Source(k, v)])


def the_first(q: Tensor) -> Tensor:
    """The first row for every row."""
    return torch.zeros(len(q), dtype=torch.int32)


def masactrl(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """All read the first picture."""
    return presets.masactrl(q, k, v, the_first(q))


def masactrl_masked(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Subject from subject, background from background; the first picture itself sees all of itself."""
    masks = batch.masks[q.shape[1]]
    return presets.masactrl(q, k, v, the_first(q), masks, masks)


def style_aligned(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """All follow the first picture."""
    return presets.style_aligned(q, k, v, the_first(q))


def consistory(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """The first two pictures are the anchors."""
    return presets.consistory(q, k, v, (0, 1), batch.masks[q.shape[1]])


def story_diffusion(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Half of the tokens of every picture, drawn anew for every step."""
    draw = torch.Generator().manual_seed(batch.step)
    plan = presets.story_diffusion_plan(len(q), q.shape[1], generator=draw)
    return presets.story_diffusion(q, k, v, plan)


def ip_adapter(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """The toy model has no image encoder: a picture's own keys stand for the text, the image tokens are those of the
    reference's subject. As in the paper, the unconditional half sees none of them."""
    masks = batch.masks[q.shape[1]]
    image = tuple(x[-1:, masks[-1]] for x in (k, v))
    acts = masks & (torch.arange(len(q)) < batch.images)[:, None] & (not batch.unconditional)
    return presets.ip_adapter(q, (k, v), [image], [0.5], [acts])


def reference_only(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """All also read the reference, the unconditional half less."""
    rows = torch.full((len(q),), batch.images, dtype=torch.int32)
    rows[batch.images] = -1
    return presets.reference_only(q, k, v, rows, torch.full((len(q),), batch.unconditional))


def dream_matcher(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Tokens match where their keys do; in the subject, where the way back ends nearby, values are the reference's."""
    side = round(q.shape[1] ** 0.5)
    match, consistent = correspondence(k.flatten(2), k[-1:].flatten(2), radius=2.0, grid=(side, side))
    return presets.dream_matcher(q, k, v, v[-1:], match, (batch.masks[q.shape[1]] & consistent).float())


def mca_ctrl(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """The subject is the reference's, the rest that of a condition image; these rows attend to themselves."""
    n, masks, rows = batch.images, batch.masks[q.shape[1]], torch.arange(len(q), dtype=torch.int32)
    subject, condition = (torch.where(rows < n, x, -1).int() for x in (2 * n, rows + n))
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
