"""Make the tables of docs/evidence.md, tables.md and the README, and the pictures, of the numbers beside this file.

    python benchmarks/evidence/figures.py            # writes all of them
    python benchmarks/evidence/figures.py --check    # fails if a table is not that of the numbers

A table of the page stands between one of these lines and `<!-- end -->`:

    <!-- table NAME MEASURE ... -->                      every method of NAME.json
    <!-- table NAME:METHOD,... MEASURE ... -->           these
    <!-- table NAME@BASELINE:METHOD,... MEASURE ... -->  less another method's than forward KL's
    <!-- settings NAME,... METHOD,... MEASURE ... -->    these methods in several settings
    <!-- steps NAME METHOD,... -->                       how fast they learned, from NAME.curves.json

`cross_entropy-` is the difference of cross_entropy to the baseline, seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taid.comparison.options import METHODS
from taid.comparison.results import MEASURES, ComparisonResults, Interval, MethodResult

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PAGES = [DOCS / "evidence.md", HERE / "tables.md", DOCS.parent / "README.md"]
BLOCK = re.compile(r"(<!-- (table|settings|steps) (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
COLOURS = {
    "forward_kl": "#111827", "skew_forward_kl": "#7c3aed", "sft": "#15803d", "taid": "#c2410c",
    "taid_linear": "#ea580c", "taid_sampled": "#fb923c", "taid_auto": "#0369a1",
}  # fmt: skip
GREY = "#6b7280"


def read(name: str) -> ComparisonResults:
    """NAME, or NAME@BASELINE for differences to another method than it was compared with."""
    name, _, baseline = name.partition("@")
    found = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return ComparisonResults.from_runs(
        found["runs"], baseline=baseline or found["baseline"], rows=found["rows"], select=found["selected_by"],
        grid=found["grid"], references={} if baseline else found["beside"],
    )  # fmt: skip


def read_curves(name: str) -> dict[str, dict[str, list[list[float]]]]:
    found: dict[str, dict[str, list[list[float]]]] = json.loads((HERE / f"{name}.curves.json").read_text("utf-8"))
    return found


def table(name: str, *measures: str) -> str:
    """Methods from the lowest cross-entropy on, then the student before and the teacher."""
    name, _, chosen = name.partition(":")
    found = read(name)
    rows = [
        [f"`{result.method}`", _rate(result), *(_cell(result, measure) for measure in measures)]
        for result in sorted(found.methods, key=lambda result: result.measures["cross_entropy"].mean)
        if not chosen or result.method in chosen.split(",")
    ]
    for model, numbers in found.references.items():
        values = numbers["held_out"] | numbers.get("generations", {})
        known = {measure: Interval(value, None) for measure, value in values.items() if value is not None}
        rows.append([f"({model})", "", *(_text(known.get(measure), measure) for measure in measures)])
    return _lines(["method", "rate", *_heads(measures, found.baseline)], rows)


def settings(names: str, methods: str, *measures: str) -> str:
    """The same methods in one setting after the other."""
    comparisons = {name: read(name) for name in names.split(",")}
    rows = [
        [name, f"`{result.method}`", _rate(result), *(_cell(result, measure) for measure in measures)]
        for name, found in comparisons.items()
        for method in methods.split(",")
        for result in found.methods
        if result.method == method
    ]
    (baseline,) = {found.baseline for found in comparisons.values()}
    return _lines(["setting", "method", "rate", *_heads(measures, baseline)], rows)


def steps(name: str, methods: str) -> str:
    """When each run reached the baseline's validation losses, and how far its loss strays from one log to the next."""
    found, curves = read(name), read_curves(name)

    def of_runs(method: str, key: str) -> list[list[list[float]]]:
        return [curves[run["run"]][key] for run in _method(found, method).runs]

    baseline = of_runs(found.baseline, "eval_cross_entropy")
    last = baseline[0][-1][0]
    marks = [statistics.fmean(_at(curve, share * last) for curve in baseline) for share in (0.5, 0.8)]
    rows = []
    for method in methods.split(","):
        cells = [f"`{method}`", _rate(_method(found, method))]
        for loss in marks:
            reached = [_first(curve, loss) for curve in of_runs(method, "eval_cross_entropy")]
            known = [step for step in reached if step is not None]
            missed = f", not by {len(reached) - len(known)}" if len(known) < len(reached) else ""
            cells.append(f"{statistics.fmean(known):.0f}{missed}" if known else "never")
        cells += [f"{statistics.fmean(map(_stray, of_runs(method, key))):.3f}" for key in ("loss", "grad_norm")]
        rows.append(cells)
    heads = [f"steps to {loss:.3f}" for loss in marks]
    return _lines(["method", "rate", *heads, "loss strays", "gradient norm strays"], rows)


def _method(found: ComparisonResults, method: str) -> MethodResult:
    return next(result for result in found.methods if result.method == method)


def _at(curve: list[list[float]], step: float) -> float:
    return float(numpy.interp(step, *zip(*curve, strict=True)))


def _first(curve: list[list[float]], loss: float) -> float | None:
    """The first step at which the curve, linear from one evaluation to the next, is as low."""
    for (step, high), (later, low) in itertools.pairwise(curve):
        if low <= loss:
            return step if high <= loss else step + (later - step) * (high - loss) / (high - low)
    return None


def _stray(series: list[list[float]]) -> float:
    """The mean change from one logged value to the next, as a share of their mean, in the second half of a run."""
    values = [value for _, value in series[len(series) // 2 :]]
    return statistics.fmean(abs(b - a) for a, b in itertools.pairwise(values)) / statistics.fmean(values)


def _heads(measures: tuple[str, ...], baseline: str) -> list[str]:
    heads = []
    for measure in measures:
        name = measure.rstrip("-")
        parts = [MEASURES[name][0]] if name == measure or name not in measures else []
        heads.append(", ".join([*parts, *([f"less {baseline}'s"] if name != measure else [])]))
    return heads


def _lines(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"{line}\n" for line in (
        f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(cells)} |" for cells in rows)
    ))  # fmt: skip


def _rate(result: MethodResult) -> str:
    return "" if result.learning_rate is None else f"{result.learning_rate:g}"


def _cell(result: MethodResult, measure: str) -> str:
    return _text((result.differences if measure.endswith("-") else result.measures).get(measure.rstrip("-")), measure)


def _text(interval: Interval | None, measure: str) -> str:
    if interval is None:
        return ""
    return interval.text(MEASURES[measure.rstrip("-")][1], sign=measure.endswith("-"))


def with_tables(page: str) -> str:
    """The page with each table made anew."""
    kinds = {"table": table, "settings": settings, "steps": steps}
    return BLOCK.sub(lambda found: found[1] + kinds[found[2]](*found[3].split()) + found[4], page)


def frontier(settings: dict[str, float]) -> Figure:
    """Draw what each method gives up of KL(p || q) for KL(q || p), beside forward KL; who gives up more is left out."""
    figure = Figure(figsize=(10.4, 4.2 * math.ceil(len(settings) / 2)), dpi=150, layout="constrained")
    panels = figure.subplots(math.ceil(len(settings) / 2), 2, squeeze=False).flat
    for (name, most), axes in zip(settings.items(), panels, strict=True):
        found = read(name)
        axes.axhline(0, color="#d1d5db", linewidth=0.8)
        axes.axvline(0, color="#d1d5db", linewidth=0.8)
        for result in found.methods:
            x, y = (result.differences.get(measure, Interval(0.0, 0.0)) for measure in ("kl", "reverse_kl"))
            if x.mean > most or result.method not in METHODS:
                continue
            colour = COLOURS.get(result.method, GREY)
            axes.errorbar(x.mean, y.mean, xerr=x.half, yerr=y.half, fmt="o", color=colour, markersize=4)
            *place, side = {"taid_auto": (-4, 5, "right"), "forward_kl": (4, -10, "left")}.get(
                result.method, (4, 4, "left")
            )
            axes.annotate(
                result.method, (x.mean, y.mean), place, textcoords="offset points", ha=side, color=colour, fontsize=8
            )
        _plain(axes, name, "KL(p ‖ q) less forward KL's, nats a token", "KL(q ‖ p) less forward KL's")
    return figure


def teachers(settings: dict[str, str]) -> Figure:
    """Draw where a student of one size ends under each teacher, by how good the teacher is."""
    comparisons = [read(name) for name in settings]
    x = [found.references["teacher"]["held_out"]["cross_entropy"] for found in comparisons]
    figure = Figure(figsize=(10.4, 4.2), dpi=150, layout="constrained")
    for measure, axes in zip(("cross_entropy", "reverse_kl"), figure.subplots(1, 2), strict=True):
        for method in ("forward_kl", "skew_forward_kl", "taid", "taid_auto"):
            students = [_method(found, method).measures[measure] for found in comparisons]
            y, halves = [mean.mean for mean in students], [mean.half for mean in students]
            axes.errorbar(x, y, yerr=halves, fmt="o-", color=COLOURS.get(method, GREY), markersize=4, label=method)
        axes.invert_xaxis()
        axes.legend(fontsize=8, frameon=False)
        for size, place in zip(settings.values(), x, strict=True):
            axes.annotate(size, (place, 1.0), (0, -10), xycoords=("data", "axes fraction"), textcoords="offset points",
                          ha="center", fontsize=8, color=GREY)  # fmt: skip
        _plain(axes, "", "the teacher's own cross-entropy, nats a token", f"the student's {MEASURES[measure][0]}")
    return figure


def rules(names: list[str]) -> Figure:
    """The paper's rule and ours beside forward KL, in every setting."""
    figure = Figure(figsize=(10.4, 0.5 * len(names) + 1.2), dpi=150, layout="constrained")
    for measure, axes in zip(("kl", "reverse_kl"), figure.subplots(1, 2, sharey=True), strict=True):
        axes.axvline(0, color=COLOURS["forward_kl"], linewidth=0.8)
        for place, name in enumerate(names):
            found = read(name)
            for shift, method in ((-0.16, "taid"), (0.16, "taid_auto")):
                less = _method(found, method).differences[measure]
                axes.errorbar(less.mean, place + shift, xerr=less.half, fmt="o", color=COLOURS[method], markersize=4,
                              label=method if place == 0 else None)  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        _plain(axes, "", f"{MEASURES[measure][0]} less forward KL's, nats a token", "")
    axes.invert_yaxis()
    figure.axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def curves(names: list[str], methods: list[str]) -> Figure:
    """The validation rows' KL to the teacher over the steps, the mean of all seeds."""
    figure = Figure(figsize=(10.4, 3.8), dpi=150, layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names)), strict=True):
        found, logged = read(name), read_curves(name)
        for method in methods:
            mean = numpy.mean([logged[run["run"]]["eval_kl"] for run in _method(found, method).runs], axis=0)
            axes.plot(*mean.T, "o-", markersize=3, color=COLOURS.get(method, GREY), label=method)
        axes.legend(fontsize=8, frameon=False)
        _plain(axes, name, "step", "KL(p ‖ q) on validation rows, nats a token")
    return figure


def _plain(axes: Axes, title: str, x: str, y: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)


TEACHERS = {"teacher_0.2M": "0.2 M", "teacher_0.5M": "0.5 M", "teacher_1M": "1 M", "books": "3 M"}
RULED = ["books", *list(TEACHERS)[:3], "short", "long", "epochs_5", "epochs_20", "answers"]
PICTURES = {
    "frontier.png": partial(frontier, {"stories": 0.06, "instructions": 0.25, "books": 0.45, "answers": 0.3}),
    "teachers.png": partial(teachers, TEACHERS),
    "rules.png": partial(rules, RULED),
    "curves.png": partial(
        curves, ["books", "epochs_20"], ["sft", "forward_kl", "skew_forward_kl", "taid", "taid_auto"]
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if not check:
            path.write_text(with_tables(page), encoding="utf-8")
        elif with_tables(page) != page:
            sys.exit(f"{path}: a table is not that of its numbers: run figures.py")
    if check:
        return
    for name, draw in PICTURES.items():
        draw().savefig(DOCS / "pictures" / name, facecolor="white")


if __name__ == "__main__":
    main()
