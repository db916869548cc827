"""``taid evaluate``: measure a finished student on held-out rows, on benchmark tasks and by a judge.

:func:`measure` returns the held-out measures of a model in one dictionary: of its distribution (:mod:`.held_out`) and
of its answers to the rows' prompts (:mod:`.answers`). Tasks are lm-eval's, with the numbers that its own command
prints; the judge is :mod:`.judge`. Mistakes in the arguments, the rows, the names of tasks or the judge's server are
reported before a model is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from taid.artifacts import run_folder
from taid.artifacts.tables import Table, generation_tables, grade_table, held_out_tables, speed_table, task_table
from taid.config.training import TAIDConfig
from taid.data import loading
from taid.data.images import has_images
from taid.evaluation import inference_speed
from taid.evaluation.answers import Prompted, generate, prompted, require_room
from taid.evaluation.held_out import held_out, quantization_change, teacher_held_out
from taid.evaluation.judge import Judge, read_prompts
from taid.evaluation.lm_eval_tasks import Tasks
from taid.evaluation.options import MARK, answers_file, check, speed_file
from taid.models.loading import load_model, load_processing_class, quantization_config, tokenizer_of

_OF_HELD_OUT = ("teacher", "before", "data")


def measure(
    model: Any, tokenizer: Any, rows: Any, args: TAIDConfig, teacher: Any = None, teacher_tokenizer: Any = None, *,
    prompts: Sequence[Prompted] = (), samples: int = 4, max_new_tokens: int = 1024, answers: Path | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Measure a loaded model on held-out rows. On several processes they share the rows, and all get the same numbers.

    Args:
        model: the model.
        tokenizer: its own.
        rows: as :func:`taid.data.loading.load_rows` gives them.
        args: `objective` is "sft", `fused` is true; batch size, max_length, seed and which tokens are trained.
        teacher: what it is compared with; None for none.
        teacher_tokenizer: the teacher's.
        prompts: of :func:`taid.evaluation.answers.prompted`, to be answered too.
        samples: how many answers are drawn to each of them beside the greedy one.
        max_new_tokens: of an answer.
        answers: a file that the answers are written to, as JSON lines.

    Returns:
        ``held_out``, the numbers of :class:`.held_out.Measures` by name, and with `prompts` ``generations``, those
        of :func:`taid.evaluation.answers.generate`. None where there is nothing to measure.

    Raises:
        ValueError: as of these two.
    """
    if prompts:
        require_room(max_new_tokens, model, teacher)
    found = {"held_out": asdict(held_out(model, tokenizer, rows, args, teacher, teacher_tokenizer))}
    if prompts:
        found["generations"], of_prompts = generate(
            model, tokenizer, prompts, args, teacher, teacher_tokenizer, samples=samples, max_new_tokens=max_new_tokens
        )
        if answers is not None and args.process_index == 0:
            lines = (json.dumps(row) + "\n" for row in of_prompts)  # ASCII: half a surrogate has no place in UTF-8
            run_folder.write_atomically(answers, "".join(lines))
            found["generations"]["file"] = str(answers)
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def run(options: Namespace) -> dict[str, Any]:
    """Do what ``taid evaluate`` was asked for, print tables, and write `output` after each part.

    Returns:
        What stands in `output`.

    Raises:
        ValueError: options that do not go together, a file that is no evaluation, a bad row, an unknown task, models
            that cannot be loaded or do not fit each other.
        ImportError: a package that an option needs is not installed.
        ConnectionError: the judge cannot be reached.
    """
    check(options)
    if options.teacher_quantization is not None:
        quantization_config(options.teacher_quantization, torch.float32)  # names a package that is not installed
    with _configured(options) as args:  # before the rows: it sets up the processes
        return _run(options, args)


def _run(options: Namespace, args: TAIDConfig) -> dict[str, Any]:
    is_main = args.process_index == 0
    judge = _judge(options) if options.judge_url and is_main else None
    tasks = None
    if options.tasks is not None and is_main:
        tasks = Tasks.named(options.tasks, options.include_path, model=options.model)
    rows = options.data and loading.load_rows(
        options.data, config=options.dataset_config, split=options.split, text_field=options.dataset_text_field
    )
    prompts = prompted(rows, options.generate, options.data) if options.generate else []
    result: dict[str, Any] = {MARK: 1, "taid_version": metadata.version("taid")}
    result |= {name: getattr(options, name) for name in ("model", *_OF_HELD_OUT)} | _earlier(options)
    if options.speed and is_main:  # before this process has a model too
        _measure_speed(options, result)
    if not (rows or options.tasks or options.judge_url):
        return result
    model, processing_class = _load(options, options.model, "student", with_images=has_images(rows))
    if rows:
        result |= _compare(options, model, processing_class, rows, args, prompts)
    if not is_main:
        return result
    if rows:
        shown = held_out_tables(result["held_out"]) + (generation_tables(result["generations"]) if prompts else [])
        _keep(options, result, *shown)
    model.to(args.device).eval()
    tokenizer = tokenizer_of(processing_class)
    if tasks is not None:
        result["tasks"] = tasks.run(
            model, tokenizer, num_fewshot=options.num_fewshot, limit=options.limit, batch_size=options.batch_size
        )
        _keep(options, result, task_table(result["tasks"]))
    if judge is not None:
        result["judge"] = judge.grade(model, tokenizer)
        _keep(options, result, grade_table(result["judge"]))
    return result


def _measure_speed(options: Namespace, result: dict[str, Any]) -> None:
    """Measure size and speed into `result`."""
    result["speed"] = inference_speed.measure(
        options.model, options.teacher, dtype=options.dtype, use_cpu=options.use_cpu
    )
    speed = speed_table(result["speed"])
    _keep(options, result, speed)
    if options.output is not None:
        run_folder.write_atomically(speed_file(options.output), speed.markdown())


def _keep(options: Namespace, result: dict[str, Any], *tables: Table) -> None:
    """Print tables, and write all numbers so far."""
    # Rich would cut tables at 80 columns where the output is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(*(table.terminal() for table in tables))
    if options.output is not None:
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        run_folder.write_atomically(options.output, text)


def _earlier(options: Namespace) -> dict[str, Any]:
    """Return the numbers of this model that an earlier call wrote to the same file and that are not measured again."""
    if options.output is None or not options.output.exists():
        return {}
    found = json.loads(options.output.read_text(encoding="utf-8"))
    if found["model"] != options.model:
        return {}
    kept = {"tasks": not options.tasks, "judge": not options.judge_url, "speed": not options.speed}
    kept |= dict.fromkeys(("held_out", "generations", *_OF_HELD_OUT), not options.data and "held_out" in found)
    return {name: found[name] for name in kept if kept[name] and name in found}


def _judge(options: Namespace) -> Judge:
    return Judge(
        options.judge_url, options.judge_model, read_prompts(options.prompts),
        options.output.with_suffix(".judged.jsonl"), timeout=options.judge_timeout,
        max_new_tokens=options.max_new_tokens, student=options.model,
    )  # fmt: skip


@contextlib.contextmanager
def _configured(options: Namespace) -> Iterator[TAIDConfig]:
    """Yield the trainer's arguments, with a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="taid-evaluate-") as folder:
        yield TAIDConfig(
            output_dir=folder, objective="sft", max_length=options.max_length, use_cpu=options.use_cpu, bf16=False,
            per_device_eval_batch_size=options.batch_size, assistant_only_loss=options.assistant_only_loss,
            chat_template_path=options.chat_template_path, dataset_text_field=options.dataset_text_field,
            activation_checkpointing=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip


def _load(options: Namespace, name: str, role: str, *, with_images: bool, **init_kwargs: Any) -> tuple[Any, Any]:
    processing_class = load_processing_class(name, role=role, has_images=with_images)
    return load_model(name, role=role, dtype=options.dtype, **init_kwargs), processing_class


def _compare(
    options: Namespace, model: Any, tokenizer: Any, rows: Any, args: TAIDConfig, prompts: Sequence[Prompted]
) -> dict[str, Any]:
    """Measure the untrained student, the student and the teacher, as far as each was given.

    The teacher does not generate answers.
    """
    with_images = has_images(rows)
    teacher, teacher_tokenizer, change = None, None, None
    teacher_rows: Any = tokenizer  # makes the student's rows for the teacher
    if options.teacher is not None:
        teacher, teacher_tokenizer = _load(options, options.teacher, "teacher", with_images=with_images)
        if with_images:  # the teacher's own pixels of them
            teacher_rows = copy.copy(teacher_tokenizer)
            teacher_rows.chat_template = tokenizer.chat_template
    if options.teacher_quantization is not None:  # first, because it may not load, and goes before others come
        change = _quantize(options, teacher, teacher_tokenizer, teacher_rows, rows, args)
    pairs = {"student": (model, tokenizer)}
    if options.before is not None:
        pairs = {"student before": _load(options, options.before, "student", with_images=with_images)} | pairs
    asked = {"prompts": prompts, "samples": options.samples, "max_new_tokens": options.max_new_tokens}
    measured = {
        name: measure(
            *pair, rows, args, teacher, teacher_tokenizer, **asked, answers=answers_file(name, options.output)
        )
        for name, pair in pairs.items()
    }
    found = {kind: {name: of[kind] for name, of in measured.items()} for kind in measured["student"]}
    if teacher is not None and not options.student_only:
        beside = (model, tokenizer if with_images else teacher_tokenizer)
        found["held_out"]["teacher"] = teacher_held_out(teacher, teacher_rows, rows, args, *beside)
    if change is not None:
        found["held_out"]["teacher"]["quantized"] = {"name": options.teacher_quantization} | change
    return found


def _quantize(
    options: Namespace, teacher: Any, teacher_tokenizer: Any, teacher_rows: Any, rows: Any, args: TAIDConfig
) -> dict[str, float]:
    """Load the teacher in fewer bits, compare it with itself, and let go of it."""
    config = quantization_config(options.teacher_quantization, teacher.dtype)
    more = {"quantization_config": config, "device_map": {"": args.device}}
    quantized, _ = _load(options, options.teacher, "teacher", with_images=has_images(rows), **more)
    change = quantization_change(teacher, teacher_rows, rows, args, quantized, teacher_tokenizer)
    del quantized
    gc.collect()  # a trainer refers to itself
    return change
