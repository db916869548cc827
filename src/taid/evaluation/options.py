"""The options of ``taid evaluate``, and the mistakes in them that can be seen before torch is imported."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from taid.artifacts.run_folder import EVALUATION

MARK = "taid_evaluation"  # the key by which an evaluation's file is known


def add_options(parser: ArgumentParser) -> None:
    """Add the arguments of ``taid evaluate`` to its parser."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with safetensors (also of an adapter) or a Hub name")
    add("--teacher", metavar="MODEL", help="gives the KL to it, agreement with it, and its own row")
    add("--student_only", action="store_true", help="no row of the teacher's own, which takes as long as another")
    add("--teacher_quantization", choices=("bnb_8bit", "bnb_4bit", "torchao_int8", "torchao_int4", "fp8"),
        help="also load the teacher in these bits, as in training, and say what that changes of it")  # fmt: skip
    add("--before", metavar="MODEL", help="the student before training, for a row of its own")
    add("--data", metavar="NAME", help="held-out rows: a file, glob, folder or Hub name, as dataset_name")
    add("--dataset_config", metavar="NAME", help="configuration of a Hub data set")
    add("--split", default="test", help="split of a Hub data set or folder (default: %(default)s)")
    add("--dataset_text_field", default="text", metavar="NAME", help="the column of plain text (default: %(default)s)")
    add("--generate", type=int, metavar="N", help="also answer the first N held-out rows with a prompt: ROUGE-L, exact "
        "match, and the variety of samples")  # fmt: skip
    add("--samples", type=int, default=4, metavar="K", help="answers drawn to each prompt of --generate at temperature "
        "1; 0 for greedy answers alone (default: %(default)s)")  # fmt: skip
    add("--max_length", type=int, default=1024, metavar="N", help="rows are cut to N tokens (default: %(default)s)")
    add("--assistant_only_loss", action="store_true", help="in chats only the assistant's tokens count")
    add("--chat_template_path", metavar="FILE", help="a chat template for a tokenizer without one")
    add("--batch_size", type=int, default=8, metavar="N", help="rows, or requests of a task (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of all models; auto is that of each checkpoint (default: %(default)s)")  # fmt: skip
    add("--use_cpu", action="store_true", help="even where there is a GPU")
    add("--tasks", metavar="A,B", help="tasks of lm-eval, comma-separated; taid-paper is the paper's set")
    add("--num_fewshot", type=int, metavar="N", help="examples before each question, where a task leaves it open")
    add("--limit", type=float, metavar="N", help="only the first N questions of a task, for trying it out")
    add("--include_path", metavar="DIR", help="a folder with task files of your own")
    add("--judge_url", metavar="URL", help="a server with the OpenAI API, which grades answers; its key, if it wants "
        "one, is JUDGE_API_KEY in the environment")  # fmt: skip
    add("--judge_model", metavar="NAME", help="the judge's name on the server")
    add("--judge_timeout", type=float, default=120.0, metavar="S", help="seconds without a byte (default: %(default)s)")
    add("--prompts", metavar="FILE", help=".jsonl with `prompt`, `messages` or `turns` a row")
    add("--max_new_tokens", type=int, default=1024, metavar="N", help="of an answer, of the judge's prompts "
        "and of --generate's (default: %(default)s)")  # fmt: skip
    add("--speed", action="store_true", help="size, memory and speed, also quantized; with --dtype auto all of them in "
        "bfloat16 on a GPU and in float32 on a CPU")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="write the numbers as JSON")


def parse(arguments: Sequence[str]) -> Namespace:
    """Return the options of ``taid evaluate``, checked; argparse ends the process where one does not exist."""
    parser = ArgumentParser(prog="taid evaluate", allow_abbrev=False)
    add_options(parser)
    options = parser.parse_args(arguments)
    check(options)
    return options


def check(options: Namespace) -> None:
    """Check what the options say of each other, and where the numbers would be written.

    Raises:
        ValueError: options do not go together, a value is out of range, or another file would be lost.
        FileNotFoundError: the folder of `output` does not exist.
    """
    _check_subjects(options)
    for name in ("batch_size", "max_length", "limit", "generate", "max_new_tokens"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise ValueError(f"--{name} must be positive, got {value}")
    asked = {name: getattr(options, name) for name in ("judge_url", "judge_model", "prompts")}
    if any(asked.values()):
        for name, value in (asked | {"output": options.output}).items():
            if value is None:
                raise ValueError(
                    f"a judge needs --judge_url, --judge_model, --prompts and --output: --{name} is not set"
                )
    if options.output is not None:
        _check_output(options.output)
        written = [speed_file(options.output)] if options.speed else []
        names = ["student", *(["student before"] if options.before else [])] if options.generate else []
        written += [path for name in names if (path := answers_file(name, options.output))]
        for path in written:
            if path.exists() and not options.output.exists():
                raise ValueError(f"--output: {path} would be overwritten: choose another name")


def _check_subjects(options: Namespace) -> None:
    """Check that each option has what it is about: rows, tasks, a teacher."""
    if options.data is None and options.tasks is None and options.judge_url is None and not options.speed:
        raise ValueError("nothing to evaluate: give held-out rows as --data, tasks as --tasks, a judge, or --speed")
    if options.teacher is not None and options.data is None and not options.speed:
        raise ValueError("--teacher is compared on held-out rows or in --speed: give rows as --data")
    if options.before is not None and options.data is None:
        raise ValueError("--before is compared on held-out rows: give them as --data")
    if options.teacher_quantization is not None and (options.teacher is None or options.data is None):
        raise ValueError("--teacher_quantization changes a teacher on held-out rows: give --teacher and --data")
    if options.student_only and (options.teacher is None or options.teacher_quantization is not None):
        raise ValueError(
            "--student_only leaves the row of a --teacher away, which --teacher_quantization needs: give a teacher "
            "without it"
        )
    if options.generate is not None and options.data is None:
        raise ValueError("--generate answers the prompts of held-out rows: give rows as --data")
    if options.samples < 0:
        raise ValueError(f"--samples must be 0, for greedy answers alone, or positive, got {options.samples}")
    for name in ("num_fewshot", "limit", "include_path"):
        if getattr(options, name) is not None and options.tasks is None:
            raise ValueError(f"--{name} is for tasks: name some with --tasks")


def _check_output(path: Path) -> None:
    """Refuse a place where an evaluation cannot be written, or where another file would be lost."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: the folder {path.parent} cannot be written to")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it, as {path / EVALUATION}")
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_evaluation = isinstance(content, dict) and MARK in content
    except (ValueError, TypeError):
        is_evaluation = False
    if not is_evaluation:
        raise ValueError(f"--output {path} is a file that taid evaluate did not write: choose another name")


def speed_file(output: Path) -> Path:
    """Return where the table of speed is written: beside the numbers."""
    return output.with_suffix(".speed.md")


def answers_file(name: str, output: Path | None) -> Path | None:
    """Return where the answers of the student, or of the student before, are written: beside the numbers."""
    before = ".before" if name == "student before" else ""
    return None if output is None else output.with_suffix(f"{before}.generations.jsonl")
