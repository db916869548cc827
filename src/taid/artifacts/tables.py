"""What `taid evaluate` measured, as tables: one list of columns for the terminal and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Column = tuple[str, str, str]
"""A measure's key, its heading, and how its value is formatted."""

HELD_OUT: tuple[Column, ...] = (
    ("cross_entropy", "nats/token", "{:.4f}"), ("perplexity", "perplexity", "{:.4g}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"), ("kl", "KL to teacher", "{:.4f}"), ("accuracy", "accuracy", "{:.2%}"),
)  # fmt: skip
DISTRIBUTIONS: tuple[Column, ...] = (
    ("reverse_kl", "reverse KL", "{:.4f}"), ("agreement", "agreement", "{:.2%}"),
    ("head_mass", "head mass", "{:.4f}"), ("tail_mass", "tail mass", "{:.3g}"), ("entropy", "entropy", "{:.4f}"),
    ("calibration_error", "calibration error", "{:.4f}"),
)  # fmt: skip
ANSWERS: tuple[Column, ...] = (
    ("rouge_l", "ROUGE-L", "{:.4f}"), ("exact_match", "exact match", "{:.2%}"),
    ("answer_tokens", "tokens/answer", "{:.1f}"), ("finished", "finished", "{:.2%}"),
)  # fmt: skip
SAMPLES: tuple[Column, ...] = (
    *((f"distinct_{n}", f"distinct-{n}", "{:.4f}") for n in (1, 2, 3, 4)), ("self_bleu", "self-BLEU", "{:.4f}"),
    ("sample_tokens", "tokens/sample", "{:.1f}"), ("generation_loss", "generation loss", "{:.4f}"),
)  # fmt: skip
_SIZES: tuple[Column, ...] = (("tokens", "tokens", "{:,}"), ("bytes", "bytes", "{:,}"))
_IMAGES: tuple[Column, ...] = (("others_images", "nats/token, others' images", "{:.4f}"),)


def cells(columns: Sequence[Column], of: dict[str, Any]) -> list[str]:
    """The values of one model; empty where it has none, as in a file of an earlier version."""
    return ["" if of.get(key) is None else form.format(of[key]) for key, _, form in columns]


def has_any(columns: Sequence[Column], found: dict[str, dict[str, Any]]) -> bool:
    """Whether some model has a value."""
    return any(of.get(key) is not None for of in found.values() for key, _, _ in columns)


def held_out_tables(found: dict[str, dict[str, Any]]) -> list[Table]:
    """Measures by model: of the text, and of the distributions."""
    columns = HELD_OUT + _SIZES + (_IMAGES if has_any(_IMAGES, found) else ())
    tables = [_table("Held out", columns, found), _table("Distributions on held-out tokens", DISTRIBUTIONS, found)]
    if fewer := found.get("teacher", {}).get("quantized"):
        loss, change = fewer["cross_entropy"], fewer["change"]
        tables[0].caption_justify = "left"
        tables[0].caption = (
            f"Teacher in {fewer['name']}: {loss - change:.4f} -> {loss:.4f} nats/token ({change:+.4f}),\n"
            f"KL {fewer['kl']:.4f} from the teacher as it is, the same likeliest token {fewer['agreement']:.2%}"
        )
    return tables


def generation_tables(found: dict[str, dict[str, Any]]) -> list[Table]:
    """What answers are worth by model: the greedy ones, and the samples where there are some."""
    of = next(iter(found.values()))
    tables = [_table(f"Greedy answers to {of['prompts']} prompts", ANSWERS, found)]
    if of["samples"]:
        tables.append(_table(f"Samples, {of['samples']} a prompt at temperature 1", SAMPLES, found))
    return tables


def _table(title: str, columns: Sequence[Column], found: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for name, of in found.items():
        table.add_row(name, *cells(columns, of))
    return table
