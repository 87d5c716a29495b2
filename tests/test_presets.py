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


def mca_ctrl_injection(q, k, v):
    """SAGI: the queries too are those of the two images."""
    masks = mask_of(q.shape[1]), mask_of(q.shape[1], 1, 1), mask_of(q.shape[1], seed=2)
    return presets.mca_ctrl(q, k, v, SUBJECT, CONDITION, *masks, inject=True)


def mca_ctrl_injection_plain(q, k, v):
    target, subject, condition = mask_of(q.shape[1]), mask_of(q.shape[1], 1, 1), mask_of(q.shape[1], seed=2)
    inside = softmax_attention(q[:1], k[:1], v[:1], subject[:, None])
    outside = softmax_attention(q[2:3], k[2:3], v[2:3], ~condition[2:3, None])
    return torch.where(ITSELF, softmax_attention(q, k, v), torch.where(target[:, :, None, None], inside, outside))


def soft_map(tokens):
    """A map in [0, 1] of which the highest tokens are 1, as the authors make it."""
    values = torch.rand(ROWS, tokens, generator=torch.Generator().manual_seed(tokens))
    return values.masked_fill(values > 0.7, 1.0)


def mca_ctrl_generation(q, k, v, inject=False):
    masks = soft_map(q.shape[1]), mask_of(q.shape[1], 1, 1)
    return presets.mca_ctrl_generation(q, k, v, REFERENCE, *masks, inject=inject)


def mca_ctrl_generation_plain(q, k, v, inject=False):
    """The authors' code: the map is added to the logits of the background, and 1 is hidden."""
    read, subject, soft = SOURCE.long(), mask_of(q.shape[1], 1, 1), soft_map(q.shape[1]).to(q.dtype)
    inside = softmax_attention(q[read] if inject else q, k[read], v[read], subject[:, None].expand(ROWS, 1, -1))
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    logits = logits + soft.masked_fill(soft == 1, torch.finfo(q.dtype).min)[:, None, None]
    outside = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)
    blend = soft[:, :, None, None]
    return torch.where(ITSELF, softmax_attention(q, k, v), blend * inside + (1 - blend) * outside)


mca_ctrl_generation_injection, mca_ctrl_generation_injection_plain = (
    functools.partial(f, inject=True) for f in (mca_ctrl_generation, mca_ctrl_generation_plain)
)


METHODS = "masactrl masactrl_masked style_aligned consistory consistory_halves story_diffusion story_diffusion_halves"
METHODS += " ip_adapter reference_only dream_matcher mca_ctrl mca_ctrl_condition mca_ctrl_injection"
METHODS = [*METHODS.split(), "mca_ctrl_generation", "mca_ctrl_generation_injection"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.fault(number=1)
def test_a_unet_predicts_what_the_formula_says(method):
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
    assert len(found) == len(counts) and all(torch.equal(x[..., 0], y.int()) for x, y in zip(found, counts))
    q, k, v = (torch.randn(ROWS, TOKENS, 2, 16) for _ in range(3))
    expected = run(q, k, v, None)
    assert torch.equal(run(q, k, v, plan), expected), "a plan is for reuse"
    unseen = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    for row, tokens in seen.items():
        unseen[row] = ~tokens
    dirty = (x.masked_fill(unseen[:, :, None, None], float("nan")) for x in (k, v))
    assert torch.equal(run(q, *dirty, plan)[reader], expected[reader])


@pytest.mark.fault(number=7)
def test_arguments_that_do_not_fit():
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
    with pytest.raises(ValueError, match=r"masactrl: target_mask: expected a mask beside source_mask, got None"):
        presets.masactrl(q, q, q, SOURCE, source_mask=masks)
    with pytest.raises(ValueError, match="batch: expected at most 15 images to read, got 16"):
        presets.story_diffusion_plan(32, 8, halves=2)
    with pytest.raises(ValueError, match="halves"):
        presets.story_diffusion_plan(3, 8, halves=2)
    with pytest.raises(ValueError, match="plan: expected a plan for 5 sources, got one for 3"):
        presets.story_diffusion(q, q, q, presets.story_diffusion_plan(4, 8, halves=2))


def test_a_side_without_tokens_gives_the_mean_of_the_values():
    """As a softmax of equal, lowest logits does in the authors' codes; the other rows and sides are as ever."""
    q, k, v = (torch.randn(ROWS, TOKENS, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    target, full = mask_of(TOKENS), torch.ones(ROWS, TOKENS, dtype=torch.bool)
    mean = v.mean(1, keepdim=True).expand_as(v)
    side = target[:, :, None, None]
    for source, empty in ((~full, side), (full, ~side)):
        found = presets.masactrl(q, k, v, SOURCE, target, source)
        everything = softmax_attention(q, k[SOURCE.long()], v[SOURCE.long()])
        torch.testing.assert_close(found, torch.where(ITSELF | ~empty, everything, mean[SOURCE.long()]))
    some = full.clone()
    some[0] = False  # of one source alone
    found = presets.masactrl(q, k, v, SOURCE, target, some)
    torch.testing.assert_close(found[3], presets.masactrl(q, k, v, SOURCE, target, full)[3])
    torch.testing.assert_close(found[1], presets.masactrl(q, k, v, SOURCE, target, ~full)[1])

    found = presets.mca_ctrl(q, k, v, SUBJECT, CONDITION, target, ~full, full)
    torch.testing.assert_close(found[1], torch.where(side[1], mean[0], mean[2]))
    torch.testing.assert_close(found[0], softmax_attention(q, k, v)[0])
    found = presets.mca_ctrl_generation(q, k, v, REFERENCE, full.float(), ~full)
    torch.testing.assert_close(found[[1, 3]], mean[[0, 2]])
    # nothing is left of the surroundings, and nothing reads them
    assert not presets.mca_ctrl_generation(q, k, v, REFERENCE, full.float(), full).isnan().any()


SCALES = {"number": 0.6, "int": 1, "scalar": torch.tensor(0.6), "row": torch.tensor([0.0, 0.3, 0.6, 1.0])}
SCALES["query"] = torch.rand(ROWS, ROWS, generator=torch.Generator().manual_seed(1))  # as many tokens as rows


@pytest.mark.parametrize("masked", [None, 1, ROWS])
@pytest.mark.parametrize("scale", SCALES)
def test_ip_adapter_strengths_in_every_shape(scale, masked):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(ROWS, ROWS, 2, 16, generator=g)
    text, image = (tuple(torch.randn(ROWS, n, 2, 16, generator=g) for _ in range(2)) for n in (7, 4))
    mask = None if masked is None else torch.rand(masked, ROWS, generator=g)
    s = torch.as_tensor(SCALES[scale], dtype=torch.float32)
    s = (s[:, None] if s.dim() == 1 else s).expand(ROWS, ROWS)[:, :, None, None]
    s = s if mask is None else s * mask[:, :, None, None]
    expected = softmax_attention(q, *text) + s * softmax_attention(q, *image)
    found = presets.ip_adapter(q, text, [image], [SCALES[scale]], [mask])
    torch.testing.assert_close(found, expected)
    bias = torch.zeros(ROWS, 7).index_fill_(1, torch.tensor([2, 5]), -10000.0)
    hidden = softmax_attention(q, *text, visible=(bias == 0)[:, None]) + s * softmax_attention(q, *image)
    found = presets.ip_adapter(q, text, [image], [SCALES[scale]], [mask], key_bias=bias)
    torch.testing.assert_close(found, hidden)


@pytest.mark.parametrize("images", [2, 3])
def test_masks_of_one_half_serve_all(images):
    """One mask per image, also where the halves divide their number."""
    masks, q = mask_of(8, images), torch.randn(2 * images, 8, 2, 16)
    expected = presets.consistory(q, q, q, [0], masks.repeat(2, 1), halves=2)
    assert torch.equal(presets.consistory(q, q, q, [0], masks, halves=2), expected)
    one = presets.consistory(q, q, q, [0], masks[:1], halves=2)
    assert torch.equal(one, presets.consistory(q, q, q, [0], masks[:1].repeat(2 * images, 1), halves=2))
    plan = presets.consistory_plan([0], masks, halves=2, batch=2 * images)
    assert torch.equal(presets.consistory(q, q, q, [0], plan=plan, halves=2), expected)


def test_a_table_of_one_half_becomes_that_of_the_batch():
    assert presets.guided_rows([0, 0, -1]).tolist() == [0, 0, -1, 3, 3, -1]
    assert presets.guided_rows([1, 0], halves=1).tolist() == [1, 0]
    assert presets.guided_rows([0]).dtype == torch.int32
    for rows, halves, message in (([2, 0], 2, "rows: expected -1 or an image"), ([0], 0, "halves: expected")):
        with pytest.raises(ValueError, match=f"guided_rows: {message}"):
            presets.guided_rows(rows, halves)


def calls(q):
    """Every preset with arguments that fit."""
    masks, rows = mask_of(8), SOURCE
    return {
        "masactrl": functools.partial(presets.masactrl, q, q, q, rows=rows, target_mask=masks, source_mask=masks),
        "style_aligned": functools.partial(presets.style_aligned, q, q, q, reference=rows, shift=0.5, scale=1.0),
        "consistory": functools.partial(presets.consistory, q, q, q, anchors=[0], masks=masks, halves=2),
        "story_diffusion": functools.partial(
            presets.story_diffusion, q, q, q, plan=presets.story_diffusion_plan(4, 8, halves=2), halves=2
        ),
        "ip_adapter": functools.partial(presets.ip_adapter, q, (q, q), images=[(q, q)], scales=[0.5], masks=[masks]),
        "reference_only": functools.partial(presets.reference_only, q, q, q, rows=REFERENCE, uncond=UNCOND),
        "dream_matcher": functools.partial(presets.dream_matcher, q, q, q, q, *matches(8)),
        "mca_ctrl": functools.partial(
            presets.mca_ctrl, q, q, q, subject=SUBJECT, condition=CONDITION, target_mask=masks, subject_mask=masks
        ),
        "mca_ctrl_generation": functools.partial(
            presets.mca_ctrl_generation, q, q, q, subject=REFERENCE, target_mask=masks, subject_mask=masks
        ),
    }


def test_every_preset_takes_a_backend():
    """A name never falls back; the reference gives the same."""
    found = calls(torch.randn(4, 8, 2, 16))
    assert set(found) == {name for name in presets.__all__ if not name.endswith("_plan")} - {"guided_rows"}
    for call in found.values():
        torch.testing.assert_close(call(), call(backend="reference"))
        with pytest.raises(ValueError, match=r"backend: expected one of"):
            call(backend="nothing")


SHORT, LONG = torch.tensor([0, 0], dtype=torch.int32), torch.tensor([0, 0, 4, 4], dtype=torch.int32)
FAULTS = [
    ("masactrl", dict(rows=SHORT), ValueError, r"rows: expected shape \(4,\), one entry per row .*see guided_rows"),
    ("masactrl", dict(rows=LONG), ValueError, r"rows: expected -1 to 3, got 0 to 4"),
    ("masactrl", dict(rows=[0] * 4), TypeError, r"rows: expected an integer tensor, got list"),
    ("masactrl", dict(rows=torch.zeros(4)), TypeError, r"rows: expected an integer dtype"),
    ("masactrl", dict(target_mask=torch.ones(4, 8)), TypeError, r"target_mask: expected torch.bool, got torch.float32"),
    ("masactrl", dict(source_mask=mask_of(9)), ValueError, r"source_mask: expected shape \(4 or 1, 8\), got \(4, 9\)"),
    ("style_aligned", dict(reference=LONG), ValueError, r"reference: expected -1 to 3"),
    ("style_aligned", dict(shift=torch.ones(3)), ValueError, r"shift: expected a number, a scalar, \(4,\) or \(4, 2\)"),
    ("consistory", dict(masks=mask_of(8, 3)), ValueError, r"masks: expected shape \(4 or 1, 8\), got \(3, 8\)"),
    ("consistory", dict(masks=None), ValueError, r"masks: expected masks, or a plan of them, got None"),
    ("consistory", dict(halves=3), ValueError, r"halves: expected a divisor of the batch's 4 rows, got 3"),
    ("consistory", dict(anchors=[2]), ValueError, r"anchors: expected some of 0 to 1"),
    ("story_diffusion", dict(halves=1), ValueError, r"plan: expected a plan for 5 sources, got one for 3; .*halves"),
    ("ip_adapter", dict(scales=[torch.ones(3)]), ValueError, r"scales\[0\]: expected .*\(4,\) or \(4, 8\), got \(3,\)"),
    ("ip_adapter", dict(masks=[torch.ones(8)]), ValueError, r"masks\[0\]: expected shape \(4 or 1, 8\), got \(8,\)"),
    ("ip_adapter", dict(scales=0.5), ValueError, r"scales: expected a list of 1, one per image, got 0.5"),
    ("ip_adapter", dict(masks=[None, None]), ValueError, r"masks: expected a list of 1, one per image, got 2"),
    ("reference_only", dict(fidelity=2), ValueError, r"fidelity: expected a number in \[0, 1\], got 2"),
    ("reference_only", dict(uncond=UNCOND[:2]), ValueError, r"uncond: expected bool \(4,\), one entry per row"),
    ("mca_ctrl", dict(condition=SHORT), ValueError, r"condition: expected shape \(4,\)"),
    ("mca_ctrl", dict(condition_mask=torch.ones(4, 8)), TypeError, r"condition_mask: expected torch.bool"),
    ("mca_ctrl_generation", dict(target_mask=mask_of(9)), ValueError, r"target_mask: expected shape \(4 or 1, 8\)"),
]


@pytest.mark.parametrize(("name", "fault", "error", "message"), FAULTS)
@pytest.mark.fault(number=7)
def test_messages_blame_the_presets_own_argument(name, fault, error, message):
    with pytest.raises(error, match=rf"lr_kernels\.{name}: {message}"):
        calls(torch.randn(4, 8, 2, 16))[name](**fault)
