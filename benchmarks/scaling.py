"""Count FLOPs and bytes of a run on 8 to 512 GPUs, and name what limits it: nothing here is measured.

    python benchmarks/scaling.py

A pair of Qwen2.5's shapes, 72B to 1.5B, with a micro-batch of 8,192 tokens a GPU and one micro-batch a step, in bf16.
What takes how long in a step, if nothing overlaps:

    student     6 N_student tokens / (40 % of 989 TFLOP/s)                     an H100 (SXM)
    teacher     2 N_teacher tokens / the same
    gather      2 bytes N_teacher / 300 GB/s within a machine of 8 (NVLink; 450 by the data sheet), where it is sharded;
                over several machines / 40 GB/s (a 400 Gb/s port a GPU; 50 by the data sheet)
    gradients   2 x 4 bytes N_student / 40 GB/s: DDP's all-reduce in float32; within one machine / 300 GB/s
    cache       bytes a token tokens GPUs / 20 GB/s of a shared file system

Products and what is sent overlap as far as the longer of them allows: a step takes max(student + teacher, gather +
gradients, cache). The table goes to benchmarks/results/scaling.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import Qwen2Config

from taid.planning.footprint import size
from taid.teachers.cache_format import Format

RESULTS = Path(__file__).parent / "results" / "scaling.md"
TOKENS, FLOPS = 8_192, 0.4 * 989e12
WITHIN, BETWEEN, FILES = 300e9, 40e9, 20e9
STUDENT = Qwen2Config(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
TEACHER = Qwen2Config(
    hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip
TEACHERS = ("sharded within a machine", "sharded over all machines", "cache, hidden", "cache, top_k", "cache, sampled")


def step(gpus: int, teacher: str) -> dict[str, float]:
    """Seconds of each part."""
    import torch

    small, large = size(STUDENT), size(TEACHER)
    between = WITHIN if gpus <= 8 else BETWEEN
    parts = {"student": 6 * small.used * TOKENS / FLOPS, "gradients": 8 * small.weights / between}
    name, _, detail = teacher.partition(", ")
    if name == "cache":
        format_ = Format(detail, TEACHER.hidden_size, torch.bfloat16, STUDENT.vocab_size, 64, 50)
        of_row = format_.bytes_per_token(12.0 if detail == "sampled" else None)
        head = 2 * TEACHER.vocab_size * TEACHER.hidden_size if detail == "hidden" else 0
        return parts | {"teacher": head * TOKENS / FLOPS, "cache": of_row * TOKENS * gpus / FILES}
    link = WITHIN if "within" in teacher else between
    return parts | {"teacher": 2 * large.used * TOKENS / FLOPS, "gather": 2 * large.weights / link}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    about = (__doc__ or "").partition("    python benchmarks/scaling.py\n\n")[2].rpartition(" The table goes")[0]
    columns = "teacher|GPUs|tokens a second|of one machine's, a GPU|student, ms|teacher|gather|gradients|cache|limit"
    lines = ["# What limits a run on many GPUs: planned, not measured", "", about, ""]
    lines += [f"| {columns.replace('|', ' | ')} |", "|---" * len(columns.split("|")) + "|"]
    for teacher in TEACHERS:
        first = 0.0
        for gpus in (8, 64, 512):
            parts = step(gpus, teacher)
            at = parts.get
            limits = {
                "compute": at("student", 0) + at("teacher", 0), "network": at("gather", 0) + at("gradients", 0),
                "file system": at("cache", 0),
            }  # fmt: skip
            limit, seconds = max(limits.items(), key=lambda item: item[1])
            each = TOKENS / seconds
            first = first or each
            shown = (f"{1e3 * at(n, 0):,.0f}" for n in ("student", "teacher", "gather", "gradients", "cache"))
            lines.append(
                f"| {teacher} | {gpus} | {gpus * each:,.0f} | {each / first:.2f} | {' | '.join(shown)} | {limit} |"
            )
    RESULTS.write_text("\n".join([*lines, "", "`python benchmarks/scaling.py`", ""]))
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
