"""taid plan says what taid cache will write, without a weight."""

import shutil

import pytest
import yaml

from taid.cli import main


@pytest.fixture
def options(tmp_path, student_folder, teacher_folder, rows):
    return {
        "model_name_or_path": str(student_folder),
        "teacher_model_name_or_path": str(teacher_folder),
        "dataset_name": str(rows(tmp_path / "rows.jsonl", number=6)),
        "eval_dataset_name": str(rows(tmp_path / "held_out.jsonl", number=3, seed=1)),
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
    }


def run(command, options, tmp_path, capsys, *argv):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    capsys.readouterr()
    status = main([command, "--config", str(tmp_path / "recipe.yaml"), *argv])
    return status, capsys.readouterr()


def test_the_plan_is_what_the_capture_then_says(options, tmp_path, capsys, student_folder, teacher_folder):
    without_weights = {}
    for role, folder in (("model", student_folder), ("teacher_model", teacher_folder)):
        copy = shutil.copytree(folder, tmp_path / role)
        (copy / "model.safetensors").write_bytes(b"no weights")
        without_weights[f"{role}_name_or_path"] = str(copy)
    # the student's folder is only looked at for its tokenizer
    shutil.copy(student_folder / "model.safetensors", tmp_path / "model")
    status, said = run("plan", options | without_weights | {"teacher_top_k": 16}, tmp_path, capsys)
    assert status == 0, said.err
    assert "hidden states of 48 numbers in float32, 308 output rows" in said.out
    sizes = dict(line.rsplit(maxsplit=3)[:2] for line in said.out.splitlines() if line.endswith(" MB"))
    assert sizes == {
        "hidden": "192", "hidden_int8": "52", "top_k, k = 16": "76", "sampled, 50 draws, about 12 ids": "45",
        "sampled, 50 draws, at most": "159",
    }  # fmt: skip
    planned = sum(int(line.split()[-3].replace(",", "")) for line in said.out.splitlines() if "trained tokens" in line)
    for format_, each in (("hidden", 192), ("top_k", 76)):
        given = ("--teacher_cache", str(tmp_path / format_), "--teacher_cache_format", format_, "--teacher_top_k", "16")
        status, said = run("cache", options, tmp_path, capsys, *given)
        assert status == 0, said.err
        assert f"{planned:,} trained tokens to capture, {each} bytes each" in said.out


def test_other_precisions_and_tokenizers(options, tmp_path, capsys):
    status, said = run("plan", options, tmp_path, capsys, "--teacher_model_init_kwargs", '{"dtype": "bfloat16"}')
    assert status == 0
    assert "numbers in bfloat16" in said.out
    status, said = run("plan", options | {"tokenizer_from": "teacher"}, tmp_path, capsys)
    assert status == 0


def test_what_is_missing_is_named(options, tmp_path, capsys):
    for name in ("teacher_model_name_or_path", "dataset_name", "model_name_or_path"):
        status, said = run("plan", options | {name: None}, tmp_path, capsys)
        assert (status, said.err) == (
            2,
            f"taid: error: {name} is not set: give it in the configuration or as --{name}\n",
        )
    (tmp_path / "empty").mkdir()
    status, said = run("plan", options | {"teacher_model_name_or_path": str(tmp_path / "empty")}, tmp_path, capsys)
    assert status == 2
    assert "the configuration of teacher" in said.err
    status, said = run("plan", options | {"teacher_model_name_or_path": str(tmp_path / "none")}, tmp_path, capsys)
    assert (status, said.err) == (2, f"taid: error: teacher folder {str(tmp_path / 'none')!r} does not exist\n")
    status, said = run("plan", options, tmp_path, capsys, "--teacher_model_init_kwargs", '{"dtype": "bf16"}')
    assert (status, said.err) == (2, "taid: error: teacher_model_init_kwargs: dtype 'bf16' is none of torch's\n")
