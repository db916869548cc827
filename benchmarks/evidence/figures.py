"""Tables and pictures of docs/evidence.md, made of the numbers beside this file.

    python benchmarks/evidence/figures.py            # writes both
    python benchmarks/evidence/figures.py --check    # says whether the tables are those of the numbers

A table stands between `<!-- table NAME MEASURE ... -->` and `<!-- end -->`, and is that of NAME.json. `cross_entropy-`
is the difference of cross_entropy to the baseline, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from taid.standings import MEASURES, Interval

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PAGE = DOCS / "evidence.md"
BLOCK = re.compile(r"(<!-- table (\S+) (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
COLOURS = {"taid": "#c2410c", "taid_linear": "#ea580c", "taid_sampled": "#fb923c", "forward_kl": "#111827"}


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def table(name: str, measures: list[str]) -> str:
    """Methods from the lowest cross-entropy on, then the student before and the teacher."""
    found = read(name)
    methods = dict(sorted(found["methods"].items(), key=lambda item: item[1]["measures"]["cross_entropy"]["mean"]))
    head = ["method", "rate"]
    for measure in measures:
        words, _, _ = MEASURES[measure.rstrip("-")]
        head.append(f"less {found['baseline']}'s" if measure.endswith("-") else words)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method, of in methods.items():
        cells = [f"`{method}`", "" if of["learning_rate"] is None else f"{of['learning_rate']:g}"]
        for measure in measures:
            kind = of["differences"] if measure.endswith("-") else of["measures"]
            cells.append(_text(kind.get(measure.rstrip("-")), measure))
        lines.append(f"| {' | '.join(cells)} |")
    for model, of in found.get("beside", {}).items():
        numbers = of["held_out"] | of.get("generations", {})
        cells = [f"({model})", ""]
        cells += [_text({"mean": numbers.get(measure), "half_width_95": None}, measure) for measure in measures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _text(interval: dict[str, float] | None, measure: str) -> str:
    if interval is None or interval["mean"] is None:
        return ""
    is_difference, digits = measure.endswith("-"), MEASURES[measure.rstrip("-")][1]
    return Interval(interval["mean"], interval["half_width_95"]).text(digits, sign=is_difference)


def with_tables(page: str) -> str:
    """The page with each table made anew."""
    return BLOCK.sub(lambda found: found[1] + table(found[2], found[3].split()) + found[4], page)


def frontier(settings: dict[str, float]) -> Figure:
    """What each method gives up of KL(p || q) for KL(q || p), beside forward KL; who gives up more is left out."""
    figure = Figure(figsize=(5.2 * len(settings), 4.4), dpi=150, layout="constrained")
    for (name, most), axes in zip(settings.items(), figure.subplots(1, len(settings), squeeze=False)[0], strict=True):
        found = read(name)
        axes.axhline(0, color="#d1d5db", linewidth=0.8)
        axes.axvline(0, color="#d1d5db", linewidth=0.8)
        for method, of in found["methods"].items():
            x, y = (of["differences"].get(m, {"mean": 0.0, "half_width_95": 0.0}) for m in ("kl", "reverse_kl"))
            if x["mean"] > most:
                continue
            colour = COLOURS.get(method, "#6b7280")
            halves = {"xerr": x["half_width_95"], "yerr": y["half_width_95"]}
            axes.errorbar(x["mean"], y["mean"], **halves, fmt="o", color=colour, markersize=4)
            axes.annotate(method, (x["mean"], y["mean"]), (4, 4), textcoords="offset points", color=colour, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("KL(p ‖ q) less forward KL's, nats a token", fontsize=9)
        axes.set_ylabel("KL(q ‖ p) less forward KL's", fontsize=9)
        axes.tick_params(labelsize=8)
    return figure


PICTURES = {"frontier.png": partial(frontier, {"stories": 0.06, "instructions": 0.25})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    if parser.parse_args().check:
        sys.exit(0 if with_tables(page) == page else f"{PAGE}: a table is not that of its numbers: run figures.py")
    PAGE.write_text(with_tables(page), encoding="utf-8")
    for name, draw in PICTURES.items():
        draw().savefig(DOCS / "pictures" / name, facecolor="white")


if __name__ == "__main__":
    main()
