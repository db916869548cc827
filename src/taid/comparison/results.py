"""Results of a comparison: means over seeds with intervals, paired differences, tables and a page.

For n seeds with values x, the interval of a mean is the t distribution's with n - 1 degrees of freedom, at 95 %:
mean(x) ± t s / sqrt(n), where s is the standard deviation. Differences are paired by seed: both runs saw the same
batches in the same order. So their interval excludes the variation between seeds that both methods share.
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
from rich.table import Table as RichTable
from scipy.special import stdtrit

from taid.artifacts import run_folder
from taid.artifacts.plots import GRID, INK, MUTED, Plot, panels, png_of
from taid.artifacts.report import render
from taid.artifacts.tables import Table

# Each measure's heading, digits, and whether less is better (None: neither).
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
    """A mean and half the width of its 95 % interval, which is None for one value."""

    mean: float
    half: float | None

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Interval:
        """Return the interval of a mean of independent values, by the t distribution."""
        n = len(values)
        if n < 2:
            return cls(values[0], None)
        return cls(statistics.fmean(values), float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n))

    def text(self, digits: int, *, sign: bool = False) -> str:
        """Return the interval as text for a table."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


@dataclass(frozen=True)
class MethodResult:
    """The results of a method over all seeds.

    Attributes:
        method: its name.
        learning_rate: its learning rate, if the comparison chose it.
        measures: means by name, for the measures that every run has.
        differences: paired differences from the baseline by measure; empty for the baseline itself.
        runs: the result of each run.
    """

    method: str
    learning_rate: float | None
    measures: dict[str, Interval]
    differences: dict[str, Interval]
    runs: list[dict[str, Any]]


@dataclass(frozen=True)
class ComparisonResults:
    """The results of all methods, in the order in which they were named.

    Attributes:
        methods: the result of each method.
        baseline: the method from which differences are taken.
        rows: the name of the rows that were measured.
        select: the measure that chose learning rates; None if the comparison chose none.
        grid: the results of the runs that learning rates were chosen by.
        references: models that were not trained here, by name, each with ``held_out``.
        diverged: the names of runs that diverged.
    """

    methods: list[MethodResult]
    baseline: str
    rows: str
    select: str | None
    grid: list[dict[str, Any]]
    references: dict[str, dict[str, Any]]
    diverged: list[str]

    @classmethod
    def from_runs(
        cls, results: list[dict[str, Any]], *, baseline: str, rows: str, select: str | None, grid: list[dict[str, Any]],
        references: dict[str, dict[str, Any]],
    ) -> ComparisonResults:  # fmt: skip
        """Aggregate finished runs, each with `method`, `seed`, `learning_rate`, `seconds` and `held_out`.

        Raises:
            ValueError: all runs have diverged.
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
            shared = [name for name in (*MEASURES, *_COST) if all(name in run for run in numbers)]
            means = {name: Interval.from_values([run[name] for run in numbers]) for name in shared}
            paired = [] if method == baseline else _paired(runs, by_method.get(baseline, []))
            differences = {
                name: Interval.from_values([own[name] - other[name] for own, other in paired])
                for name in shared
                if paired and name in MEASURES and all(name in other for _, other in paired)
            }
            methods.append(MethodResult(method, runs[0]["learning_rate"], means, differences, runs))
        return cls(methods, baseline, rows, select, grid, references, diverged)

    @property
    def columns(self) -> list[str]:
        """The measures that every method has."""
        return [name for name in MEASURES if all(name in method.measures for method in self.methods)]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows of the table."""
        has_rates = any(method.learning_rate is not None for method in self.methods)
        head = ["method", *(["learning rate"] if has_rates else [])]
        for name in self.columns:
            head += [MEASURES[name][0], *([f"less {self.baseline}'s"] if name in _COMPARED else [])]
        head += [words for words, _ in _COST.values()]
        rows = []
        for method in self.methods:
            row = [method.method, *([f"{method.learning_rate:g}" if method.learning_rate else ""] if has_rates else [])]
            for name in self.columns:
                row.append(method.measures[name].text(MEASURES[name][1]))
                if name in _COMPARED:
                    difference = method.differences.get(name)
                    row.append("" if difference is None else difference.text(MEASURES[name][1], sign=True))
            rows.append([*row, *(f"{method.measures[name].mean:.{digits}f}" for name, (_, digits) in _COST.items())])
        for model, numbers_of_model in self.references.items():
            numbers = _measured(numbers_of_model)
            row = [f"({model})", *([""] if has_rates else [])]
            for name in self.columns:
                row.append(f"{numbers[name]:.{MEASURES[name][1]}f}" if name in numbers else "")
                row += [""] if name in _COMPARED else []
            rows.append([*row, *("" for _ in _COST)])
        return head, rows

    def notes(self) -> list[str]:
        """Return the sentences that explain the table."""
        seeds = max(len(method.runs) for method in self.methods)
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
                if at_edge := [method.method for method in self.methods if method.learning_rate == rate]:
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
        losses = {method.method: method.measures["cross_entropy"] for method in self.methods}
        if "taid_linear" in losses and losses.get("taid") == losses["taid_linear"]:
            notes.append(
                "taid and taid_linear are the same: in so few steps t never leaves the ramp (taid_alpha: auto)."
            )
        if never := [method.method for method in self.methods if all(run.get("sampled") == 0 for run in method.runs)]:
            notes.append(
                f"No answer was ever sampled by {', '.join(never)}: sampling: adaptive begins when held-out loss has "
                "risen from one evaluation to the next."
            )
        return notes


def _paired(
    runs: list[dict[str, Any]], others: list[dict[str, Any]]
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Pair the numbers of runs with those of the other runs of the same seed."""
    by_seed = {run["seed"]: _numbers(run) for run in others}
    return [(_numbers(run), by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    return {name: result[name] for name in _COST if math.isfinite(result[name])} | _measured(result)


def _measured(model: dict[str, Any]) -> dict[str, float]:
    found = model["held_out"] | model.get("generations", {})
    return {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}


# --- what is written --------------------------------------------------------------------------------------------------


def write(found: ComparisonResults, folder: Path) -> None:
    """Write comparison.json, .csv, .md and .html, and curves.json."""
    run_folder.write_atomically(folder / "comparison.json", json.dumps(_as_json(found), indent=2) + "\n")
    run_folder.write_atomically(folder / "curves.json", json.dumps(_curves(found, folder)) + "\n")
    run_folder.write_atomically(folder / "comparison.csv", _as_csv(found))
    run_folder.write_atomically(folder / "comparison.md", markdown(found))
    run_folder.write_atomically(folder / "comparison.html", _page(found, folder))


def markdown(found: ComparisonResults) -> str:
    """Return the table and its notes as Markdown."""
    return Table(*found.cells()).markdown() + "\n" + "\n".join([*found.notes(), ""])


def table(found: ComparisonResults) -> RichTable:
    """Return the table for a terminal, without the columns that only the page has room for."""
    head, rows = found.cells()
    shown = [i for i, name in enumerate(head) if i < 1 or name in _IN_TERMINAL or name.startswith("less ")]
    cells = [[row[place] for place in shown] for row in rows]
    return Table([head[place] for place in shown], cells, "Comparison", [" ".join(found.notes())]).terminal()


_IN_TERMINAL = {"learning rate", "ROUGE-L", *(MEASURES[name][0] for name in _COMPARED), *(w for w, _ in _COST.values())}


def _as_json(found: ComparisonResults) -> dict[str, Any]:
    def interval(value: Interval) -> dict[str, Any]:
        return {"mean": value.mean, "half_width_95": value.half}

    return {
        "baseline": found.baseline, "rows": found.rows, "selected_by": found.select,
        "methods": {
            method.method: {
                "learning_rate": method.learning_rate,
                "measures": {name: interval(value) for name, value in method.measures.items()},
                "differences": {name: interval(value) for name, value in method.differences.items()},
            }
            for method in found.methods
        },
        "beside": found.references,
        "runs": [run for method in found.methods for run in method.runs],
        "grid": found.grid,
    }  # fmt: skip


def _curves(found: ComparisonResults, folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the logged curves by run and measure: steps and values, to six digits."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run in [*found.grid, *(run for method in found.methods for run in method.runs)]:
        measures = curves[run["run"]] = {}
        for row in _logged(folder / "runs" / run["run"]):
            for name in _LOGGED:
                if isinstance(row.get(name), int | float):
                    measures.setdefault(name, []).append((row["step"], float(f"{row[name]:.6g}")))
    return curves


def _logged(run: Path) -> list[dict[str, Any]]:
    return run_folder.read_metrics(run) if (run / run_folder.METRICS).exists() else []


def _as_csv(found: ComparisonResults) -> str:
    """Return CSV with one row a run."""
    runs = [run for method in found.methods for run in method.runs]
    names = [name for name in (*MEASURES, *_COST) if any(name in _numbers(run) for run in runs)]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["method", "seed", "learning_rate", *names])
    for run in runs:
        numbers = _numbers(run)
        rows.writerow([run["method"], run["seed"], run["learning_rate"], *(numbers.get(name, "") for name in names)])
    return file.getvalue()


def _page(found: ComparisonResults, folder: Path) -> str:
    head, rows = found.cells()
    return render(
        "comparison.html.j2", opening=opening(found), table=Table(head, rows), notes=found.notes()[1:],
        plots=[_plot_results(found), *_plot_curves(found, folder)],
        runs=[
            (method.method, [(run["seed"], f"runs/{run['run']}/report.html") for run in method.runs])
            for method in found.methods
        ],
    )  # fmt: skip


def opening(found: ComparisonResults) -> str:
    """Name the best method, and the methods that the seeds cannot distinguish from it."""
    first, *others = sorted(found.methods, key=lambda method: method.measures["cross_entropy"].mean)
    words = (
        f"{first.method} has the lowest held-out cross-entropy, {first.measures['cross_entropy'].text(4)} nats a token"
    )
    if not others:
        return f"{words}."
    undecided = [method.method for method in others if not _is_apart(first, method)]
    if not undecided:
        return f"{words}; the seeds tell it apart from every other."
    return f"{words}; from {', '.join(undecided)} the seeds cannot tell it apart."


def _is_apart(one: MethodResult, other: MethodResult) -> bool:
    """Return whether the 95 % interval of the paired difference excludes 0."""
    paired = _paired(one.runs, other.runs)
    if not paired:
        return False
    interval = Interval.from_values([a["cross_entropy"] - b["cross_entropy"] for a, b in paired])
    return interval.half not in (None, 0.0) and abs(interval.mean) > float(interval.half)  # 0: all seeds are equal


def _colours(found: ComparisonResults) -> dict[str, Any]:
    palette = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors]  # type: ignore[attr-defined]
    return {method.method: palette[place % len(palette)] for place, method in enumerate(found.methods)}


def _plot_results(found: ComparisonResults) -> Plot:
    """Plot each run as a point and each mean with its interval, the best on top."""
    order = sorted(found.methods, key=lambda method: -method.measures["cross_entropy"].mean)
    names = [name for name in _COMPARED if name in found.columns]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 0.9 + 0.3 * len(order)), dpi=200, layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), sharey=True, squeeze=False)[0], strict=True):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
        for place, method in enumerate(order):
            interval, colour = method.measures[name], _colours(found)[method.method]
            values = [_numbers(run)[name] for run in method.runs]
            below = [place - 0.28] * len(values)  # so that the mean and its interval do not hide them
            axes.plot(values, below, "o", color=colour, alpha=0.5, markersize=3, markeredgewidth=0)
            axes.errorbar(interval.mean, place, xerr=interval.half, fmt="o", color=colour, markersize=5, capsize=2)
        axes.set_yticks(range(len(order)), [method.method for method in order])
        axes.set_xlabel(f"{MEASURES[name][0]}, nats a token", color=MUTED, fontsize=9)
        axes.locator_params(axis="x", nbins=4)
    alt = "; ".join(f"{method.method} {method.measures['cross_entropy'].text(4)}" for method in reversed(order))
    caption = (
        "The mean and its 95 % interval, and below them a small point a run. Methods whose intervals overlap may still "
        "be apart seed by seed, which the table's differences show."
    )
    return Plot("Held out", f"Held-out cross-entropy: {alt}.", caption, png_of(figure))


def _plot_curves(found: ComparisonResults, folder: Path) -> list[Plot]:
    """Plot validation cross-entropy and t over the steps, as means over seeds."""
    plots, colours = [], _colours(found)
    for key, title, unit in (
        ("eval_cross_entropy", "While they learn", "validation cross-entropy\nnats per token"),
        ("t", "t: 0 is the student, 1 the teacher", "t"),
    ):
        curves = {method.method: _mean_curve(method, folder, key) for method in found.methods}
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


def _mean_curve(method: MethodResult, folder: Path, key: str) -> list[tuple[int, float]]:
    by_step: dict[int, list[float]] = {}
    for run in method.runs:
        for row in _logged(folder / "runs" / run["run"]):
            if isinstance(row.get(key), int | float) and math.isfinite(row[key]):
                by_step.setdefault(row["step"], []).append(row[key])
    return [(step, statistics.fmean(values)) for step, values in sorted(by_step.items())]
