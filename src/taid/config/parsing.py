"""From a command line to the checked configuration of a run."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence

import datasets
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, SFTConfig

from taid.config.arguments import Classes, check_required, read_options
from taid.config.data import DataArguments
from taid.config.training import TAIDConfig
from taid.config.values import changed

CLASSES = Classes(HfArgumentParser, SFTConfig, ModelConfig, TAIDConfig)


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
    options = read_options(argv, command, CLASSES, own)
    try:
        return CLASSES.build(options)
    except RuntimeError as error:  # what transformers raises for a device or package that an option needs
        raise ValueError(f"the options cannot be set up: {error}") from error


def configured(
    argv: Sequence[str], command: str = "train", own: argparse._ArgumentGroup | None = None
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
    check_required(command, model, data, args)
    return model, data, changed(args, disable_tqdm=not sys.stderr.isatty())  # a log file gets lines, not a bar


def quiet_logs() -> None:
    """Show taid's own messages; hide the libraries' warnings between each other, and bars where nobody watches."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # no user can act on them
    logging.basicConfig(format="%(message)s")
    logging.getLogger("taid").setLevel(logging.INFO)
