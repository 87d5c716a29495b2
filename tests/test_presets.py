"""Every preset inside a real UNet against a plain transcription of its paper's formula, written without the library;
and that what a query must not see costs nothing and changes nothing."""

import functools

import pytest
import torch
from diffusers import UNet2DConditionModel

from lr_kernels import presets
from lr_kernels.diffusers import CustomAttnProcessor, select_layers
from lr_kernels.testing import assert_matches

ROWS = 4


@functools.cache
def unet(dtype):
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    return model.to(dtype).eval()


def predict(function, dtype):
    g = torch.Generator().manual_seed(1)
    model = unet(dtype)
    latents, text = torch.randn(ROWS, 4, 8, 8, generator=g), torch.randn(ROWS, 7, 32, generator=g)
    for layer in select_layers(model, "self").values():
        layer.set_processor(CustomAttnProcessor(function))
    with torch.no_grad():
        return model(latents.to(dtype), 500, encoder_hidden_states=text.to(dtype), return_dict=False)[0]


def mask_of(tokens, rows=ROWS, seed=0, share=0.4):
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(100 * tokens + seed)) < share


def softmax_attention(q, k, v, visible=None, scale=None, shift=None):
    """(B, N, H, D) x (B, M, H, D); visible (B, N or 1, M); scale, shift of every key's logits (M,)."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    if scale is not None:
        logits = logits * scale + shift
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1).nan_to_num(0.0), v)


SOURCE = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
"""Rows 1 and 3 read rows 0 and 2."""
REFERENCE = torch.tensor([-1, 0, -1, 2], dtype=torch.int32)


def masactrl(q, k, v):
    return presets.masactrl(q, k, v, SOURCE)


def masactrl_plain(q, k, v):
    return softmax_attention(q, k[SOURCE.long()], v[SOURCE.long()])


def masactrl_masked(q, k, v):
    return presets.masactrl(q, k, v, SOURCE, mask_of(q.shape[1]), mask_of(q.shape[1], seed=1))


def masactrl_masked_plain(q, k, v):
    k, v, source = k[SOURCE.long()], v[SOURCE.long()], mask_of(q.shape[1], seed=1)[SOURCE.long()]
    inside, outside = (softmax_attention(q, k, v, x[:, None]) for x in (source, ~source))
    return torch.where(mask_of(q.shape[1])[:, :, None, None], inside, outside)


def style_aligned(q, k, v):
    return presets.style_aligned(q, k, v, SOURCE.long(), shift=torch.tensor(0.7), scale=torch.tensor(0.9))


def style_aligned_plain(q, k, v):
    def matched(x):
        reference = x[SOURCE.long()]
        mean, deviation = (
            f(1, keepdim=True) for f in (x.mean, lambda *a, **b: (x.var(*a, correction=0, **b) + 1e-5).sqrt())
        )
        other = (reference.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        moved = (x - mean) / deviation * other + reference.mean(1, keepdim=True)
        return torch.where((SOURCE != torch.arange(ROWS))[:, None, None, None], moved, x)

    query, key, tokens = matched(q), matched(k), q.shape[1]
    keys, values = torch.cat([key, k[SOURCE.long()]], 1), torch.cat([v, v[SOURCE.long()]], 1)
    visible = torch.ones(ROWS, 1, 2 * tokens, dtype=torch.bool)
    visible[::2, :, tokens:] = False
    ones = torch.ones(tokens, dtype=q.dtype)
    return softmax_attention(
        query, keys, values, visible, torch.cat([ones, 0.9 * ones]), torch.cat([0 * ones, 0.7 * ones])
    )


ANCHORS = (0, 2)


def consistory(q, k, v):
    return presets.consistory(q, k, v, ANCHORS, mask_of(q.shape[1]))


def consistory_plain(q, k, v):
    results = []
    for i in range(ROWS):
        others = [a for a in ANCHORS if a != i]
        keys = torch.cat([k[i], *(k[a][mask_of(q.shape[1])[a]] for a in others)])
        values = torch.cat([v[i], *(v[a][mask_of(q.shape[1])[a]] for a in others)])
        results.append(softmax_attention(q[i : i + 1], keys[None], values[None]))
    return torch.cat(results)


def story_plan(tokens):
    return presets.story_diffusion_plan(ROWS, tokens, generator=torch.Generator().manual_seed(tokens))


def story_diffusion(q, k, v):
    return presets.story_diffusion(q, k, v, story_plan(q.shape[1]))


def story_diffusion_plain(q, k, v):
    tokens = q.shape[1]
    drawn = torch.stack([m[0] for m in story_plan(tokens).key_masks[1:]])
    visible = drawn.flatten()[None].repeat(ROWS, 1)
    for i in range(ROWS):
        visible[i, i * tokens : (i + 1) * tokens] = True
    every = [x.flatten(0, 1)[None].expand(ROWS, -1, -1, -1) for x in (k, v)]
    return softmax_attention(q, *every, visible[:, None])


def image_tokens(q, i):
    g = torch.Generator().manual_seed(i)
    return tuple(torch.randn(1, 5, *q.shape[2:], generator=g).to(q.dtype) for _ in range(2))


def ip_adapter(q, k, v):
    masks = [None, mask_of(q.shape[1])]
    return presets.ip_adapter(q, (k, v), [image_tokens(q, i) for i in range(2)], [0.6, 0.8], masks)


def ip_adapter_plain(q, k, v):
    def image(i):
        return softmax_attention(q, *(x.expand(ROWS, -1, -1, -1) for x in image_tokens(q, i)))

    return softmax_attention(q, k, v) + 0.6 * image(0) + 0.8 * mask_of(q.shape[1])[:, :, None, None] * image(1)


UNCOND = torch.tensor([False, True, False, False])


def reference_only(q, k, v):
    return presets.reference_only(q, k, v, REFERENCE, UNCOND, 0.3)


def reference_only_plain(q, k, v):
    alone = softmax_attention(q, k, v)
    source = REFERENCE.clamp(min=0).long()
    keys, values = (torch.cat([x, x[source]], 1) for x in (k, v))
    visible = torch.ones(ROWS, 1, keys.shape[1], dtype=torch.bool)
    visible[REFERENCE < 0, :, q.shape[1] :] = False
    both = softmax_attention(q, keys, values, visible)
    return torch.where(UNCOND[:, None, None, None], 0.3 * alone + 0.7 * both, both)


def matches(tokens):
    g = torch.Generator().manual_seed(tokens)
    return torch.randint(tokens, (ROWS, tokens), generator=g), torch.rand(ROWS, tokens, generator=g)


def dream_matcher(q, k, v):
    return presets.dream_matcher(q, k, v, v[:1], *matches(q.shape[1]))


def dream_matcher_plain(q, k, v):
    match, blend = matches(q.shape[1])
    picked = torch.stack([v[0][match[b]] for b in range(ROWS)])
    w = blend[:, :, None, None].to(v.dtype)
    return softmax_attention(q, k, (1 - w) * v + w * picked)


SUBJECT, CONDITION = torch.tensor([0] * ROWS, dtype=torch.int32), torch.tensor([2] * ROWS, dtype=torch.int32)


def mca_ctrl(q, k, v):
    return presets.mca_ctrl(q, k, v, SUBJECT, CONDITION, mask_of(q.shape[1]), mask_of(q.shape[1], 1, 1))


def mca_ctrl_plain(q, k, v):
    target, subject = mask_of(q.shape[1]), mask_of(q.shape[1], 1, 1)
    inside = softmax_attention(q, k[SUBJECT.long()], v[SUBJECT.long()], subject[:, None].expand(ROWS, 1, -1))
    # the part of the condition image that is kept: the row that is read decides
    outside = softmax_attention(q, k[CONDITION.long()], v[CONDITION.long()], ~target[CONDITION.long()][:, None])
    return torch.where(target[:, :, None, None], inside, outside)


METHODS = "masactrl masactrl_masked style_aligned consistory story_diffusion ip_adapter reference_only".split()
METHODS += ["dream_matcher", "mca_ctrl"]


@pytest.mark.parametrize("method", METHODS)
def test_01_a_unet_predicts_what_the_formula_says(method):
    found = predict(globals()[method], torch.float32)
    low, exact = (predict(globals()[f"{method}_plain"], x) for x in (torch.float32, torch.float64))
    assert_matches(found, low, exact)
    assert not torch.allclose(found, predict(softmax_attention, torch.float32), atol=1e-3), "nothing was shared"


def test_hidden_keys_are_not_read_and_not_counted():
    tokens = 64
    q, k, v = (torch.randn(ROWS, tokens, 2, 16) for _ in range(3))
    subject, target = mask_of(tokens), mask_of(tokens, seed=1)
    plan = presets.consistory_plan(ANCHORS, subject)
    assert [int(c) for c in plan.key_count[1:]] == [int(subject[a].sum()) for a in ANCHORS]
    plan = presets.masactrl_plan(target, subject)
    assert torch.equal(plan.key_count[0], torch.stack([subject.sum(1), (~subject).sum(1)]).int())
    expected = presets.mca_ctrl(q, k, v, SUBJECT, CONDITION, target, subject)
    dirty = [x.clone() for x in (k, v)]
    for x in dirty:
        x[1], x[3] = float("nan"), float("nan")  # rows that nobody reads
        x[0][~subject[0]] = float("nan")
        x[2][target[2]] = float("nan")
    assert torch.equal(presets.mca_ctrl(q, *dirty, SUBJECT, CONDITION, target, subject), expected)


def test_07_arguments_that_do_not_fit():
    q = torch.randn(2, 8, 2, 16)
    with pytest.raises(ValueError, match="source_mask"):
        presets.masactrl(q, q, q, SOURCE[:2], target_mask=mask_of(8, 2))
    with pytest.raises(ValueError, match="1 to 15 rows"):
        presets.story_diffusion_plan(16, 8)
