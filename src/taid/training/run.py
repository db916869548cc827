"""The main path: from a configuration to a trained student, or to a teacher's cache.

    train       claim the folder -> rows -> student, teacher -> TAIDTrainer.train -> student, card, report
    cache       claim the folder -> rows -> student's tokenizer, teacher -> capture

The command line, ``taid compare`` and Python call the same two functions, with what
``config.parsing.configured`` gives.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from taid.artifacts import run_folder
from taid.artifacts.report import write_report
from taid.config.data import DataArguments
from taid.config.training import TAIDConfig
from taid.config.values import changed, resolved
from taid.data import loading, stream
from taid.data.images import has_images
from taid.models.loading import load_model, load_processing_class
from taid.training import engines
from taid.training.callbacks import StepProgress
from taid.training.trainer import TAIDTrainer


class Stopped(Exception):  # noqa: N818
    """A run was asked to stop: it has saved a checkpoint and ended before its time."""


def train(model: ModelConfig, data: DataArguments, args: TAIDConfig) -> None:
    """Train a student, or resume its training, and write its folder: weights, logs, card and report.

    Raises:
        ValueError: the configuration, a model, the rows or the folder cannot be used; names it and the remedy.
        FloatingPointError: a step's loss or gradient is not finite.
        Stopped: SIGTERM came; the checkpoint it names is whole.
    """
    output_dir, is_main = Path(args.output_dir), args.process_index == 0
    with run_folder.claimed(output_dir) if is_main else contextlib.nullcontext():
        checkpoint = run_folder.checkpoint_to_resume(output_dir, args.resume_from_checkpoint)
        if is_main and checkpoint is None:
            run_folder.check_free(output_dir, overwrite=args.overwrite_output_dir)
        trainer = build_trainer(model, data, args, resuming=checkpoint is not None)
        if is_main and checkpoint is None:
            run_folder.clear(output_dir)  # holds a run only where overwriting it was asked for
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.was_stopped:
            saved = f"checkpoint-{trainer.state.global_step} in {output_dir}"
            raise Stopped(f"stopped by SIGTERM; saved {saved}" if is_main else "")
        if trainer.eval_dataset is not None and not _is_evaluated(trainer):
            trainer.evaluate()
        trainer.save_model(_internal_call=True)  # does not push yet: card and report go along
        trainer.create_model_card()
        if is_main:
            print(f"student: {output_dir}\nreport:  {write_report(output_dir)}")
        if args.push_to_hub:
            trainer.push_to_hub()


def cache(model: ModelConfig, data: DataArguments, args: TAIDConfig, *, repair: bool = False) -> None:
    """Capture what the teacher says of every row of a run into ``args.teacher_cache``; continue what is there.

    Raises:
        ValueError: the folder holds another run's cache or a damaged one, or the teacher cannot be asked.
        OSError: the disk is full; what is there is whole.
    """
    folder = Path(str(args.teacher_cache)).expanduser()
    with run_folder.claimed(folder, "teacher_cache") if args.process_index == 0 else contextlib.nullcontext():
        trainer = build_trainer(model, data, changed(args, teacher_cache=None), resuming=False)
        trainer.capture(folder, repair=repair)
        if args.process_index == 0:
            print(f"teacher cache: {folder}; train from it with --teacher_cache {folder}")


def load_datasets(data: DataArguments, args: TAIDConfig) -> tuple[Any, Any]:
    """Return the rows to train on, loaded or as a stream, and the held-out rows or None."""

    def load(name: str | None, split: str) -> Any:
        return name and loading.load_rows(
            name, config=data.dataset_config, split=split, text_field=args.dataset_text_field,
            skip_bad_images=args.skip_bad_images,
        )  # fmt: skip

    held_out = load(data.eval_dataset_name, data.dataset_test_split)
    if not data.streaming:
        return load(data.names[0], data.dataset_train_split), held_out
    opened = stream.open_stream(
        data.names, args, weights=data.dataset_weights, config=data.dataset_config, split=data.dataset_train_split
    )
    return opened, held_out


def build_trainer(model: ModelConfig, data: DataArguments, args: TAIDConfig, *, resuming: bool) -> TAIDTrainer:
    """Load rows and student, and return the trainer of a run, with its progress bar and its whole configuration.

    Raises:
        ValueError: a model or row cannot be used, or the package of an option is missing.
    """
    engines.prepare(args)
    train_rows, eval_rows = load_datasets(data, args)
    name = model.model_name_or_path
    origin = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
    init_kwargs = origin | {
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "quantization_config": get_quantization_config(model),
    }
    student = load_model(name, role="student", **(init_kwargs | (args.model_init_kwargs or {})))
    processing_class = load_processing_class(name, role="student", has_images=has_images(train_rows), **origin)
    args = changed(args, eval_on_start=eval_rows is not None and not resuming)
    try:
        trainer = TAIDTrainer(
            student, args=args, train_dataset=train_rows, eval_dataset=eval_rows, processing_class=processing_class,
            peft_config=get_peft_config(model),
        )  # fmt: skip
        trainer.get_optimizer_cls_and_kwargs(args, student)  # misses optim's package before a run is overwritten
    except RuntimeError as error:  # what transformers raises for a package that report_to needs
        raise ValueError(f"the trainer cannot be built: {error}") from error
    trainer.configuration |= resolved(model, data)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StepProgress)
    return trainer


def _is_evaluated(trainer: TAIDTrainer) -> bool:
    step = trainer.state.global_step
    return any(row["step"] == step and "eval_loss" in row for row in trainer.state.log_history)
