"""The configuration of a training run: taid's options and TRL's, each value checked at construction."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from trl import SFTConfig

from taid.config.options import Options
from taid.losses.schedules import AutoSchedule, TAIDSchedule, auto_alpha


@dataclass
class TAIDConfig(Options, SFTConfig):  # type: ignore[misc]
    """Everything that :class:`taid.TAIDTrainer` can be told: taid's options, TRL's and transformers'.

    Each field's help says what it does. Building a configuration changes nothing but itself, and nobody alters it
    afterwards: :func:`taid.config.values.changed` gives a copy with other values.

    Raises:
        ValueError: a value out of range, or an option that does not go together with another; names it and the remedy.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        """Check taid's own values, then let TRL and transformers check theirs."""
        Options.__post_init__(self)
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16: bool | None = False  # TRL's default would be refused on a machine without an accelerator
        if self.activation_checkpointing is None:  # TRL sets only the old name, which transformers warns about
            self.activation_checkpointing: bool | None = self.gradient_checkpointing
        if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
            self.use_cpu: bool = True  # or each process would take itself for the only one
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers takes whatever does not end with "loss" for something to be maximised, a KL too.
            self.greater_is_better: bool | None = self.metric_for_best_model.endswith("accuracy")
        SFTConfig.__post_init__(self)
        spread = (self.model_init_kwargs or {}).get("distributed_config") or {}
        if isinstance(spread, dict) and (other := spread.keys() - {"tp_size", "tp_plan"}):
            raise ValueError(
                f"model_init_kwargs: distributed_config may give tp_size and tp_plan, not {', '.join(sorted(other))}: "
                "a student is sharded by --accelerate_config fsdp2 or zero3"
            )
        if self.train_tokens is not None:
            self.max_steps: int = self._steps_for(self.train_tokens)

    def _steps_for(self, tokens: int) -> int:
        """Return the steps that `tokens` are in rows of `max_length`: N is known before the first row is read."""
        assert self.max_length is not None
        processes = self.world_size // (self.parallelism_config.tp_size if self.parallelism_config else 1)
        a_step = self.max_length * self.train_batch_size * self.gradient_accumulation_steps * processes
        steps: int = math.ceil(tokens / a_step)
        if self.max_steps not in (-1, steps):
            raise ValueError(
                f"train_tokens {tokens:,} are {steps:,} steps of {a_step:,} tokens, but max_steps is "
                f"{self.max_steps:,}: set one of the two"
            )
        return steps

    def schedule_for(self, total_steps: int) -> TAIDSchedule | AutoSchedule:
        """Return the schedule by which t moves in a run of `total_steps`."""
        if self.taid_schedule == "auto":
            return AutoSchedule(total_steps)
        alpha = self.alpha_for(total_steps)
        return TAIDSchedule(total_steps, self.taid_t_start, self.taid_t_end, alpha, self.taid_beta, self.taid_adaptive)

    def alpha_for(self, total_steps: int) -> float:
        """Return the step size of t in a run of `total_steps`."""
        return auto_alpha(total_steps) if isinstance(self.taid_alpha, str) else float(self.taid_alpha or 0.0)
