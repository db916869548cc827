"""Train a student that can express one bump on a teacher with two, and draw what each objective makes of it.

    python examples/mode_averaging.py [--picture runs/mode_averaging.png]

The vocabulary is 201 token ids in a row. The teacher has two modes: Gaussians around ids 60 and 140 with a standard
deviation of 8 ids, weighted 0.6 and 0.4. The student has two parameters, the centre and the width of one
Gaussian. It is trained by plain gradient descent, by the functions of ``taid.objectives``, with t by ``TAIDSchedule``.

Two facts about the gradient say what to expect:

- At t = 1 the loss of TAID *is* forward KL. Forward KL has one minimum here, the Gaussian with the teacher's mean and
  variance, so a run with steps enough near t = 1 ends there, between the modes, whatever it did before.
- For small t the gradient is t times that of reverse KL: ``q - p_t = t dKL(q || p)/dz_q + O(t^2)``. Reverse KL has
  several minima: one on each mode, and a broad one over both. Which is found depends on the start.

So, as t rises, TAID goes from the one to the other. Where each run ends is printed for a narrow start near the first
mode, which the picture shows, and for a broad one. Takes some 10 seconds on a CPU.

Reference: Shing et al., "TAID", ICLR 2025, arXiv 2501.16937, for the two failures, mode averaging and mode collapse.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from taid import TAIDSchedule, objectives
from taid.artifacts.plots import BLUE, BOLD, GREEN, GRID, MUTED, SMALL, VERMILLION, png_of
from taid.losses.schedules import auto_alpha

IDS = 201
CENTRES, WIDTH, WEIGHTS = (60, 140), 8, (0.6, 0.4)
STEPS, LEARNING_RATE = 5_000, 0.02
# Centre and width of the student before training, in ids.
NARROW, BROAD = (80.0, 10.0), (100.0, 40.0)
# Gradient steps are taken in this many ids, in which every slope is of the order of 1.
UNIT = 20.0
# The t_end of one of the two runs of TAID.
STOP = 0.7

Loss = Callable[[Tensor, Tensor, float], Tensor]
FORWARD: Loss = lambda student, teacher, t: objectives.forward_kl(student, teacher)  # noqa: E731
REVERSE: Loss = lambda student, teacher, t: objectives.reverse_kl(student, teacher)  # noqa: E731
TAID: Loss = lambda student, teacher, t: objectives.taid(student, teacher, t=t)  # noqa: E731


class Step(NamedTuple):
    """The student before a step of a run, and the t of that step; of the last one, after the run."""

    t: float
    logits: Tensor
    """``[IDS]``."""


class Measures(NamedTuple):
    """The masses of a distribution, and its distance from the teacher's."""

    between: float
    """Mass between the modes, more than two of the teacher's standard deviations from each."""
    first: float
    """Mass within two standard deviations of the first mode."""
    second: float
    forward_kl: float
    """KL(p || q), nats."""
    reverse_kl: float


def teacher_logits() -> Tensor:
    """The teacher, ``[IDS]``: the logarithm of a sum of two Gaussians."""
    ids = torch.arange(IDS, dtype=torch.float32)
    modes = [
        math.log(weight) - ((ids - centre) / WIDTH) ** 2 / 2 for weight, centre in zip(WEIGHTS, CENTRES, strict=True)
    ]
    return torch.logsumexp(torch.stack(modes), dim=0)


def student_logits(parameters: Tensor) -> Tensor:
    """The student, ``[IDS]``: a quadratic in the id; `parameters` are centre and log width, in units of UNIT ids."""
    place = torch.arange(IDS, dtype=torch.float32) / UNIT
    return -(((place - parameters[0]) / parameters[1].exp()) ** 2) / 2


def distil(loss: Loss, schedule: TAIDSchedule, start: tuple[float, float] = NARROW) -> list[Step]:
    """Train by gradient descent; returns the student before each of the schedule's steps, and after the last."""
    centre, width = start
    parameters = torch.tensor([centre / UNIT, math.log(width / UNIT)], requires_grad=True)
    teacher, state, path = teacher_logits(), schedule.initial_state(), []
    for _ in range(schedule.total_steps):
        logits = student_logits(parameters)
        path.append(Step(state.t, logits.detach()))
        value = loss(logits, teacher, state.t)
        (gradient,) = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            parameters -= LEARNING_RATE * gradient
        state = schedule.advance(state, value.item())
    return [*path, Step(state.t, student_logits(parameters).detach())]


def measure(logits: Tensor) -> Measures:
    """Measure a distribution over the ids, ``[IDS]``, for the table."""
    first, second = (slice(centre - 2 * WIDTH, centre + 2 * WIDTH + 1) for centre in CENTRES)
    probs, teacher = logits.softmax(-1), teacher_logits()
    return Measures(
        between=probs[first.stop : second.start].sum().item(),
        first=probs[first].sum().item(),
        second=probs[second].sum().item(),
        forward_kl=objectives.forward_kl(logits, teacher).item(),
        reverse_kl=objectives.reverse_kl(logits, teacher).item(),
    )


def schedule(t_end: float = 1.0) -> TAIDSchedule:
    """The default schedule, with the paper's shape on a run as short as this."""
    return TAIDSchedule(total_steps=STEPS, t_end=t_end, alpha=auto_alpha(STEPS))


def all_runs(start: tuple[float, float]) -> dict[str, list[Step]]:
    """The path of each run from a `start`."""
    return {
        "forward KL": distil(FORWARD, schedule(), start),
        "reverse KL": distil(REVERSE, schedule(), start),
        f"TAID, t to {STOP:g}": distil(TAID, schedule(STOP), start),
        "TAID, t to 1": distil(TAID, schedule(), start),
    }


def last_on_one_mode(path: list[Step]) -> float:
    """The last t at which nine tenths of the student's mass are on the first mode; 0 if it never was there."""
    return max((step.t for step in path[::10] if measure(step.logits).first > 0.9), default=0.0)


def table(runs: dict[str, list[Step]]) -> str:
    """Masses and divergences of the teacher, the student before, and the end of each run."""
    rows = {"teacher": teacher_logits(), "student before": runs["forward KL"][0].logits}
    rows |= {name: path[-1].logits for name, path in runs.items()}
    lines = [f"{'':16}{'between':>9}{'mode 1':>9}{'mode 2':>9}{'KL(p||q)':>10}{'KL(q||p)':>10}"]
    for name, logits in rows.items():
        m = measure(logits)
        lines.append(f"{name:16}{m.between:9.3f}{m.first:9.3f}{m.second:9.3f}{m.forward_kl:10.3f}{m.reverse_kl:10.3f}")
    return "\n".join(lines)


def picture(narrow: dict[str, list[Step]], broad: dict[str, list[Step]]) -> Figure:
    """Draw the ends of runs from the narrow start; below, the mass between the modes along t from both starts."""
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.05))
    first = figure.add_subplot(grid[0, 0])
    tops: list[Any] = [first, *(figure.add_subplot(grid[0, i], sharey=first) for i in (1, 2))]
    stopped = f"TAID, t to {STOP:g}"
    drawn = (
        ("forward KL: in between", BLUE, {"forward KL": "-"}),
        ("reverse KL: one mode", VERMILLION, {"reverse KL": "-"}),
        ("TAID: one, then in between", GREEN, {stopped: (0, (4, 2)), "TAID, t to 1": "-"}),
    )
    teacher = teacher_logits().softmax(-1).tolist()
    for axes, (title, colour, lines) in zip(tops, drawn, strict=True):
        axes.fill_between(range(IDS), teacher, color="#d0d0ca", linewidth=0)
        axes.plot(narrow["forward KL"][0].logits.softmax(-1), color=MUTED, linewidth=1, linestyle=":")
        for name, style in lines.items():
            axes.plot(narrow[name][-1].logits.softmax(-1), color=colour, linewidth=2, linestyle=style)
        axes.set_title(title, color=colour, **BOLD)
        axes.set(xlim=(0, IDS - 1), ylim=(0, 0.054))
        axes.tick_params(labelleft=False)
        _plain(axes)
    tops[0].set_ylabel("probability", **SMALL)
    tops[1].set_xlabel("token id", **SMALL)
    tops[0].text(142, 0.0215, "teacher", ha="center", **SMALL)
    tops[0].text(93, 0.036, "student before", **SMALL)
    tops[2].text(70, 0.044, f"t stops at {STOP:g}", color=GREEN, fontsize=9.5)
    tops[2].text(112, 0.0115, "t goes to 1", color=GREEN, fontsize=9.5)
    _draw_path(figure.add_subplot(grid[1, :]), narrow, broad)
    return figure


def _draw_path(axes: Any, narrow: dict[str, list[Step]], broad: dict[str, list[Step]]) -> None:
    """The mass between the modes over TAID's t."""
    for runs, style in ((narrow, "-"), (broad, (0, (1, 1)))):
        path = runs["TAID, t to 1"][::10]
        axes.plot([step.t for step in path], [measure(step.logits).between for step in path], color=GREEN,
                  linewidth=2, linestyle=style)  # fmt: skip
    forward, reverse = (measure(narrow[name][-1].logits).between for name in ("forward KL", "reverse KL"))
    for value, colour in ((forward, BLUE), (reverse, VERMILLION)):
        axes.axhline(value, color=colour, linewidth=1.2, zorder=1)
    axes.text(0.46, forward - 0.055, "forward KL", color=BLUE, **BOLD)
    axes.text(0.46, reverse + 0.035, "reverse KL, and the teacher", color=VERMILLION, **BOLD)
    axes.text(0.665, reverse + 0.035, "TAID, from the start above", color=GREEN, **BOLD)
    axes.text(0.665, forward + 0.035, "TAID, from a broad start", color=GREEN, **BOLD)
    axes.set(xlim=(0.4, 1), ylim=(0, 0.66))
    axes.set_xlabel("t", **SMALL)
    axes.set_ylabel("mass between the modes", **SMALL)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0)
    axes.set_axisbelow(True)


def main() -> None:
    """Train from both starts, print a table of each, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("runs/mode_averaging.png"))
    file = parser.parse_args().picture
    file.parent.mkdir(parents=True, exist_ok=True)
    narrow, broad = all_runs(NARROW), all_runs(BROAD)
    for words, (centre, width), runs in (("narrow", NARROW, narrow), ("broad", BROAD, broad)):
        print(f"a {words} start: centre {centre:g}, standard deviation {width:g} ids\n\n{table(runs)}\n")
    print(f"from the narrow start TAID is on the first mode up to t = {last_on_one_mode(narrow['TAID, t to 1']):.2f}")
    # In 64 colours it takes a third of the space.
    Image.open(io.BytesIO(png_of(picture(narrow, broad)))).convert("RGB").quantize(64).save(file, "PNG", optimize=True)
    print(f"picture: {file}")


if __name__ == "__main__":
    main()
