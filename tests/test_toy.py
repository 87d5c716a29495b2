"""The toy model: its world is reproducible, its folder is a pipeline, and the demo shows what the method claims."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lr_kernels import demo, toy
from lr_kernels.toy.stages import STAGES


def test_references_are_reproducible():
    images, masks = toy.references()
    again, _ = toy.references()
    assert (
        torch.equal(images, again) and images.shape == (5, 3, toy.SIDE, toy.SIDE) and masks.shape == images[:, 0].shape
    )


def test_the_shipped_folder_is_a_stable_diffusion_pipeline_without_pickles():
    pipeline = toy.load_pipeline()
    assert pipeline.unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1) == toy.SIDE
    names = {path.suffix for path in toy.BASE.rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in toy.BASE.rglob("*") if path.is_file()) <= 12 * 2**20


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    found = demo.run(folder, seeds=3)
    assert json.loads((folder / "metrics.json").read_text()) == found
    for name in ("comparison", "masks"):
        assert np.asarray(Image.open(folder / f"{name}.png")).std() > 0
    return found


@pytest.fixture
def report(demonstration):
    return demonstration["stages"]


def test_sharing_attention_is_what_recovers_the_subject(demonstration):
    """The control is the retouch stage with sharing off: where sharing does nothing, their images are the same."""
    assert tuple(demonstration["stages"]) == STAGES
    mean, low, _ = demonstration["identity_differences"]["retouch - control"]
    assert mean > 0.05 and low > 0
    assert demonstration["identity_differences"]["retouch - layout"][1] > 0


def test_retouch_recovers_the_subject_that_the_layout_lost(report):
    assert report["retouch"]["identity"] > report["layout"]["identity"]
    assert report["retouch"]["histogram"] > report["layout"]["histogram"]


def test_retouch_keeps_the_diversity_that_personalization_lost(report):
    assert report["retouch"]["position_std"] >= 1.8 * report["personalized"]["position_std"]
    assert report["retouch"]["background"] >= report["personalized"]["background"]
    assert report["retouch"]["diversity"] > report["personalized"]["diversity"]


def test_layout_is_more_diverse_than_reference_only_attention(report):
    assert report["layout"]["position_std"] > report["reference-only"]["position_std"]
