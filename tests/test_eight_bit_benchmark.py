"""The measurements of 8-bit keys and values: what they call a number is what the operator reads; their whole path."""

import pytest
import torch

from benchmarks import eight_bit, eight_bit_method
from lr_kernels import Source, multi_source_attention, quantize, toy
from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline
from lr_kernels.toy.judge import Wanted
from lr_kernels.toy.stages import Task


def small_layer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return eight_bit.Layer(*(torch.randn(2, 24, 3, 64, generator=generator) for _ in range(3)))


@pytest.mark.parametrize("dtype", eight_bit.EIGHT_BITS.values())
def test_the_chosen_numbers_are_those_that_the_operator_reads(dtype):
    query, key, value = (x.bfloat16() for x in small_layer())
    (key8, key_scale), (value8, value_scale) = quantize(key, dtype), quantize(value, dtype)
    found = multi_source_attention(query, [Source(key8, value8, key_scale=key_scale, value_scale=value_scale)])
    numbers = (eight_bit.stands_for(x.float(), dtype, eight_bit.CHOSEN).bfloat16() for x in (key, value))
    assert torch.equal(found, multi_source_attention(query, [Source(*numbers)]))


@pytest.mark.parametrize("granularity", eight_bit.GRANULARITIES)
def test_a_scale_is_shared_by_what_its_name_says_and_no_number_is_cut(granularity):
    before = small_layer().key
    before[0, 5] = 0.0
    x = before.clone()
    x[1, 3, 2, 40] = 100.0
    scale = eight_bit.GRANULARITIES[granularity](x)
    assert (scale.expand_as(x) >= x.abs()).all()
    found = eight_bit.stands_for(x, torch.int8, granularity)
    assert ((found - x).abs() <= scale / 127 * 0.501).all() and (found[0, 5] == 0).all()
    changed = scale.expand_as(x) != eight_bit.GRANULARITIES[granularity](before)
    shared_by = {
        "tensor": 48 * 3 * 64,
        "head": 48 * 64,
        "channel and head": 48,
        "token and head": 64,
        "32 channels": 32,
    }
    assert changed.sum() == shared_by[granularity]


def test_errors_have_a_line_for_bf16_and_each_dtype_and_granularity():
    rows = eight_bit.measure(iter([("normal", "", small_layer())]))
    assert len(rows) == 1 + 2 * 5 and eight_bit.show(rows).row_count == len(rows)
    found = {(row["dtype"], row["granularity"]): float(row["error"]) for row in rows}
    assert found["bf16", ""] < found["int8", eight_bit.CHOSEN] < found["float8_e4m3fn", eight_bit.CHOSEN]
    assert found["int8", "32 channels"] < found["int8", eight_bit.CHOSEN] < found["int8", "tensor"]


def test_pictures_with_each_bank_are_judged_beside_the_control():
    base = toy.load_pipeline()
    pipe = StableDiffusionLayoutRetouchPipeline.from_pipe(
        base, personalized_unet=toy.load_pipeline().unet, personalized_text_encoder=base.text_encoder
    )
    pipe.set_progress_bar_config(disable=True)
    task = Task("ring", tuple(Wanted(subject="ring", background=name) for name in ("sky", "sky")))
    outputs, nbytes = eight_bit_method.run(pipe, task, 0, ["int8"], steps=3)
    plain = torch.as_tensor(outputs["retouch"].images)
    assert nbytes["int8"] / nbytes["retouch"] == 1 / 4 + 1 / 32  # of fp32, with heads of 32 channels
    images = torch.as_tensor(outputs["int8"].images)
    assert not torch.equal(images, plain) and (images - plain).abs().mean() < 0.01
    rows, sets = eight_bit_method.judged(outputs, task)
    rows = [{"subject": "ring", "seed": 0, **row} for row in rows]
    pixels = [eight_bit_method.pixel_differences(outputs)]
    found = eight_bit_method.report(rows, [{"stages": sets}], pixels, ("ring",))
    assert found["moved"].keys() == {"int8", "control"}
    assert found["pixels_of_255"]["int8"]["mean"] < found["pixels_of_255"]["control"]["mean"]
    assert eight_bit_method.show(found).row_count > 5
