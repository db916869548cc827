import json
import math
import re
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taid.losses.schedules import (
    AutoSchedule,
    AutoState,
    CurriculumTemperature,
    ScheduleState,
    TAIDSchedule,
    TemperatureState,
    auto_alpha,
)

PAPER_STEPS = 15_000
FALLING_LOSSES = [2.0, 1.5, 1.8, 0.9, 0.9, 0.6, 0.7, 0.5, 0.4, 0.4]
FIRST_LOSSES = [0.5, 0.49, 0.52, 0.45, 0.46, 0.44]


def states_of(schedule, losses):
    """The state before each step and, last, the one after all of them."""
    states = [schedule.initial_state()]
    for loss in losses:
        states.append(schedule.advance(states[-1], loss))
    return states


def floor_under(schedule, state):
    """The linear floor of `state.t`: that of the step that has just been done, never above t_end."""
    return schedule.t_start if state.step == 0 else min(schedule.t_end, schedule.linear(state.step - 1))


# t_1, t_2, ... and m_1, m_2, ..., from METHOD.md's update in 60-digit decimal arithmetic, rounded once.
FALLING_MOMENTUM = [
    0.0,
    0.002500000000000001,
    0.0004750000000000002,
    0.005470250000000002,
    0.005415547500000002,
    0.008694725358333334,
    0.006941111438083336,
    0.009728843180845359,
    0.011631554749036902,
    0.011515239201546533,
]
FIRST_MOMENTUM = [
    0.0,
    0.00019999999999999996,
    -0.00041424489795918355,
    0.0009360513971742531,
    0.0007044686609802885,
    0.0011322065830661374,
]
KNOWN_RUNS = {
    "far ahead of the ramp": (
        TAIDSchedule(10, alpha=0.5),
        FALLING_LOSSES,
        [
            0.4,
            0.5501874999023438,
            0.662667332543449,
            0.7472311605854213,
            0.8105944802279178,
            0.8581517124960717,
            0.8937368569742858,
            0.9204318688932406,
            0.9404395879997928,
            0.9554154216014089,
        ],
        FALLING_MOMENTUM,
    ),
    "caught up by the ramp": (
        TAIDSchedule(10, alpha=0.25),
        FALLING_LOSSES,
        [
            0.4,
            0.47509374995117193,
            0.5407226143612808,
            0.5982893098069889,
            0.6486391134565593,
            0.7,
            0.76,
            0.82,
            0.88,
            0.94,
        ],
        FALLING_MOMENTUM,
    ),
    "stopped at t_end": (
        TAIDSchedule(10, t_start=0.2, t_end=0.8, alpha=0.5, beta=0.5),
        FALLING_LOSSES,
        [0.2, 0.4124837493495025, 0.5566091522741403, 0.6802168183071343, 0.7647793377046169, 0.8, 0.8, 0.8, 0.8, 0.8],
        [
            0.0,
            0.12499999999999993,
            -0.03749999999999998,
            0.23124999999999987,
            0.11562499999999994,
            0.22447916666666648,
            0.028906250000000057,
            0.15731026785714267,
            0.1786551339285711,
            0.08932756696428555,
        ],
    ),
    "held back by a rise from zero": (
        TAIDSchedule(10, alpha=0.5, beta=0.5),
        [1.0, 0.0, 0.5, 0.25, 0.25],
        [0.4, 0.5867377993605564, 0.5867377993605564, 0.5867377993605564, 0.64],
        [0.0, 0.4999999999999995, -249999999999999.72, -124999999999999.61, -62499999999999.805],
    ),
    "the paper's constants": (
        TAIDSchedule(PAPER_STEPS),
        FIRST_LOSSES,
        [
            0.4,
            0.40015001499999997,
            0.4002999464356509,
            0.400449941617796,
            0.40059988192791773,
            0.40074981678802163,
        ],
        FIRST_MOMENTUM,
    ),
    "the paper's constants from t_start 0.2": (
        TAIDSchedule(PAPER_STEPS, t_start=0.2),
        FIRST_LOSSES,
        [0.2, 0.20020001999999995, 0.2003999285808679, 0.20059992215706135, 0.20079984257055697, 0.2009997557173622],
        FIRST_MOMENTUM,
    ),
}


@pytest.mark.parametrize(("schedule", "losses", "t", "momentum"), KNOWN_RUNS.values(), ids=KNOWN_RUNS)
def test_t_and_momentum_take_their_known_values(schedule, losses, t, momentum):
    after = states_of(schedule, losses)[1:]

    assert [state.t for state in after] == pytest.approx(t, rel=1e-14, abs=0)
    assert [state.momentum for state in after] == pytest.approx(momentum, rel=1e-12, abs=0)
    assert [state.step for state in after] == list(range(1, len(losses) + 1))
    assert [state.previous_loss for state in after] == losses


def test_the_defaults_are_those_of_the_paper():
    schedule = TAIDSchedule(PAPER_STEPS)

    assert (schedule.t_start, schedule.t_end, schedule.alpha, schedule.beta) == (0.4, 1.0, 5e-4, 0.99)
    assert schedule.adaptive
    assert schedule.initial_state() == ScheduleState(step=0, t=0.4, momentum=0.0, previous_loss=None)


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_first_step_stores_its_loss_and_leaves_t_alone(adaptive):
    schedule = TAIDSchedule(10, t_start=0.3, alpha=0.5, adaptive=adaptive)

    after = schedule.advance(schedule.initial_state(), 1.25)

    assert after == ScheduleState(step=1, t=0.3, momentum=0.0, previous_loss=1.25)


def test_without_adaptive_update_t_is_the_ramp_whatever_the_loss_does():
    schedule = TAIDSchedule(5, t_start=0.25, t_end=0.75, alpha=0.5, adaptive=False)

    t = [state.t for state in states_of(schedule, [3.0, 1.0, 4.0, 0.0, 2.0, 1.0, 1.0])]

    assert t == pytest.approx([0.25, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.75], rel=1e-15, abs=0)


@pytest.mark.parametrize(("step", "floor"), [(0, 0.4), (3_750, 0.55), (7_500, 0.7), (11_250, 0.85), (15_000, 1.0)])
def test_the_linear_floor_takes_its_known_values(step, floor):
    assert TAIDSchedule(PAPER_STEPS).linear(step) == pytest.approx(floor, rel=1e-15, abs=0)


def test_a_constant_loss_brings_the_papers_run_to_0_91_at_half_way_where_the_ramp_has_0_70():
    schedule = TAIDSchedule(PAPER_STEPS)

    half_way = states_of(schedule, [2.0] * 7_500)[-1]

    assert half_way.t == pytest.approx(1 - 0.6 * (1 - 2.5e-4) ** 7_499, rel=1e-12, abs=0)
    assert f"{half_way.t:.2f}" == "0.91"
    assert f"{schedule.linear(7_500):.2f}" == "0.70"


@pytest.mark.parametrize(("total_steps", "share"), [(4_000, 0), (5_000, 37), (8_000, 80), (15_000, 97)])
def test_the_adaptive_step_wins_on_the_share_of_steps_that_the_method_states(total_steps, share):
    schedule = TAIDSchedule(total_steps)

    states = states_of(schedule, [2.0] * total_steps)

    assert round(100 * sum(state.t > floor_under(schedule, state) for state in states) / total_steps) == share


@pytest.mark.parametrize("t_start", [0.2, 0.3, 0.4])
@pytest.mark.parametrize("total_steps", [400, 4_000])
def test_with_the_papers_alpha_up_to_4000_steps_of_constant_loss_are_the_linear_schedule(t_start, total_steps):
    schedule = TAIDSchedule(total_steps, t_start=t_start)

    states = states_of(schedule, [2.0] * total_steps)

    for state in states:
        assert abs(state.t - floor_under(schedule, state)) <= math.ulp(1.0)


def test_with_the_papers_alpha_4000_steps_of_falling_loss_are_the_linear_schedule_up_to_1e_9():
    schedule = TAIDSchedule(4_000)

    states = states_of(schedule, [2.0 * 0.25 ** (step / 4_000) for step in range(4_000)])

    assert max(abs(state.t - floor_under(schedule, state)) for state in states) <= 1e-9


@pytest.mark.parametrize("total_steps", [100, 4_000])
def test_auto_alpha_gives_a_short_run_the_papers_shape(total_steps):
    paper = states_of(TAIDSchedule(PAPER_STEPS), [2.0] * PAPER_STEPS)
    short = states_of(TAIDSchedule(total_steps, alpha=auto_alpha(total_steps)), [2.0] * total_steps)

    for quarter in (1, 2, 3):
        difference = short[quarter * total_steps // 4].t - paper[quarter * PAPER_STEPS // 4].t
        assert abs(difference) < 1.5 / total_steps


@pytest.mark.parametrize(("total_steps", "alpha"), [(15_000, 5e-4), (7_500, 1e-3), (100, 0.075), (3, 2.5), (1, 7.5)])
def test_auto_alpha_is_seven_and_a_half_over_the_number_of_steps(total_steps, alpha):
    assert auto_alpha(total_steps) == alpha


@pytest.mark.parametrize("t_start", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize(
    ("alpha", "total_steps", "adaptive"),
    [
        (5e-4, 3_999, False),
        (5e-4, 4_000, False),
        (5e-4, 4_001, True),
        (5e-4, 15_000, True),
        (0.125, 15, False),
        (0.125, 16, False),
        (0.125, 17, True),
    ],
)
def test_the_adaptive_step_is_in_effect_only_above_two_over_alpha_steps(alpha, total_steps, adaptive, t_start):
    assert TAIDSchedule(total_steps, alpha=alpha, t_start=t_start).is_adaptive_in_effect is adaptive


def test_the_adaptive_step_is_never_in_effect_where_it_was_not_asked_for():
    assert not TAIDSchedule(PAPER_STEPS, adaptive=False).is_adaptive_in_effect


def test_a_nearer_t_end_needs_fewer_steps_for_the_adaptive_step_to_be_in_effect():
    # alpha / 2 * (1 - t_start) * N > t_end - t_start, all of it exact in binary: N > 0.25 / (0.125 / 2 * 0.5) = 8.
    schedule = TAIDSchedule(8, t_start=0.5, t_end=0.75, alpha=0.125)

    assert not schedule.is_adaptive_in_effect
    assert replace(schedule, total_steps=9).is_adaptive_in_effect


def test_regime_says_that_the_run_is_adaptive_and_names_alpha():
    sentence = TAIDSchedule(PAPER_STEPS).regime()

    assert "t goes from 0.4 to 1 over 15,000 steps adaptively" in sentence
    assert "alpha 0.0005" in sentence


def test_regime_warns_of_a_run_too_short_to_be_adaptive_and_names_alpha_the_threshold_and_both_remedies():
    sentence = TAIDSchedule(750).regime()

    assert "over 750 steps on the linear ramp" in sentence
    assert "alpha 0.0005" in sentence
    assert "more than 4,000 steps" in sentence
    assert "taid_alpha: auto (0.01)" in sentence
    assert "taid_adaptive: false" in sentence


def test_regime_says_that_the_ramp_was_asked_for_and_by_which_option():
    sentence = TAIDSchedule(PAPER_STEPS, adaptive=False).regime()

    assert "over 15,000 steps on the linear ramp" in sentence
    assert "taid_adaptive: false" in sentence


def test_following_the_remedy_of_regime_makes_the_run_adaptive():
    assert TAIDSchedule(750, alpha=auto_alpha(750)).is_adaptive_in_effect


@pytest.mark.parametrize(
    ("constants", "named"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"total_steps": -3}, "total_steps must be at least 1, got -3"),
        ({"t_start": -0.1}, "t_start must lie in [0, 1], got -0.1"),
        ({"t_start": 1.1}, "t_start must lie in [0, 1], got 1.1"),
        ({"t_start": math.nan}, "t_start must lie in [0, 1], got nan"),
        ({"t_end": 0.3}, "t_end must lie between t_start (0.4) and 1, got 0.3"),
        ({"t_end": 1.5}, "t_end must lie between t_start (0.4) and 1, got 1.5"),
        ({"t_end": math.nan}, "got nan"),
        ({"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
        ({"alpha": -5e-4}, "alpha must be a positive number, got -0.0005"),
        ({"alpha": math.inf}, "alpha must be a positive number, got inf"),
        ({"alpha": math.nan}, "alpha must be a positive number, got nan"),
        ({"beta": -0.01}, "beta must lie in [0, 1), got -0.01"),
        ({"beta": 1.0}, "beta must lie in [0, 1), got 1.0"),
        ({"beta": math.nan}, "beta must lie in [0, 1), got nan"),
    ],
)
def test_a_constant_out_of_range_is_refused_by_name_and_value(constants, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        TAIDSchedule(**{"total_steps": 10, **constants})


@pytest.mark.parametrize("steps_done", [0, 1, 3])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_with_its_step(loss, steps_done):
    schedule = TAIDSchedule(10)
    state = states_of(schedule, [2.0] * steps_done)[-1]

    with pytest.raises(ValueError, match=rf"loss of step {steps_done} is {loss};"):
        schedule.advance(state, loss)


@pytest.mark.parametrize("rounding", [-1e-9, -1e-15, -1e-16, -5e-324])
def test_a_loss_of_zero_that_rounding_made_negative_does_not_stop_the_run(rounding):
    schedule = TAIDSchedule(10, alpha=0.5)

    states = states_of(schedule, [0.5, rounding, 0.25, 0.125])

    for state in states:
        assert floor_under(schedule, state) <= state.t <= 1.0
        assert math.isfinite(state.momentum)


def test_advance_is_pure_and_its_states_are_frozen():
    schedule = TAIDSchedule(10, alpha=0.5)
    state = states_of(schedule, [2.0, 1.5])[-1]
    before = state.to_dict()

    assert schedule.advance(state, 1.0) == schedule.advance(state, 1.0)
    assert state.to_dict() == before
    with pytest.raises(FrozenInstanceError):
        state.t = 0.9
    with pytest.raises(FrozenInstanceError):
        schedule.alpha = 0.9


UNIT = st.floats(0.0, 1.0)
# Everything that a mean of float32 losses can be, rounding below zero included.
LOSSES = st.lists(
    st.one_of(st.floats(0.0, 20.0), st.floats(0.0, 3.4e38), st.sampled_from([0.0, -1e-9, 1e30, 3.4e38])), max_size=30
)


@st.composite
def schedules(draw):
    t_start, t_end = sorted((draw(UNIT), draw(UNIT)))
    return TAIDSchedule(
        draw(st.integers(1, 40)),
        t_start=t_start,
        t_end=t_end,
        alpha=draw(st.floats(1e-6, 10.0)),
        beta=draw(st.floats(0.0, 1.0, exclude_max=True)),
        adaptive=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(schedules(), LOSSES)
def test_t_never_falls_never_lies_under_the_floor_and_never_leaves_its_ends(schedule, losses):
    states = states_of(schedule, losses)

    for state, following in pairwise(states):
        assert state.t <= following.t
        assert following.t >= floor_under(schedule, following)
        assert schedule.t_start <= following.t <= schedule.t_end
        assert math.isfinite(following.momentum)
    if not schedule.adaptive:
        assert [state.t for state in states] == [floor_under(schedule, state) for state in states]


@settings(max_examples=75, deadline=None, derandomize=True)
@given(schedules(), LOSSES)
def test_a_state_survives_json_bit_for_bit_and_the_run_goes_on_as_if_it_had_never_stopped(schedule, losses):
    straight = states_of(schedule, losses)
    resumed = [ScheduleState(**json.loads(json.dumps(state.to_dict(), allow_nan=False))) for state in straight]

    assert list(map(repr, resumed)) == list(map(repr, straight))
    assert [schedule.advance(*pair) for pair in zip(resumed, losses, strict=False)] == straight[1:]


# --- our own ----------------------------------------------------------------------------------------------------------


def test_auto_falls_from_as_far_beyond_the_teacher_as_the_student_is_near_to_a_little_before_it():
    # 1 + exp(-log 4) = 1.25 to 0.95, whatever comes after the first loss.
    states = states_of(AutoSchedule(4), [math.log(4), 0.0, 9.0, 0.5])

    assert [state.step for state in states] == [0, 1, 2, 3, 4]
    assert [state.t for state in states] == pytest.approx([1.0, 1.175, 1.1, 1.025, 0.95], rel=1e-15)


@pytest.mark.parametrize(("loss", "first"), [(0.0, 2.0), (1e6, 1.0)])
def test_auto_begins_at_the_teacher_for_a_student_that_is_far_and_at_2_for_one_that_is_there(loss, first):
    schedule = AutoSchedule(10**9)
    assert schedule.advance(schedule.initial_state(), loss).t == pytest.approx(first, rel=1e-8)


@settings(max_examples=75, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_auto_never_rises_after_its_first_step_and_survives_json(total_steps, losses):
    states = states_of(AutoSchedule(total_steps), losses)

    assert all(later.t <= earlier.t for earlier, later in pairwise(states[1:]))
    assert all(AutoSchedule.LAST - 1e-12 <= state.t <= 2 for state in states)
    assert [AutoState(**json.loads(json.dumps(state.to_dict()))) for state in states] == states


def test_auto_takes_a_loss_below_zero_for_rounding_and_refuses_one_that_is_not_finite():
    schedule = AutoSchedule(4)

    assert schedule.advance(schedule.initial_state(), -1e-9) == schedule.advance(schedule.initial_state(), 0.0)
    for loss in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"the loss of step 0 is {loss}; t cannot move by it"):
            schedule.advance(schedule.initial_state(), loss)
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        AutoSchedule(0)


def test_auto_says_how_t_will_move():
    assert "t falls over 1,500 steps to 0.95 from beyond the teacher" in AutoSchedule(1_500).regime()


# --- the temperature of CTKD ------------------------------------------------------------------------------------------

GRADIENTS = [0.5, 0.5, -0.25, 1.0, 0.125, -2.0, 0.25]
# T, theta and velocity after each step, from the docstring's update in 60-digit arithmetic, rounded once.
KNOWN_TEMPERATURES = {
    "up the ramp of 4 steps and beyond": (
        CurriculumTemperature(96),
        GRADIENTS,
        [
            15.621171572600097,
            15.677593683441039,
            15.632728255066343,
            16.227459114702395,
            16.79853673925711,
            16.155194689046176,
            15.702112069507056,
        ],
        [
            1.0,
            1.0143965754960582,
            1.0029409567760632,
            1.1602214753280304,
            1.3244844642760867,
            1.1404362959119096,
            1.0206829242079192,
        ],
        [
            0.0,
            0.2879315099211663,
            -0.2291123743999034,
            3.1456103710393437,
            3.285259778961127,
            -3.6809633672835402,
            -2.39506743407981,
        ],
    ),
    "a run too short for a ramp": (
        CurriculumTemperature(1),
        [4.0, 2.0],
        [15.621171572600097, 17.022128327106913],
        [1.0, 1.3932238664829637],
        [0.0, 7.864477329659274],
    ),
    "other constants": (
        CurriculumTemperature(96, minimum=2.0, span=4.0, initial=-1.0, learning_rate=0.5, momentum=0.0),
        GRADIENTS[:5],
        [3.0757656854799804, 3.0985600678761935, 3.059322792528446, 3.3373389538353617, 3.3873174712716416],
        [-1.0, -0.9712068490078833, -1.0210100685199557, -0.6886442318377245, -0.6330054765580997],
        [0.0, 0.05758630198423326, -0.0996064390241446, 0.6647316733644624, 0.11127751055924959],
    ),
}


@pytest.mark.parametrize(
    ("schedule", "gradients", "temperature", "theta", "velocity"), KNOWN_TEMPERATURES.values(), ids=KNOWN_TEMPERATURES
)
def test_the_temperature_takes_its_known_values(schedule, gradients, temperature, theta, velocity):
    after = states_of(schedule, gradients)[1:]

    assert [schedule.temperature(state) for state in after] == pytest.approx(temperature, rel=1e-14, abs=0)
    assert [state.theta for state in after] == pytest.approx(theta, rel=1e-13, abs=0)
    assert [state.velocity for state in after] == pytest.approx(velocity, rel=1e-12, abs=0)
    assert [state.step for state in after] == list(range(1, len(gradients) + 1))


def test_the_defaults_of_the_temperature_are_those_of_the_paper():
    schedule = CurriculumTemperature(240)

    assert (schedule.minimum, schedule.span, schedule.initial) == (1.0, 20.0, 1.0)
    assert (schedule.learning_rate, schedule.momentum) == (0.05, 0.9)
    assert schedule.initial_state() == TemperatureState(step=0, theta=1.0, velocity=0.0)
    assert schedule.temperature(schedule.initial_state()) == pytest.approx(15.6, abs=0.05)


@pytest.mark.parametrize(
    ("total_steps", "step", "share"),
    [
        (240, 0, 0.0),
        (240, 1, 0.024471741852423214),
        (240, 5, 0.5),
        (240, 9, 0.9755282581475768),
        (240, 10, 1.0),
        (240, 240, 1.0),
        (24_000, 500, 0.5),
        (1, 0, 0.0),
        (1, 1, 1.0),
    ],
)
def test_the_reversal_rises_along_a_cosine_over_the_papers_10_of_240_epochs(total_steps, step, share):
    assert CurriculumTemperature(total_steps).reversal(step) == pytest.approx(share, rel=1e-12, abs=1e-16)


def test_the_temperature_moves_as_sgd_behind_a_reversed_gradient_moves_it():
    schedule = CurriculumTemperature(96)
    theta = torch.tensor(schedule.initial, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=schedule.learning_rate, momentum=schedule.momentum)

    states = states_of(schedule, GRADIENTS)

    for step, gradient in enumerate(GRADIENTS):
        optimizer.zero_grad()
        (gradient * (schedule.minimum + schedule.span * theta.sigmoid())).backward()
        theta.grad *= -schedule.reversal(step)
        optimizer.step()
        assert states[step + 1].theta == pytest.approx(theta.item(), rel=1e-13, abs=0)


def test_a_temperature_whose_rise_raises_the_loss_rises_and_the_other_way_round():
    schedule = CurriculumTemperature(24)

    up, down = (
        [schedule.temperature(state) for state in states_of(schedule, [gradient] * 10)] for gradient in (1.0, -1.0)
    )

    assert up[0] == up[1] == down[0] == down[1]  # lambda is 0 in the first step
    assert all(t < following for t, following in pairwise(up[1:]))
    assert all(t > following for t, following in pairwise(down[1:]))


@pytest.mark.parametrize(
    ("constants", "named"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"minimum": 0.0}, "minimum must be a positive number, got 0.0"),
        ({"minimum": math.nan}, "minimum must be a positive number, got nan"),
        ({"span": 0.0}, "span must be a positive number, got 0.0"),
        ({"span": math.inf}, "span must be a positive number, got inf"),
        ({"initial": math.inf}, "initial must be a finite number, got inf"),
        ({"initial": math.nan}, "initial must be a finite number, got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, got 0.0"),
        ({"learning_rate": -0.05}, "learning_rate must be a positive number, got -0.05"),
        ({"momentum": -0.1}, "momentum must lie in [0, 1), got -0.1"),
        ({"momentum": 1.0}, "momentum must lie in [0, 1), got 1.0"),
        ({"momentum": math.nan}, "momentum must lie in [0, 1), got nan"),
    ],
)
def test_a_constant_of_the_temperature_out_of_range_is_refused_by_name_and_value(constants, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        CurriculumTemperature(**{"total_steps": 10, **constants})


@pytest.mark.parametrize("steps_done", [0, 3])
@pytest.mark.parametrize("gradient", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_with_its_step(gradient, steps_done):
    schedule = CurriculumTemperature(10)
    state = states_of(schedule, [1.0] * steps_done)[-1]

    with pytest.raises(ValueError, match=rf"gradient of step {steps_done} is {gradient};"):
        schedule.advance(state, gradient)


def test_advance_of_a_temperature_is_pure_and_its_states_are_frozen():
    schedule = CurriculumTemperature(10)
    state = states_of(schedule, [1.0, 2.0])[-1]
    before = state.to_dict()

    assert schedule.advance(state, 1.0) == schedule.advance(state, 1.0)
    assert state.to_dict() == before
    with pytest.raises(FrozenInstanceError):
        state.theta = 0.0
    with pytest.raises(FrozenInstanceError):
        schedule.span = 1.0


# Everything that a float32 gradient can be.
ANY_GRADIENTS = st.lists(
    st.one_of(st.floats(-10.0, 10.0), st.floats(-3.4e38, 3.4e38), st.sampled_from([0.0, -3.4e38, 3.4e38])), max_size=30
)


@st.composite
def temperatures(draw):
    return CurriculumTemperature(
        draw(st.integers(1, 1_000)),
        minimum=draw(st.floats(0.1, 10.0)),
        span=draw(st.floats(0.1, 100.0)),
        initial=draw(st.floats(-50.0, 50.0)),
        learning_rate=draw(st.floats(1e-6, 10.0)),
        momentum=draw(UNIT.filter(lambda share: share < 1)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(temperatures(), ANY_GRADIENTS)
def test_the_temperature_never_leaves_its_ends_whatever_the_gradients_are(schedule, gradients):
    for state in states_of(schedule, gradients):
        assert schedule.minimum <= schedule.temperature(state) <= schedule.minimum + schedule.span
        assert math.isfinite(state.theta)
        assert math.isfinite(state.velocity)


@settings(max_examples=75, deadline=None, derandomize=True)
@given(temperatures(), ANY_GRADIENTS)
def test_a_state_of_the_temperature_survives_json_bit_for_bit_and_the_run_goes_on_as_before(schedule, gradients):
    straight = states_of(schedule, gradients)
    resumed = [TemperatureState(**json.loads(json.dumps(state.to_dict(), allow_nan=False))) for state in straight]

    assert list(map(repr, resumed)) == list(map(repr, straight))
    assert [schedule.advance(*pair) for pair in zip(resumed, gradients, strict=False)] == straight[1:]
