"""The components of the pipelines: which work, which are refused before any step, and what reaches both models."""

import copy
import warnings

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.utils import logging
from tiny_models import (
    TOLERANCE,
    XL_UNET,
    components,
    components_xl,
    distance,
    tiny_controlnet,
    tiny_text_config,
    tiny_tokenizer,
    tiny_unet,
)
from tiny_pipelines import IMAGES, MASK, NOISE, PROMPTS, SHARED, STEPS, banked, fresh, run, seeded
from transformers import CLIPTextModel

from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline, StableDiffusionXLLayoutRetouchPipeline
from lr_kernels.diffusers.processors.bank import ReferenceBank
from lr_kernels.diffusers.processors.install import layer_grid

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = pytest.mark.parametrize("kind", ["sd", "xl"])


def stock_of(pipe, kind, personalized=False):
    names = components() if kind == "sd" else components_xl()
    parts = {name: x for name, x in pipe.components.items() if name in names}
    parts["unet"] = pipe.personalized_unet if personalized else pipe.unet
    stock = StableDiffusionPipeline if kind == "sd" else StableDiffusionXLPipeline
    result = stock(**parts, **({"requires_safety_checker": False} if kind == "sd" else {"add_watermarker": False}))
    result.set_progress_bar_config(disable=True)
    return result


# Autoencoders


def tiny_vae():
    sides = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**sides, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))


def asymmetric_vae():
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
    )


def consistency_vae():
    return ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_norm_num_groups=4,
        encoder_layers_per_block=1,
        decoder_block_out_channels=(8, 8),
        decoder_down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        decoder_up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
        decoder_num_train_timesteps=1024,
    )


@pytest.mark.parametrize("make", [tiny_vae, asymmetric_vae, consistency_vae])
@KINDS
def test_autoencoders_of_other_kinds(kind, make):
    torch.manual_seed(3)
    vae = make().eval()
    pipe = fresh(kind, vae=vae)
    arguments = {**SHARED, "latents": NOISE, "output_type": "pt"}
    stock = stock_of(pipe, kind)
    torch.manual_seed(0)  # SDXL's pipeline gives a decoder with noise of its own no generator
    expected = stock(["a ball"] * 2, **arguments, generator=seeded()).images
    torch.manual_seed(0)
    found = pipe.layout(PROMPTS, "a ball", layout_steps=STEPS, **arguments, generator=seeded()).images
    assert distance(found, expected) <= TOLERANCE
    out = run(pipe, output_type="pt", reference_mask=MASK)
    assert out.images.shape == (2, 3, 16, 16) and out.images.isfinite().all()


def test_encoding_by_a_tiny_autoencoder_is_its_encoder():
    vae = tiny_vae().eval()
    pipe = fresh(vae=vae)
    with torch.no_grad():
        expected = vae.encode(IMAGES * 2 - 1).latents * vae.config.scaling_factor
    torch.testing.assert_close(pipe.encode_images(IMAGES, 16, 16), expected)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_from_pipe_takes_other_autoencoders_and_says_nothing(kind):
    stock_class = StableDiffusionPipeline if kind == "sd" else StableDiffusionXLPipeline
    ours = StableDiffusionLayoutRetouchPipeline if kind == "sd" else StableDiffusionXLLayoutRetouchPipeline
    parts = components() if kind == "sd" else components_xl()
    stock = stock_class(**{**parts, "vae": tiny_vae()}).to(torch.bfloat16)
    unet = tiny_unet(1, **({} if kind == "sd" else XL_UNET)).to(torch.bfloat16)
    logger = logging.get_logger("diffusers.pipelines.pipeline_utils")
    seen = []
    logger.addFilter(lambda record: seen.append(record.getMessage()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = ours.from_pipe(stock, personalized_unet=unet)
    finally:
        logger.filters.clear()
    assert pipe.vae is stock.vae and pipe.vae.dtype == pipe.unet.dtype == torch.bfloat16 and not seen


def test_from_pipe_names_the_component_of_another_dtype():
    stock = StableDiffusionPipeline(**components())
    stock.text_encoder.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype: .*text_encoder torch.bfloat16, unet torch.float32.*; pass dtype="):
        StableDiffusionLayoutRetouchPipeline.from_pipe(stock, personalized_unet=tiny_unet(1))


# What cannot work


class Patched(BasicTransformerBlock):
    pass


def patched(unet):
    """As tomesd.apply_patch changes a UNet."""
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.__class__ = Patched
    return unet


def narrow_encoder():
    config = tiny_text_config(tiny_tokenizer())
    config.hidden_size = 8
    return CLIPTextModel(config).eval()


def video_vae():
    return AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2)


XL_INSTEAD = "Stable Diffusion XL has a pipeline of its own, StableDiffusionXLLayoutRetouchPipeline"
TRAINED_WITH = "pass the text encoders that personalized_unet was trained with"
CHANGES = {  # what is passed, the component that is named, expected, got; the hint
    "another class": (
        lambda: {"unet": tiny_unet(0, **XL_UNET)},
        "unet: expected addition_embed_type None or addition_embed_type 'text', got 'text_time'; " + XL_INSTEAD,
    ),
    "inpainting": (
        lambda: {"unet": tiny_unet(0, in_channels=9)},
        "unet: expected 4 input channels, as it has outputs, got 9; load a text-to-image UNet",
    ),
    "instructions": (
        lambda: {"personalized_unet": tiny_unet(0, in_channels=8)},
        "personalized_unet: expected 4 input channels, as it has outputs, got 8",
    ),
    "upscaling": (lambda: {"unet": tiny_unet(0, in_channels=7)}, "unet: expected 4 input channels"),
    "latents": (
        lambda: {"unet": tiny_unet(0, in_channels=3, out_channels=3)},
        "unet: expected latents of 4 channels, as vae's, got 3",
    ),
    "width of texts": (
        lambda: {"personalized_unet": tiny_unet(1, cross_attention_dim=32)},
        "personalized_unet: expected text embeddings of 16 channels, as text_encoder make them, got 32; "
        + TRAINED_WITH,
    ),
    "text encoder": (
        lambda: {"personalized_text_encoder": narrow_encoder()},
        "personalized_unet: expected text embeddings of 8 channels, as personalized_text_encoder make them, got 16",
    ),
    "guidance": (
        lambda: {"personalized_unet": tiny_unet(1, time_cond_proj_dim=8)},
        "personalized_unet: expected time_cond_proj_dim None, as unet, got 8",
    ),
    "class labels": (
        lambda: {"unet": tiny_unet(0, num_class_embeds=3)},
        "unet: expected one without class labels, got 3 classes",
    ),
    "class type": (
        lambda: {"personalized_unet": tiny_unet(1, class_embed_type="timestep")},
        "personalized_unet: expected one without class labels, got timestep",
    ),
    "no text encoder": (lambda: {"text_encoder": None}, "text_encoder: expected one, since prompt is text, got None"),
    "no tokenizer": (lambda: {"tokenizer": None}, "tokenizer: expected one, since it finds subject_tokens in prompts"),
    "no unet": (lambda: {"unet": None}, "unet: expected a UNet, got None"),
    "no vae": (lambda: {"vae": None}, "vae: expected an autoencoder, got None; pass one, or output_type='latent'"),
    "video": (lambda: {"vae": video_vae()}, "vae: expected an autoencoder that decodes latents alone"),
    "precision": (
        lambda: {"personalized_unet": tiny_unet(1).to(torch.bfloat16)},
        "personalized_unet: expected torch.float32, as unet, got torch.bfloat16; bring all components to one precision",
    ),
    "precision of texts": (
        lambda: {"text_encoder": components()["text_encoder"].double()},
        "text_encoder: expected torch.float32, as unet, got torch.float64",
    ),
    "a patch": (
        lambda: {"unet": patched(tiny_unet(0))},
        "personalized_unet: expected transformer blocks of the kind of unet's",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.fault(number=16)
def test_what_cannot_work_is_refused_before_any_step(name):
    make, message = CHANGES[name]
    steps = []
    pipe = fresh(**make())
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        run(pipe, callback_on_step_end=lambda *a: steps.append(a), latents=None, height=16, width=16)
    assert str(caught.value).startswith(f"lr_kernels.LayoutRetouch: {message}") and not steps


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"unet": tiny_unet(0)}, "unet: expected addition_embed_type 'text_time', got None"),
        ({"text_encoder_2": None}, "text_encoder_2: expected one, since prompt is text, got None"),
        (
            {"personalized_unet": tiny_unet(1, **{**XL_UNET, "projection_class_embeddings_input_dim": 8})},
            "personalized_unet: expected 64 added conditions, of 6 sizes and text_encoder_2, got 8",
        ),
    ],
)
@pytest.mark.fault(number=16)
def test_what_cannot_work_with_sdxl(parts, message):
    with pytest.raises(ValueError) as caught:
        run(fresh("xl", **parts))
    assert str(caught.value).startswith(f"lr_kernels.LayoutRetouch: {message}")


def test_a_personalized_unet_of_another_width_works():
    pipe = fresh(personalized_unet=tiny_unet(1, block_out_channels=(8, 24)))
    stock = stock_of(pipe, "sd", personalized=True)
    arguments = {**SHARED, "latents": NOISE}
    found = pipe.layout(PROMPTS, "a ball", layout_steps=0, **arguments).latents
    assert distance(found, stock(PROMPTS, **arguments).images) <= TOLERANCE
    assert run(pipe).latents.isfinite().all()
    narrow = fresh(personalized_unet=pipe.personalized_unet, controlnet=tiny_controlnet(pipe.unet))
    with pytest.raises(
        ValueError, match=r"controlnet: expected block_out_channels \(8, 24\), as personalized_unet, got"
    ):
        run(narrow, control_image=IMAGES[:1])


def test_latents_need_neither_autoencoder_nor_encoder_of_text():
    pipe = fresh()
    texts = pipe.layout(PROMPTS, "a ball", **SHARED, latents=NOISE).latents
    embeds = [pipe.encode_prompt(x, torch.device("cpu"), 1, True, [""] * 2) for x in (PROMPTS, ["a ball"] * 2)]
    given = {
        "prompt_embeds": embeds[0][0],
        "layout_prompt_embeds": embeds[1][0],
        "negative_prompt_embeds": embeds[0][1],
    }
    bare = fresh(vae=None, text_encoder=None, tokenizer=None)
    assert distance(bare.layout(**given, **SHARED, latents=NOISE).latents, texts) <= TOLERANCE


# What reaches both models


@KINDS
def test_freeu_is_on_and_off_in_both_unets(kind):
    pipe = fresh(kind)
    arguments = {**SHARED, "latents": NOISE}
    before = run(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    for personalized in (False, True):
        texts = PROMPTS if personalized else ["a ball"] * 2
        expected = stock_of(pipe, kind, personalized)(texts, **arguments).images
        found = pipe.layout(PROMPTS, "a ball", layout_steps=0 if personalized else STEPS, **arguments).latents
        assert distance(found, expected) <= TOLERANCE
    assert distance(run(pipe).layout_images, before.layout_images) > TOLERANCE
    pipe.disable_freeu()
    assert torch.equal(run(pipe).latents, before.latents)


@KINDS
def test_fused_projections_are_in_both_unets_and_refused_where_attention_is_shared(kind):
    pipe = fresh(kind)
    arguments = {**SHARED, "latents": NOISE, "layout_steps": 2}
    before, shared = pipe.layout(PROMPTS, "a ball", **arguments).latents, run(pipe).latents
    pipe.fuse_qkv_projections()
    for unet in (pipe.unet, pipe.personalized_unet):
        assert {type(p) for p in unet.attn_processors.values()} == {FusedAttnProcessor2_0}
    assert distance(pipe.layout(PROMPTS, "a ball", **arguments).latents, before) <= TOLERANCE
    with pytest.raises(NotImplementedError, match=r"got FusedAttnProcessor2_0; .*unfuse_qkv_projections\(\)"):
        run(pipe)
    pipe.unfuse_qkv_projections()
    for unet in (pipe.unet, pipe.personalized_unet):
        assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert torch.equal(run(pipe).latents, shared)


def test_slicing_is_in_both_unets():
    pipe = fresh()
    expected = run(pipe).latents
    pipe.enable_attention_slicing()
    with pytest.raises(NotImplementedError, match=r"got SlicedAttnProcessor; .*disable_attention_slicing\(\)"):
        run(pipe)
    pipe.disable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert torch.equal(run(pipe).latents, expected)


class Merging(BasicTransformerBlock):
    """As ToMe at a ratio of 0.75: self-attention of a quarter of the tokens, which is the next scale's number."""

    def forward(self, hidden_states, *args, **kwargs):
        short = super().forward(hidden_states[:, ::4], *args, **kwargs)
        return short.repeat_interleave(4, 1)


@pytest.mark.parametrize("reference_mask", [MASK, None], ids=["given", "found"])
def test_merged_tokens_are_refused_instead_of_taking_another_layers_routing(reference_mask):
    unets = {"unet": tiny_unet(0), "personalized_unet": tiny_unet(1)}
    for unet in unets.values():
        for name, block in unet.named_modules():
            if isinstance(block, BasicTransformerBlock) and name.startswith("down_blocks.0"):
                block.__class__ = Merging
    layout = torch.zeros(8, 8)
    layout[2:6, 2:6] = 1
    with pytest.raises(NotImplementedError, match=r"expected 64 tokens.*, got 16; remove what merges tokens"):
        fresh(**unets).retouch(
            PROMPTS,
            IMAGES[:1],
            "a sks ball",
            "ball",
            context_latents=NOISE,
            layout_mask=layout,
            reference_mask=reference_mask,
            **SHARED,
        )


EMBEDDING = {"<neg>": torch.randn(2, 16, generator=torch.Generator().manual_seed(3)) * 3}


@KINDS
def test_a_textual_inversion_is_given_to_both_models(kind):
    pipe = fresh(kind)
    own = {
        f"personalized_{name}": copy.deepcopy(getattr(pipe, name))
        for name in ("text_encoder", "text_encoder_2")[: 1 + (kind == "xl")]
    }
    parts = components() if kind == "sd" else components_xl()
    pipe = fresh(kind, **{**parts, **own})
    plain, none = run(pipe, negative_prompt="<neg>"), run(pipe)
    pipe.load_textual_inversion(EMBEDDING)
    if kind == "xl":
        pipe.load_textual_inversion(
            EMBEDDING, text_encoder=pipe.personalized_text_encoder_2, tokenizer=pipe.tokenizer_2
        )
        tables = [x.get_input_embeddings().weight for x in (pipe.text_encoder_2, pipe.personalized_text_encoder_2)]
        assert torch.equal(*(table[-2:] for table in tables))
    for personalized in (False, True):
        stock = stock_of(pipe, kind, personalized)
        if personalized:
            stock.text_encoder = pipe.personalized_text_encoder
        texts = PROMPTS if personalized else ["a ball"] * 2
        arguments = {**SHARED, "latents": NOISE}
        expected = stock(texts, negative_prompt=["<neg>"] * 2, **arguments).images
        arguments["layout_steps"] = 0 if personalized else STEPS
        found = pipe.layout(PROMPTS, "a ball", negative_prompt="<neg>", **arguments).latents
        assert distance(found, expected) <= TOLERANCE
    assert distance(run(pipe, negative_prompt="<neg>").latents, plain.latents) > TOLERANCE
    pipe.unload_textual_inversion()
    assert pipe.personalized_text_encoder.get_input_embeddings().num_embeddings == len(pipe.tokenizer)
    if kind == "sd":
        assert torch.equal(run(pipe).latents, none.latents)


@pytest.mark.fault(number=16)
def test_an_embedding_that_one_encoder_does_not_have_is_named():
    parts = components()
    stock = StableDiffusionPipeline(**parts)
    encoder = copy.deepcopy(stock.text_encoder)
    stock.load_textual_inversion(EMBEDDING)
    pipe = fresh(**{**parts, "personalized_text_encoder": encoder})
    steps = []
    with pytest.raises(
        ValueError, match="personalized_text_encoder: expected an embedding of '<neg>_1', which is in neg"
    ):
        run(pipe, negative_prompt="<neg>", callback_on_step_end=lambda *a: steps.append(a))
    assert not steps and run(pipe, negative_prompt="b").latents.isfinite().all()
    assert run(pipe, layout_steps=STEPS, guidance_scale=1.0, negative_prompt="<neg>").latents.isfinite().all()


# Grids


def test_every_size_has_its_layers_grids():
    """Sizes in 8-pixel steps, 129 x 129: a bank finds the grid that the UNet's strided convolutions make."""
    sides = range(1, 130)
    halved = {scale: [1 + (side - 1) // scale for side in range(131)] for scale in (1, 2, 4, 8)}
    bank = ReferenceBank([1])
    for height in sides:
        for width in sides:
            bank._foreground = torch.empty(1, height, width, device="meta")
            for scale, expected in halved.items():
                grid = layer_grid(scale, height, width)
                assert grid == (expected[height], expected[width])
                rows, columns = bank._grid(grid[0] * grid[1])
                assert rows * columns == grid[0] * grid[1] and (rows, columns) == grid


def test_a_size_that_no_scale_divides():
    four = {
        "block_out_channels": (16,) * 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    pipe = fresh(unet=tiny_unet(0, **four), personalized_unet=tiny_unet(1, **four))
    size = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 66, "width": 34}
    bank = banked(pipe, **size)
    arguments = {**size, "output_type": "latent", "layout_mask": MASK}
    found = pipe(
        PROMPTS[:1],
        "a ball",
        subject_tokens=("sks", "ball"),
        reference_bank=bank,
        generator=seeded(),
        **arguments,
    )
    expected = pipe(
        PROMPTS[:1],
        "a ball",
        IMAGES[:1],
        "a sks ball",
        ("sks", "ball"),
        reference_mask=MASK,
        generator=seeded(),
        **arguments,
    )
    assert distance(found.latents, expected.latents) <= TOLERANCE
