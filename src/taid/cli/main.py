"""The command line: ``taid train``, ``taid cache``, ``taid plan``, ``taid evaluate``, ``taid report``, ``taid demo``.

Heavy imports wait until a command needs them, so that ``taid --help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taid.evaluation import options as evaluation_options
from taid.training import engines

if TYPE_CHECKING:
    from taid.config.training import DataArguments, TAIDConfig
    from taid.planning.plan import Recipe
    from taid.training.trainer import TAIDTrainer

_DESCRIPTION = "Distil a large language model into a small one, with TAID and the objectives it is compared with."


class _Stopped(Exception):  # noqa: N818
    """A run has saved and ended before its time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 2 for a mistake of the user's, 130 and 143 when it was stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A run's machine and arguments are nobody else's business; set TRANSFORMERS_VERBOSITY to hear more.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # OpenMP's threads spin while they wait, which costs a shared machine most of its speed (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # It warns of a kernel that it lacks, in every command where it is installed, and in 8 bits of a cast a product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if arguments[:1] in (["train"], ["cache"]) and engines.asked(arguments):
            return engines.launch(arguments)
        if any(argument.partition("=")[0] == "--accelerate_config" for argument in arguments):
            raise ValueError(
                "--accelerate_config starts processes of `taid train` and `taid cache`, and no others: not those of "
                "another command (`taid plan` shows all engines), nor below torchrun or accelerate launch"
            )
        # Their options come from TRL and transformers, which take seconds to import.
        if arguments[:1] in (["train"], ["cache"], ["plan"], ["compare"]):
            {"train": train, "cache": cache, "plan": plan, "compare": compare}[arguments[0]](arguments[1:])
            return 0
        options = _parser().parse_args(arguments)
        if options.command is None:
            _parser().print_help()
        else:
            options.run(options)
        return 0
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        cause = _not_importable(error) or engines.lost(error)
        if isinstance(error, RuntimeError) and cause is None:
            raise
        if os.environ.get("TAID_TRACEBACK"):
            traceback.print_exc()
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"taid: error{rank}: {cause or ' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except _Stopped as stopped:
        if str(stopped):
            print(f"taid: {stopped}: go on with --resume_from_checkpoint", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("taid: interrupted", file=sys.stderr)
        return 130


def _not_importable(error: Exception) -> str | None:
    """What is wrong where transformers says only that a module of its own could not be imported."""
    if "Could not import module" not in str(error):
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as cause:  # whatever a build for another torch raises
        return (
            "transformers cannot be imported, because torchvision does not fit this torch "
            f"({' '.join(str(cause).split())}): install the torchvision of the same build, or uninstall it"
        )
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="taid", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"taid {metadata.version('taid')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("train", help="distil a teacher into a student (taid train --help)")
    commands.add_parser("cache", help="keep what the teacher says of a run's rows on disk (taid cache --help)")
    commands.add_parser("compare", help="methods x seeds in one table, tuned alike (taid compare --help)")
    commands.add_parser("plan", help="what a recipe takes in memory, time and disk (taid plan --help)")
    evaluate = commands.add_parser("evaluate", help="held-out measures, benchmark tasks and a judge's grades")
    evaluation_options.add_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    report = commands.add_parser("report", help="rebuild report.html and the plots of a run")
    report.add_argument("run_dir", type=Path, help="the output_dir of a run")
    report.set_defaults(run=_report)
    export = commands.add_parser("export", help="merge an adapter, or write GGUF with llama.cpp's converter")
    export.add_argument("model", type=Path, metavar="MODEL", help="the output_dir of a run, or another model's folder")
    export.add_argument("--format", required=True, choices=["merged-lora", "gguf"])
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new folder")
    export.add_argument("--llama_cpp", type=Path, metavar="DIR", help="a llama.cpp folder; PATH is searched without it")
    export.add_argument("--quantization", metavar="TYPE", help="a type of llama-quantize, as Q4_K_M (gguf only)")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.set_defaults(run=_export)
    demo = commands.add_parser("demo", help="distil on this Python's own standard library, in minutes")
    demo.add_argument("--output_dir", type=Path, default=Path("taid-demo"), help="default: %(default)s")
    demo.add_argument("--steps", type=int, default=150, help="optimizer steps a method (default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _configured(argv: Sequence[str], command: str, own: Any = None) -> tuple[Any, DataArguments, TAIDConfig]:
    """The configuration, with what every run needs set, and logs as a terminal or a file wants them."""
    import datasets
    from transformers.utils import logging as transformers_logging

    from taid.config import parsing as arguments

    model_arguments, data_arguments, args = arguments.parse(argv, command, own)
    args.disable_tqdm = not sys.stderr.isatty()  # bars are for eyes; a log file gets a line a logged step
    if args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries; no user can act on them
    logging.basicConfig(format="%(message)s")
    logging.getLogger("taid").setLevel(logging.INFO)
    required = {"model_name_or_path": model_arguments.model_name_or_path, "dataset_name": data_arguments.dataset_name}
    if command == "cache":
        required["teacher_cache"] = args.teacher_cache
    if command == "plan" or (command == "cache" and args.teacher_server_url is None):
        required["teacher_model_name_or_path"] = args.teacher_model_name_or_path
    for name, value in required.items():
        if value is None:
            raise ValueError(f"{name} is not set: give it in the configuration or as --{name}")
    if data_arguments.streaming and (command == "cache" or args.teacher_cache is not None):
        raise ValueError("the rows of a stream are not known beforehand, as a teacher_cache needs them: use a teacher")
    return model_arguments, data_arguments, args


def cache(argv: Sequence[str]) -> None:
    """``taid cache``: what the teacher says of every row of a recipe, kept on disk."""
    repair = "--repair" in argv
    _cache(*_configured([a for a in argv if a != "--repair"], "cache"), repair=repair)


def _cache(model_arguments: Any, data_arguments: DataArguments, args: TAIDConfig, *, repair: bool) -> None:
    from taid.artifacts import run_folder
    from taid.training.capture import capture

    folder, args.teacher_cache = Path(str(args.teacher_cache)).expanduser(), None
    with run_folder.claimed(folder, "teacher_cache") if args.process_index == 0 else contextlib.nullcontext():
        trainer = _build_trainer(model_arguments, data_arguments, args, resuming=False)
        capture(trainer, folder, repair=repair)
        if args.process_index == 0:
            print(f"teacher cache: {folder}; train from it with --teacher_cache {folder}")


def compare(argv: Sequence[str]) -> None:
    """``taid compare``: methods x seeds of one recipe, from one start on the same batches, in one table."""
    from rich.console import Console

    from taid.comparison import plan as methods
    from taid.comparison import results, runner

    options, arguments = methods.options_of(argv)
    recipe = _configured(arguments, "compare", methods.own_options()[1])
    plan = methods.Plan.of(options, arguments, *recipe)
    try:
        found = runner.compare(plan, *recipe[1:])
    except (KeyboardInterrupt, SystemExit):
        print("taid: stopped; called again, the comparison goes on where it is", file=sys.stderr)
        raise
    Console(width=None if sys.stdout.isatty() else 160).print(results.table(found))
    print(f"page: {plan.folder / 'comparison.html'}")


def plan(argv: Sequence[str]) -> None:
    """``taid plan``: what a recipe takes in memory, time and disk."""
    from taid.planning.plan import plan

    recipe, _ = _planned(argv, "plan")
    print(plan(recipe, *_rows_here(recipe)))


def _planned(argv: Sequence[str], command: str) -> tuple[Recipe, list[str]]:
    """A recipe that may be for another machine than this one, and the arguments that make it one for this machine."""
    import torch
    import yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", nargs="?")
    parser.add_argument("--gpu_memory", nargs="?", default="80")
    parser.add_argument("--config", type=Path, nargs="?")
    known, rest = parser.parse_known_args(argv)
    if known.gpus is not None and not known.gpus.isdecimal():
        raise ValueError(f"--gpus must be a number, 0 for a CPU, got {known.gpus!r}")
    if not re.fullmatch(r"\d*\.?\d+", known.gpu_memory or "") or not float(known.gpu_memory):
        raise ValueError(f"--gpu_memory is that of a GPU in GB, like 80, got {known.gpu_memory!r}")
    arguments = [*([] if known.config is None else ["--config", str(known.config)]), *rest]
    on_cpu = ["--use_cpu", "--tf32", "false"]  # or a recipe with bf16 or tf32 would be refused without a GPU
    configured = _configured([*arguments, *([] if torch.accelerator.is_available() else on_cpu)], command)
    in_file = {} if known.config is None else yaml.safe_load(known.config.read_text(encoding="utf-8"))
    from taid.planning.plan import Recipe

    def is_given(name: str) -> bool:
        return in_file.get(name) is not None or any(argument.split("=")[0] == f"--{name}" for argument in rest)

    gpus = int(known.gpus) if known.gpus is not None else 0 if configured[2].use_cpu and is_given("use_cpu") else 1
    folder = Path() if known.config is None else known.config.parent
    if gpus and not torch.accelerator.is_available() and not any(map(is_given, ("bf16", "fp16"))):
        configured[2].bf16 = True  # TRL's default where there is a GPU
    recipe = Recipe(*configured, folder=folder, gpus=gpus, gpu_memory=float(known.gpu_memory))
    return recipe, [*arguments, *on_cpu]


def _rows_here(recipe: Recipe) -> tuple[Any, Any]:
    return _load_rows(recipe.data, recipe.args) if recipe.rows_are_here else (None, None)


def train(argv: Sequence[str]) -> None:
    """``taid train``: from the configuration to the trained student and its report."""
    if "--dry_run" in argv:
        _dry_run([argument for argument in argv if argument != "--dry_run"])
    else:
        _train(*_configured(argv, "train"))


def _dry_run(argv: Sequence[str]) -> None:
    """Print the plan, then train small models of the recipe's architectures for a few steps, by the same code."""
    from taid.planning.dry_run import miniature
    from taid.planning.plan import plan

    recipe, arguments = _planned(argv, "train")
    if recipe.args.world_size > 1:
        raise ValueError("--dry_run is for one process: start it without accelerate launch")
    print(plan(recipe, *_rows_here(recipe)), flush=True)
    with miniature(recipe) as small:
        if small.needs_cache:
            _cache(*small.released(*_configured([*arguments, *small.arguments], "cache")), repair=False)
        _train(*small.released(*_configured([*arguments, *small.arguments], "train")))
    print(small.summary)


def _train(model_arguments: Any, data_arguments: DataArguments, args: TAIDConfig) -> None:
    from taid.artifacts import run_folder
    from taid.artifacts.report import write_report

    output_dir, is_main = Path(args.output_dir), args.process_index == 0
    with run_folder.claimed(output_dir) if is_main else contextlib.nullcontext():
        checkpoint = _checkpoint_to_resume(output_dir, args)
        if is_main and checkpoint is None:
            run_folder.check_free(output_dir, overwrite=args.overwrite_output_dir)
        trainer = _build_trainer(model_arguments, data_arguments, args, resuming=checkpoint is not None)
        if is_main and checkpoint is None:
            run_folder.clear(output_dir)  # holds a run only where overwriting it was asked for
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.was_stopped:
            saved = f"checkpoint-{trainer.state.global_step} in {output_dir}"
            raise _Stopped(f"stopped by SIGTERM; saved {saved}" if is_main else "")
        if trainer.eval_dataset is not None and not _evaluated_at(trainer.state.global_step, trainer.state.log_history):
            trainer.evaluate()
        trainer.save_model(_internal_call=True)  # does not push yet: card and report go along
        trainer.create_model_card()
        if is_main:
            print(f"student: {output_dir}\nreport:  {write_report(output_dir)}")
        if args.push_to_hub:
            trainer.push_to_hub()


def _load_rows(data_arguments: DataArguments, args: TAIDConfig) -> tuple[Any, Any]:
    """Rows to train on and held-out rows, or None for these."""
    from taid.data import loading, stream

    def load(name: str | None, split: str) -> Any:
        return name and loading.load_rows(
            name, config=data_arguments.dataset_config, split=split, text_field=args.dataset_text_field,
            skip_bad_images=args.skip_bad_images,
        )  # fmt: skip

    split, held_out = data_arguments.dataset_train_split, data_arguments.eval_dataset_name
    train_rows = (
        stream.open_stream(
            data_arguments.names, args, weights=data_arguments.dataset_weights, config=data_arguments.dataset_config,
            split=split,
        )
        if data_arguments.streaming
        else load(data_arguments.names[0], split)
    )  # fmt: skip
    return train_rows, load(held_out, data_arguments.dataset_test_split)


def _build_trainer(
    model_arguments: Any, data_arguments: DataArguments, args: TAIDConfig, *, resuming: bool
) -> TAIDTrainer:
    from transformers import PrinterCallback, ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from taid.config import training
    from taid.data.images import has_images
    from taid.models.loading import load_model, load_processing_class
    from taid.training.callbacks import StepProgress
    from taid.training.trainer import TAIDTrainer

    train_rows, eval_rows = _load_rows(data_arguments, args)
    args.eval_on_start = eval_rows is not None and not resuming
    name = model_arguments.model_name_or_path
    origin = {"revision": model_arguments.model_revision, "trust_remote_code": args.trust_remote_code}
    init_kwargs = origin | {
        "dtype": model_arguments.dtype,
        "attn_implementation": model_arguments.attn_implementation,
        "quantization_config": get_quantization_config(model_arguments),
    }
    student = load_model(name, role="student", **(init_kwargs | (args.model_init_kwargs or {})))
    processing_class = load_processing_class(name, role="student", see=has_images(train_rows), **origin)
    try:
        trainer = TAIDTrainer(
            student,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            peft_config=get_peft_config(model_arguments),
        )
        trainer.get_optimizer_cls_and_kwargs(args, student)  # misses optim's package before a run is overwritten
    except RuntimeError as error:  # what transformers raises for a package that report_to needs
        raise ValueError(f"the trainer cannot be built: {error}") from error
    trainer.configuration = training.resolved(model_arguments, data_arguments, args)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StepProgress)
    return trainer


def _checkpoint_to_resume(output_dir: Path, args: TAIDConfig) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint [PATH]`` means."""
    from taid.artifacts import run_folder

    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    folder = output_dir if str(asked).lower() == "true" else Path(asked).expanduser()
    if not folder.is_dir():
        raise ValueError(f"cannot resume: folder {folder} does not exist")
    checkpoint = folder if (folder / "trainer_state.json").exists() else run_folder.last_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"cannot resume: {folder} holds no complete checkpoint; start without --resume_from_checkpoint, and "
            "with --overwrite_output_dir where a run has begun there"
        )
    if checkpoint.resolve().parent != output_dir.resolve():
        raise ValueError(
            f"cannot resume: {checkpoint} belongs to the run in {checkpoint.parent}, not to output_dir {output_dir}: "
            "name that folder as output_dir, or copy it"
        )
    run_folder.check_resumable(checkpoint)
    return checkpoint


def _evaluated_at(step: int, log_history: list[dict[str, Any]]) -> bool:
    return any(row["step"] == step and "eval_loss" in row for row in log_history)


def _report(options: argparse.Namespace) -> None:
    from taid.artifacts.model_card import write_card
    from taid.artifacts.report import write_report

    print(write_report(options.run_dir))
    write_card(options.run_dir)


def _export(options: argparse.Namespace) -> None:
    from transformers.utils import logging as transformers_logging

    from taid.export import export

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    asked = {name: getattr(options, name) for name in ("llama_cpp", "quantization", "overwrite")}
    print(f"exported: {export(options.model, options.output, options.format, **asked)}")


def _evaluate(options: argparse.Namespace) -> None:
    evaluation_options.check(options)  # before the libraries are imported, which takes seconds
    import datasets
    from transformers.utils import logging as transformers_logging

    from taid.evaluation.evaluate import run

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries; no user can act on them
    logging.basicConfig(format="%(message)s")
    logging.getLogger("taid").setLevel(logging.INFO)
    run(options)


def _demo(options: argparse.Namespace) -> None:
    from taid.demo import run

    run(options.output_dir, steps=options.steps)
