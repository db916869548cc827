"""Resuming: what a checkpoint and its continuation must share, and checkpoints of other engines or processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from taid.config.combinations import SAMPLING_OPTIONS
from taid.config.training import TAIDConfig
from taid.data.stream import Stream
from taid.training.engines import engine_of

# Beside objective, schedule and N: what a checkpoint's optimizer state, rows and weights belong to.
_OPTIONS = (
    "model_name_or_path teacher_model_name_or_path teacher_quantization dataset_name max_length packing seed data_seed "
    "optim learning_rate weight_decay lr_scheduler_type warmup_steps max_grad_norm adam_beta1 adam_beta2 adam_epsilon "
    "router_aux_loss_coef bf16 fp16 use_peft lora_r lora_alpha lora_target_modules"
).split()


def run_identity(
    args: TAIDConfig, configuration: dict[str, Any], *, options: list[str], stream: Stream | None,
    teacher_kind: str | None, total_steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Return what a run is, as far as its checkpoints depend on it.

    Args:
        args: the options of the run.
        configuration: all options as config.yaml has them.
        options: of the objective and its schedule.
        stream: of the rows, if they are one.
        teacher_kind: what the teacher's answers are worth; None where nothing is distilled.
        total_steps: how many optimizer steps the run has.
    """
    names = ["objective", "kd_ratio", *options, *_OPTIONS]
    identity = {name: configuration.get(name) for name in names}
    if stream is not None:
        # A place counts prepared rows, and is that of one process among so many.
        identity |= {name: configuration.get(name) for name in ("dataset_weights", "packing_strategy")}
        identity |= {"files of the stream": stream.identity(), "processes": args.world_size}
    if args.samples_answers:
        names = [*SAMPLING_OPTIONS, *(["eval_strategy", "eval_steps"] if args.sampling == "adaptive" else [])]
        identity |= {name: configuration.get(name) for name in names}
    return identity | {
        "total_steps": total_steps,
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "teacher_signal": teacher_kind if args.distillation_share > 0 else None,
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
    engine = engine_of(accelerator)
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
