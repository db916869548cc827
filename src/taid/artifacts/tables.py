"""All tables, of numbers that come in as dictionaries: for a terminal by rich, for Markdown, for HTML by parts.html.j2.

Markdown is written here and not by ``rich.box.MARKDOWN``, which pads cells to the width of a terminal, does not escape
a ``|`` and does not align numbers to the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: the headings.
        rows: the cells of each row.
        title: stands above it on a terminal.
        notes: stand below it, each on a line of its own.
        texts: the number of first columns that hold words; the others hold numbers and are aligned to the right.
        is_wide: on a terminal, units and what stands in parentheses get lines of their own.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    notes: Sequence[str] = ()
    texts: int = 1
    is_wide: bool = False

    def terminal(self) -> RichTable:
        """Return what rich prints."""
        shown = RichTable(
            title=self.title, title_justify="left", caption_justify="left",
            box=box.SIMPLE if self.is_wide else box.HEAVY_HEAD, caption=escape("\n".join(self.notes)) or None,
        )  # fmt: skip
        for place, heading in enumerate(self.head):
            heading = heading.replace(", ", "\n") if self.is_wide else heading
            is_text = place < self.texts
            shown.add_column(escape(heading), justify="left" if is_text else "right", no_wrap=is_text and self.is_wide)
        for row in self.rows:
            shown.add_row(*(escape(cell.replace(" (", "\n(") if self.is_wide else cell) for cell in row))
        return shown

    def markdown(self) -> str:
        """Return the table, and its notes as a paragraph each."""
        lines = [
            _line(self.head),
            "|---" * self.texts + "|---:" * (len(self.head) - self.texts) + "|",
            *map(_line, self.rows),
        ]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", note))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# --- what taid evaluate measured --------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A measure's key, its heading, and how its value is formatted."""

    key: str
    heading: str
    form: str


HELD_OUT = (
    Column("cross_entropy", "nats/token", "{:.4f}"), Column("perplexity", "perplexity", "{:.4g}"),
    Column("bits_per_byte", "bits/byte", "{:.4f}"), Column("kl", "KL to teacher", "{:.4f}"),
    Column("accuracy", "accuracy", "{:.2%}"),
)  # fmt: skip
DISTRIBUTIONS = (
    Column("reverse_kl", "reverse KL", "{:.4f}"), Column("agreement", "agreement", "{:.2%}"),
    Column("head_mass", "head mass", "{:.4f}"), Column("tail_mass", "tail mass", "{:.3g}"),
    Column("entropy", "entropy", "{:.4f}"), Column("calibration_error", "calibration error", "{:.4f}"),
)  # fmt: skip
ANSWERS = (
    Column("rouge_l", "ROUGE-L", "{:.4f}"), Column("exact_match", "exact match", "{:.2%}"),
    Column("answer_tokens", "tokens/answer", "{:.1f}"), Column("finished", "finished", "{:.2%}"),
)  # fmt: skip
SAMPLES = (
    *(Column(f"distinct_{n}", f"distinct-{n}", "{:.4f}") for n in (1, 2, 3, 4)),
    Column("self_bleu", "self-BLEU", "{:.4f}"), Column("sample_tokens", "tokens/sample", "{:.1f}"),
    Column("generation_loss", "generation loss", "{:.4f}"),
)  # fmt: skip
_SIZES = (Column("tokens", "tokens", "{:,}"), Column("bytes", "bytes", "{:,}"))
_IMAGES = (Column("others_images", "nats/token, others' images", "{:.4f}"),)


def formatted(value: Any, form: str = "{}") -> str:
    """Return a value as a cell; an empty one for None."""
    return "" if value is None else form.format(value)


def measures(
    columns: Sequence[Column], models: dict[str, dict[str, Any]], title: str | None = None, notes: Sequence[str] = ()
) -> Table:
    """Return measures by model; cells are empty where a model has none, as in a file of an earlier version."""
    rows = [[name, *(formatted(of.get(key), form) for key, _, form in columns)] for name, of in models.items()]
    return Table(["", *(column.heading for column in columns)], rows, title, notes)


def has_any(columns: Sequence[Column], models: dict[str, dict[str, Any]]) -> bool:
    """Return whether some model has a value."""
    return any(of.get(column.key) is not None for of in models.values() for column in columns)


def held_out_tables(models: dict[str, dict[str, Any]]) -> list[Table]:
    """Return the measures of held-out text and those of the distributions, by model."""
    columns = HELD_OUT + _SIZES + (_IMAGES if has_any(_IMAGES, models) else ())
    notes = []
    if quantized := models.get("teacher", {}).get("quantized"):
        loss, change, agreement = quantized["cross_entropy"], quantized["change"], quantized["agreement"]
        notes = [
            f"Teacher in {quantized['name']}: {loss - change:.4f} -> {loss:.4f} nats/token ({change:+.4f}),",
            f"KL {quantized['kl']:.4f} from the teacher as it is, the same likeliest token {agreement:.2%}",
        ]
    return [
        measures(columns, models, "Held out", notes),
        measures(DISTRIBUTIONS, models, "Distributions on held-out tokens"),
    ]


def generation_tables(models: dict[str, dict[str, Any]]) -> list[Table]:
    """Return the measures of greedy answers and, where there are some, of samples, by model."""
    first = next(iter(models.values()))
    shown = [measures(ANSWERS, models, f"Greedy answers to {first['prompts']} prompts")]
    if first["samples"]:
        shown.append(measures(SAMPLES, models, f"Samples, {first['samples']} a prompt at temperature 1"))
    return shown


def task_table(metrics: Sequence[dict[str, Any]]) -> Table:
    """Return the metrics of benchmark tasks."""
    rows = []
    for row in metrics:
        kind = row.get("filter", "none")
        metric = row["metric"] if kind == "none" else f"{row['metric']} ({kind})"
        shots, value, error = row["n_shot"], row["value"], row["stderr"]
        rows.append([row["task"], metric, formatted(shots), f"{value:.4f}", formatted(error, "{:.4f}")])
    head = ["task (lm-eval)", "metric", "shots", "value", "± stderr"]
    return Table(head, rows, "Benchmark tasks", texts=2)


def grade_table(grades: dict[str, Any]) -> Table:
    """Return a judge's mean grades: over all answers, by turn and by category."""
    means = {"all": grades["score"]} | {f"turn {turn}": mean for turn, mean in grades["by_turn"].items()}
    rows = [[name, formatted(mean, "{:.2f}")] for name, mean in (means | grades["by_category"]).items()]
    note = f"{grades['graded']} answers graded, {grades['ungraded']} without a grade; {grades['file']}"
    return Table(["", "mean"], rows, f"Grades by {grades['judge_model']}, 1 to 10", [note])


# --- size and speed ---------------------------------------------------------------------------------------------------

# Keys, headings with units, and by what a figure is divided.
SPEED = (
    ("parameters", "parameters, M", 1e6),
    ("parameters_without_embeddings", "without embeddings, M", 1e6),
    ("disk_bytes", "on disk, MB", 1e6),
    ("weight_bytes", "weights, MB", 1e6),
    ("memory_bytes", "memory, MB", 1e6),
    ("model_memory_bytes", "of it the model, MB", 1e6),
    ("first_token_seconds", "first token, ms", 1e-3),
    ("tokens_per_second", "tokens/s", 1.0),
)


def ratio(row: dict[str, Any], rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Return a figure as a multiple of the teacher's; None without a teacher or where either has no such figure."""
    teacher = next((other for other in rows if other["name"] == "teacher"), {})
    if row is teacher or not teacher.get(name) or row.get(name) is None:
        return None
    return float(row[name]) / float(teacher[name])


def speed_table(found: dict[str, Any]) -> Table:
    """Return sizes, memory and speed by model, as :func:`taid.evaluation.inference_speed.measure` found them."""
    machine, rows = found["machine"], found["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = "resident memory" if machine["device"] == "cpu" else "torch's allocations"
    rounds = len(next(row for row in rows if "rounds" in row)["rounds"]["tokens_per_second"])
    notes = [f"{row['name']}: not available: {row['not_available']}" for row in rows if "not_available" in row]
    notes.append(
        f"One sequence, greedy: {found['prompt_tokens']} prompt tokens, then {found['new_tokens']} new ones; medians "
        f"of {rounds} rounds, each in a new process, the models by turns; (x) is the multiple of the teacher's. Memory "
        f"is the peak of {memory}. {machine['name']}, {machine['dtype']}, {machine['threads']} threads, {versions}."
    )
    cells = [[row["name"], *_speed_cells(row, rows)] for row in rows]
    return Table(["", *(heading for _, heading, _ in SPEED)], cells, "Size and speed", notes, is_wide=True)


def _speed_cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    if "not_available" in row:
        return ["not available", *[""] * (len(SPEED) - 1)]
    cells = []
    for name, _, unit in SPEED:
        value, times = row.get(name), ratio(row, rows, name)
        shown = "" if value is None else f"{value / unit:,.4g}" if value / unit < 1000 else f"{value / unit:,.0f}"
        cells.append(shown if times is None else f"{shown} ({times:.2f}x)")
    return cells


def duration(seconds: float) -> str:
    """Return a time in words: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if round(seconds) < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
