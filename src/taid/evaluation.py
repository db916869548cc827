"""``taid evaluate``: what a finished student is worth, on held-out rows, on benchmark tasks and to a judge.

Held-out measures are :meth:`taid.TAIDTrainer.evaluate`'s, so that a trained token is what it is in training; tasks are
lm-eval's, and their numbers the ones that its own command prints; the judge is :mod:`taid.judge`. What is wrong with
the arguments, the rows, the names of tasks or the judge's server is said before a model is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import math
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from taid import engines, run_folder, speed
from taid.tasks import Tasks, task_table

if TYPE_CHECKING:
    from taid.config import TAIDConfig
    from taid.judge import Judge
    from taid.trainer import TAIDTrainer

logger = logging.getLogger(__name__)

_MARK = "taid_evaluation"
_SPEED = ".speed.md"
_OF_HELD_OUT = ("teacher", "before", "data")


@dataclass(frozen=True)
class Measures:
    """What a model makes of held-out rows; means are over their trained tokens.

    Attributes:
        cross_entropy: -log q(y), nats a token, over the ids that the student and the teacher share.
        perplexity: exp(cross_entropy).
        bits_per_byte: cross_entropy * tokens / (ln 2 * bytes); nothing of it depends on how the text was split into
            tokens. None where the trained tokens are no text.
        kl: KL(p || q) of the teacher p and the model q, nats a token, over the shared ids; None without a teacher.
        accuracy: the share of tokens that are the model's likeliest.
        others_images: the cross-entropy with the images of other rows of the batch, in the sizes of a row's own (a row
            alone in its batch is shown its own in negative); None for rows without. Where it is no larger, the model
            does not use what it sees.
        tokens: how many were trained.
        bytes: of the text that they decode to (:func:`bytes_of`).
    """

    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    kl: float | None
    accuracy: float
    others_images: float | None
    tokens: int
    bytes: int


def bytes_of(input_ids: list[int], labels: list[int], tokenizer: Any) -> int:
    """The bytes of the text that the trained tokens of a row decode to, in UTF-8.

    Trained are the tokens whose label is not -100; the first of a row is not, because nothing predicts it. A run of
    trained tokens is worth the bytes by which the row's text up to its end is longer than that up to its beginning, so
    that a space at the seam is counted. Special tokens, an end of text say, decode to nothing: their loss counts and
    they have no bytes. Where a run begins or ends within a character, decoding gives U+FFFD, of three bytes, for it.
    """

    def until(end: int) -> int:
        text = tokenizer.decode(input_ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode())

    trained = [False, *(label != -100 for label in labels[1:]), False]
    starts = [place for place in range(1, len(trained)) if trained[place] and not trained[place - 1]]
    ends = [place for place in range(1, len(trained)) if trained[place - 1] and not trained[place]]
    return sum(until(end) - until(start) for start, end in zip(starts, ends, strict=True))


def held_out(
    student: Any, tokenizer: Any, rows: Any, args: TAIDConfig, teacher: Any = None, teacher_tokenizer: Any = None
) -> Measures:
    """Evaluate a model on rows.

    Args:
        student: the model.
        tokenizer: its own; makes the rows' tokens and applies its chat template.
        rows: as :func:`taid.data.load_rows` gives them.
        args: `objective` is "sft"; batch size, max_length and which tokens are trained.
        teacher: what the KL is to; it may differ from the student in nothing but padding and special tokens.
        teacher_tokenizer: the teacher's.

    Raises:
        ValueError: the rows have no trained token, or student and teacher have different tokenizers.
    """
    from taid import vision
    from taid.models import tokenizer_of

    trainer = _trainer(student, tokenizer, rows, args, teacher, teacher_tokenizer)
    found = trainer.evaluate(trainer.train_dataset)
    size = sum(bytes_of(*row, tokenizer_of(tokenizer)) for row in _tokens(trainer))
    others_images = None
    if isinstance(trainer.data_collator, vision.Collator):
        trainer.data_collator.exchange = True
        others_images = trainer.evaluate(trainer.train_dataset)["eval_cross_entropy"]
    cross_entropy, tokens = found["eval_cross_entropy"], found["eval_tokens"]
    if not math.isfinite(cross_entropy) or not math.isfinite(found.get("eval_kl", 0.0)):
        raise ValueError(
            f"the loss of a model on these rows is {cross_entropy}, the KL to the teacher {found.get('eval_kl')}: "
            "weights are not finite, or too large for this dtype (--dtype float32)"
        )
    return Measures(
        cross_entropy=cross_entropy,
        perplexity=math.exp(min(cross_entropy, 700.0)),
        bits_per_byte=cross_entropy * tokens / (math.log(2) * size) if size else None,
        kl=found.get("eval_kl"),
        accuracy=found["eval_mean_token_accuracy"],
        others_images=others_images,
        tokens=tokens,
        bytes=size,
    )


def quantized(
    teacher: Any, tokenizer: Any, rows: Any, args: TAIDConfig, of_fewer_bits: Any, teacher_tokenizer: Any
) -> dict[str, float]:
    """Compare a teacher p with itself in fewer bits, p', which is asked as a teacher is in training.

    Returns:
        Means over the trained tokens of rows, which are those of :func:`held_out`: ``cross_entropy``, -log p'(y) in
        nats; ``change``, that less the cross-entropy of p; ``kl``, KL(p || p') in nats, which a student would have that
        were p'; ``agreement``, the share where both have the same likeliest token.

    Raises:
        ValueError: the rows have no trained token, or the loss in fewer bits is not finite.
    """
    args = copy.copy(args)
    args.objective = "reverse_kl"  # that is KL(p || p'), with p in the student's place
    trainer = _trainer(teacher, tokenizer, rows, args, of_fewer_bits, teacher_tokenizer)
    found = trainer.evaluate(trainer.train_dataset)
    cross_entropy, kl = found["eval_teacher_cross_entropy"], found["eval_loss"]
    if not math.isfinite(cross_entropy) or not math.isfinite(kl):
        raise ValueError(
            f"the loss of the quantized teacher on these rows is {cross_entropy}, its KL {kl}: choose another "
            "--teacher_quantization, or --dtype float32"
        )
    trainer.data_collator = _with_labels_of_teacher(trainer)
    agreement = trainer.evaluate(trainer.train_dataset)["eval_mean_token_accuracy"]
    change = cross_entropy - found["eval_cross_entropy"]
    return {"cross_entropy": cross_entropy, "change": change, "kl": kl, "agreement": agreement}


def _with_labels_of_teacher(trainer: TAIDTrainer) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator of the same batches, whose labels are the teacher's likeliest tokens: accuracy is then agreement."""
    import torch

    from taid.kernels.head_products import HeadProducts
    from taid.sequences import shifted
    from taid.teacher import LocalTeacher
    from taid.vision import for_teacher

    collate, teacher, ids = trainer.data_collator, trainer.teacher, trainer.vocabulary.index
    assert isinstance(teacher, LocalTeacher)

    def collated(of_rows: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(of_rows)
        inputs = {name: value.to(trainer.args.device) for name, value in batch.items()}
        labels = shifted(inputs.pop("labels"))
        hidden, head = teacher(for_teacher(inputs | {"use_cache": False}), labels)
        products = HeadProducts(head.weight, len(ids), None, False)  # as precise as those of the loss
        bias, tile = 0 if head.bias is None else head.bias[: len(ids)], products.tile(256)
        likeliest = [
            (products.project(products.operand(part), tile)[: len(part)] + bias).argmax(-1).cpu()
            for part in torch.split(hidden[labels != -100], len(tile))
        ]
        to_predict = batch["labels"][:, 1:]
        to_predict[to_predict != -100] = ids[torch.cat(likeliest)]
        return batch

    return collated


def _trainer(
    student: Any, tokenizer: Any, rows: Any, args: TAIDConfig, teacher: Any, teacher_tokenizer: Any
) -> TAIDTrainer:
    from transformers import PrinterCallback, ProgressCallback

    from taid.trainer import TAIDTrainer

    trainer = TAIDTrainer(
        student, teacher, args, train_dataset=rows, processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
    )  # fmt: skip
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _tokens(trainer: TAIDTrainer) -> Iterator[tuple[list[int], list[int]]]:
    """The ids and labels of each row; of rows with images as they are made for a batch."""
    rows = trainer.train_dataset
    if "input_ids" in rows.column_names:
        yield from ((row["input_ids"], row["labels"]) for row in rows.select_columns(["input_ids", "labels"]))
        return
    for row in rows:
        batch = trainer.data_collator([row])
        yield batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


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
    _check(options)
    with _configured(options) as args:  # before the rows: it sets up the processes
        return _run(options, args)


def _run(options: Namespace, args: TAIDConfig) -> dict[str, Any]:
    from taid import data
    from taid.images import has_images
    from taid.judge import grade_table
    from taid.models import tokenizer_of

    is_main = args.process_index == 0
    judge = _judge(options) if options.judge_url and is_main else None
    tasks = None
    if options.tasks is not None and is_main:
        tasks = Tasks.named(options.tasks, options.include_path, model=options.model)
    rows = options.data and data.load_rows(
        options.data, config=options.dataset_config, split=options.split, text_field=options.dataset_text_field
    )
    result: dict[str, Any] = {_MARK: 1, "taid_version": metadata.version("taid")}
    result |= {name: getattr(options, name) for name in ("model", *_OF_HELD_OUT)} | _earlier(options)
    console = _console()
    if options.speed and is_main:  # before this process has a model too
        result["speed"] = speed.measure(options.model, options.teacher, dtype=options.dtype, use_cpu=options.use_cpu)
        console.print(speed.table(result["speed"]))
        _write(options.output, result)
        if options.output is not None:
            run_folder.write_atomically(options.output.with_suffix(_SPEED), speed.markdown(result["speed"]))
    if not (rows or options.tasks or options.judge_url):
        return result
    model, processing_class = _load(options, options.model, "student", see=has_images(rows))
    if rows:
        result["held_out"] = _compare(options, model, processing_class, rows, args)
    if not is_main:
        return result
    if rows:
        console.print(held_out_table(result["held_out"]))
        _write(options.output, result)
    model.to(args.device).eval()
    tokenizer = tokenizer_of(processing_class)
    if tasks is not None:
        result["tasks"] = tasks.run(
            model, tokenizer, num_fewshot=options.num_fewshot, limit=options.limit, batch_size=options.batch_size
        )
        console.print(task_table(result["tasks"]))
        _write(options.output, result)
    if judge is not None:
        result["judge"] = judge.grade(model, tokenizer)
        console.print(grade_table(result["judge"]))
        _write(options.output, result)
    return result


def of_run(folder: Path, tasks: Tasks, args: TAIDConfig) -> None:
    """Give the student that a run has saved its tasks; print the table and write evaluation.json beside it."""
    from taid.models import load_model, load_processing_class, tokenizer_of

    tokenizer = tokenizer_of(load_processing_class(str(folder), role="student"))
    model = load_model(str(folder), role="student", dtype="auto").to(args.device).eval()
    rows = tasks.run(
        model, tokenizer, num_fewshot=args.eval_tasks_num_fewshot, batch_size=args.per_device_eval_batch_size
    )
    _write(
        folder / run_folder.EVALUATION,
        {_MARK: 1, "taid_version": metadata.version("taid"), "model": str(folder), "tasks": rows},
    )
    _console().print(task_table(rows))


def _console() -> Console:
    # What is no terminal would cut the tables at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 120)


def _check(options: Namespace) -> None:
    """What the options say of each other."""
    if options.data is None and options.tasks is None and options.judge_url is None and not options.speed:
        raise ValueError("nothing to evaluate: give held-out rows as --data, tasks as --tasks, a judge, or --speed")
    if options.teacher is not None and options.data is None and not options.speed:
        raise ValueError("--teacher is compared on held-out rows or in --speed: give rows as --data")
    if options.before is not None and options.data is None:
        raise ValueError("--before is compared on held-out rows: give them as --data")
    if options.teacher_quantization is not None:
        if options.teacher is None or options.data is None:
            raise ValueError("--teacher_quantization changes a teacher on held-out rows: give --teacher and --data")
        import torch

        engines.quantized(options.teacher_quantization, torch.float32)  # names a package that is not installed
    for name in ("num_fewshot", "limit", "include_path"):
        if getattr(options, name) is not None and options.tasks is None:
            raise ValueError(f"--{name} is for tasks: name some with --tasks")
    for name in ("batch_size", "max_length", "limit"):
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
        check_output(options.output)
        table = options.output.with_suffix(_SPEED)
        if options.speed and table.exists() and not options.output.exists():
            raise ValueError(f"--output: {table} would be overwritten: choose another name")


def check_output(path: Path) -> None:
    """Refuse a place where an evaluation cannot be written.

    Raises:
        ValueError: it is a folder, or a file that is no evaluation, which would be lost.
        FileNotFoundError: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: the folder {path.parent} cannot be written to")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it, as {path / run_folder.EVALUATION}")
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_evaluation = isinstance(content, dict) and _MARK in content
    except (ValueError, TypeError):
        is_evaluation = False
    if not is_evaluation:
        raise ValueError(f"--output {path} is a file that taid evaluate did not write: choose another name")


def _earlier(options: Namespace) -> dict[str, Any]:
    """What an earlier call wrote of this model to the same file, and is not measured again."""
    if options.output is None or not options.output.exists():
        return {}
    found = json.loads(options.output.read_text(encoding="utf-8"))
    if found["model"] != options.model:
        return {}
    kept = {"tasks": not options.tasks, "judge": not options.judge_url, "speed": not options.speed}
    kept |= dict.fromkeys(("held_out", *_OF_HELD_OUT), not options.data and "held_out" in found)
    return {name: found[name] for name in kept if kept[name] and name in found}


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        run_folder.write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _judge(options: Namespace) -> Judge:
    from taid.judge import Judge, read_prompts

    return Judge(
        options.judge_url, options.judge_model, read_prompts(options.prompts),
        options.output.with_suffix(".judged.jsonl"), timeout=options.judge_timeout,
        max_new_tokens=options.max_new_tokens, student=options.model,
    )  # fmt: skip


@contextlib.contextmanager
def _configured(options: Namespace) -> Iterator[TAIDConfig]:
    """The trainer's arguments; it makes its folder, which nobody needs."""
    from taid.config import TAIDConfig

    with tempfile.TemporaryDirectory(prefix="taid-evaluate-") as folder:
        yield TAIDConfig(
            output_dir=folder, objective="sft", max_length=options.max_length, use_cpu=options.use_cpu, bf16=False,
            per_device_eval_batch_size=options.batch_size, assistant_only_loss=options.assistant_only_loss,
            chat_template_path=options.chat_template_path, dataset_text_field=options.dataset_text_field,
            activation_checkpointing=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip


def _load(options: Namespace, name: str, role: str, *, see: bool, **init_kwargs: Any) -> tuple[Any, Any]:
    from taid.models import load_model, load_processing_class

    processing_class = load_processing_class(name, role=role, see=see)
    return load_model(name, role=role, dtype=options.dtype, **init_kwargs), processing_class


def _compare(options: Namespace, model: Any, tokenizer: Any, rows: Any, args: TAIDConfig) -> dict[str, Any]:
    """The measures of the student before, the student and the teacher, each that is given."""
    from taid.images import has_images

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
        config = engines.quantized(options.teacher_quantization, teacher[0].dtype)
        more = {"quantization_config": config, "device_map": {"": args.device}}
        of_fewer_bits, _ = _load(options, options.teacher, "teacher", see=see, **more)
        of_quantized = quantized(teacher[0], of_rows, rows, args, of_fewer_bits, teacher[1])
        del of_fewer_bits
        gc.collect()  # a trainer refers to itself
    pairs = {"student": (model, tokenizer)}
    if options.before is not None:
        pairs = {"student before": _load(options, options.before, "student", see=see)} | pairs
    found = {name: asdict(held_out(*pair, rows, args, *teacher)) for name, pair in pairs.items()}
    if options.teacher is not None:
        # Beside the student, so that the ids are the shared ones, and on the student's rows.
        of_teacher = held_out(teacher[0], of_rows, rows, args, model, tokenizer if see else teacher[1])
        found["teacher"] = asdict(of_teacher) | {"kl": 0.0}
    if of_quantized is not None:
        found["teacher"]["quantized"] = {"name": options.teacher_quantization} | of_quantized
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def held_out_table(found: dict[str, dict[str, Any]]) -> Table:
    """Measures by model."""
    table = Table(title="Held out", title_justify="left")
    table.add_column("")
    sees = any(of["others_images"] is not None for of in found.values())
    headings = ["nats/token", "perplexity", "bits/byte", "KL to teacher", "accuracy", "tokens", "bytes"]
    for heading in headings + (["nats/token, others' images"] if sees else []):
        table.add_column(heading, justify="right")
    for name, of in found.items():
        bits, kl = of["bits_per_byte"], of["kl"]
        table.add_row(
            name, f"{of['cross_entropy']:.4f}", f"{of['perplexity']:.4g}", "" if bits is None else f"{bits:.4f}",
            "" if kl is None else f"{kl:.4f}", f"{of['accuracy']:.2%}", f"{of['tokens']:,}", f"{of['bytes']:,}",
            *([f"{of['others_images']:.4f}"] if sees else []),
        )  # fmt: skip
    if fewer := found.get("teacher", {}).get("quantized"):
        loss, change = fewer["cross_entropy"], fewer["change"]
        table.caption_justify = "left"
        table.caption = (
            f"Teacher in {fewer['name']}: {loss - change:.4f} -> {loss:.4f} nats/token ({change:+.4f}),\n"
            f"KL {fewer['kl']:.4f} from the teacher as it is, the same likeliest token {fewer['agreement']:.2%}"
        )
    return table
