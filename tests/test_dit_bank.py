"""A bank of references for a transformer: one pass over the references serves all prompts, seeds, sizes and steps."""

import functools
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import tiny_flux2
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from model_changes import randn

from lr_kernels import Source
from lr_kernels.diffusers import TransformerReferenceBank, extract_references, use_cached_references
from lr_kernels.diffusers.dit.cached.bank import model_of
from lr_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")


_pipeline = functools.cache(tiny_flux2.pipeline)


def pipe(dtype=torch.float32):
    return _pipeline(dtype)


@functools.cache
def _extracted(dtype, rotated):
    return extract_references(pipe(dtype), tiny_flux2.references(), rotated=rotated)


def bank(dtype=torch.float32, rotated=True):
    return _extracted(dtype, rotated)


def from_bank(found, dtype=torch.float32, **arguments):
    with use_cached_references(pipe(dtype).transformer, found):
        return tiny_flux2.generate(pipe(dtype), **arguments)


CALLS = [{}, {"prompt": 8}, {"seed": 9}, {"steps": 1}, {"steps": 4, "prompt": 1}, {"rows": 3}, {"side": 72}]


@pytest.mark.parametrize("arguments", CALLS, ids=str)
def test_one_bank_serves_every_prompt_seed_size_and_number_of_steps(arguments):
    """As the stock pipeline does with the reference images, whose keys it computes anew in every call."""

    def stock(dtype):
        return tiny_flux2.generate(pipe(dtype), image=tiny_flux2.references(), **{"side": 64, **arguments})

    found = from_bank(bank(), **arguments)
    assert_matches(found, stock(torch.float32), stock(torch.float64))
    assert not torch.allclose(found, tiny_flux2.generate(pipe(), **arguments), atol=1e-2)  # the references matter


def test_the_bank_holds_one_row_for_all_rows_of_the_batch():
    model, found = pipe().transformer, bank()
    tokens = 64 + 72  # of two references
    layers = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    assert found.tokens == tokens and found.nbytes == layers * 2 * tokens * 2 * 16 * 4
    assert {x.key.shape for x in found.sources.values()} == {(1, tokens, 2, 16)}


def test_its_transformer_never_sees_the_references_again():
    seen = []
    hook = pipe().transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    from_bank(bank())
    hook.remove()
    assert seen == [64] * 3


_OTHER_PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import tiny_flux2
from lr_kernels.diffusers import TransformerReferenceBank, use_cached_references
torch.set_num_threads(1)
pipe, bank = tiny_flux2.pipeline(), TransformerReferenceBank.load(sys.argv[2])
with use_cached_references(pipe.transformer, bank):
    torch.save(tiny_flux2.generate(pipe, prompt=4), sys.argv[3])
"""


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_a_saved_bank_gives_the_same_bits_in_another_process(tmp_path, dtype):
    found = bank() if dtype is None else bank().quantized(dtype)
    found.save(tmp_path / "bank")
    arguments = [str(Path(__file__).parent), str(tmp_path / "bank"), str(tmp_path / "images")]
    subprocess.run([sys.executable, "-c", _OTHER_PROCESS, *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "images"), from_bank(found, prompt=4))


@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_a_loaded_bank_is_the_saved_one(tmp_path, dtype):
    found = bank() if dtype is None else bank().quantized(dtype)
    found.save(tmp_path / "bank")
    loaded = TransformerReferenceBank.load(tmp_path / "bank")
    assert list(tmp_path.iterdir()) == [tmp_path / "bank"]
    assert (loaded.model, loaded.rotated, loaded.tokens, loaded.dtype, loaded.nbytes) == (
        found.model, found.rotated, found.tokens, found.dtype, found.nbytes,
    )  # fmt: skip
    assert torch.equal(loaded.ids, found.ids) and loaded.sources.keys() == found.sources.keys()
    for name, source in loaded.sources.items():
        for ours, theirs in zip(source, found.sources[name]):
            assert ours is theirs is None or not isinstance(ours, torch.Tensor) or torch.equal(ours, theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loaded_bank_is_the_files_pages_not_a_copy(tmp_path):
    """So processes that load it share the memory."""
    bank().save(tmp_path / "bank")
    loaded = TransformerReferenceBank.load(tmp_path / "bank")
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [tuple(int(x, 16) for x in line[0].split("-")) for line in mapped]
    for source in loaded.sources.values():
        for x in (source.key, source.value):
            assert any(start <= x.data_ptr() < end for start, end in ranges)


def test_a_bank_survives_a_write_that_fails(tmp_path, monkeypatch):
    bank().save(tmp_path / "bank")
    before = (tmp_path / "bank").read_bytes()
    monkeypatch.setattr("lr_kernels.diffusers.processors.bank_files.save_file", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        bank(torch.float64).save(tmp_path / "bank")
    assert (tmp_path / "bank").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def _full_disk(_, path, __):
    Path(path).write_bytes(b"half")
    raise OSError("No space left on device")


def test_eight_bits_take_half_the_bytes_of_bf16():
    """At the size of klein's heads, 128 channels each."""
    sources = {"layer": Source(randn(1, 9, 3, 128), randn(1, 9, 3, 128, seed=1))}
    whole = TransformerReferenceBank(sources, model="any", ids=torch.zeros(9, 4))
    small, bf16 = whole.quantized(), whole.dequantized(torch.bfloat16)
    assert 2 * bf16.nbytes == whole.nbytes and small.nbytes <= 0.52 * bf16.nbytes
    again = small.dequantized(torch.float32).sources["layer"]
    for x, y in zip(sources["layer"][:2], again[:2]):  # within half a step of the largest number of token and head
        assert ((x - y).abs() <= x.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bits_change_images_no_more_than_the_steps_of_the_numbers(dtype):
    """Exactly as the keys and values do that they stand for; next to bf16, whose numbers are as far apart as 1/256."""
    small = bank().quantized(dtype)
    assert torch.equal(from_bank(small), from_bank(small.dequantized(torch.float32)))
    rounded = bank().dequantized(torch.bfloat16).dequantized(torch.float32)
    errors = [(from_bank(x) - from_bank(bank())).square().mean().sqrt() for x in (small, rounded)]
    assert errors[0] < {torch.int8: 5, torch.float8_e4m3fn: 20}[dtype] * errors[1]


def test_keys_before_rope_placed_where_they_were_are_those_after_it():
    placed = bank(rotated=False).place(pipe().transformer)
    for name, source in bank().sources.items():
        assert torch.equal(placed.sources[name].key, source.key)
        assert torch.equal(placed.sources[name].value, source.value)
    with pytest.raises(ValueError, match="bank: expected keys that are placed, got keys before RoPE"):
        use_cached_references(pipe().transformer, bank(rotated=False))
    with pytest.raises(ValueError, match="bank: expected keys before RoPE, got rotated ones"):
        bank().place(pipe().transformer)


@pytest.mark.parametrize("shift", [(10, 0, 0, 0), (0, 5, -3, 0), (-20, 40, 40, 2)])
def test_references_that_move_as_one_are_as_if_they_had_been_there(shift):
    """They see only each other, so their keys before RoPE are the same, and one extraction serves all places."""

    def moved(dtype):
        """The model's own pass with the references at the other place."""
        model, there = pipe(dtype).transformer, bank().ids + torch.tensor(shift).float()
        latents = _latents(dtype)
        with torch.no_grad():
            _, cache = model(
                hidden_states=latents, encoder_hidden_states=latents.new_zeros(1, 1, tiny_flux2.WIDTH),
                timestep=latents.new_zeros(1), txt_ids=torch.zeros(1, 4), img_ids=there, kv_cache_mode="extract",
                num_ref_tokens=latents.shape[1], return_dict=False,
            )  # fmt: skip
        return [x.k_ref for x in (*cache.double_block_caches, *cache.single_block_caches)], there

    (low, there), (exact, _) = moved(torch.float32), moved(torch.float64)
    placed = bank(rotated=False).place(pipe().transformer, there)
    assert torch.equal(placed.ids, there)
    for source, x, y in zip(placed.sources.values(), low, exact):
        assert_matches(source.key, x, y)


def _latents(dtype):
    """Of the references, as the pipeline makes them."""
    from lr_kernels.diffusers.dit.cached.extract import _prepared

    prepared = [_prepared(pipe(dtype), x) for x in tiny_flux2.references()]
    return pipe(dtype).prepare_image_latents(prepared, 1, None, torch.device("cpu"), dtype)[0]


def test_eight_bits_are_placed_too():
    small = bank(rotated=False).quantized().place(pipe().transformer)
    assert small.dtype == torch.int8
    errors = [(from_bank(x) - from_bank(bank())).square().mean() for x in (small, bank().quantized())]
    assert errors[0] < 4 * errors[1]  # rounded once more


def test_positions_of_another_kind_are_refused():
    free = bank(rotated=False)
    for ids in (free.ids[:-1], free.ids[:, :3], None):
        with pytest.raises(ValueError, match=r"TransformerReferenceBank.place: (ids|model): expected"):
            free.place(pipe().transformer if ids is not None else torch.nn.Linear(2, 2), ids)


def test_a_bank_of_another_model_is_refused():
    other = tiny_flux2.pipeline()
    del other.transformer.single_transformer_blocks[1]
    with pytest.raises(
        ValueError, match="bank: expected the layers of Flux2Transformer2DModel, got single_transformer"
    ):
        use_cached_references(other.transformer, bank())
    foreign = TransformerReferenceBank(bank().sources, model="Flux2Transformer2DModel 0", ids=bank().ids)
    with pytest.raises(ValueError, match=r"bank: expected one of Flux2Transformer2DModel .*, got one of Flux2.* 0"):
        use_cached_references(pipe().transformer, foreign)
    with pytest.raises(ValueError, match=r"bank: expected torch.float32 as the model, or 8 bits, got torch.float16"):
        use_cached_references(pipe().transformer, bank().dequantized(torch.float16))
    with pytest.raises(ValueError, match="bank: expected a TransformerReferenceBank or None, got str"):
        use_cached_references(pipe().transformer, "bank.safetensors")


def test_the_same_configuration_is_the_same_model():
    assert model_of(tiny_flux2.transformer()) == model_of(torch.compile(pipe().transformer)) == bank().model


def test_reference_images_beside_a_bank_are_refused():
    with pytest.raises(NotImplementedError, match="kv_cache_mode: expected None while a bank is read, got 'extract'"):
        from_bank(bank(), image=tiny_flux2.references(1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "a PIL image or a list of them, got NoneType"),
        ([], r"a PIL image or a list of them, got \[\]"),
        (torch.zeros(3, 8, 8), "a PIL image or a list of them, got Tensor"),
        ("cat.png", "a PIL image or a list of them"),
        ([PIL.Image.new("RGB", (64, 64)), None], "a PIL image or a list of them, got .*NoneType"),
    ],
)
def test_images_that_are_none_are_named(image, message):
    with pytest.raises(ValueError, match=f"extract_references: image: expected {message}"):
        extract_references(pipe(), image)


def test_other_pipelines_are_refused():
    other = DDPMPipeline(UNet2DModel(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                                     up_block_types=("UpBlock2D",) * 2), DDPMScheduler())  # fmt: skip
    with pytest.raises(NotImplementedError, match="pipeline: expected a Flux2KleinKVPipeline, got DDPMPipeline"):
        extract_references(other, tiny_flux2.references())


def test_extraction_leaves_the_pipeline_as_it_was():
    before = tiny_flux2.pipeline()
    processors = dict(before.transformer.attn_processors)
    extract_references(before, tiny_flux2.references())
    assert before.transformer.attn_processors == processors


def test_a_bank_keeps_no_other_fields_of_a_source():
    found = bank()
    mask = torch.ones(1, found.tokens, dtype=torch.bool)
    for field, value in (("key_mask", mask), ("logit_bias", 0.5), ("softmax_group", 1), ("rows", torch.zeros(1).int())):
        sources = {name: source._replace(**{field: value}) for name, source in found.sources.items()}
        with pytest.raises(ValueError, match=rf"{field}: expected none, since a bank keeps keys, values and scales"):
            TransformerReferenceBank(sources, model=found.model, ids=found.ids)


def test_a_bank_is_placed_for_its_own_model():
    free, own = bank(rotated=False), pipe().transformer
    other = type(own).from_config({**own.config, "axes_dims_rope": (8, 4, 2, 2)})
    with pytest.raises(ValueError, match=r"place: model: expected one of Flux2Transformer2DModel .*, got one of Flux2"):
        free.place(other)
    with pytest.raises(
        ValueError, match=r"place: model: expected a transformer, Flux2Transformer2DModel .*, got Linear"
    ):
        free.place(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"place: ids: expected a tensor .*, got list"):
        free.place(own, free.ids.tolist())


def test_heads_that_the_model_does_not_have_are_refused():
    found = bank()
    sources = {n: s._replace(key=s.key[:, :, :1], value=s.value[:, :, :1]) for n, s in found.sources.items()}
    few = TransformerReferenceBank(sources, model=found.model, ids=found.ids)
    with pytest.raises(ValueError, match=r"bank: expected \(heads, head_dim\) = .* in .*attn, got \(1, "):
        use_cached_references(pipe().transformer, few)


def test_what_is_no_transformer_or_not_stock_is_named():
    with pytest.raises(ValueError, match="use_cached_references: model: expected a transformer, got Flux2KleinKVPipel"):
        use_cached_references(pipe())
    with (
        use_cached_references(pipe().transformer),
        pytest.raises(ValueError, match="extract_references: pipeline: exp"),
    ):
        extract_references(pipe(), tiny_flux2.references())
    with pytest.raises(ValueError, match="extract_references: image: expected a PIL image or a list of them, got str"):
        extract_references(pipe(), "cat.png")
    for device in ("nonsense", None):
        with pytest.raises(ValueError, match=r"TransformerReferenceBank.to: device: expected a device of this machine"):
            bank().to(device)


def test_a_bank_of_a_model_whose_weights_are_stored_in_8_bits():
    small = tiny_flux2.pipeline(torch.bfloat16)
    small.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    found = extract_references(small, tiny_flux2.references())
    with use_cached_references(small.transformer, found):
        assert tiny_flux2.generate(small).isfinite().all()
