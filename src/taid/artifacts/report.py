"""The run report: a run folder in, one page and two pictures out.

Reads `config.yaml`, `versions.json`, `metrics.jsonl` and `evaluation.json`, nothing else: no torch, no model, and a run
that is still writing can be reported at any time. A row is one step's finite numbers; a series is one quantity over
the steps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from taid.artifacts.plots import BLUE, BOLD, GREEN, INK, MUTED, VERMILLION, Line, Plot, Series, draw, panels, png_of
from taid.artifacts.run_folder import (
    CONFIG,
    EVALUATION,
    METRICS,
    VERSIONS,
    read_mapping,
    read_metrics,
    write_atomically,
)
from taid.artifacts.tables import duration, task_table
from taid.losses.objective_table import OBJECTIVES
from taid.losses.schedules import AutoSchedule, TAIDSchedule, auto_alpha

_OF_PAPER = [name for name in OBJECTIVES["taid"].schedule_options if name != "taid_schedule"]
IMPORTANT = (
    f"objective taid_schedule {' '.join(_OF_PAPER)} kd_ratio sampling "
    "model_name_or_path teacher_model_name_or_path teacher_cache teacher_cache_format teacher_server_url dataset_name "
    "eval_dataset_name learning_rate max_steps num_train_epochs "
    "per_device_train_batch_size gradient_accumulation_steps max_length seed output_dir"
).split()
_HELD_OUT = (
    "loss",
    "cross_entropy",
    "kl",
    "teacher_cross_entropy",
    "entropy",
    "mean_token_accuracy",
    "tokens",
    "aux_loss",
)
# Lazy, so that eval_teacher_cross_entropy is the teacher's cross-entropy and not that of a set named "teacher".
_HELD_OUT_KEY = re.compile(rf"(eval_(?:.+?_)??)({'|'.join(_HELD_OUT)})")


def write_report(run_dir: Path) -> Path:
    """Write `report.html`, `loss.png` and, for TAID, `t.png` into a run folder, from the files it holds.

    The page stands alone: pictures are inside it, it loads nothing and runs nothing. Each file is replaced whole.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks `config.yaml` or `metrics.jsonl`.
        ValueError: no training step is logged yet, or a file is broken; the message names it.
    """
    run = read_run(run_dir)
    plots = [_plot_t(run)] if run.objective == "taid" and run.series("t") else []
    plots += [_plot_training(run), *_plot_held_out(run), *_plot_optimizer(run)]
    for plot in plots:
        if plot.file is not None:
            write_atomically(run_dir / plot.file, plot.png)
    page = run_dir / "report.html"
    write_atomically(page, _page(run, plots))
    return page


@dataclass(frozen=True)
class Run:
    """The contents of a run folder.

    Attributes:
        config: config.yaml.
        versions: versions.json, empty where it is missing.
        evaluation: evaluation.json, likewise.
        rows: the finite numbers of metrics.jsonl by step, of training and evaluation in one.
        not_finite: the number of values that were NaN or infinite.
    """

    config: dict[str, Any]
    versions: dict[str, Any]
    evaluation: dict[str, Any]
    rows: dict[int, dict[str, float]]
    not_finite: int

    def series(self, key: str) -> Series:
        """One quantity over the steps."""
        return [(step, row[key]) for step, row in self.rows.items() if key in row]

    @property
    def objective(self) -> str:
        """The name of the objective."""
        return str(self.config["objective"])

    @property
    def objective_title(self) -> str:
        """The objective in words; a function of the user's own has only its name."""
        known = OBJECTIVES.get(self.objective)
        return known.title if known else self.objective

    @property
    def student(self) -> str:
        """The name of the student."""
        return _short(str(self.config.get("model_name_or_path") or "the student"))

    @property
    def teacher(self) -> str:
        """The name of the teacher: a model, a cache or a server."""
        sources = ("teacher_model_name_or_path", "teacher_cache", "teacher_server_url")
        return _short(str(next((self.config[key] for key in sources if self.config.get(key)), "a teacher")))

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max(self.rows)

    @property
    def total_steps(self) -> int | None:
        """N; None where neither versions.json nor the configuration tells."""
        told = (self.versions.get("total_steps"), self.config.get("max_steps"))
        return next((value for value in told if isinstance(value, int) and value > 0), None)

    @property
    def important(self) -> list[str]:
        """The settings that tell most, without those that had no effect."""
        unused = _OF_PAPER if self.config.get("taid_schedule") == "auto" else []
        return [name for name in IMPORTANT if name in self.config and name not in unused]

    @property
    def held_out(self) -> dict[str, str]:
        """The evaluation sets: name ("" for a single unnamed one) -> prefix of its keys."""
        matches = [_HELD_OUT_KEY.fullmatch(key) for row in self.rows.values() for key in row]
        prefixes = dict.fromkeys(m[1] for m in matches if m and m[2] in ("loss", "cross_entropy", "kl"))
        return {prefix.removeprefix("eval_").removesuffix("_"): prefix for prefix in prefixes}

    @property
    def schedule(self) -> TAIDSchedule | AutoSchedule | None:
        """The schedule of t that the configuration describes; None while N is unknown."""
        if self.total_steps is None:
            return None
        if self.config.get("taid_schedule") == "auto":
            return AutoSchedule(self.total_steps)
        given = {name: self.config.get(f"taid_{name}") for name in ("t_start", "t_end", "alpha", "beta", "adaptive")}
        if given["alpha"] == "auto":
            given["alpha"] = auto_alpha(self.total_steps)
        return TAIDSchedule(self.total_steps, **{name: value for name, value in given.items() if value is not None})


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: there is none, or it lacks `config.yaml` or `metrics.jsonl`.
        ValueError: no training step is logged yet, or a file is broken; names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the output_dir of a run")
    for name in (CONFIG, METRICS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no run folder, it has no {name}: give the output_dir of a run")
    config = read_mapping(folder / CONFIG, yaml.safe_load)
    if not isinstance(config.get("objective"), str):
        raise ValueError(f"{folder / CONFIG} names no objective: give the output_dir of a run of taid")
    versions, evaluation = read_mapping(folder / VERSIONS), read_mapping(folder / EVALUATION)
    rows, not_finite = _read_rows(folder)
    if not any(key in row for row in rows.values() for key in ("loss", "kl", "cross_entropy")):
        raise ValueError(f"{folder / METRICS} holds no training step yet: wait for the first (every logging_steps)")
    return Run(config, versions, evaluation, rows, not_finite)


def _read_rows(folder: Path) -> tuple[dict[int, dict[str, float]], int]:
    """Return rows by step, of training and evaluation in one, and the number of NaN or infinite values left out."""
    rows: dict[int, dict[str, float]] = {}
    not_finite = 0
    for record in read_metrics(folder):
        numbers = {key: float(value) for key, value in record.items() if type(value) in (int, float)}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        not_finite += len(numbers) - len(finite)
        if "step" in finite:
            rows.setdefault(int(finite["step"]), {}).update(finite)
    return rows, not_finite


def _short(name: str) -> str:
    """Return a Hub name as it is, of a path only the folder's name."""
    return Path(name).name if name.startswith(("/", "./", "../", "~")) else name


def opening(run: Run) -> str:
    """Return one sentence: what was distilled into what, in how many steps, and the outcome."""
    finished = run.total_steps is None or run.last_step >= run.total_steps
    method = run.objective_title
    if run.objective == "sft":
        what = f"{method} {'trained' if finished else 'was training'} {run.student}"
    else:
        what = f"{method} {'distilled' if finished else 'was distilling'} {run.teacher} into {run.student}"
    if finished:
        what += f" in {run.last_step:,} step{'s' * (run.last_step != 1)}"
    else:
        what += f" and has stopped at step {run.last_step:,} of {run.total_steps:,} (unfinished or still running)"
    if seconds := run.series("seconds"):
        what += f" {'and' if finished else 'after'} {duration(seconds[-1][1])}"
    return f"{what}: {'; '.join(_outcome(run))}."


def _outcome(run: Run) -> list[str]:
    """Return the clauses on the outcome: of the first evaluation set, or of training where there is none."""
    name, prefix = next(iter(run.held_out.items()), ("", ""))
    student, kl = run.series(f"{prefix}cross_entropy"), run.series(f"{prefix}kl")
    where = f"held-out cross-entropy{f' on {name}' if name else ''}" if prefix else "training cross-entropy"
    clauses = [_change(where, student) + _gap(run, prefix, student)] if student else []
    clauses += [_change("the KL to the teacher", kl)] if kl else []
    if not prefix:
        clauses = clauses or [_change("the training loss", run.series("loss"))]
        clauses.append("nothing was held out to evaluate")
    return clauses or [_change("the held-out loss", run.series(f"{prefix}loss"))]


def _change(what: str, series: Series) -> str:
    (first_step, first), (last_step, last) = series[0], series[-1]
    if len(series) == 1:
        return f"{what} is {last:.3f} nats per token at step {last_step:,}, its only measurement"
    start = f"{first:.3f} at step {first_step:,}" if first_step else f"{first:.3f}"
    if f"{first:.3f}" == f"{last:.3f}":
        return f"{what} stayed at {last:.3f} nats per token"
    return f"{what} {'fell' if last < first else 'rose'} from {start} to {last:.3f} nats per token"


def _gap(run: Run, prefix: str, student: Series) -> str:
    """Return the share of the gap to the teacher that was closed: (start - end) / (start - teacher)."""
    teachers = run.series(f"{prefix}teacher_cross_entropy") if prefix else []
    if not teachers:
        return ""
    start, end, teacher = student[0][1], student[-1][1], teachers[-1][1]
    if len(student) == 1 or start <= teacher:
        return f" (the teacher's is {teacher:.3f})"
    share = (start - end) / (start - teacher)
    percent = f"{abs(share):.0%}" if abs(share) >= 0.1 else f"{abs(share):.1%}"
    if share < 0:
        return f", which moved away from the teacher ({teacher:.3f}) by {percent} of the gap"
    return f", which closed {percent} of the gap to the teacher ({teacher:.3f})"


def _plot_t(run: Run) -> Plot:
    t, schedule = run.series("t"), run.schedule
    figure, (axes,) = panels(["t"], run.total_steps or run.last_step)
    lines = [Line(t, BLUE, f"t {t[-1][1]:.2f}")]
    alt, caption = f"t over the training steps: {_from_to(t)}", ""
    if isinstance(schedule, AutoSchedule):
        alt += f"; at most {max(value for _, value in t):.4g}"
        caption = f"As configured, {schedule.regime()} The first step is at 1, to measure how far that is."
    elif schedule is not None:
        # The row of step k holds the t that was used in it, t_{k-1}, whose floor is that of step k - 2.
        floor = [(step, schedule.linear(max(step - 2, 0))) for step in (0, 2, schedule.total_steps)]
        lines.append(Line(floor, MUTED, "", dashed=True))
        # t is never below its floor, so there is room for the name.
        late = 3 * schedule.total_steps // 4
        axes.annotate(
            "linear floor",
            (late, schedule.linear(max(late - 2, 0))),
            xytext=(8, -14),
            textcoords="offset points",
            color=MUTED,
            **BOLD,
        )
        under = [schedule.linear(max(step - 2, 0)) for step, _ in t]
        ahead = [max(value, low) for (_, value), low in zip(t, under, strict=True)]
        axes.fill_between([step for step, _ in t], under, ahead, color=BLUE, alpha=0.14, linewidth=0)
        alt += f"; the linear floor rises from {floor[0][1]:g} to {schedule.t_end:g}"
        caption = f"As configured, {schedule.regime()} Dashed: the linear floor. Shaded: how far t is ahead of it."
    draw(axes, lines, smooth=False)
    return Plot("t: 0 is the student, 1 the teacher", f"{alt}.", caption, png_of(figure), "t.png")


def _plot_training(run: Run) -> Plot:
    kinds = (
        ("loss", "loss", BLUE),
        ("kl", "KL to the teacher", VERMILLION),
        ("cross_entropy", "cross-entropy", GREEN),
    )
    lines = [Line(series, colour, words) for key, words, colour in kinds if (series := run.series(key))]
    figure, (axes,) = panels(["nats per token"], run.last_step)
    window = draw(axes, lines, from_zero=True)
    notes = [f"Lines are running means over {window} logged steps; pale, every logged value."] if window > 1 else []
    if run.not_finite:
        notes.append(f"{run.not_finite:,} logged values were not finite numbers and are left out of this page.")
    alt = f"Training losses over the steps: {'; '.join(f'{line.label} {_from_to(line.series)}' for line in lines)}."
    return Plot("Training", alt, " ".join(notes), png_of(figure), "loss.png")


def _plot_held_out(run: Run) -> list[Plot]:
    """Draw one picture an evaluation set: cross-entropy beside the teacher's, and below it the KL to the teacher."""
    plots = []
    for name, prefix in run.held_out.items():
        student, kl = run.series(f"{prefix}cross_entropy"), run.series(f"{prefix}kl")
        present = [words for words, series in (("cross-entropy", student), ("KL to the teacher", kl)) if series]
        if not present:
            continue
        figure, axes = panels([f"{words}\nnats per token" for words in present], run.last_step, height=2.4)
        alt = []
        if student:
            lines = [Line(student, GREEN, f"student {student[-1][1]:.3f}")]
            alt.append(f"the student's cross-entropy {_from_to(student)}")
            if teacher := run.series(f"{prefix}teacher_cross_entropy"):
                level = teacher[-1][1]
                ends = [(0, level), (run.last_step, level)]
                lines.append(Line(ends, MUTED, f"teacher {level:.3f}", dashed=True))
                alt.append(f"the teacher's is {level:.3f}")
            draw(axes[0], lines, smooth=False)
        if kl:
            draw(axes[-1], [Line(kl, VERMILLION, f"{kl[-1][1]:.3f}")], smooth=False, from_zero=True)
            alt.append(f"the KL to the teacher {_from_to(kl)}")
        title = f"Held out: {name}" if name else "Held out"
        plots.append(Plot(title, f"Held-out curves over the steps: {'; '.join(alt)}.", "", png_of(figure)))
    return plots


def _plot_optimizer(run: Run) -> list[Plot]:
    kinds = [("grad_norm", "gradient norm"), ("learning_rate", "learning rate")]
    present = [(words, series) for key, words in kinds if (series := run.series(key))]
    if not present:
        return []
    figure, all_axes = panels([words for words, _ in present], run.last_step, height=1.35)
    for axes, (words, series) in zip(all_axes, present, strict=True):
        draw(axes, [Line(series, INK, "")], smooth=words == "gradient norm", from_zero=True)
    alt = "; ".join(f"{words} {_from_to(series)}" for words, series in present)
    return [Plot("Gradient norm and learning rate", f"Over the steps: {alt}.", "", png_of(figure))]


def _from_to(series: Series) -> str:
    (first_step, first), (last_step, last) = series[0], series[-1]
    return f"from {first:.4g} at step {first_step:,} to {last:.4g} at step {last_step:,}"


def render(template: str, **values: Any) -> str:
    """Fill one of the package's page templates."""
    # Without autoescape the name of a model or of a data set could put markup into the page.
    environment = Environment(
        loader=PackageLoader("taid", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)


def _page(run: Run, plots: list[Plot]) -> str:
    models = run.student if run.objective == "sft" else f"{run.student} ← {run.teacher}"
    columns, values = _last_values(run)
    return render(
        "report.html.j2",
        title=f"{run.objective_title}: {models}",
        opening=opening(run),
        plots=plots,
        columns=columns,
        values=values,
        tasks=task_table(found) if (found := run.evaluation.get("tasks")) else None,
        important=[(name, _plain(run.config[name])) for name in run.important],
        config=[(name, _plain(value)) for name, value in run.config.items()],
        versions=[(name, _plain(value)) for name, value in run.versions.items()] or [(VERSIONS, "unknown")],
    )


# Key in metrics.jsonl, words, format, unit.
_QUANTITIES: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("step", "step", "{:,.0f}".format, "optimizer steps"),
    ("epoch", "epoch", "{:.4g}".format, "passes over the data"),
    ("loss", "loss", "{:.4f}".format, "nats per token"),
    ("kl", "KL to the teacher", "{:.4f}".format, "nats per token"),
    ("cross_entropy", "cross-entropy", "{:.4f}".format, "nats per token"),
    ("teacher_cross_entropy", "the teacher's cross-entropy", "{:.4f}".format, "nats per token"),
    ("entropy", "entropy", "{:.4f}".format, "nats per token"),
    ("mean_token_accuracy", "token accuracy", "{:.1%}".format, "share of tokens"),
    ("tokens", "evaluated on", "{:,.0f}".format, "tokens"),
    ("t", "t", "{:.4f}".format, "0 student, 1 teacher"),
    ("momentum", "momentum of t", "{:.2e}".format, "relative fall of the loss per step"),
    ("sampled", "answers of the student", "{:.0%}".format, "share of micro-batches"),
    ("sampling_threshold", "threshold of sampling", "{:.1f}".format, "share of micro-batches"),
    ("learning_rate", "learning rate", "{:.3g}".format, ""),
    ("grad_norm", "gradient norm", "{:.3g}".format, ""),
    ("num_tokens", "trained on", "{:,.0f}".format, "tokens"),
    ("tokens_per_second", "speed", "{:,.0f}".format, "tokens per second"),
    ("seconds", "wall time", duration, ""),
)


def _last_values(run: Run) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the table's columns (training, each evaluation set) and a row for each quantity that has a value."""
    prefixes = {"training": ""} | {f"held out {name}".strip(): prefix for name, prefix in run.held_out.items()}
    rows = []
    for key, words, form, unit in _QUANTITIES:
        found = [run.series(prefix + key) if not prefix or key in _HELD_OUT else [] for prefix in prefixes.values()]
        if any(found):
            cells = [form(series[-1][1]) if series else "" for series in found]
            rows.append({"words": words, "cells": cells, "unit": unit})
    return list(prefixes), rows


def _plain(value: Any) -> str:
    """Return a setting as YAML would show it, on one line."""
    if value is None or isinstance(value, bool | dict | list):
        return json.dumps(value, default=str)
    return str(value)
