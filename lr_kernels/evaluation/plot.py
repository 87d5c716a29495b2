"""The plot of an evaluation: likeness against diversity."""

import io
from collections.abc import Mapping
from typing import Any

from ..runtime.extras import require


def axes_of(summary: Mapping[str, Any], identity: str | None, diversity: str | None) -> tuple[str, str] | None:
    """The columns on the vertical and the horizontal axis: those asked for, or the first ones of likeness and of
    diversity; None where there are none."""
    columns = summary["columns"]

    def first(about: str) -> str | None:
        return next((name for name, column in columns.items() if column["about"] == about), None)

    vertical, horizontal = identity or first("likeness"), diversity or first("diversity")
    return None if vertical is None or horizontal is None else (vertical, horizontal)


def draw(summary: Mapping[str, Any], axes: tuple[str, str]) -> bytes:
    """A PNG with a point and its intervals for each method."""
    require("evaluation", "matplotlib")
    from matplotlib.figure import Figure

    vertical, horizontal = axes
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    plot = figure.subplots()
    shown = {method: x for method, x in summary["methods"].items() if vertical in x and horizontal in x}
    for method, found in shown.items():
        x, y = found[horizontal], found[vertical]
        spans = [[[max(z["mean"] - z["low"], 0)], [max(z["high"] - z["mean"], 0)]] for z in (x, y)]
        plot.errorbar(x["mean"], y["mean"], xerr=spans[0], yerr=spans[1], fmt="o", capsize=3, label=_plain(method))
    for name, label in ((horizontal, plot.set_xlabel), (vertical, plot.set_ylabel)):
        better = summary["columns"][name]["better"]
        label(_plain(f"{name}, {better} is better" if better else name))
    plot.grid(alpha=0.3)
    if shown:
        figure.legend(loc="outside right upper")
    plot.set_title(f"means with {round(100 * summary['level'])} % intervals")
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=120)
    return encoded.getvalue()


def _plain(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
