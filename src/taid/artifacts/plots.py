"""Pictures of curves over training steps, by matplotlib's object interface: no global state, no display.

matplotlib is loaded with the first picture, so that `taid plan`, which draws none, does not wait for it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = list[tuple[int, float]]

# Okabe and Ito's blue, vermillion and green, the last two darkened until they can be read as text on white.
BLUE, VERMILLION, GREEN, INK, MUTED, GRID = "#0072b2", "#b84a00", "#00795a", "#2b2b2a", "#66665f", "#ebebe6"
SMALL = {"color": MUTED, "fontsize": 9.5}
BOLD: dict[str, Any] = {"fontsize": 9.5, "fontweight": "bold"}


@dataclass(frozen=True)
class Plot:
    """A picture and the words around it; `file` is its name where it is also written beside the page."""

    title: str
    alt: str
    caption: str
    png: bytes
    file: str | None = None

    @property
    def base64(self) -> str:
        """The picture as a page embeds it."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Line:
    """One quantity over the steps, named at its end."""

    series: Series
    colour: str
    label: str
    dashed: bool = False


def panels(units: list[str], last_step: int, height: float = 3.2) -> tuple[Figure, list[Any]]:
    """Panels one above the other over one axis of steps, each of `height` inches."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    # 1,120 pixels: sharp on a dense screen, and text of 9.5 points is still legible on a phone.
    figure = Figure(figsize=(5.6, height * len(units) + 0.2), dpi=200, layout="constrained")
    axes_list = list(figure.subplots(len(units), sharex=True, squeeze=False)[:, 0])
    for axes, unit in zip(axes_list, units, strict=True):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelsize=9.5, length=0)
        axes.set_ylabel(unit, **SMALL)
        axes.set_xlim(0, max(1, last_step))
        axes.margins(y=0.08)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes_list[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes_list[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes_list[-1].set_xlabel("step", **SMALL)
    return figure, axes_list


def draw(axes: Any, lines: Sequence[Line], *, smooth: bool = True, from_zero: bool = False) -> int:
    """Draw lines, each named at its end; returns over how many points they are averaged (1: not at all)."""
    window = max(1, max(len(line.series) for line in lines) // 60) if smooth else 1
    for rank, line in enumerate(lines):
        steps, values = zip(*line.series, strict=True)
        # Where two lines coincide (loss and KL under forward_kl), the wider one below still shows.
        width, style = (1.2, (0, (4, 3))) if line.dashed else (2.6 - 0.6 * rank, "-")
        marker = "o" if len(values) < 25 and not line.dashed else None
        if window > 1:
            axes.plot(steps, values, color=line.colour, alpha=0.25, linewidth=0.7)
        axes.plot(
            steps, _running_mean(values, window), color=line.colour, linewidth=width, linestyle=style,
            marker=marker, markersize=2.2 * width, clip_on=False,
        )  # fmt: skip
    if from_zero and all(value >= 0 for line in lines for _, value in line.series):
        axes.set_ylim(bottom=0)
    _name_ends(axes, lines)
    return window


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values at each point, of fewer at the first ones."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def _name_ends(axes: Any, lines: Sequence[Line]) -> None:
    """Write each line's label beside its end, as high as the end or just above the label below it."""
    bottom, top = axes.get_ylim()
    panel_inches = axes.figure.get_figheight() / len(axes.figure.axes)
    lowest = -math.inf
    for line in sorted((line for line in lines if line.label), key=lambda line: line.series[-1][1]):
        step, value = line.series[-1]
        height = max((value - bottom) / (top - bottom), lowest)
        lowest = height + 0.2 / panel_inches
        axes.annotate(
            line.label, (step, height), xycoords=("data", "axes fraction"), xytext=(7, 0), textcoords="offset points",
            color=line.colour, verticalalignment="center", **BOLD,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def png_of(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
