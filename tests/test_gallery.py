"""The galleries: each preset changes the pictures and leaves no trace in the model, each knob has its row."""

import numpy as np
import pytest
import torch
from PIL import Image

from lr_kernels import toy
from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline as Pipeline
from lr_kernels.diffusers import attention_layers
from lr_kernels.toy import gallery, knobs

STEPS, SEED = 3, 2


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The file, the rows that were drawn into it, the pipeline, and its processors before."""
    pipe, seen = toy.load_pipeline(), {}
    layers = attention_layers(pipe.unet, "self") | attention_layers(pipe.unet, "cross")
    before = {name: layer.processor for name, layer in layers.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "load_pipeline", lambda: pipe)
        original = gallery.picture
        patch.setattr(gallery, "picture", lambda rows: seen.update(rows) or original(rows))
        path = gallery.run(tmp_path_factory.mktemp("gallery"), seed=SEED, steps=STEPS)
    return path, seen, pipe, before


def test_the_picture_has_a_row_for_every_method(drawn):
    path, rows, _, _ = drawn
    assert path.name == "presets.png" and list(rows) == list(gallery.METHODS)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > len(rows) * toy.SIDE and pixels.std() > 0


@pytest.mark.parametrize("name", [name for name in gallery.METHODS if name != "stock"])
def test_every_preset_changes_what_reads_and_leaves_what_is_read(drawn, name):
    rows, method = drawn[1], gallery.METHODS[name]
    change = (rows[name] - rows["stock"]).abs().amax((1, 2, 3))
    reads = slice(1 if method.sources == 1 else 0, None)
    assert rows[name].isfinite().all() and change[reads].min() > 5e-3
    if method.sources == 1:
        assert change[0] < 1e-3, "the source attends to itself"


def test_the_stock_row_is_a_plain_call(drawn):
    _, rows, pipe, _ = drawn
    noise = torch.randn(len(gallery.PLACES), 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    prompts = [f"a ball on {place}" for place in gallery.PLACES]
    common = {"num_inference_steps": STEPS, "guidance_scale": gallery.GUIDANCE, "output_type": "pt"}
    assert torch.equal(rows["stock"], pipe(prompts, latents=noise, **common).images)


def test_the_processors_are_restored(drawn):
    _, _, pipe, before = drawn
    layers = attention_layers(pipe.unet, "self") | attention_layers(pipe.unet, "cross")
    assert all(layers[name].processor is processor for name, processor in before.items())


def test_knobs_are_drawn_with_what_they_measure(tmp_path, monkeypatch):
    turned = [knob for knob in knobs.KNOBS if knob.label in ("defaults", "retouch_start=14", "layout_mask=…")]
    monkeypatch.setattr(knobs, "KNOBS", turned)
    monkeypatch.setattr(knobs, "personalized_pipeline", lambda base, subject: Pipeline.from_pipe(base))
    drawn = []
    original = knobs.sheet
    monkeypatch.setattr(knobs, "sheet", lambda rows: drawn.extend(rows) or original(rows))
    path = knobs.run(tmp_path)
    assert Image.open(path).height > len(drawn) * toy.SIDE
    assert [row.label.split("\n")[0] for row in drawn] == ["layout", *(knob.label for knob in turned)]
    assert not torch.equal(drawn[1].images, drawn[2].images) and drawn[3].masks is not None
