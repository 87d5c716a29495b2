"""Measures of images, by name; `metric.Metric` says what one is."""

from ...runtime.checks import fail
from .diversity import DreamSim, LayoutIoU, Lpips, Vendi
from .masks import named
from .metric import Column, Metric, PromptImages, Scores
from .similarity import ClipImage, ClipText, DinoImage, DinoV2Image

__all__ = ["METRICS", "Column", "Metric", "PromptImages", "Scores", "metric_class"]

METRICS: dict[str, type[Metric]] = {
    "clip_i": ClipImage,
    "clip_t": ClipText,
    "dino": DinoImage,
    "dinov2": DinoV2Image,
    "dreamsim": DreamSim,
    "lpips": Lpips,
    "vendi": Vendi,
    "layout_iou": LayoutIoU,
}


def metric_class(op: str, where: str, name: str) -> type[Metric]:
    """The class of a metric: one of METRICS, or "package.module:Class"."""
    if ":" not in name:
        if name not in METRICS:
            fail(op, where, f"one of {', '.join(METRICS)}, or package.module:Class", repr(name))
        return METRICS[name]
    try:
        found = named(where, name)
    except ValueError as error:
        raise ValueError(f"lr_kernels.{op}: {error}") from None
    if not isinstance(found, type) or not issubclass(found, Metric):
        fail(op, where, "a subclass of lr_kernels.evaluation.metrics.Metric", repr(name))
    return found
