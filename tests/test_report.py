"""The run report, on made-up run folders: what it says, what it draws from, what it refuses."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid.artifacts import plots, report
from taid.artifacts.report import write_report

NAMES = {"model_name_or_path": "org/small", "teacher_model_name_or_path": "org/large"}
EVALUATIONS = [
    {"step": 0, "eval_cross_entropy": 3.5, "eval_teacher_cross_entropy": 2.5, "eval_kl": 1.2, "eval_tokens": 51200},
    {"step": 300, "eval_cross_entropy": 2.9, "eval_teacher_cross_entropy": 2.5, "eval_kl": 0.45, "eval_tokens": 51200},
]


def training(*steps: int) -> list[dict[str, Any]]:
    return [
        {"step": n, "loss": 2 / n, "t": 0.4 + n / 1000, "kl": 20 / n, "cross_entropy": 3.0, "seconds": 2.41 * n}
        for n in steps
    ]


def run(
    folder: Path, rows: list[dict[str, Any]], *, total_steps: int | None = 300, end: str = "", **config: Any
) -> Path:
    """A run folder with these rows; `end` is appended to metrics.jsonl as it is."""
    (folder / "config.yaml").write_text(yaml.safe_dump({"objective": "taid"} | NAMES | config))
    rows = sorted(rows, key=lambda row: row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    if total_steps is not None:
        (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0", "total_steps": total_steps}))
    return folder


def page(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def opening(folder: Path) -> str:
    (sentence,) = re.findall(r"<h1>(.*?)</h1>", page(folder), re.DOTALL)
    return html.unescape(sentence)


def table(text: str) -> dict[str, list[str]]:
    """Every row of every table: its first cell, with the unit -> the others."""
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    return {re.sub(r"<.*?>", "", first).strip(): rest for first, *rest in rows}


def test_opening_tells_what_a_finished_run_reached(tmp_path: Path) -> None:
    assert opening(run(tmp_path, training(100, 200, 300) + EVALUATIONS)) == (
        "TAID distilled org/large into org/small in 300 steps and 12 min 3 s: held-out cross-entropy fell from 3.500 "
        "to 2.900 nats per token, which closed 60% of the gap to the teacher (2.500); the KL to the teacher fell from "
        "1.200 to 0.450 nats per token."
    )


def test_opening_of_fine_tuning_without_teacher_or_evaluation(tmp_path: Path) -> None:
    rows = [{"step": 10, "loss": 3.25, "seconds": 8.04}, {"step": 20, "loss": 3.0, "seconds": 59.0}]
    folder = run(tmp_path, rows, total_steps=20, objective="sft", teacher_model_name_or_path=None)
    assert opening(folder) == (
        "Supervised fine-tuning trained org/small in 20 steps and 59 s: the training loss fell from 3.250 at step 10 "
        "to 3.000 nats per token; nothing was held out to evaluate."
    )
    assert (folder / "loss.png").exists()
    assert not (folder / "t.png").exists()


def test_opening_says_when_the_student_moved_away(tmp_path: Path) -> None:
    worse = {"step": 300, "eval_cross_entropy": 3.55, "eval_teacher_cross_entropy": 2.5}
    sentence = opening(run(tmp_path, [*training(300), EVALUATIONS[0], worse]))
    assert (
        "rose from 3.500 to 3.550 nats per token, which moved away from the teacher (2.500) by 5.0% of the gap"
        in sentence
    )


def test_a_killed_run_is_reported_up_to_its_last_whole_line(tmp_path: Path) -> None:
    text = page(run(tmp_path, training(100, 180), end='{"step": 190, "loss": 0.0'))
    assert "was distilling org/large into org/small and has stopped at step 180 of 300 (unfinished or still" in text
    assert "after 7 min 14 s" in text
    assert table(text)["step optimizer steps"] == ["180"]


def test_a_single_evaluation_claims_no_change(tmp_path: Path) -> None:
    sentence = opening(run(tmp_path, training(300) + EVALUATIONS[:1]))
    assert "cross-entropy is 3.500 nats per token at step 0, its only measurement (the teacher's is 2.500)" in sentence
    assert "closed" not in sentence


def test_a_student_better_than_the_teacher_has_no_gap(tmp_path: Path) -> None:
    rows = [row | {"eval_teacher_cross_entropy": 3.6} for row in EVALUATIONS]
    assert "2.900 nats per token (the teacher's is 3.600);" in opening(run(tmp_path, training(300) + rows))


def test_named_evaluation_sets_are_told_apart(tmp_path: Path) -> None:
    rows = [{key.replace("eval_", f"eval_{name}_"): value for key, value in row.items()} for row in EVALUATIONS
            for name in ("wiki", "my_code")]  # fmt: skip
    text = page(run(tmp_path, training(300) + rows))
    assert "held-out cross-entropy on wiki fell from 3.500 to 2.900" in text
    assert [name for name in re.findall(r"<h2>(.*?)</h2>", text) if "Held" in name] == [
        "Held out: wiki",
        "Held out: my_code",
    ]
    assert table(text)["cross-entropy nats per token"] == ["3.0000", "2.9000", "2.9000"]


def test_the_floor_is_the_schedule_of_the_configuration(tmp_path: Path) -> None:
    folder = run(tmp_path, training(100, 200), taid_t_start=0.25, taid_t_end=0.75, taid_alpha="auto")
    text = page(folder)
    assert "t over the training steps: from 0.5 at step 100 to 0.6 at step 200; the linear floor rises" in text
    assert "rises from 0.25 to 0.75" in text
    assert "t goes from 0.25 to 0.75 over 300 steps adaptively (alpha 0.025)" in text
    schedule = report.read_run(folder).schedule
    assert schedule is not None
    assert [schedule.linear(step) for step in (0, 150, 300)] == [0.25, 0.5, 0.75]


def test_the_schedule_without_options_has_no_floor(tmp_path: Path) -> None:
    text = page(run(tmp_path, training(100, 200), taid_schedule="auto"))
    assert "As configured, t falls over 300 steps to 0.95" in text
    assert "linear floor" not in text
    assert "at most 0.6" in text


def test_the_settings_that_tell_most_are_without_those_of_another_schedule(tmp_path: Path) -> None:
    options = {"taid_schedule": "auto", "taid_alpha": 5e-4, "taid_t_start": 0.4}
    assert report.read_run(run(tmp_path, training(100), **options)).important[:2] == ["objective", "taid_schedule"]
    assert not {"taid_alpha", "taid_t_start"} & set(report.read_run(tmp_path).important)
    run(tmp_path, training(100), **(options | {"taid_schedule": "paper"}))
    assert {"taid_alpha", "taid_t_start"} <= set(report.read_run(tmp_path).important)


def test_last_values_carry_their_units(tmp_path: Path) -> None:
    last = {"step": 300, "mean_token_accuracy": 0.4123, "learning_rate": 1e-4, "tokens_per_second": 9000.4}
    rows = table(page(run(tmp_path, [*training(300), last, *EVALUATIONS])))
    assert rows["quantity"] == ["training", "held out"]
    assert rows["KL to the teacher nats per token"] == ["0.0667", "0.4500"]
    assert rows["token accuracy share of tokens"] == ["41.2%", ""]
    assert rows["evaluated on tokens"] == ["", "51,200"]
    assert rows["speed tokens per second"] == ["9,000", ""]
    assert rows["wall time"] == ["12 min 3 s", ""]


def test_values_that_are_no_finite_numbers_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*training(100), {"step": 200, "loss": float("nan"), "grad_norm": float("inf"), "kl": None}]
    text = page(run(tmp_path, rows))
    assert "2 logged values were not finite numbers" in text
    assert table(text)["loss nats per token"] == ["0.0200"]


def test_without_versions_the_configuration_may_tell_the_steps(tmp_path: Path) -> None:
    text = page(run(tmp_path, training(100), total_steps=None, max_steps=400))
    assert "step 100 of 400" in text
    assert table(text)["versions.json"] == ["unknown"]
    text = page(run(tmp_path, training(100), total_steps=None, max_steps=-1))
    assert "in 100 steps and 4 min 1 s" in text


def test_thousands_of_points_are_smoothed_and_say_so(tmp_path: Path) -> None:
    assert "running means over 50 logged steps" in page(run(tmp_path, training(*range(1, 3001)), total_steps=3000))
    assert plots._running_mean([1.0, 2.0, 6.0, 10.0], 2) == [1.0, 1.5, 4.0, 8.0]
    assert plots._running_mean([1.0, 2.0], 1) == [1.0, 2.0]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>{{ 7 * 7 }}$x_$'
    text = page(run(tmp_path, [*training(300), {f"eval_{hostile}_cross_entropy": 1.0, "step": 300}],
                    model_name_or_path=hostile, another={"key": hostile}))  # fmt: skip
    assert "<script" not in text
    assert "into &#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}$x_$ in 300 steps" in text
    assert "Held out: &#34;&gt;&lt;script&gt;" in text


def test_the_page_stands_alone(tmp_path: Path) -> None:
    text = page(run(tmp_path, training(100, 300) + EVALUATIONS))
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?(?!data:)\w", text.split("</head>")[1])
    assert not re.search(r"https?://|<script|<link|@import", text)
    images = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert images[:2] == [(tmp_path / name).read_bytes() for name in ("t.png", "loss.png")]
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert len(re.findall(r'alt="[^"]{20,}"', text)) == len(images) == 3
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.yaml", "metrics.jsonl", "versions.json", "report.html", "t.png", "loss.png",
    }  # fmt: skip


def test_all_settings_are_shown_the_important_ones_first(tmp_path: Path) -> None:
    text = page(run(tmp_path, training(300), bf16=True, gradient_checkpointing_kwargs={"use_reentrant": False}, seed=7))
    shown, folded = text.split("<details>")
    assert table(shown)["seed"] == ["7"]
    assert "bf16" not in shown
    assert table(folded)["bf16"] == ["true"]
    assert html.unescape(table(folded)["gradient_checkpointing_kwargs"][0]) == '{"use_reentrant": false}'


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent: give the output_dir"):
        write_report(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no run folder, it has no config\.yaml"):
        write_report(tmp_path)
    (run(tmp_path, training(10)) / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no metrics\.jsonl"):
        write_report(tmp_path)


def test_a_run_without_a_logged_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no training step yet: wait"):
        write_report(run(tmp_path, EVALUATIONS[:1]))


def test_broken_files_are_named(tmp_path: Path) -> None:
    run(tmp_path, training(10))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 1.0}\n{"step": \n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        write_report(tmp_path)
    run(tmp_path, training(10))
    (tmp_path / "versions.json").write_text("{")
    with pytest.raises(ValueError, match=r"versions\.json cannot be read"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("- a list")
    with pytest.raises(ValueError, match=r"config\.yaml must be a mapping of names to values, got list"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 s"),
        (9.84, "9.84 s"),
        (59.99, "1 min 0 s"),
        (60.0, "1 min 0 s"),
        (3599.7, "1 h 0 min"),
        (100_000.0, "27 h 46 min"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert report.duration(seconds) == words
