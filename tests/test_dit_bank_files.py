"""Files of transformers' banks that are damaged, foreign or hostile: each wrong field is a ValueError that names it."""

import json
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors
import torch
from model_changes import randn
from safetensors.torch import save_file

from lr_kernels import Source, quantize
from lr_kernels.diffusers import TransformerReferenceBank
from lr_kernels.diffusers.dit.cached.bank_files import FORMAT
from lr_kernels.diffusers.processors import bank_files as files

A, B = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"
ROWS, TOKENS, HEADS, CHANNELS = 1, 6, 2, 8
X = randn(ROWS, TOKENS, HEADS, CHANNELS)
Q, SCALE = quantize(X)
IDS = torch.zeros(TOKENS, 4)
ABOUT = {"format": FORMAT, "model": "Flux2Transformer2DModel 0123456789abcdef", "rotated": "true"}
PLAIN = {f"{layer}.{field}": X for layer in (A, B) for field in ("key", "value")} | {"ids": IDS}
SMALL = {f"{layer}.{field}": Q for layer in (A, B) for field in ("key", "value")} | {"ids": IDS} | {
    f"{layer}.{field}_scale": SCALE for layer in (A, B) for field in ("key", "value")
}  # fmt: skip


def load(folder, tensors, about=ABOUT):
    """A bank's file; None leaves a field out."""
    found = {name: x.clone().contiguous() for name, x in tensors.items() if x is not None}
    save_file(found, folder / "bank", {name: x for name, x in about.items() if x is not None})
    return TransformerReferenceBank.load(folder / "bank")


def bank_of(tensors):
    sources = {layer: Source(tensors[f"{layer}.key"].clone(), tensors[f"{layer}.value"].clone()) for layer in (A, B)}
    return TransformerReferenceBank(sources, model=ABOUT["model"], ids=IDS)


@pytest.mark.parametrize("tensors", [PLAIN, SMALL], ids=["plain", "eight bits"])
def test_a_right_file_is_read(tmp_path, tensors):
    bank = load(tmp_path, tensors)
    assert set(bank.sources) == {A, B} and bank.tokens == TOKENS and bank.rotated


def nan(x, value=float("nan")):
    return torch.cat([x.flatten()[:-1], torch.tensor([value], dtype=x.dtype)]).view(x.shape)


METADATA = [
    *(("format", x) for x in (None, "", f"{FORMAT[:-1]}2", "TransformerReferenceBank", "\x1b[31m", "x" * 9999)),
    *(("model", x) for x in (None, "", "x" * 201, "a\nb", "\x00", "\x1b]0;title\x07")),
    *(("rotated", x) for x in (None, "", "True", "1", "null", "[true]", '"true"', "tru", "[" * 50_000)),
    *((x, "1") for x in ("steps", "__class__", "pickle", "\x1b[2J", "y" * 5000)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), METADATA, ids=lambda x: repr(x)[:20])
def test_metadata_that_is_not_a_banks_is_named(tmp_path, name, text):
    with pytest.raises(ValueError, match=r"lr_kernels.TransformerReferenceBank.load: .*: expected ") as error:
        load(tmp_path, PLAIN, ABOUT | {name: text})
    message = str(error.value)
    assert (name if name in ABOUT else repr(name)[:40]) in message
    assert message.isprintable() and len(message) < 500


def test_a_file_without_metadata_is_named(tmp_path):
    save_file({name: x.clone() for name, x in PLAIN.items()}, tmp_path / "bank")
    with pytest.raises(ValueError, match=r"format: expected .*, got none; load a file that save"):
        TransformerReferenceBank.load(tmp_path / "bank")


KEY = f"{B}.key"
TENSORS = [
    # another shape than the other layers
    *((KEY, x) for x in (X[:, :5], X[:, :, :1], X[..., :7], X[0], X[None])),
    *((KEY, x) for x in (torch.cat([X, X]), X[:0], X[:, :0], X[..., :0])),
    (KEY, torch.tensor(1.0)),
    # another dtype
    *((KEY, X.to(x)) for x in (torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.bool)),
    (KEY, X.to(torch.float8_e5m2)),
    (KEY, Q.view(torch.float8_e4m3fn)),
    # numbers that are not finite
    *((KEY, nan(X, x)) for x in (float("nan"), float("inf"), float("-inf"))),
    (f"{A}.value", nan(X)),
    # missing ones, and scales that belong to none
    *((f"{layer}.{field}", None) for layer in (A, B) for field in ("key", "value")),
    (f"{A}.key_scale", SCALE),
    (f"{B}.value_scale", SCALE),
    # names
    *((x, X) for x in ("key", ".key", "a b.key", "../../etc.key", f"{A}.query", f"{A}.key_mask", f"{A}.rows")),
    *((x, X) for x in ("x" * 300 + ".key", "\x1b[31m.key", "1.key", "")),
    # positions
    *(("ids", x) for x in (None, IDS[:5], IDS[0], IDS[None], IDS.double(), IDS.long(), IDS[:, :0], IDS[:0])),
    *(("ids", nan(IDS, x)) for x in (float("nan"), float("inf"))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "x"), TENSORS, ids=lambda x: x[:24] if isinstance(x, str) else "")
def test_tensors_that_are_not_a_banks_are_named(tmp_path, name, x):
    with pytest.raises(
        ValueError, match=r"lr_kernels.TransformerReferenceBank.load: .*: expected .* in .*bank"
    ) as error:
        load(tmp_path, PLAIN | {name: x})
    message = str(error.value)
    layer = name.rpartition(".")[0]
    assert layer in message or repr(name)[:40] in message
    assert message.isprintable() and len(message) < 700


_NAN8 = torch.full_like(Q, 0x7F).view(torch.float8_e4m3fn)
EIGHT_BITS = [
    *((f"{A}.key_scale", x) for x in (None, SCALE.double(), SCALE.half(), SCALE[..., :1], SCALE[:, :5])),
    *((f"{A}.key_scale", x) for x in (SCALE[0], SCALE[..., None])),
    *((f"{A}.value_scale", x) for x in (None, nan(SCALE), nan(SCALE, float("inf")), SCALE.int(), -SCALE)),
    *((f"{B}.key", x) for x in (Q.view(torch.uint8), Q.view(torch.float8_e4m3fn), Q.float(), Q[..., :4])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "x"), EIGHT_BITS, ids=lambda x: x[:24] if isinstance(x, str) else "")
def test_eight_bits_that_do_not_fit_their_scales_are_named(tmp_path, name, x):
    with pytest.raises(ValueError, match=rf"TransformerReferenceBank.load: {name.rpartition('.')[0]}.*: expected "):
        load(tmp_path, SMALL | {name: x})


def test_a_nan_in_float8_is_named(tmp_path):
    found = {n: x.view(torch.float8_e4m3fn) if x.dtype == torch.int8 else x for n, x in SMALL.items()}
    load(tmp_path, {n: torch.zeros_like(x) for n, x in found.items()})
    with pytest.raises(ValueError, match=f"{A}.value: expected finite keys and values"):
        load(tmp_path, {n: torch.zeros_like(x) for n, x in found.items()} | {f"{A}.value": _NAN8})


def test_a_file_of_no_layers_is_named(tmp_path):
    with pytest.raises(ValueError, match="layers: expected keys and values of at least one layer"):
        load(tmp_path, {"ids": IDS})


def headers(folder):
    """Files that are no safetensors: cut off, other bytes, headers that lie."""
    load(folder, PLAIN)
    whole = (folder / "bank").read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])

    def with_header(change):
        text = json.dumps(header | change).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]

    yield from (whole[:keep] for keep in (0, 7, 8, 100, size, len(whole) - 1))
    yield from (b"\xff" * 64, whole + b"more", struct.pack("<Q", 2**62) + whole[8:], b"\x80\x04" + whole)
    yield with_header({KEY: header[KEY] | {"data_offsets": [0, 2**40]}})
    yield with_header({KEY: header[KEY] | {"data_offsets": [-1, 4]}})
    yield with_header({KEY: header[KEY] | {"shape": [2**40, 2**40]}})
    yield with_header({KEY: header[KEY] | {"shape": [1, TOKENS, HEADS, -CHANNELS]}})
    yield with_header({KEY: header[KEY] | {"dtype": "F99"}})
    yield with_header({KEY: {"dtype": "F32"}})
    yield with_header({"__metadata__": ABOUT | {"rotated": True}})
    yield struct.pack("<Q", 200_000) + b"[" * 200_000


def test_files_that_are_no_safetensors_are_named(tmp_path):
    count = 0
    for content in headers(tmp_path):
        (tmp_path / "bank").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"TransformerReferenceBank.load: path: expected a safetensors file, got .*bank"
        ):
            TransformerReferenceBank.load(tmp_path / "bank")
        count += 1
    assert count == 18


@pytest.mark.parametrize("path", [None, 3, b"bank"])
def test_paths_that_are_none_are_named(tmp_path, path):
    bank = load(tmp_path, PLAIN)
    for use in (bank.save, TransformerReferenceBank.load):
        with pytest.raises(ValueError, match="path: expected the path of a file, got"):
            use(path)


def test_folders_and_devices_that_are_none_are_named(tmp_path):
    bank = load(tmp_path, PLAIN)
    with pytest.raises(ValueError, match=r"load: path: expected a safetensors file, got .*: a folder"):
        TransformerReferenceBank.load(tmp_path)
    for path in (tmp_path, tmp_path / "none" / "bank"):
        with pytest.raises(ValueError, match="save: path: expected a file in a folder that exists"):
            bank.save(path)
    with pytest.raises(ValueError, match="load: device: expected a device of this machine, got 'foo'"):
        TransformerReferenceBank.load(tmp_path / "bank", device="foo")
    with pytest.raises(FileNotFoundError):
        TransformerReferenceBank.load(tmp_path / "none")


def test_the_kinds_of_hostile_files_are_many():
    assert len(METADATA) + len(TENSORS) + len(EIGHT_BITS) + 18 + 3 >= 60


def test_a_file_that_is_replaced_while_it_is_opened_is_read_again(tmp_path, monkeypatch):
    """safetensors opens a file twice, so a load could mix two banks."""
    path, opened = tmp_path / "bank.safetensors", []
    first, second = (bank_of({n: x + i if x.is_floating_point() else x for n, x in PLAIN.items()}) for i in (0, 1))
    first.save(path)

    def replaced_once(*arguments):
        if not opened:
            second.save(path)
        opened.append(arguments)
        return safetensors.safe_open(*arguments)

    monkeypatch.setattr(files, "safe_open", replaced_once)
    found = TransformerReferenceBank.load(path)
    assert len(opened) == 2 and all(torch.equal(found.sources[n].key, x.key) for n, x in second.sources.items())


def test_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    banks = [bank_of(PLAIN) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda x: [x.save(tmp_path / "bank.safetensors") for _ in range(20)], banks))
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]
    TransformerReferenceBank.load(tmp_path / "bank.safetensors")


@pytest.mark.parametrize(
    ("sources", "changes", "message"),
    [
        ([Source(X, X)], {}, "sources: expected a mapping from layers to their Source, got list"),
        ({}, {}, "layers: expected keys and values of at least one layer, got none"),
        ({A: 3}, {}, f"{A}: expected a Source, got int"),
        ({A: Source(None, None)}, {}, f"{A}.key: expected a tensor, got NoneType"),
        ({"a b": Source(X, X)}, {}, "layers: expected names of modules, up to 200 characters, got 'a b'"),
        ({A: Source(X, X)}, {"model": 3}, r"model: expected what model_of\(\) says of the transformer, got 3"),
        ({A: Source(X, X)}, {"model": "x" * 201}, "model: expected what model_of"),
        ({A: Source(X, X)}, {"rotated": "no"}, "rotated: expected one of True, False, got 'no'"),
        ({A: Source(X, X)}, {"ids": None}, r"ids: expected fp32 \(tokens, axes\), got NoneType"),
    ],
)
def test_what_no_file_could_hold_is_no_bank(sources, changes, message):
    with pytest.raises(ValueError, match=f"lr_kernels.TransformerReferenceBank: {message}"):
        TransformerReferenceBank(sources, **{"model": ABOUT["model"], "ids": IDS, **changes})


def test_a_path_that_is_no_file_of_a_folder_is_named():
    with pytest.raises(ValueError, match="path: expected a safetensors file, got /dev/null: a device or pipe"):
        TransformerReferenceBank.load("/dev/null")
