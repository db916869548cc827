"""The first check of a command line: TRL's options read from its source, and the same answers without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, get_args, get_type_hints

import pytest
from trl import ModelConfig, SFTConfig

from taid.config import installed
from taid.config.installed import read_installed
from taid.config.parsing import parse
from taid.config.screen import screen

RIGHT = "model_name_or_path: s\nteacher_model_name_or_path: t\ndataset_name: d.jsonl\noutput_dir: out\nuse_cpu: true\n"


@pytest.fixture
def recipe(tmp_path):
    """recipe(text): the arguments that read a recipe with these lines."""

    def write(text: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(RIGHT + text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def plain(kind: Any) -> Any:
    """Return a type with the names of its enumerations and their values in place of the classes."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind.__name__, [member.value for member in kind]
    if get_args(kind):
        return str(getattr(kind, "__origin__", "|")), tuple(map(plain, get_args(kind)))
    return getattr(kind, "__name__", kind)


@pytest.mark.parametrize(("name", "real"), [("sft", SFTConfig), ("model", ModelConfig)])
def test_the_options_that_are_read_from_source_are_those_of_the_installed_classes(name, real):
    read = read_installed()
    assert read is not None
    read_fields, read_types, types = (
        fields(getattr(read, name)),
        get_type_hints(getattr(read, name)),
        get_type_hints(real),
    )
    assert [f.name for f in read_fields] == [f.name for f in fields(real) if f.init]
    by_name = {f.name: f for f in fields(real)}
    for field in read_fields:
        expected = by_name[field.name]
        assert field.default == expected.default, field.name
        assert field.default_factory == expected.default_factory, field.name
        assert plain(read_types[field.name]) == plain(types[field.name]), field.name
        metadata = dict(expected.metadata)
        if field.name in ("log_level", "log_level_replica"):  # computed from the logger's levels
            metadata.pop("choices")
        assert dict(field.metadata) == metadata, field.name
        assert MISSING not in (field.default, expected.default) or field.default_factory is not MISSING


@pytest.mark.parametrize("command", ["train", "cache", "plan", "compare"])
def test_help_is_the_same_without_torch(command, capsys):
    pages = []
    for answer in (screen, parse):
        with pytest.raises(SystemExit) as exit_info:
            answer(["--help"], command)
        assert exit_info.value.code == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]
    assert "--learning_rate" in pages[0]


@pytest.mark.parametrize(
    "text",
    [
        "taid_betta: 1",
        "learning_rte: 1",
        "lora_rr: 1",
        "dataset_nam: d",
        "num_processes: 2",
        "objective: tadi",
        "optim: adamm",
        "eval_strategy: sometimes",
        "kd_ratio: 2",
        "kd_ratio: many",
        "seed: 1.5",
        "fused: maybe",
        "taid_alpha: fast",
        "taid_t_start: 2",
        "learning_rate: [1, 2]",
        "max_length: 0",
        "loss_type: dft",
        "teacher_server_url: localhost",
        "dataset_weights: [1]",
        "chat_template_path: ./absent.jinja",
        "sampling: mixed\npacking: true",
        "train_tokens: 1000",
        "teacher_quantization: fp8\nteacher_placement: cpu",
        "model_init_kwargs: bfloat16",
        "a: [",
        "seed: 1\nseed: 2",
    ],
)
def test_a_mistake_has_the_same_answer_without_torch(recipe, text):
    answers = []
    for answer in (screen, parse):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            answer(recipe(text + "\n"), "train")
        answers.append((error.type, str(error.value)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("argv", [["--taid_betta", "1"], ["--kd_ratio=2"], ["--seed"], ["--config"], ["stray"]])
def test_a_mistake_on_the_command_line_has_the_same_answer_without_torch(recipe, argv):
    answers = []
    for answer in (screen, parse):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            answer([*recipe(""), *argv], "train")
        answers.append((error.type, str(error.value)))
    assert answers[0] == answers[1]


def test_what_is_right_comes_back_as_it_was_given(recipe):
    screened = screen([*recipe("learning_rate: 1e-4\ntaid_alpha: 2e-3\nbf16: true\n"), "--kd_ratio", "0.5"], "train")
    assert screened is not None
    model, data, args = screened
    assert (model.model_name_or_path, data.names, args.kd_ratio) == ("s", ["d.jsonl"], 0.5)
    assert (args.learning_rate, args.taid_alpha, args.bf16) == (1e-4, 2e-3, True)


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("train", "model_name_or_path"),
        ("train", "dataset_name"),
        ("plan", "teacher_model_name_or_path"),
        ("cache", "teacher_cache"),
    ],
)
def test_what_a_command_cannot_do_without_is_asked_for(tmp_path, command, missing):
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{line}\n" for line in RIGHT.splitlines() if not line.startswith(missing)))
    with pytest.raises(ValueError, match=f"{missing} is not set: give it in the configuration or as --{missing}"):
        screen(["--config", str(path)], command)


def test_a_configuration_from_a_pipe_is_left_for_the_only_reading():
    reading, writing = os.pipe()
    os.write(writing, b"taid_betta: 1\n")
    os.close(writing)
    assert screen(["--config", f"/dev/fd/{reading}"], "train") is None
    assert os.read(reading, 100) == b"taid_betta: 1\n"
    os.close(reading)


def test_a_version_whose_source_is_not_as_expected_is_left_to_its_classes(monkeypatch, recipe):
    changed = (*installed._TRAINING[:2], ("trl", "trainer/dpo_config.py", "SFTConfig"))
    monkeypatch.setattr(installed, "_TRAINING", changed)
    assert read_installed() is None
    assert screen(recipe("taid_betta: 1\n"), "train") is None
    monkeypatch.setattr(installed, "_TRAINING", (("no_such_package", "a.py", "TrainingArguments"),))
    assert read_installed() is None


@pytest.mark.cli
def test_the_first_check_imports_nothing_heavy(recipe):
    program = (
        "import sys\nfrom taid.config.screen import screen\n"
        f"assert screen({recipe('')!r}, 'train')\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
