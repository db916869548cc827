"""`taid demo`: its rows, its pair, what it refuses, and a whole one of a step."""

import json
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from command_line import Command
from taid import demo
from taid.cli.main import main

SMALL = """
import sys
from taid import demo
from taid.cli.main import main
demo.HELD_OUT_ROWS, demo.APART, demo.METHODS = 4, 10**9, {"fine_tuning": "fine-tuning", "taid": "TAID"}
for _ in range(2):
    assert main(["demo", "--steps", "1", "--seeds", "2", "--output_dir", sys.argv[1]]) == 0
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A demo of one step on a row a module, twice in one folder: the folder, and what it printed each time."""
    folder = tmp_path_factory.mktemp("demo") / "taid-demo"
    finished = Command([folder], code=SMALL)
    printed, said = finished.communicate(600)
    assert finished.returncode == 0, said
    _, first, second = printed.split("taid compare ")
    return folder, first, second


def test_the_demo_is_a_comparison_of_the_real_command(done):
    folder, printed, again = done
    found = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert {path.name for path in (folder / "comparison" / "runs").iterdir()} == {
        "fine_tuning-seed0", "fine_tuning-seed1", "taid-seed0", "taid-seed1",
    }  # fmt: skip
    for method in found["methods"].values():
        interval = method["measures"]["cross_entropy"]
        assert f"{interval['mean']:.4f} ± {interval['half_width_95']:.4f}" in printed
    before, teacher = (found["beside"][name]["held_out"]["cross_entropy"] for name in ("student before", "teacher"))
    assert (before, teacher) == pytest.approx((5.0, 2.6), abs=0.7)
    assert f"--config {folder}/recipe.yaml --variants {folder}/variants.yaml " in printed
    assert "[4/4] " in printed
    assert "[1/" not in again  # nothing is trained twice
    after_runs = printed[printed.index("┏") :].rsplit("\n", 2)[0]
    assert after_runs == again[again.index("┏") :].rsplit("\n", 2)[0]


def test_the_demo_shows_what_each_model_writes(done):
    _, printed, _ = done
    for prompt in demo.prompts(demo.read("test")):
        assert prompt in re.sub(r" +$", "", printed, flags=re.MULTILINE)
    assert re.findall(r"^│ ([a-zA-Z][a-zA-Z -]*?) +│ ", printed[printed.index("Go on") :], re.MULTILINE) == [
        "student before", "fine-tuning", "TAID", "teacher",
    ] * demo.PROMPTS  # fmt: skip


def test_the_teacher_writes_python_and_the_student_does_not_yet():
    models = {name: demo.ASSETS / name for name in ("student", "teacher")}
    ((_, answers),) = demo.continuations(models, ['def read(self, size=-1):\n    """'])
    assert answers["teacher"].startswith("Read and return a bytes object.\n\n    The argument is")
    assert "Return" not in answers["student"]


def test_the_student_is_two_layers_of_the_teacher():
    student, teacher = (AutoModelForCausalLM.from_pretrained(demo.ASSETS / name) for name in ("student", "teacher"))
    assert (student.num_parameters(), teacher.num_parameters()) == (1_278_912, 2_607_168)
    theirs = teacher.state_dict()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, theirs[name.replace("layers.1.", "layers.2.")])


@pytest.mark.parametrize(
    ("module", "split"), [("json", "models"), ("heapq", "train"), ("pickle", "validation"), ("ast", "test")]
)
def test_a_module_is_of_one_split_under_every_python(module, split):
    assert demo.split_of(module) == split


def test_rows_begin_lines_of_their_own_split_and_fill_the_longest_row():
    for split in ("train", "validation", "test"):
        texts = demo.read(split)
        rows = [row["text"] for row in demo.rows(split)]
        assert split == "train" or len(rows) == demo.HELD_OUT_ROWS
        for row in rows:
            assert len(row) == demo.CHARACTERS
            assert any(text.startswith(row) or f"\n{row}" in text for text in texts)
    assert not set(demo.read("models", "train")) & set(demo.read("validation", "test"))


def test_the_recipe_says_how_many_steps(tmp_path):
    demo.write_files(tmp_path / "a b", 7)
    recipe = yaml.safe_load((tmp_path / "a b" / "recipe.yaml").read_text())
    assert (recipe["max_steps"], recipe["warmup_steps"], recipe["eval_steps"]) == (7, 0, 1)
    assert recipe["dataset_name"] == str(tmp_path / "a b" / "train.jsonl")


@pytest.mark.parametrize(("name", "number"), [("steps", 0), ("seeds", -1)])
def test_a_demo_of_nothing_is_refused(tmp_path, capsys, name, number):
    assert main(["demo", f"--{name}", str(number), "--output_dir", str(tmp_path)]) == 2
    assert f"--{name} must be at least 1, got {number}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is not of the demo: choose another folder"):
        demo.write_files(tmp_path, 1)
    with pytest.raises(ValueError, match=r"thesis\.txt is a file: choose another folder"):
        demo.write_files(tmp_path / "thesis.txt", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_recipe_in_the_folder_is_not_overwritten(tmp_path):
    demo.write_files(tmp_path, 1)
    with pytest.raises(ValueError, match=r"recipe\.yaml is of another demo .* delete the folder"):
        demo.write_files(tmp_path, 2)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["max_steps"] == 1


def test_a_python_without_source_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=f"no standard library source under {tmp_path}"):
        demo.read("test")
