"""Options and methods of ``taid compare``, and the checks of them that need no torch."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from taid.config.arguments import Loader
from taid.config.values import in_yaml, nearest
from taid.losses.objective_table import OBJECTIVES

# `taid_linear` is the paper's ablation, `taid_auto` our schedule; GKD and DistiLLM let the student write answers too.
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"objective": name} for name in OBJECTIVES},
    "taid_linear": {"objective": "taid", "taid_schedule": "paper", "taid_adaptive": False},
    "taid_auto": {"objective": "taid", "taid_schedule": "auto"},
    "gkd": {"objective": "jsd", "sampling": "mixed"},
    "distillm": {"objective": "skew_forward_kl", "sampling": "adaptive"},
    "distillm_reverse": {"objective": "skew_reverse_kl", "sampling": "adaptive"},
    "taid_sampled": {"objective": "taid", "sampling": "mixed"},
}
# Of `taid train`, what nobody gives to a comparison but by mistake; a recipe may hold it for a run of its own.
_OF_ONE_RUN = {
    "objective": "name methods by --objectives A,B",
    "seed": "give --seeds, so many or 0,1,7",
    "data_seed": "give --seeds, so many or 0,1,7",
    "resume_from_checkpoint": "called again, a comparison goes on by itself",
    "overwrite_output_dir": "a comparison is not overwritten: delete its folder, or choose another",
}
# What the runs of a comparison have in common, and a variant may not change.
_SHARED = (
    "config output_dir overwrite_output_dir resume_from_checkpoint push_to_hub seed data_seed "
    "model_name_or_path model_revision teacher_model_name_or_path teacher_model_revision trust_remote_code "
    "teacher_cache teacher_server_url dataset_name dataset_config dataset_train_split dataset_test_split "
    "dataset_text_field dataset_weights streaming eval_dataset_name "
    "max_length truncation_mode completion_only_loss assistant_only_loss eos_token tokenizer_from"
).split()


def own_options() -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """Return the parser of the options of ``taid compare`` itself, and their group for its help."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    group = parser.add_argument_group("Comparison")
    add, others = group.add_argument, ", ".join(name for name in METHODS if name not in OBJECTIVES)
    add("--objectives", default="sft,forward_kl,reverse_kl,taid,taid_linear", metavar="A,B", help="The methods: values "
        f"of --objective, {others}, and names of --variants. (default: %(default)s)")  # fmt: skip
    add("--variants", type=Path, metavar="FILE", help="YAML of more methods, a name and its options each, as "
        "taid_low: {objective: taid, taid_t_start: 0.2}; those that --objectives names are compared.")  # fmt: skip
    add("--seeds", default="5", metavar="N", help="So many, 0 to N - 1, or which: 0,1,7. (default: %(default)s)")
    add("--learning_rates", default="", metavar="X,Y", help="Each method gets the one that was best for it with the "
        "first seed on eval_dataset_name; needs --test. Without, all have the recipe's.")  # fmt: skip
    add("--select", choices=("cross_entropy", "kl"), default="cross_entropy", help="What is lowest at the best "
        "learning rate. (default: %(default)s)")  # fmt: skip
    add("--test", metavar="ROWS", help="Rows that are measured once, at the end; without, those of eval_dataset_name.")
    add("--generate", default="0", metavar="N", help="Also answer the first N of their prompts. (default: %(default)s)")
    add("--baseline", metavar="A", help="Method that differences are to; forward_kl by default, or else the first.")
    add("--processes", default="1", metavar="N", help="Runs that go on at a time. (default: %(default)s)")
    return parser, group


def options_of(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of ``taid compare`` itself, each with its value read, and the recipe's arguments.

    Raises:
        ValueError: an option without a value, or with one that it does not have.
        FileNotFoundError: the file of ``--variants`` does not exist.
    """
    try:
        options, arguments = own_options()[0].parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and name in _OF_ONE_RUN:
            raise ValueError(f"--{name} is of one run: {_OF_ONE_RUN[name]}")
    options.methods = _methods([name.strip() for name in options.objectives.split(",")], options.variants)
    options.learning_rates = _numbers("--learning_rates", options.learning_rates, float)
    is_listed = "," in options.seeds
    options.seeds = (
        _numbers("--seeds", options.seeds, int) if is_listed else [*range(_count("--seeds", options.seeds, 1))]
    )
    options.generate, options.processes = (
        _count(f"--{name}", getattr(options, name), least) for name, least in (("generate", 0), ("processes", 1))
    )
    if options.test == "":
        raise ValueError("--test is empty: name rows, or leave it away")
    return options, arguments


def _numbers(name: str, text: str, kind: Any) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{name} are numbers with commas between, got {text!r}") from None
    if (text and not found) or len(set(found)) < len(found) or any(not 0 <= number < math.inf for number in found):
        raise ValueError(f"{name} are different numbers, none of them negative, got {text!r}")
    return found


def _count(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {text!r}")
    return int(text)


def _methods(names: Sequence[str], variants: Path | None) -> dict[str, dict[str, Any]]:
    """Return the options of each method that is named."""
    more = {} if variants is None else _read_variants(variants)
    if more and not set(names) & set(more):
        raise ValueError(f"--variants {variants}: add those of {', '.join(more)} that are meant to --objectives")
    known = METHODS | more
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise ValueError(f"--objectives: {name!r} does not exist{near} (choices: {', '.join(known)})")
        if list(names).count(name) > 1:
            raise ValueError(f"--objectives: {name} stands twice")
    return {name: known[name] for name in names}


def _read_variants(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"--variants {path}: there is no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"--variants {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(options, dict) for options in content.values()):
        raise ValueError(
            f"--variants {path} must hold a mapping of names to options, as taid_low: {{taid_t_start: 0.2}}"
        )
    known = set(METHODS)
    for name, options in content.items():
        if not isinstance(name, str):
            raise ValueError(
                f"--variants {path}: the name {name!r} is no text: put it between quotes, or choose another"
            )
        if not re.fullmatch(r"\w[\w.+]*", name) or len(name.encode()) > 100:
            raise ValueError(f"--variants {path}: {name!r} names folders: use letters, digits, _, . and +, at most 100")
        if name.casefold() in known:  # of folders some systems do not tell capitals
            raise ValueError(f"--variants {path}: {name} is a method already: choose another name")
        known.add(name.casefold())
        for option in [option for option in _SHARED if option in options]:
            raise ValueError(f"--variants {path}: {name} sets {option}, which all runs of a comparison have in common")
        for option, value in options.items():
            if value is None or not _is_json(value):
                raise ValueError(
                    f"--variants {path}: {name}: {option} is {in_yaml(value)}: give a number, text, true or false, a "
                    "list or a mapping"
                )
    return content


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
