"""Draw two pictures of the README and docs/method.md: the moving target, and t over runs of three lengths.

python scripts/draw_pictures.py docs/pictures
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from taid import TAIDSchedule, objectives
from taid.artifacts.plots import BLUE, BOLD, GREEN, GRID, INK, MUTED, SMALL, VERMILLION

TOKENS = 15


def target() -> Figure:
    """A student with one broad mode, a teacher with two narrow ones, and the target between them at four t."""
    place = torch.arange(TOKENS, dtype=torch.float32)
    student = -((place - 7.0) ** 2) / 18
    teacher = torch.logsumexp(torch.stack([-((place - 4) ** 2) / 1.6, -((place - 10) ** 2) / 1.6 - 0.5]), dim=0)
    figure = Figure(figsize=(7.2, 3.0), dpi=150, layout="constrained")
    all_axes: Any = figure.subplots(1, 4, sharey=True)
    titles = {0.0: "t = 0: the student", 0.4: "t = 0.4", 0.7: "t = 0.7", 1.0: "t = 1: the teacher"}
    for axes, (t, title) in zip(all_axes, titles.items(), strict=True):
        probs = objectives.interpolated_log_probs(student, teacher, t=t).exp()
        axes.bar(range(TOKENS), probs.tolist(), color=GREEN, alpha=0.55, width=1.0, label="target at this t")
        for logits, colour, name in ((student, VERMILLION, "student"), (teacher, BLUE, "teacher")):
            axes.step(range(TOKENS), logits.softmax(-1).tolist(), where="mid", color=colour, linewidth=1.6, label=name)
        axes.set_title(title, color=INK, **BOLD)
        _plain(axes)
        axes.set_xticks([])
    all_axes[0].set_ylabel("probability", **SMALL)
    figure.supxlabel("the next token, one of 15", **SMALL)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9.5, labelcolor=INK)
    return figure


def schedule() -> Figure:
    """t at a constant loss, by the paper's alpha in runs of three lengths, and by `taid_alpha: auto` in any."""
    figure = Figure(figsize=(7.2, 3.0), dpi=150, layout="constrained")
    axes: Any = figure.subplots()
    _plain(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for steps, colour, style in ((15_000, BLUE, "-"), (5_000, GREEN, "-"), (1_000, VERMILLION, (0, (4, 3)))):
        run = TAIDSchedule(total_steps=steps)
        state, values = run.initial_state(), []
        for _ in range(steps):
            values.append(state.t)
            state = run.advance(state, 1.0)
        shares = [n / steps for n in range(steps)]
        axes.plot(shares, values, color=colour, linewidth=2, linestyle=style)
        half = values[steps // 2]
        words = {15_000: "15,000 steps, and any with auto", 5_000: "5,000", 1_000: "1,000: the ramp"}[steps]
        above = 0.03 if steps > 1_000 else -0.06
        axes.annotate(words, (0.5, half + above), color=colour, ha="right" if above > 0 else "left", **BOLD)
    axes.set(xlim=(0, 1), ylim=(0.35, 1.02))
    axes.set_xlabel("share of the run", **SMALL)
    axes.set_ylabel("t", **SMALL)
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0)


PICTURES = {"target.png": target, "schedule.png": schedule}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, draw in PICTURES.items():
        draw().savefig(folder / name, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
