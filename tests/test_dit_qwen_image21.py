"""Qwen-Image 2.1 with its cached prefix read in place: equal to stock to rounding, and stock without a cache."""

import functools
import types

import pytest
import tiny_qwen_image21
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21Attention,
    QwenImage21FlexAttnProcessor,
    QwenImage21KVCache,
)
from memory import peak_bytes
from model_changes import OFFLOADS, add_lora, randn

from lr_kernels import Source
from lr_kernels.diffusers.dit.cached import qwen_image21
from lr_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE, TARGET = (1, 4, 4), (1, 4, 6)


def ours(model):
    for block in model.transformer_blocks:
        block.attn.set_processor(qwen_image21.REPLACES[type(block.attn.processor)]())
    return model


stock_model = functools.cache(tiny_qwen_image21.transformer)


@functools.cache
def our_model(dtype=torch.float32):
    return ours(tiny_qwen_image21.transformer(dtype))


def inputs(dtype, texts=(5, 3, 4), padded=(0, 0), seed=0):
    """Arguments of the model: texts with an image between each two of them, of which row i has padded[i] tokens less
    than the others at its end."""
    rows = len(padded)
    slots, kept = [], []
    for text in texts[:-1]:
        slots += [False] * text + [True] * 4  # a slot stands for 4 of the image's 16 tokens
    slots += [False] * texts[-1]
    for missing in padded:
        kept.append([True] * (len(slots) - missing) + [False] * missing)
    shapes = [IMAGE] * (len(texts) - 1) + [TARGET]
    return {
        "hidden_states": randn(rows, 16 * (len(texts) - 1) + 24, 8, seed=seed).to(dtype),
        "encoder_hidden_states": randn(rows, len(slots), 32, seed=seed + 1).to(dtype),
        "encoder_hidden_states_mask": torch.tensor(kept) if any(padded) else None,
        "img_shapes": [shapes] * rows, "img_mask": torch.tensor([slots + [True] * 6] * rows),
    }  # fmt: skip


@torch.no_grad()
def generate(model, fill=None, **case):
    """Results of a pass that fills the cache, by the model `fill`, and of two that read it, and a layer's cache."""
    arguments = inputs(model.dtype, **case)
    rows = len(arguments["hidden_states"])
    cache = QwenImage21KVCache(2)

    def step(model, mode, time):
        timestep = torch.full((rows,), time, dtype=model.dtype)
        (found,) = model(timestep=timestep, kv_cache=cache, kv_cache_mode=mode, return_dict=False, **arguments)
        return found[:, -24:]

    first = step(model if fill is None else fill, "extract", 0.9)
    arguments["hidden_states"] = arguments["hidden_states"].flip(2)
    later = {f"cached at {time}": step(model, "cached", time) for time in (0.5, 0.1)}
    key, value = cache.get_layer(1).get()
    return {"extract": first, **later, "key": key, "value": value}


def assert_equal_to_stock(found, low, exact):
    assert found.keys() == low.keys() == exact.keys()
    for name, x in found.items():
        assert_matches(x, low[name], exact[name], name)


CASES = [
    {"texts": (6,), "padded": (0,)}, {"texts": (5, 4), "padded": (0, 0)}, {"texts": (5, 3, 4), "padded": (0, 0, 0)},
    {"texts": (6,), "padded": (0, 3)}, {"texts": (5, 3, 4), "padded": (2, 0, 3)}, {"texts": (5, 0, 4), "padded": (1,)},
    {"texts": (0, 4), "padded": (0,)},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_modes_of_the_cache_equal_stock(case, dtype):
    low, exact = generate(stock_model(dtype), **case), generate(stock_model(torch.float64), **case)
    assert_equal_to_stock(generate(our_model(dtype), **case), low, exact)


def test_prefix_and_padding_matter():
    exact = generate(our_model(torch.float64), padded=(2, 0))
    for change in ({"padded": (1, 0)}, {"texts": (4, 3, 5), "padded": (2, 0)}, {"padded": (2, 0), "seed": 5}):
        other = generate(our_model(torch.float64), **change)
        assert all((exact[name] - other[name])[0].abs().max() > 1e-4 for name in ("extract", "cached at 0.1"))


def test_a_cache_serves_both_kinds_of_processors():
    exact = generate(stock_model(torch.float64), padded=(1, 0))
    low = generate(stock_model(), padded=(1, 0))
    assert_equal_to_stock(generate(our_model(), fill=stock_model(), padded=(1, 0)), low, exact)
    assert_equal_to_stock(generate(stock_model(), fill=our_model(), padded=(1, 0)), low, exact)


def test_without_a_cache_it_is_stock_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        arguments = inputs(dtype, padded=(2, 0)) | {"timestep": torch.tensor([0.5, 0.5], dtype=dtype)}
        with torch.no_grad():
            found, expected = (model(dtype)(**arguments, return_dict=False)[0] for model in (our_model, stock_model))
        assert torch.equal(found, expected)


def test_a_processor_made_stock_is_stock_bit_for_bit():
    model = ours(tiny_qwen_image21.transformer())
    for block in model.transformer_blocks:
        block.attn.processor.make_stock()
    found, expected = generate(model, padded=(2, 0)), generate(stock_model(), padded=(2, 0))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("flex", [(0,), (0, 1)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_layers_with_flex_attention_equal_stock(flex):
    """In all layers, or in some: the model then makes masks for them too, which the others do not read."""
    case, low, found = {"padded": (2, 0)}, *(tiny_qwen_image21.transformer() for _ in range(2))
    for model in (low, found):
        for i in flex:
            model.transformer_blocks[i].attn.set_processor(QwenImage21FlexAttnProcessor())
    results, exact = generate(ours(found), **case), generate(stock_model(torch.float64), **case)
    expected = generate(low, **case)
    assert_equal_to_stock(results, expected, exact)
    if len(flex) == 2:
        assert all(torch.equal(results[name], expected[name]) for name in ("extract", "key", "value"))


@pytest.mark.fault(number=16)
@torch.no_grad()
def test_other_masks_and_context_parallelism_are_refused():
    layer: QwenImage21Attention = our_model().transformer_blocks[0].attn
    cache = QwenImage21KVCache(1).get_layer(0)
    cache.store(randn(1, 3, 2, 16), randn(1, 3, 2, 16))
    tokens = randn(1, 4, 32)
    for mask in (torch.ones(1, 7, dtype=torch.bool), torch.ones(1, 1, 4, 7), torch.ones(1, 1, 1, 4), "flex"):
        with pytest.raises(NotImplementedError, match=r"attention_mask: expected one per key, \(B, 1, 1, 7\), got"):
            layer(tokens, attention_mask=mask, layer_cache=cache, kv_cache_mode="cached")
    with pytest.raises(TypeError, match=r"key_mask\[0\]: expected torch.bool"):
        layer(tokens, attention_mask=torch.ones(1, 1, 1, 7), layer_cache=cache, kv_cache_mode="cached")
    for kind, modes in zip(qwen_image21.REPLACES.values(), (("extract", "cached"), ("cached",))):
        processor = kind()
        processor._parallel_config = object()
        for mode in modes:
            with pytest.raises(NotImplementedError, match="_parallel_config: expected None while"):
                processor(layer, tokens, layer_cache=cache, kv_cache_mode=mode)
    with pytest.raises(RuntimeError, match="has not been populated"):
        layer(tokens, layer_cache=QwenImage21KVCache(1).get_layer(0), kv_cache_mode="cached")


def test_a_processor_of_tensor_parallelism_has_fewer_heads():
    """Each rank's projections have its share of the heads, while the layer's numbers are those of the whole."""
    layer = our_model().transformer_blocks[0].attn
    rank = types.SimpleNamespace(
        heads=4, inner_dim=64, to_q=layer.to_q, to_k=layer.to_k, to_v=layer.to_v, norm_q=layer.norm_q,
        norm_k=layer.norm_k, to_out=layer.to_out,
    )  # fmt: skip
    cache = QwenImage21KVCache(1).get_layer(0)
    cache.store(randn(1, 3, 2, 16), randn(1, 3, 2, 16))
    with torch.no_grad():
        arguments = {"layer_cache": cache, "kv_cache_mode": "cached"}
        found, whole = layer.processor(rank, randn(1, 4, 32), **arguments), layer(randn(1, 4, 32), **arguments)
    assert torch.equal(found, whole)


def test_whole_graphs_of_both_modes():
    """One for each mode of a layer, none for another step or another cache."""
    model = ours(tiny_qwen_image21.transformer())
    expected = generate(model, padded=(2, 0))
    model.transformer_blocks[0].compile(fullgraph=True, backend="aot_eager")
    try:
        found = generate(model, padded=(2, 0))
        assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            generate(model, padded=(1, 0))
    finally:
        torch._dynamo.reset()


def test_it_composes_with_lora():
    models = ours(tiny_qwen_image21.transformer()), *map(tiny_qwen_image21.transformer, (torch.float32, torch.float64))
    without = generate(models[0], padded=(2, 0))
    for model in models:
        add_lora(model)
    found = [generate(model, padded=(2, 0)) for model in models]
    assert not torch.allclose(found[0]["cached at 0.1"], without["cached at 0.1"], atol=1e-3)
    assert_equal_to_stock(*found)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_it_composes_with_offloading(offload):
    model = ours(tiny_qwen_image21.transformer())
    offload(model)
    found, expected = generate(model), generate(our_model())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_pipeline_gives_stocks_images(images):
    """QwenImage21Pipeline itself, from prompts of different lengths and pictures to latents, with guidance."""

    def run(model):
        return tiny_qwen_image21.pipeline(model)(
            prompt=["a cat", "a big dog on a hill"], image=tiny_qwen_image21.photographs(images) or None,
            negative_prompt=["blurred", "dark"], true_cfg_scale=2.0, height=64, width=96, output_resolution=64,
            num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip

    found, low, exact = run(our_model()), run(stock_model()), run(stock_model(torch.float64))
    assert_matches(found, low, exact)


def test_of_the_prefix_only_what_follows_the_images_depends_on_the_prompt():
    """The template puts images before the prompt's text, and encoder and transformer are causal. Neither does a key
    depend on seed, steps or the target's size."""

    def prefix(prompt, seed, **more):
        model, found = tiny_qwen_image21.transformer(), []
        model.register_forward_pre_hook(lambda module, args, given: found.append(given), with_kwargs=True)
        tiny_qwen_image21.pipeline(model)(
            prompt=prompt, image=tiny_qwen_image21.photographs(2), height=64, output_resolution=64,
            generator=torch.Generator().manual_seed(seed), output_type="latent", **more,
        )  # fmt: skip
        _, height, width = found[0]["img_shapes"][0][-1]
        slots = found[0]["img_mask"][0, : -height * width // 4]  # a slot stands for 4 tokens
        end = int(slots.nonzero().max()) + 1 + 3 * int(slots.sum())
        return [x for layer in found[0]["kv_cache"].layer_caches for x in layer.get()], end

    one, end = prefix("a cat", 0, num_inference_steps=2, width=96)
    other, same = prefix("two big dogs on a hill", 7, num_inference_steps=3, width=64)
    assert end == same < one[0].shape[1] < other[0].shape[1]
    for x, y in zip(one, other):
        assert torch.equal(x[:, :end], y[:, :end]) and not torch.allclose(x[:, end:], y[:, end : x.shape[1]], atol=0.1)


@pytest.mark.fault(number=44)
@pytest.mark.parametrize("padded", [0, 24])
def test_a_layer_that_reads_takes_a_twentieth_of_stocks_memory(padded):
    """Beyond the output, 16 heads x 128, 1152 own tokens and 1024 cached: stock copies all keys and values. The memory
    is what torch allocates; the kernel's own scratch is at most 1 MiB for a thread."""
    query, key, value = (randn(1, 1152, 16, 128, seed=i) for i in range(3))
    cached_key, cached_value = (randn(1, 1024, 16, 128, seed=i) for i in (4, 5))
    mask = None
    if padded:
        mask = torch.ones(1, 1, 1, 2176, dtype=torch.bool)
        mask[..., 1024 - padded : 1024] = False

    def stock():
        """What the stock processor does with the cache, after the projections."""
        joined = torch.cat([cached_key, key], 1), torch.cat([cached_value, value], 1)
        return dispatch_attention_fn(query, *joined, attn_mask=mask)

    def here():
        return qwen_image21.read_prefix(query, Source(key, value), Source(cached_key, cached_value), mask)

    extra = {call.__name__: peak_bytes(call) - query.nbytes for call in (stock, here)}
    assert extra["stock"] >= 2 * (key.nbytes + cached_key.nbytes) and 20 * extra["here"] <= extra["stock"], extra
