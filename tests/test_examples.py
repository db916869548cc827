"""The two examples that draw: what their tables and pictures say of the objectives is true, and their commands run."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from taid import TAIDSchedule, objectives

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


averaging, collapse = load("mode_averaging"), load("mode_collapse")


def run(name: str, picture: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--picture", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- mode averaging ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow():
    return averaging.all_runs(averaging.NARROW)


@pytest.fixture(scope="module")
def broad():
    return averaging.all_runs(averaging.BROAD)


def end_of(path):
    return averaging.measure(path[-1].logits)


def test_forward_kl_puts_more_mass_between_the_modes_than_in_both_of_them(narrow, broad):
    teacher = averaging.measure(averaging.teacher_logits())
    assert teacher.between < 0.025
    assert teacher.first / teacher.second == pytest.approx(1.5, rel=1e-3)
    for runs in (narrow, broad):
        student = end_of(runs["forward KL"])
        assert student.between > 20 * teacher.between
        assert student.between > student.first + student.second


def test_forward_kl_ends_with_the_teachers_mean_and_variance(narrow):
    ids = torch.arange(averaging.IDS, dtype=torch.float64)
    moments = []
    for logits in (narrow["forward KL"][-1].logits, averaging.teacher_logits()):
        probs = logits.double().softmax(-1)
        mean = (probs * ids).sum()
        moments.append((mean.item(), (probs * (ids - mean) ** 2).sum().item()))
    assert moments[0] == pytest.approx(moments[1], rel=1e-3)


def test_reverse_kl_leaves_the_second_mode_out(narrow):
    student = end_of(narrow["reverse KL"])
    assert student.second < 1e-6
    assert student.first > 0.95
    # Where p is 0.6 times the student's Gaussian, KL(q || p) is log(1 / 0.6).
    assert student.reverse_kl == pytest.approx(math.log(1 / 0.6), abs=1e-3)
    assert student.forward_kl > 15


@pytest.mark.parametrize(("centre", "mode"), [(80, "first"), (120, "second")])
def test_reverse_kl_finds_the_mode_that_is_nearer(centre, mode):
    path = averaging.distil(averaging.REVERSE, TAIDSchedule(total_steps=1_000), (centre, 10))
    assert getattr(end_of(path), mode) > 0.95


def test_reverse_kl_stays_between_the_modes_where_it_starts_broad(broad):
    assert end_of(broad["reverse KL"]).between > end_of(broad["forward KL"]).between


def test_taid_ends_where_forward_kl_does_from_either_start(narrow, broad):
    for runs in (narrow, broad):
        assert end_of(runs["TAID, t to 1"]) == pytest.approx(end_of(runs["forward KL"]), rel=2e-3)


def test_taid_that_stops_early_ends_where_reverse_kl_does_from_the_narrow_start(narrow):
    stopped, reverse = end_of(narrow["TAID, t to 0.7"]), end_of(narrow["reverse KL"])
    assert stopped.between == pytest.approx(reverse.between, abs=1e-3)
    assert stopped.second < 1e-6
    assert stopped.reverse_kl == pytest.approx(reverse.reverse_kl, abs=1e-3)


def test_taid_leaves_the_first_mode_at_once(narrow, broad):
    path = narrow["TAID, t to 1"]
    left = averaging.last_on_one_mode(path)
    assert left == pytest.approx(0.85, abs=0.01)
    soon = next(step for step in path if step.t > left + 0.02)
    assert averaging.measure(soon.logits).between > 0.3
    assert averaging.last_on_one_mode(broad["TAID, t to 1"]) == 0.0


def test_taid_at_t_1_trains_step_by_step_like_forward_kl():
    at_1 = TAIDSchedule(total_steps=300, t_start=1.0, t_end=1.0)
    paths = [averaging.distil(loss, at_1) for loss in (averaging.TAID, averaging.FORWARD)]
    for taid_step, forward_step in zip(*paths, strict=True):
        torch.testing.assert_close(taid_step.logits, forward_step.logits, rtol=1e-5, atol=1e-5)


def test_the_gradient_at_a_small_t_is_t_times_that_of_reverse_kl():
    teacher, t = averaging.teacher_logits(), 1e-3
    logits = averaging.student_logits(torch.tensor([4.2, 0.3])).requires_grad_()
    (taid_gradient,) = torch.autograd.grad(objectives.taid(logits, teacher, t=t), logits)
    (reverse_gradient,) = torch.autograd.grad(objectives.reverse_kl(logits, teacher), logits)
    assert (taid_gradient / t - reverse_gradient).norm() < 0.01 * reverse_gradient.norm()


def test_the_command_draws_the_picture_of_the_documentation(tmp_path, narrow, broad, monkeypatch, capsys):
    trained = {averaging.NARROW: narrow, averaging.BROAD: broad}
    monkeypatch.setattr(averaging, "all_runs", trained.__getitem__)
    monkeypatch.setattr(sys, "argv", ["mode_averaging.py", "--picture", str(tmp_path / "new" / "modes.png")])
    averaging.main()
    said = capsys.readouterr().out
    assert averaging.table(narrow) in said
    assert averaging.table(broad) in said
    assert "up to t = 0.85" in said
    kept = ROOT / "docs" / "pictures" / "mode_averaging.png"
    assert kept.stat().st_size < 60_000
    old, new = imread(kept), imread(tmp_path / "new" / "modes.png")
    assert old.shape == new.shape
    assert abs(old - new).mean() < 0.02  # another matplotlib may move a label by a pixel


# --- mode collapse ----------------------------------------------------------------------------------------------------

EXACT = 1e-9


def settings():
    """Teachers of several norms, with mass on all eigenvectors, on the first, the last, both, or by chance."""
    random = np.random.default_rng(0)
    for kappa in (1, 2, 10, 100):
        spectrum = np.geomspace(1, 1 / kappa, 12)
        edges = np.eye(12)[[0, -1]]
        for direction in (np.ones(12), edges[0] + 1e-3, edges[1] + 1e-3, edges.sum(0), random.standard_normal(12)):
            for r_0 in (1.5, 4, 12, 30):
                yield r_0, kappa, direction * r_0 / np.linalg.norm(direction), spectrum


def test_a_round_is_the_fit_of_least_norm_with_the_allowed_error():
    random = np.random.default_rng(1)
    factor = random.standard_normal((6, 6))
    kernel = factor @ factor.T + 0.5 * np.eye(6)
    spectrum, vectors = np.linalg.eigh(kernel)
    y = 5 * random.standard_normal(6)
    strength = collapse.regularisation(vectors.T @ y, spectrum)
    predictions = vectors @ collapse.fit(vectors.T @ y, spectrum)
    assert np.linalg.norm(predictions - y) == pytest.approx(1, abs=1e-10)
    np.testing.assert_allclose(predictions, kernel @ np.linalg.solve(kernel + strength * np.eye(6), y), rtol=1e-9)
    # Any other fit with that error has a larger norm f' G^-1 f.
    least = predictions @ np.linalg.solve(kernel, predictions)
    for _ in range(200):
        move = random.standard_normal(6)
        other = y + move / np.linalg.norm(move)
        assert other @ np.linalg.solve(kernel, other) > least


@pytest.mark.parametrize("r_0", [0.5, 1.0])
def test_labels_within_the_allowed_error_are_fitted_by_zero(r_0):
    labels = np.array([r_0, 0.0])
    assert collapse.regularisation(labels, np.array([1.0, 0.1])) == math.inf
    assert collapse.fit(labels, np.array([1.0, 0.1])).tolist() == [0, 0]


def test_where_all_eigenvalues_are_one_each_plain_round_takes_one_off_the_norm():
    found = collapse.norms(*collapse.setting(5.5, 1), collapse.plain_shares(7))
    np.testing.assert_allclose(found, [5.5, 4.5, 3.5, 2.5, 1.5, 0.5, 0, 0], atol=EXACT)
    assert collapse.rounds_alive(found) == 5


def test_the_norm_of_plain_self_distillation_falls_until_it_has_collapsed():
    for _, _, teacher, spectrum in settings():
        found = collapse.norms(teacher, spectrum, collapse.plain_shares(40))
        assert (np.diff(found)[found[:-1] > 0] < 0).all()
        assert (found[1:][found[:-1] <= 1] == 0).all()


def test_plain_self_distillation_lives_as_long_as_both_lower_bounds_say_and_no_longer_than_the_upper():
    longer = 0
    for r_0, kappa, teacher, spectrum in settings():
        found = collapse.norms(teacher, spectrum, collapse.plain_shares(60))
        time = np.arange(61)
        assert (found >= r_0 - kappa * time - EXACT).all()
        assert (found >= r_0 - time - EXACT).all()
        assert (found[found > 0] <= (r_0 - time / kappa)[found > 0] + EXACT).all()
        assert collapse.rounds_alive(found) >= min(61, math.ceil(r_0 - 1))
        longer += collapse.rounds_alive(found) > (r_0 - 1) / kappa + 1
    # It is a bound from below: where kappa is above 1, most live longer.
    assert longer > 40


@pytest.mark.parametrize("rounds", [8, 60])
def test_taid_does_not_collapse_where_the_bounds_say_so(rounds):
    shares, time = collapse.taid_shares(rounds), np.arange(rounds + 1)
    drift, never = collapse.drift(shares), 0
    for r_0, kappa, teacher, spectrum in settings():
        found = collapse.norms(teacher, spectrum, shares)
        assert (found >= time / rounds * r_0 - EXACT).all()
        assert (abs(found - r_0) <= drift + EXACT).all()
        assert (found[time > rounds / r_0 + EXACT] > 1).all()
        assert (found[time < (r_0 - 1) / (1 + kappa)] > 1).all()
        assert (found[time < (r_0 - 1) / kappa - EXACT] > 1).all()
        if r_0 >= collapse.enough_by_theorem(rounds, kappa) or r_0 > collapse.enough_by_drift(rounds):
            assert found.min() > 1
            never += 1
        assert found[-1] == pytest.approx(r_0)
    assert never >= 20


def test_a_weak_teacher_collapses_under_taid_too_and_comes_back():
    found = collapse.norms(*collapse.setting(4, 10), collapse.taid_shares(100))
    assert (found[5:25] <= 1).all()
    assert (found[26:] > 1).all()


@pytest.mark.parametrize("kappa", [1, 10, 100])
@pytest.mark.parametrize("rounds", [10, 100])
def test_what_taid_needs_does_not_grow_with_the_condition_number(rounds, kappa):
    needed = collapse.needed(rounds, kappa)
    assert 0.9 * collapse.enough_by_drift(rounds) < needed < 1.002 * collapse.enough_by_drift(rounds)
    assert needed < collapse.enough_by_theorem(rounds, kappa)


@pytest.mark.parametrize("rounds", [1, 10, 100, 3_000])
def test_the_largest_drift_of_taid_is_below_the_root_of_its_rounds(rounds):
    assert collapse.drift(collapse.taid_shares(rounds)).max() < 0.77 * math.sqrt(rounds)


@pytest.mark.cli
def test_the_command_prints_the_table_and_draws(tmp_path):
    said = run("mode_collapse", tmp_path / "new" / "rounds.png").splitlines()
    assert said[3].split() == ["10", "13", "1.10", "11", "7.73", "33.67", "7.97"]
    assert imread(tmp_path / "new" / "rounds.png").shape[1] == 1080
