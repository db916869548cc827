"""The schedules: how TAID's target moves from the student to the teacher, and how CTKD's temperature moves.

Pure Python, no torch and no trainer: frozen state in, frozen state out.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


def auto_alpha(total_steps: int) -> float:
    """The step size that gives a run of any length the shape of the paper's: 5e-4 over its 15,000 steps, 7.5 / N."""
    return 7.5 / total_steps


@dataclass(frozen=True)
class ScheduleState:
    """The state of a :class:`TAIDSchedule` before optimizer step `step`.

    Attributes:
        step: n, the number of optimizer steps done.
        t: t_n, used in step n.
        momentum: m_n, the moving average of the relative fall of the loss.
        previous_loss: J_{n-1} in nats a token; None before the first step.
    """

    step: int
    t: float
    momentum: float
    previous_loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """The state as plain values; ``ScheduleState(**d)`` brings it back bit for bit."""
        return asdict(self)


@dataclass(frozen=True)
class TAIDSchedule:
    r"""The adaptive schedule of t (TAID, arXiv 2501.16937, algorithm 1), one move an optimizer step.

    With :math:`J_n` the loss of step n over all its trained tokens, of every micro-batch and every rank::

        t_0 = t_start, m_0 = 0;   n = 0:  t_1 = t_0
        n > 0:  t_linear = t_start + (t_end - t_start) * n / N
                delta_n  = (J_{n-1} - J_n) / (J_{n-1} + 1e-15)
                m_n      = beta * m_{n-1} + (1 - beta) * delta_n
                t_{n+1}  = min(t_end, max(t_linear, t_n + alpha * sigmoid(m_n) * (1 - t_n)))

    t never falls, never lies under the linear ramp and never passes t_end. With ``adaptive=False``, t is the ramp.

    Attributes:
        total_steps: N, the optimizer steps of the whole run.
        t_start: the first t; 0.2 to 0.4, larger for a larger gap between student and teacher.
        t_end: the last t.
        alpha: size of the adaptive step; :func:`auto_alpha` keeps the paper's shape on short runs.
        beta: momentum of the loss's relative fall.
        adaptive: False for the linear ramp, the paper's "without adaptive update".

    Raises:
        ValueError: a value out of range; the message names it.
    """

    total_steps: int
    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        check_range(t_start=self.t_start, t_end=self.t_end, alpha=self.alpha, beta=self.beta)

    def initial_state(self) -> ScheduleState:
        """The state before the first step."""
        return ScheduleState(step=0, t=self.t_start, momentum=0.0, previous_loss=None)

    def advance(self, state: ScheduleState, loss: float) -> ScheduleState:
        """Return the state after a step that had `state.t` and ended with `loss`, J_n in nats a token.

        Raises:
            ValueError: the loss is not finite; nothing sensible can follow from it.
        """
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {state.step} is {loss}; t cannot move by it")
        loss = max(loss, 0.0)  # a divergence below zero is rounding, and would turn the sign of delta
        if state.previous_loss is None:
            return ScheduleState(step=state.step + 1, t=state.t, momentum=state.momentum, previous_loss=loss)
        delta = (state.previous_loss - loss) / (state.previous_loss + 1e-15)
        momentum = self.beta * state.momentum + (1 - self.beta) * delta
        t = self.linear(state.step)
        if self.adaptive:
            t = max(t, state.t + self.alpha * _sigmoid(momentum) * (1 - state.t))
        return ScheduleState(step=state.step + 1, t=min(self.t_end, t), momentum=momentum, previous_loss=loss)

    def linear(self, step: int) -> float:
        """The linear floor of t after optimizer step `step`: t_start + (t_end - t_start) * step / N."""
        return self.t_start + (self.t_end - self.t_start) * step / self.total_steps

    @property
    def is_adaptive_in_effect(self) -> bool:
        """Whether the adaptive step can beat the linear floor at all: N > 2 (t_end - t_start) / (alpha (1 - t_start)).

        sigmoid(m) stays near 1/2, so with t_end = 1 this is N > 2 / alpha.
        """
        # A run of exactly that length is linear, whatever the last bit of the quotient says.
        return self.adaptive and self.t_start < self.t_end and self.total_steps > self._needed_steps * (1 + 1e-9)

    @property
    def is_as_asked(self) -> bool:
        """False where the adaptive step was asked for and has no effect."""
        return self.is_adaptive_in_effect or not self.adaptive

    @property
    def _needed_steps(self) -> float:
        return 2 * (self.t_end - self.t_start) / (self.alpha * (1 - self.t_start)) if self.t_start < 1 else 0.0

    def regime(self) -> str:
        """One sentence for the user: which of the two schedules this run really follows, and how to get the other."""
        if self.t_start == self.t_end:
            return f"t stays at {self.t_start:g}: taid_t_start and taid_t_end are equal."
        span = f"t goes from {self.t_start:g} to {self.t_end:g} over {self.total_steps:,} steps"
        if not self.adaptive:
            return f"{span} on the linear ramp, as asked (taid_adaptive: false)."
        if self.is_adaptive_in_effect:
            return f"{span} adaptively (alpha {self.alpha:g}): ahead of the linear ramp, faster while the loss falls."
        return (
            f"{span} on the linear ramp: with alpha {self.alpha:g} the adaptive step is the larger one only in runs of "
            f"more than {self._needed_steps:,.0f} steps. For the paper's shape on a run of this length set "
            f"taid_alpha: auto ({auto_alpha(self.total_steps):.3g}); to ask for the ramp set taid_adaptive: false."
        )


@dataclass(frozen=True)
class AutoState:
    """The state of an :class:`AutoSchedule` before optimizer step `step`.

    Attributes:
        step: n, the number of optimizer steps done.
        t: t_n, used in step n.
        distance: J_0 in nats a token; None before the first step.
    """

    step: int
    t: float
    distance: float | None

    def to_dict(self) -> dict[str, Any]:
        """The state as plain values; ``AutoState(**d)`` brings it back bit for bit."""
        return asdict(self)


@dataclass(frozen=True)
class AutoSchedule:
    r"""t from beyond the teacher to a little before it: this project's rule, with nothing to set.

    The first step has the teacher itself as its target, so that its loss is the distance :math:`J_0 = KL(p \,\|\, q)`
    between student and teacher. From there on, t falls::

        t_0 = 1;   n > 0:  t_n = LAST + (1 + exp(-J_0) - LAST) * (1 - n / N)

    Where the paper's target comes from the student's side, this one comes from behind the teacher: a target that
    exaggerates what the teacher has and the student has not takes it there sooner. That holds for a student that is
    near enough; one that is far (exp(-J_0) near 0) begins at the teacher. LAST, a little below 1, costs KL(p || q)
    next to nothing, which is at its minimum there, and gains KL(q || p). docs/evidence.md has the measurements, and the
    rules that were worse.

    Attributes:
        total_steps: N, the optimizer steps of the whole run.

    Raises:
        ValueError: no step at all.
    """

    total_steps: int
    LAST: ClassVar[float] = 0.95
    is_as_asked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")

    def initial_state(self) -> AutoState:
        """The state before the first step."""
        return AutoState(step=0, t=1.0, distance=None)

    def advance(self, state: AutoState, loss: float) -> AutoState:
        """Return the state after a step that had `state.t` and ended with `loss`, J_n in nats a token.

        Raises:
            ValueError: the loss is not finite; nothing sensible can follow from it.
        """
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {state.step} is {loss}; t cannot move by it")
        distance = max(loss, 0.0) if state.distance is None else state.distance
        first, step = 1 + math.exp(-distance), state.step + 1
        left = max(0.0, 1 - step / self.total_steps)
        return AutoState(step=step, t=self.LAST + (first - self.LAST) * left, distance=distance)

    def regime(self) -> str:
        """One sentence for the user: how t will move."""
        return (
            f"t falls over {self.total_steps:,} steps to {self.LAST:g} from beyond the teacher, between 1 and 2: the "
            "nearer the student, the farther (taid_schedule: auto)."
        )


@dataclass(frozen=True)
class TemperatureState:
    """The state of a :class:`CurriculumTemperature` before optimizer step `step`.

    Attributes:
        step: n, the number of optimizer steps done.
        theta: theta_n, what is learned; :meth:`CurriculumTemperature.temperature` makes T of it.
        velocity: v_n, the momentum of its ascent.
    """

    step: int
    theta: float
    velocity: float

    def to_dict(self) -> dict[str, Any]:
        """The state as plain values; ``TemperatureState(**d)`` brings it back bit for bit."""
        return asdict(self)


@dataclass(frozen=True)
class CurriculumTemperature:
    r"""The learned temperature of CTKD (arXiv 2211.16231, the global one), one move an optimizer step.

    The temperature is trained against the student, ever harder: theta climbs the loss that the student descends. With
    :math:`J_n` the loss of step n over all its trained tokens, of every micro-batch and every rank::

        T_n         = minimum + span * sigmoid(theta_n);    theta_0 = initial, v_0 = 0
        lambda_n    = (1 - cos(pi * min(n, L) / L)) / 2,    L = max(1, N * 10 / 240)
        v_{n+1}     = momentum * v_n + lambda_n * dJ_n/dT * dT_n/dtheta
        theta_{n+1} = theta_n + learning_rate * v_{n+1}

    This is what the paper's layer, a gradient reversed and scaled by lambda, makes of its SGD. lambda rises to 1 in the
    paper's 10 of 240 epochs, here by optimizer steps, so the first step moves nothing. The defaults are the paper's
    for CIFAR-100; left out are its weight decay, which would pull theta to 0, and its drops of the learning rate.

    Attributes:
        total_steps: N, the optimizer steps of the whole run.
        minimum: the temperature that theta = -infinity stands for.
        span: how far above it the temperature can go.
        initial: the first theta; 1 is a temperature of 15.6.
        learning_rate: size of a step of theta.
        momentum: share of the velocity that a step keeps.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    total_steps: int
    minimum: float = 1.0
    span: float = 20.0
    initial: float = 1.0
    learning_rate: float = 0.05
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        for name in ("minimum", "span", "learning_rate"):
            if not 0.0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not math.isfinite(self.initial):
            raise ValueError(f"initial must be a finite number, got {self.initial}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")

    def initial_state(self) -> TemperatureState:
        """The state before the first step."""
        return TemperatureState(step=0, theta=self.initial, velocity=0.0)

    def temperature(self, state: TemperatureState) -> float:
        """T in step `state.step`."""
        return self.minimum + self.span * _sigmoid(state.theta)

    def advance(self, state: TemperatureState, gradient: float) -> TemperatureState:
        """Return the state after a step whose loss J_n, in nats a token, has the `gradient` dJ_n/dT.

        Raises:
            ValueError: the gradient is not finite; nothing sensible can follow from it.
        """
        if not math.isfinite(gradient):
            raise ValueError(f"the gradient of step {state.step} is {gradient}; the temperature cannot move by it")
        # A product of two sigmoids keeps the digits that s * (1 - s) loses where s is close to 1.
        slope = self.span * _sigmoid(state.theta) * _sigmoid(-state.theta)
        velocity = self.momentum * state.velocity + self.reversal(state.step) * gradient * slope
        return TemperatureState(
            step=state.step + 1, theta=state.theta + self.learning_rate * velocity, velocity=velocity
        )

    def reversal(self, step: int) -> float:
        """lambda in optimizer step `step`: how much of the reversed gradient counts, from 0 up to 1."""
        ramp = max(1.0, self.total_steps * 10 / 240)
        return (1 - math.cos(math.pi * min(step, ramp) / ramp)) / 2


def check_range(*, t_start: float, t_end: float, alpha: float, beta: float) -> None:
    """Raise a ValueError that names the first constant of the schedule that is out of range."""
    if not 0.0 <= t_start <= 1.0:
        raise ValueError(f"t_start must lie in [0, 1], got {t_start}")
    if not t_start <= t_end <= 1.0:
        raise ValueError(f"t_end must lie between t_start ({t_start}) and 1, got {t_end}")
    if not (alpha > 0.0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a positive number, got {alpha}")
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")


def _sigmoid(x: float) -> float:
    # Both branches keep exp's argument at or below 0: after a loss of zero, delta can be as low as -1e15.
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))
