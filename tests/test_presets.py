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
ITSELF = (SOURCE == torch.arange(ROWS))[:, None, None, None]


def masactrl(q, k, v):
    return presets.masactrl(q, k, v, SOURCE)


def masactrl_plain(q, k, v):
    return softmax_attention(q, k[SOURCE.long()], v[SOURCE.long()])


def masactrl_masked(q, k, v):
    return presets.masactrl(q, k, v, SOURCE, mask_of(q.shape[1]), mask_of(q.shape[1], seed=1))


def masactrl_masked_plain(q, k, v):
    k, v, source = k[SOURCE.long()], v[SOURCE.long()], mask_of(q.shape[1], seed=1)[SOURCE.long()]
    inside, outside = (softmax_attention(q, k, v, x[:, None]) for x in (source, ~source))
    blend = torch.where(mask_of(q.shape[1])[:, :, None, None], inside, outside)
    return torch.where(ITSELF, softmax_attention(q, k, v), blend)


def style_aligned(q, k, v):
    rows = torch.tensor([0, 0, -1, 2], dtype=torch.int16)  # row 0 names itself, row 2 none, which is the same
    return presets.style_aligned(q, k, v, rows, shift=torch.tensor(0.7), scale=torch.tensor(0.9))


def style_aligned_plain(q, k, v):
    def matched(x):
        reference = x[SOURCE.long()]
        mean, deviation = (
            f(1, keepdim=True) for f in (x.mean, lambda *a, **b: (x.var(*a, correction=0, **b) + 1e-5).sqrt())
        )
        other = (reference.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        moved = (x - mean) / deviation * other + reference.mean(1, keepdim=True)
        return torch.where(ITSELF, x, moved)

    query, key, tokens = matched(q), matched(k), q.shape[1]
    keys, values = torch.cat([key, k[SOURCE.long()]], 1), torch.cat([v, v[SOURCE.long()]], 1)
    visible = torch.ones(ROWS, 1, 2 * tokens, dtype=torch.bool)
    visible[::2, :, tokens:] = False
    ones = torch.ones(tokens, dtype=q.dtype)
    return softmax_attention(
        query, keys, values, visible, torch.cat([ones, 0.9 * ones]), torch.cat([0 * ones, 0.7 * ones])
    )


ANCHORS = (0, 2)


def consistory(q, k, v, anchors=ANCHORS, halves=1):
    return presets.consistory(q, k, v, anchors, mask_of(q.shape[1]), halves=halves)


def consistory_plain(q, k, v, anchors=ANCHORS, halves=1):
    results, half = [], ROWS // halves
    for i in range(ROWS):
        others = [a for a in (i // half * half + anchor for anchor in anchors) if a != i]
        keys = torch.cat([k[i], *(k[a][mask_of(q.shape[1])[a]] for a in others)])
        values = torch.cat([v[i], *(v[a][mask_of(q.shape[1])[a]] for a in others)])
        results.append(softmax_attention(q[i : i + 1], keys[None], values[None]))
    return torch.cat(results)


def story_plan(tokens, halves=1):
    draw = torch.Generator().manual_seed(tokens)
    return presets.story_diffusion_plan(ROWS, tokens, halves=halves, generator=draw)


def story_diffusion(q, k, v, halves=1):
    return presets.story_diffusion(q, k, v, story_plan(q.shape[1], halves), halves=halves)


def story_diffusion_plain(q, k, v, halves=1):
    half, row = ROWS // halves, torch.arange(ROWS)
    drawn = story_plan(q.shape[1], halves).key_masks[1][:half].repeat(halves, 1)  # every half reads the same tokens
    visible = (row[:, None] // half == row // half)[..., None] & drawn
    visible = (visible | torch.eye(ROWS, dtype=torch.bool)[..., None]).flatten(1)
    every = [x.flatten(0, 1)[None].expand(ROWS, -1, -1, -1) for x in (k, v)]
    return softmax_attention(q, *every, visible[:, None])


consistory_halves, consistory_halves_plain = (
    functools.partial(f, anchors=(0, 1), halves=2) for f in (consistory, consistory_plain)
)
story_diffusion_halves, story_diffusion_halves_plain = (
    functools.partial(f, halves=2) for f in (story_diffusion, story_diffusion_plain)
)


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


SUBJECT, CONDITION = (torch.tensor([-1, i, -1, i], dtype=torch.int32) for i in (0, 2))
"""Rows 1 and 3 read rows 0 and 2, which read themselves."""


def mca_ctrl(q, k, v, condition=None):
    return presets.mca_ctrl(q, k, v, SUBJECT, CONDITION, mask_of(q.shape[1]), mask_of(q.shape[1], 1, 1), condition)


def mca_ctrl_plain(q, k, v, condition=None):
    target, subject = mask_of(q.shape[1]), mask_of(q.shape[1], 1, 1)
    inside = softmax_attention(q, k[:1].expand(q.shape), v[:1].expand(q.shape), subject[:, None].expand(ROWS, 1, -1))
    # the part of the condition image that is kept: the row that is read decides
    kept = ~(target if condition is None else condition)[None, 2:3].expand(ROWS, 1, -1)
    outside = softmax_attention(q, k[2:3].expand(q.shape), v[2:3].expand(q.shape), kept)
    return torch.where(ITSELF, softmax_attention(q, k, v), torch.where(target[:, :, None, None], inside, outside))


def mca_ctrl_condition(q, k, v):
    return mca_ctrl(q, k, v, mask_of(q.shape[1], seed=2))


def mca_ctrl_condition_plain(q, k, v):
    return mca_ctrl_plain(q, k, v, mask_of(q.shape[1], seed=2))


METHODS = "masactrl masactrl_masked style_aligned consistory consistory_halves story_diffusion story_diffusion_halves"
METHODS = [*METHODS.split(), *"ip_adapter reference_only dream_matcher mca_ctrl mca_ctrl_condition".split()]


@pytest.mark.parametrize("method", METHODS)
def test_01_a_unet_predicts_what_the_formula_says(method):
    found = predict(globals()[method], torch.float32)
    low, exact = (predict(globals()[f"{method}_plain"], x) for x in (torch.float32, torch.float64))
    assert_matches(found, low, exact)
    assert not torch.allclose(found, predict(softmax_attention, torch.float32), atol=1e-3), "nothing was shared"


TOKENS = 64


def planned(name):
    """A preset of q, k, v and a plan, or None to have it made; its plan; the visible keys of its masked sources,
    (classes, rows) each; a row that reads, and which tokens of which rows it sees."""
    subject, target, other = (mask_of(TOKENS, seed=i) for i in range(3))
    everything, none, count = torch.ones(TOKENS, dtype=torch.bool), torch.zeros(ROWS), subject.sum(1)
    halves = 2 if name.endswith("halves") else 1
    if name == "masactrl":
        target[1] = True

        def run(q, k, v, plan):
            masks = (target, subject) if plan is None else ()
            return presets.masactrl(q, k, v, SOURCE, *masks, plan=plan)

        counts = [torch.stack([none + TOKENS, TOKENS - count, count]), torch.stack([none] * 3)]  # no side is empty
        return run, presets.masactrl_plan(target, subject, SOURCE), counts, 1, {0: subject[0]}
    if name.startswith("consistory"):
        anchors = ANCHORS if halves == 1 else (0, 1)

        def run(q, k, v, plan):
            return presets.consistory(q, k, v, anchors, subject, plan, halves=halves)

        seen = {0: subject[0], 2: subject[2], 3: everything} if halves == 1 else {2: subject[2], 3: everything}
        return run, presets.consistory_plan(anchors, subject, halves=halves), [count[None]] * 2, 3, seen
    if name.startswith("story"):

        def run(q, k, v, plan):
            return presets.story_diffusion(q, k, v, plan or story_plan(TOKENS, halves), halves=halves)

        plan, images = story_plan(TOKENS, halves), ROWS // halves
        drawn = plan.key_masks[1]
        seen = {row: drawn[row] for row in range(ROWS - images, 3)} | {3: everything}
        return run, plan, [drawn.sum(1)[None]] * images, 3, seen

    def run(q, k, v, plan):
        return presets.mca_ctrl(q, k, v, SUBJECT, CONDITION, target, subject, other, plan)

    counts = [torch.stack([none, count]), torch.stack([(~other).sum(1), none]), *[torch.stack([none] * 2)] * 2]
    return run, presets.mca_ctrl_plan(target, subject, other), counts, 1, {0: subject[0], 2: ~other[2]}


@pytest.mark.parametrize("name", ["masactrl", "consistory", "consistory_halves", "story", "story_halves", "mca_ctrl"])
def test_hidden_keys_are_not_read_and_not_counted(name):
    run, plan, counts, reader, seen = planned(name)
    found = [x for x in plan.key_count if x is not None]
    assert len(found) == len(counts) and all(torch.equal(x, y.int()) for x, y in zip(found, counts))
    q, k, v = (torch.randn(ROWS, TOKENS, 2, 16) for _ in range(3))
    expected = run(q, k, v, None)
    assert torch.equal(run(q, k, v, plan), expected), "a plan is for reuse"
    unseen = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    for row, tokens in seen.items():
        unseen[row] = ~tokens
    dirty = (x.masked_fill(unseen[:, :, None, None], float("nan")) for x in (k, v))
    assert torch.equal(run(q, *dirty, plan)[reader], expected[reader])


def test_07_arguments_that_do_not_fit():
    q, masks = torch.randn(4, 8, 2, 16), mask_of(8)
    with pytest.raises(ValueError, match="source_mask"):
        presets.masactrl(q, q, q, SOURCE, target_mask=masks)
    with pytest.raises(ValueError, match="consistory: halves: expected a divisor of the batch's 4 rows, got 3"):
        presets.consistory(q, q, q, [0], masks, halves=3)
    with pytest.raises(
        ValueError, match="consistory_plan: anchors: expected some of 0 to 1, the images of a half, each once, got"
    ):
        presets.consistory_plan([0, 2], masks, halves=2)
    with pytest.raises(ValueError, match="anchors: expected at most 15 images to read, got 16"):
        presets.consistory_plan(range(16), mask_of(8, 16))
    with pytest.raises(ValueError, match="batch: expected at most 15 images to read, got 16"):
        presets.story_diffusion_plan(32, 8, halves=2)
    with pytest.raises(ValueError, match="halves"):
        presets.story_diffusion_plan(3, 8, halves=2)
    with pytest.raises(ValueError, match="plan: expected a plan for 5 sources, got one for 3"):
        presets.story_diffusion(q, q, q, presets.story_diffusion_plan(4, 8, halves=2))
