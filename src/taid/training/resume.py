"""What must not change between a checkpoint and its continuation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taid.training import on_policy

if TYPE_CHECKING:
    from taid.training.trainer import TAIDTrainer

# Beside objective, schedule and N: what a checkpoint's optimizer state, rows and weights belong to.
_OPTIONS = (
    "model_name_or_path teacher_model_name_or_path teacher_quantization dataset_name max_length packing seed data_seed "
    "optim learning_rate weight_decay lr_scheduler_type warmup_steps max_grad_norm adam_beta1 adam_beta2 adam_epsilon "
    "router_aux_loss_coef bf16 fp16 use_peft lora_r lora_alpha lora_target_modules"
).split()


def of(trainer: TAIDTrainer) -> dict[str, Any]:
    """What a run is, as far as its checkpoints depend on it."""
    args, configuration, stream = trainer.args, trainer.configuration, trainer.stream
    names = ["objective", "kd_ratio", *trainer.moving.options, *_OPTIONS]
    identity = {name: configuration.get(name) for name in names}
    if stream is not None:
        # A place counts prepared rows, and is that of one process among so many.
        identity |= {name: configuration.get(name) for name in ("dataset_weights", "packing_strategy")}
        identity |= {"files of the stream": stream.identity(), "processes": args.world_size}
    if trainer.sampling is not None:
        names = [*on_policy.OPTIONS, *(["eval_strategy", "eval_steps"] if args.sampling == "adaptive" else [])]
        identity |= {name: configuration.get(name) for name in names}
    signal = trainer.teacher.kind if trainer.teacher is not None and args.distillation_share > 0 else None
    return identity | {
        "total_steps": trainer.state.max_steps,
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "teacher_signal": signal,
    }


def require_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a ValueError that names what a checkpoint and the run that resumes it do not share."""
    if "taid_schedule" in now:
        before = {"taid_schedule": "paper"} | before  # checkpoints from before there was a choice
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*now, *before})
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(f"the checkpoint belongs to another run: {'; '.join(differing)}. Resume with the old values.")
