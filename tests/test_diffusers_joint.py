"""Joint attention of Flux and SD3 by a function of one's own: stock bit for bit without one, stock's numbers with the
models' own attention, and a plain transcription with a shared one."""

import functools

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from lr_kernels.diffusers.processors import joint
from lr_kernels.testing import assert_matches

ROWS = torch.tensor([-1, 0], dtype=torch.int32)


@functools.cache
def flux(dtype=torch.float32):
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).to(dtype).eval()  # fmt: skip


@functools.cache
def sd3(dtype=torch.float32):
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    ).to(dtype).eval()  # fmt: skip


def inputs(build, dtype):
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    if build is flux:
        found = {"hidden_states": randn(2, 16, 4), "encoder_hidden_states": randn(2, 7, 32), "img_ids": randn(16, 3)}
        return found | {"pooled_projections": randn(2, 32), "txt_ids": randn(7, 3), "timestep": randn(2).abs()}
    found = {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 7, 32)}
    return found | {"pooled_projections": randn(2, 64), "timestep": torch.tensor([500, 500])}


def run(build, processor=None, dtype=torch.float32):
    model = build(dtype)
    stock = dict(model.attn_processors)
    try:
        if processor is not None:
            model.set_attn_processor(processor)
        with torch.no_grad():
            return model(**inputs(build, dtype), return_dict=False)[0]
    finally:
        model.set_attn_processor(stock)


@pytest.mark.parametrize("build", [flux, sd3])
def test_the_layers_are_those_of_the_models_processors(build):
    model = build()
    found = joint.joint_attention_layers(model)
    assert {f"{name}.processor": layer.processor for name, layer in found.items()} == model.attn_processors
    assert joint.joint_attention_layers(torch.compile(model)) == found
    with pytest.raises(ValueError, match="model: expected one with Flux's or SD3's attention, got Linear"):
        joint.joint_attention_layers(torch.nn.Linear(2, 2))


CASES = [(flux, joint.CustomFluxAttnProcessor), (sd3, joint.CustomSD3AttnProcessor)]


@pytest.mark.parametrize(("build", "processor"), CASES, ids=["flux", "sd3"])
def test_without_a_function_it_is_stock_bit_for_bit(build, processor):
    assert torch.equal(run(build, processor()), run(build))


@pytest.mark.parametrize(("build", "processor"), CASES, ids=["flux", "sd3"])
def test_the_models_own_attention_gives_stocks_numbers(build, processor):
    found = run(build, processor(joint.joint_attention))
    assert_matches(found, run(build), run(build, dtype=torch.float64))


def plain(text, image, rows, strength, text_tokens):
    """Shared joint attention with concatenated keys, by PyTorch."""
    split = text_tokens if text is None else text.query.shape[1]
    query, key, value = image if text is None else (torch.cat(x, 1) for x in zip(text, image))
    other = rows.clamp(min=0).long()
    keys, values = (torch.cat([x, x[other][:, split:]], 1) for x in (key, value))
    logits = torch.einsum("bnhd,bmhd->bhnm", query, keys) / query.shape[-1] ** 0.5
    logits[..., key.shape[1] :] += strength
    hidden = torch.zeros(len(rows), 1, query.shape[1], keys.shape[1], dtype=torch.bool)
    hidden[:, :, :split, key.shape[1] :] = True
    hidden[rows < 0, :, :, key.shape[1] :] = True
    out = torch.einsum("bhnm,bmhd->bnhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return (None, out) if text is None else (out[:, :split], out[:, split:])


@pytest.mark.parametrize(("build", "processor"), CASES, ids=["flux", "sd3"])
@pytest.mark.fault(number=1)
def test_shared_attention_matches_a_transcription(build, processor):
    text_tokens = 7 if build is flux else 0  # of Flux's single blocks; SD3's second attention has image tokens alone
    ours = functools.partial(
        joint.shared_joint_attention, rows=ROWS, strength=torch.tensor(0.4), text_tokens=text_tokens
    )
    theirs = functools.partial(plain, rows=ROWS, strength=0.4, text_tokens=text_tokens)
    found = run(build, processor(ours))
    assert_matches(found, run(build, processor(theirs)), run(build, processor(theirs), torch.float64))
    stock = run(build)
    assert torch.allclose(found[0], stock[0], atol=1e-5) and not torch.allclose(found[1], stock[1], atol=1e-3)


@pytest.mark.parametrize(("build", "processor"), CASES, ids=["flux", "sd3"])
@pytest.mark.fault(number=16)
def test_masks_are_refused_not_dropped(build, processor):
    model = build()
    attn = next(m for m in model.modules() if hasattr(m, "processor"))
    x = torch.randn(1, 4, attn.to_q.in_features)
    with pytest.raises(NotImplementedError, match="attention_mask"):
        processor(joint.joint_attention)(attn, x, None, attention_mask=torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(("build", "processor"), CASES, ids=["flux", "sd3"])
@pytest.mark.fault(number=16)
def test_an_ip_adapters_arguments_are_refused_not_dropped(build, processor):
    """As a pipeline hands them: the layer drops what the processor does not name, for these without a warning."""
    model = build()
    stock = dict(model.attn_processors)
    arguments = inputs(build, torch.float32) | {
        "joint_attention_kwargs": {"ip_hidden_states": [torch.ones(2, 1, 4, 32)]}
    }
    try:
        model.set_attn_processor(processor(joint.joint_attention))
        with torch.no_grad(), pytest.raises(NotImplementedError, match="ip_hidden_states: expected None"):
            model(**arguments)
    finally:
        model.set_attn_processor(stock)


@pytest.mark.fault(number=16)
def test_fused_projections_are_refused():
    model = flux()
    attn = next(m for m in model.modules() if hasattr(m, "processor"))
    attn.fused_projections = True
    try:
        with pytest.raises(NotImplementedError, match="fused"):
            joint.CustomFluxAttnProcessor(joint.joint_attention)(attn, torch.randn(1, 4, attn.to_q.in_features))
    finally:
        attn.fused_projections = False


def test_processors_have_no_parameters():
    assert not isinstance(joint.CustomFluxAttnProcessor(), torch.nn.Module)
    assert not isinstance(joint.CustomSD3AttnProcessor(), torch.nn.Module)
