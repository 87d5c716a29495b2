"""IP-Adapter masks on Flux: adapters loaded by diffusers' own loader, masks against diffusers' layer without masks, one
image at a time."""

import functools

import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from model_changes import OFFLOADS
from safetensors.torch import save_file
from tiny_joint import GRID, add_lora, flux, flux_pipeline, inputs, predict

from lr_kernels.diffusers import install_processors, use_attention_backend
from lr_kernels.diffusers.dit.ip_adapter import (
    MultiSourceFluxIPAdapterAttnProcessor,
    token_grid,
    use_ip_adapter_masks,
)
from lr_kernels.diffusers.dit.regions import Regions, regional_joint_attention
from lr_kernels.diffusers.processors.joint import CustomFluxAttnProcessor
from lr_kernels.testing import assert_matches

WIDTH = 8
"""Channels of an image's embedding"""


def weights(seed, layers=1):
    """Of an adapter, as in a file: four tokens per image."""
    torch.manual_seed(seed)
    tensors = {f"{i}.{name}.{kind}": torch.randn(32, 32)[:, 0] if kind == "bias" else torch.randn(32, 32) / 3
               for i in range(layers) for name in ("to_k_ip", "to_v_ip") for kind in ("weight", "bias")}  # fmt: skip
    projection = {"proj.weight": torch.randn(4 * 32, WIDTH), "proj.bias": torch.zeros(4 * 32)}
    projection |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    return {"ip_adapter": tensors, "image_proj": projection}


def loaded(adapters=1, dtype=torch.float32):
    model = flux.__wrapped__(dtype)
    model._load_ip_adapter_weights([weights(seed) for seed in range(adapters)])
    model.transformer_blocks[0].attn.processor.scale = [0.8, 0.5, 0.3][:adapters]
    return model.to(dtype).requires_grad_(False)


def arguments(images=(1,), dtype=torch.float32, masks=None):
    """images: how many each adapter has."""
    g = torch.Generator().manual_seed(3)
    embeds = [torch.randn(2, n, WIDTH, generator=g).to(dtype) for n in images]
    kwargs = {"ip_adapter_image_embeds": embeds} | ({} if masks is None else {"ip_adapter_masks": masks})
    return inputs(flux, dtype) | {"joint_attention_kwargs": kwargs}


class OneImageAtATime(FluxIPAdapterAttnProcessor):
    """diffusers' layer for every image alone, times the weights (B, N) of its mask."""

    def __init__(self, adapter, weights):
        torch.nn.Module.__init__(self)
        self.own, self.weights = adapter, weights

    def __call__(self, *args, ip_hidden_states, **kwargs):
        found, scale = 0, self.own.scale
        for i, (hidden, of_images) in enumerate(zip(ip_hidden_states, self.weights)):
            for j, weight in enumerate(of_images):
                self.own.scale = [s if i == other else 0.0 for other, s in enumerate(scale)]
                image = hidden if weight is None else hidden[:, j : j + 1]
                given = [image if i == other else x[:, :1] for other, x in enumerate(ip_hidden_states)]
                out, text, of_image = self.own(*args, ip_hidden_states=given)
                found = found + (of_image if weight is None else of_image * weight[..., None].to(of_image))
        self.own.scale = scale
        return out, text, found


def expected(adapters, images, weights, dtype):
    model = loaded(adapters, dtype)
    layer = model.transformer_blocks[0].attn
    layer.set_processor(OneImageAtATime(layer.processor, weights))
    return predict(model, arguments(images, dtype))


def check(masks, weights, images=(1,)):
    """A model whose adapters have the masks, against `weights`: of each adapter, of each image, (2, N) or None."""
    model = loaded(len(images))
    with use_ip_adapter_masks(model):
        found = predict(model, arguments(images, masks=masks))
    assert_matches(found, *(expected(len(images), images, weights, dtype) for dtype in (torch.float32, torch.float64)))
    return found


def halves(height=64, width=64):
    left = torch.zeros(height, width, dtype=torch.bool)
    left[:, : width // 2] = True
    return torch.stack([left, ~left])


def means(mask):
    """(2, N) of a mask whose sides are multiples of the grid's."""
    rows, columns = GRID
    patches = mask.float().unflatten(0, (rows, -1)).unflatten(2, (columns, -1))
    return patches.mean((1, 3)).flatten().expand(2, -1)


def soft(seed, height=64, width=64):
    return torch.rand(height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mask", [halves()[0], soft(0), torch.zeros(64, 64), torch.ones(64, 64)],
                         ids=["half", "soft", "nowhere", "everywhere"])  # fmt: skip
@pytest.mark.fault(number=1)
def test_a_mask_acts(mask):
    found = check(mask[None], [[means(mask)]])
    stock = predict(loaded(), arguments())
    assert torch.allclose(found, stock, atol=1e-5) == bool((mask == 1).all())


@pytest.mark.fault(number=1)
def test_several_adapters_and_several_images_each():
    left, right = halves()
    first = torch.stack([left.float(), soft(1)])
    masks = [first[None], right[None, None]]
    check(masks, [[means(first[0]), means(first[1])], [means(right)]], images=(2, 1))


def test_masks_of_each_row():
    left, right = halves()
    check([torch.stack([left, right])[:, None]], [[torch.stack([means(left)[0], means(right)[0]])]])


def test_an_adapter_without_a_mask_acts_everywhere_and_its_images_share_a_softmax():
    """As in the stock layer, in which the other adapter is masked nowhere."""
    nowhere = torch.zeros(1, 1, 64, 64)
    found = check([None, nowhere], [[None], [torch.zeros(2, 16)]], images=(2, 1))
    model = loaded(2)
    model.transformer_blocks[0].attn.processor.scale = [0.8, 0.0]
    torch.testing.assert_close(found, predict(model, arguments((2, 1))))


def test_without_masks_it_is_stock_bit_for_bit():
    model = loaded(2)
    stock = predict(model, arguments((2, 1)))
    with use_ip_adapter_masks(model):
        assert torch.equal(predict(model, arguments((2, 1))), stock)


def test_everything_is_as_before_afterwards_also_after_an_exception():
    model = loaded()
    before, keys = model.attn_processors, list(model.state_dict())
    with pytest.raises(KeyError), use_ip_adapter_masks(model):
        assert list(model.state_dict()) == keys
        raise KeyError
    assert model.attn_processors == before and list(model.state_dict()) == keys
    assert torch.equal(predict(model, arguments(masks=halves()[:1])), predict(model, arguments()))  # what it is for


@pytest.mark.fault(number=29)
def test_it_compiles_whole():
    model = loaded(2)
    given = functools.partial(arguments, (2, 1), masks=[torch.rand(1, 2, 64, 64), halves()[:1, None]])
    with use_ip_adapter_masks(model):
        found = predict(model, given())
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(predict(compiled, given()), found)


def test_a_lora_is_computed():
    models = [loaded() for _ in range(2)]
    for model in models:
        add_lora(model)
    models[1].fuse_lora()
    results = []
    for model in models:
        with use_ip_adapter_masks(model):
            results.append(predict(model, arguments(masks=halves()[:1])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_changes_no_bit(offload):
    model = loaded()
    use_ip_adapter_masks(model)
    found = predict(model, arguments(masks=halves()[:1]))
    offload(model)
    assert torch.equal(predict(model, arguments(masks=halves()[:1])), found)


def test_the_scale_is_the_adapters_own():
    """What `set_ip_adapter_scale` sets while the masks act is there afterwards."""
    model = loaded()
    adapter = model.transformer_blocks[0].attn.processor
    with use_ip_adapter_masks(model):
        processor = model.transformer_blocks[0].attn.processor
        assert processor.scale == [0.8] and processor.to_k_ip is adapter.to_k_ip
        whole = predict(model, arguments(masks=torch.ones(1, 64, 64)))
        processor.scale = [0.0]
        assert not torch.allclose(predict(model, arguments(masks=torch.ones(1, 64, 64))), whole, atol=1e-3)
    assert adapter.scale == [0.0]


def test_masks_and_regions_act_together():
    """In the double block the regions' attention and the masked image, in the single block the regions'."""
    bits = [torch.tensor(x, dtype=torch.uint8) for x in ([0, 0, 1, 1, 1, 2, 2], [1, 1, 2, 2] * 4)]
    regions = functools.partial(regional_joint_attention, regions=Regions(*bits, apart=True))
    model, given = loaded(), arguments(masks=halves()[:1])
    with use_ip_adapter_masks(model, regions) as installation:
        found = predict(model, given)
        assert {type(x) for x in installation.processors.values()} == {
            MultiSourceFluxIPAdapterAttnProcessor, CustomFluxAttnProcessor,
        }  # fmt: skip
        model.transformer_blocks[0].attn.processor.scale = [0.0]
        silent = predict(model, arguments(masks=halves()[:1]))
    plain = flux.__wrapped__()
    layers = {name.removesuffix(".processor"): None for name in plain.attn_processors}
    layers = {name: plain.get_submodule(name) for name in layers}
    with install_processors(layers, {name: CustomFluxAttnProcessor(regions) for name in layers}):
        torch.testing.assert_close(silent, predict(plain, inputs(flux)))
    assert not torch.allclose(found, silent, atol=1e-3)


@pytest.fixture
def backend_restored():
    active = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(active)


def test_the_attention_backend_serves_a_layer_without_masks(backend_restored):
    model = loaded()
    stock = predict(model, arguments())
    with use_ip_adapter_masks(model), use_attention_backend(model):
        torch.testing.assert_close(predict(model, arguments()), stock)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A pipeline that loads an adapter from a file; prompts and images are given as embeddings."""
    folder = tmp_path_factory.mktemp("adapter")
    parts = weights(0)
    tensors = {f"ip_adapter.{name}": x.contiguous() for name, x in parts["ip_adapter"].items()}
    save_file(tensors | {f"image_proj.{name}": x for name, x in parts["image_proj"].items()}, folder / "ip.safetensors")
    pipe = flux_pipeline(flux.__wrapped__())
    pipe.load_ip_adapter(str(folder), weight_name="ip.safetensors", image_encoder_pretrained_model_name_or_path=None)
    return pipe


def generate(pipe, masks=None):
    g = torch.Generator().manual_seed(5)
    return pipe(
        prompt_embeds=torch.randn(1, 7, 32, generator=g), pooled_prompt_embeds=torch.randn(1, 32, generator=g),
        ip_adapter_image_embeds=[torch.randn(1, 1, WIDTH, generator=g)],
        negative_ip_adapter_image_embeds=[torch.zeros(1, 1, WIDTH)], height=64, width=96, num_inference_steps=2,
        num_images_per_prompt=2, generator=g, output_type="latent",
        joint_attention_kwargs=None if masks is None else {"ip_adapter_masks": masks},
    ).images  # fmt: skip


def test_a_pipeline_with_diffusers_own_mask_processor(pipe):
    """A picture of 64 x 96 pixels has 4 x 6 tokens. The masks are what IPAdapterMaskProcessor makes for UNets."""
    left, _ = halves(64, 96)
    made = IPAdapterMaskProcessor().preprocess([left.float()], height=64, width=96)
    assert made.shape == (1, 1, 64, 96)
    stock = generate(pipe)
    with use_ip_adapter_masks(pipe):
        masked = generate(pipe, [made.reshape(1, 1, 64, 96)])
        assert torch.equal(generate(pipe, made), masked) and torch.equal(generate(pipe, left[None]), masked)
        assert torch.equal(generate(pipe), stock)
        torch.testing.assert_close(generate(pipe, torch.ones(1, 64, 96)), stock)
    assert not torch.allclose(masked, stock, atol=1e-3)


@pytest.mark.parametrize("size", [(96, 64), (64, 64), (128, 48)])
@pytest.mark.fault(number=16)
def test_a_mask_of_another_picture_with_as_many_tokens_is_refused(pipe, size):
    """4 x 6 tokens, which a mask of another ratio could cover as 6 x 4 or 8 x 3."""
    message = f"or in that ratio, got {size[0]} x {size[1]} for 4 x 6 tokens"
    with use_ip_adapter_masks(pipe), pytest.raises(ValueError, match=message):
        generate(pipe, torch.ones(1, *size))


def test_an_adapter_loaded_anew_meanwhile_is_warned_of():
    model = loaded()
    with pytest.warns(RuntimeWarning, match="1 of 1 attention processors were replaced .* now FluxIPAdapterAttn"):
        with use_ip_adapter_masks(model):
            model._load_ip_adapter_weights([weights(0)])
            predict(model, arguments(masks=torch.ones(1, 64, 64)))
    assert type(model.transformer_blocks[0].attn.processor) is FluxIPAdapterAttnProcessor


def test_unloading_meanwhile_leaves_stock_layers():
    copy = loaded()
    pipe = flux_pipeline(copy)
    installation = use_ip_adapter_masks(pipe)
    pipe.set_ip_adapter_scale(0.25)
    assert copy.transformer_blocks[0].attn.processor.scale == [0.25]
    pipe.unload_ip_adapter()
    assert {type(x) for x in copy.attn_processors.values()} == {FluxAttnProcessor}
    with pytest.warns(RuntimeWarning, match="1 of 1 attention processors were replaced"):
        installation.verify()
    installation.remove()
    assert {type(x) for x in copy.attn_processors.values()} == {FluxAttnProcessor}
    assert torch.equal(predict(copy, inputs(flux)), predict(flux(), inputs(flux)))


def test_without_an_adapter_it_is_stock_flux_and_has_no_parameters():
    processor = MultiSourceFluxIPAdapterAttnProcessor()
    assert isinstance(processor, FluxIPAdapterAttnProcessor) and not list(processor.parameters())
    assert processor.scale == []
    model, stock = flux.__wrapped__(), predict(flux(), inputs(flux))
    model.set_attn_processor(processor)
    assert torch.equal(predict(model, inputs(flux)), stock)
    adapter = loaded().transformer_blocks[0].attn.processor
    processor = MultiSourceFluxIPAdapterAttnProcessor(adapter)
    processor.make_stock()
    assert processor.is_stock and processor.adapter is None and not list(processor.parameters())


@pytest.mark.parametrize(
    ("tokens", "height", "width", "grid"),
    [
        (16, 64, 64, (4, 4)),
        (4096, 1024, 1024, (64, 64)),
        (64 * 62, 1024, 1000, (64, 62)),  # a picture that is no multiple of 16 is cropped
        (62 * 64, 1000, 1024, (62, 64)),
        (24, 96, 64, (6, 4)),
        (24, 3, 2, (6, 4)),
        (16, 64, 128, None),
        (16, 128, 64, None),
        (17, 64, 64, None),
        (3, 10, 31, (1, 3)),
        (0, 64, 64, None),
    ],
)
def test_the_grid_of_a_mask(tokens, height, width, grid):
    assert token_grid(tokens, height, width) == grid


def test_every_grid_is_that_of_a_patch_size_and_there_is_one():
    for height, width in ((64, 96), (13, 50), (31, 30)):
        by_size = {}
        for size in torch.linspace(1, 40, 2000, dtype=torch.float64):
            rows, columns = int(height // size), int(width // size)
            by_size.setdefault(rows * columns, set()).add((rows, columns))
        for tokens, grids in by_size.items():
            if tokens:
                assert grids == {token_grid(tokens, height, width)}


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (torch.ones(64, 64), ValueError, r"ip_adapter_masks: expected a tensor \(adapters, height, width\) or"),
        (torch.ones(1, 2, 64, 64), ValueError, r"got \(1, 2, 64, 64\); several images of one adapter take a list"),
        (torch.ones(2, 64, 64), ValueError, "ip_adapter_masks: expected 1 masks, one per adapter, got 2"),
        ([torch.ones(1, 2, 64, 64)], ValueError, r"masks\[0\]: expected shape \(1 or 2, 1, height, width\), 1 being"),
        ([torch.ones(3, 1, 64, 64)], ValueError, r"ip_adapter_masks\[0\]: expected shape \(1 or 2, 1, height, width\)"),
        ([torch.ones(1, 1, 64, 128)], ValueError, "or in that ratio, got 64 x 128 for 4 x 4 tokens"),
        (torch.full((1, 64, 64), 255, dtype=torch.uint8), TypeError, "a tensor of bools or of floats .* torch.uint8"),
        (
            torch.full((1, 64, 64), 255.0),
            ValueError,
            "ip_adapter_masks: expected numbers from 0 to 1, got means from 255",
        ),
        (
            torch.full((1, 64, 64), torch.nan),
            ValueError,
            "ip_adapter_masks: expected numbers from 0 to 1, got means from nan",
        ),
        ("left", TypeError, "ip_adapter_masks: expected a tensor or a list of them, got str"),
        ([[1]], TypeError, r"ip_adapter_masks\[0\]: expected a tensor of bools or of floats .* got list"),
    ],
)
@pytest.mark.fault(number=16)
def test_masks_that_do_not_fit_are_refused(masks, error, message):
    model = loaded()
    with use_ip_adapter_masks(model), pytest.raises(error, match=message):
        predict(model, arguments(masks=masks))


@pytest.mark.fault(number=16)
def test_what_it_cannot_do_with_masks_is_refused():
    model, mask = loaded(), halves()[:1]
    with use_ip_adapter_masks(model):
        layer = model.transformer_blocks[0].attn
        without = arguments() | {"joint_attention_kwargs": {"ip_adapter_masks": mask}}
        with pytest.raises(ValueError, match="ip_hidden_states: expected the images of 1 adapters, got None"):
            predict(model, without)
        with pytest.raises(ValueError, match="ip_hidden_states: expected at most 16 images, got 17"):
            predict(model, arguments((17,), masks=[torch.ones(1, 17, 64, 64)]))
        layer.processor._parallel_config = object()
        with pytest.raises(NotImplementedError, match="_parallel_config"):
            predict(model, arguments(masks=mask))
        layer.processor._parallel_config, layer.fused_projections = None, True
        with pytest.raises(NotImplementedError, match="fused"):
            predict(model, arguments(masks=mask))


def test_models_without_an_adapter_are_refused():
    with pytest.raises(ValueError, match="model: expected a Flux transformer with a loaded IP-Adapter, got FluxTrans"):
        use_ip_adapter_masks(flux())
    with pytest.raises(ValueError, match="expected one with the attention of"):
        use_ip_adapter_masks(torch.nn.Linear(2, 2))
    model = loaded()
    with use_ip_adapter_masks(model), pytest.raises(ValueError, match=r"remove\(\) an earlier installation"):
        use_ip_adapter_masks(model)
