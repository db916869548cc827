"""Start the processes of ``taid train`` and ``taid cache`` by ``--accelerate_config``, with accelerate's launcher."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

READY = ("ddp", "fsdp2", "zero2", "zero3")


def asked(arguments: Sequence[str]) -> bool:
    """Return whether a command line is to start processes, and is not one that was started."""
    return "LOCAL_RANK" not in os.environ and any(a.split("=")[0] == "--accelerate_config" for a in arguments)


def launch(arguments: Sequence[str]) -> int:
    """Start the processes of ``taid COMMAND --accelerate_config NAME|PATH ...``, and wait for them.

    Returns:
        0, or 128 and the number of the signal that killed a process, or the exit status of the first that failed.

    Raises:
        ValueError: there is no such file, or it cannot be used here.
    """
    values, command = split(arguments)
    if values["accelerate_config"] in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"{values['accelerate_config']} needs DeepSpeed: pip install 'taid[zero]'")
    path = config_file(values.pop("accelerate_config"))
    import accelerate.commands.launch as accelerate_launch
    import torch
    import yaml
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "num_processes" not in values and not torch.accelerator.is_available():
        raise ValueError("without a GPU say how many processes --accelerate_config starts: --num_processes 2")
    options = [f"--{name}={value}" for name, value in values.items()]
    try:
        parsed = accelerate_launch.launch_command_parser().parse_args(
            ["--config_file", str(path), *options, "-m", "taid", *command]
        )
        accelerate_launch.launch_command(parsed)
    except ChildFailedError as error:
        # A process that another one was lost to may end as soon as that one.
        killed = ((r, f) for r, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM)
        rank, failure = next(killed, error.get_first_failure())
        return _status(rank, failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    # What accelerate raises for a file that is not as it should be.
    except (ImportError, KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--accelerate_config {path}: {error}") from error
    return 0


def _status(rank: int, code: int) -> int:
    if code >= 0:
        return code  # and its process has said what was wrong
    name = signal.Signals(-code).name
    if code != -signal.SIGTERM:
        print(
            f"taid: error: rank {rank} was ended by {name}, and the others with it: go on from the last checkpoint "
            "with --resume_from_checkpoint",
            file=sys.stderr,
        )
    return 128 - code


def split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options of the launcher, and the command line of each process."""
    from taid.config.arguments import LAUNCHER

    values: dict[str, str] = {}
    rest, waiting = [], list(arguments)
    while waiting:
        name, has_value, value = waiting.pop(0).partition("=")
        if name.removeprefix("--") not in ("accelerate_config", *LAUNCHER):
            rest.append(name + has_value + value)
            continue
        if not has_value:
            if not waiting or waiting[0].startswith("--"):
                raise ValueError(f"{name} needs a value")
            value = waiting.pop(0)
        values[name.removeprefix("--")] = value
    for name in {"num_processes", "num_machines"} & values.keys():
        if not values[name].isdecimal() or int(values[name]) < 1:
            raise ValueError(f"--{name} must be a positive number, got {values[name]!r}")
    return values, rest


def config_file(name: str) -> Path:
    """Return the file of accelerate's configuration: one of :data:`READY` by name, or a path that exists."""
    if name in READY:
        return Path(str(resources.files("taid") / "assets" / "engines" / f"{name}.yaml"))
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"--accelerate_config {name}: neither a file nor one of {', '.join(READY)} (`accelerate config "
            f"--config_file {name}` asks questions and writes one)"
        )
    return path
