"""What users do to a model around our processors - LoRA, IP-Adapter, fused projections, slicing, offloading - is
computed as without them, reported by `Installation.verify`, or refused by name.
"""

import contextlib

import pytest
import tiny_models
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import (
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from model_changes import OFFLOADS, add_lora, randn
from safetensors.torch import save_file

from lr_kernels import Source, multi_source_attention
from lr_kernels.diffusers import (
    AttentionState,
    BankAttnProcessor,
    CustomAttnProcessor,
    CustomFluxAttnProcessor,
    CustomSD3AttnProcessor,
    MultiSourceAttnProcessor,
    ReferenceBank,
    RetouchBatch,
    TokenMapAttnProcessor,
    install_processors,
    route,
    select_layers,
)

KINDS = (MultiSourceAttnProcessor, CustomAttnProcessor, BankAttnProcessor, TokenMapAttnProcessor)
SELF_KINDS = KINDS[:3]
JOINT_KINDS = (CustomFluxAttnProcessor, CustomSD3AttnProcessor)
ROWS = 3  # a target, its context, the reference


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_unet():
    return tiny_models.tiny_unet(0).requires_grad_(False)


def predict(unet, image=None, seed=0):
    conditions = None if image is None else {"image_embeds": [image]}
    with torch.no_grad():
        return unet(
            randn(ROWS, 4, 8, 8, seed=seed),
            10,
            encoder_hidden_states=randn(ROWS, 5, 16, seed=1),
            added_cond_kwargs=conditions,
        ).sample


class Installed:
    """Processors of one kind in a UNet; `predict` runs it with what the kind is for, or stock, active=False."""

    def __init__(self, kind, unet):
        self.kind, self.unet, self.bank = kind, unet, ReferenceBank([10])
        mask = torch.zeros(1, 8, 8, dtype=torch.bool)
        mask[:, 2:6, 2:6] = True
        batch, sides = RetouchBatch(1, context=True, guided=False), (8, 4)
        routings = {n * n: route(batch, mask, mask, (n, n)) for n in sides}
        tokens = torch.tensor([[1, 3]] * ROWS, dtype=torch.int32)
        self.state = AttentionState(routings=routings, token_indices=tokens)
        layers = select_layers(unet, "cross" if kind is TokenMapAttnProcessor else "self")
        if kind is BankAttnProcessor:
            self.processors = self.bank.processors(layers)
        else:
            self.processors = {n: kind() if kind is CustomAttnProcessor else kind(self.state) for n in layers}
        self.installation = install_processors(layers, self.processors)

    def predict(self, active=True, image=None):
        """The UNet's output, and the token maps if the kind keeps them."""
        self.state.sharing = self.state.capturing = active
        if self.kind is CustomAttnProcessor:
            for processor in self.processors.values():
                processor.attention = read_the_last_row if active else None
        if not (active and self.kind is BankAttnProcessor):
            found = predict(self.unet, image)
            keeps_maps = active and self.kind is TokenMapAttnProcessor
            maps = [p.maps.flatten() for p in self.processors.values()] if keeps_maps else []
            return torch.cat([found.flatten(), *maps])
        with self.bank.extract(0):
            predict(self.unet, image, seed=9)
        with self.bank.read(0):
            return predict(self.unet, image).flatten()


def read_the_last_row(query, key, value):
    rows = torch.tensor([ROWS - 1] * (ROWS - 1) + [-1], dtype=torch.int32)
    return multi_source_attention(query, [Source(key, value), Source(key, value, rows)])


def pipeline(unet):
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **nothing)


@pytest.fixture
def load_ip_adapter(tmp_path):
    """A function that loads an IP-Adapter's file into a UNet, as a user does."""
    tensors = {"image_proj.proj.weight": randn(4 * 16, 8, seed=2), "image_proj.proj.bias": torch.zeros(4 * 16)}
    tensors |= {"image_proj.norm.weight": torch.ones(16), "image_proj.norm.bias": torch.zeros(16)}
    unet = tiny_unet()
    for i, name in enumerate(name for name in unet.attn_processors if name.endswith("attn2.processor")):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        tensors[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = randn(channels, 16, seed=2 * i)
        tensors[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = randn(channels, 16, seed=2 * i + 1)
    save_file(tensors, tmp_path / "ip-adapter.safetensors")

    def load(unet):
        pipeline(unet).load_ip_adapter(
            str(tmp_path), subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None
        )

    return load


def of_layers(processors, which):
    """Those of the self-attention, "attn1", or the cross-attention, "attn2"."""
    return {name: processor for name, processor in processors.items() if f".{which}." in name}


@pytest.mark.parametrize("kind", [*KINDS, *JOINT_KINDS])
def test_processors_take_no_arguments_and_have_no_parameters(kind):
    assert isinstance(kind(), kind) and not isinstance(kind(), torch.nn.Module)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_is_the_models_own(kind):
    unet = tiny_unet()
    keys = list(unet.state_dict())
    installed = Installed(kind, unet)
    installed.predict()
    assert list(unet.state_dict()) == keys
    assert not installed.installation.replaced()


@pytest.mark.parametrize("first", ["lora", "installation"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_computed(kind, first):
    plain, unet = tiny_unet(), tiny_unet()
    if first == "lora":
        add_lora(unet)
    installed = Installed(kind, unet)
    if first == "installation":
        add_lora(unet)
    inactive, active = installed.predict(active=False), installed.predict()
    assert not installed.installation.replaced()
    installed.installation.remove()
    expected = predict(unet).flatten()
    assert torch.equal(inactive, expected)
    assert not torch.allclose(expected, predict(plain).flatten(), atol=1e-3)
    unet.fuse_lora()
    torch.testing.assert_close(active, Installed(kind, unet).predict())


@pytest.mark.parametrize("kind", KINDS)
def test_an_ip_adapter_loaded_meanwhile_is_reported_and_stays(kind, load_ip_adapter):
    unet, other = tiny_unet(), tiny_unet()
    stock = unet.attn_processors
    installed = Installed(kind, unet)
    load_ip_adapter(unet)
    with pytest.warns(RuntimeWarning, match="7 of 7 attention processors were replaced"):
        installed.installation.verify()
    installed.installation.remove()
    assert all(type(p) is IPAdapterAttnProcessor2_0 for p in of_layers(unet.attn_processors, "attn2").values())
    left = of_layers(unet.attn_processors, "attn1")
    if kind in SELF_KINDS:  # cross-attention's are not touched in self-attention, where diffusers makes new ones
        assert all(p is stock[name] for name, p in left.items())
    load_ip_adapter(other)
    image = randn(ROWS, 1, 8, seed=3)
    assert torch.equal(predict(unet, image), predict(other, image))


@pytest.mark.parametrize("kind", SELF_KINDS)
def test_an_ip_adapter_unloaded_meanwhile_is_reported_and_remove_gives_stock(kind, load_ip_adapter):
    unet = tiny_unet()
    expected = predict(unet)
    load_ip_adapter(unet)
    installed = Installed(kind, unet)
    pipeline(unet).unload_ip_adapter()
    with pytest.warns(RuntimeWarning, match=rf"7 of 7 attention processors .* is now a new {kind.__name__}\)"):
        installed.installation.verify()
    installed.installation.remove()
    assert not any(isinstance(p, KINDS) for p in unet.attn_processors.values())
    assert torch.equal(predict(unet), expected)


@pytest.mark.parametrize("kind", SELF_KINDS)
def test_processors_work_beside_an_ip_adapter(kind, load_ip_adapter):
    unet = tiny_unet()
    load_ip_adapter(unet)
    before = unet.attn_processors
    image, another = randn(ROWS, 1, 8, seed=3), randn(ROWS, 1, 8, seed=4)
    expected = predict(unet, image).flatten()
    installed = Installed(kind, unet)
    assert torch.equal(installed.predict(active=False, image=image), expected)
    active = installed.predict(image=image)
    assert not torch.allclose(active, expected, atol=1e-3)
    assert not torch.allclose(active, installed.predict(image=another), atol=1e-3)
    assert (
        of_layers(unet.attn_processors, "attn2") == of_layers(before, "attn2") and not installed.installation.replaced()
    )
    installed.installation.remove()
    assert unet.attn_processors == before


@pytest.mark.fault(number=16)
def test_an_ip_adapters_layers_are_refused_and_the_named_remedy_helps(load_ip_adapter):
    unet = tiny_unet()
    expected = Installed(TokenMapAttnProcessor, tiny_unet()).predict()
    load_ip_adapter(unet)
    before = unet.attn_processors
    message = r"expected a stock attention processor, got IPAdapterAttnProcessor2_0; .*unload_ip_adapter\(\)"
    with pytest.raises(NotImplementedError, match=message):
        Installed(TokenMapAttnProcessor, unet)
    assert unet.attn_processors == before
    pipeline(unet).unload_ip_adapter()
    assert torch.equal(Installed(TokenMapAttnProcessor, unet).predict(), expected)


CHANGES = {
    FusedAttnProcessor2_0: (lambda unet: unet, "fuse_qkv_projections", "unfuse_qkv_projections"),
    SlicedAttnProcessor: (pipeline, "enable_attention_slicing", "disable_attention_slicing"),
}
"""Processor -> (what of the UNet has the methods, the one that sets it, the one that undoes that)."""


@pytest.mark.parametrize("processor", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_projections_and_slicing_meanwhile_are_reported(kind, processor):
    unet = tiny_unet()
    expected = predict(unet)
    installed = Installed(kind, unet)
    owner, change, _ = CHANGES[processor]
    getattr(owner(unet), change)()
    with pytest.warns(RuntimeWarning, match=rf"7 of 7 .* is now {processor.__name__}"):
        installed.installation.verify()
    installed.installation.remove()
    assert {type(p) for p in unet.attn_processors.values()} == {processor}
    torch.testing.assert_close(predict(unet), expected)


@pytest.mark.parametrize("processor", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(number=16)
def test_fused_projections_and_slicing_before_are_refused_and_the_named_remedy_helps(kind, processor):
    unet = tiny_unet()
    expected = Installed(kind, tiny_unet()).predict()
    owner, change, undo = CHANGES[processor]
    getattr(owner(unet), change)()
    before = unet.attn_processors
    message = rf"expected a stock attention processor, got {processor.__name__}; .*{undo}\(\)"
    with pytest.raises(NotImplementedError, match=message):
        Installed(kind, unet)
    assert unet.attn_processors == before
    getattr(owner(unet), undo)()
    assert torch.equal(Installed(kind, unet).predict(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_unfusing_brings_the_processors_back(kind):
    unet = tiny_unet()
    installed = Installed(kind, unet)
    expected = installed.predict()
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    assert not installed.installation.replaced()
    assert torch.equal(installed.predict(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_processors_that_unfusing_brings_back_after_removal_are_stock(kind):
    unet = tiny_unet()
    expected = predict(unet)
    installed = Installed(kind, unet)
    installed.predict()
    unet.fuse_qkv_projections()
    installed.installation.remove()
    unet.unfuse_qkv_projections()
    with installed.bank.read(0) if kind is BankAttnProcessor else contextlib.nullcontext():
        assert torch.equal(predict(unet), expected)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kind", KINDS)
def test_offloading_changes_no_bit(kind, offload):
    installed = Installed(kind, tiny_unet())
    expected = installed.predict()
    offload(installed.unet)
    assert torch.equal(installed.predict(), expected)


@pytest.mark.parametrize("kind", SELF_KINDS)
def test_a_model_that_was_fused_meanwhile_takes_a_new_installation(kind):
    unet = tiny_unet()
    installed = Installed(kind, unet)
    unet.fuse_qkv_projections()
    installed.installation.remove()
    unet.unfuse_qkv_projections()
    again = Installed(kind, unet)
    assert torch.equal(again.predict(), Installed(kind, tiny_unet()).predict())
