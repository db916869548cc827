"""The command line: each command's words, and the exit status of the process.

Heavy imports wait until a command needs them, and until its options have been checked without them, so that help and
most mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from taid.artifacts import run_folder
from taid.cli import launch as launcher
from taid.evaluation import options as evaluation_options
from taid.training import engines

if TYPE_CHECKING:
    from taid.planning.recipe import Recipe

_DESCRIPTION = "Distil a large language model into a small one, with TAID and the objectives it is compared with."


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
        return _run(arguments)
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        cause = _not_importable(error) or engines.lost(error)
        if isinstance(error, RuntimeError) and cause is None:
            raise
        if os.environ.get("TAID_TRACEBACK"):
            traceback.print_exc()
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"taid: error{rank}: {cause or ' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("taid: interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if arguments[:1] in (["train"], ["cache"]) and launcher.asked(arguments):
        command, *argv = launcher.split(arguments)[1]
        _screen(argv, command)
        return launcher.launch(arguments)
    if any(argument.partition("=")[0] == "--accelerate_config" for argument in arguments):
        raise ValueError(
            "--accelerate_config starts processes of `taid train` and `taid cache`, and no others: not those of "
            "another command (`taid plan` shows all engines), nor below torchrun or accelerate launch"
        )
    # Their options are also TRL's and transformers', of which argparse knows nothing.
    if arguments[:1] in (["train"], ["cache"], ["plan"], ["compare"]):
        command, *argv = arguments
        _screen(argv, command)
        return {"train": train, "cache": cache, "plan": plan, "compare": compare}[command](argv)
    options = _parser().parse_args(arguments)
    if options.command is None:
        _parser().print_help()
    else:
        options.run(options)
    return 0


def _screen(argv: Sequence[str], command: str) -> None:
    """Answer ``--help`` and every mistake that can be seen without torch, which takes seconds to import.

    Where the libraries are loaded already, the command itself sees them as soon.
    """
    if "trl" in sys.modules:
        return
    from taid.config.screen import screen

    group, is_tried = None, command == "plan" or "--dry_run" in argv
    if command == "compare":
        from taid.comparison import options as comparison

        group, (_, argv) = comparison.own_options()[1], comparison.options_of(argv)
    elif is_tried:
        argv = _devices([argument for argument in argv if argument != "--dry_run"])[2]
    found = screen([argument for argument in argv if argument != "--repair"], command, group)
    if found is None or is_tried:  # what is planned or tried may be of another machine
        return
    model, data, args = found
    given = vars(args)  # those of transformers among them
    if command == "train" and given["output_dir"]:
        run_folder.checkpoint_to_resume(Path(given["output_dir"]), given["resume_from_checkpoint"])
    is_elsewhere = args.teacher_server_url is not None or (args.teacher_cache is not None and command != "cache")
    is_loaded = args.distillation_share > 0 and not is_elsewhere
    teacher = args.teacher_model_name_or_path if is_loaded else None
    _check_places([*data.names, data.eval_dataset_name], [("student", model.model_name_or_path), ("teacher", teacher)])


def _check_places(rows: Iterable[str | None], models: Iterable[tuple[str, str | None]]) -> None:
    """Check that files of rows and folders of models are there, each where its name is given."""
    from taid.data.files import local_files
    from taid.models.folder import check_folder

    for name in filter(None, rows):
        local_files(name)
    for role, place in models:
        if place is not None:
            check_folder(place, role)


def _not_importable(error: Exception) -> str | None:
    """Return what is wrong where transformers says only that a module of its own could not be imported."""
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
    demo = commands.add_parser("demo", help="a small taid compare on this Python's own standard library, in minutes")
    demo.add_argument("--output_dir", type=Path, default=Path("taid-demo"), help="default: %(default)s")
    demo.add_argument("--steps", type=int, default=160, help="optimizer steps a run (default: %(default)s)")
    demo.add_argument("--seeds", type=int, default=3, help="runs a method (default: %(default)s)")
    demo.set_defaults(run=_demo, processes=min(4, os.cpu_count() or 1))
    return parser


def cache(argv: Sequence[str]) -> int:
    """``taid cache``: keep what the teacher says of every row of a recipe on disk."""
    from taid.config.parsing import configured
    from taid.training import run

    run.cache(*configured([a for a in argv if a != "--repair"], "cache"), repair="--repair" in argv)
    return 0


def compare(argv: Sequence[str]) -> int:
    """``taid compare``: compare methods x seeds of one recipe, from one start on the same batches, in one table."""
    from taid.comparison import options as comparison
    from taid.comparison import workers

    options, arguments = comparison.options_of(argv)
    workers.preload(options.processes)

    from rich.console import Console

    from taid.comparison import results, runner
    from taid.comparison.plan import ComparisonPlan
    from taid.config.parsing import configured

    recipe = configured(arguments, "compare", comparison.own_options()[1])
    plan = ComparisonPlan.from_options(options, arguments, *recipe)
    try:
        found = runner.compare(plan, *recipe[1:])
    except (KeyboardInterrupt, SystemExit):
        print("taid: stopped; called again, the comparison goes on where it is", file=sys.stderr)
        raise
    Console(width=None if sys.stdout.isatty() else 160).print(results.table(found))
    print(f"page: {plan.folder / 'comparison.html'}")
    return 0


def plan(argv: Sequence[str]) -> int:
    """``taid plan``: print what a recipe takes in memory, time and disk."""
    from taid.planning.plan import make_plan
    from taid.planning.plan_text import plan_text

    recipe, _ = _recipe(argv, "plan")
    print(plan_text(make_plan(recipe)))
    return 0


def _recipe(argv: Sequence[str], command: str) -> tuple[Recipe, list[str]]:
    """Return a recipe with the devices that it is planned for, and the arguments that make it one for this CPU."""
    from taid.config.arguments import config_file
    from taid.planning.recipe import read_recipe

    gpus, gpu_memory, arguments = _devices(argv)
    return read_recipe(*config_file(arguments), command, gpus=gpus, gpu_memory=gpu_memory)


def _devices(argv: Sequence[str]) -> tuple[int | None, float, list[str]]:
    """Return the number of GPUs that is planned for, the memory of each in GB, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", nargs="?")
    parser.add_argument("--gpu_memory", nargs="?", default="80")
    known, rest = parser.parse_known_args(argv)
    if known.gpus is not None and not known.gpus.isdecimal():
        raise ValueError(f"--gpus must be a number, 0 for a CPU, got {known.gpus!r}")
    if not re.fullmatch(r"\d*\.?\d+", known.gpu_memory or "") or not float(known.gpu_memory):
        raise ValueError(f"--gpu_memory is that of a GPU in GB, like 80, got {known.gpu_memory!r}")
    return None if known.gpus is None else int(known.gpus), float(known.gpu_memory), rest


def train(argv: Sequence[str]) -> int:
    """``taid train``: train a student and write its report; 143 where SIGTERM stopped it."""
    from taid.config.parsing import configured
    from taid.training import run

    if "--dry_run" in argv:
        from taid.planning.dry_run import dry_run

        dry_run(*_recipe([argument for argument in argv if argument != "--dry_run"], "train"))
        return 0
    try:
        run.train(*configured(argv, "train"))
    except run.Stopped as stopped:
        if str(stopped):
            print(f"taid: {stopped}: go on with --resume_from_checkpoint", file=sys.stderr)
        return 128 + signal.SIGTERM
    return 0


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
    evaluation_options.check(options)
    if options.data is not None:
        models = [("student", options.model), ("teacher", options.teacher), ("student", options.before)]
        _check_places([options.data], models)
    from taid.config.parsing import quiet_logs
    from taid.evaluation.evaluate import run

    quiet_logs()
    run(options)


def _demo(options: argparse.Namespace) -> None:
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")

    from taid.comparison import workers

    workers.preload(options.processes)

    from taid.demo import run

    run(options.output_dir, steps=options.steps, seeds=options.seeds, processes=options.processes)
