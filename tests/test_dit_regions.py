"""Regional prompts in joint attention against a dense mask that is written out pair by pair."""

import functools

import pytest
import torch
from tiny_joint import BUILDS, GRID, add_lora, flux, flux_pipeline, inputs, predict, qwen_image, sd3

from lr_kernels.diffusers.dit.regions import Regions, regional_joint_attention
from lr_kernels.diffusers.processors.install import install_processors
from lr_kernels.diffusers.processors.joint import Tokens, joint_attention_layers, joint_processors
from lr_kernels.testing import assert_matches

ALL = pytest.mark.parametrize("build", BUILDS, ids=[build.__name__ for build in BUILDS])
APART = pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])

TOKENS = (2, 3, 4)
"""Of the base prompt and of two regions' prompts"""
OF_TEXT = [set(), set(), {0}, {0}, {0}, {1}, {1}, {1}, {1}]


def masks():
    """Two regions on pictures of 64 x 64 pixels: the left half, and a square in the middle that overlaps it. The right
    edge is background."""
    found = torch.zeros(2, 64, 64, dtype=torch.bool)
    found[0, :, :32] = True
    found[1, 16:48, 16:48] = True
    return found


OF_IMAGE = [
    ({0} if column < 2 else set()) | ({1} if row in (1, 2) and column in (1, 2) else set())
    for row in range(4)
    for column in range(4)
]


def sees(query, key, of_text, of_image, apart):
    """The rule, for one pair of tokens; text comes first."""
    kinds = ["text" if i < len(of_text) else "image" for i in (query, key)]
    q, k = ((of_text + of_image)[i] for i in (query, key))
    base_query, base_key = (kind == "text" and not x for kind, x in zip(kinds, (q, k)))
    if base_key:
        return True
    if base_query:
        return kinds[1] == "image"
    if kinds == ["image", "image"]:
        return not apart or bool(q & k) or (not q and not k)
    return bool(q & k)


def dense(of_text, of_image, apart):
    number = len(of_text) + len(of_image)
    return torch.tensor([[sees(i, j, of_text, of_image, apart) for j in range(number)] for i in range(number)])


def plain(text, image, visible):
    """Joint attention with a dense mask (T + N, T + N), or (B, …), by PyTorch."""
    query, key, value = image[:3] if text is None else (torch.cat(x, 1) for x in zip(text[:3], image[:3]))
    tokens = query.shape[1]
    visible = visible.expand(len(query), -1, -1)[:, -tokens:, -tokens:]
    if text is not None and text.mask is not None:
        hidden = torch.nn.functional.pad(~text.mask, (0, image.key.shape[1]))
        visible = visible & ~hidden[:, None]
    logits = torch.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
    out = torch.einsum("bhnm,bmhd->bnhd", logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1), value)
    return (None, out) if text is None else out.split([text.query.shape[1], image.query.shape[1]], 1)


def run(build, attention, dtype=torch.float32, model=None, compiled=False, **changes):
    model = build(dtype) if model is None else model
    layers = joint_attention_layers(model)
    with install_processors(layers, joint_processors(layers, attention)):
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        return predict(called, inputs(build, dtype, sum(TOKENS)) | changes)


def regional(regions):
    return functools.partial(regional_joint_attention, regions=regions)


def check(build, regions, visible, **changes):
    """All layers with the regions against all layers with a dense mask, in float32 and float64."""
    theirs = functools.partial(plain, visible=visible)
    found = run(build, regional(regions), **changes)
    double = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in changes.items()}
    assert_matches(found, run(build, theirs, **changes), run(build, theirs, torch.float64, **double))
    return found


@APART
@ALL
@pytest.mark.fault(number=1)
def test_regions_match_a_dense_mask(build, apart):
    """In double and single blocks, in SD3's second attention, and with Qwen-Image's padding."""
    regions = Regions.from_masks(masks(), TOKENS, GRID, apart)
    found = check(build, regions, dense(OF_TEXT, OF_IMAGE, apart))
    stock = predict(build(), inputs(build, text=sum(TOKENS)))
    assert not torch.allclose(found, stock, atol=1e-3)


@pytest.mark.fault(number=1)
def test_apart_without_a_base_prompt_is_regional_prompting_for_flux():
    """The mask of arXiv 2411.02395, in the order in which it fills its blocks: text and image of one region, then image
    tokens of one region, then those of no region."""
    tokens, image = (3, 4), torch.stack([torch.tensor([r in x for x in OF_IMAGE]) for r in range(2)])
    visible, start = torch.zeros(7 + 16, 7 + 16, dtype=torch.bool), 0
    common, touched = (torch.zeros(16, 16, dtype=torch.bool) for _ in range(2))
    for number, inside in zip(tokens, image):
        own = slice(start, start + number)
        visible[own, own] = True
        visible[own, 7:] = inside
        visible[7:, own] = inside[:, None]
        common |= inside[:, None] & inside
        touched |= inside[:, None] | inside
        start += number
    visible[7:, 7:] = common | ~touched
    regions = Regions.from_masks(masks(), (0, *tokens), GRID, apart=True)
    keys = torch.cat([regions.text_keys, regions.image_keys], 1)
    assert torch.equal(regions.queries[0][:, None] & keys != 0, visible)


@APART
def test_rows_may_have_regions_of_their_own(apart):
    both = torch.stack([masks(), masks().flip(-1)])
    mirrored = [OF_IMAGE[4 * row + 3 - column] for row in range(4) for column in range(4)]
    visible = torch.stack([dense(OF_TEXT, x, apart) for x in (OF_IMAGE, mirrored)])
    check(flux, Regions.from_masks(both, TOKENS, GRID, apart), visible)


@APART
@pytest.mark.parametrize("background", [False, True], ids=["covered", "background"])
def test_seven_regions(background, apart):
    """With a background that is apart there is room for six."""
    tokens, all_masks = (2, *[1] * 7), torch.zeros(7, 4, 4)
    for r in range(7):
        all_masks[r].view(-1)[2 * r : 2 * r + 2] = 1
    if not background:
        all_masks[6].view(-1)[12:] = 1
    of_text = [set(), set(), *({r} for r in range(7))]
    of_image = [{i // 2} if i < 14 else set() if background else {6} for i in range(16)]
    if background and apart:
        with pytest.raises(ValueError, match="image: expected at most 6 regions and a background that is apart, got 7"):
            Regions.from_masks(all_masks, tokens, GRID, apart)
        return
    check(flux, Regions.from_masks(all_masks, tokens, GRID, apart), dense(of_text, of_image, apart))


@APART
def test_tokens_of_one_prompt_may_describe_regions(apart):
    """Not whole prompts but some words of one, and one word for two regions."""
    of_text = [set(), {0}, set(), {0, 1}, {1}, {1}, set(), {0}, set()]
    bits = [torch.tensor([sum(1 << r for r in x) for x in of], dtype=torch.uint8) for of in (of_text, OF_IMAGE)]
    check(flux, Regions(*bits, apart), dense(of_text, OF_IMAGE, apart))


@pytest.mark.fault(number=32)
def test_one_region_that_is_everywhere_with_no_base_prompt_is_stock():
    regions = Regions.from_masks(torch.ones(1, 64, 64), (0, sum(TOKENS)), GRID, apart=True)
    stock = [predict(qwen_image(dtype), inputs(qwen_image, dtype, 9)) for dtype in (torch.float32, torch.float64)]
    assert_matches(run(qwen_image, regional(regions)), *stock)


def test_what_a_regions_text_says_does_not_reach_the_other_region():
    """One layer with regions apart: another text of region 1 leaves the tokens of region 0 as they are, bit for bit."""
    regions = Regions.from_masks(masks(), (0, 3, 4), GRID, apart=True)
    g = torch.Generator().manual_seed(0)
    text, image = (Tokens(*(torch.randn(1, n, 2, 8, generator=g) for _ in range(3))) for n in (7, 16))
    other = text._replace(key=text.key.clone())
    other.key[:, 3:] += 1
    found, changed = (regional_joint_attention(x, image, regions) for x in (text, other))
    reads = torch.tensor([1 in x for x in OF_IMAGE])
    assert torch.equal(found[1][:, ~reads], changed[1][:, ~reads])
    assert not torch.isclose(found[1][:, reads], changed[1][:, reads]).all(-1).any()
    assert torch.equal(found[0][:, :3], changed[0][:, :3])


@pytest.mark.fault(number=22)
def test_the_plan_is_built_once(monkeypatch):
    regions, built = Regions.from_masks(masks(), TOKENS, GRID), []
    for module in ("lr_kernels.attention.prepare.build_plan", "lr_kernels.diffusers.dit.regions.plan_attention"):
        monkeypatch.setattr(module, lambda *a, **k: built.append(a) or pytest.fail("a plan was built"))
    run(flux, regional(regions))
    run(qwen_image, regional(regions), encoder_hidden_states_mask=None)
    assert not built


@pytest.mark.parametrize("build", [flux, sd3, qwen_image])
@pytest.mark.fault(number=29)
def test_it_compiles_whole(build):
    """In double and single blocks, for the image alone, and with padding."""
    attention = regional(Regions.from_masks(masks(), TOKENS, GRID, apart=True))
    expected = run(build, attention)
    torch.compiler.reset()
    torch.testing.assert_close(run(build, attention, compiled=True), expected)


@ALL
def test_a_lora_is_computed(build):
    attention = regional(Regions.from_masks(masks(), TOKENS, GRID))
    models = [build.__wrapped__() for _ in range(2)]
    for model in models:
        add_lora(model)
    models[1].fuse_lora()
    found, fused = (run(build, attention, model=model) for model in models)
    torch.testing.assert_close(found, fused)
    assert not torch.allclose(found, run(build, attention), atol=1e-3)


def test_a_stock_pipeline_takes_concatenated_prompts():
    """Two pictures of 64 x 96 pixels, 4 x 6 tokens, with the prompts' embeddings one after the other."""
    pipe, g = flux_pipeline(flux.__wrapped__()), torch.Generator().manual_seed(0)
    prompts = [torch.randn(1, n, 32, generator=g) for n in TOKENS]
    pooled = torch.randn(1, 32, generator=g)
    layers = joint_attention_layers(pipe.transformer)
    wide = torch.nn.functional.pad(masks().float(), (0, 32))

    def generate(attention, tokens=slice(None)):
        with install_processors(layers, joint_processors(layers, attention)):
            return pipe(
                prompt_embeds=torch.cat(prompts[tokens], 1), pooled_prompt_embeds=pooled, height=64, width=96,
                num_inference_steps=2, num_images_per_prompt=2, generator=torch.manual_seed(1), output_type="latent",
            ).images  # fmt: skip

    found = generate(regional(Regions.from_masks(wide, TOKENS, (4, 6))))
    of_image = [OF_IMAGE[4 * row + column] if column < 4 else set() for row in range(4) for column in range(6)]
    visible = dense(OF_TEXT, of_image, False)
    torch.testing.assert_close(found, generate(functools.partial(plain, visible=visible)))
    with pytest.raises(ValueError, match="expected regions of 5 and 24, got 9 tokens of text and 24 of the image"):
        generate(regional(Regions.from_masks(wide, TOKENS, (4, 6))), slice(2))


def test_soft_masks_cover_a_token_by_half_and_small_regions_keep_one():
    soft = torch.zeros(2, 8, 8)
    soft[0, :2, :2], soft[0, :2, 2:4] = 0.6, 0.4  # of the first two tokens of 4 x 4
    soft[1, 7, 7] = 1  # a quarter of the last token
    regions = Regions.from_masks(soft, TOKENS, GRID)
    assert regions.image[0].tolist() == [1, *[0] * 14, 2]
    assert regions.text[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_regions_that_are_on_the_device_already_stay_as_they_are():
    regions = Regions.from_masks(masks(), TOKENS, GRID)
    assert regions.to("cpu") is regions


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"masks": torch.zeros(2, 8, 8, dtype=torch.uint8)}, TypeError, "masks: expected a tensor of bools or of fl"),
        ({"masks": [[1]]}, TypeError, "masks: expected a tensor of bools or of floats from 0 to 1, got list"),
        ({"masks": torch.ones(8, 8, 8)}, ValueError, r"masks: expected shape \(n, .* with n from 1 to 7, got \(8, 8"),
        ({"masks": torch.ones(8, 8)}, ValueError, r"masks: expected shape \(n, height, width\) or \(B, n, "),
        ({"masks": torch.full((2, 8, 8), 255.0)}, ValueError, "masks: expected numbers from 0 to 1, got 255 to 255"),
        ({"masks": torch.full((2, 8, 8), torch.nan)}, ValueError, "masks: expected numbers from 0 to 1, got nan"),
        ({"masks": torch.zeros(2, 8, 8)}, ValueError, "masks: expected masks that are not empty"),
        ({"tokens": (9,)}, ValueError, "tokens: expected 3 numbers, of the base prompt and of each region's, got 1"),
        ({"tokens": 9}, ValueError, "tokens: expected 3 numbers, of the base prompt and of each region's, got int"),
        ({"tokens": (2, 0, 7)}, ValueError, r"tokens\[1\]: expected an integer of at least 1, got 0"),
        ({"tokens": (2, 1.5, 7)}, ValueError, r"tokens\[1\]: expected an integer of at least 1, got 1.5"),
        ({"grid": 16}, ValueError, r"grid: expected \(rows, columns\) of the image's tokens, got 16"),
    ],
)
def test_bad_masks_are_refused(changes, error, message):
    given = {"masks": masks(), "tokens": TOKENS, "grid": GRID} | changes
    with pytest.raises(error, match=r"lr_kernels.Regions.from_masks: " + message):
        Regions.from_masks(**given)


def test_bad_bits_are_refused():
    bits = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"Regions: text: expected a tensor of torch\.uint8, got torch\.int64"):
        Regions(bits.long(), bits)
    with pytest.raises(ValueError, match="Regions: image: expected bits of regions 0 to 6, got 128"):
        Regions(bits, bits + 128)
    with pytest.raises(ValueError, match=r"Regions: image: expected shape \(tokens,\) or \(rows, tokens\)"):
        Regions(bits, bits[None, None])
    with pytest.raises(ValueError, match="Regions: image: expected 2 rows or 1, as text, got 3"):
        Regions(bits.expand(2, -1), bits.expand(3, -1))
    with pytest.raises(ValueError, match="Regions: image: expected cpu, got meta"):
        Regions(bits, bits.to("meta"))


def test_other_numbers_of_tokens_are_refused():
    """A prompt of another length, or a picture of another size, would be read by the wrong regions."""
    attention = regional(Regions.from_masks(masks(), (2, 3, 3), GRID))
    with pytest.raises(ValueError, match="expected regions of 9 and 16, got 8 tokens of text and 16 of the image"):
        run(flux, attention)
    stream = Tokens(*(torch.randn(1, 25, 2, 8) for _ in range(3)))
    with pytest.raises(ValueError, match="expected regions of 25 in one stream, got 8 tokens of text and 16"):
        attention(None, stream)
    with pytest.raises(TypeError, match="regions: expected Regions, got list"):
        regional_joint_attention(None, stream, [])
    with pytest.raises(ValueError, match="regions: expected regions of 2 rows, or of 1 for all, got 3"):
        run(sd3, regional(Regions.from_masks(masks()[None].expand(3, -1, -1, -1), TOKENS, GRID)))


def test_a_grid_in_another_ratio_than_the_masks_is_refused():
    wide = torch.zeros(1, 32, 96, dtype=torch.bool)
    wide[..., :48] = True
    for grid in ((4, 12), (2, 6), (8, 24), (64, 192), (1, 3)):
        Regions.from_masks(wide, (1, 2), grid)
    with pytest.raises(ValueError, match=r"grid: expected \(rows, columns\) in the ratio of the masks, 32 x 96, got"):
        Regions.from_masks(wide, (1, 2), (12, 4))
