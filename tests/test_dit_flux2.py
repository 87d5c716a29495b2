"""Flux.2 klein with cached references read in place: equal to stock to rounding, in every mode of its cache."""

import functools

import pytest
import tiny_flux2
import torch
from diffusers.models.transformers import transformer_flux2
from memory import peak_bytes
from model_changes import OFFLOADS, randn
from peft import LoraConfig

from lr_kernels.diffusers import use_cached_references
from lr_kernels.diffusers.dit.cached import flux2
from lr_kernels.diffusers.dit.cached.install import reference_layers
from lr_kernels.diffusers.processors.joint import Tokens
from lr_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, TEXT, IMAGE, REFERENCE = 2, 5, 12, 8


def layers_of(model):
    return {name: x for name, x in model.named_modules() if hasattr(x, "processor")}


@functools.cache
def model(dtype=torch.float32):
    """A transformer with the processors that Flux2KleinKVPipeline sets."""
    return tiny_flux2.pipeline(dtype).transformer


def inputs(dtype, references=REFERENCE, rows=ROWS):
    """Arguments of the model: every row has references of its own."""
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0), torch.zeros(1))
    of_references = ids[:references] + torch.tensor([10.0, 0, 0, 0])
    common = {
        "encoder_hidden_states": randn(rows, TEXT, tiny_flux2.WIDTH, seed=1).to(dtype),
        "timestep": torch.tensor([0.7] * rows, dtype=dtype),
        "txt_ids": torch.zeros(TEXT, 4),
    }
    image = randn(rows, IMAGE, 16, seed=2).to(dtype)
    with_references = torch.cat([randn(rows, references, 16, seed=3).to(dtype), image], 1)
    first = common | {
        "hidden_states": with_references, "img_ids": torch.cat([of_references, ids]),
        "kv_cache_mode": "extract", "num_ref_tokens": references,
    }  # fmt: skip
    later = common | {"hidden_states": image, "img_ids": ids, "kv_cache_mode": "cached"}
    return first, later


@torch.no_grad()
def both_modes(model, dtype, **arguments):
    """Results of the pass that fills the cache and of one that reads it, and a layer's cached keys."""
    first, later = inputs(dtype, **arguments)
    sample, cache = model(**first, return_dict=False)
    (second,) = model(**later, kv_cache=cache, return_dict=False)
    return {"extract": sample, "cached": second, "key": cache.double_block_caches[1].k_ref,
            "value": cache.single_block_caches[1].v_ref}  # fmt: skip


def assert_equal_to_stock(ours, low, exact):
    for name, found in ours.items():
        assert_matches(found, low[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", [{}, {"references": 1}, {"rows": 1}, {"rows": 3, "references": 12}], ids=str)
def test_both_modes_of_the_cache_equal_stock(dtype, arguments):
    low, exact = (both_modes(model(x), x, **arguments) for x in (dtype, torch.float64))
    with use_cached_references(model(dtype)):
        assert_equal_to_stock(both_modes(model(dtype), dtype, **arguments), low, exact)


def test_a_cache_serves_both_kinds_of_processors():
    first, later = inputs(torch.float32)
    with torch.no_grad():
        _, stock = model()(**first, return_dict=False)
        expected = model()(**later, kv_cache=stock, return_dict=False)[0]
        with use_cached_references(model()):
            _, ours = model()(**first, return_dict=False)
            found = model()(**later, kv_cache=stock, return_dict=False)[0]
        swapped = model()(**later, kv_cache=ours, return_dict=False)[0]
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(swapped, expected, atol=1e-5)


@pytest.mark.parametrize("mode", [None, "extract"])
def test_passes_without_references_are_stock_bit_for_bit(mode):
    _, later = inputs(torch.float32)
    arguments = later | {"kv_cache_mode": mode, "num_ref_tokens": 0, "kv_cache": None}
    with torch.no_grad():
        expected = model()(**arguments, return_dict=False)[0]
        with use_cached_references(model()):
            assert torch.equal(model()(**arguments, return_dict=False)[0], expected)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_pipeline_gives_stocks_images(count, rows):
    def images(dtype, install):
        pipe = tiny_flux2.pipeline(dtype)
        installation = use_cached_references(pipe.transformer) if install else None
        found = tiny_flux2.generate(pipe, image=tiny_flux2.references(count), rows=rows)
        if installation is not None:
            installation.verify()
        return found

    low, exact = images(torch.float32, False), images(torch.float64, False)
    assert_matches(images(torch.float32, True), low, exact)
    assert not torch.allclose(low, tiny_flux2.generate(tiny_flux2.pipeline(), rows=rows), atol=1e-2)  # they matter


def test_the_installation_restores_the_model():
    stock = {name: x.processor for name, x in layers_of(model()).items()}
    with use_cached_references(model()) as installation:
        assert set(installation.processors) == set(reference_layers_of_stock(stock)) and not reference_layers(model())
        with pytest.raises(ValueError, match=r"model: expected a transformer with a stock processor .* remove\(\)"):
            use_cached_references(model())
    assert {name: x.processor for name, x in layers_of(model()).items()} == stock
    with pytest.raises(ValueError, match=r"use_cached_references: model: expected .* got Linear"):
        use_cached_references(torch.nn.Linear(2, 2))


def reference_layers_of_stock(processors):
    return [name for name, x in processors.items() if type(x) in flux2.REPLACES]


def test_the_models_attention_backend_stays():
    before = tiny_flux2.pipeline().transformer
    for layer in reference_layers(before).values():
        layer.processor._attention_backend = "native"
    with use_cached_references(before) as installation:
        assert {x._attention_backend for x in installation.processors.values()} == {"native"}


def test_fused_projections_equal_stock():
    def fused(dtype, install):
        found = tiny_flux2.pipeline(dtype).transformer
        found.fuse_qkv_projections()
        if install:
            use_cached_references(found)
        return both_modes(found, dtype)

    assert_equal_to_stock(fused(torch.float32, True), fused(torch.float32, False), fused(torch.float64, False))


def test_a_lora_acts():
    def adapted(dtype, install):
        found = tiny_flux2.pipeline(dtype).transformer
        torch.manual_seed(4)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out", "to_qkv_mlp_proj"]
        found.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        if install:
            use_cached_references(found)
        return both_modes(found.to(dtype), dtype)

    ours, stock = adapted(torch.float32, True), adapted(torch.float32, False)
    assert_equal_to_stock(ours, stock, adapted(torch.float64, False))
    assert not torch.allclose(stock["cached"], both_modes(model(), torch.float32)["cached"], atol=1e-2)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_weights_are_read_by_their_modules(offload):
    found = tiny_flux2.pipeline().transformer
    expected = both_modes(found, torch.float32)
    use_cached_references(found)
    offload(found)
    for name, x in both_modes(found, torch.float32).items():
        assert torch.allclose(x, expected[name], atol=1e-5)


@pytest.mark.fault(number=29)
def test_both_modes_compile_without_a_break():
    found = tiny_flux2.pipeline().transformer
    use_cached_references(found)
    expected = both_modes(found, torch.float32)
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    for name, x in both_modes(compiled, torch.float32).items():
        assert torch.allclose(x, expected[name], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask: expected None"),
        ({"parallel": object()}, "_parallel_config: expected None .* got context parallelism"),
    ],
)
@pytest.mark.fault(number=16)
def test_masks_and_context_parallelism_are_refused(change, message):
    for name, layer in reference_layers(tiny_flux2.pipeline().transformer).items():
        processor = flux2.REPLACES[type(layer.processor)]()
        processor._parallel_config = change.get("parallel")
        arguments = {"encoder_hidden_states": randn(1, 2, 32)} if name.startswith("transformer_blocks") else {}
        if "attention_mask" in change:
            arguments["attention_mask"] = change["attention_mask"]
        with pytest.raises(NotImplementedError, match=message):
            processor(layer, randn(1, 4, 32), kv_cache_mode="extract", num_ref_tokens=2, **arguments)


@pytest.mark.fault(number=44)
def test_a_cached_layer_takes_a_twentieth_of_stocks_memory():
    """Beyond the output: stock copies the keys and values of text, image and references."""
    own, cached = Tokens(*(randn(1, 600, 8, 64, seed=i) for i in range(3))), transformer_flux2.Flux2KVLayerCache()
    cached.store(randn(1, 512, 8, 64, seed=4), randn(1, 512, 8, 64, seed=5))
    ours = flux2.MultiSourceFlux2KVParallelSelfAttnProcessor()
    calls = {
        "stock": lambda: transformer_flux2._flux2_kv_causal_attention(
            own.query, own.key, own.value, 88, 0, kv_cache=cached
        ),
        "ours": lambda: ours.read([own], cached),
    }
    extra = {name: peak_bytes(call) - own.query.nbytes for name, call in calls.items()}
    assert extra["stock"] > own.key.nbytes and 20 * extra["ours"] <= extra["stock"], extra
