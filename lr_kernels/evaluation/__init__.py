"""Evaluations that anyone can rerun: methods draw concepts by a file, metrics score the images, a report compares."""

from ..runtime.extras import require

require("diffusers")
require("evaluation", "pydantic", "jinja2", "matplotlib")

from .command import evaluate
from .metrics import METRICS, Column, Metric, PromptImages
from .reading import read_evaluation
from .run_file import Evaluation

__all__ = [
    "METRICS",
    "Column",
    "Evaluation",
    "Metric",
    "PromptImages",
    "evaluate",
    "read_evaluation",
]
