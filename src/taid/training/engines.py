"""The engines that split a run among processes, and where a teacher is put under each.

The engines are accelerate's: DDP, FSDP2 and DeepSpeed's ZeRO, here with ready files and the processes started by name.
A student is read whole and given to the engine. A teacher is not trained, so that no engine has to know it: where it is
sharded, transformers cuts it among the processes while it reads it, by FSDP2, under DDP and ZeRO too.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from taid.config.training import TAIDConfig

READY = ("ddp", "fsdp2", "zero2", "zero3")
# Options of `accelerate launch` that a run may be given beside the file.
LAUNCHER = "num_processes num_machines machine_rank main_process_ip main_process_port".split()


# --- starting ---------------------------------------------------------------------------------------------------------


def asked(arguments: Sequence[str]) -> bool:
    """Whether a command line is to start processes, and is not one that was started."""
    return "LOCAL_RANK" not in os.environ and any(a.split("=")[0] == "--accelerate_config" for a in arguments)


def launch(arguments: Sequence[str]) -> int:
    """Start the processes of ``taid COMMAND --accelerate_config NAME|PATH ...``, and wait for them.

    Returns:
        0, or 128 and the number of the signal that killed a process, or the exit status of the first that failed.

    Raises:
        ValueError: there is no such file, or it cannot be used here.
    """
    import accelerate.commands.launch as accelerate_launch
    import torch
    import yaml
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    values, command = split(arguments)
    if values["accelerate_config"] in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"{values['accelerate_config']} needs DeepSpeed: pip install 'taid[zero]'")
    path = _file(values.pop("accelerate_config"))
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
    """The options of the launcher, and the command line of each process."""
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


def _file(name: str) -> Path:
    if name in READY:
        return Path(str(resources.files("taid") / "assets" / "engines" / f"{name}.yaml"))
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"--accelerate_config {name}: neither a file nor one of {', '.join(READY)} (`accelerate config "
            f"--config_file {name}` asks questions and writes one)"
        )
    return path


# --- in each process --------------------------------------------------------------------------------------------------


def prepare(args: TAIDConfig) -> None:
    """Let a process of an engine read models whole, and offer the engines on CPUs, where accelerate has DDP alone."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # or all ranks but the first would hold empty models
    if args.device.type != "cpu" or "LOCAL_RANK" not in os.environ:
        return
    from accelerate.state import DistributedType, PartialState

    if _is_set("ACCELERATE_USE_FSDP") or "distributed_config" in (args.model_init_kwargs or {}):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # which accelerate makes FSDP of
    elif _is_set("ACCELERATE_USE_DEEPSPEED"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed import comm

        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED


def of(accelerator: Any) -> str:
    """The engine of a process: one of :data:`READY`, or "none" where it is alone."""
    state = accelerator.state
    if (deepspeed := getattr(state, "deepspeed_plugin", None)) is not None:
        return f"zero{deepspeed.zero_stage}"
    if (fsdp := getattr(state, "fsdp_plugin", None)) is not None:
        return f"fsdp{fsdp.fsdp_version}"
    return "ddp" if accelerator.num_processes > 1 else "none"


def check(accelerator: Any) -> None:
    """Raise a ValueError for an engine that would give wrong numbers; set FSDP2's precision and DDP's memory right."""
    if of(accelerator) == "fsdp1":
        raise ValueError("FSDP's first version is not supported: set fsdp_version: 2 (--accelerate_config fsdp2)")
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("context and sequence parallelism are not supported: the loss would miss tokens")
    if parallelism is not None and parallelism.tp_enabled and of(accelerator) != "ddp":
        raise ValueError(f"a student by tensor parallelism needs --accelerate_config ddp, not {of(accelerator)}")
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.gradient_as_bucket_view = True  # or DDP holds all gradients twice
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.mixed_precision_policy is not None:
        import torch

        # accelerate rounds what each module gives to 16 bits, the loss among it, and sums gradients in them.
        fsdp.mixed_precision_policy = dataclasses.replace(
            fsdp.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def lost(error: Exception) -> str | None:
    """What to say where a process has waited in vain for another one; None for any other error."""
    is_of_peers = "gloo" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")
    return f"another process of the run is gone or hangs ({error})" if is_of_peers else None


def leave(status: int) -> NoReturn:
    """End one of several processes, with all that is due at its end but without taking the interpreter apart.

    Gloo's threads may still hold a tensor of the last reduction then, and abort the process (pytorch#179291).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shards_weights(args: TAIDConfig) -> bool:
    """Whether the engine of a run cuts the student's weights among its processes."""
    deepspeed = args.deepspeed_plugin
    return bool(args.fsdp) or _is_set("ACCELERATE_USE_FSDP") or (deepspeed is not None and deepspeed.zero_stage == 3)


@contextlib.contextmanager
def read_whole() -> Iterator[None]:
    """Within this context transformers reads a model as it is, where ZeRO-3 would cut it up."""
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def fit_checkpoint(checkpoint: Path, accelerator: Any) -> bool:
    """Let DeepSpeed take up a checkpoint of another number of processes: by its own converter, beside what is there.

    Returns:
        Whether that was needed.

    Raises:
        ValueError: the converter fails; says with what.
    """
    latest = checkpoint / "latest"
    if not latest.is_file():
        return False
    tag = latest.read_text(encoding="utf-8").strip()
    if len(list((checkpoint / tag).glob("*_optim_states.pt"))) == accelerator.num_processes:
        return False
    if accelerator.is_main_process:
        made = [f"--input_folder={checkpoint / tag}", f"--output_folder={checkpoint / tag}_universal"]
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *made, "--inject_missing_state"]
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        if done.returncode:
            raise ValueError(
                f"{checkpoint} was written by another number of processes, and DeepSpeed's converter "
                f"(ds_to_universal) fails on it: {done.stderr.strip().splitlines()[-1]}. Resume with as many as then"
            )
        (checkpoint / "latest_universal").write_text(f"{tag}_universal", encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    return True


def check_checkpoint(checkpoint: Path, accelerator: Any) -> None:
    """See that a checkpoint is this engine's.

    Raises:
        ValueError: it is another engine's; says whose.
    """
    engine = of(accelerator)
    whose = "zero" if (checkpoint / "latest").is_file() else ""
    whose = "fsdp2" if any(checkpoint.glob("pytorch_model_fsdp*")) else whose  # a folder of shards, or whole
    if not (engine.startswith(whose) if whose else not engine.startswith(("fsdp", "zero"))):
        written = {"": "one process or ddp", "zero": "zero2 or zero3"}.get(whose, whose)
        raise ValueError(
            f"{checkpoint} was written by {written}, and this run's engine is {engine}: resume it with the "
            "--accelerate_config it was begun with (versions.json says which)"
        )


def part_steps(optimizer: Any) -> None:
    """Give each part of the weights its own counter of Adam's steps.

    From a converted checkpoint DeepSpeed (0.19.8) gives all parts one, which each of them then moves.
    """
    for state in optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()


# --- the teacher ------------------------------------------------------------------------------------------------------


def placement(args: TAIDConfig, *, can_be_cut: bool) -> str:
    """Where the teacher is put: as asked for; sharded where the engine shards the student too and it `can_be_cut`."""
    if args.teacher_placement != "auto":
        return args.teacher_placement
    return "sharded" if can_be_cut and shards_weights(args) else "replicated"


def reading(args: TAIDConfig, where: str) -> dict[str, Any]:
    """What from_pretrained is told so that it quantizes the teacher, or cuts it up: each process reads its own part.

    A machine's processes hold one teacher together, so that its layers are gathered by the fast links within it.
    """
    if args.teacher_quantization is not None:
        import torch

        compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        return {"quantization_config": quantized(args.teacher_quantization, compute), "device_map": {"": args.device}}
    if args.world_size == 1 or where == "replicated":
        return {}
    from transformers.distributed import DistributedConfig

    a_machine = int(os.environ.get("LOCAL_WORLD_SIZE", str(args.world_size)))
    a_machine = a_machine if args.world_size % a_machine == 0 else args.world_size
    is_by_tensor = where == "tensor_parallel"
    config = DistributedConfig(
        tp_size=a_machine if is_by_tensor else None,
        fsdp_size=None if is_by_tensor else a_machine,
        dp_replicate_size=args.world_size // a_machine,
        fsdp_cpu_offload=where == "cpu" and args.device.type != "cpu",
    )
    return {"distributed_config": config}


def quantized(name: str, compute: torch.dtype) -> Any:
    """The configuration by which transformers quantizes a model as it reads it; 4 bits are computed in `compute`.

    Raises:
        ValueError: its package is not installed.
    """
    from transformers import BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig

    package = {"bnb": "bitsandbytes", "torchao": "torchao"}.get(name.partition("_")[0])
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"{name} needs {package}: pip install {package}")
    if name == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "bnb_4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    if name == "fp8":
        return FineGrainedFP8Config()
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if name == "torchao_int8" else Int4WeightOnlyConfig())


def put(model: Any, args: TAIDConfig) -> None:
    """Put a teacher that was read where it belongs, if it is not there yet.

    Raises:
        ValueError: transformers does not know how to cut it up.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False):
        _require_cut(model)
    elif args.teacher_placement == "cpu" and not hasattr(model, "hf_device_map"):
        from accelerate import cpu_offload

        head = model.get_output_embeddings()
        weight = head.weight  # stays on the device, where the loss needs it
        cpu_offload(model.base_model, execution_device=args.device)
        head.weight = weight
        head.to(args.device)
    elif not hasattr(model, "hf_device_map"):
        model.to(args.device)


def _require_cut(model: Any) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    parts: list[Any] = [module for name, module in model.named_modules() if name and isinstance(module, FSDPModule)]
    if (size := model.tp_size or 1) > 1:
        parts, text = [model], model.config.get_text_config()
        for name in ("num_attention_heads", "num_key_value_heads"):
            if (getattr(text, name, None) or 0) % size:
                raise ValueError(
                    f"teacher_placement: tensor_parallel gives each of a machine's {size} processes as many heads, but "
                    f"the teacher's {name} are {getattr(text, name)}: set teacher_placement: sharded"
                )
    cut = {weight for part in parts for weight in part.parameters() if isinstance(weight, DTensor)}
    whole = sum(weight.numel() for weight in model.parameters())
    if sum(weight.numel() for weight in cut) < whole / 2:
        kind = type(model).__name__.removeprefix("FSDP")
        raise ValueError(
            f"transformers has no plan by which a {kind} is cut layer by layer, so that each process would hold or "
            "gather the whole teacher: set teacher_placement: replicated, or use a teacher_cache"
        )
