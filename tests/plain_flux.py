"""The retouch stage's attention in Flux, transcribed: keys of all rows side by side, rotated where the references are
read, and a mask of every query and key."""

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxPosEmbed

EMBED = FluxPosEmbed(theta=10000, axes_dim=(4, 4, 8))
"""Of the tests' models, whose axes_dims_rope is this."""


def image_ids(rows, columns):
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))


def projected(attn, hidden_states, encoder_hidden_states=None):
    """Queries, keys before RoPE and values of a layer, the text's tokens first where they are apart."""

    def project(x, layers, norms):
        q, k, v = (layer(x).unflatten(-1, (-1, attn.head_dim)) for layer in layers)
        return norms[0](q), norms[1](k), v

    parts = project(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
    if encoder_hidden_states is None:
        return parts
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    of_text = project(encoder_hidden_states, added, (attn.norm_added_q, attn.norm_added_k))
    return [torch.cat(x, 1) for x in zip(of_text, parts)]


class PlainRetouch(FluxAttnProcessor):
    """For a batch of targets, their contexts and references.

    targets, references: bool masks in tokens. routes: False: every row reads itself. words: `SubjectTokens` whose maps
    of the first rows are kept in `maps`.
    """

    def __init__(self, targets, references, text, *, own_keys=True, offset=(0, 0, 0), routes=True, words=None):
        super().__init__()
        self.targets, self.references, self.text, self.own_keys = targets, references, text, own_keys
        self.offset, self.routes, self.words, self.maps = offset, routes, words, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        query, raw, value = projected(attn, hidden_states, encoder_hidden_states)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, raw))
        text, images = self.text, len(self.targets)
        no_text = torch.zeros(text, dtype=torch.bool)
        out, maps = [], []
        for row in range(len(query)):
            keys, values = [key[row]], [value[row]]
            sees = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool)
            if row < images and self.routes:
                foreground = torch.cat([no_text, self.targets[row].flatten()])
                background = torch.cat([no_text, ~self.targets[row].flatten()])
                if not self.own_keys:
                    sees[text:, text:] = False
                keys.append(key[images + row, text:])
                values.append(value[images + row, text:])
                sees = [sees, background[:, None].expand(-1, len(keys[1]))]
                for r, mask in enumerate(self.references):
                    there = image_ids(*mask.shape) + (r + 1) * torch.tensor(self.offset)
                    moved = apply_rotary_emb(raw[None, 2 * images + r, text:], EMBED(there), sequence_dim=1)[0]
                    keys.append(moved)
                    values.append(value[2 * images + r, text:])
                    sees.append(foreground[:, None] & mask.flatten())
                sees = torch.cat(sees, 1)
            keys, values = torch.cat(keys), torch.cat(values)
            logits = torch.einsum("nhd,mhd->hnm", query[row], keys) / attn.head_dim**0.5
            weights = logits.masked_fill(~sees, -torch.inf).softmax(-1)
            out.append(torch.einsum("hnm,mhd->nhd", weights, values))
            if self.words is not None and row < len(self.words.indices):
                of_words = weights[:, text:, self.words.indices[row].long()].mean(0)
                maps.append((of_words * self.words.weights[0, row]).sum(-1))
        out, self.maps = torch.stack(out).flatten(2), torch.stack(maps) if maps else None
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, text:]), attn.to_add_out(out[:, :text])
