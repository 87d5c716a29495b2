"""Wan-Animate-2 with its reference video read in place: equal to stock's flex attention to rounding, without it."""

import functools
import gc
import weakref

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanAnimate2Transformer3DModel
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.transformers import transformer_wan_animate_2
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache, WanAnimate2KVLayerCache
from diffusers.modular_pipelines.wan_animate_2.modular_blocks_wan_animate_2 import WanAnimate2CoreDenoiseStep
from memory import peak_bytes
from model_changes import add_lora, offload_by_groups, randn

from lr_kernels import Source
from lr_kernels.diffusers.dit.cached import wan_animate2
from lr_kernels.testing import assert_matches

pytestmark = [
    pytest.mark.usefixtures("one_thread", "masks_without_compilation"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
ROWS, COLUMNS = 4, 6
"""Tokens of a frame"""


@pytest.fixture
def masks_without_compilation(monkeypatch):
    """Stock compiles the making of its masks for half a minute on a CPU; here it runs as it is written."""
    make = transformer_wan_animate_2.create_block_mask
    monkeypatch.setattr(
        transformer_wan_animate_2, "create_block_mask", lambda *args, _compile, **more: make(*args, **more)
    )


def build(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = WanAnimate2Transformer3DModel(
        text_len=6, dim=32, ffn_dim=32, freq_dim=16, text_dim=8, num_heads=2, num_layers=2,
        **({"in_dim": 12, "out_dim": 4} | changes),
    )  # fmt: skip
    return model.to(dtype).eval().requires_grad_(False)


stock_model = functools.cache(build)


def ours(model, **arguments):
    for block in model.blocks:
        block.self_attn.set_processor(wan_animate2.REPLACES[type(block.self_attn.processor)](**arguments))
    model.block_masks = wan_animate2.NoBlockMasks()
    return model


@functools.cache
def our_model(dtype=torch.float32):
    return ours(build(dtype), keeps_rotated=True)


class Generation:
    """One segment of a video, with a cache of its own: references in row i, and a step of generated frames."""

    def __init__(self, model, rows=1, frames=4, reference=3, length=9, seed=0):
        self.model, self.rows, self.frames, self.reference, self.length, self.seed = (
            model, rows, frames, reference, length, seed,
        )  # fmt: skip
        self.cache = WanAnimate2KVCache(2)
        self.grid = torch.tensor([[reference, ROWS, COLUMNS]] * rows)

    @torch.no_grad()
    def run(self, mode, frames, seed, time, **more):
        def each(*shape, offset):
            return [randn(*shape, seed=seed + offset + i).to(self.model.dtype) for i in range(self.rows)]

        sides = 2 * ROWS, 2 * COLUMNS
        return torch.stack(self.model(
            each(4, frames, *sides, offset=0), torch.full((self.rows,), time, dtype=self.model.dtype),
            each(5, 8, offset=20), each(8, frames, *sides, offset=10), self.cache, mode, frames * ROWS * COLUMNS,
            torch.stack(each(3, 1280, offset=30)), **more,
        ).sample)  # fmt: skip

    def extract(self):
        return self.run("extract", self.reference, self.seed + 100, 900.0, offset_grid_sizes=self.grid)

    def step(self, time, area=(16 * ROWS, 16 * COLUMNS), grid=None, **more):
        return self.run(
            "cached", self.frames, 200, time, reference_grid_sizes=self.grid if grid is None else grid,
            origin_len=self.length, origin_area=list(area), **more,
        )  # fmt: skip

    def results(self):
        """Of the pass that fills the cache and of two that read it, and a layer's cache."""
        found = {"extract": self.extract(), "step": self.step(900.0), "later step": self.step(300.0)}
        found["uncondition"] = self.step(300.0, is_uncondtion=True)
        key, value = self.cache.get(1).get()
        return found | {"key": key, "value": value}


def generate(model, **case):
    return Generation(model, **case).results()


def assert_equal_to_stock(found, low, exact):
    assert found.keys() == low.keys() == exact.keys()
    for name, x in found.items():
        assert_matches(x, low[name], exact[name], name)


@functools.cache
def exact(**case):
    return generate(stock_model(torch.float64), **case)


CASES = [
    {}, {"rows": 2}, {"frames": 2, "reference": 1, "length": 4}, {"frames": 1, "reference": 1, "length": 1},
    {"length": 12}, {"frames": 3}, {"reference": 1}, {"rows": 2, "frames": 3, "length": 20},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_modes_of_the_cache_equal_stock(case, dtype):
    found, low = generate(our_model(dtype), **case), generate(stock_model(dtype), **case)
    assert_equal_to_stock(found, low, exact(**case))
    for name in ("extract", "key", "value"):
        assert torch.equal(found[name], low[name])


@pytest.mark.parametrize("offsets", [(0, 2, -1), (-1, -1, 3)])
def test_offsets_and_strides_of_the_reference_equal_stock(offsets):
    names = ("refer_offset_t", "refer_offset_h", "refer_offset_w")
    changes = dict(zip(names, offsets)) | {"refer_stride": 3, "use_img_emb": False}
    results = [generate(build(dtype, **changes)) for dtype in (torch.float32, torch.float64)]
    assert_equal_to_stock(generate(ours(build(**changes))), *results)


def test_every_frame_reads_its_reference_and_missing_frames_count():
    """As in stock: frame 0 reads no reference, frame f reads f - 1; the video's tokens read each other in between."""
    tokens, dim = ROWS * COLUMNS, 16
    own = Source(*(randn(2, 4 * tokens, 2, dim, seed=i) for i in (1, 2)))
    query, key, value = (randn(2, n * tokens, 2, dim, seed=i) for i, n in ((0, 4), (3, 3), (4, 3)))
    found = wan_animate2.read_frames(query, own, Source(key, value), 3, tokens)
    for changed in range(3):
        other = value.clone()
        other[1, changed * tokens :][:tokens] += 1
        now = wan_animate2.read_frames(query, own, Source(key, other), 3, tokens)
        differs = (now != found).flatten(2).any(-1).unflatten(1, (4, tokens))
        assert differs[1, changed + 1].all() and differs.sum() == tokens
    more = wan_animate2.read_frames(query, own, Source(key, value), 4, tokens)
    assert (more - found).flatten(2).abs().amax(-1).min() > 1e-4


def test_a_cache_serves_both_kinds_of_processors():
    for first, second in ((our_model, stock_model), (stock_model, our_model)):
        generation = Generation(first(), rows=2)
        generation.extract()
        generation.step(900.0)
        generation.model = second()
        assert_matches(
            generation.step(300.0), generate(stock_model(), rows=2)["later step"], exact(rows=2)["later step"]
        )


def test_block_masks_are_not_read_and_need_not_be_made():
    model = ours(build())
    without = generate(model)
    assert not model.block_masks
    model.block_masks = {}
    found = generate(model)
    assert all(torch.equal(found[name], without[name]) for name in without) and len(model.block_masks) == 1
    stock = build()
    stock.block_masks = wan_animate2.NoBlockMasks()
    with pytest.raises(ValueError, match="Attention mask must be"):
        generate(stock)


def test_a_processor_made_stock_is_stock_bit_for_bit():
    model = build()
    for block in model.blocks:
        block.self_attn.set_processor(wan_animate2.MultiSourceWanAnimate2AttnProcessor())
        block.self_attn.processor.make_stock()
    found, expected = generate(model), generate(stock_model())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_rotated_keys_are_made_once_and_freed_with_the_cache():
    generation = Generation(our_model())
    generation.extract()
    key = generation.cache.get(0).key
    before = key.clone()
    generation.step(900.0)
    kept = key._lr_kernels_rotated[1]
    first = generation.step(300.0, grid=generation.grid.clone())  # another tensor, as offloading makes, the same grid
    assert key._lr_kernels_rotated[1] is kept and torch.equal(key, before)
    kept.mul_(0)
    assert not torch.equal(generation.step(300.0), first)  # they are read
    turned = torch.tensor([[3, COLUMNS, ROWS]])
    other = generation.step(300.0, grid=turned)
    fresh = Generation(our_model())
    fresh.extract()
    assert torch.equal(other, fresh.step(300.0, grid=turned)) and not torch.equal(other, first)
    alive = weakref.ref(key._lr_kernels_rotated[1])
    del key, kept
    generation.cache.clear()
    gc.collect()
    assert alive() is None


def test_rotated_keys_need_not_be_kept():
    generation = Generation(ours(build(), keeps_rotated=False))
    results = generation.results()
    assert not hasattr(generation.cache.get(0).key, "_lr_kernels_rotated")
    expected = generate(our_model())
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.fault(number=16)
def test_what_does_not_fit_is_refused():
    generation = Generation(our_model())
    with pytest.raises(RuntimeError, match="cache is empty"):
        generation.step(300.0)
    generation.extract()
    with pytest.raises(
        NotImplementedError, match=r"grid_sizes: expected frames of 48 tokens .* got 4 x 6; give origin"
    ):
        generation.step(300.0, area=(16 * ROWS, 32 * COLUMNS))
    with pytest.raises(NotImplementedError, match=r"reference_grid_sizes: expected frames of 24 tokens .* got 4 x 3"):
        generation.step(300.0, grid=torch.tensor([[6, 4, 3]]))
    generation.length = 4
    with pytest.raises(ValueError, match="origin_len: expected a video with at least 3 latent frames, got 2"):
        generation.step(300.0)
    query = randn(2, 24, 1, 8)
    with pytest.raises(ValueError, match="kv_cache: expected 2 samples as in the batch, got 1"):
        wan_animate2.read_frames(query, Source(query, query), Source(query[:1], query[:1]), 3, 24)
    layer, cache = our_model().blocks[0].self_attn, WanAnimate2KVLayerCache()
    arguments = {"rotary_emb": torch.ones(8, 8), "grid_sizes": torch.tensor([[1, 2, 2]]), "kv_cache": cache}
    with pytest.raises(ValueError, match="kv_cache_mode: expected extract or cached, got 'write'"):
        layer(randn(1, 4, 32), kv_cache_mode="write", **arguments)
    processor = wan_animate2.MultiSourceWanAnimate2AttnProcessor()
    processor._parallel_config = object()
    with pytest.raises(NotImplementedError, match=r"_parallel_config: expected None .* got context parallelism"):
        processor(layer, randn(1, 4, 32), kv_cache_mode="extract", **arguments)


def test_whole_graphs_of_both_modes():
    """One that fills the cache, one that rotates its keys, one for all later steps."""
    expected = generate(our_model(), rows=2, length=12)
    model = ours(build(), keeps_rotated=True)
    model.blocks[0].self_attn.compile(fullgraph=True, backend="aot_eager")
    try:
        generation = Generation(model, rows=2, length=12)
        found = generation.results()
        assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
        kept = generation.cache.get(0).key._lr_kernels_rotated[1]
        with torch._dynamo.config.patch(error_on_recompile=True):
            generation.step(200.0)
            again = generate(model, rows=2, length=12, seed=3)
        assert generation.cache.get(0).key._lr_kernels_rotated[1] is kept
        other = generate(our_model(), rows=2, length=12, seed=3)
        assert all(torch.allclose(again[name], other[name], atol=1e-5) for name in other)
        with pytest.raises(RuntimeError, match="reference_grid_sizes: expected frames of 24 tokens"):
            generation.step(300.0, grid=torch.tensor([[6, 4, 3]] * 2))
    finally:
        torch._dynamo.reset()


def test_fused_projections_equal_separate_ones():
    model = ours(build())
    for block in model.blocks:
        block.self_attn.fuse_projections()
    low = build()
    for block in low.blocks:
        block.self_attn.fuse_projections()
    assert_equal_to_stock(generate(model, rows=2), generate(low, rows=2), exact(rows=2))


def test_it_composes_with_lora():
    models = ours(build()), build(), build(torch.float64)
    for model in models:
        add_lora(model)
    found = [generate(model, rows=2) for model in models]
    assert not torch.allclose(found[0]["step"], generate(our_model(), rows=2)["step"], atol=1e-3)
    assert_equal_to_stock(*found)


def test_it_composes_with_offloading():
    """By groups; under accelerate's offloading the stock model asks a weight for its device and fails."""
    model = ours(build())
    offload_by_groups(model)
    found, expected = generate(model), generate(our_model())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def animate(model, length=9, prompt=6, seed=3, image=1, **changes):
    """Frames of the modular pipeline's denoising itself, with guidance, over two segments, each with its own cache."""
    torch.manual_seed(1)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1)
    pipe = WanAnimate2CoreDenoiseStep().init_pipeline()
    pipe.update_components(
        vae=vae.eval(), transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip
    arguments = dict(
        reference_image_latents=randn(20, 1, 2 * ROWS, 2 * COLUMNS, seed=image),
        prompt_ref_embeds=randn(1, 5, 8, seed=5),
        driving_video_pixels=randn(1, 3, 2 * length - 1, 16 * ROWS, 16 * COLUMNS, seed=2), height=16 * ROWS,
        width=16 * COLUMNS, num_segments=2, effective_segment=length - 1, segment_frame_length=length,
        condition_clip_context=randn(1, 3, 1280, seed=4), num_inference_steps=2,
        prompt_embeds=randn(1, 5, 8, seed=prompt), negative_prompt_embeds=randn(1, 5, 8, seed=prompt + 2),
        denoiser_input_fields={"encoder_hidden_states_image": randn(1, 3, 1280, seed=image + 6)},
        generator=torch.Generator().manual_seed(seed), output="segment_frames",
    )  # fmt: skip
    return torch.cat(pipe(**arguments | changes), 2)


@pytest.mark.parametrize("length", [9, 12])
def test_the_pipeline_gives_stocks_frames(length):
    """In a segment of 12 frames, stock's mask has room for one latent frame more than the video has."""
    channels = {"in_dim": 36, "out_dim": 16}
    low, exact = (animate(build(dtype, **channels), length) for dtype in (torch.float32, torch.float64))
    assert_matches(animate(ours(build(**channels)), length), low, exact)


def test_cached_keys_depend_on_the_driving_video_and_its_prompt():
    """Not on the prompts of the generation, nor on its seed, steps and reference image."""

    def cached(**case):
        model, found = ours(build(in_dim=36, out_dim=16)), []
        model.register_forward_hook(
            lambda module, args, given, out: found.extend(
                x.clone() for layer in given["kv_cache"].layer_caches for x in layer.get()
            ) if given["kv_cache_mode"] == "extract" else None, with_kwargs=True,
        )  # fmt: skip
        animate(model, **case)
        return found

    first = cached()
    assert len(first) == 8  # keys and values of two layers in two segments
    assert all(map(torch.equal, first, cached(prompt=20, seed=8, image=30, num_inference_steps=1)))
    assert not torch.equal(first[2], cached(prompt_ref_embeds=randn(1, 5, 8, seed=40))[2])


@pytest.mark.fault(number=44)
def test_a_layer_that_reads_copies_neither_keys_nor_values():
    """Beyond the output, 8 + 7 frames of 144 tokens, 16 heads x 128. The memory is what torch allocates; the kernel's
    own scratch is at most 1 MiB for a thread."""
    query, key, value = (randn(1, 8 * 144, 16, 128, seed=i) for i in range(3))
    reference = Source(*(randn(1, 7 * 144, 16, 128, seed=i) for i in (4, 5)))
    call = functools.partial(wan_animate2.read_frames, query, Source(key, value), reference, 7, 144)
    assert peak_bytes(call) - query.nbytes <= 10_000
