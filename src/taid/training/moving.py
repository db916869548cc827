"""The objective's own parameters, of which TAID's t and ctkd's temperature move once an optimizer step."""

from __future__ import annotations

import logging
from typing import Any

from taid.config.training import TAIDConfig
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
_OPTIONS = {
    "taid": "taid_schedule taid_t_start taid_t_end taid_alpha taid_beta taid_adaptive taid_signal taid_mixture".split(),
    "jsd": ["jsd_beta"],
    "skew_forward_kl": ["skew"],
    "skew_reverse_kl": ["skew"],
    "adaptive_kl": ["head_mass"],
    "dkd": ["dkd_alpha", "dkd_beta", "dkd_temperature"],
    "abkd": ["abkd_alpha", "abkd_beta"],
    "amid": ["amid_mixture", "amid_share", "abkd_alpha", "abkd_beta"],
}


class MovingParameters:
    """What an objective is given beside logits, in each optimizer step.

    Args:
        args: the objective and its options.
    """

    def __init__(self, args: TAIDConfig) -> None:
        self.args = args
        self.schedule: TAIDSchedule | AutoSchedule | CurriculumTemperature | None = None
        self.state: ScheduleState | AutoState | TemperatureState | None = None

    def start(self, total_steps: int, *, say: bool) -> None:
        """Make the schedule of a run of so many optimizer steps; `say` what it will be."""
        args = self.args
        if args.kd_ratio == 0:
            return
        if args.objective == "taid":
            schedule = args.schedule_for(total_steps)
            self.schedule, self.state = schedule, schedule.initial_state()
            if say:
                logger.log(logging.INFO if schedule.is_as_asked else logging.WARNING, schedule.regime())
        elif args.objective == "ctkd":
            self.schedule = CurriculumTemperature(total_steps)
            self.state = self.schedule.initial_state()

    @property
    def t(self) -> float:
        """Where TAID's target stands in this optimizer step."""
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

    def of_step(self, *, training: bool) -> dict[str, float]:
        """The objective's parameters in this optimizer step; in evaluation t stands at its end."""
        args = self.args
        powers = {"alpha": args.abkd_alpha, "beta": args.abkd_beta}
        of_objective: dict[str, dict[str, float]] = {
            "taid": {"t": self.t if training else self._last_t, "mixture": args.taid_mixture},
            "jsd": {"beta": args.jsd_beta},
            "skew_forward_kl": {"skew": args.skew},
            "skew_reverse_kl": {"skew": args.skew},
            "adaptive_kl": {"head_mass": args.head_mass},
            "dkd": {"alpha": args.dkd_alpha, "beta": args.dkd_beta, "temperature": args.dkd_temperature},
            "abkd": powers,
            "amid": {"mixture": args.amid_mixture, "share": args.amid_share} | powers,
            "ctkd": {"temperature": self.temperature},
        }
        return of_objective.get(args.objective, {})

    @property
    def signal(self) -> str:
        """Which of the loss's sums they move by."""
        if self.args.objective == "ctkd":
            return "temperature_gradient"
        is_of_paper = isinstance(self.schedule, TAIDSchedule)
        return "target_cross_entropy" if is_of_paper and self.args.taid_signal == "cross_entropy" else "objective"

    def advance(self, signal: float) -> None:
        """End an optimizer step, of which `signal` is the mean over trained tokens, over all processes."""
        if self.schedule is not None:
            self.state = self.schedule.advance(self.state, signal)  # type: ignore[arg-type]

    def logged(self) -> dict[str, float]:
        """What of them stands in the log of this optimizer step."""
        if isinstance(self.state, _WITH_T):
            return {"t": self.t}
        return {} if self.state is None else {"temperature": self.temperature}

    @property
    def options(self) -> list[str]:
        """The options that a checkpoint and its continuation must share."""
        is_without_t = self.args.objective == "taid" and self.schedule is None
        return [] if is_without_t else _OPTIONS.get(self.args.objective, [])

    def saved(self) -> dict[str, Any] | None:
        """The state as a checkpoint keeps it, bit for bit."""
        return None if self.state is None else self.state.to_dict()

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        if self.state is not None:
            self.state = type(self.state)(**saved)
