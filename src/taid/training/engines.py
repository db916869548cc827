"""The engines that split a run among processes: accelerate's DDP, FSDP2 and DeepSpeed's ZeRO.

A student is read whole and given to the engine. A teacher is not trained, so that no engine has to know it: where it is
put stands in :mod:`taid.teachers.placement`.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from taid.config.training import TAIDConfig


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


def engine_of(accelerator: Any) -> str:
    """The engine of a process: one of ddp, fsdp2, zero2 or zero3, or "none" where it is alone."""
    state = accelerator.state
    if (deepspeed := getattr(state, "deepspeed_plugin", None)) is not None:
        return f"zero{deepspeed.zero_stage}"
    if (fsdp := getattr(state, "fsdp_plugin", None)) is not None:
        return f"fsdp{fsdp.fsdp_version}"
    return "ddp" if accelerator.num_processes > 1 else "none"


def check(accelerator: Any) -> None:
    """Raise a ValueError for an engine that would give wrong numbers; set FSDP2's precision and DDP's memory right."""
    if engine_of(accelerator) == "fsdp1":
        raise ValueError("FSDP's first version is not supported: set fsdp_version: 2 (--accelerate_config fsdp2)")
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("context and sequence parallelism are not supported: the loss would miss tokens")
    if parallelism is not None and parallelism.tp_enabled and engine_of(accelerator) != "ddp":
        raise ValueError(f"a student by tensor parallelism needs --accelerate_config ddp, not {engine_of(accelerator)}")
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
    """Return the message for a process that has waited in vain for another one; None for any other error."""
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
