"""Joint attention of Flux, Flux2, SD3 and Qwen-Image by a function of one's own: stock bit for bit without one, stock's
numbers with the models' own attention, and a plain transcription with a shared one."""

import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from model_changes import OFFLOADS
from tiny_joint import BUILDS, add_lora, flux, flux2, inputs, predict, qwen_image, sd3

from lr_kernels.diffusers import attention_layers, install_processors
from lr_kernels.diffusers.processors import joint
from lr_kernels.testing import assert_matches

ROWS = torch.tensor([-1, 0], dtype=torch.int32)
ALL = pytest.mark.parametrize("build", BUILDS, ids=[build.__name__ for build in BUILDS])

STOCK = {
    joint.CustomFluxAttnProcessor: FluxAttnProcessor,
    joint.CustomFlux2AttnProcessor: Flux2AttnProcessor,
    joint.CustomFlux2ParallelSelfAttnProcessor: Flux2ParallelSelfAttnProcessor,
    joint.CustomSD3AttnProcessor: JointAttnProcessor2_0,
    joint.CustomQwenImageAttnProcessor: QwenDoubleStreamAttnProcessor2_0,
}
EACH = pytest.mark.parametrize("kind", STOCK, ids=[kind.__name__ for kind in STOCK])


def installed(model, attention=None):
    layers = joint.joint_attention_layers(model)
    return install_processors(layers, joint.joint_processors(layers, attention))


def run(build, attention=None, dtype=torch.float32, **changes):
    model = build(dtype)
    with installed(model, attention):
        return predict(model, inputs(build, dtype) | changes)


def stock(build, dtype=torch.float32, **changes):
    return predict(build(dtype), inputs(build, dtype) | changes)


@ALL
def test_the_layers_are_those_of_the_models_processors(build):
    model = build()
    found = joint.joint_attention_layers(model)
    assert {f"{name}.processor": layer.processor for name, layer in found.items()} == model.attn_processors
    assert joint.joint_attention_layers(torch.compile(model)) == found
    for name, processor in joint.joint_processors(found).items():
        assert type(found[name].processor) is STOCK[type(processor)]


def test_models_and_layers_without_joint_attention_are_refused():
    expected = "model: expected one with the attention of Flux, Flux2, SD3 or Qwen-Image, got Linear"
    with pytest.raises(ValueError, match=expected):
        joint.joint_attention_layers(torch.nn.Linear(2, 2))
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"layers: expected layers of joint_attention_layers\(model\), got .*attn1"):
        joint.joint_processors(attention_layers(unet, "self"))


@ALL
def test_without_a_function_it_is_stock_bit_for_bit(build):
    assert torch.equal(run(build), stock(build))


@ALL
def test_the_models_own_attention_gives_stocks_numbers(build):
    assert_matches(run(build, joint.joint_attention), stock(build), stock(build, torch.float64))


def plain(text, image, rows, strength, text_tokens):
    """Shared joint attention with concatenated keys, by PyTorch."""
    split = text_tokens if text is None else text.query.shape[1]
    query, key, value = image[:3] if text is None else (torch.cat(x, 1) for x in zip(text[:3], image[:3]))
    other = rows.clamp(min=0).long()
    keys, values = (torch.cat([x, x[other][:, split:]], 1) for x in (key, value))
    logits = torch.einsum("bnhd,bmhd->bhnm", query, keys) / query.shape[-1] ** 0.5
    logits[..., key.shape[1] :] += strength
    hidden = torch.zeros(len(rows), 1, query.shape[1], keys.shape[1], dtype=torch.bool)
    hidden[:, :, :split, key.shape[1] :] = True
    hidden[rows < 0, :, :, key.shape[1] :] = True
    if text is not None and text.mask is not None:
        hidden[..., :split] |= ~text.mask[:, None, None]
    out = torch.einsum("bhnm,bmhd->bnhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return (None, out) if text is None else (out[:, :split], out[:, split:])


@ALL
@pytest.mark.fault(number=1)
def test_shared_attention_matches_a_transcription(build):
    text_tokens = 7 if build in (flux, flux2) else 0  # of the single blocks; SD3's second attention is the image's
    given = {"rows": ROWS, "text_tokens": text_tokens}
    ours = functools.partial(joint.shared_joint_attention, strength=torch.tensor(0.4), **given)
    theirs = functools.partial(plain, strength=0.4, **given)
    found = run(build, ours)
    assert_matches(found, run(build, theirs), run(build, theirs, torch.float64))
    expected = stock(build)
    assert torch.allclose(found[0], expected[0], atol=1e-5) and not torch.allclose(found[1], expected[1], atol=1e-3)


@pytest.mark.parametrize(
    "attention", [joint.joint_attention, functools.partial(joint.shared_joint_attention, rows=ROWS)]
)
@pytest.mark.fault(number=11)
def test_padding_of_qwen_images_text_is_seen_by_nobody(attention):
    """Not even if it is NaN in the keys and values, which the model's own projections make of it."""
    found = run(qwen_image, attention)
    text = inputs(qwen_image)["encoder_hidden_states"].clone()
    text[1, 5:] = torch.nan
    assert torch.equal(run(qwen_image, attention, encoder_hidden_states=text), found)
    unmasked = run(qwen_image, attention, encoder_hidden_states_mask=None)
    assert not torch.allclose(unmasked[1], found[1], atol=1e-3)


@EACH
@pytest.mark.fault(number=16)
def test_masks_and_context_parallelism_are_refused_not_dropped(kind):
    build = {"Flux2": flux2, "QwenI": qwen_image, "SD3At": sd3, "FluxA": flux}[kind.__name__.removeprefix("Custom")[:5]]
    model = build()
    attn = next(m for m in model.modules() if type(getattr(m, "processor", None)) is STOCK[kind])
    x = torch.randn(1, 4, 32)
    arguments = {"encoder_hidden_states": x} if build is qwen_image else {}
    with pytest.raises(NotImplementedError, match=f"{kind.__name__}: attention_mask: expected None"):
        kind(joint.joint_attention)(attn, x, attention_mask=torch.ones(1, 1, 4, 4), **arguments)
    processor = kind(joint.joint_attention)
    processor._parallel_config = object()
    with pytest.raises(NotImplementedError, match=f"{kind.__name__}: _parallel_config: expected None"):
        processor(attn, x, **arguments)


@pytest.mark.parametrize("build", [flux, sd3])
@pytest.mark.fault(number=16)
def test_an_ip_adapters_arguments_are_refused_not_dropped(build):
    """As a pipeline hands them: the layer drops what the processor does not name, for these without a warning."""
    images = {"joint_attention_kwargs": {"ip_hidden_states": [torch.ones(2, 1, 4, 32)]}}
    with pytest.raises(NotImplementedError, match="ip_hidden_states: expected None"):
        run(build, joint.joint_attention, **images)


@pytest.mark.parametrize("attention", [None, joint.joint_attention])
@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
@pytest.mark.fault(number=16)
def test_cached_references_of_flux2_are_refused_not_dropped(blocks, attention):
    model = flux2()
    layers = {n: x for n, x in joint.joint_attention_layers(model).items() if n.startswith(blocks)}
    with install_processors(layers, joint.joint_processors(layers, attention)):
        with pytest.raises(NotImplementedError, match="kv_cache_mode: expected None, got 'extract'"):
            predict(model, inputs(flux2) | {"kv_cache_mode": "extract", "num_ref_tokens": 4})


@pytest.mark.parametrize("build", [flux, flux2])
@pytest.mark.fault(number=16)
def test_fused_projections_are_refused(build):
    model = build()
    attn = next(iter(joint.joint_attention_layers(model).values()))
    attn.fused_projections = True
    try:
        with installed(model, joint.joint_attention), pytest.raises(NotImplementedError, match="fused"):
            predict(model, inputs(build))
    finally:
        attn.fused_projections = False


@ALL
def test_a_result_of_another_shape_is_refused(build):
    with pytest.raises(TypeError, match=r"attention: expected a result for the image of shape \(2, .*, got None"):
        run(build, lambda text, image: (image.query, None))
    with pytest.raises(TypeError, match=r"attention: expected a result for the text of shape \(2, 7, .*, got None"):
        run(build, lambda text, image: (None, image.query))


def test_qwen_image_without_text_is_refused():
    with pytest.raises(ValueError, match="encoder_hidden_states: expected the text's, got None"):
        joint.CustomQwenImageAttnProcessor(joint.joint_attention)(None, torch.randn(1, 4, 32))


@ALL
def test_a_lora_is_computed(build):
    builds = [build.__wrapped__() for _ in range(2)]
    for model in builds:
        add_lora(model)
    builds[1].fuse_lora()
    arguments = inputs(build)
    with installed(builds[0], joint.joint_attention):
        found = predict(builds[0], arguments)
    torch.testing.assert_close(found, predict(builds[1], arguments))
    assert not torch.allclose(found, stock(build), atol=1e-3)


@ALL
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_changes_no_bit(build, offload):
    model, found = build.__wrapped__(), run(build, joint.joint_attention)
    installed(model, joint.joint_attention)
    offload(model)
    assert torch.equal(predict(model, inputs(build)), found)


@ALL
@pytest.mark.fault(number=29)
def test_it_compiles_whole(build):
    expected, model = stock(build), build()
    torch.compiler.reset()
    with installed(model, joint.joint_attention):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(predict(compiled, inputs(build)), expected)


@EACH
def test_processors_are_made_without_arguments_and_have_no_parameters(kind):
    processor = kind()
    assert isinstance(processor, STOCK[kind]) and not isinstance(processor, torch.nn.Module)
    assert processor.attention is None
    assert hasattr(STOCK[kind], "_attention_backend") == hasattr(processor, "_attention_backend")


@ALL
def test_installing_is_undone_exactly(build):
    model = build()
    before = model.attn_processors
    with pytest.raises(KeyError), installed(model, joint.joint_attention):
        assert all(type(x) in STOCK for x in model.attn_processors.values())
        raise KeyError
    assert model.attn_processors == before
    with installed(model, joint.joint_attention), pytest.raises(NotImplementedError, match="a stock attention proc"):
        installed(model)
