"""One flat set of names for YAML and command line, and an error for each that does not exist.

The classes whose fields are the names are given, so that the same rules hold for the real ones and for those that
:mod:`taid.config.installed` reads without importing torch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from taid.config.data import DataArguments
from taid.config.options import Options
from taid.config.values import in_yaml, nearest

# Options of `accelerate launch` that a run may be given beside the file.
LAUNCHER = "num_processes num_machines machine_rank main_process_ip main_process_port".split()

# What `taid train --help` shows of transformers' 120 training arguments; `--help_all` shows the rest.
_COMMON = frozenset(
    "output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm optim bf16 "
    "activation_checkpointing seed logging_steps eval_strategy eval_steps save_strategy save_steps save_total_limit "
    "load_best_model_at_end resume_from_checkpoint report_to use_cpu".split()
)


@dataclass(frozen=True)
class Classes:
    """The classes whose fields are the options of a command line.

    Attributes:
        parser: transformers' ``HfArgumentParser``.
        sft: TRL's ``SFTConfig``.
        model: TRL's ``ModelConfig``.
        training: :class:`Options` and `sft` in one.
    """

    parser: type[argparse.ArgumentParser]
    sft: Any
    model: Any
    training: Any

    def build(self, options: Mapping[str, Any]) -> tuple[Any, DataArguments, Any]:
        """Return the student's, the rows' and the training's configuration, each of which checks its values."""
        model, data, training = (
            kind(**{f.name: options[f.name] for f in fields(kind) if f.init})
            for kind in (self.model, DataArguments, self.training)
        )
        return model, data, training


def read_options(
    argv: Sequence[str], command: str, classes: Classes, own: argparse._ArgumentGroup | None = None
) -> dict[str, Any]:
    """Read ``--config FILE`` and ``--field value`` pairs; the command line wins.

    Args:
        argv: the command line.
        command: which of ``taid``'s.
        classes: those whose fields are the options.
        own: options of that command alone, which were read before: for its help, and for the nearest name.

    Returns:
        The value of each option, by its name.

    Raises:
        ValueError: unknown name (with the nearest known one), wrong type or broken YAML.
        FileNotFoundError: no such YAML file.
    """
    parser = option_parser(command, classes, show_all="--help_all" in argv, own=own)
    values = ["--help" if value == "--help_all" else value for value in argv]
    file, values = config_file(values)
    in_file = [] if file is None else _yaml_as_arguments(parser, file, get_type_hints(classes.training))
    try:
        namespace, unknown = parser.parse_known_args(in_file + values)
    except ValueError as error:
        wrong = re.match(r"argument --(\w+): (.*)", str(error), re.DOTALL)
        is_from_file = wrong is not None and not any(v.split("=")[0] == f"--{wrong[1]}" for v in values)
        if wrong is None or not is_from_file:
            raise
        raise ValueError(f"{file}: {wrong[1]}: {wrong[2]}") from None
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        known = _names(parser) | {action.dest for action in (own._group_actions if own else ())}
        raise ValueError(f"unknown option {unknown[0]!r}{_of_launcher(name) or nearest(name, known)}")
    return vars(namespace)


def config_file(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the file that ``--config FILE`` names, or None, and the other arguments."""
    parser = _Refusing(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    found, rest = parser.parse_known_args(argv)
    return found.config, rest


def check_required(command: str, model: Any, data: DataArguments, args: Options) -> None:
    """Check that what a command cannot do without is given.

    Raises:
        ValueError: an option is not set, or the rows are a stream where they have to be known beforehand.
    """
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


class _Refusing(argparse.ArgumentParser):
    """Argument parser that raises a ValueError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


COMMANDS = {
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


def option_parser(
    command: str, classes: Classes, *, show_all: bool, own: argparse._ArgumentGroup | None = None
) -> argparse.ArgumentParser:
    """Return the parser of a command, with its help in sections; `show_all` shows transformers' rarer options too."""
    usage, description = COMMANDS[command]
    refusing: Any = type("Parser", (_Refusing, classes.parser), {})
    parser: argparse.ArgumentParser = refusing(
        [classes.training, classes.model, DataArguments],
        prog=f"taid {command}",
        usage=f"taid {command} --config recipe.yaml {usage}",
        description=description,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.HelpFormatter,
    )
    sections = {
        "Objective and teacher": {f.name for f in fields(Options)},
        "Student model": {f.name for f in fields(classes.model)},
        "Data": {f.name for f in fields(DataArguments)},
        "Rows and packing (TRL's SFTConfig)": set(classes.sft.__annotations__) - _COMMON,
        "Training": set(_COMMON),
        "All other training arguments (transformers)": {f.name for f in fields(classes.training)},
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
        """Build the mapping as SafeLoader does, and refuse a key that stands twice."""
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _yaml_as_arguments(parser: argparse.ArgumentParser, path: Path, hints: Mapping[str, Any]) -> list[str]:
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
    """Say how processes are started, if the unknown option is one that starts them."""
    if name not in ("accelerate_config", *LAUNCHER):
        return ""
    return ": processes are started on the command line, by --accelerate_config ddp|fsdp2|zero2|zero3|FILE"
