"""The numbers of a comparison: means over seeds with intervals, differences seed by seed, and the page that shows them.

For n seeds with values x, the interval of a mean is the t distribution's of n - 1 degrees of freedom, at 95 %:
mean(x) ± t s / sqrt(n), s the standard deviation. A difference is taken between runs of one seed, which saw the same
batches in the same order, and its interval is that of these differences: it does not contain what seeds do to both.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.table import Table as RichTable
from scipy import stats

from taid.artifacts import run_folder
from taid.artifacts.plots import GRID, INK, MUTED, Plot, panels, png_of
from taid.artifacts.report import render
from taid.artifacts.tables import Table

# Of a result: its words, digits, and whether less is better (None: neither is).
MEASURES: dict[str, tuple[str, int, bool | None]] = {
    "cross_entropy": ("cross-entropy", 4, True),
    "kl": ("KL(p ‖ q)", 4, True),
    "reverse_kl": ("KL(q ‖ p)", 4, True),
    "bits_per_byte": ("bits/byte", 4, True),
    "agreement": ("agreement", 4, False),
    "accuracy": ("accuracy", 4, False),
    "head_mass": ("head mass", 4, None),
    "tail_mass": ("tail mass", 7, None),
    "entropy": ("entropy", 4, None),
    "calibration_error": ("calibration error", 4, True),
    "rouge_l": ("ROUGE-L", 4, False),
    "exact_match": ("exact match", 4, False),
    "distinct_2": ("distinct-2", 4, False),
    "self_bleu": ("self-BLEU", 4, None),
    "generation_loss": ("teacher's loss of samples", 4, None),
}
_COMPARED = ("cross_entropy", "kl")
_LOGGED = ("eval_cross_entropy", "eval_kl", "t", "loss", "kl", "grad_norm")
_COST = {"seconds": ("s a run", 0), "memory_gb": ("GB", 2)}


@dataclass(frozen=True)
class Interval:
    """A mean, and half of the width of its 95 % interval; None for one value."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of a mean of independent values, by the t distribution."""
        n = len(values)
        if n < 2:
            return cls(values[0], None)
        return cls(statistics.fmean(values), float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n))

    def text(self, digits: int, *, sign: bool = False) -> str:
        """For a table."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


@dataclass(frozen=True)
class Standing:
    """A method over all seeds.

    Attributes:
        method: its name.
        learning_rate: that it was given, where the comparison chose it.
        measures: by name, those that every run has.
        differences: of some measures, to the baseline, seed by seed; empty for the baseline itself.
        runs: the results.
    """

    method: str
    learning_rate: float | None
    measures: dict[str, Interval]
    differences: dict[str, Interval]
    runs: list[dict[str, Any]]


@dataclass(frozen=True)
class Standings:
    """All methods, in the order in which they were named."""

    methods: list[Standing]
    baseline: str
    rows: str
    select: str | None
    grid: list[dict[str, Any]]
    beside: dict[str, dict[str, Any]]
    diverged: list[str]

    @classmethod
    def of(
        cls, results: list[dict[str, Any]], *, baseline: str, rows: str, select: str | None, grid: list[dict[str, Any]],
        beside: dict[str, dict[str, Any]],
    ) -> Standings:  # fmt: skip
        """Standings of finished runs, each with `method`, `seed`, `learning_rate`, `seconds`, `held_out`.

        `beside` are models that were not trained here, by name, each with `held_out`.
        """
        diverged = [result["run"] for result in results if "diverged" in result]
        results = [result for result in results if "diverged" not in result]
        if not results:
            raise ValueError(f"all runs have diverged: {', '.join(diverged)}")
        by_method: dict[str, list[dict[str, Any]]] = {}
        for result in results:
            by_method.setdefault(result["method"], []).append(result)
        methods = []
        for method, runs in by_method.items():
            numbers = [_numbers(run) for run in runs]
            shared = [name for name in (*MEASURES, *_COST) if all(name in of for of in numbers)]
            means = {name: Interval.of([of[name] for of in numbers]) for name in shared}
            paired = [] if method == baseline else _paired(runs, by_method.get(baseline, []))
            differences = {
                name: Interval.of([of[name] - other[name] for of, other in paired])
                for name in shared
                if paired and name in MEASURES and all(name in other for _, other in paired)
            }
            methods.append(Standing(method, runs[0]["learning_rate"], means, differences, runs))
        return cls(methods, baseline, rows, select, grid, beside, diverged)

    @property
    def columns(self) -> list[str]:
        """The measures that every method has."""
        return [name for name in MEASURES if all(name in of.measures for of in self.methods)]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of the table."""
        has_rates = any(of.learning_rate is not None for of in self.methods)
        head = ["method", *(["learning rate"] if has_rates else [])]
        for name in self.columns:
            head += [MEASURES[name][0], *([f"less {self.baseline}'s"] if name in _COMPARED else [])]
        head += [words for words, _ in _COST.values()]
        rows = []
        for of in self.methods:
            row = [of.method, *([f"{of.learning_rate:g}" if of.learning_rate else ""] if has_rates else [])]
            for name in self.columns:
                row.append(of.measures[name].text(MEASURES[name][1]))
                if name in _COMPARED:
                    difference = of.differences.get(name)
                    row.append("" if difference is None else difference.text(MEASURES[name][1], sign=True))
            rows.append([*row, *(f"{of.measures[name].mean:.{digits}f}" for name, (_, digits) in _COST.items())])
        for model, of_model in self.beside.items():
            numbers = _measured(of_model)
            row = [f"({model})", *([""] if has_rates else [])]
            for name in self.columns:
                row.append(f"{numbers[name]:.{MEASURES[name][1]}f}" if name in numbers else "")
                row += [""] if name in _COMPARED else []
            rows.append([*row, *("" for _ in _COST)])
        return head, rows

    def notes(self) -> list[str]:
        """What a reader has to know beside the table."""
        seeds = max(len(of.runs) for of in self.methods)
        notes = [opening(self), f"Measured on {self.rows}, {self.methods[0].runs[0]['held_out']['tokens']:,} tokens."]
        if answered := self.methods[0].runs[0].get("generate"):
            notes.append(f"Answers are to the first {answered} of its prompts.")
        if "kl" in self.columns:
            notes.append("p is the teacher, q the student.")
        if seeds > 1:
            notes.append(
                f"{seeds} seeds; ± is half of the 95 % interval of the mean, of differences seed by seed. Each "
                "interval is for itself, however many there are."
            )
        else:
            notes.append("One seed: nothing tells chance from a difference.")
        if self.select is not None:
            rates = sorted({run["learning_rate"] for run in self.grid})
            notes.append(
                f"Of the learning rates {', '.join(f'{rate:g}' for rate in rates)} each method has the one that gave "
                f"it the lowest {MEASURES[self.select][0]} on validation rows, with the first seed."
            )
            for rate, end, words in ((rates[0], "smallest", "smaller"), (rates[-1], "largest", "larger")):
                if at_edge := [of.method for of in self.methods if of.learning_rate == rate]:
                    notes.append(
                        f"The {end}, {rate:g}, is that of {', '.join(at_edge)}: a {words} one, which was not tried, "
                        "may be better."
                    )
        if self.diverged:
            notes.append(f"Diverged, and left out: {', '.join(self.diverged)}.")
        notes.append(
            "Seconds and memory are those of training: from a cache without the teacher, which a method that samples "
            "has beside it."
        )
        losses = {of.method: of.measures["cross_entropy"] for of in self.methods}
        if "taid_linear" in losses and losses.get("taid") == losses["taid_linear"]:
            notes.append(
                "taid and taid_linear are the same: in so few steps t never leaves the ramp (taid_alpha: auto)."
            )
        if never := [of.method for of in self.methods if all(run.get("sampled") == 0 for run in of.runs)]:
            notes.append(
                f"No answer was ever sampled by {', '.join(never)}: sampling: adaptive begins when held-out loss has "
                "risen from one evaluation to the next."
            )
        return notes


def _paired(
    runs: list[dict[str, Any]], others: list[dict[str, Any]]
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """The numbers of runs beside those of the others' runs of the same seed."""
    by_seed = {run["seed"]: _numbers(run) for run in others}
    return [(_numbers(run), by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    return {name: result[name] for name in _COST if math.isfinite(result[name])} | _measured(result)


def _measured(model: dict[str, Any]) -> dict[str, float]:
    found = model["held_out"] | model.get("generations", {})
    return {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}


# --- what is written --------------------------------------------------------------------------------------------------


def write(found: Standings, folder: Path) -> None:
    """Write comparison.json, .csv, .md and .html, and curves.json."""
    run_folder.write_atomically(folder / "comparison.json", json.dumps(_as_json(found), indent=2) + "\n")
    run_folder.write_atomically(folder / "curves.json", json.dumps(_curves(found, folder)) + "\n")
    run_folder.write_atomically(folder / "comparison.csv", _as_csv(found))
    run_folder.write_atomically(folder / "comparison.md", markdown(found))
    run_folder.write_atomically(folder / "comparison.html", _page(found, folder))


def markdown(found: Standings) -> str:
    """The table, for a README."""
    return Table(*found.cells()).markdown() + "\n" + "\n".join([*found.notes(), ""])


def table(found: Standings) -> RichTable:
    """The table, for a terminal: without what only its page has room for."""
    head, rows = found.cells()
    shown = [i for i, name in enumerate(head) if i < 1 or name in _IN_TERMINAL or name.startswith("less ")]
    cells = [[row[place] for place in shown] for row in rows]
    return Table([head[place] for place in shown], cells, "Comparison", [" ".join(found.notes())]).terminal()


_IN_TERMINAL = {"learning rate", "ROUGE-L", *(MEASURES[name][0] for name in _COMPARED), *(w for w, _ in _COST.values())}


def _as_json(found: Standings) -> dict[str, Any]:
    def interval(of: Interval) -> dict[str, Any]:
        return {"mean": of.mean, "half_width_95": of.half}

    return {
        "baseline": found.baseline, "rows": found.rows, "selected_by": found.select,
        "methods": {
            of.method: {
                "learning_rate": of.learning_rate,
                "measures": {name: interval(value) for name, value in of.measures.items()},
                "differences": {name: interval(value) for name, value in of.differences.items()},
            }
            for of in found.methods
        },
        "beside": found.beside,
        "runs": [run for of in found.methods for run in of.runs],
        "grid": found.grid,
    }  # fmt: skip


def _curves(found: Standings, folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What each run logged, by its name and that of the measure: steps and values, to six digits."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run in [*found.grid, *(run for of in found.methods for run in of.runs)]:
        of_run = curves[run["run"]] = {}
        for row in _logged(folder / "runs" / run["run"]):
            for name in _LOGGED:
                if isinstance(row.get(name), int | float):
                    of_run.setdefault(name, []).append((row["step"], float(f"{row[name]:.6g}")))
    return curves


def _logged(run: Path) -> list[dict[str, Any]]:
    return run_folder.read_metrics(run) if (run / run_folder.METRICS).exists() else []


def _as_csv(found: Standings) -> str:
    """One row a run."""
    runs = [run for of in found.methods for run in of.runs]
    names = [name for name in (*MEASURES, *_COST) if any(name in _numbers(run) for run in runs)]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["method", "seed", "learning_rate", *names])
    for run in runs:
        numbers = _numbers(run)
        rows.writerow([run["method"], run["seed"], run["learning_rate"], *(numbers.get(name, "") for name in names)])
    return file.getvalue()


def _page(found: Standings, folder: Path) -> str:
    head, rows = found.cells()
    return render(
        "comparison.html.j2", opening=opening(found), table=Table(head, rows), notes=found.notes()[1:],
        plots=[_plot_standings(found), *_plot_curves(found, folder)],
        runs=[
            (of.method, [(run["seed"], f"runs/{run['run']}/report.html") for run in of.runs]) for of in found.methods
        ],
    )  # fmt: skip


def opening(found: Standings) -> str:
    """Who is ahead, and whether the seeds can tell."""
    first, *others = sorted(found.methods, key=lambda of: of.measures["cross_entropy"].mean)
    words = (
        f"{first.method} has the lowest held-out cross-entropy, {first.measures['cross_entropy'].text(4)} nats a token"
    )
    if not others:
        return f"{words}."
    undecided = [of.method for of in others if not _is_apart(first, of)]
    if not undecided:
        return f"{words}; the seeds tell it apart from every other."
    return f"{words}; from {', '.join(undecided)} the seeds cannot tell it apart."


def _is_apart(one: Standing, other: Standing) -> bool:
    """Whether the 95 % interval of their difference, seed by seed, leaves 0 out."""
    paired = _paired(one.runs, other.runs)
    if not paired:
        return False
    interval = Interval.of([of["cross_entropy"] - than["cross_entropy"] for of, than in paired])
    return interval.half not in (None, 0.0) and abs(interval.mean) > float(interval.half)  # 0: the seeds were none


def _colours(found: Standings) -> dict[str, Any]:
    palette = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors]  # type: ignore[attr-defined]
    return {of.method: palette[place % len(palette)] for place, of in enumerate(found.methods)}


def _plot_standings(found: Standings) -> Plot:
    """Each run as a point, each mean with its interval, the best on top."""
    order = sorted(found.methods, key=lambda of: -of.measures["cross_entropy"].mean)
    names = [name for name in _COMPARED if name in found.columns]
    figure = Figure(figsize=(5.6, 0.9 + 0.3 * len(order)), dpi=200, layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), sharey=True, squeeze=False)[0], strict=True):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
        for place, of in enumerate(order):
            interval, colour = of.measures[name], _colours(found)[of.method]
            values = [_numbers(run)[name] for run in of.runs]
            below = [place - 0.28] * len(values)  # where the mean and its interval do not hide them
            axes.plot(values, below, "o", color=colour, alpha=0.5, markersize=3, markeredgewidth=0)
            axes.errorbar(interval.mean, place, xerr=interval.half, fmt="o", color=colour, markersize=5, capsize=2)
        axes.set_yticks(range(len(order)), [of.method for of in order])
        axes.set_xlabel(f"{MEASURES[name][0]}, nats a token", color=MUTED, fontsize=9)
        axes.locator_params(axis="x", nbins=4)
    alt = "; ".join(f"{of.method} {of.measures['cross_entropy'].text(4)}" for of in reversed(order))
    caption = (
        "The mean and its 95 % interval, and below them a small point a run. Methods whose intervals overlap may still "
        "be apart seed by seed, which the table's differences show."
    )
    return Plot("Held out", f"Held-out cross-entropy: {alt}.", caption, png_of(figure))


def _plot_curves(found: Standings, folder: Path) -> list[Plot]:
    """Validation cross-entropy, and t, over the steps: means over seeds."""
    plots, colours = [], _colours(found)
    for key, title, unit in (
        ("eval_cross_entropy", "While they learn", "validation cross-entropy\nnats per token"),
        ("t", "t: 0 is the student, 1 the teacher", "t"),
    ):
        curves = {of.method: _mean_curve(of, folder, key) for of in found.methods}
        curves = {method: series for method, series in curves.items() if len(series) > 1}
        if not curves:
            continue
        figure, (axes,) = panels([unit], max(series[-1][0] for series in curves.values()), height=3.6)
        for method, series in curves.items():
            axes.plot(*zip(*series, strict=True), color=colours[method], linewidth=1.4, label=method)
        columns = min(3, len(curves))  # above the curves: 14 methods would hide them
        figure.legend(loc="outside upper center", fontsize=8, frameon=False, ncols=columns, labelcolor=INK)
        ends = ", ".join(f"{method} ends at {series[-1][1]:.3f}" for method, series in curves.items())
        plots.append(Plot(title, f"{title}: {ends}.", "Means over the seeds.", png_of(figure)))
    return plots


def _mean_curve(of: Standing, folder: Path, key: str) -> list[tuple[int, float]]:
    by_step: dict[int, list[float]] = {}
    for run in of.runs:
        for row in _logged(folder / "runs" / run["run"]):
            if isinstance(row.get(key), int | float) and math.isfinite(row[key]):
                by_step.setdefault(row["step"], []).append(row[key])
    return [(step, statistics.fmean(values)) for step, values in sorted(by_step.items())]
