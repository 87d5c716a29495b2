"""ReferenceBank: reading it is attending to the reference in the same batch; a file keeps it; stale is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_pipelines import NOISE, PROMPTS, SHARED, banked, fresh, run, seeded

from lr_kernels import Source, multi_source_attention
from lr_kernels.diffusers import CustomAttnProcessor, install_processors, select_layers
from lr_kernels.diffusers.processors.bank import KeyValueBank, ReferenceBank

TIMESTEPS = (900, 500, 100)
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def inputs(rows, seed, side=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, side, side, generator=g), torch.randn(rows, 7, 32, generator=g)


def predict(unet, latents, text, t):
    with torch.no_grad():
        return unet(latents, t, encoder_hidden_states=text, return_dict=False)[0]


def filled(unet, **keywords):
    bank = ReferenceBank(TIMESTEPS, **keywords)
    layers = select_layers(unet, "self")
    latents, text = inputs(1, 1)
    with install_processors(layers, bank.processors(layers)):
        for i, t in enumerate(TIMESTEPS):
            with bank.extract(i):
                predict(unet, latents, text, t)
    return bank


def read(unet, bank, step=1):
    layers = select_layers(unet, "self")
    with install_processors(layers, bank.processors(layers)), bank.read(step):
        return predict(unet, *inputs(2, 2), TIMESTEPS[step])


def addresses(bank):
    return [x.data_ptr() for held in bank._buffers().values() for x in held]


def dequantized(bank, plain):
    """The plain bank, with the numbers that the 8-bit one stands for."""
    for name, (eight, scale) in bank._stored.items():
        plain._stored[name][0].copy_(eight.float() * scale[..., None])
    return plain


def in_one_batch(unet, step=1, foreground=None):
    """The reference as the last row of the batch, read by the two others."""

    def shared(query, key, value):
        rows = torch.tensor([2, 2, -1], dtype=torch.int32)
        mask = None
        if foreground is not None:
            side = int(query.shape[1] ** 0.5)
            mask = torch.nn.functional.adaptive_avg_pool2d(foreground[:, None].float(), side).flatten(1) >= 0.5
        return multi_source_attention(query, [Source(key, value), Source(key, value, rows, key_mask=mask)])

    layers = select_layers(unet, "self")
    (targets, text), (reference, reference_text) = inputs(2, 2), inputs(1, 1)
    with install_processors(layers, {name: CustomAttnProcessor(shared) for name in layers}):
        both = torch.cat([targets, reference]), torch.cat([text, reference_text])
        return predict(unet, *both, TIMESTEPS[step])[:2]


@pytest.mark.parametrize("storage", ["device", "cpu"])
@pytest.mark.parametrize("step", [0, 2])
def test_reading_the_bank_is_sharing_in_one_batch(unet, storage, step):
    bank = filled(unet, storage=storage)
    torch.testing.assert_close(read(unet, bank, step), in_one_batch(unet, step))
    stock = predict(unet, *inputs(2, 2), TIMESTEPS[step])
    assert not torch.allclose(read(unet, bank, step), stock, atol=1e-3)
    assert bank.mode is None


def test_only_the_foreground_is_read(unet):
    bank = filled(unet)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:8] = True
    bank.foreground = mask
    torch.testing.assert_close(read(unet, bank), in_one_batch(unet, foreground=mask))
    for (stored,) in bank._stored.values():  # what is hidden has no effect
        side = int(stored.shape[3] ** 0.5)
        hidden = torch.nn.functional.adaptive_avg_pool2d(mask[:, None].float(), side).flatten() < 0.5
        stored[:, :, :, hidden] = torch.nan
    torch.testing.assert_close(read(unet, bank), in_one_batch(unet, foreground=mask))


def test_rows_and_strength(unet):
    bank = filled(unet)
    stock = predict(unet, *inputs(2, 2), TIMESTEPS[1])
    bank.rows = torch.tensor([-1, 0], dtype=torch.int32)
    found = read(unet, bank)
    torch.testing.assert_close(found[0], stock[0])
    torch.testing.assert_close(found[1], in_one_batch(unet)[1])
    bank.strength = torch.tensor(-torch.inf)
    torch.testing.assert_close(read(unet, bank), stock)


@pytest.mark.parametrize("masked", [False, True])
def test_several_references_at_once_each_with_its_strength(unet, masked):
    """Two pictures in one bank, read in one softmax, against both in the batch."""
    bank, layers = ReferenceBank(TIMESTEPS), select_layers(unet, "self")
    (targets, text), (pictures, their_text) = inputs(2, 2), inputs(2, 5)
    with install_processors(layers, bank.processors(layers)), bank.extract(1):
        predict(unet, pictures, their_text, TIMESTEPS[1])
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :4] = masks[1, 2:] = True
    bank.rows = torch.tensor([[0, 0], [1, -1]], dtype=torch.int32)
    bank.strength = torch.tensor([[-0.5, 0.0], [0.7, 0.0]])
    bank.foreground = masks if masked else None
    rows = torch.tensor([[2, 2, -1, -1], [3, -1, -1, -1]], dtype=torch.int32)
    strength = torch.nn.functional.pad(bank.strength, (0, 2))

    def shared(query, key, value):
        side = int(query.shape[1] ** 0.5)
        shown = torch.nn.functional.adaptive_avg_pool2d(masks[:, None].float(), side).flatten(1) >= 0.5
        shown = torch.cat([torch.ones_like(shown), shown]) if masked else None
        read = [Source(key, value, r, key_mask=shown, logit_bias=s) for r, s in zip(rows, strength)]
        return multi_source_attention(query, [Source(key, value), *read])

    with install_processors(layers, {name: CustomAttnProcessor(shared) for name in layers}):
        both = predict(unet, torch.cat([targets, pictures]), torch.cat([text, their_text]), TIMESTEPS[1])[:2]
    torch.testing.assert_close(read(unet, bank), both)
    bank.strength = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"strength: expected \(\), \(B,\) or \(2, B\) as rows, got \(3, 2\)"):
        read(unet, bank)


def test_the_file_gives_the_same_bits(unet, tmp_path):
    bank = filled(unet)
    bank.foreground = torch.ones(1, 8, 8, dtype=torch.bool)
    bank.save(tmp_path / "bank.safetensors", model="tiny")
    again = ReferenceBank.load(tmp_path / "bank.safetensors", model="tiny")
    assert again.timesteps == list(TIMESTEPS) and torch.equal(read(unet, again), read(unet, bank))
    with pytest.raises(ValueError, match="belongs to another model"):
        ReferenceBank.load(tmp_path / "bank.safetensors", model="other")


@pytest.mark.fault(number=44)
def test_memory_is_what_the_docstring_says_and_bounded(unet):
    bank = filled(unet)
    channels = {8 * 8: 32, 4 * 4: 64}
    step = sum(2 * x.shape[2] * channels[x.shape[2]] * 4 for (x,) in bank._buffers().values())
    assert bank.nbytes == (len(TIMESTEPS) + 1) * step
    before = addresses(bank)
    for i in range(3):
        read(unet, bank, i)
    assert bank.nbytes == (len(TIMESTEPS) + 1) * step and addresses(bank) == before
    with pytest.raises(ValueError, match="limit: expected a bank within 50000 bytes"):
        filled(unet, limit=50_000)


@pytest.mark.fault(number=33)
def test_a_stale_bank_is_refused_by_name(unet):
    bank = filled(unet)
    layers = select_layers(unet, "self")
    with install_processors(layers, bank.processors(layers)), bank.read(0):
        with pytest.raises(ValueError, match=r"ReferenceBank: bank: expected built for .*call reset\(\)"):
            predict(unet, *inputs(2, 2, side=16), 900)
        with pytest.raises(ValueError, match="bank: expected built for"):
            predict(unet.to(torch.bfloat16), *(x.bfloat16() for x in inputs(2, 2)), 900)
        unet.to(torch.float32)
    assert bank.mode is None
    bank.reset()
    with pytest.raises(ValueError, match="call extract"), bank.read(0):
        pass


@pytest.mark.parametrize(
    ("use", "message"),
    [(lambda bank: bank.read(3).__enter__(), "step: expected 0 to 2"),
     (lambda bank: ReferenceBank(TIMESTEPS, storage="disk"), "storage: expected one of"),
     (lambda bank: ReferenceBank(TIMESTEPS, dtype=torch.bfloat16), "dtype: expected one of None, torch.int8, torch.fl"),
     (lambda bank: ReferenceBank(TIMESTEPS, dtype="int8"), "dtype: expected one of None, torch.int8, .*got 'int8'"),
     (lambda bank: setattr(bank, "foreground", torch.ones(8, 8)), "foreground: expected bool"),
     (lambda bank: ReferenceBank(TIMESTEPS).save("x"), "all 3 steps extracted"),
     (lambda bank: bank.read("a").__enter__(), "step: expected 0 to 2, got 'a'"),
     (lambda bank: bank.extract(0.5).__enter__(), "step: expected 0 to 2, got 0.5"),
     (lambda bank: ReferenceBank([900, 500], signals=[0.1]), "signals: expected 2, one per timestep, got 1"),
     (lambda bank: ReferenceBank([900, 500], signals=[0.1, 2]), "signals: expected numbers from 0 to 1, got 2"),
     (lambda bank: ReferenceBank([float("nan")]), "timesteps: expected numbers from 0 to 1e[+]06, got nan"),
     (lambda bank: ReferenceBank([]), "timesteps: expected a list of numbers, at least one"),
     (lambda bank: ReferenceBank("ab"), "timesteps: expected a list of numbers"),
     (lambda bank: ReferenceBank(5), "timesteps: expected a list of numbers"),
     (lambda bank: setattr(bank, "rows", [0.5]), "rows: expected integers"),
     (lambda bank: setattr(bank, "rows", "ab"), "rows: expected integers"),
     (lambda bank: setattr(bank, "strength", float("nan")), "strength: expected a number"),
     (lambda bank: setattr(bank, "strength", "a"), "strength: expected a number"),
     (lambda bank: setattr(bank, "foreground", [[[True]]]), "foreground: expected bool"),
     (lambda bank: setattr(bank, "foreground", np.ones((1, 8, 8))), "foreground: expected bool .*ndarray float64")],
)  # fmt: skip
def test_what_does_not_fit_is_named(use, message, unet):
    with pytest.raises(ValueError, match=message):
        use(filled(unet))


def test_two_banks_do_not_mix(unet):
    """Two subjects in turn, each read beside the other's extraction."""
    first, second = filled(unet), ReferenceBank(TIMESTEPS)
    expected = read(unet, first)
    layers = select_layers(unet, "self")
    with install_processors(layers, second.processors(layers)), second.extract(0):
        predict(unet, *inputs(1, 9), TIMESTEPS[0])
    assert torch.equal(read(unet, first), expected)


def test_plain_numbers_lists_and_arrays_are_taken(unet):
    bank = filled(unet)
    bank.rows, bank.strength = torch.tensor([0, -1], dtype=torch.int32), torch.tensor(-0.5)
    bank.foreground = torch.ones(1, 8, 8, dtype=torch.bool)
    expected = read(unet, bank)
    bank.rows, bank.strength, bank.foreground = [0, -1], -0.5, np.ones((1, 8, 8), bool)
    assert torch.equal(read(unet, bank), expected)
    bank.foreground = torch.ones(3, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"ReferenceBank: foreground: expected 1 or 1 masks, one per row .*, got 3"):
        read(unet, bank)


def test_one_step_at_a_time_is_read_or_extracted(unet):
    """All steps share one buffer per layer: another within would leave its own."""
    bank = filled(unet)
    for outer, inner in ((bank.read, bank.read), (bank.read, bank.extract), (bank.extract, bank.read)):
        with pytest.raises(ValueError, match="ReferenceBank: step: expected one step at a time, got 1 within another"):
            with outer(0), inner(1):
                pass
        assert bank.mode is None


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("storage", ["device", "cpu"])
def test_a_bank_in_8_bits_is_the_bank_of_the_numbers_it_stands_for(unet, dtype, storage):
    bank = filled(unet, dtype=dtype, storage=storage)
    bank.foreground = np.tile(np.arange(8) > 2, (1, 8, 1))
    before = addresses(bank)
    expected = dequantized(bank, filled(unet))
    expected.foreground = bank.foreground
    for step in range(3):
        assert torch.equal(read(unet, bank, step), read(unet, expected, step))
    assert bank.dtype == dtype and addresses(bank) == before
    exact = read(unet, filled(unet))
    assert not torch.equal(read(unet, filled(unet, dtype=dtype)), exact)
    torch.testing.assert_close(read(unet, filled(unet, dtype=dtype)), exact, atol=0.05, rtol=0)  # the same picture


@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
@pytest.mark.fault(number=44)
def test_8_bits_take_half_the_bytes_of_bf16_and_the_scales(head_dim):
    """1/2 + 2 / head_dim: 0.55, 0.53125, 0.525 and 0.515625."""
    banks = {dtype: KeyValueBank([2, 1], dtype=dtype) for dtype in (None, *EIGHT_BITS)}
    keys = torch.randn(2, 3, 16, 4, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    for bank in banks.values():
        for step in (0, 1):
            with bank.extract(step):
                bank.layer("layer").write(*keys)
    for dtype in EIGHT_BITS:
        assert banks[dtype].nbytes / banks[None].nbytes == 1 / 2 + 2 / head_dim
        assert banks[dtype].rows_held == 3 and banks[dtype].layer_names == ["layer"]
    with pytest.raises(ValueError, match=f"limit: expected a bank within 100 bytes, got {banks[torch.int8].nbytes} "):
        with (limited := KeyValueBank([2, 1], dtype=torch.int8, limit=100)).extract(0):
            limited.layer("layer").write(*keys)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_file_in_8_bits_gives_the_same_bits(unet, dtype, tmp_path):
    bank = filled(unet, dtype=dtype)
    bank.save(tmp_path / "bank.safetensors")
    for storage in ("device", "cpu"):
        again = ReferenceBank.load(tmp_path / "bank.safetensors", storage=storage)
        buffers = sum(x.nbytes for held in bank._buffers().values() for x in held)
        assert again.dtype == dtype and again.nbytes == bank.nbytes - buffers
        assert torch.equal(read(unet, again), read(unet, bank))
    layers = select_layers(unet, "self")
    with install_processors(layers, again.processors(layers)), again.extract(0):
        predict(unet, *inputs(1, 4), TIMESTEPS[0])  # whose keys are in 8 bits too
    assert again.nbytes == bank.nbytes and not torch.equal(read(unet, again, 0), read(unet, bank, 0))


def test_a_bank_in_8_bits_serves_models_of_every_precision(unet):
    bank, layers = filled(unet, dtype=torch.int8), select_layers(unet, "self")
    try:
        with install_processors(layers, bank.processors(layers)), bank.read(1):
            found = predict(unet.to(torch.bfloat16), *(x.bfloat16() for x in inputs(2, 2)), TIMESTEPS[1])
            with pytest.raises(ValueError, match="bank: expected built for"):
                predict(unet, *(x.bfloat16() for x in inputs(2, 2, side=16)), TIMESTEPS[1])
    finally:
        unet.to(torch.float32)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


def test_keys_that_8_bits_cannot_hold_are_refused():
    bank, key = KeyValueBank([1], dtype=torch.int8), torch.ones(1, 4, 2, 8)
    message = r"KeyValueBank: bank: expected a pass without gradients, .*extract under torch.no_grad\(\)"
    with pytest.raises(NotImplementedError, match=message), bank.extract(0):
        bank.layer("layer").write(key, key.clone().requires_grad_())
    with pytest.raises(ValueError, match="quantize: x: expected finite numbers"), bank.extract(0):
        bank.layer("layer").write(key / 0, key)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_images_with_banks_in_8_bits_are_those_of_the_numbers_they_stand_for(dtype):
    """Of references and of contexts, through the whole pipeline."""
    pipe = fresh()
    bank = banked(pipe, dtype=dtype, storage="cpu")
    kept = {"context_storage": "cpu", "context_dtype": dtype}
    layout = pipe.layout(PROMPTS, "a ball", ("sks", "ball"), latents=NOISE, **SHARED, **kept)
    contexts = layout.contexts.bank
    assert bank.dtype == contexts.dtype == dtype

    def images(references, contexts):
        given = replace(layout, contexts=replace(layout.contexts, bank=contexts))
        arguments = {**SHARED, "layout": given, "reference_bank": references, "generator": seeded()}
        return pipe.retouch(PROMPTS, None, None, ("sks", "ball"), **arguments).latents

    plain = pipe.layout(PROMPTS, "a ball", ("sks", "ball"), latents=NOISE, context_storage="cpu", **SHARED)
    expected = images(dequantized(bank, banked(pipe)), dequantized(contexts, plain.contexts.bank))
    assert torch.equal(images(bank, contexts), expected)
    arguments = {**SHARED, "reference_bank": bank, "context_dtype": dtype, "latents": NOISE}
    found = pipe(PROMPTS, "a ball", None, None, ("sks", "ball"), **arguments)
    assert found.rows["retouch"] == 3 * 2 * len(PROMPTS)  # the targets alone: both banks were read
    assert torch.equal(found.latents, expected)


def test_the_contexts_limit_counts_8_bits_and_scales():
    pipe = fresh()
    layers = 3 * 64 * (16 + 2 * 4) + 4 * 16 * (32 + 2 * 4)  # tokens, channels, heads' scales
    needed = 2 * 4 * (3 + 1) * layers  # key and value, rows, steps and the buffer of one
    run(pipe, context_dtype=torch.int8, context_limit=needed)
    with pytest.raises(ValueError, match=f"context_limit: expected at least {needed} bytes"):
        run(pipe, context_dtype=torch.int8, context_limit=needed - 1)
    with pytest.raises(ValueError, match=r"context_dtype: expected one of None, torch\.int8"):
        run(pipe, context_dtype=torch.float16)
    with pytest.raises(ValueError, match="context_dtype: expected None without a context_storage"):
        run(pipe, context_dtype=torch.int8, context_storage=None)
    with pytest.raises(ValueError, match=r"ReferenceBank: dtype: expected one of None, torch\.int8"):
        banked(pipe, dtype=torch.float16)
