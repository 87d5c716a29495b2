"""A toy world with a self-trained StableDiffusionPipeline: the whole method runs and is measured without downloads."""

from pathlib import Path

import torch

from ..runtime.extras import require

require("diffusers")

from diffusers import StableDiffusionPipeline

from .world import BACKGROUNDS, CLASS_PROMPT, SIDE, SUBJECT_PROMPT, SUBJECT_TOKEN, references

__all__ = [
    "BACKGROUNDS",
    "BASE",
    "CLASS_PROMPT",
    "SIDE",
    "SUBJECT_PROMPT",
    "SUBJECT_TOKEN",
    "load_pipeline",
    "references",
]

BASE = Path(__file__).parent / "base"


def load_pipeline(folder: Path = BASE, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The shipped StableDiffusionPipeline, 64 px images from 16x16 latents, stored as fp16 and loaded as `dtype`."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
