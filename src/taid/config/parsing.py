"""One flat set of names for YAML and command line, and an error for each that does not exist."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import datasets
import yaml
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, SFTConfig

from taid.config.training import DataArguments, TAIDConfig, changed, in_yaml, nearest

# Options of `accelerate launch` that a run may be given beside the file.
LAUNCHER = "num_processes num_machines machine_rank main_process_ip main_process_port".split()

# What `taid train --help` shows of transformers' 120 training arguments; `--help_all` shows the rest.
_COMMON = frozenset(
    "output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm optim bf16 "
    "activation_checkpointing seed logging_steps eval_strategy eval_steps save_strategy save_steps save_total_limit "
    "load_best_model_at_end resume_from_checkpoint report_to use_cpu".split()
)


def parse(
    argv: Sequence[str], command: str = "train", own: argparse._ArgumentGroup | None = None
) -> tuple[ModelConfig, DataArguments, TAIDConfig]:
    """Read ``--config FILE`` and ``--field value`` pairs; the command line wins.

    Args:
        argv: the command line.
        command: which of ``taid``'s.
        own: options of that command alone, which were read before: for its help, and for the nearest name.

    Raises:
        ValueError: unknown name (with the nearest known one), wrong type, broken YAML, a value out of range, or one
            that transformers cannot set up.
        ImportError: an option needs a package that is not installed.
        FileNotFoundError: no such YAML file.
    """
    parser = _parser(command, show_all="--help_all" in argv, own=own)
    values = ["--help" if value == "--help_all" else value for value in argv]
    config_parser = _Parser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    config, values = config_parser.parse_known_args(values)
    in_file = [] if config.config is None else _yaml_as_arguments(parser, config.config)
    try:
        namespace, unknown = parser.parse_known_args(in_file + values)
    except ValueError as error:
        name = re.match(r"argument --(\w+): (.*)", str(error), re.DOTALL)
        is_from_file = name is not None and not any(v.split("=")[0] == f"--{name[1]}" for v in values)
        if name is None or not is_from_file:
            raise
        raise ValueError(f"{config.config}: {name[1]}: {name[2]}") from None
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        known = _names(parser) | {action.dest for action in (own._group_actions if own else ())}
        raise ValueError(f"unknown option {unknown[0]!r}{_of_launcher(name) or nearest(name, known)}")
    options = vars(namespace)

    def build(cls: Any) -> Any:
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.init})

    try:
        return build(ModelConfig), build(DataArguments), build(TAIDConfig)
    except RuntimeError as error:  # what transformers raises for a device or package that an option needs
        raise ValueError(f"the options cannot be set up: {error}") from error


class _Parser(HfArgumentParser):  # type: ignore[misc]
    def error(self, message: str) -> None:
        raise ValueError(message)


_COMMANDS = {
    "train": (
        "[--dry_run] [--accelerate_config ENGINE] [--num_processes N] [--field value ...]",
        "Distil a teacher into a student. --dry_run prints the plan and tries the recipe with small random models. "
        "--accelerate_config starts a process a GPU, or N, of ddp, fsdp2, zero2, zero3 or of a file of `accelerate "
        "config`.",
    ),
    "cache": (
        "--teacher_cache DIR [--repair] [--accelerate_config ENGINE] [--num_processes N] [--field value ...]",
        "Ask the teacher once for every row that `taid train` with the same recipe sees, and keep what it says in DIR. "
        "Continues what is there; --repair reads all of it first and captures damaged shards anew.",
    ),
    "compare": (
        "[--objectives A,B] [--variants FILE] [--seeds N] [--learning_rates X,Y] [--select MEASURE] [--test ROWS] "
        "[--generate N] [--baseline A] [--processes N] [--field value ...]",
        "Train a student by each method and seed, from the same start on the same batches, and write a table of "
        "means, 95% intervals and differences into output_dir. What is finished is not done again when it is called "
        "again, with more methods, seeds or learning rates too.",
    ),
    "plan": (
        "[--gpus N] [--gpu_memory GB] [--field value ...]",
        "Say what a recipe takes in memory, hours and disk, from configurations alone, and from the rows where they "
        "are on this machine: for each engine, which of them fit, and what to change where none does. --gpus is the "
        "number of processes that the run will have, --gpu_memory what each has (default: 80).",
    ),
}


def _parser(command: str, *, show_all: bool, own: argparse._ArgumentGroup | None = None) -> _Parser:
    usage, description = _COMMANDS[command]
    parser = _Parser(
        [TAIDConfig, ModelConfig, DataArguments],
        prog=f"taid {command}",
        usage=f"taid {command} --config recipe.yaml {usage}",
        description=description,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.HelpFormatter,
    )
    sections = {
        "Objective and teacher": set(TAIDConfig.__annotations__),
        "Student model": {f.name for f in fields(ModelConfig)},
        "Data": {f.name for f in fields(DataArguments)},
        "Rows and packing (TRL's SFTConfig)": set(SFTConfig.__annotations__) - _COMMON,
        "Training": set(_COMMON),
        "All other training arguments (transformers)": {f.name for f in fields(TAIDConfig)},
    }
    actions, parser._action_groups = list(parser._actions), []
    general = parser.add_argument_group("General")
    general.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the names below; the command line wins"
    )
    general.add_argument("--help", action="help", help="show this message")
    general.add_argument("--help_all", action="help", help="show all of transformers' training arguments too")
    if own is not None:
        parser._action_groups.append(own)
    for title, names in sections.items():
        group = parser.add_argument_group(title)
        for action in [a for a in actions if a.dest in names]:
            actions.remove(action)
            if action.dest == "resume_from_checkpoint":
                action.nargs, action.const = "?", "true"
                action.help = "Continue the last complete checkpoint of output_dir, or the given one."
            if get_origin(action.type) is dict:
                action.type = json.loads
            if action.help and "(default" not in action.help and action.default not in (None, "", argparse.SUPPRESS):
                action.help += f" (default: {in_yaml(action.default).strip(chr(39))})".replace("%", "%%")
            hidden = title.startswith("All other") and not show_all
            if hidden or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS
            action.metavar = action.metavar or (None if action.choices else "VALUE")
            action.option_strings = [name for name in action.option_strings if hidden or "-" not in name[2:]]
            group._group_actions.append(action)
    return parser


class Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's, of keys that are all different."""
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _yaml_as_arguments(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """Turn a YAML mapping into command-line arguments, so that both are checked by the same rules."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"--config {path}: there is no such file") from None
    except IsADirectoryError:
        raise ValueError(f"--config {path} is a folder: name a YAML file in it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of names to values, not a {type(values).__name__}")
    names = _names(parser)
    nargs = {
        action.dest: action.nargs for action in parser._actions if not action.option_strings[0].startswith("--no_")
    }
    hints = get_type_hints(TAIDConfig)
    arguments: list[str] = []
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{path}: unknown key {name!r}{_of_launcher(name) or nearest(str(name), names)}")
        takes_list = nargs[name] == "+" or any(get_origin(hint) is list for hint in get_args(hints.get(name)))
        if isinstance(value, list) and not takes_list:
            raise ValueError(f"{path}: {name} takes one value, got the list {value}")
        if isinstance(value, list) and value and nargs[name] == "+":
            arguments += [f"--{name}", *map(str, value)]
        elif value is None or isinstance(value, list) or (isinstance(value, bool) and nargs[name] == "?"):
            parser.set_defaults(**{name: value})  # what argparse would take for text
        elif isinstance(value, dict):
            arguments.append(f"--{name}={json.dumps(value)}")
        else:
            arguments.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return arguments


def _names(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help", "help_all", "config"}


def _of_launcher(name: Any) -> str:
    """What to say of an option that starts processes, where it is not one."""
    if name not in ("accelerate_config", *LAUNCHER):
        return ""
    return ": processes are started on the command line, by --accelerate_config ddp|fsdp2|zero2|zero3|FILE"


def configured(
    argv: Sequence[str], command: str = "train", own: Any = None
) -> tuple[ModelConfig, DataArguments, TAIDConfig]:
    """Return the configuration of a command, and set up logs and progress bars for a terminal or a file.

    Args:
        argv: ``--config FILE`` and ``--option value`` pairs.
        command: "train", "cache", "plan" or "compare": which options must be there.
        own: options of the command alone, as :func:`parse` takes them.

    Raises:
        ValueError: an option is unknown, missing or out of range; names it and the remedy.
        FileNotFoundError: there is no such YAML file.
    """
    model, data, args = parse(argv, command, own)
    quiet_logs()
    args = changed(args, disable_tqdm=not sys.stderr.isatty())  # a log file gets a line a logged step instead of a bar
    required = {"model_name_or_path": model.model_name_or_path, "dataset_name": data.dataset_name}
    if command == "cache":
        required["teacher_cache"] = args.teacher_cache
    if command == "plan" or (command == "cache" and args.teacher_server_url is None):
        required["teacher_model_name_or_path"] = args.teacher_model_name_or_path
    for name, value in required.items():
        if value is None:
            raise ValueError(f"{name} is not set: give it in the configuration or as --{name}")
    if data.streaming and (command == "cache" or args.teacher_cache is not None):
        raise ValueError("the rows of a stream are not known beforehand, as a teacher_cache needs them: use a teacher")
    return model, data, args


def quiet_logs() -> None:
    """Show taid's own messages; hide the libraries' warnings between each other, and bars where nobody watches."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # no user can act on them
    logging.basicConfig(format="%(message)s")
    logging.getLogger("taid").setLevel(logging.INFO)
