"""`sharing`: a function in a stock pipeline, in the steps and layers that are said, and no trace of it afterwards."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from test_diffusers_compile import ONE_LEVEL, OPTIONS, WAYS
from tiny_models import TOLERANCE, XL_UNET, components, distance, tiny_scheduler, tiny_unet
from torch.nn import functional as F

from lr_kernels.diffusers import CustomAttnProcessor, attention_layers, layer_grid, select_layers, sharing

pytestmark = pytest.mark.usefixtures("one_thread")

SD_UNET = {
    "block_out_channels": (8,) * 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
}


def new_pipe(scheduler=None, cls=StableDiffusionPipeline, **unet):
    parts = components() | {"scheduler": scheduler or tiny_scheduler()}
    pipe = cls(**parts | ({"unet": tiny_unet(0, **unet)} if unet else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return new_pipe()


def draw(pipe, prompts=("a", "b"), steps=4, **kwargs):
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"latents": noise, "num_inference_steps": steps, "output_type": "latent", "guidance_scale": 2.0}
    return pipe(list(prompts), **{**given, **kwargs}).images


def plain(query, key, value, key_bias=None):
    bias = None if key_bias is None else key_bias[:, None, None].to(query.dtype)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)


def first_row(query, key, value):
    """All rows read the first one."""
    return plain(query, key[:1].expand_as(key), value[:1].expand_as(value))


def recorder(seen):
    def method(query, key, value, *, step, layer):
        seen.append((step, layer))
        return plain(query, key, value)

    return method


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("config", [SD_UNET, XL_UNET], ids=["sd", "xl"])
def test_layers_come_in_the_order_of_execution(kind, config):
    unet, order = tiny_unet(0, **{**config, "addition_embed_type": None}), []
    layers = attention_layers(unet, kind)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: order.append(name))
    with torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 1, encoder_hidden_states=torch.randn(1, 3, unet.config.cross_attention_dim))
    assert list(layers) == order == list(select_layers(unet, kind, ["up_blocks", "mid_block", "down_blocks"]))
    if config is SD_UNET and kind == "self":
        assert order[10] == "up_blocks.2.attentions.0.transformer_blocks.0.attn1" and len(order) == 16


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, LCMScheduler,
     partial(DPMSolverMultistepScheduler, use_karras_sigmas=True), partial(PNDMScheduler, skip_prk_steps=True),
     HeunDiscreteScheduler, KDPM2DiscreteScheduler],
    ids="ddim euler dpm++ unipc lcm karras pndm heun kdpm2".split(),
)  # fmt: skip
def test_steps_are_the_schedulers(scheduler):
    """Two runs, of different lengths: the place of the call among the scheduler's, over its calls per step."""
    pipe = new_pipe(scheduler(steps_offset=1), **ONE_LEVEL)
    for steps in (6, 3):
        seen = []
        with sharing(pipe, recorder(seen), layers=[0]):
            draw(pipe, steps=steps)
        calls, order = len(pipe.scheduler.timesteps), pipe.scheduler.order
        assert [step for step, _ in seen] == [call // order for call in range(calls)]


CHOICES = [
    (None, None, range(4), range(7)),
    (2, 5, [2, 3], [5, 6]),
    (range(1, 3), range(2, 4), [1, 2], [2, 3]),
    ([0, 3], ["mid_block", 6], [0, 3], [2, 6]),
    ({1}, "up_blocks.1", [1], [5, 6]),
    (torch.tensor(2), np.array([0, 2]), [2, 3], [0, 2]),
    (np.array([1, 9]), torch.tensor(5), [1], [5, 6]),
]


@pytest.mark.parametrize(("steps", "layers", "expected_steps", "expected_layers"), CHOICES)
def test_it_runs_in_the_steps_and_layers_that_are_said(pipe, steps, layers, expected_steps, expected_layers):
    seen, names = [], list(attention_layers(pipe.unet, "self"))
    with sharing(pipe, recorder(seen), layers=layers, steps=steps):
        draw(pipe)
    assert seen == [(step, names[layer]) for step in expected_steps for layer in expected_layers]


def test_layers_of_select_layers_and_stock_outside_the_steps(pipe):
    expected = draw(pipe)
    layers = select_layers(pipe.unet, "self", [1])
    stock = [predict(pipe.unet, t) for t in pipe.scheduler.timesteps]
    with sharing(pipe, first_row, layers=layers, steps=3):
        found = [predict(pipe.unet, t) for t in pipe.scheduler.timesteps]
    assert all(map(torch.equal, found[:3], stock[:3])) and not torch.equal(found[3], stock[3])
    with sharing(pipe, first_row, layers=layers, steps=1):
        assert distance(draw(pipe), expected) > 10 * TOLERANCE


def test_interrupted_and_repeated_runs_count_anew(pipe):
    def stop(pipe, step, timestep, given):
        pipe._interrupt = step == 1
        return given

    seen = []
    with sharing(pipe, recorder(seen), layers=[0]):
        draw(pipe, callback_on_step_end=stop)
        draw(pipe, steps=3)
        draw(pipe, steps=1)
        draw(pipe, steps=1)
    assert [step for step, _ in seen] == [0, 1, 0, 1, 2, 0, 0]


def test_an_image_to_image_run_has_the_numbers_of_the_whole_schedule():
    pipe, seen = new_pipe(cls=StableDiffusionImg2ImgPipeline), []
    with sharing(pipe, recorder(seen), layers=[0], steps=4):
        pipe("a", image=torch.rand(1, 3, 16, 16), strength=0.5, num_inference_steps=6, output_type="latent")
    assert [step for step, _ in seen] == [4, 5]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(pipe, error):
    expected, before = draw(pipe), pipe.unet.attn_processors

    def broken(pipe, step, timestep, given):
        raise error

    with pytest.raises(error), sharing(pipe, first_row):
        draw(pipe, callback_on_step_end=broken)
    assert pipe.unet.attn_processors == before and not pipe.unet._forward_pre_hooks
    assert torch.equal(draw(pipe), expected)


def test_two_methods_in_different_layers(pipe):
    seen = []
    with sharing(pipe, first_row, layers=5), sharing(pipe, recorder(seen), layers=[0], steps=[1]):
        draw(pipe)
    assert len(seen) == 1
    with pytest.raises(NotImplementedError, match="expected a stock attention processor"):
        with sharing(pipe, first_row), sharing(pipe, first_row):
            pass


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_unet(way):
    """One graph for the steps before, one for those that share; no other for another step."""
    torch._dynamo.reset()
    pipe = new_pipe(**ONE_LEVEL)
    stock = draw(pipe)
    with sharing(pipe, first_row, steps=2):
        expected = draw(pipe)
    pipe.unet = WAYS[way](pipe.unet)
    with sharing(pipe, first_row, steps=2):
        assert distance(draw(pipe), expected) < TOLERANCE < distance(expected, stock)
        with torch._dynamo.config.patch(error_on_recompile=True):
            draw(pipe, steps=6)


def test_a_unet_compiled_in_place_is_refused():
    pipe = new_pipe(**ONE_LEVEL)
    pipe.unet.compile(**OPTIONS)
    with pytest.raises(NotImplementedError, match=r"sharing: unet: expected one that is not compiled in place"):
        with sharing(pipe, first_row):
            pass


def test_gradient_checkpointing_computes_the_same(pipe):
    """The blocks run again in the backward pass."""
    unet, found = tiny_unet(0), []
    pipe = StableDiffusionPipeline(**components() | {"unet": unet})
    pipe.scheduler.set_timesteps(4)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    for checkpointing in (False, True):
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        with sharing(pipe, first_row, steps=1):
            unet(x, pipe.scheduler.timesteps[1], encoder_hidden_states=text).sample.square().mean().backward()
        found.append(unet.conv_in.weight.grad.clone())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("way", ["after the `with` block", "after a pass of another step"])
def test_gradient_checkpointing_refuses_a_late_backward(way):
    """The blocks would run again without the method, or with another step's."""
    pipe = new_pipe()
    pipe.scheduler.set_timesteps(4)
    pipe.unet.train()
    pipe.unet.enable_gradient_checkpointing()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with sharing(pipe, first_row, steps=1):
        first, second = (
            pipe.unet(x, pipe.scheduler.timesteps[step], encoder_hidden_states=text, return_dict=False)[0].mean()
            for step in (1, 0)
        )
        if "pass" in way:
            with pytest.raises(
                NotImplementedError, match=rf"sharing: backward: expected one right after its pass.*{way}"
            ):
                (first + second).backward()
    if "pass" not in way:
        with pytest.raises(NotImplementedError, match=rf"sharing: backward: expected one right after its pass.*{way}"):
            second.backward()


def test_the_grid_is_the_layers(pipe):
    """Also where a side is odd, so that the number of tokens does not tell."""
    found = {}

    def method(query, key, value, *, layer, grid):
        found[layer] = grid
        return plain(query, key, value)

    with torch.no_grad(), sharing(pipe, method):
        pipe.unet(torch.randn(1, 4, 9, 6), 1, encoder_hidden_states=torch.randn(1, 3, 16))
        assert set(found.values()) == {(9, 6), (5, 3)} and layer_grid(2, 9, 6) == (5, 3)
        pipe.unet(torch.randn(1, 4, 6, 9), 1, encoder_hidden_states=torch.randn(1, 3, 16))
        assert set(found.values()) == {(6, 9), (3, 5)}
        merging = next(iter(attention_layers(pipe.unet, "self").values()))
        with pytest.raises(NotImplementedError, match=r"grid: expected 6 x 9 tokens, got 20 tokens in down_blocks"):
            merging(torch.randn(1, 20, 16))


MASK = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]])
"""Which of the text's tokens count."""


def predict(unet, timestep=1, **kwargs):
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 16, generator=g)
    with torch.no_grad():
        return unet(x, timestep, encoder_hidden_states=text, return_dict=False, **kwargs)[0]


def test_cross_attention_calls_the_function_with_the_text(pipe):
    shapes = []

    def method(query, key, value, key_bias):
        shapes.append(key.shape[1])
        return plain(query, key, value, key_bias)

    for kwargs in ({}, {"encoder_attention_mask": MASK}):
        expected = predict(pipe.unet, **kwargs)
        with sharing(pipe, method, kind="cross"):
            torch.testing.assert_close(predict(pipe.unet, **kwargs), expected)
    assert shapes == [5] * 2 * 7
    assert (predict(pipe.unet) - expected).abs().max() > 10 * TOLERANCE
    with sharing(pipe, plain_without_bias, kind="cross"):
        with pytest.raises(
            NotImplementedError, match=r"attention_mask: expected None .*let the function take key_bias"
        ):
            predict(pipe.unet, encoder_attention_mask=MASK)


def plain_without_bias(query, key, value):
    return plain(query, key, value)


def test_self_attention_takes_a_mask_per_key_too(pipe):
    mask = {"attention_mask": torch.ones(2, 64).index_fill_(1, torch.arange(9), 0)}
    layer = next(iter(attention_layers(pipe.unet, "self").values()))
    x, before = torch.randn(2, 64, 16), layer.processor
    expected = layer(x, attention_mask=(1 - mask["attention_mask"])[:, None] * -10000.0)
    layer.set_processor(CustomAttnProcessor(lambda query, key, value, *, key_bias: plain(query, key, value, key_bias)))
    torch.testing.assert_close(layer(x, attention_mask=(1 - mask["attention_mask"])[:, None] * -10000.0), expected)
    with pytest.raises(NotImplementedError, match=r"attention_mask: expected one per key, \(B, 1, M\)"):
        layer(x, attention_mask=torch.zeros(2, 64, 64))
    layer.set_processor(before)


def test_what_a_function_asks_for_is_decided_by_its_signature(pipe):
    def method(query, key, value, grid="a default", *, step=None, layer="bound by a partial"):
        assert step in range(2) and layer == "mine" and grid == "a default"
        return plain(query, key, value)

    with sharing(pipe, partial(method, layer="mine")):
        draw(pipe, steps=2)
    with pytest.raises(
        ValueError, match=r"attention: expected .*, got one that asks for step, layer; install it by shar"
    ):
        CustomAttnProcessor(method)
    with pytest.raises(TypeError, match=r"attention: expected a result of shape \(4, 64, 2, 8\), got str"):
        with sharing(pipe, lambda query, key, value: "all of it"):
            draw(pipe)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_function_that_only_looks_on_changes_nothing(pipe, kind):
    seen = []
    with sharing(pipe, lambda query, key, value: seen.append(query.shape), kind=kind):
        looked_on = draw(pipe)
    assert seen and torch.equal(looked_on, draw(pipe))


REFUSED = [
    (dict(layers=7), r"layers: expected numbers of layers from 0 to 6, .*got 7"),
    (dict(layers=[1, -1]), r"layers: expected numbers of layers from 0 to 6, .*got -1"),
    (dict(layers=[]), r"layers: expected .*at least one, got \[\]"),
    (dict(layers="up_block"), r"layers: expected one of .*got 'up_block'"),
    (dict(steps=-1), r"steps: expected the first step, from 0, or .*got -1"),
    (dict(steps=[0.5]), r"steps: expected numbers of steps, from 0, got 0.5"),
    (dict(steps=[]), r"steps: expected the first step"),
    (dict(steps=4), r"steps: expected some of 0 to 3 of the schedule, got 4 as the first; choose earlier steps"),
    (dict(steps=[9, 7]), r"steps: expected some of 0 to 3 of the schedule, got 7 as the first"),
    (dict(steps=range(7, 3, -1)), r"steps: expected some of 0 to 3 of the schedule, got 4 as the first"),
    (dict(steps=range(3, -3, -1)), r"steps: expected numbers of steps, from 0, got -2"),
    (dict(layers=np.array([0.5])), r"layers: expected numbers of layers .*got 0.5"),
    (dict(layers={"x": 1}), r"layers: expected self-attention layers of pipe.unet by name, got 'x': int, .*select_la"),
    (dict(layers=select_layers(tiny_unet(0), "self")), r"layers: expected self-attention layers of pipe.unet"),
    (dict(kind="both"), r"kind: expected one of self, cross, got 'both'"),
    (dict(rows=6), r"rows: expected a UNet's batch of 6 rows, got 4; without guidance say halves=1"),
]


def test_layers_of_the_other_kind_are_refused(pipe):
    with pytest.raises(ValueError, match=r"layers: expected self-attention layers of pipe.unet by name, got 'down_b"):
        with sharing(pipe, first_row, layers=select_layers(pipe.unet, "cross")):
            pass


def test_the_first_step_is_compared_with_every_schedule():
    """Heun's scheduler makes two passes per step: five of three steps."""
    pipe = new_pipe(HeunDiscreteScheduler(), **ONE_LEVEL)
    with sharing(pipe, first_row, steps=2):
        draw(pipe, steps=3)
        with pytest.raises(ValueError, match=r"steps: expected some of 0 to 1 of the schedule, got 2"):
            draw(pipe, steps=2)


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_does_not_fit_is_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message), sharing(pipe, first_row, **arguments):
        draw(pipe)
    with pytest.raises(ValueError, match="pipe: expected a pipeline with a UNet and a scheduler, got UNet2D"):
        with sharing(pipe.unet, first_row):
            pass


def test_a_timestep_that_is_not_in_the_schedule_is_named(pipe):
    pipe.scheduler.set_timesteps(3)
    message = r"steps: expected a timestep of pipe\.scheduler, got 1\.5"
    with sharing(pipe, first_row, steps=1), pytest.raises(ValueError, match=message):
        predict(pipe.unet, timestep=1.5)
