"""The attention processors: stock until told otherwise, exact installation and removal, and the routing they carry."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from torch.nn import functional as F

from lr_kernels.diffusers import (
    AttentionState,
    MultiSourceAttnProcessor,
    RetouchBatch,
    TokenMapAttnProcessor,
    attention_layers,
    install_processors,
    joint_attention_layers,
    layer_scale,
    route,
    select_layers,
    token_mask,
    use_attention_backend,
    use_ip_adapter_masks,
)
from lr_kernels.diffusers.processors import routing

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_unet(**config) -> UNet2DConditionModel:
    return tiny_models.tiny_unet(0, **config).requires_grad_(False)


STOCK_CASES = {
    "self": ({}, {}),
    "self-mask": ({}, {"attention_mask": (2, 1, 9)}),
    "4d-group-norm-residual": (
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.5},
        {"hidden_states": (2, 32, 3, 3)},
    ),
    "spatial-norm": ({"spatial_norm_dim": 4}, {"hidden_states": (2, 32, 3, 3), "temb": (2, 4, 3, 3)}),
    "bias-dropout": ({"bias": True, "dropout": 0.3}, {}),
    "layer-norm-qk": ({"qk_norm": "layer_norm"}, {}),
    "rms-norm-qk": ({"qk_norm": "rms_norm"}, {}),
    "cross": ({"cross_attention_dim": 12}, {"encoder_hidden_states": (2, 5, 12)}),
    "cross-mask": ({"cross_attention_dim": 12}, {"encoder_hidden_states": (2, 5, 12), "attention_mask": (2, 1, 5)}),
    "cross-layer-norm": (
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
        {"encoder_hidden_states": (2, 5, 12)},
    ),
    "cross-group-norm": (
        {"cross_attention_dim": 12, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
        {"encoder_hidden_states": (2, 5, 12)},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("processor", [MultiSourceAttnProcessor, TokenMapAttnProcessor])
@pytest.mark.parametrize("case", STOCK_CASES)
def test_inactive_is_stock_bitwise(case, processor, dtype):
    config, shapes = STOCK_CASES[case]
    torch.manual_seed(1)
    attn = Attention(query_dim=32, heads=2, dim_head=8, **config).eval().to(dtype)
    inputs = {name: torch.randn(shape, dtype=dtype) for name, shape in {"hidden_states": (2, 9, 32), **shapes}.items()}
    attn.set_processor(AttnProcessor2_0())
    expected = attn(**inputs)
    attn.set_processor(processor())
    assert torch.equal(attn(**inputs), expected)


def test_sharing_leaves_cross_attention_stock():
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval()
    x, text = torch.randn(2, 9, 16), torch.randn(2, 5, 12)
    expected = attn(x, text)
    attn.set_processor(MultiSourceAttnProcessor(AttentionState(sharing=True, capturing=True)))
    assert torch.equal(attn(x, text), expected)


def shared_attention_by_hand(q, k, v, batch, target_mask, reference_mask):
    """The retouch rule row by row on (rows, H, N, D), with dense masks."""
    out = F.scaled_dot_product_attention(q, k, v)
    n = batch.images
    for start in range(0, batch.size, batch.half):
        ref = start + batch.half - 1
        for image in range(n):
            row = start + image
            own = row + n if batch.context else row
            own_seen = ~target_mask[image] if batch.context else torch.ones_like(target_mask[image])
            own_seen = own_seen[:, None].expand(-1, k.shape[2])
            ref_seen = target_mask[image][:, None] & reference_mask[0][None]
            keys, values = torch.cat([k[own], k[ref]], 1), torch.cat([v[own], v[ref]], 1)
            mask = torch.cat([own_seen, ref_seen], 1)
            out[row] = F.scaled_dot_product_attention(q[row], keys, values, attn_mask=mask)
    return out


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("guided", [True, False])
def test_sharing_is_the_retouch_rule(context, guided):
    torch.manual_seed(0)
    batch = RetouchBatch(2, context, guided)
    target_mask, reference_mask = torch.rand(2, 4, 6) < 0.4, torch.rand(1, 4, 6) < 0.5
    q, k, v = torch.randn(3, batch.size, 2, 24, 8)
    state = AttentionState(sharing=True, routings={24: route(batch, target_mask, reference_mask, (4, 6))})
    out = MultiSourceAttnProcessor(state).attend(q, k, v, None, False)
    expected = shared_attention_by_hand(q, k, v, batch, target_mask.flatten(1), reference_mask.flatten(1))
    torch.testing.assert_close(out, expected)


def test_one_call_per_self_attention_layer(monkeypatch):
    unet = tiny_unet()
    layers = select_layers(unet, "self")
    assert len(layers) == 7
    batch = RetouchBatch(1, True, True)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    state = AttentionState(sharing=True, routings={n * n: route(batch, mask, mask, (n, n)) for n in (8, 4)})
    calls = []
    real = routing.multi_source_attention
    monkeypatch.setattr(
        routing, "multi_source_attention", lambda q, s, **kw: calls.append(kw["plan"]) or real(q, s, **kw)
    )
    with install_processors(layers, {name: MultiSourceAttnProcessor(state) for name in layers}):
        unet(torch.randn(6, 4, 8, 8), 10, encoder_hidden_states=torch.randn(6, 5, 16))
    assert len(calls) == len(layers)
    assert {id(plan) for plan in calls} == {id(routing.plan) for routing in state.routings.values()}


def test_plain_rows_are_unchanged_by_sharing():
    """Contexts and the reference attend to themselves: their rows are those of a stock run."""
    unet = tiny_unet()
    batch = RetouchBatch(1, True, False)
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    state = AttentionState(sharing=True, routings={n * n: route(batch, mask, mask, (n, n)) for n in (8, 4)})
    x, text = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16)
    expected = unet(x, 10, encoder_hidden_states=text).sample
    layers = select_layers(unet, "self")
    with install_processors(layers, {name: MultiSourceAttnProcessor(state) for name in layers}):
        out = unet(x, 10, encoder_hidden_states=text).sample
    torch.testing.assert_close(out[1:], expected[1:])
    assert (out[0] - expected[0]).abs().max() > 1e-3


@pytest.mark.fault(number=29)
def test_compiled_layer_has_one_graph_per_mode():
    """No graph break, and no recompilation for another mask."""
    attn = Attention(query_dim=16, heads=2, dim_head=8).eval().requires_grad_(False)
    batch, state = RetouchBatch(2, True, True), AttentionState(backend="cpu")
    attn.set_processor(MultiSourceAttnProcessor(state))
    graphs = []
    compiled = torch.compile(attn, fullgraph=True, backend=lambda module, _: graphs.append(module) or module.forward)
    x = torch.randn(batch.size, 16, 16)
    assert torch.equal(compiled(x), attn(x))
    for _ in range(3):
        target, reference = torch.rand(2, 4, 4) < 0.5, torch.rand(1, 4, 4) < 0.5
        state.sharing, state.routings = True, {16: route(batch, target, reference, (4, 4))}
        torch.testing.assert_close(compiled(x), attn(x))
    assert len(graphs) == 2


def test_token_maps_are_the_mean_probabilities():
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval().requires_grad_(False)
    x, text = torch.randn(2, 9, 16), torch.randn(2, 5, 12)
    expected = attn(x, text)
    indices = torch.tensor([[1, 3], [2, 0]], dtype=torch.int32)
    processor = TokenMapAttnProcessor(AttentionState(capturing=True, token_indices=indices))
    attn.set_processor(processor)
    torch.testing.assert_close(attn(x, text), expected)
    q, k = (f(y).view(2, -1, 2, 8).transpose(1, 2) for f, y in ((attn.to_q, x), (attn.to_k, text)))
    probabilities = (q @ k.mT * 8**-0.5).softmax(-1).mean(1)
    wanted = torch.stack([probabilities[b][:, indices[b].long()] for b in range(2)])
    torch.testing.assert_close(processor.maps, wanted)


@pytest.mark.parametrize("processor", [MultiSourceAttnProcessor, TokenMapAttnProcessor])
@pytest.mark.fault(number=16)
def test_active_processor_refuses_an_attention_mask(processor):
    attn = Attention(query_dim=16, heads=2, dim_head=8)
    attn.set_processor(processor(AttentionState(sharing=True, capturing=True)))
    text = torch.randn(2, 9, 16) if processor is TokenMapAttnProcessor else None
    with pytest.raises(NotImplementedError, match="attention_mask: expected None while the processor is active"):
        attn(torch.randn(2, 9, 16), text, attention_mask=torch.zeros(2, 1, 9))


def test_missing_routing_is_named():
    attn = Attention(query_dim=16, heads=2, dim_head=8)
    attn.set_processor(MultiSourceAttnProcessor(AttentionState(sharing=True)))
    with pytest.raises(ValueError, match=r"state\.routings: expected a routing for 9 tokens"):
        attn(torch.randn(2, 9, 16))


def test_install_touches_only_its_layers_and_restores_exactly():
    unet = tiny_unet()
    before, keys = dict(unet.attn_processors), list(unet.state_dict())
    layers = select_layers(unet, "self")
    with install_processors(layers, {name: MultiSourceAttnProcessor() for name in layers}) as installation:
        assert not installation.replaced()
        inside = unet.attn_processors
        assert all(isinstance(p, MultiSourceAttnProcessor) == (".attn1." in name) for name, p in inside.items())
        assert list(unet.state_dict()) == keys
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


def refuse(processor):
    """In place of a layer's `set_processor`: fails for ours."""
    if isinstance(processor, MultiSourceAttnProcessor):
        raise MemoryError


@pytest.mark.parametrize("kind", ["corss", "Cross", None])
def test_another_kind_of_attention_is_refused(kind):
    for find in (attention_layers, select_layers):
        with pytest.raises(ValueError, match="kind: expected one of self, cross, got"):
            find(tiny_unet(), kind)


def test_what_is_no_model_is_refused_and_a_pipeline_told_which_part_is_one():
    pipe = SimpleNamespace(unet=tiny_unet())
    with pytest.raises(
        TypeError, match=r"unet: expected a model, torch.nn.Module, got SimpleNamespace; pass pipe.unet"
    ):
        attention_layers(pipe, "self")
    with pytest.raises(TypeError, match="joint_attention_layers: model: expected a model"):
        joint_attention_layers(None)
    with pytest.raises(TypeError, match="use_ip_adapter_masks: model: expected a model"):
        use_ip_adapter_masks("flux")
    with pytest.raises(TypeError, match="use_attention_backend: model: expected a model"), use_attention_backend(pipe):
        pass


@pytest.mark.parametrize("fails_at", [0, 1, 3, 6])
@pytest.mark.fault(number=36)
def test_install_restores_after_an_exception_midway(fails_at, monkeypatch):
    unet = tiny_unet()
    before = dict(unet.attn_processors)
    layers = select_layers(unet, "self")
    state = AttentionState()
    new = {name: MultiSourceAttnProcessor(state) for name in layers}
    failing = list(layers)[fails_at]
    with pytest.raises(KeyError, match=failing):
        install_processors(layers, {name: processor for name, processor in new.items() if name != failing})
    monkeypatch.setattr(layers[failing], "set_processor", refuse)
    with pytest.raises(MemoryError):
        install_processors(layers, new)
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert all(processor.state is state for processor in new.values())


def test_install_refuses_a_processor_that_is_not_stock():
    unet = tiny_unet()
    layers = attention_layers(unet, "cross")
    last = list(layers)[-1]
    layers[last].set_processor(SlicedAttnProcessor(1))
    before = dict(unet.attn_processors)
    with pytest.raises(NotImplementedError, match=rf"{last}: expected a stock attention processor, got SlicedAttn"):
        install_processors(layers, {name: TokenMapAttnProcessor() for name in layers})
    assert unet.attn_processors == before


def test_replaced_processors_warn_once_and_stay():
    unet = tiny_unet()
    layers = select_layers(unet, "self")
    installation = install_processors(layers, {name: MultiSourceAttnProcessor() for name in layers})
    first = next(iter(layers.values()))
    other = SlicedAttnProcessor(1)
    first.set_processor(other)
    with pytest.warns(RuntimeWarning, match="1 of 7 attention processors were replaced") as caught:
        installation.verify()
        installation.verify()
    assert len(caught) == 1
    installation.remove()
    assert first.processor is other and not installation.replaced()
    assert not any(isinstance(p, MultiSourceAttnProcessor) for p in unet.attn_processors.values())


def test_layers_by_scale_and_by_name():
    unet = tiny_unet(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=1,
        sample_size=64,
    )
    layers = select_layers(unet, "self")
    assert len(layers) == 16
    tokens = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: tokens.update({name: args[0].shape[1]}))
    unet(torch.randn(1, 4, 16, 16), 1, encoder_hidden_states=torch.randn(1, 3, 16))
    assert all(tokens[name] == (16 // layer_scale(unet, name)) ** 2 for name in layers)
    assert len(select_layers(unet, "self", [1, 2])) == 10
    assert set(select_layers(unet, "self", "up_blocks.2")) == {n for n in layers if n.startswith("up_blocks.2.")}
    assert len(select_layers(unet, "self", ["mid_block", 8])) == 1
    with pytest.raises(ValueError, match=r"choice: expected one of the scales \[1, 2, 4, 8\] or .*got 3"):
        select_layers(unet, "self", [3])
    with pytest.raises(ValueError, match="got 'up_block'"):
        select_layers(unet, "self", "up_block")


def test_a_small_subject_keeps_a_token():
    mask = torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[0, 5, 5] = True
    mask[1, :8] = True
    coarse = token_mask(mask, (4, 4))
    assert coarse.sum(1).tolist() == [1, 8, 0]
    with pytest.raises(ValueError, match=r"token_mask: mask: expected shape \(B, height, width\), got \(16, 16\)"):
        token_mask(mask[0], (4, 4))


def test_importing_the_library_leaves_diffusers_alone():
    code = "import sys, lr_kernels; assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
