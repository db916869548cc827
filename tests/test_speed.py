"""taid evaluate --speed: the arithmetic, and that the rows are there. No time is asserted."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from itertools import cycle

import pytest
from rich.console import Console

from taid.artifacts import tables
from taid.cli.main import main
from taid.evaluation import inference_speed

FIGURES = {
    "parameters": 100, "parameters_without_embeddings": 60, "disk_bytes": 4_000_000, "weight_bytes": 400,
    "memory_bytes": 900, "model_memory_bytes": 500, "first_token_seconds": 0.2, "tokens_per_second": 10.0,
}  # fmt: skip
MACHINE = {"name": "a machine", "device": "cpu", "dtype": "float32", "threads": 2, "versions": {"torch": "2.13.0"}}


@pytest.fixture
def asked(monkeypatch):
    """Instead of processes: the student is twice as fast, 4 bits are not there, each round has its own time."""
    subjects = []
    noise = {"teacher": cycle([1.0, 3.0, 2.0]), "student": cycle([1.0, 9.0, 1.5]), "student, 8 bits": cycle([1.0])}

    def figures(subject, *, dtype, use_cpu):
        subjects.append(subject.name)
        if subject.bits == 4:
            return {}, "no | kernel for this device"
        factor = 1 if subject.name == "teacher" else 2
        times = {"tokens_per_second": 10.0 * factor * next(noise[subject.name])}
        packed = {"parameters": 55, "parameters_without_embeddings": 15, "disk_bytes": 9} if subject.bits else {}
        halved = {"parameters": 50, "first_token_seconds": 0.1} if factor == 2 else {}
        return FIGURES | halved | packed | times | {"machine": MACHINE}, None

    monkeypatch.setattr(inference_speed, "_in_a_process", figures)
    return subjects


def test_the_models_take_turns_and_what_cannot_be_had_is_tried_once(asked):
    inference_speed.measure("s", "t", rounds=3)
    assert (
        asked
        == ["teacher", "student", "student, 8 bits", "student, 4 bits"] + ["teacher", "student", "student, 8 bits"] * 2
    )


def test_a_row_is_the_median_of_its_rounds_and_ratios_are_to_the_teacher(asked):
    card = inference_speed.measure("s", "t", rounds=3)
    teacher, student, eight, four = card["rows"]
    assert (teacher["tokens_per_second"], student["tokens_per_second"]) == (20.0, 30.0)
    assert student["rounds"]["tokens_per_second"] == [20.0, 180.0, 30.0]
    assert tables.ratio(student, card["rows"], "tokens_per_second") == 1.5
    assert tables.ratio(student, card["rows"], "parameters") == 0.5
    assert tables.ratio(teacher, card["rows"], "parameters") is None
    assert (eight["parameters"], eight["parameters_without_embeddings"]) == (50, 60), "not the packed numbers"
    assert eight["disk_bytes"] is None
    assert tables.ratio(eight, card["rows"], "disk_bytes") is None
    assert four == {"name": "student, 4 bits", "bits": 4, "not_available": "no | kernel for this device"}
    assert json.loads(json.dumps(card)) == card


def test_without_a_teacher_there_are_no_ratios(asked):
    card = inference_speed.measure("s", rounds=1)
    assert [row["name"] for row in card["rows"]] == ["student", "student, 8 bits", "student, 4 bits"]
    assert "x)" not in tables.speed_table(card).markdown().partition("\n\n")[0]


def test_the_tables_have_every_row_and_every_figure(asked):
    card = inference_speed.measure("s", "t", rounds=3)
    lines = tables.speed_table(card).markdown().splitlines()
    assert lines[2] == "| teacher | 0.0001 | 6e-05 | 4 | 0.0004 | 0.0009 | 0.0005 | 200 | 20 |"
    assert lines[3] == (
        "| student | 5e-05 (0.50x) | 6e-05 (1.00x) | 4 (1.00x) | 0.0004 (1.00x) | 0.0009 (1.00x) | 0.0005 (1.00x) "
        "| 100 (0.50x) | 30 (1.50x) |"
    )
    assert lines[5] == "| student, 4 bits | not available |" + "  |" * 7
    assert lines[7] == "student, 4 bits: not available: no | kernel for this device"
    note = "128 prompt tokens, then 64 new ones; medians of 3 rounds"
    assert note in lines[9]
    assert "a machine, float32, 2 threads, torch 2.13.0" in lines[9]
    console = Console(width=120, record=True)
    console.print(tables.speed_table(card).terminal())
    text = console.export_text()
    assert "…" not in text, "nothing is cut"
    for words in ("teacher", "student, 8 bits", "30", "(1.50x)", "4 bits: not available: no | kernel", "tokens/s"):
        assert words in text


@pytest.mark.cli
@pytest.mark.slow  # four processes that load the libraries each
def test_real_models_are_measured_in_processes_of_their_own(student_folder, teacher_folder, make_model):
    card = inference_speed.measure(str(student_folder), str(teacher_folder), use_cpu=True, rounds=1)
    rows = {row["name"]: row for row in card["rows"]}
    for name, folder, model in (
        ("student", student_folder, make_model(300)),
        ("teacher", teacher_folder, make_model(308, hidden_size=48, tied=False)),
    ):
        row, count = rows[name], sum(weight.numel() for weight in model.parameters())
        ends = {id(w): w.numel() for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
        assert row["parameters"] == count
        assert row["parameters_without_embeddings"] == count - sum(ends.values())
        assert row["disk_bytes"] == (folder / "model.safetensors").stat().st_size
        assert 4 * count <= row["weight_bytes"] < 4.1 * count
        assert row["memory_bytes"] > row["model_memory_bytes"]
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("first_token_seconds", "tokens_per_second"))
    for name in ("student, 8 bits", "student, 4 bits"):
        if find_spec("bitsandbytes"):
            assert rows[name]["weight_bytes"] < rows["student"]["weight_bytes"]
        else:
            assert rows[name]["not_available"] == "bitsandbytes is not installed (pip install 'taid[quantized]')"
    assert card["machine"]["dtype"] == "float32"
    assert card["machine"]["threads"] >= 1


@pytest.mark.cli
def test_what_cannot_be_measured_is_named(tmp_path, make_model, tokenizer):
    make_model(300, max_position_embeddings=64).save_pretrained(tmp_path / "short")
    with pytest.raises(
        ValueError, match=r"speed of student .*short cannot be measured: .* 64 positions, and 128 \+ 64"
    ):
        inference_speed.measure(str(tmp_path / "short"), use_cpu=True, rounds=1)
    (tmp_path / "short" / "adapter_config.json").touch()
    with pytest.raises(ValueError, match=r"is an adapter, which is slower .* taid export"):
        inference_speed.measure(str(tmp_path / "short"), use_cpu=True, rounds=1)


def test_evaluate_shows_and_writes_the_card(asked, tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    assert main(["evaluate", "s", "--teacher", "t", "--speed", "--output", str(output)]) == 0
    card = json.loads(output.read_text())["speed"]
    assert [row["name"] for row in card["rows"]] == ["teacher", "student", "student, 8 bits", "student, 4 bits"]
    assert output.with_suffix(".speed.md").read_text() == tables.speed_table(card).markdown()
    assert "Size and speed" in capsys.readouterr().out
