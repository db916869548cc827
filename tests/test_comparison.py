"""`taid compare`: a whole one on tiny models, what it does again and what not, and its numbers by hand."""

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from scipy import stats

from command_line import run_taid
from taid.artifacts.run_folder import read_metrics
from taid.cli.main import main
from taid.comparison import results as comparison_results
from taid.comparison import runner
from taid.comparison.plan import Run, arguments_of
from taid.comparison.results import ComparisonResults, Interval
from taid.config.arguments import COMMANDS
from taid.config.parsing import parse

OWN = ["--objectives", "forward_kl,taid,sft", "--seeds", "2", "--learning_rates", "1e-3,1e-2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, student_folder, teacher_folder):
    """A recipe of a few steps, with rows for all three purposes beside it."""
    folder = tmp_path_factory.mktemp("comparison")
    words = "the cat sat on a mat and saw the dog that ran to the sea".split()
    for name, first in (("train", 0), ("validation", 40), ("test", 60)):
        rows = [{"text": " ".join(words[(i + j * i) % len(words)] for j in range(9))} for i in range(first, first + 16)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model_name_or_path": str(student_folder), "teacher_model_name_or_path": str(teacher_folder),
        "dataset_name": str(folder / "train.jsonl"), "eval_dataset_name": str(folder / "validation.jsonl"),
        "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3,
        "max_length": 32, "save_strategy": "no", "bf16": False, "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(options))
    return folder / "recipe.yaml"


def arguments(recipe, output, *more):
    return ["--config", str(recipe), "--output_dir", str(output), "--test", str(recipe.parent / "test.jsonl"), *more]


def compare(recipe, output, *more):
    """In a process of its own: the one that runs are forked from would outlive the test."""
    return run_taid("compare", *arguments(recipe, output, *more))


@pytest.fixture(scope="module")
def done(recipe):
    output = recipe.parent / "done"
    finished = compare(recipe, output, *OWN)
    assert finished.returncode == 0, finished.stderr
    return output, finished.stdout


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("comparison.*")}


def measures(folder):
    """The table but for time and memory."""
    rows = csv.DictReader((folder / "comparison.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in ("seconds", "memory_gb")} for row in rows]


@pytest.mark.cli
def test_each_method_has_each_seed_and_the_learning_rate_that_was_best_for_it_on_validation_rows(done):
    output, _ = done
    found = json.loads((output / "comparison.json").read_text())

    assert [(run["method"], run["seed"]) for run in found["runs"]] == [
        (method, seed) for method in ("forward_kl", "taid", "sft") for seed in (0, 1)
    ]
    assert len(found["grid"]) == 6
    assert {run["seed"] for run in found["grid"]} == {0}
    for method, of in found["methods"].items():
        rates = {r["learning_rate"]: r["validation"]["cross_entropy"] for r in found["grid"] if r["method"] == method}
        assert len(rates) == 2
        assert of["learning_rate"] == min(rates, key=rates.get)
        assert all(run["learning_rate"] == of["learning_rate"] for run in found["runs"] if run["method"] == method)


@pytest.mark.cli
def test_the_test_rows_are_measured_of_the_chosen_runs_alone(done):
    output, _ = done
    found = json.loads((output / "comparison.json").read_text())

    chosen = {run["run"] for run in found["runs"]}
    for path in (output / "results").glob("*seed?.json"):
        assert ("held_out" in json.loads(path.read_text())) == (path.stem in chosen), path
    assert any(run["run"] not in chosen for run in found["grid"])


@pytest.mark.cli
def test_all_runs_begin_alike_and_a_seed_sees_the_same_batches_whatever_the_method(done):
    output, _ = done
    rows = {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (output / "runs").glob("*/metrics.jsonl")
    }

    starts = {rows_[0]["eval_cross_entropy"] for rows_ in rows.values()}
    assert len(starts) == 1
    for seed in (0, 1):
        of_seed = [rows_ for name, rows_ in rows.items() if name.endswith(f"seed{seed}")]
        assert len({tuple(row["tokens"] for row in rows_ if "tokens" in row) for rows_ in of_seed}) == 1
    # Before its first step a student's loss on the labels is the batch's alone, but for rounding.
    firsts = {name: next(row["cross_entropy"] for row in r if "cross_entropy" in row) for name, r in rows.items()}
    of_seeds = [{round(first, 4) for name, first in firsts.items() if name[-1] == seed} for seed in "01"]
    assert [len(of_seed) for of_seed in of_seeds] == [1, 1]
    assert of_seeds[0] != of_seeds[1]


@pytest.mark.cli
def test_the_student_before_and_the_teacher_are_measured_once_as_taid_evaluate_does(done, tmp_path, recipe):
    output, _ = done
    options = yaml.safe_load(recipe.read_text())
    student, teacher = options["model_name_or_path"], options["teacher_model_name_or_path"]
    written = tmp_path / "evaluation.json"
    rows = ["--data", str(recipe.parent / "test.jsonl"), "--max_length", "32", "--use_cpu"]
    assert main(["evaluate", student, "--teacher", teacher, *rows, "--output", str(written)]) == 0
    expected = json.loads(written.read_text())["held_out"]

    beside = json.loads((output / "comparison.json").read_text())["beside"]

    assert list(beside) == ["student before", "teacher"]
    for name, of in (("student before", expected["student"]), ("teacher", expected["teacher"])):
        measured = {measure: value for measure, value in of.items() if value is not None}
        assert {measure: beside[name]["held_out"][measure] for measure in measured} == pytest.approx(measured, rel=1e-6)
    assert all("teacher" not in json.loads(path.read_text()) for path in (output / "results").glob("*seed?.json"))


@pytest.mark.cli
def test_the_curves_are_those_that_the_runs_logged(done):
    output, _ = done
    curves = json.loads((output / "curves.json").read_text())

    assert set(curves) == {path.name for path in (output / "runs").iterdir()}
    for run, series in curves.items():
        logged = [json.loads(line) for line in (output / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        assert ("t" in series) == run.startswith("taid")
        for name in ("eval_cross_entropy", "loss"):
            assert [step for step, _ in series[name]] == [row["step"] for row in logged if name in row]
            values = [row[name] for row in logged if name in row]
            assert [value for _, value in series[name]] == pytest.approx(values, rel=6e-6)


@pytest.mark.cli
def test_the_means_and_differences_are_those_of_the_runs(done):
    output, shown = done
    found = json.loads((output / "comparison.json").read_text())
    by_run = {(run["method"], run["seed"]): run["held_out"]["kl"] for run in found["runs"]}

    gaps = [by_run["taid", seed] - by_run["forward_kl", seed] for seed in (0, 1)]

    interval = found["methods"]["taid"]["differences"]["kl"]
    assert math.isclose(interval["mean"], sum(gaps) / 2, rel_tol=1e-12)
    assert math.isclose(interval["half_width_95"], 12.7062047 * abs(gaps[0] - gaps[1]) / 2, rel_tol=1e-6)
    assert found["methods"]["forward_kl"]["differences"] == {}
    assert "forward_kl" in shown
    assert f"page: {output / 'comparison.html'}" in shown


@pytest.mark.cli
def test_a_second_call_does_nothing_again_and_gives_the_same_files(recipe, done):
    output, _ = done
    before, runs = files(output), {p: p.stat().st_mtime_ns for p in (output / "runs").glob("*/metrics.jsonl")}

    again = compare(recipe, output, *OWN)

    assert again.returncode == 0, again.stderr
    assert files(output) == before
    assert {p: p.stat().st_mtime_ns for p in (output / "runs").glob("*/metrics.jsonl")} == runs
    assert "[1/" not in again.stdout


@pytest.mark.cli
@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_without_finished_runs_to_the_same_table(recipe, done, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "taid", "compare", *arguments(recipe, output, *OWN, "--processes", "2")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and len(list((output / "results").glob("*seed?.json"))) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in (output / "results").glob("*seed?.json")}
    kept = {path.stem: (output / "runs" / path.stem / "metrics.jsonl").stat().st_mtime_ns for path in finished}
    assert 3 <= len(finished) < 9

    again = compare(recipe, output, *OWN)

    assert again.returncode == 0, again.stderr
    assert {name: (output / "runs" / name / "metrics.jsonl").stat().st_mtime_ns for name in kept} == kept
    assert measures(output) == measures(done[0])


@pytest.mark.cli
def test_another_recipe_is_refused_and_more_seeds_and_methods_are_added(recipe, done, tmp_path):
    output = shutil.copytree(done[0], tmp_path / "copy")

    other = compare(recipe, output, *OWN, "--max_steps", "7")
    rows = recipe.parent / "test.jsonl"
    before = rows.read_text()
    rows.write_text(before + before.splitlines()[0] + "\n")
    changed = compare(recipe, output, *OWN)
    rows.write_text(before)
    more = compare(recipe, output, *OWN[:1], "forward_kl,taid,sft,tvd", *OWN[2:])

    assert other.returncode == changed.returncode == 2
    assert "holds a comparison with max_steps: 6, and this one has 7: choose another folder" in other.stderr
    assert f"holds a comparison with content of {rows}: " in changed.stderr
    assert more.returncode == 0, more.stderr
    runs = [line for line in more.stdout.splitlines() if re.match(r"\[\d+/\d+\]", line)]
    assert [re.sub(r"0\.\d+", "X", run) for run in runs] == [
        *("[1/2] tvd-X-seed0", "[2/2] tvd-X-seed0", "[1/1] tvd-X-seed1"),
        *("[1/2] tvd-X-seed0.test", "[2/2] tvd-X-seed1.test"),
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--objectives", "forward"], "--objectives: 'forward' does not exist; did you mean 'forward_kl'?"),
        (["--objectives", "sft,sft"], "--objectives: sft stands twice"),
        (["--seeds", "0"], "--seeds must be a whole number, 1 or more, got '0'"),
        (["--seeds", "1,1"], "--seeds are different numbers"),
        (["--learning_rates", "1e-3,a"], "--learning_rates are numbers with commas between, got '1e-3,a'"),
        (["--processes", "-1"], "--processes must be a whole number, 1 or more, got '-1'"),
        (["--baseline", "jsd"], "--baseline jsd is none of the methods: sft"),
        (["--select", "loss"], "invalid choice: 'loss'"),
        (["--variants", "nothing.yaml"], "--variants nothing.yaml: there is no such file"),
        (["--test", "{validation}"], "are the validation rows too: give others"),
        (["--test", "{train}"], "are the training rows too: give others"),
        (["--seeds", ","], "--seeds are different numbers"),
        (["--push_to_hub", "true"], "push_to_hub is not for a comparison"),
        (["--test", "nothing.jsonl"], "data file nothing.jsonl does not exist"),
        (["--test", ""], "--test is empty: name rows, or leave it away"),
        (["--generate", "4"], "prompt"),
        (
            ["--objectives", "sft,gkd"],
            "gkd let answers to prompts be written, and the rows have `text`, all of which is",
        ),
        (["--taid_t_strat", "1"], "unknown option '--taid_t_strat'"),
        (["--seedss", "3"], "unknown option '--seedss'; did you mean 'seeds'?"),
        (["--seed", "3"], "--seed is of one run: give --seeds, so many or 0,1,7"),
        (["--objective=taid"], "--objective is of one run: name methods by --objectives A,B"),
        (["--overwrite_output_dir", "true"], "--overwrite_output_dir is of one run: a comparison is not overwritten"),
        (["--resume_from_checkpoint"], "--resume_from_checkpoint is of one run: called again, a comparison goes on"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_trained(recipe, tmp_path, capsys, more, words):
    files_of = {name: recipe.parent / f"{name}.jsonl" for name in ("train", "validation")}
    more = [part.format(**files_of) for part in more]
    start = arguments(recipe, tmp_path / "out", "--objectives", "sft", "--seeds", "1")

    status = main(["compare", *start, *more])

    assert status == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


def test_learning_rates_ask_for_rows_that_did_not_choose_them(recipe, tmp_path, capsys):
    arguments_ = ["compare", "--config", str(recipe), "--output_dir", str(tmp_path / "out"), *OWN]

    assert main(arguments_) == 2
    assert "so the table needs others: give them as --test" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")

    assert main(["compare", *arguments(recipe, tmp_path, "--objectives", "sft", "--seeds", "1")]) == 2
    assert "holds files that are no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_variants_are_named_and_their_options_checked(recipe, tmp_path, capsys):
    variants = tmp_path / "variants.yaml"
    start = ["compare", *arguments(recipe, tmp_path / "out", "--variants", str(variants), "--objectives")]
    for content, words in (
        ("low: {objective: taid, taid_t_start: 2}", "method low: t_start must lie in [0, 1"),
        ("low: {objective: taid, taid_t_strat: 0.2}", "method low: unknown option '--taid_t_strat=0.2'"),
        ("low: 1", "must hold a mapping of names to options"),
        ("a/b: {}", "'a/b' names folders: use letters, digits"),
        ("TAID: {}", "TAID is a method already"),
        ("other: {dataset_name: rows.jsonl}", "other sets dataset_name, which all runs of a comparison have in common"),
        ("other: {dataset_train_split: new}", "other sets dataset_train_split, which all runs"),
        ("other: {max_length: 8}", "other sets max_length, which all runs"),
        ("other: {push_to_hub: true}", "other sets push_to_hub, which all runs"),
        ("1: {objective: taid}", "the name 1 is no text: put it between quotes"),
        ("yes: {objective: taid}", "the name True is no text"),
        ("a: {objective: taid}\na: {objective: sft}", "'a' stands twice"),
        ("a: {objective: taid}\nA: {objective: sft}", "A is a method already"),
        (f"{'a' * 101}: {{}}", "at most 100"),
        ("a: {taid_t_start: 2020-01-01}", "a: taid_t_start is datetime.date(2020, 1, 1): give a number, text"),
        ("a: {model_init_kwargs: {x: 2020-01-01}}", "a: model_init_kwargs is {'x': datetime.date(2020, 1, 1)}: give"),
        ("a: {taid_alpha: null}", "a: taid_alpha is null: give a number, text"),
    ):
        variants.write_text(content)
        assert main([*start, content.split(":")[0]]) == 2
        assert words in capsys.readouterr().err
    variants.write_text("low: {taid_t_start: 0.2}\nhigh: {taid_t_start: 0.4}\n")
    assert main([*start, "sft,taid"]) == 2  # and not without them, unseen
    assert f"--variants {variants}: add those of low, high that are meant to --objectives" in capsys.readouterr().err


def test_names_of_methods_may_have_blanks_around_them(recipe, tmp_path, capsys):
    start = arguments(recipe, tmp_path, "--objectives", "sft, taid", "--baseline", "jsd")

    assert main(["compare", *start]) == 2
    assert "--baseline jsd is none of the methods: sft, taid" in capsys.readouterr().err


def test_help_has_every_option_of_a_comparison_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])

    own = capsys.readouterr().out.split("Comparison:")[1].split("Objective and teacher:")[0]
    usage = COMMANDS["compare"][0]
    assert set(re.findall(r"^  (--\w+)", own, re.MULTILINE)) == set(re.findall(r"--\w+", usage)) - {"--field"}
    assert "(default: 5)" in own


def test_the_options_of_a_variant_mean_what_they_mean_in_a_recipe(tmp_path):
    options = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "taid_t_start": 0.2, "objective": "taid"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))

    model, _, args = parse(arguments_of(options))
    of_recipe, _, _ = parse(["--config", str(tmp_path / "recipe.yaml")])

    assert model.lora_target_modules == of_recipe.lora_target_modules == ["q_proj", "v_proj"]
    assert (model.use_peft, args.taid_t_start) == (True, 0.2)


def test_learning_rates_that_differ_in_their_last_digit_are_runs_of_their_own():
    names = [Run("taid", 0, rate, {}).name for rate in (None, 1e-4, 3e-5, 1.0000001e-4)]

    assert names == ["taid-seed0", "taid-0.0001-seed0", "taid-3e-05-seed0", "taid-0.00010000001-seed0"]


@pytest.mark.cli
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("results/sft-0.01-seed0.json", "", "is truncated or damaged: delete it, and the run is done again"),
        ("results/taid-0.001-seed0.json", "{}", "is truncated or damaged: delete it, and the run is done again"),
        ("comparison.yaml", "{a", "is truncated or damaged, so nobody knows what was compared: choose another folder"),
        ("comparison.yaml", "", "is truncated or damaged, so nobody knows what was compared: choose another folder"),
    ],
)
def test_a_file_of_a_comparison_that_is_damaged_is_named(recipe, done, tmp_path, capsys, name, content, words):
    output = shutil.copytree(done[0], tmp_path / "copy")
    (output / name).write_text(content)
    before = files(output)

    assert main(["compare", *arguments(recipe, output, *OWN)]) == 2
    assert f"{output / name} {words}" in capsys.readouterr().err
    assert files(output) == before


def test_a_cache_that_was_deleted_is_made_again(tmp_path):
    plan = SimpleNamespace(
        folder=tmp_path, arguments=[], recipe={"sampling": "none", "seq_kd": False}, methods={"a": {}}
    )
    args = SimpleNamespace(teacher_server_url=None, teacher_cache=None, packing=False, fused=True,
                           teacher_model_name_or_path="teacher")  # fmt: skip
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cache.json").write_text("{}\n")
    made = []
    workers = SimpleNamespace(do=lambda jobs: made.extend(name for name, _, _ in jobs))

    runner._with_cache(plan, SimpleNamespace(streaming=False), args, workers)
    assert made == ["cache"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    runner._with_cache(plan, SimpleNamespace(streaming=False), args, workers)
    assert made == ["cache"]


def test_a_run_begins_anew_where_nothing_can_be_resumed_whatever_the_recipe_says(tmp_path):
    recipe = {"sampling": "none", "seq_kd": False, "resume_from_checkpoint": "true"}
    plan = SimpleNamespace(folder=tmp_path, arguments=[], recipe=recipe)

    ((name, _, (given, *_)),) = runner._trainings(
        plan, [Run("taid", 0, None, {})], ["--resume_from_checkpoint", "true"]
    )

    _, _, args = parse(given)
    assert (name, args.resume_from_checkpoint, args.overwrite_output_dir) == ("taid-seed0", "false", True)


def test_what_was_generated_to_other_prompts_does_not_stay_in_a_result(tmp_path, monkeypatch):
    result = tmp_path / "taid-seed0.json"
    result.write_text(json.dumps({"run": "taid-seed0", "generate": 4, "generations": {"rouge_l": 0.5}}))

    def evaluate(options):
        options.output.write_text(json.dumps({"held_out": {"student": {"cross_entropy": 1.0}}}))

    monkeypatch.setattr("taid.evaluation.evaluate.run", evaluate)
    runner._test(["model", "--data", "rows.jsonl"], result, 0)

    found = json.loads(result.read_text())
    assert found["held_out"] == {"cross_entropy": 1.0}
    assert (found["generate"], "generations" in found) == (0, False)


@pytest.mark.cli
def test_a_run_that_the_system_killed_is_said_to_be_killed(tmp_path):
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n\n\ndef die():\n    print('step 3/9: loss 2.0, 1 s', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    code = (
        "from pathlib import Path; from taid.comparison.workers import Workers; from deadly import die\n"
        "Workers(Path('logs'), 1).do([('a', die, ())])"
    )
    (tmp_path / "logs").mkdir()

    failed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert "ValueError: a has failed: it was killed by signal 9 (the system does so where memory" in failed.stderr


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_an_interval_is_that_of_students_t():
    values = [1.0, 2.0, 4.0, 4.5, 5.5]

    interval = Interval.from_values(values)

    low, high = stats.t.interval(0.95, 4, loc=3.4, scale=stats.sem(values))
    assert math.isclose(interval.mean - interval.half, low, rel_tol=1e-12)
    assert math.isclose(interval.mean + interval.half, high, rel_tol=1e-12)
    assert Interval.from_values([3.0]) == Interval(3.0, None)


def result(method, seed, cross_entropy, **more):
    held_out = {"cross_entropy": cross_entropy, "kl": cross_entropy / 2, "tokens": 100, **more}
    return {
        "method": method, "seed": seed, "learning_rate": 1e-3, "run": f"{method}-seed{seed}", "seconds": 10.0 + seed,
        "memory_gb": 1.5, "held_out": held_out,
    }  # fmt: skip


REFERENCES = {
    "student before": {"held_out": {"cross_entropy": 2.25, "kl": 1.5, "tokens": 100}},
    "teacher": {"held_out": {"cross_entropy": 0.5, "kl": 0.0, "tokens": 100}},
}


def from_runs(results, select=None):
    return ComparisonResults.from_runs(
        results, baseline="forward_kl", rows="test.jsonl", select=select, grid=[], references=REFERENCES
    )


def test_the_student_before_and_the_teacher_stand_below_the_methods():
    head, rows = from_runs([result("forward_kl", 0, 1.0), result("taid", 0, 0.9)]).cells()

    loss, gap = head.index("cross-entropy"), head.index("less forward_kl's")
    assert [row[0] for row in rows] == ["forward_kl", "taid", "(student before)", "(teacher)"]
    assert [row[loss] for row in rows] == ["1.0000", "0.9000", "2.2500", "0.5000"]
    assert [row[gap] for row in rows[2:]] == ["", ""]
    assert all(len(row) == len(head) for row in rows)


def test_a_difference_is_taken_seed_by_seed_and_so_is_free_of_what_seeds_do_to_both():
    seeds = [0.0, 10.0, 20.0]
    found = from_runs(
        [result("forward_kl", s, 1 + at) for s, at in enumerate(seeds)]
        + [result("taid", s, 0.9 + at + 0.01 * s) for s, at in enumerate(seeds)]
    )

    taid = found.methods[1]
    assert math.isclose(taid.differences["cross_entropy"].mean, -0.09, rel_tol=1e-9)
    assert math.isclose(taid.differences["cross_entropy"].half, 4.302652729911275 * 0.01 / math.sqrt(3), rel_tol=1e-9)
    assert taid.measures["cross_entropy"].half > 20


def test_the_opening_names_the_lowest_and_those_that_the_seeds_cannot_tell_from_it():
    found = from_runs(
        [result("forward_kl", s, 1 + s) for s in range(3)]
        + [result("taid", s, 1 + s + (0.1, -0.2, 0.02)[s]) for s in range(3)]
        + [result("sft", s, 2 + s + 0.001 * s) for s in range(3)]
    )

    assert comparison_results.opening(found) == (
        "taid has the lowest held-out cross-entropy, 1.9733 ± 2.4138 nats a token; from forward_kl the seeds cannot "
        "tell it apart."
    )


def test_a_table_has_what_every_run_has_and_says_what_one_seed_is_worth():
    found = from_runs([result("forward_kl", 0, 1.0, accuracy=0.5), result("taid", 0, 1.25)])

    head, rows = found.cells()

    of_measures = ["cross-entropy", "less forward_kl's", "KL(p ‖ q)", "less forward_kl's"]
    assert head == ["method", "learning rate", *of_measures, "s a run", "GB"]
    assert rows[1] == ["taid", "0.001", "1.2500", "+0.2500", "0.6250", "+0.1250", "10", "1.50"]
    assert "One seed: nothing tells chance from a difference." in found.notes()


def test_a_path_with_brackets_stands_in_the_table_as_it_is():
    found = replace(from_runs([result("forward_kl", 0, 1.0)]), rows="runs[1]/[/x]/test.jsonl")
    console = Console(file=io.StringIO(), width=200)

    console.print(comparison_results.table(found))

    assert "Measured on runs[1]/[/x]/test.jsonl" in console.file.getvalue()


def test_the_table_in_markdown_is_one_of_equal_rows():
    text = comparison_results.markdown(
        from_runs([result(m, s, 1.0 + s) for m in ("forward_kl", "taid") for s in range(2)])
    )

    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1


def test_a_rate_at_the_edge_of_the_grid_is_said_to_be_one():
    grid = [{"learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)]
    results = [result("forward_kl", 0, 1.0), result("taid", 0, 1.0) | {"learning_rate": 1e-2}]
    found = ComparisonResults.from_runs(
        results, baseline="forward_kl", rows="test.jsonl", select="kl", grid=grid, references={}
    )

    notes = found.notes()
    assert "The largest, 0.01, is that of taid: a larger one, which was not tried, may be better." in notes
    assert not any("smaller" in note for note in notes)
    chosen = "Of the learning rates 0.0001, 0.001, 0.01 each method has the one that gave it the lowest KL(p ‖ q) on "
    assert chosen + "validation rows, with the first seed." in notes


def test_methods_that_came_out_equal_to_the_last_digit_are_said_to_be_one():
    found = from_runs([result(m, s, 1.0 + s) for m in ("forward_kl", "taid", "taid_linear") for s in range(2)])

    assert any("taid and taid_linear are the same" in note for note in found.notes())


def test_a_method_that_never_sampled_an_answer_is_named():
    shares = {"distillm": (0.0, 0.0), "distillm_reverse": (0.0, 0.25), "gkd": (0.5, 0.5)}
    runs = [result(m, s, 1.0 + s) | {"sampled": shares[m][s]} for m in shares for s in range(2)]
    found = from_runs([*(result("forward_kl", s, 1.0 + s) for s in range(2)), *runs])

    assert [note.split(":")[0] for note in found.notes() if "sampled by" in note] == [
        "No answer was ever sampled by distillm"
    ]


def test_who_is_ahead_is_said_in_the_markdown_and_on_the_terminal_too():
    found = from_runs([result(m, s, 1.0 + s + i) for i, m in enumerate(("forward_kl", "taid")) for s in range(2)])

    assert comparison_results.opening(found) in comparison_results.markdown(found).splitlines()
    assert comparison_results.opening(found) in str(comparison_results.table(found).caption)


def test_the_points_of_runs_are_not_hidden_below_their_mean(monkeypatch):
    figures = []
    monkeypatch.setattr(comparison_results, "png_of", lambda figure: figures.append(figure) or b"")
    comparison_results._plot_results(from_runs([result("forward_kl", s, 1 + 0.1 * s) for s in range(3)]))

    lines = figures[0].axes[0].lines
    points, mean = (next(line for line in lines if len(line.get_xdata()) == n) for n in (3, 1))
    assert set(points.get_ydata()) == {-0.28}
    assert set(mean.get_ydata()) == {0}


@pytest.mark.cli
def test_the_page_shows_every_method_and_links_every_run(done):
    output, _ = done
    page = (output / "comparison.html").read_text()

    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 6
    assert all((output / link).is_file() for link in links)
    assert page.count("data:image/png;base64,") == 3
    assert Path(output / "comparison.md").read_text().splitlines()[0].startswith("| method | learning rate |")


@pytest.mark.cli
def test_a_method_that_fails_stops_the_comparison_with_its_reason_and_leaves_what_was_finished(recipe, tmp_path):
    variants = tmp_path / "variants.yaml"
    variants.write_text("odd: {objective: forward_kl, teacher_cache_format: hidden, chat_template_path: adaptive}\n")
    more = ["--variants", str(variants), "--objectives", "sft,odd", "--seeds", "1"]

    failed = compare(recipe, tmp_path / "out", *more)

    assert failed.returncode == 2
    assert re.search(r"error: odd-seed0 has failed: .+ \(.*logs/odd-seed0.log\)", failed.stderr), failed.stderr
    assert [path.name for path in (tmp_path / "out" / "results").glob("*seed0.json")] == ["sft-seed0.json"]


@pytest.mark.cli
def test_a_learning_rate_that_a_method_cannot_bear_is_not_chosen_and_a_run_that_diverges_is_named(recipe, tmp_path):
    variants = tmp_path / "variants.yaml"
    variants.write_text("wild: {objective: forward_kl, max_grad_norm: 0, optim: sgd}\n")
    more = ["--variants", str(variants), "--objectives", "sft,wild", "--seeds", "1"]

    chosen = compare(recipe, tmp_path / "out", *more, "--learning_rates", "1e-3,1e30")
    alone = compare(recipe, tmp_path / "alone", *more, "--learning_rates", "1e30")

    assert chosen.returncode == 0, chosen.stderr
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["run"] for run in found["grid"] if "diverged" in run] == ["sft-1e+30-seed0", "wild-1e+30-seed0"]
    assert {of["learning_rate"] for of in found["methods"].values()} == {1e-3}
    assert alone.returncode == 2
    assert "all runs have diverged: sft-1e+30-seed0, wild-1e+30-seed0" in alone.stderr


@pytest.mark.cli
@pytest.mark.slow
def test_the_small_comparison_of_the_benchmarks_ends_with_a_table(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "evidence" / "compare.py"
    command = [sys.executable, str(script), "small", "--out", str(tmp_path / "small"), "--keep"]

    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )

    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "small" / "comparison" / "comparison.json").read_text())
    assert list(found["methods"]) == ["sft", "forward_kl", "taid"]
    assert {of["learning_rate"] for of in found["methods"].values()} <= {3e-4, 1e-3}
    for run in found["runs"]:
        assert run["validation"]["teacher_cross_entropy"] < run["held_out"]["cross_entropy"]
        if run["method"] in ("forward_kl", "taid"):  # of the others so few steps may make a worse student
            started = read_metrics(tmp_path / "small/comparison/runs" / run["run"])[0]
            assert run["validation"]["kl"] < started["eval_kl"]
