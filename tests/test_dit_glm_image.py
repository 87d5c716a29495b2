"""GLM-Image with cached condition images read in place: equal to stock to rounding, and stock in all other passes."""

import functools

import matplotlib.cbook
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache, GlmImageLayerKVCache
from memory import peak_bytes
from model_changes import OFFLOADS, add_lora, randn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from lr_kernels import Source
from lr_kernels.diffusers.dit.cached import glm_image
from lr_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = 5


def build(dtype=torch.float32):
    torch.manual_seed(0)
    model = GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=64,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm1" in name:  # else gates are nearly 0 and attention changes nothing
                parameter.mul_(4)
    return model.to(dtype).eval().requires_grad_(False)


stock_model = functools.cache(build)


def ours(model):
    for block in model.transformer_blocks:
        block.attn1.set_processor(glm_image.REPLACES[type(block.attn1.processor)]())
    return model


@functools.cache
def our_model(dtype=torch.float32):
    return ours(build(dtype))


def ids(rows, tokens, seed):
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def call(model, image, text, prior, cache, timestep, **more):
    rows = image.shape[0]
    sizes = {"target_size": torch.full((rows, 2), 64.0), "crop_coords": torch.zeros(rows, 2)}
    dropped = torch.zeros_like(prior, dtype=torch.bool)
    dtype = model.dtype
    return model(
        image.to(dtype), text.to(dtype), prior, dropped, torch.full((rows,), timestep), kv_caches=cache,
        return_dict=False, **{name: x.to(dtype) for name, x in sizes.items()}, **more,
    )[0]  # fmt: skip


@torch.no_grad()
def write(model, samples, images=1, heights=(8,)):
    """A cache of condition images, as GlmImagePipeline writes it; sample i has images of heights[i]."""
    cache = GlmImageKVCache(2)
    cache.set_mode("write")
    for i in range(samples):
        height = heights[i % len(heights)]
        for j in range(images):
            prior = ids(1, height * 8 // 4, 10 * i + j)
            call(model, randn(1, 4, height, 8, seed=10 * i + j), randn(1, 0, 32), prior, cache, 0.0)
        cache.next_sample()
    return cache


@torch.no_grad()
def generate(model, samples=1, rows=1, images=1, mode="read", cache=None, heights=(8,), **more):
    """A step of the rows, with the cache that the model wrote."""
    cache = write(model, samples, images, heights) if cache is None else cache
    cache.set_mode(mode)
    image, text, prior = randn(rows, 4, 4, 12, seed=50), randn(rows, TEXT, 32, seed=51), ids(rows, 12, 52)
    return call(model, image, text, prior, cache, 700.0, **more)


CASES = [
    {"samples": 1, "rows": 1}, {"samples": 1, "rows": 3}, {"samples": 1, "rows": 2, "images": 3},
    {"samples": 2, "rows": 2, "images": 2}, {"samples": 2, "rows": 6}, {"samples": 17, "rows": 17},
    {"samples": 16, "rows": 32},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_passes_that_read_the_cache_equal_stock(case, dtype):
    found = generate(our_model(dtype), **case)
    low, exact = generate(stock_model(dtype), **case), generate(stock_model(torch.float64), **case)
    assert_matches(found, low, exact)
    others = exact if case["rows"] == 1 else exact.roll(1, 0)
    skipped = generate(stock_model(torch.float64), mode="skip", **case)
    assert (exact - skipped).abs().max() > 1e-3 and (case["rows"] == 1 or not torch.allclose(others, exact))


@pytest.mark.parametrize("mode", ["write", "skip", None])
def test_all_other_passes_are_stock_bit_for_bit(mode):
    case = {"samples": 1, "rows": 1, "mode": mode}
    assert torch.equal(generate(our_model(), **case), generate(stock_model(), **case))
    for layer, expected in zip(write(our_model(), 2, 2).caches, write(stock_model(), 2, 2).caches):
        for name in ("k_caches", "v_caches"):
            assert all(map(torch.equal, getattr(layer, name), getattr(expected, name)))
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    arguments = {"mode": "skip", "attention_mask": mask, "cache": GlmImageKVCache(2)}
    assert torch.equal(generate(our_model(), **arguments), generate(stock_model(), **arguments))
    empty = {"mode": "read", "cache": GlmImageKVCache(2)}
    assert torch.equal(generate(our_model(), **empty), generate(stock_model(), **empty))


def test_a_processor_made_stock_is_stock_bit_for_bit():
    model = ours(build())
    for block in model.transformer_blocks:
        block.attn1.processor.make_stock()
    assert torch.equal(generate(model, 2, 4), generate(stock_model(), 2, 4))


def test_a_cache_serves_both_kinds_of_processors():
    cache = write(our_model(), 2, 2)
    before = [x.clone() for layer in cache.caches for x in (*layer.k_caches, *layer.v_caches)]
    found = [generate(model, rows=2, cache=cache) for model in (our_model(), stock_model(), our_model())]
    exact = generate(stock_model(torch.float64), 2, 2, 2)
    assert_matches(found[0], found[1], exact)
    assert torch.equal(found[0], found[2])
    assert all(map(torch.equal, before, [x for layer in cache.caches for x in (*layer.k_caches, *layer.v_caches)]))


def test_samples_may_differ_in_their_number_of_tokens():
    """Stock cannot join them; each row is what it is alone."""
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        generate(stock_model(), 2, 2, heights=(8, 4))
    found = generate(our_model(), 2, 2, heights=(8, 4))
    for row, height in enumerate((8, 4)):
        alone = []
        for dtype in (torch.float32, torch.float64):
            cache = write(stock_model(dtype), 2, heights=(8, 4))
            for layer in cache.caches:
                layer.k_caches, layer.v_caches = layer.k_caches[row : row + 1], layer.v_caches[row : row + 1]
            alone.append(generate(stock_model(dtype), rows=2, cache=cache)[row])
        assert_matches(found[row], *alone), height


@pytest.mark.fault(number=16)
def test_what_does_not_fit_is_refused():
    for samples, rows in ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match="Cannot match"):
            generate(stock_model(), samples, rows)
        with pytest.raises(ValueError, match=f"kv_cache: expected cached samples that divide .* got {samples}"):
            generate(our_model(), samples, rows)
    cache = write(our_model(), 2)
    for layer in cache.caches:
        layer.k_caches[1] = layer.k_caches[1].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="kv_cache: expected one row of each sample, got 2"):
        generate(our_model(), rows=2, cache=cache)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    with pytest.raises(RuntimeError, match="must match"):
        generate(stock_model(), attention_mask=mask)
    with pytest.raises(NotImplementedError, match="attention_mask: expected None in passes that read the cache"):
        generate(our_model(), attention_mask=mask)
    model = ours(build())
    cache = write(model, 1)
    model.transformer_blocks[1].attn1.processor._parallel_config = object()
    with pytest.raises(NotImplementedError, match=r"_parallel_config: expected None .* got context parallelism"):
        generate(model, cache=cache)


@torch.no_grad()
def test_stocks_mask_hides_nothing():
    """What stock makes of a padding mask: 1 is added to the logits between text that is kept and all but the padding.
    So no mask of sources equals it, and passes that read the cache refuse it, as stock fails there."""
    layer = stock_model(torch.float64).transformer_blocks[0].attn1
    text, image = randn(1, TEXT, 32, seed=1).double(), randn(1, 6, 32, seed=2).double()
    kept = torch.tensor([[0.0, 0, 1, 1, 1]])
    query, key, value = (
        project(torch.cat([text, image], 1)).unflatten(2, (4, -1)).transpose(1, 2)
        for project in (layer.to_q, layer.to_k, layer.to_v)
    )
    whole = torch.cat([kept, torch.ones(1, 6)], 1).double()
    logits = layer.norm_q(query) @ layer.norm_k(key).mT / 8**0.5 + whole[:, None, :, None] * whole[:, None, None]
    expected = layer.to_out[0]((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    found = layer(image, encoder_hidden_states=text, attention_mask=kept)
    assert torch.allclose(torch.cat(found[::-1], 1), expected)


def test_whole_graphs_of_passes_that_read():
    """One for a layer that reads, none for another step or another cache."""
    model = ours(build())
    expected = generate(model, 2, 4)
    model.transformer_blocks[0].compile(fullgraph=True, backend="aot_eager")
    try:
        cache = write(our_model(), 2)
        assert torch.allclose(generate(model, rows=4, cache=cache), expected, atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                generate(model, rows=4, cache=cache)
            generate(model, rows=4, cache=write(our_model(), 2))
    finally:
        torch._dynamo.reset()


def test_it_composes_with_lora():
    model, plain = ours(build()), build()
    without = generate(model, 2, 2)
    for x in (model, plain):
        add_lora(x)
    found = generate(model, 2, 2)
    assert not torch.allclose(found, without, atol=1e-3)
    exact = build(torch.float64)
    add_lora(exact)
    assert_matches(found, generate(plain, 2, 2), generate(exact, 2, 2))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_it_composes_with_offloading(offload):
    model = ours(build())
    offload(model)
    assert torch.equal(generate(model, 2, 2), generate(our_model(), 2, 2))


def pipeline(transformer):
    """With prior tokens and embeddings of the prompt the autoregressive model and the text encoder are not needed."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latents_mean=[0.1] * 4, latents_std=[0.5] * 4,
    ).to(transformer.dtype).eval()  # fmt: skip
    config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(), processor=None, text_encoder=T5EncoderModel(config).to(transformer.dtype).eval(),
        vision_language_encoder=None, vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(model, prompts=1, images=2, each=1, words=("a 'sign'", "the 'word' here"), seed=4, width=96, steps=3):
    """Latents of GlmImagePipeline itself, from prompts and pictures; the prior's tokens are given."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = PIL.Image.open(file).convert("RGB").resize((64, 64))
    return pipeline(model)(
        prompt=list(words[:prompts]), height=64, width=width, num_inference_steps=steps, num_images_per_prompt=each,
        image=[[photograph.rotate(90 * i + 10 * j) for j in range(images)] for i in range(prompts)],
        guidance_scale=2.0, prior_token_ids=ids(prompts, 4 * width // 16, seed),
        prior_token_image_ids=[ids(1, 16 * images, i)[0] for i in range(prompts)],
        source_image_grid_thw=[torch.tensor([[1, 4, 4]] * images)] * prompts,
        generator=torch.Generator().manual_seed(seed), output_type="latent",
    ).images  # fmt: skip


@pytest.mark.parametrize(("prompts", "images", "each"), [(1, 2, 1), (2, 1, 1), (2, 2, 2)])
def test_the_pipeline_gives_stocks_images(prompts, images, each):
    models = our_model(), stock_model(), stock_model(torch.float64)
    found, low, exact = (draw(model, prompts, images, each) for model in models)
    assert_matches(found, low, exact)
    assert found.shape == (prompts * each, 4, 8, 12)


def test_cached_keys_depend_on_their_image_alone():
    """Neither on prompt, seed, steps and the target's size, nor on the other images of the sample."""

    def cached(**case):
        model, found = build(), []

        def keep(module, args, given):
            if given["kv_caches"][0].mode == "read" and not found:
                found.extend(
                    x.clone() for layer in given["kv_caches"].caches for x in (*layer.k_caches, *layer.v_caches)
                )

        model.register_forward_pre_hook(keep, with_kwargs=True)
        draw(model, **case)
        return found

    both = cached()
    assert all(map(torch.equal, both, cached(words=("another 'one'",), seed=9, width=64, steps=2)))
    for x, y in zip(both, cached(images=1)):
        assert torch.equal(x[:, :16], y)


@pytest.mark.fault(number=44)
def test_a_layer_that_reads_takes_a_twentieth_of_stocks_memory():
    """Beyond the output, 16 heads x 128, 1152 own tokens and 1024 cached: stock copies all keys and values. The memory
    is what torch allocates; the kernel's own scratch is at most 1 MiB for a thread."""
    query, key, value = (randn(1, 1152, 16, 128, seed=i) for i in range(3))
    cache = GlmImageLayerKVCache()
    cache.store(randn(1, 1024, 16, 128, seed=4), randn(1, 1024, 16, 128, seed=5))
    calls = {
        "stock": lambda: dispatch_attention_fn(query, *cache.get(key, value)),
        "ours": lambda: glm_image.read_samples(query, Source(key, value), cache.k_caches, cache.v_caches),
    }
    extra = {name: peak_bytes(call) - query.nbytes for name, call in calls.items()}
    assert extra["stock"] > 2 * (key.nbytes + cache.k_caches[0].nbytes) - 1 and 20 * extra["ours"] <= extra["stock"], (
        extra
    )
