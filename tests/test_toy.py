"""The toy model: its world is reproducible, its folder is a pipeline, and the demo shows what the method claims."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lr_kernels import __main__, toy
from lr_kernels.diffusers import StableDiffusionLayoutRetouchPipeline
from lr_kernels.statistics import paired_difference
from lr_kernels.toy import demo
from lr_kernels.toy.judge import scores
from lr_kernels.toy.stages import STAGES, on_backgrounds, run_stages


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


def test_sharing_attention_alone_brings_the_colours_of_the_reference():
    """A model that has never seen the subject knows it from the reference's keys and values alone.

    The control is the retouch stage with sharing off: where sharing does nothing, their images are the same.
    """
    pipe = StableDiffusionLayoutRetouchPipeline.from_pipe(toy.load_pipeline())
    pipe.set_progress_bar_config(disable=True)
    task = on_backgrounds("ball", per_background=1)
    outputs = run_stages(pipe, task, 1000, ("control",))
    images = {name: torch.as_tensor(out.images).float() * 2 - 1 for name, out in outputs.items()}
    colours = {name: scores(x, task.backgrounds, None, "ball")["histogram"] for name, x in images.items()}
    mean, low, _ = paired_difference(colours["retouch"], colours["control"])
    assert mean > 0.1 and low > 0


def test_the_demo_reports_every_stage_and_the_control(demonstration):
    assert tuple(demonstration["stages"]) == STAGES
    assert set(demonstration["identity_differences"]) == {"retouch - control", "retouch - layout"}
    assert demonstration["identity_differences"]["retouch - layout"][1] > 0


def test_retouch_recovers_the_subject_that_the_layout_lost(report):
    assert report["retouch"]["identity"] > report["layout"]["identity"]
    assert report["retouch"]["histogram"] > report["layout"]["histogram"]


def test_retouch_keeps_the_diversity_that_personalization_lost(report):
    assert report["retouch"]["position_std"] >= 1.8 * report["personalized"]["position_std"]
    assert report["retouch"]["background"] >= 0.8
    assert report["retouch"]["diversity"] > report["personalized"]["diversity"]


def test_layout_is_more_diverse_than_reference_only_attention(report):
    assert report["layout"]["position_std"] > report["reference-only"]["position_std"]


def test_the_command_line_knows_the_subjects():
    assert tuple(toy.world.SUBJECTS) == __main__.SUBJECTS
