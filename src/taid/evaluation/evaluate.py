"""``taid evaluate``: what a finished student is worth, on held-out rows, on benchmark tasks and to a judge.

:func:`measure` has the held-out measures of a model in one dictionary: of what it makes of rows (:mod:`.held_out`)
and of what it answers to their prompts (:mod:`.answers`). Tasks are lm-eval's, and their numbers the ones that
its own command prints; the judge is :mod:`.judge`. What is wrong with the arguments, the rows, the names of tasks
or the judge's server is said before a model is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from taid.artifacts import run_folder
from taid.artifacts.tables import generation_tables, grade_table, held_out_tables, speed_table, task_table
from taid.evaluation import inference_speed
from taid.evaluation.held_out import held_out, quantized
from taid.evaluation.lm_eval_tasks import Tasks
from taid.evaluation.options import MARK, answers_file, check, speed_file
from taid.models.loading import quantization_config

if TYPE_CHECKING:
    from taid.config.training import TAIDConfig
    from taid.evaluation.answers import Prompted
    from taid.evaluation.judge import Judge

logger = logging.getLogger(__name__)

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
    from taid.evaluation.answers import generate, require_room

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
        import torch

        quantization_config(options.teacher_quantization, torch.float32)  # names a package that is not installed
    with _configured(options) as args:  # before the rows: it sets up the processes
        return _run(options, args)


def _run(options: Namespace, args: TAIDConfig) -> dict[str, Any]:
    from taid.data import loading
    from taid.data.images import has_images
    from taid.evaluation.answers import prompted
    from taid.models.loading import tokenizer_of

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
    console = _console()
    if options.speed and is_main:  # before this process has a model too
        result["speed"] = inference_speed.measure(
            options.model, options.teacher, dtype=options.dtype, use_cpu=options.use_cpu
        )
        speed = speed_table(result["speed"])
        console.print(speed.terminal())
        _write(options.output, result)
        if options.output is not None:
            run_folder.write_atomically(speed_file(options.output), speed.markdown())
    if not (rows or options.tasks or options.judge_url):
        return result
    model, processing_class = _load(options, options.model, "student", see=has_images(rows))
    if rows:
        result |= _compare(options, model, processing_class, rows, args, prompts)
    if not is_main:
        return result
    if rows:
        console.print(*(table.terminal() for table in held_out_tables(result["held_out"])))
        if prompts:
            console.print(*(table.terminal() for table in generation_tables(result["generations"])))
        _write(options.output, result)
    model.to(args.device).eval()
    tokenizer = tokenizer_of(processing_class)
    if tasks is not None:
        result["tasks"] = tasks.run(
            model, tokenizer, num_fewshot=options.num_fewshot, limit=options.limit, batch_size=options.batch_size
        )
        console.print(task_table(result["tasks"]).terminal())
        _write(options.output, result)
    if judge is not None:
        result["judge"] = judge.grade(model, tokenizer)
        console.print(grade_table(result["judge"]).terminal())
        _write(options.output, result)
    return result


def _console() -> Console:
    # What is no terminal would cut the tables at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 120)


def _earlier(options: Namespace) -> dict[str, Any]:
    """What an earlier call wrote of this model to the same file, and is not measured again."""
    if options.output is None or not options.output.exists():
        return {}
    found = json.loads(options.output.read_text(encoding="utf-8"))
    if found["model"] != options.model:
        return {}
    kept = {"tasks": not options.tasks, "judge": not options.judge_url, "speed": not options.speed}
    kept |= dict.fromkeys(("held_out", "generations", *_OF_HELD_OUT), not options.data and "held_out" in found)
    return {name: found[name] for name in kept if kept[name] and name in found}


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        run_folder.write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _judge(options: Namespace) -> Judge:
    from taid.evaluation.judge import Judge, read_prompts

    return Judge(
        options.judge_url, options.judge_model, read_prompts(options.prompts),
        options.output.with_suffix(".judged.jsonl"), timeout=options.judge_timeout,
        max_new_tokens=options.max_new_tokens, student=options.model,
    )  # fmt: skip


@contextlib.contextmanager
def _configured(options: Namespace) -> Iterator[TAIDConfig]:
    """The trainer's arguments; it makes its folder, which nobody needs."""
    from taid.config.training import TAIDConfig

    with tempfile.TemporaryDirectory(prefix="taid-evaluate-") as folder:
        yield TAIDConfig(
            output_dir=folder, objective="sft", max_length=options.max_length, use_cpu=options.use_cpu, bf16=False,
            per_device_eval_batch_size=options.batch_size, assistant_only_loss=options.assistant_only_loss,
            chat_template_path=options.chat_template_path, dataset_text_field=options.dataset_text_field,
            activation_checkpointing=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip


def _load(options: Namespace, name: str, role: str, *, see: bool, **init_kwargs: Any) -> tuple[Any, Any]:
    from taid.models.loading import load_model, load_processing_class

    processing_class = load_processing_class(name, role=role, see=see)
    return load_model(name, role=role, dtype=options.dtype, **init_kwargs), processing_class


def _compare(
    options: Namespace, model: Any, tokenizer: Any, rows: Any, args: TAIDConfig, prompts: Sequence[Prompted]
) -> dict[str, Any]:
    """The measures of the student before, the student and the teacher, each that is given; the teacher answers not."""
    from taid.data.images import has_images

    see = has_images(rows)
    teacher: tuple[Any, Any] = (
        (None, None) if options.teacher is None else _load(options, options.teacher, "teacher", see=see)
    )
    of_rows: Any = tokenizer
    if see and options.teacher is not None:  # its own pixels of them
        of_rows = copy.copy(teacher[1])
        of_rows.chat_template = tokenizer.chat_template
    of_quantized = None
    if options.teacher_quantization is not None:  # first, because it may not load, and goes before others come
        config = quantization_config(options.teacher_quantization, teacher[0].dtype)
        more = {"quantization_config": config, "device_map": {"": args.device}}
        of_fewer_bits, _ = _load(options, options.teacher, "teacher", see=see, **more)
        of_quantized = quantized(teacher[0], of_rows, rows, args, of_fewer_bits, teacher[1])
        del of_fewer_bits
        gc.collect()  # a trainer refers to itself
    pairs = {"student": (model, tokenizer)}
    if options.before is not None:
        pairs = {"student before": _load(options, options.before, "student", see=see)} | pairs
    asked = {"prompts": prompts, "samples": options.samples, "max_new_tokens": options.max_new_tokens}
    of_models = {
        name: measure(*pair, rows, args, *teacher, **asked, answers=answers_file(name, options.output))
        for name, pair in pairs.items()
    }
    found = {kind: {name: of[kind] for name, of in of_models.items()} for kind in of_models["student"]}
    if options.teacher is not None and not options.student_only:
        # Beside the student, so that the ids are the shared ones, and on the student's rows.
        beside = (model, tokenizer if see else teacher[1])
        of_teacher = asdict(held_out(teacher[0], of_rows, rows, args, *beside, own_order=True))
        found["held_out"]["teacher"] = of_teacher | {"kl": 0.0, "reverse_kl": 0.0, "agreement": 1.0}
    if of_quantized is not None:
        found["held_out"]["teacher"]["quantized"] = {"name": options.teacher_quantization} | of_quantized
    return found
