"""torch.compile over denoising loops: one graph per mode and size, whole, and none for another step, mask or blend."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_models import components, tiny_unet
from torch import Tensor, nn

from lr_kernels import presets, step_blend, step_coefficients
from lr_kernels.diffusers import (
    AttentionState,
    CustomAttnProcessor,
    MultiSourceAttnProcessor,
    RetouchBatch,
    StableDiffusionLayoutRetouchPipeline,
    install_processors,
    route,
    select_layers,
    use_attention_backend,
)
from lr_kernels.diffusers.processors.bank import ReferenceBank
from lr_kernels.diffusers.processors.routing import swap

STEPS, SIZES, BLENDS = 10, (8, 16), (0.3, 0.8)
TIMESTEPS = torch.arange(STEPS, 0, -1) * 99
ONE_LEVEL = {
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",) * 2,
}
OPTIONS = {"fullgraph": True, "backend": "aot_eager"}
WAYS = {
    "wrapped": lambda model: torch.compile(model, **OPTIONS),
    "regional": lambda model: model.compile_repeated_blocks(**OPTIONS) or model,
}

Call = Callable[[nn.Module, int, str, int], Tensor]
"""(model, size, mode, step) -> prediction"""

pytestmark = pytest.mark.usefixtures("one_thread", "fresh")


@pytest.fixture
def fresh():
    """No graphs of other tests: their number is limited."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def no_recompiles():
    return torch._dynamo.config.patch(error_on_recompile=True)


def follows_eager(
    prepare: Callable[[nn.Module], Call], modes: tuple[str, ...], way: str, config: dict = ONE_LEVEL
) -> None:
    """Each mode and size is called once to compile it; then all steps are compared, and nothing may recompile."""
    unet = small_unet(config)
    calls = [(size, mode, step) for size in SIZES for mode in modes for step in range(STEPS)]
    eager = prepare(unet)
    expected = [eager(unet, *call) for call in calls]
    compiled, model = prepare(unet), WAYS[way](unet)
    for size in SIZES:
        for mode in modes:
            compiled(model, size, mode, 0)
    with no_recompiles():
        for call, x in zip(calls, expected):
            torch.testing.assert_close(compiled(model, *call), x)


def small_unet(config: dict) -> nn.Module:
    return tiny_unet(0, **config).requires_grad_(False)


@torch.no_grad()
def predict(unet: nn.Module, rows: int, size: int, step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    latents, text = torch.randn(rows, 4, size, size, generator=g), torch.randn(rows, 5, 16, generator=g)
    return unet(latents, TIMESTEPS[step], encoder_hidden_states=text, return_dict=False)[0]


def mask_of(size: int, step: int) -> Tensor:
    """Another in every step."""
    return torch.rand(1, size, size, generator=torch.Generator().manual_seed(step)) < 0.2 + 0.05 * step


def square(size: int) -> Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, : size // 2, size // 4 :] = True
    return mask


def routings(reading: str, batch: RetouchBatch, size: int, step: int) -> dict:
    found = {}
    for n in (size, size // 2):
        masks = batch, mask_of(size, step), square(size), (n, n)
        if reading == "swap":
            g = torch.Generator().manual_seed(step)
            index, good = torch.randint(n * n, (1, n * n), generator=g), torch.rand(1, n * n, generator=g) < 0.8
            found[n * n] = swap(*masks, (0,), [(index, good)])
        else:
            found[n * n] = route(*masks)
    return found


@pytest.mark.parametrize("reading", ["routing", "swap"])
@pytest.mark.fault(number=29)
def test_a_retouch_compiles_without_break_or_recompile(reading):
    """Masks change in every step. Whole models: in the tests of a step and of the pipeline."""
    batch = RetouchBatch(1, True, True)

    def prepare(unet):
        state, layers = AttentionState(), select_layers(unet, "self")
        processors = {name: MultiSourceAttnProcessor(state) for name in layers}

        def call(model, size, mode, step):
            state.sharing, state.routings = mode == "sharing", routings(reading, batch, size, step)
            with install_processors(layers, processors):
                return predict(model, batch.size, size, step)

        return call

    if reading == "swap":
        follows_eager(prepare, ("sharing",), "regional", TWO_LEVELS)
    else:
        follows_eager(prepare, ("inactive", "sharing"), "regional")


def banks(foreground: bool, dtype: torch.dtype | None = None) -> dict[int, ReferenceBank]:
    found = {size: ReferenceBank(TIMESTEPS, dtype=dtype) for size in SIZES}
    for size, bank in found.items():
        bank.foreground = square(size) if foreground else None
    return found


@pytest.mark.parametrize(("way", "dtype"), [("wrapped", None), ("regional", None), ("regional", torch.int8)])
@pytest.mark.fault(number=29)
def test_a_bank_compiles_without_break_or_recompile(way, dtype):
    def prepare(unet):
        held, layers = banks(foreground=True, dtype=dtype), select_layers(unet, "self")

        def call(model, size, mode, step):
            bank = held[size]
            context = bank.extract(step) if mode == "extract" else bank.read(step)
            with install_processors(layers, bank.processors(layers)), context:
                return predict(model, 1 if mode == "extract" else 2, size, step)

        return call

    follows_eager(prepare, ("extract", "cached"), way)


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn])
@pytest.mark.fault(number=29)
def test_retouch_with_a_bank(dtype):
    """The references' rows, two halves of them, come from banks filled without compilation."""
    batch = RetouchBatch(1, True, True, banked=True)

    def prepare(unet):
        held, layers = banks(foreground=False, dtype=dtype), select_layers(unet, "self")
        for size, bank in held.items():
            for step in range(STEPS):
                with install_processors(layers, bank.processors(layers)), bank.extract(step):
                    predict(unet, batch.halves, size, step)
        state = AttentionState(sharing=True)

        def call(model, size, mode, step):
            bank, state.routings = held[size], routings("routing", batch, size, step)
            processors = {name: MultiSourceAttnProcessor(state, bank.layer(name)) for name in layers}
            with install_processors(layers, processors), bank.read(step):
                return predict(model, batch.size, size, step)

        return call

    follows_eager(prepare, ("sharing",), "regional")


@pytest.mark.fault(number=29)
def test_a_preset_compiles_without_break_or_recompile():
    """Masked MasaCtrl, with masks of every step that the preset plans itself."""
    rows = torch.tensor([0, 0], dtype=torch.int32)

    def prepare(unet):
        layers, masks = select_layers(unet, "self"), {}

        def attention(query, key, value):
            return presets.masactrl(query, key, value, rows, *masks[query.shape[1]])

        def call(model, size, mode, step):
            masks.clear()
            for n in (size, size // 2):
                pair = torch.stack([mask_of(n, step), mask_of(n, step + 1)]).flatten(2)
                masks[n * n] = tuple(pair)
            with install_processors(layers, {name: CustomAttnProcessor(attention) for name in layers}):
                return predict(model, 2, size, step)

        return call

    follows_eager(prepare, ("masked",), "regional")


def table(blend: float | None, guidance: float = 3.0) -> Tensor:
    """Of a DDIM schedule; with a blend, of two models."""
    alphas = torch.linspace(0.999, 0.005, 1000)
    weights = None if blend is None else [blend] * STEPS
    return step_coefficients(alphas, TIMESTEPS, final_alpha_cumprod=1.0, guidance_scale=guidance, blend_weights=weights)


@pytest.mark.fault(number=29)
def test_step_blend_with_a_counter_compiles_once():
    compiled = torch.compile(step_blend, **OPTIONS)
    tables = [table(blend) for blend in BLENDS]
    inputs = {}
    for size in SIZES:
        g = torch.Generator().manual_seed(size)
        sample, background, *predictions = (torch.randn(2, 4, size, size, generator=g) for _ in range(6))
        inputs[size] = sample, predictions, {"mask": torch.rand(1, size, size, generator=g), "background": background}
        compiled(sample, predictions, tables[0], torch.tensor(0), **inputs[size][2])
    with no_recompiles():
        for sample, predictions, keywords in inputs.values():
            for coefficients in tables:
                found = expected = sample
                for step in range(STEPS):
                    found = compiled(found, predictions, coefficients, torch.tensor(step), **keywords)
                    expected = step_blend(expected, predictions, coefficients, step, **keywords)
                    assert torch.equal(found, expected)


@pytest.mark.fault(number=29)
def test_retouch_step_is_one_graph():
    """Model, guidance, solver and mask blend in one compiled function, over loops that share from a step on."""
    unet, batch = small_unet(ONE_LEVEL), RetouchBatch(1, True, True)
    layers, state = select_layers(unet, "self"), AttentionState()

    @torch.no_grad()
    def denoise(latents, sources, text, t, coefficients, step, mask, background):
        out = unet(torch.cat([latents, sources] * 2), t, encoder_hidden_states=text, return_dict=False)[0]
        unconditional, conditional = batch.targets(out)
        return step_blend(latents, [unconditional, conditional], coefficients, step, mask=mask, background=background)

    def loop(function, size, blend, steps):
        """The latents of every step."""
        g, coefficients, found = torch.Generator().manual_seed(size), table(None, 1 + blend), []
        latents, text = torch.randn(1, 4, size, size, generator=g), torch.randn(batch.size, 5, 16, generator=g)
        for step in steps:
            state.sharing, state.routings = step >= 3, routings("routing", batch, size, step)
            sources = torch.randn(2, 4, size, size, generator=g)
            soft = torch.where(mask_of(size, step), 1, blend)
            given = (latents, sources, text, TIMESTEPS[step], coefficients, torch.tensor(step), soft, sources[:1])
            latents = function(*given)
            found.append(latents)
        return found

    with install_processors(layers, {name: MultiSourceAttnProcessor(state) for name in layers}):
        compiled = torch.compile(denoise, **OPTIONS)
        for size in SIZES:
            loop(compiled, size, BLENDS[0], (0, 3))
        with no_recompiles():
            for size in SIZES:
                for blend in BLENDS:
                    found, expected = (loop(f, size, blend, range(STEPS)) for f in (compiled, denoise))
                    torch.testing.assert_close(found, expected)


@pytest.mark.fault(number=29)
def test_the_attention_backend_compiles_without_break_or_recompile():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip

    @torch.no_grad()
    def run(model, tokens, step):
        g = torch.Generator().manual_seed(step)
        return model(
            hidden_states=torch.randn(2, tokens, 4, generator=g),
            encoder_hidden_states=torch.randn(2, 7, 32, generator=g),
            pooled_projections=torch.randn(2, 32, generator=g),
            timestep=(TIMESTEPS[step] / 1000).expand(2),
            img_ids=torch.rand(tokens, 3, generator=g),
            txt_ids=torch.zeros(7, 3),
            return_dict=False,
        )[0]

    calls = [(tokens, step) for tokens in (16, 36) for step in range(STEPS)]
    expected = [run(model, *call) for call in calls]
    with use_attention_backend(model):
        compiled = torch.compile(model, **OPTIONS)
        for tokens in (16, 36):
            run(compiled, tokens, 0)
        with no_recompiles():
            for call, x in zip(calls, expected):
                torch.testing.assert_close(run(compiled, *call), x)


@pytest.mark.parametrize(("way", "reading"), [("wrapped", "swap"), ("regional", "routing")])
@pytest.mark.fault(number=29)
def test_pipeline_with_a_compiled_model(way, reading):
    """All passes of both stages: map capture, inversion, layout and retouch; a second call compiles nothing."""
    parts = {**components(), "unet": tiny_unet(0, **ONE_LEVEL), "personalized_unet": tiny_unet(1, **ONE_LEVEL)}
    pipe = StableDiffusionLayoutRetouchPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    reference, mask = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)), np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True

    def images(seed, blend):
        return pipe(
            ["a sks ball", "sks ball at sea"], "a ball", reference, "a sks ball", ["sks", "ball"],
            num_inference_steps=4, output_type="latent", reference_mask=mask, mask_blending=True, reading=reading,
            layout_blend=[0, blend, blend, 1], generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip

    expected = [images(seed, blend) for seed, blend in enumerate(BLENDS)]
    pipe.personalized_unet = WAYS[way](pipe.personalized_unet)
    torch.testing.assert_close(images(0, BLENDS[0]), expected[0])
    with no_recompiles():
        torch.testing.assert_close(images(1, BLENDS[1]), expected[1])
