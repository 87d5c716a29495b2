"""Files of banks that are damaged, foreign or hostile: each field that is wrong is a ValueError that names it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lr_kernels.diffusers.processors.bank import ReferenceBank

LAYER = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
STORED = torch.randn(2, 2, 3, 16, 2, 8, generator=torch.Generator().manual_seed(0))
ABOUT = {
    "timesteps": "[900, 500]",
    "signals": "[0.1, 0.6]",
    "shows": "[0, 0, 1]",
    "words": '[["dog"], ["cat"]]',
    "model": "tiny",
}
FOREGROUND = torch.ones(3, 4, 4, dtype=torch.bool)
SCALE = torch.rand(2, 2, 3, 16, 2, generator=torch.Generator().manual_seed(1))
IN_8_BITS = {LAYER: (50 * STORED).clamp(-127, 127).to(torch.int8), f"{LAYER}.scale": SCALE}


def load(folder, tensors=None, model=None, **about):
    """A bank's file with some fields replaced; None leaves one out."""
    tensors = {LAYER: STORED, "foreground": FOREGROUND} | (tensors or {})
    metadata = {name: text for name, text in (ABOUT | about).items() if text is not None}
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / "bank", metadata)
    return ReferenceBank.load(folder / "bank", model=model)


def test_a_right_file_is_read(tmp_path):
    bank = load(tmp_path, model="tiny")
    assert bank.timesteps == [900, 500] and bank.signals == [0.1, 0.6]
    assert bank.shows == (0, 0, 1) and bank.words == [["dog"], ["cat"]]
    assert torch.equal(bank.foreground, FOREGROUND) and bank.layer_names == [LAYER] and bank.rows_held == 3
    with bank.read(1):
        kept = bank.layer(LAYER).read(STORED[1, 0])
        assert torch.equal(torch.stack([kept.key, kept.value]), STORED[1])
        assert kept.key_scale is kept.value_scale is None


def test_fields_that_older_files_lack_are_not_known(tmp_path):
    bank = load(tmp_path, {"foreground": None}, signals=None, shows=None, words=None, model=None)
    assert bank.signals is bank.shows is bank.words is bank.foreground is None


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            ("timesteps", text)
            for text in (None, "null", "[]", "5", "{}", '["a"]', "[[1], 2]", "[NaN, 1]", "[-1, 2]", "[Infinity, 2]")
        ),
        *(("timesteps", text) for text in ("[true, 2]", "[1, 2", "", DEEP, "[" + "9" * 400 + ", 1]", "9" * 5000)),
        *(
            ("signals", text)
            for text in ("[0.1]", "[0.1, 0.2, 0.3]", "[2, 3]", '"ab"', "[NaN, 0.5]", "[]", "[null, 1]")
        ),
        *(("shows", text) for text in ("[-1]", "[0.5]", "[true]", "3", '["0"]', "[[0]]")),
        *(("words", text) for text in ('["dog"]', '"dog"', "[[1]]", "[[]]", "{}", DEEP)),
    ],
)
def test_metadata_that_is_not_a_banks_is_named(tmp_path, name, text):
    with pytest.raises(ValueError, match=f"lr_kernels.ReferenceBank: {name}: expected "):
        load(tmp_path, **{name: text})


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (STORED[:1], r"\(2 steps, 2, 3 rows"),
        (STORED[:, [0, 1, 1]], r"\(2 steps, 2, 3 rows"),
        (STORED[:, :1], r"\(2 steps, 2, 3 rows"),
        (STORED[0], r"\(2 steps, 2, 1 rows"),
        (STORED[None], r"\(2 steps, 2, 1 rows"),
        (torch.tensor(1.0), r"\(2 steps, 2, 1 rows"),
        (STORED[:, :, :, :0], "tokens, heads, head_dim"),
        (STORED[..., :0], "tokens, heads, head_dim"),
        (STORED[:, :, :0], "tokens, heads, head_dim"),
        (STORED.long(), "a floating dtype"),
        (STORED > 0, "a floating dtype"),
        (STORED.to(torch.complex64), "a floating dtype"),
        (STORED.to(torch.uint8), "a floating dtype"),
        (STORED.to(torch.float8_e5m2), "a floating dtype"),
    ],
)
def test_tensors_that_are_not_keys_and_values_are_named(tmp_path, stored, expected):
    with pytest.raises(ValueError, match=rf"ReferenceBank: {LAYER}: expected .*{expected}"):
        load(tmp_path, {LAYER: stored.contiguous(), "foreground": None})


def test_layers_that_do_not_fit_each_other_are_named(tmp_path):
    for other, expected in ((STORED[:, :, :2], "3 rows"), (STORED.half(), "torch.float32")):
        with pytest.raises(ValueError, match=f"ReferenceBank: z: expected .*{expected}"):
            load(tmp_path, {"z": other.contiguous()})
    with pytest.raises(ValueError, match="layers: expected keys and values of at least one layer"):
        load(tmp_path, {LAYER: None})


@pytest.mark.parametrize(
    "mask", [FOREGROUND[:2], FOREGROUND[:, :0], FOREGROUND[0], FOREGROUND.float(), FOREGROUND[:, None], FOREGROUND[:0]]
)
def test_a_foreground_that_does_not_fit_is_named(tmp_path, mask):
    with pytest.raises(ValueError, match="ReferenceBank: foreground: expected "):
        load(tmp_path, {"foreground": mask.contiguous()})


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_file_that_is_cut_off_or_another_is_named(tmp_path, keep):
    load(tmp_path)
    whole = (tmp_path / "bank").read_bytes()
    (tmp_path / "bank").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"ReferenceBank: path: expected a safetensors file, got .*bank"):
        ReferenceBank.load(tmp_path / "bank")
    (tmp_path / "bank").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="ReferenceBank: path: expected a safetensors file"):
        ReferenceBank.load(tmp_path / "bank")
    with pytest.raises(FileNotFoundError):
        ReferenceBank.load(tmp_path / "none")


def test_a_bank_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model: expected 'other', got 'tiny'"):
        load(tmp_path, model="other")
    save_file({LAYER: STORED}, tmp_path / "bank", {"timesteps": json.dumps([900, 500])})
    with pytest.raises(ValueError, match="model: expected 'tiny', got ''"):
        ReferenceBank.load(tmp_path / "bank", model="tiny")


@pytest.mark.parametrize(
    ("field", "about"),
    [("shows", {"shows": "[1]"}), ("shows", {"shows": "[0, 0, 0, 0, 0]"}), ("shows", {"shows": "[0, 0, 2]"}),
     ("timesteps", {"timesteps": "[500, 900]"})],
)  # fmt: skip
def test_fields_that_do_not_fit_the_stored_are_named(tmp_path, field, about):
    with pytest.raises(ValueError, match=f"lr_kernels.ReferenceBank: {field}: expected "):
        load(tmp_path, **about)


def test_a_pipelines_bank_has_half_as_many_masks_as_rows(tmp_path):
    """Its references are in both halves of the guidance."""
    both = {LAYER: torch.cat([STORED, STORED[:, :, :1]], 2), "foreground": FOREGROUND[:2].contiguous()}
    assert load(tmp_path, both, shows="[0, 1]").rows_held == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_named(tmp_path, value):
    broken = STORED.clone()
    broken[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match=f"ReferenceBank: {LAYER}: expected finite keys and values"):
        load(tmp_path, {LAYER: broken})


def test_paths_and_devices_that_are_none_are_named(tmp_path):
    bank = load(tmp_path)
    for path, message in ((tmp_path, "a safetensors file, got .*a folder"), (None, "the path of a file, got None")):
        for use in (bank.save, ReferenceBank.load):
            with pytest.raises(ValueError, match=f"ReferenceBank: path: expected {message}"):
                use(path)
    with pytest.raises(ValueError, match="ReferenceBank: path: expected a file in a folder that exists"):
        bank.save(tmp_path / "none" / "bank")
    with pytest.raises(ValueError, match="ReferenceBank: device: expected a device of this machine, got 'foo'"):
        ReferenceBank.load(tmp_path / "bank", device="foo")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_right_file_in_8_bits_is_read(tmp_path, dtype):
    eight = IN_8_BITS[LAYER].to(dtype)
    bank = load(tmp_path, IN_8_BITS | {LAYER: eight})
    with bank.read(1):
        kept = bank.layer(LAYER).read(STORED[1, 0])
    assert torch.equal(torch.stack([kept.key, kept.value]).view(torch.uint8), eight[1].view(torch.uint8))
    assert torch.equal(torch.stack([kept.key_scale, kept.value_scale]), SCALE[1])
    assert bank.dtype == dtype and bank.layer_names == [LAYER] and bank.rows_held == 3


def changed(x, value, dtype=None):
    """The tensor, contiguous, with one number replaced."""
    x = x.clone() if dtype is None else x.to(dtype)
    x[1, 0, 2, 3] = value
    return x


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (None, r"torch.float32 \(2, 2, 3, 16, 2\) in .*, since keys and values are torch.int8, got none"),
        (SCALE.double(), "torch.float32 .*, got torch.float64"),
        (SCALE.half(), "torch.float32 .*, got torch.float16"),
        (SCALE.long(), "torch.float32 .*, got torch.int64"),
        (SCALE > 0, "torch.float32 .*, got torch.bool"),
        (SCALE[:1], r"torch.float32 \(2, 2, 3, 16, 2\) .*, got torch.float32 \(1, 2"),
        (SCALE[:, :1], r"torch.float32 .*, got torch.float32 \(2, 1"),
        (SCALE[:, :, :2], "torch.float32 .*, got"),
        (SCALE[:, :, :, :1], "torch.float32 .*, got"),
        (SCALE[..., :1], "torch.float32 .*, got"),
        (SCALE[..., None], "torch.float32 .*, got"),
        (SCALE[0, 0, 0, 0, 0], r"torch.float32 .*, got torch.float32 \(\)"),
        (SCALE[:0], "torch.float32 .*, got"),
        (changed(SCALE, float("nan")), "finite scales of 0 or more in .*, got others"),
        (changed(SCALE, float("inf")), "finite scales of 0 or more"),
        (changed(SCALE, -1.0), "finite scales of 0 or more"),
    ],
)
def test_scales_that_do_not_fit_are_named(tmp_path, scale, expected):
    scale = None if scale is None else scale.contiguous()
    with pytest.raises(ValueError, match=f"lr_kernels.ReferenceBank: {LAYER}.scale: expected {expected}"):
        load(tmp_path, IN_8_BITS | {f"{LAYER}.scale": scale})


def test_scales_without_8_bits_and_8_bits_without_scales_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"ReferenceBank: {LAYER}.scale: expected none, .* are torch.float32"):
        load(tmp_path, IN_8_BITS | {LAYER: STORED})
    with pytest.raises(ValueError, match=r"ReferenceBank: z\.scale: expected keys and values z beside it in .*, got n"):
        load(tmp_path, IN_8_BITS | {"z.scale": SCALE.clone()})
    with pytest.raises(ValueError, match=r"ReferenceBank: z\.scale: expected torch\.float32"):
        load(tmp_path, IN_8_BITS | {"z": IN_8_BITS[LAYER].clone()})
    with pytest.raises(ValueError, match=r"ReferenceBank: z: expected torch\.int8 as the other layers"):
        load(tmp_path, IN_8_BITS | {"z": STORED})
    with pytest.raises(ValueError, match="ReferenceBank: layers: expected keys and values of at least one layer"):
        load(tmp_path, IN_8_BITS | {LAYER: None})
    with pytest.raises(ValueError, match=f"ReferenceBank: {LAYER}: expected finite keys and values"):
        load(tmp_path, IN_8_BITS | {LAYER: changed(IN_8_BITS[LAYER], float("nan"), torch.float8_e4m3fn)})
