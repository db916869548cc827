"""The first check of a command line: whatever can be seen without torch is answered at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import Any

from taid.config.arguments import Classes, check_required, config_file, read_options
from taid.config.data import DataArguments
from taid.config.installed import read_installed
from taid.config.options import Options


def screen(
    argv: Sequence[str], command: str, own: argparse._ArgumentGroup | None = None
) -> tuple[Any, DataArguments, Options] | None:
    """Show the help that is asked for, or check names, types, choices and ranges of a command line.

    The arguments are those of :func:`taid.config.parsing.parse`, which has the last word on them.

    Returns:
        The options of student, rows and training, as they were given; None where they cannot be read beforehand,
        because TRL's source is not as expected or the configuration comes through a pipe, which is read once.

    Raises:
        ValueError: what :func:`taid.config.parsing.parse` raises, and with the same message.
        FileNotFoundError: no such YAML file.
    """
    file, _ = config_file(argv)
    installed = read_installed()
    if installed is None or (file is not None and file.exists() and not file.is_file() and not file.is_dir()):
        return None
    training = make_dataclass("TAIDConfig", [], bases=(Options, installed.sft))
    classes = Classes(installed.parser, installed.sft, installed.model, training)
    model, data, args = classes.build(read_options(argv, command, classes, own))
    check_required(command, model, data, args)
    return model, data, args
