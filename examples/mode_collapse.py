"""Distil a kernel regression into itself, round after round, plainly and by TAID, and draw which of them collapses.

    python examples/mode_collapse.py [--picture runs/mode_collapse.png]

This is the model in which the TAID paper shows that TAID does not collapse; the analysis is Mobahi et al.'s. A round
fits, of all functions of a kernel's space, the one of least norm whose training error on the labels y is at most eps:

    minimise ||f||^2   subject to   sum_n (f(x_n) - y_n)^2 <= N eps

With the kernel matrix G = V^T D V, D = diag(d_1 .. d_N), and z = V y, its predictions are, in the eigenbasis,

    A z,   A = D (lambda I + D)^-1,   lambda > 0 such that   sum_k (lambda / (lambda + d_k))^2 z_k^2 = N eps

The left side rises with lambda from 0 to ||z||^2, so there is one such lambda if ||y||^2 > N eps. If not, the zero
function is good enough, and the least: the student has *collapsed*, and A = 0. With r = ||z|| / sqrt(N eps), 1/r is a
mean of the factors lambda / (lambda + d_k), so lambda lies between d_min / (r - 1) and d_max / (r - 1).

The labels after round t = 1 .. T are the predictions, or by TAID, with its linear ramp, a mixture with the teacher's:

    plain   z_t = A_{t-1} z_{t-1}
    TAID    z_t = (1 - t/T) A_{t-1} z_{t-1} + (t/T) z_0

The bounds, with r_t = ||z_t|| / sqrt(N eps) and kappa = d_max / d_min; collapsed is r_t <= 1:

    plain   r_{t-1} - kappa <= r_t <= r_{t-1} - 1/kappa, from the bounds of lambda. So it lives while
            t < (r_0 - 1) / kappa, which is Mobahi et al.'s bound, and has collapsed when t >= kappa (r_0 - 1).
    TAID    r_t >= (t/T) r_0, so it lives when t > T / r_0, and also while t < (r_0 - 1) / (1 + kappa). Nothing is left
            between the two if r_0 >= (1 + sqrt(1 + 4 T (1 + kappa))) / 2: the paper's sqrt(T (1 + kappa)).

Sharper ones follow from the constraint alone. A fit moves the labels by ||A z - z|| <= sqrt(N eps), with any kernel:

    |r_t - r_0| <= ||z_t - z_0|| / sqrt(N eps) <= e_t,   e_0 = 0,   e_t = (1 - s_t) (1 + e_{t-1})

with s_t = 0 (plain: e_t = t) or t/T (TAID: e_t < 0.77 sqrt(T)). So plain self-distillation lives while t < r_0 - 1,
and TAID never collapses if r_0 > 1 + max e_t. Where kappa = 1, both are exact.

What this does not say: at t = T TAID's labels are the teacher's own, z_0, whatever came before, and the next round is
the first one again. That TAID has not collapsed at its end is the schedule's doing and says nothing of the student.

Labels are divided by sqrt(N eps) throughout, so that a norm is an r. Takes some seconds on a CPU.

Reference: Mobahi, Farajtabar and Bartlett, "Self-Distillation Amplifies Regularization in Hilbert Space", NeurIPS 2020,
arXiv 2002.05715; Shing et al., "TAID", ICLR 2025, arXiv 2501.16937.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from taid import TAIDSchedule
from taid.artifacts.plots import BLUE, BOLD, GREEN, GRID, INK, MUTED, SMALL, VERMILLION

Array = NDArray[np.float64]

ROUNDS = 100
KAPPAS = {1: BLUE, 10: GREEN, 100: VERMILLION}


def regularisation(labels: Array, spectrum: Array) -> float:
    """Lambda, at which the training error is N eps; infinite where the zero function's is no larger."""
    r = float(np.linalg.norm(labels))
    if r <= 1:
        return math.inf
    low, high = spectrum.min() / (r - 1), spectrum.max() / (r - 1)
    for _ in range(50):
        middle = math.sqrt(low * high)
        residual = middle / (middle + spectrum) * labels
        low, high = (middle, high) if residual @ residual < 1 else (low, middle)
    return math.sqrt(low * high)


def fit(labels: Array, spectrum: Array) -> Array:
    """Predictions for the training points of a student fitted to `labels`: ``A z``, in the eigenbasis, ``[N]``."""
    strength = regularisation(labels, spectrum)
    return np.zeros_like(labels) if strength == math.inf else spectrum / (strength + spectrum) * labels


def norms(teacher: Array, spectrum: Array, shares: Sequence[float]) -> Array:
    """r_0 .. r_T, ``[T + 1]``: the norm of the labels over the rounds, `shares` of the teacher's in each of them."""
    labels, found = teacher, [np.linalg.norm(teacher)]
    for share in shares:
        labels = (1 - share) * fit(labels, spectrum) + share * teacher
        found.append(np.linalg.norm(labels))
    return np.array(found)


def plain_shares(rounds: int) -> list[float]:
    """The teacher's share in the labels of rounds 1 .. T of plain self-distillation."""
    return [0.0] * rounds


def taid_shares(rounds: int) -> list[float]:
    """The same of TAID without adaptive update, from 0: t/T."""
    schedule = TAIDSchedule(total_steps=rounds, t_start=0.0, adaptive=False)
    return [schedule.linear(t) for t in range(1, rounds + 1)]


def drift(shares: Sequence[float]) -> Array:
    """e_0 .. e_T, ``[T + 1]``: how far the labels can have moved from the teacher's, at most."""
    found = [0.0]
    for share in shares:
        found.append((1 - share) * (1 + found[-1]))
    return np.array(found)


def enough_by_theorem(rounds: int, kappa: float) -> float:
    """An r_0 at which TAID never collapses by the theorem, r_0 (r_0 - 1) = T (1 + kappa)."""
    return (1 + math.sqrt(1 + 4 * rounds * (1 + kappa))) / 2


def enough_by_drift(rounds: int) -> float:
    """The r_0 above which TAID never collapses with any kernel: 1 + max e_t."""
    return 1 + float(drift(taid_shares(rounds)).max())


def setting(r_0: float, kappa: float, size: int = 20) -> tuple[Array, Array]:
    """A teacher of norm `r_0` with equal shares of all eigenvectors, and a geometric spectrum from 1 to 1/kappa."""
    return np.full(size, r_0 / math.sqrt(size)), np.geomspace(1, 1 / kappa, size)


def rounds_alive(found: Array) -> int:
    """The number of rounds that fit something before the labels collapse for the first time."""
    collapsed = np.flatnonzero(found <= 1 + 1e-9)  # where kappa is 1, r is 1 but for rounding
    return int(collapsed[0]) if len(collapsed) else len(found)


def needed(rounds: int, kappa: float) -> float:
    """The smallest r_0 at which TAID does not collapse in any round of :func:`setting`, by bisection to 0.1 %."""
    low, high = 1.0, enough_by_theorem(rounds, kappa)
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        alive = norms(*setting(middle, kappa), taid_shares(rounds)).min() > 1
        low, high = (low, middle) if alive else (middle, high)
    return high


def table(r_0: float, thresholds: dict[int, dict[int, float]]) -> str:
    """Plain self-distillation from `r_0`, and the r_0 that TAID needs: found, and by both bounds."""
    lines = [
        f"T = {ROUNDS}      rounds that plain lives from r_0 = {r_0:g}    smallest r_0 at which TAID never collapses",
        f"{'kappa':>7}{'found':>10}{'(r_0-1)/kappa':>15}{'r_0-1':>8}{'found':>15}{'theorem':>10}{'1 + max e_t':>14}",
    ]
    for kappa in KAPPAS:
        lived = rounds_alive(norms(*setting(r_0, kappa), plain_shares(ROUNDS)))
        lines.append(
            f"{kappa:7}{lived:10}{(r_0 - 1) / kappa:15.2f}{r_0 - 1:8g}{thresholds[kappa][ROUNDS]:15.2f}"
            f"{enough_by_theorem(ROUNDS, kappa):10.2f}{enough_by_drift(ROUNDS):14.2f}"
        )
    return "\n".join(lines)


def draw_rounds(axes: Any, kappa: float = 3) -> None:
    """r_t over the rounds: plain, TAID from a strong teacher and from a weak one, and the bounds."""
    time, strong, weak = np.arange(ROUNDS + 1), 12.0, 4.0
    axes.axhspan(0, 1, color=GRID, linewidth=0)
    for r_0, shares, colour, style in (
        (strong, plain_shares(ROUNDS), VERMILLION, "-"),
        (strong, taid_shares(ROUNDS), GREEN, "-"),
        (weak, taid_shares(ROUNDS), GREEN, (0, (4, 2))),
    ):
        axes.plot(time, norms(*setting(r_0, kappa), shares), color=colour, linewidth=2, linestyle=style)
        if colour == GREEN:
            axes.plot(time, time / ROUNDS * r_0, color=MUTED, linewidth=1, linestyle=":")
    axes.text(11, 3.6, "plain", color=VERMILLION, **BOLD)
    axes.text(30, 8.4, "TAID, r₀ = 12", color=GREEN, **BOLD)
    axes.text(99, 1.75, "TAID, r₀ = 4", color=GREEN, ha="right", **BOLD)
    axes.text(66, 6.8, "(t/T) r₀", **SMALL)
    axes.text(50, 0.3, "collapsed", ha="center", **SMALL)
    axes.plot([(strong - 1) / kappa], [0.25], "^", color=VERMILLION, markersize=6)
    axes.text(49, 4.9, "▲ plain: (r₀ - 1)/κ", color=VERMILLION, fontsize=9.5)
    axes.set(xlim=(0, ROUNDS), ylim=(0, 12.2))
    axes.set_xlabel(f"round t of T = {ROUNDS}, κ = {kappa:g}", **SMALL)
    axes.set_ylabel("r, norm of the labels", **SMALL)


def draw_thresholds(axes: Any, thresholds: dict[int, dict[int, float]]) -> None:
    """The r_0 that keeps TAID from collapsing, over T: found, and by both bounds."""
    rounds = np.geomspace(10, 300, 30).round().astype(int)
    for kappa, colour in KAPPAS.items():
        axes.plot(rounds, [enough_by_theorem(t, kappa) for t in rounds], color=colour, linewidth=1.2, linestyle="--")
        axes.text(365, enough_by_theorem(300, kappa), f"κ = {kappa}", color=colour, va="center", **BOLD)
    axes.plot(rounds, [enough_by_drift(t) for t in rounds], color=INK, linewidth=1.2)
    for size, (kappa, colour) in zip((10, 6.5, 3), KAPPAS.items(), strict=True):
        axes.plot(*zip(*thresholds[kappa].items(), strict=True), "o", color=colour, markersize=size)
    axes.text(11, 120, "dashed: the theorem", **SMALL)
    axes.text(300, 5.8, "line: 1 + max e\ndots: found", ha="right", va="top", **SMALL)
    axes.set(xscale="log", yscale="log", xlim=(9, 345), ylim=(2, 300))
    axes.set_xticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    axes.set_yticks([3, 10, 30, 100, 300], ["3", "10", "30", "100", "300"])
    axes.set_xlabel("T", **SMALL)
    axes.set_ylabel("smallest r₀ without collapse", **SMALL)


def picture(thresholds: dict[int, dict[int, float]]) -> Figure:
    """Both panels side by side."""
    figure = Figure(figsize=(7.2, 3.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_rounds(left)
    draw_thresholds(right, thresholds)
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.tick_params(which="both", colors=MUTED, labelsize=9.5, length=0)
        axes.minorticks_off()
        axes.set_axisbelow(True)
    return figure


def main() -> None:
    """Simulate, print the table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("runs/mode_collapse.png"))
    file = parser.parse_args().picture
    file.parent.mkdir(parents=True, exist_ok=True)
    thresholds = {kappa: {rounds: needed(rounds, kappa) for rounds in (10, 30, 100, 300)} for kappa in KAPPAS}
    print(table(12, thresholds))
    picture(thresholds).savefig(file, facecolor="white", metadata={"Software": None})
    print(f"picture: {file}")


if __name__ == "__main__":
    main()
