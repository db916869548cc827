"""Distil a large language model into a small one with TAID and the objectives it is compared with.

The flow, from the command line to the gradient:

    cli.main -> config.parsing.configured -> training.run.train -> training.trainer.TAIDTrainer.compute_loss
             -> training.step.MicroBatchLoss -> losses.fused -> losses.kernels
                TAIDTrainer._end_step -> losses.schedules.TAIDSchedule.advance -> t

Public names: :class:`TAIDTrainer`, :class:`TAIDConfig`, :class:`Teacher` for a teacher of your own, the schedules,
:func:`fused_distillation_loss` with its :class:`Head`, its plain form :func:`distillation_loss`, and the functions of
``taid.objectives``, which define what all the others compute. Importing taid imports no torch: each name is loaded when
it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from taid.losses.schedules import (
    AutoSchedule,
    AutoState,
    CurriculumTemperature,
    ScheduleState,
    TAIDSchedule,
    TemperatureState,
)

if TYPE_CHECKING:
    from taid.config.training import TAIDConfig as TAIDConfig
    from taid.losses import objectives as objectives
    from taid.losses.distillation import distillation_loss as distillation_loss
    from taid.losses.fused import Head as Head
    from taid.losses.fused import fused_distillation_loss as fused_distillation_loss
    from taid.teachers.teacher import ExactTeacher as ExactTeacher
    from taid.teachers.teacher import Teacher as Teacher
    from taid.training.trainer import TAIDTrainer as TAIDTrainer

__all__ = [
    "AutoSchedule",
    "AutoState",
    "CurriculumTemperature",
    "ExactTeacher",
    "Head",
    "ScheduleState",
    "TAIDConfig",
    "TAIDSchedule",
    "TAIDTrainer",
    "Teacher",
    "TemperatureState",
    "distillation_loss",
    "fused_distillation_loss",
    "objectives",
]

_LAZY = {
    "ExactTeacher": "taid.teachers.teacher",
    "Head": "taid.losses.fused",
    "TAIDConfig": "taid.config.training",
    "TAIDTrainer": "taid.training.trainer",
    "Teacher": "taid.teachers.teacher",
    "distillation_loss": "taid.losses.distillation",
    "fused_distillation_loss": "taid.losses.fused",
}


def __getattr__(name: str) -> Any:
    if name == "objectives":
        return importlib.import_module("taid.losses.objectives")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'taid' has no attribute {name!r}")
