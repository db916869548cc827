"""Distil a large language model into a small one with TAID and the objectives it is compared with.

The flow, from the command line to the gradient:

    cli.main -> config.parse -> data.load_rows -> trainer.TAIDTrainer.compute_loss -> objectives.taid
                                                  trainer._end_step -> schedule.TAIDSchedule.advance -> t

Public names: :class:`TAIDTrainer`, :class:`TAIDConfig`, :class:`TAIDSchedule` and the functions of
:mod:`taid.objectives`. Importing taid imports no torch: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from taid.schedule import ScheduleState, TAIDSchedule

if TYPE_CHECKING:
    from taid import objectives as objectives
    from taid.config import TAIDConfig as TAIDConfig
    from taid.trainer import TAIDTrainer as TAIDTrainer

__all__ = ["ScheduleState", "TAIDConfig", "TAIDSchedule", "TAIDTrainer", "objectives"]

_LAZY = {"TAIDConfig": "taid.config", "TAIDTrainer": "taid.trainer"}


def __getattr__(name: str) -> Any:
    if name == "objectives":
        return importlib.import_module("taid.objectives")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'taid' has no attribute {name!r}")
