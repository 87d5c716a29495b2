"""CharaConsist in plain PyTorch, as its transcription for tests: loops, concatenated keys, dense masks and all
similarities; and the small Flux, its inputs and the settings that both sides take."""

import functools
import math
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from plain_flux import projected
from tiny_flux import lively

from lr_kernels.diffusers.dit.chara_consist.attention import Points, mark_words
from lr_kernels.diffusers.processors.joint import Tokens, joint_attention_layers

TEXT, GRID, HEADS, DIM = 7, (6, 6), 2, 16
N = GRID[0] * GRID[1]
B, M = 2, 20
STEPS, POINT = 5, 2
SETTINGS = {"steps": range(1, 4), "point_step": POINT, "merge": [0, 0.8, 0.6, 0.3], "threshold": 0.1}
WORDS, FRAME_WORDS = (3, 6), [(2, 6), (3, 7)]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@functools.cache
def flux(dtype=torch.float32, singles=3):
    torch.manual_seed(0)
    return lively(FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=singles, attention_head_dim=DIM,
        num_attention_heads=HEADS, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).to(dtype).eval().requires_grad_(False))  # fmt: skip


def pipeline(dtype=torch.float32, model=None):
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler=scheduler, transformer=model or flux(dtype), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(rows, seed, dtype=torch.float32):
    """Of one identity image or of two frames: what the pipeline takes. Each image has noise of one kind in a square and
    of another kind around it, so that masks have a shape."""
    square = torch.zeros(rows, *GRID, 1)
    for row in range(rows):
        square[row, row : row + 4, row : row + 4] = 1
    kinds = randn(2, 1, 1, 1, 16, seed=9)
    latents = torch.lerp(kinds[0], kinds[1], square).flatten(1, 2) + 0.3 * randn(rows, N, 16, seed=seed + 2)
    return {
        "prompt_embeds": randn(rows, TEXT, 32, seed=seed).to(dtype),
        "pooled_prompt_embeds": randn(rows, 32, seed=seed + 1).to(dtype),
        "latents": latents.to(dtype),
    }


IDENTITY, FRAMES = (1, 31), (2, 68)


def call(pipe, of, **changes):
    given = {"height": 16 * GRID[0], "width": 16 * GRID[1], "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(**given | prompt(*of, dtype=pipe.transformer.dtype) | changes).images


def image_ids():
    rows, columns = GRID
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))


def rotary():
    return flux().pos_embed(image_ids())


ALL_LAYERS = ("transformer_blocks.0.attn", *(f"single_transformer_blocks.{i}.attn" for i in range(3)))


def predict(model, dtype=torch.float32, rows=1):
    given = prompt(rows, 10, dtype)
    with torch.no_grad():
        return model(
            hidden_states=given["latents"], timestep=torch.full((rows,), 0.5, dtype=dtype),
            pooled_projections=given["pooled_prompt_embeds"], encoder_hidden_states=given["prompt_embeds"],
            txt_ids=torch.zeros(TEXT, 3), img_ids=image_ids(), return_dict=False,
        )[0]  # fmt: skip


def with_processors(dtype, make, singles=3):
    model = flux.__wrapped__(dtype, singles)
    for layer in joint_attention_layers(model).values():
        layer.set_processor(make())
    return model


def words_of(*pairs):
    return mark_words(torch.tensor(pairs), TEXT)


def of_layer(apart, rows=1, tokens=N, dtype=torch.float32, rounded=None):
    """Text (None in one stream) and image with positions applied; the identity's keys before RoPE and values. rounded:
    the dtype that the numbers are rounded to first."""

    def randn_of(*shape, seed):
        return randn(*shape, HEADS, DIM, seed=seed).to(rounded or dtype).to(dtype)

    drawn = [randn_of(B, TEXT + N, seed=seed) for seed in range(3)]
    text = Tokens(*(x[:, :TEXT] for x in drawn))
    image = Tokens(*(x[:, TEXT:] for x in drawn))
    identity = tuple(randn_of(rows, tokens, seed=seed) for seed in (3, 4))
    return (text, image, identity) if apart else (None, Tokens(*drawn), identity)


def of_frames(tokens=N):
    """Masks of the frames and of the identity, and points of which some are matched."""
    foreground, identity_foreground = randn(B, N, seed=5) > 0.3, randn(1, tokens, seed=6) > 0
    token = torch.randint(0, tokens, (B, N), generator=torch.Generator().manual_seed(7))
    matched = foreground & identity_foreground[0][token] & (randn(B, N, seed=8) > -0.5)
    return foreground, identity_foreground, Points(token, randn(B, N, seed=9).tanh().abs(), matched)


# The plain forms: loops, concatenation, dense masks


def turned(x, rotary):
    """RoPE of x (N, H, D): pairs of channels as complex numbers."""
    wide = torch.promote_types(x.dtype, torch.float32)
    turn = torch.complex(*(t[:, ::2].to(wide) for t in rotary))[:, None]
    turned = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous()) * turn
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def plain_attention(query, key, value, extra, sees):
    """One row, (N, H, D) each: attention over its own keys and the extra ones (key, value); sees: bool (N, extra)."""
    keys, values = (torch.cat([x, *more]) for x, more in zip((key, value), zip(*extra), strict=True))
    visible = torch.cat([torch.ones(len(query), len(key), dtype=torch.bool), *sees], 1)
    logits = torch.einsum("nhd,mhd->hnm", query, keys) / math.sqrt(query.shape[-1])
    return torch.einsum("hnm,mhd->nhd", logits.masked_fill(~visible, -torch.inf).softmax(-1), values)


def plain_reading(query, key, value, identity, foreground, points, background, rotary):
    """One row whose text comes first: foreground queries read the matched points' keys, background queries the
    identity's background. points: (tokens of the frame, tokens of the identity) or None; background: bool (N,) or
    None."""
    texts = len(query) - len(foreground)
    before, extra, sees = torch.zeros(texts, dtype=torch.bool), [], []
    kept_key, kept_value = identity
    if points is not None:
        here, there = points
        extra.append((turned(kept_key[there], [t[here] for t in rotary]), kept_value[there]))
        sees.append(torch.cat([before, foreground])[:, None].expand(-1, len(here)))
    if background is not None:
        here = (background & ~foreground).nonzero()[:, 0]
        extra.append((turned(kept_key[here], [t[here] for t in rotary]), kept_value[here]))
        sees.append(torch.cat([before, ~foreground])[:, None].expand(-1, len(here)))
    if not extra:
        extra, sees = [(key[:0], value[:0])], []
    return plain_attention(query, key, value, extra, sees)


def plain_clean(mask):
    """Erosion by 3 x 3 and dilation by 5 x 5 of bool (rows, columns); what lies outside counts for neither."""

    def over(mask, reach, of_all):
        found = torch.zeros_like(mask)
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                near = mask[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
                found[y, x] = near.all() if of_all else near.any()
        return found

    return over(over(mask, 1, True), 2, False)


def plain_share(query, text_key, words):
    """Of one row: (background, foreground) probability per word, averaged over the words, summed over heads."""
    first, end = words
    p = torch.einsum("nhd,mhd->hnm", query, text_key[:end]).softmax(-1).sum(0)
    return p[:, :first].mean(1), p[:, first:].mean(1)


class Plain(FluxAttnProcessor):
    """One layer of a plain run, for one image; `run` says what happens in this step."""

    def __init__(self, run, name, reads_foreground):
        super().__init__()
        self.run, self.name, self.reads_foreground = run, name, reads_foreground
        self.bank = {}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        query, raw, value = (x[0] for x in projected(attn, hidden_states, encoder_hidden_states))
        query, key = (turned(x, image_rotary_emb) for x in (query, raw))
        run, places = self.run, [t[TEXT:] for t in image_rotary_emb]
        run.shares.append(plain_share(query[TEXT:], key[:TEXT], run.words))
        kept = self.bank.setdefault(run.step, {})
        if run.phase == "keep":
            kept["key"], kept["value"] = raw[TEXT:], value[TEXT:]
        reads = run.step in SETTINGS["steps"] and run.phase != "keep"
        points = run.points if reads and run.phase == "read" and self.reads_foreground else None
        if reads:
            background = ~run.identity_mask if run.background else None
            identity = kept["key"], kept["value"]
            out = plain_reading(query, key, value, identity, run.mask, points, background, places)
        else:
            out = plain_attention(query, key, value, [(key[:0], value[:0])], [])
        out = out.flatten(1)
        if run.phase == "keep":
            kept["out"] = out[TEXT:]
        elif run.step == POINT:
            a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (out[TEXT:], kept["out"]))
            run.similarities.append(a @ b.T)
        if points is not None and run.step < len(SETTINGS["merge"]):
            here, there = points
            alpha = (SETTINGS["merge"][run.step] * run.similarity[here])[:, None]
            out = out.clone()
            out[TEXT + here] = (1 - alpha) * out[TEXT + here] + alpha * kept["out"][there]
        out = out[None]
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, TEXT:]), attn.to_add_out(out[:, :TEXT])


class PlainRun:
    """CharaConsist for one frame after another, by the matrix of similarities and a loop over the steps."""

    def __init__(self, dtype, background, layers=None):
        self.model, self.background = flux.__wrapped__(dtype), background
        chosen = layers or [f"single_transformer_blocks.{i}.attn" for i in range(3)]
        found = joint_attention_layers(self.model)
        for i, name in enumerate(name for name in found if name in chosen):
            found[name].set_processor(Plain(self, name, i % 2 == 0))
        self.points = self.mask = None

    def go(self, phase, given, words, last=STEPS):
        self.phase, self.words = phase, words
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe = SimpleNamespace(scheduler=scheduler)
        call_schedule(pipe)
        latents = given["latents"]
        for self.step, t in enumerate(scheduler.timesteps[:last]):
            self.shares, self.similarities = [], []
            velocity = self.model(
                hidden_states=latents, timestep=t.expand(1).to(latents.dtype) / 1000,
                pooled_projections=given["pooled_prompt_embeds"], encoder_hidden_states=given["prompt_embeds"],
                txt_ids=torch.zeros(TEXT, 3), img_ids=image_ids(), return_dict=False,
            )[0]  # fmt: skip
            background, foreground = (torch.stack(x).mean(0) for x in zip(*self.shares))
            mask = plain_clean((background <= foreground).unflatten(0, GRID)).flatten()
            if self.phase != "keep" and self.step <= POINT:
                self.mask = mask
            if self.step == POINT and self.phase == "keep":
                self.identity_mask = mask
            elif self.step == POINT:
                self.similarity, token = torch.stack(self.similarities).mean(0).max(1)
                shared = self.mask & self.identity_mask[token] & (self.similarity > SETTINGS["threshold"])
                self.points = shared.nonzero()[:, 0], token[shared]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents

    def frames(self, identity, frames):
        found = [self.go("keep", identity, WORDS)]
        for row, words in enumerate(FRAME_WORDS):
            given = {name: x[row : row + 1] for name, x in frames.items()}
            self.go("search", given, words, POINT + 1)
            found.append(self.go("read", given, words))
        return torch.cat(found)


def call_schedule(pipe):
    """The schedule of the pipeline's call."""
    stock = pipeline()
    call(stock, IDENTITY)
    config = stock.scheduler
    pipe.scheduler.set_timesteps(sigmas=config.sigmas[:-1].tolist(), mu=0.0)
    pipe.scheduler.timesteps, pipe.scheduler.sigmas = config.timesteps, config.sigmas


@functools.cache
@torch.no_grad()
def plain(dtype, background=True, layers=None):
    return PlainRun(dtype, background, layers).frames(prompt(*IDENTITY, dtype), prompt(*FRAMES, dtype))
