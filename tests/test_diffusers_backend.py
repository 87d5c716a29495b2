"""lr_kernels as an attention backend of diffusers, on tiny models as diffusers builds them."""

import copy
import pickle

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    ParallelConfig,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    TensorParallelConfig,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from model_changes import add_lora

from lr_kernels import Source, multi_source_attention
from lr_kernels.diffusers import (
    CustomAttnProcessor,
    attention_layers,
    backend,
    install_processors,
    joint_attention_layers,
    select_layers,
)
from lr_kernels.diffusers.backend import register_attention_backend, use_attention_backend
from lr_kernels.diffusers.processors import joint
from lr_kernels.diffusers.processors.joint import joint_processors
from lr_kernels.testing import assert_matches


def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([1.0, 0.5]),
        "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip
    return model.eval(), inputs


def wan():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    rope_max_seq_len=32, )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 9, 16),
    }  # fmt: skip
    return model.eval(), inputs


def qwen_image():
    """The second prompt is shorter: its padding is hidden from all queries."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3]),
        "timestep": torch.tensor([1.0, 0.5]), "img_shapes": [[(1, 4, 4)]] * 2,
    }  # fmt: skip
    return model.eval(), inputs


def flux2():
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.tensor([1.0, 0.5]), "img_ids": torch.randn(16, 4), "txt_ids": torch.zeros(7, 4),
    }  # fmt: skip
    return model.eval(), inputs


def z_image():
    """Prompts of 32 and 64 tokens after padding: the shorter one's rest is hidden."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    inputs = {
        "x": list(torch.randn(2, 4, 1, 8, 8)), "t": torch.tensor([1.0, 0.5]),
        "cap_feats": [torch.randn(5, 16), torch.randn(40, 16)],
    }  # fmt: skip
    return model.eval(), inputs


def ltx():
    """The second prompt is shorter; diffusers repeats the mask of its padding for every head."""
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 2 * 4 * 4, 4), "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]), "timestep": torch.tensor([500, 300]),
        "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip
    return model.eval(), inputs


def run(model, inputs):
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    return torch.stack(found) if isinstance(found, list) else found


@pytest.fixture
def calls(monkeypatch):
    """How often our attention ran."""
    seen = []
    original = backend.attention_call
    monkeypatch.setattr(backend, "attention_call", lambda *a, **k: seen.append(a[0]) or original(*a, **k))
    return seen


@pytest.fixture(autouse=True)
def restored():
    active = _AttentionBackendRegistry._active_backend
    register_attention_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(active)


MODELS = [(flux, 2), (wan, 4), (qwen_image, 2), (flux2, 2), (z_image, 3), (ltx, 4)]


@pytest.mark.parametrize(("build", "layers"), MODELS, ids=[build.__name__ for build, _ in MODELS])
def test_every_way_to_switch_it_on(build, layers, calls):
    model, inputs = build()
    expected = run(model, inputs)
    with attention_backend("lr_kernels"):
        torch.testing.assert_close(run(model, inputs), expected)
    assert len(calls) == layers
    with use_attention_backend(model):
        torch.testing.assert_close(run(model, inputs), expected)
    assert len(calls) == 2 * layers
    assert torch.equal(run(model, inputs), expected) and len(calls) == 2 * layers
    model.set_attention_backend("lr_kernels")
    torch.testing.assert_close(run(model, inputs), expected)
    assert len(calls) == 3 * layers
    model.reset_attention_backend()


def test_registering_again_changes_nothing_and_the_member_is_a_member():
    before = _AttentionBackendRegistry._backends[AttentionBackendName("lr_kernels")]
    register_attention_backend()
    assert _AttentionBackendRegistry._backends[AttentionBackendName("lr_kernels")] is before
    member = AttentionBackendName("lr_kernels")
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert member in list(AttentionBackendName) and member == "lr_kernels"


@pytest.mark.fault(number=36)
def test_the_context_restores_after_an_exception_and_leaves_other_models_alone(calls):
    model, inputs = flux()
    other, _ = flux()
    with pytest.raises(KeyError), use_attention_backend(model):
        run(other, inputs)
        assert not calls
        raise KeyError
    run(model, inputs)
    assert not calls
    states = [vars(m.processor) for m in model.modules() if hasattr(m, "processor")]
    assert all("_attention_backend" not in state for state in states)


def test_the_context_gives_back_a_backend_that_was_set():
    model, _ = flux()
    model.set_attention_backend("native")
    with use_attention_backend(model):
        pass
    chosen = {m.processor._attention_backend for m in model.modules() if hasattr(m, "processor")}
    assert chosen == {AttentionBackendName.NATIVE}


def test_a_model_that_does_not_dispatch_is_refused():
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="UNets take"), use_attention_backend(unet):
        pass


def pixart():
    """The second prompt is shorter: its padding is hidden from the cross-attention's queries."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, patch_size=2, caption_channels=16, use_additional_conditions=False, norm_num_groups=1,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]), "timestep": torch.tensor([500, 300]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
    return model.eval(), inputs


def sd3():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 64), "timestep": torch.tensor([500, 300]),
    }  # fmt: skip
    return model.eval(), inputs


def cogvideox():
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, num_layers=1,
        text_embed_dim=16, sample_width=8, sample_height=8, sample_frames=5, patch_size=2, max_text_seq_length=7,
    )  # fmt: skip


def test_what_serves_the_others_is_named_and_does():
    """Each message names functions; they are those called here, and the model's numbers stay."""
    model, inputs = pixart()
    with pytest.raises(ValueError, match=r"PixArt.*attention_layers\(model, 'self'\) with CustomAttnProcessor"):
        use_attention_backend(model).__enter__()
    expected, layers, seen = run(model, inputs), attention_layers(model, "self"), []

    def plain(query, key, value):
        seen.append(1)
        return multi_source_attention(query, [Source(key, value)])

    with install_processors(layers, {name: CustomAttnProcessor(plain) for name in layers}):
        torch.testing.assert_close(run(model, inputs), expected)
    assert len(seen) == 2

    with pytest.raises(ValueError, match=r"no processor .* CogVideoXAttnProcessor2_0"):
        use_attention_backend(cogvideox()).__enter__()


@pytest.fixture
def joint_calls(monkeypatch):
    """How often SD3's attention ran in ours."""
    seen = []
    original = joint.multi_source_attention
    monkeypatch.setattr(joint, "multi_source_attention", lambda *a, **k: seen.append(a[0]) or original(*a, **k))
    return seen


def test_sd3_has_our_processors_meanwhile_and_everything_is_as_before_afterwards(joint_calls):
    model, inputs = sd3()
    expected, before = run(model, inputs), model.attn_processors
    with use_attention_backend(model) as given:
        assert given is model
        found = run(model, inputs)
    assert len(joint_calls) == 2
    assert_matches(found, expected, run(model.double(), {n: x.double() for n, x in inputs.items()}))
    assert model.attn_processors == before
    assert torch.equal(run(model.float(), inputs), expected) and len(joint_calls) == 2


@pytest.mark.fault(number=36)
def test_sd3_is_as_before_after_an_exception_and_other_models_are_left_alone(joint_calls):
    (model, inputs), (other, _) = sd3(), sd3()
    before = model.attn_processors
    with pytest.raises(KeyError), use_attention_backend(model):
        run(other, inputs)
        assert not joint_calls
        raise KeyError
    assert model.attn_processors == before
    last = model.transformer_blocks[-1].attn
    last.set_processor(FusedJointAttnProcessor2_0())  # the first layer could be served
    with pytest.raises(NotImplementedError):
        use_attention_backend(model).__enter__()
    assert type(model.transformer_blocks[0].attn.processor) is JointAttnProcessor2_0


@pytest.mark.fault(number=16)
def test_sd3_with_fused_projections_or_an_ip_adapter_is_refused_by_name():
    model, inputs = sd3()
    model.fuse_qkv_projections()
    fused = run(model, inputs)
    with pytest.raises(NotImplementedError, match=r"blocks.0.attn: .* got FusedJointAttn.*unfuse_qkv_projections"):
        use_attention_backend(model).__enter__()
    assert torch.equal(run(model, inputs), fused)
    model.unfuse_qkv_projections()
    with use_attention_backend(model):
        torch.testing.assert_close(run(model, inputs), fused)
    model.transformer_blocks[1].attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(32, 32, 8, 16))
    with pytest.raises(NotImplementedError, match=r"blocks.1.attn: .* got SD3IPAdapter.*unload_ip_adapter"):
        use_attention_backend(model).__enter__()


def test_a_layer_of_sd3_with_a_function_of_ones_own_keeps_it():
    model, inputs = sd3()

    def mean(text, image):
        return tuple(x.value.mean(1, keepdim=True).expand_as(x.query) for x in (text, image))

    layers = joint_attention_layers(model)
    one = dict([next(iter(layers.items()))])
    with install_processors(one, joint_processors(one, mean)):
        expected = run(model, inputs)
        with use_attention_backend(model):
            torch.testing.assert_close(run(model, inputs), expected)
        assert torch.equal(run(model, inputs), expected)
    with install_processors(layers, joint_processors(layers, mean)), use_attention_backend(model):
        assert all(layer.processor.attention is mean for layer in layers.values())


def test_sd3_keeps_its_lora_and_compiles_whole():
    models = [sd3()[0] for _ in range(2)]
    for model in models:
        add_lora(model)
    models[1].fuse_lora()
    inputs = sd3()[1]
    expected = run(models[1], inputs)
    with use_attention_backend(models[0]):
        torch.testing.assert_close(run(models[0], inputs), expected)
        compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, inputs), expected)


def test_installing_where_it_cannot_serve_names_what_does():
    model, _ = sd3()
    layers = attention_layers(model, "self")
    with pytest.raises(ValueError, match="layers: expected at least one layer, got none; Flux, Flux2, SD3 and Q"):
        install_processors(layers, {})
    model, _ = wan()
    layers = {"blocks.0.attn1": model.blocks[0].attn1}
    with pytest.raises(NotImplementedError, match="models that dispatch take use_attention_backend"):
        install_processors(layers, {name: CustomAttnProcessor() for name in layers})
    with pytest.raises(ValueError, match="expected scales of a UNet only, got PixArtTransformer2DModel"):
        select_layers(pixart()[0], "self", [2])


def test_masks_lse_and_grouped_heads():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 4, 16), *(torch.randn(2, 11, 2, 16) for _ in range(2))
    mask = torch.rand(2, 1, 1, 11) < 0.6
    out, lse = backend.attention(q, k, v, attn_mask=mask, enable_gqa=True, return_lse=True)
    wide = k.repeat_interleave(2, 2)
    scores = torch.einsum("bnhd,bmhd->bnhm", q, wide) / 4
    scores = scores.masked_fill(~mask.transpose(1, 2), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), v.repeat_interleave(2, 2)))


@pytest.mark.parametrize(
    ("keywords", "name"),
    [({"is_causal": True, "attn_mask": torch.ones(9, 9, dtype=torch.bool).tril()}, "attn_mask"),
     ({"dropout_p": 0.1}, "dropout_p"), ({"attn_mask": torch.eye(9, dtype=torch.bool).logical_not()}, "attn_mask")],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
@pytest.mark.fault(number=16)
def test_nothing_is_dropped(keywords, name):
    x = torch.randn(1, 9, 2, 16)
    with pytest.raises(NotImplementedError, match=name):
        backend.attention(x, x, x, **keywords)


def test_what_is_no_mask_and_no_query_is_named():
    x = torch.randn(1, 9, 2, 16)
    with pytest.raises(TypeError, match="attention_backend: attn_mask: expected a tensor, got list"):
        backend.attention(x, x, x, [True] * 9)
    with pytest.raises(ValueError, match="attention_backend: query: expected 4 dimensions, got 3"):
        backend.attention(x[0], x, x)


@pytest.mark.fault(number=16)
def test_another_parallelism_is_named():
    x = torch.randn(1, 9, 2, 16)
    for other in (object(), ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2))):
        expected = "attention_backend: _parallel_config: expected a ParallelConfig with a context_parallel_config"
        with pytest.raises(TypeError, match=expected):
            backend.attention(x, x, x, _parallel_config=other)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.fault(number=16)
def test_what_diffusers_would_drop_arrives_and_is_refused(checked, monkeypatch):
    """The dispatcher keeps the arguments that a backend's signature names; ours must see the others too."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_checks_enabled", checked)
    x, ours = torch.randn(1, 9, 2, 16), AttentionBackendName("lr_kernels")
    for name, value in (("window_size", (2, 2)), ("softcap", 30.0), ("invented_tomorrow", 1)):
        with pytest.raises(NotImplementedError, match=f"attention_backend: {name}: expected none"):
            dispatch_attention_fn(x, x, x, attention_kwargs={name: value}, backend=ours)
    found = dispatch_attention_fn(x, x, x, attention_kwargs={"window_size": None}, backend=ours)
    torch.testing.assert_close(found, dispatch_attention_fn(x, x, x, backend=AttentionBackendName.NATIVE))


@pytest.mark.fault(number=29)
def test_compiles_whole(calls):
    model, inputs = flux()
    expected = run(model, inputs)
    with use_attention_backend(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], expected)
