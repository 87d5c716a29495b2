"""Transcriptions of methods as their authors run them: an editor that counts layers and passes, and dense attention row
by row. Written without the library, but for the drawing of random numbers and the mask of a map."""

import torch
from torch.nn import functional as F

from lr_kernels import reference


def dense(q, k, v, hidden=None):
    """(n, H, N, D) x (n, H, M, D); hidden, bool (M,) or (N, M), gets the lowest number as in MasaCtrl's code."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if hidden is not None:
        logits = logits + torch.where(hidden, torch.finfo(q.dtype).min, 0.0).to(q.dtype)
    return logits.softmax(-1) @ v


def each_half(attention):
    """Turn the attention of one half of the guidance into that of the whole batch, each half by itself."""

    def whole(*args):
        *rest, q, k, v = args
        return torch.cat([attention(*rest, *half) for half in zip(q.chunk(2), k.chunk(2), v.chunk(2))])

    return whole


class Editor:
    """One processor for all layers. `edit(q, k, v)` replaces self-attention's result from a step and a layer on."""

    def __init__(self, unet, edit, start_step=0, start_layer=0, cross=None):
        self.layers, self.edit, self.cross = len(unet.attn_processors), edit, cross
        self.start_step, self.start_layer = start_step, start_layer
        self.count = self.step = 0
        self.unet, self.before = unet, unet.attn_processors

    def __enter__(self):
        self.unet.set_attn_processor(self)
        return self

    def __exit__(self, *exception):
        self.unet.set_attn_processor(self.before)

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = x if encoder_hidden_states is None else encoder_hidden_states
        text, pictures = text if isinstance(text, tuple) else (text, None)
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text))
        )
        out = None
        if encoder_hidden_states is not None:
            out = None if self.cross is None else self.cross(self, attn, q, k, v, pictures)
        elif self.step >= self.start_step and self.count // 2 >= self.start_layer:
            out = self.edit(q, k, v)
        out = dense(q, k, v) if out is None else out
        self.count += 1
        if self.count == self.layers:
            self.count, self.step = 0, self.step + 1
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def cells(masks, tokens):
    """bool (n, h, w) -> bool (n, tokens) of a square grid: covered by half, at least the most covered."""
    side = round(tokens**0.5)
    share = F.adaptive_avg_pool2d(masks[:, None].float(), side).flatten(1)
    return (share >= share.amax(1, keepdim=True).clamp(max=0.5)) & (share > 0)


@each_half
def masactrl(masks, q, k, v):
    out = [dense(q[:1], k[:1], v[:1])]
    for i in range(1, len(q)):
        if masks is None:
            out.append(dense(q[i : i + 1], k[:1], v[:1]))
            continue
        sides = cells(masks, q.shape[2])
        inside, outside = (dense(q[i : i + 1], k[:1], v[:1], x) for x in (~sides[0], sides[0]))
        out.append(torch.where(sides[i][:, None], inside, outside))
    return torch.cat(out)


@each_half
def style_aligned(q, k, v):
    def matched(x):
        mean, deviation = x.mean(2, keepdim=True), (x.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        return (x - mean) / deviation * deviation[:1] + mean[:1]

    q, new = matched(q), matched(k)
    return dense(q, torch.cat([new, k[:1].expand_as(k)], 2), torch.cat([v, v[:1].expand_as(v)], 2))


def norm_with_the_first(norm):
    """Forward of a group norm that sees each half's first image too."""
    original = type(norm).forward

    def forward(x):
        first = torch.cat([half[:1].expand_as(half) for half in x.chunk(2)])
        return original(norm, torch.cat([x, first], -2))[..., : x.shape[-2], :]

    return forward


class StoryDiffusion:
    """Dense masks over all images' tokens, drawn anew for every step and size."""

    editor = None

    @each_half
    def __call__(self, q, k, v):
        n, tokens = len(q), q.shape[2]
        draw = torch.Generator().manual_seed(self.editor.step)
        drawn = torch.rand(n, tokens, generator=draw).lt(0.5).flatten()
        visible = drawn.repeat(n, 1)
        for i in range(n):
            visible[i, i * tokens : (i + 1) * tokens] = True
        q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # (1, H, images · tokens, D)
        out = dense(q, k, v, ~visible.repeat_interleave(tokens, 0))
        return out[0].unflatten(1, (n, tokens)).transpose(0, 1)


class ConsiStory:
    """Masks of a word's maps at one size, in the conditional half, averaged over the last 20 passes."""

    def __init__(self, tokens_of, images, anchors, map_tokens):
        self.tokens_of, self.images, self.anchors, self.map_tokens = tokens_of, images, anchors, map_tokens
        self.maps, self.kept, self.editor = {}, {}, None

    def record(self, editor, attn, q, k, v, pictures):
        if q.shape[2] == self.map_tokens:
            shares = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[-self.images :].mean(1)
            found = torch.stack([x[:, places].mean(-1) for x, places in zip(shares, self.tokens_of)])
            self.maps.setdefault(attn.place, []).append(found)

    def masks(self, tokens):
        ended = self.editor.step
        maps = torch.stack([torch.stack(x[:ended][-20:]).mean(0) for x in self.maps.values()]).mean(0)
        side, own = round(tokens**0.5), round(self.map_tokens**0.5)
        mask = reference.subject_mask(maps.unflatten(1, (own, own))[:, None].float(), size=(side, side)).flatten(1)
        drawn = torch.rand(mask.shape, generator=torch.Generator().manual_seed(ended)) < 0.5
        return mask & drawn

    @each_half
    def __call__(self, q, k, v):
        masks, out = self.masks(q.shape[2]), []
        for i in range(len(q)):
            seen = [masks[j] & (j in self.anchors) | (j == i) for j in range(len(q))]
            keys, values = (torch.cat([x[j][:, s] for j, s in enumerate(seen)], 1)[None] for x in (k, v))
            out.append(dense(q[i : i + 1], keys, values))
        return torch.cat(out)


def adapter_attention(adapters, scales, masks):
    """Cross-attention of an IP-Adapter: the text's, and each image's with its scale and mask."""

    def cross(editor, attn, q, k, v, pictures):
        out, side, i = dense(q, k, v), round(q.shape[2] ** 0.5), 0
        own = adapters[attn.place]
        for to_k, to_v, embeddings in zip(own.to_k_ip, own.to_v_ip, pictures):
            for picture in embeddings.unbind(1):
                key, value = (f(picture).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (to_k, to_v))
                where = F.adaptive_avg_pool2d(masks[i][None, None].float(), side).flatten()[:, None]
                out = out + scales[i] * where * dense(q, key, value)
                i += 1
        return out

    return cross


class ReferenceOnly:
    """diffusers' community pipeline with reference_attn and reference_adain: a pass writes a bank, one reads it."""

    def __init__(self, pipe, fidelity):
        self.pipe, self.fidelity = pipe, fidelity
        self.bank, self.statistics = {}, {}
        self.writing = True
        self.editor = Editor(pipe.unet, self)

    def __call__(self, q, k, v):
        layer = self.editor.count
        if self.writing:
            self.bank[layer] = k, v
            return None
        both = dense(q, *(torch.cat(pair, 2) for pair in zip((k, v), self.bank[layer])))
        return self.blended(both, dense(q, k, v))

    def blended(self, changed, x):
        """Only the unconditional half, the first row of two."""
        return torch.cat([self.fidelity * x[:1] + (1 - self.fidelity) * changed[:1], changed[1:]])

    def matched(self, module, args, out):
        x = out if isinstance(out, torch.Tensor) else out[0]
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
        if self.writing:
            self.statistics[module] = variance, mean
            return None
        wanted, centre = self.statistics[module]
        deviation, wanted = (y.clamp(min=1e-6) ** 0.5 for y in (variance, wanted))
        x = self.blended((x - mean) / deviation * wanted + centre, x)
        return x if isinstance(out, torch.Tensor) else (x, *out[1:])

    @torch.no_grad()
    def draw(self, picture, prompt, latents, steps, guidance, generator):
        pipe, unet = self.pipe, self.pipe.unet
        conditional, unconditional = pipe.encode_prompt(prompt, "cpu", 1, True)[:2]
        text = torch.cat([unconditional, conditional])
        clean = pipe.vae.encode(2 * picture - 1).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
        down, up = unet.down_blocks, unet.up_blocks
        blocks = [down[2].attentions, down[3].resnets, up[0].resnets, up[1].attentions, up[2].attentions]
        hooks = [x.register_forward_hook(self.matched) for x in (unet.mid_block, *(x for some in blocks for x in some))]
        pipe.scheduler.set_timesteps(steps)
        with self.editor:
            for t in pipe.scheduler.timesteps:
                noise = torch.randn(clean.shape, generator=generator)
                noisy = pipe.scheduler.add_noise(clean, noise, t[None])
                for self.writing, x in ((True, noisy), (False, latents)):
                    found = unet(torch.cat([x] * 2), t, encoder_hidden_states=text).sample
                unguided, guided = found.chunk(2)
                latents = pipe.scheduler.step(unguided + guidance * (guided - unguided), t, latents).prev_sample
        for hook in hooks:
            hook.remove()
        return latents
