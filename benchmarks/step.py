"""A whole training step: TAIDTrainer against what it cannot do without, and against its peers.

    python benchmarks/step.py [--rounds 3] [--dtype float32|bfloat16] [--out benchmarks/results/step.md]

The floor is two things that any distillation has to do: a step of TRL's SFTTrainer on the student, and one forward pass
of the teacher, trunk and head, without a gradient. Every method runs in fresh processes, in turn, on the same rows
and from the same weights (random: time does not depend on them): Llamas with 32,000 ids, all tokens trained.

Memory is the process's peak above what it held before the models were made, so weights, optimizer state and activations
count; that of the floor is the sum of its two parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

SIZES = {
    "cpu": {"rows": 8, "length": 256, "V": 32_000, "student": (512, 6), "teacher": (1024, 8)},
    "cuda": {"rows": 8, "length": 1024, "V": 151_936, "student": (1536, 12), "teacher": (3584, 16)},
    "tiny": {"rows": 2, "length": 16, "V": 500, "student": (32, 1), "teacher": (48, 1)},
}
METHODS = ("sft", "teacher", "taid", "taid, fused: false", "plain loop", "gkd")
STEPS, WARM_UP = 6, 2


# --- the methods: (student, teacher, rows, tokenizer, options) -> the seconds of the steps ---------------------------


class Stopwatch(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        _synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def _trained(trainer: Any) -> list[float]:
    stopwatch = Stopwatch()
    trainer.add_callback(stopwatch)
    trainer.train()
    return stopwatch.seconds


def sft(student: Any, teacher: Any, rows: Dataset, tokenizer: Any, options: dict[str, Any]) -> list[float]:
    return _trained(SFTTrainer(student, SFTConfig(**options), train_dataset=rows, processing_class=tokenizer))


def taid(student: Any, teacher: Any, rows: Dataset, tokenizer: Any, options: dict[str, Any], **own: Any) -> list[float]:
    from taid import TAIDConfig, TAIDTrainer

    return _trained(
        TAIDTrainer(
            student,
            teacher,
            TAIDConfig(**options, **own),
            train_dataset=rows,
            processing_class=tokenizer,
            teacher_processing_class=tokenizer,
        )
    )


def gkd(student: Any, teacher: Any, rows: Dataset, tokenizer: Any, options: dict[str, Any]) -> list[float]:
    """TRL's GKDTrainer with lmbda 0: off-policy, like all the others; beta 0.1 as in the paper's comparison."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")}
        ones = torch.ones_like(columns["input_ids"])
        half = {"prompts": columns["input_ids"][:, :1], "prompt_attention_mask": ones[:, :1]}
        return {**columns, **half, "attention_mask": ones}

    args = GKDConfig(**options, lmbda=0.0, beta=0.1)
    return _trained(GKDTrainer(student, teacher, args, collate, train_dataset=rows, processing_class=tokenizer))


def teacher_forward(student: Any, teacher: Any, rows: Dataset, *_: Any) -> list[float]:
    seconds = []
    with torch.no_grad():
        for ids, _labels in _batches(rows, teacher.device):
            start = _now()
            teacher(input_ids=ids, use_cache=False)
            seconds.append(_now() - start)
    return seconds


def plain_loop(student: Any, teacher: Any, rows: Dataset, *_: Any) -> list[float]:
    """TAID as the official code computes it: all logits, mixed in their own dtype, float32 softmaxes."""
    optimizer, t, seconds = torch.optim.AdamW(student.parameters(), lr=1e-5), 0.4, []
    student.train()
    for ids, labels in _batches(rows, teacher.device):
        start = _now()
        with torch.no_grad():
            z_p = teacher(input_ids=ids, use_cache=False).logits
        z_q = student(input_ids=ids, use_cache=False).logits
        p_t = F.softmax((1 - t) * z_q.detach() + t * z_p, dim=-1, dtype=torch.float32)
        cross_entropy = -(p_t * F.log_softmax(z_q, dim=-1, dtype=torch.float32)).sum(-1)
        mask = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
        ((cross_entropy * mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(_now() - start)
    return seconds


# --- one method in a process of its own -------------------------------------------------------------------------------


def run(method: str, size: dict[str, Any], dtype: str, folder: str) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = _memory(reset=True)
    torch.manual_seed(0)
    student = _model(size["V"], *size["student"], dtype) if method != "teacher" else None
    teacher = _model(size["V"], *size["teacher"], dtype).eval() if method != "sft" else None
    for model in (student, teacher):
        if model is not None:
            model.to(device)
    tokenizer = _tokenizer(size["V"])
    ids = torch.randint(1, size["V"], (size["rows"] * (STEPS + WARM_UP), size["length"])).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    options = {
        "output_dir": folder, "max_steps": STEPS + WARM_UP, "per_device_train_batch_size": size["rows"], "bf16": False,
        "learning_rate": 1e-5, "gradient_checkpointing": False, "logging_steps": STEPS, "save_strategy": "no",
        "report_to": "none", "use_cpu": device == "cpu", "disable_tqdm": True, "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True}, "optim": "adamw_torch",
    }  # fmt: skip
    if method in ("taid", "taid, fused: false"):
        del options["gradient_checkpointing"]
        options["activation_checkpointing"] = False
        seconds = taid(student, teacher, rows, tokenizer, options, fused=method == "taid")
    else:
        functions = {"sft": sft, "gkd": gkd, "teacher": teacher_forward, "plain loop": plain_loop}
        seconds = functions[method](student, teacher, rows, tokenizer, options)
    return {"seconds": statistics.median(seconds[WARM_UP:]), "bytes": _memory() - before}


def _model(V: int, width: int, layers: int, dtype: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=V, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 64), bos_token_id=0,
        eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def _tokenizer(V: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<eos>": 0} | {f"w{i}": i for i in range(1, V)}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", unk_token="<eos>")


def _batches(rows: Dataset, device: torch.device) -> Any:
    size = len(rows) // (STEPS + WARM_UP)
    for start in range(0, len(rows), size):
        ids = torch.tensor(rows[start : start + size]["input_ids"], device=device)
        yield ids, ids


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _now() -> float:
    _synchronize()
    return time.perf_counter()


def _memory(*, reset: bool = False) -> int:
    """The peak in bytes since the last reset: of resident memory on Linux, of the allocator on CUDA."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# --- all of them, in turn ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(SIZES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.method:
        with tempfile.TemporaryDirectory() as folder:
            result = run(args.method, size, args.dtype, folder)
        print("RESULT " + json.dumps(result))
        return

    results: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for number in range(args.rounds):
        for method in METHODS:
            command = [sys.executable, __file__, "--method", method, "--size", args.size, "--dtype", args.dtype]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{method} failed:\n{done.stderr[-3000:]}")
            results[method].append(json.loads(lines[0].removeprefix("RESULT ")))
            print(f"round {number + 1}: {method}: {results[method][-1]}", file=sys.stderr)
    table = _table(results, args)
    print(table)
    if args.out:
        args.out.write_text(table + "\n")


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if "model name" in line), platform.machine())


def _table(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    size = SIZES[args.size]
    parts = list(zip(results["sft"], results["teacher"], strict=True))
    floors = [{key: a[key] + b[key] for key in a} for a, b in parts]
    rows = {"floor: SFT step + teacher forward": floors} | results
    labels = {"sft": "of it: TRL's SFTTrainer", "teacher": "of it: teacher forward", "taid": "**TAIDTrainer**",
              "plain loop": "TAID by the plain formula, bare loop", "gkd": "TRL's GKDTrainer, lmbda 0",
              "taid, fused: false": "TAIDTrainer, fused: false"}  # fmt: skip
    lines = ["| a training step | s | x floor | MB | x floor |", "|---|---|---|---|---|"]
    for name, values in rows.items():
        pairs = list(zip(values, floors, strict=True))
        ratios = {key: statistics.median(value[key] / floor[key] for value, floor in pairs) for key in floors[0]}
        medians = {key: statistics.median(value[key] for value in values) for key in floors[0]}
        lines.append(
            f"| {labels.get(name, name)} | {medians['seconds']:.2f} | {ratios['seconds']:.3f} | "
            f"{medians['bytes'] / 2**20:,.0f} | {ratios['bytes']:.3f} |"
        )
    about = (
        f"{size['rows']} rows of {size['length']} tokens, V {size['V']:,}, student (width, layers) {size['student']}, "
        f"teacher {size['teacher']}, {args.dtype}; medians of {args.rounds} rounds in turn, {STEPS} steps each; ratios "
        f"within a round. {_machine()}, {torch.get_num_threads()} threads, glibc's allocator as it comes, torch "
        f"{torch.__version__}."
    )
    raw = json.dumps(results)
    command = f"`python benchmarks/step.py --rounds {args.rounds} --dtype {args.dtype}`"
    return "\n".join(["# A training step", "", about, "", *lines, "", command, "", f"<!-- {raw} -->"])


if __name__ == "__main__":
    main()
