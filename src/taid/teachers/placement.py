"""Place a teacher's weights: whole on each process, sharded among processes, or on the CPU.

A teacher is not trained, so no engine has to manage it. If it is sharded, transformers shards it with FSDP2 while
loading, under DDP and ZeRO too.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from taid.config.training import TAIDConfig
from taid.models.loading import quantization_config


def choose(args: TAIDConfig, *, can_be_cut: bool) -> str:
    """Return the placement that was asked for; by default sharded if the engine shards the student and `can_be_cut`."""
    if args.teacher_placement != "auto":
        return args.teacher_placement
    return "sharded" if can_be_cut and shards_weights(args) else "replicated"


def loading_options(args: TAIDConfig, where: str) -> dict[str, Any]:
    """Return options of from_pretrained that quantize the teacher or shard it; each process reads its own part.

    The processes of one machine share a teacher, so that its layers are gathered over the fast links within it.
    """
    if args.teacher_quantization is not None:
        import torch

        compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        return {
            "quantization_config": quantization_config(args.teacher_quantization, compute),
            "device_map": {"": args.device},
        }
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


def place(model: Any, args: TAIDConfig) -> None:
    """Move a loaded teacher to its placement if it is not there yet.

    Raises:
        ValueError: transformers cannot shard this model.
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


def shards_weights(args: TAIDConfig) -> bool:
    """Return whether the engine of a run shards the student's weights among its processes."""
    deepspeed = args.deepspeed_plugin
    is_fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return is_fsdp or (deepspeed is not None and deepspeed.zero_stage == 3)


def teacher_init_kwargs(args: TAIDConfig) -> dict[str, Any]:
    """Return the teacher's further arguments of from_pretrained, without its name and revision."""
    dtype = {"dtype": "auto" if args.bf16 or args.fp16 else torch.float32}
    return dtype | (args.teacher_model_init_kwargs or {})  # type: ignore[operator]
