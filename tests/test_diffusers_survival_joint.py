"""What users do to a transformer around the processors of joint attention; for UNets: test_diffusers_survival.py."""

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from model_changes import OFFLOADS, add_lora, randn

from lr_kernels.diffusers import (
    CustomFluxAttnProcessor,
    CustomSD3AttnProcessor,
    install_processors,
    joint_attention,
    joint_attention_layers,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval().requires_grad_(False)  # fmt: skip


def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    ).eval().requires_grad_(False)  # fmt: skip


def predict_joint(model):
    text = {"encoder_hidden_states": randn(2, 7, 32, seed=1), "timestep": torch.tensor([500, 500])}
    if isinstance(model, FluxTransformer2DModel):
        image = {"hidden_states": randn(2, 16, 4), "img_ids": randn(16, 3), "txt_ids": randn(7, 3, seed=2)}
        inputs = image | {"pooled_projections": randn(2, 32)}
    else:
        inputs = {"hidden_states": randn(2, 4, 8, 8), "pooled_projections": randn(2, 64)}
    with torch.no_grad():
        return model(**text, **inputs, return_dict=False)[0]


JOINT = pytest.mark.parametrize(
    ("build", "kind"), [(flux, CustomFluxAttnProcessor), (sd3, CustomSD3AttnProcessor)], ids=["flux", "sd3"]
)


def install_joint(model, kind, attention=None):
    layers = joint_attention_layers(model)
    return install_processors(layers, {name: kind(attention) for name in layers})


def load_joint_ip_adapter(model):
    """An IP-Adapter with random weights, by the model's own loader."""
    torch.manual_seed(2)
    if isinstance(model, FluxTransformer2DModel):
        weights = FluxIPAdapterAttnProcessor(32, 32).state_dict()
        tensors = {f"0.{name.replace('.0.', '.')}": x for name, x in weights.items()}
        image = {"proj.weight": randn(4 * 32, 8), "proj.bias": torch.zeros(4 * 32)}
        image |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    else:
        weights = SD3IPAdapterJointAttnProcessor2_0(32, 32, 8, 16).state_dict()
        tensors = {f"{i}.{name}": x for i in range(len(model.attn_processors)) for name, x in weights.items()}
        image = IPAdapterTimeImageProjection(8, 32, 64, heads=1, num_queries=4, timestep_in_dim=16).state_dict()
    model._load_ip_adapter_weights({"ip_adapter": tensors, "image_proj": image})


@JOINT
@pytest.mark.parametrize("first", ["lora", "installation"])
def test_a_lora_is_computed_in_joint_attention(build, kind, first):
    model, fused = build(), build()
    for x in (model, fused):
        if x is fused or first == "lora":
            add_lora(x)
    installation = install_joint(model, kind, joint_attention)
    if first == "installation":
        add_lora(model)
    active = predict_joint(model)
    installation.remove()
    with install_joint(model, kind):
        assert torch.equal(predict_joint(model), predict_joint(fused))
    fused.fuse_lora()
    torch.testing.assert_close(active, predict_joint(fused))
    assert not torch.allclose(active, predict_joint(build()), atol=1e-3)


@JOINT
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_changes_no_bit_of_joint_attention(build, kind, offload):
    model = build()
    install_joint(model, kind, joint_attention)
    keys, expected = list(model.state_dict()), predict_joint(model)
    assert keys == list(build().state_dict())
    offload(model)
    assert torch.equal(predict_joint(model), expected)


@JOINT
@pytest.mark.fault(number=36)
def test_installing_in_joint_attention_is_undone_exactly(build, kind, monkeypatch):
    model = build()
    before = model.attn_processors
    with pytest.raises(KeyError, match="within"), install_joint(model, kind) as installation:
        assert all(type(processor) is kind for processor in model.attn_processors.values())
        assert not installation.replaced()
        raise KeyError("within")
    assert model.attn_processors == before
    last = list(joint_attention_layers(model).values())[-1]
    set_processor = last.set_processor
    monkeypatch.setattr(last, "set_processor", lambda x: 1 / 0 if isinstance(x, kind) else set_processor(x))
    with pytest.raises(ZeroDivisionError):
        install_joint(model, kind)
    assert model.attn_processors == before


@JOINT
def test_an_ip_adapter_in_joint_attention_is_reported_if_loaded_meanwhile_and_refused_if_before(build, kind):
    model = build()
    before = model.attn_processors
    installation = install_joint(model, kind, joint_attention)
    load_joint_ip_adapter(model)
    layers = list(before)
    with pytest.warns(RuntimeWarning, match=rf"{len(layers)} of {len(layers)} .* is now \w+IPAdapter\w+"):
        installation.verify()
    installation.remove()
    left = model.attn_processors
    adapters = [name for name, p in left.items() if isinstance(p, torch.nn.Module)]
    assert adapters and all(left[name] is before[name] for name in layers if name not in adapters)
    with pytest.raises(NotImplementedError, match=r"got \w+IPAdapter\w+; .*unload_ip_adapter\(\)"):
        install_joint(model, kind)
    assert model.attn_processors == left


@pytest.mark.fault(number=16)
def test_flux_refuses_fused_projections_and_works_again_without():
    model = flux()
    installation = install_joint(model, CustomFluxAttnProcessor, joint_attention)
    expected = predict_joint(model)
    model.fuse_qkv_projections()
    assert not installation.replaced()
    with pytest.raises(NotImplementedError, match="attn: expected separate projections, got fused ones"):
        predict_joint(model)
    model.unfuse_qkv_projections()
    assert torch.equal(predict_joint(model), expected)


def test_without_a_function_flux_computes_fused_projections_as_stock():
    model, stock = flux(), flux()
    install_joint(model, CustomFluxAttnProcessor)
    for x in (model, stock):
        x.fuse_qkv_projections()
    assert torch.equal(predict_joint(model), predict_joint(stock))


def test_sd3s_fused_projections_are_reported_and_unfusing_brings_the_processors_back():
    model = sd3()
    installation = install_joint(model, CustomSD3AttnProcessor, joint_attention)
    expected = predict_joint(model)
    model.fuse_qkv_projections()
    with pytest.warns(RuntimeWarning, match="3 of 3 .* is now FusedJointAttnProcessor2_0"):
        installation.verify()
    model.unfuse_qkv_projections()
    assert not installation.replaced()
    assert torch.equal(predict_joint(model), expected)
    model.fuse_qkv_projections()
    model.set_attn_processor(CustomSD3AttnProcessor(joint_attention))  # it calls the separate projections, still there
    assert torch.equal(predict_joint(model), expected)


def test_sd3s_processors_that_unfusing_brings_back_after_removal_are_stock():
    model = sd3()
    expected = predict_joint(model)
    installation = install_joint(model, CustomSD3AttnProcessor, joint_attention)
    model.fuse_qkv_projections()
    installation.remove()
    assert {type(p) for p in model.attn_processors.values()} == {FusedJointAttnProcessor2_0}
    model.unfuse_qkv_projections()
    assert {type(p) for p in model.attn_processors.values()} == {CustomSD3AttnProcessor}
    assert torch.equal(predict_joint(model), expected)
