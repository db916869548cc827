"""The objective's own parameters. TAID's t and ctkd's temperature move once an optimizer step."""

from __future__ import annotations

import logging
from typing import Any

from taid.config.training import TAIDConfig
from taid.losses.objective_table import OBJECTIVES, Objective
from taid.losses.schedules import (
    AutoSchedule,
    AutoState,
    CurriculumTemperature,
    ScheduleState,
    TAIDSchedule,
    TemperatureState,
)

logger = logging.getLogger(__name__)

_WITH_T = (ScheduleState, AutoState)


class ObjectiveState:
    """The parameters that an objective is given beside logits, in each optimizer step.

    Args:
        args: the objective and its options.
    """

    def __init__(self, args: TAIDConfig) -> None:
        self.args = args
        self._objective = OBJECTIVES.get(args.objective, Objective("a function of the user's own"))
        self.schedule: TAIDSchedule | AutoSchedule | CurriculumTemperature | None = None
        self.state: ScheduleState | AutoState | TemperatureState | None = None

    def start(self, total_steps: int, *, say: bool) -> None:
        """Make the schedule of a run of `total_steps` optimizer steps, and log what it will do if `say` is true."""
        args = self.args
        if args.kd_ratio == 0:
            return
        if self._objective.moves == "t":
            schedule = args.schedule_for(total_steps)
            self.schedule, self.state = schedule, schedule.initial_state()
            if say:
                logger.log(logging.INFO if schedule.is_as_asked else logging.WARNING, schedule.regime())
        elif self._objective.moves == "temperature":
            self.schedule = CurriculumTemperature(total_steps)
            self.state = self.schedule.initial_state()

    @property
    def t(self) -> float:
        """TAID's t of this optimizer step."""
        return self.state.t if isinstance(self.state, _WITH_T) else self.args.taid_t_start

    @property
    def _last_t(self) -> float:
        # What auto ends with is no more than a little sharpening: evaluated is forward KL, as of any other objective.
        return 1.0 if self.args.taid_schedule == "auto" else self.args.taid_t_end

    @property
    def temperature(self) -> float:
        """The temperature that ctkd has learned by this optimizer step."""
        schedule, state = self.schedule, self.state
        if not isinstance(schedule, CurriculumTemperature) or not isinstance(state, TemperatureState):
            schedule = CurriculumTemperature(total_steps=1)
            state = schedule.initial_state()
        return schedule.temperature(state)

    def parameters(self, *, training: bool) -> dict[str, float]:
        """Return the objective's parameters in this optimizer step; in evaluation t stands at its end."""
        parameters = {name: getattr(self.args, option) for name, option in self._objective.parameters.items()}
        if self._objective.moves == "t":
            parameters["t"] = self.t if training else self._last_t
        elif self._objective.moves == "temperature":
            parameters["temperature"] = self.temperature
        return parameters

    @property
    def signal(self) -> str:
        """Name the sum of the loss that moves them."""
        if self._objective.moves == "temperature":
            return "temperature_gradient"
        is_of_paper = isinstance(self.schedule, TAIDSchedule)
        return "target_cross_entropy" if is_of_paper and self.args.taid_signal == "cross_entropy" else "objective"

    def advance(self, signal: float) -> None:
        """End an optimizer step; `signal` is its mean over the trained tokens of all processes."""
        if self.schedule is not None:
            self.state = self.schedule.advance(self.state, signal)  # type: ignore[arg-type]

    def logged(self) -> dict[str, float]:
        """Return what is logged of this optimizer step."""
        if isinstance(self.state, ScheduleState):
            return {"t": self.t, "momentum": self.state.momentum}
        if isinstance(self.state, AutoState):
            return {"t": self.t}
        return {} if self.state is None else {"temperature": self.temperature}

    @property
    def options(self) -> list[str]:
        """The options that a checkpoint and its continuation must share."""
        is_without_t = self._objective.moves == "t" and self.schedule is None
        return [] if is_without_t else list(self._objective.options)

    def saved(self) -> dict[str, Any] | None:
        """Return the state as a checkpoint keeps it, bit for bit."""
        return None if self.state is None else self.state.to_dict()

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a state that :meth:`saved` returned."""
        if self.state is not None:
            self.state = type(self.state)(**saved)
