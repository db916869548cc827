"""The golden net: runs through the real command line give what they gave, to the last bit on the machine that it was
recorded on. tests/golden/runs.py says which runs, tests/golden/record.py how to record them anew.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from golden import commands, outcome
from golden.runs import COMPARED, COMPARISON, KILLED, PLANS, PROCESSES, RECIPE, RUNS
from prompt_server import PromptServer
from vision_models import make_processor, make_vision_model

pytestmark = [
    pytest.mark.cli,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="its command lines run in forked processes"),
]

RECIPES = Path(__file__).parents[1] / "recipes"
GOLDEN = Path(__file__).parent / "golden" / "golden.json"
IS_RECORDING = os.environ.get("TAID_GOLDEN") == "record"
SENTENCE = "It was a bright cold day in April, and the clocks were striking thirteen. Who is there? Nobody at all. "
WORDS = "the cat sat on a mat and saw the dog that ran to the sea".split()
LETTERS = "alpha beta gamma delta epsilon zeta eta theta".split()


@pytest.fixture(scope="session")
def shared(tmp_path_factory, student_folder, teacher_folder):
    """Models and rows, which each run finds in its folder."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "student").symlink_to(student_folder)
    (folder / "teacher").symlink_to(teacher_folder)
    processor = make_processor("idefics3")
    for name, options in {"eyes_student": {}, "eyes_teacher": {"hidden_size": 64, "seed": 1}}.items():
        make_vision_model("idefics3", processor, **options).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)

    def write(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def words(i):
        return " ".join(WORDS[(i + j * i) % len(WORDS)] for j in range(9))

    write("train", [{"prompt": SENTENCE[: 5 + 2 * i], "completion": SENTENCE[5 + 2 * i : 20 + 7 * i]} for i in range(8)])
    write("held_out", [{"text": SENTENCE[3 * i : 40 + 5 * i]} for i in range(7)])
    for name, first in (("compared", 0), ("validation", 40), ("test", 60)):
        write(name, [{"text": words(i)} for i in range(first, first + 16)])
    (folder / "images").mkdir()
    for number in range(len(LETTERS)):
        noise = random.Random(number)
        pixels = bytes(noise.randrange(256) for _ in range(3 * 16 * 16))
        Image.frombytes("RGB", (16, 16), pixels).save(folder / "images" / f"{number}.png")
    questions = [{"role": "user", "content": "Which?"}]
    write("images", [
        {"images": [f"images/{number}.png"], "messages": [*questions, {"role": "assistant", "content": word}]}
        for number, word in enumerate(LETTERS)
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def server(teacher_folder):
    model, tokenizer = (kind.from_pretrained(teacher_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    with PromptServer(model, tokenizer, max_logprobs=-1) as server:
        yield server


def command_lines(name):
    """Those of one run, each with the checkpoint at which it kills itself."""
    if name in PLANS:
        return [(["plan", "--config", str(RECIPES / f"{name}.yaml"), "--gpus", str(PLANS[name])], None)]
    if name == "taid compare":
        return [(["compare", "--config", "recipe.yaml", *COMPARED], None)]
    train, killed_at = ["train", "--config", "recipe.yaml", *PROCESSES.get(name, [])], KILLED.get(name)
    lines = [(["cache", "--config", "recipe.yaml"], None)] if "teacher_cache" in RUNS[name] else []
    if killed_at:
        return [*lines, (train, killed_at), ([*train, "--resume_from_checkpoint"], None)]
    return [*lines, (train, None)]


def result(name, folder):
    """What has come of a run, or why nothing has."""
    if why := commands.failure(folder):
        return why
    if name in PLANS:
        return (folder / "out0").read_text().splitlines()
    return outcome.of_comparison(folder / "run") if name == "taid compare" else outcome.of_run(folder / "run")


@pytest.fixture(scope="session")
def found(request, shared, server, tmp_path_factory):
    """What has come of those runs that the tests at hand ask for."""
    asked = {item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)}
    folders, jobs = {}, []
    for name in [name for name in NAMES if name in asked]:
        folders[name] = tmp_path_factory.mktemp("run")
        for path in shared.iterdir():
            (folders[name] / path.name).symlink_to(path)
        recipe = RECIPE | (COMPARISON if name == "taid compare" else RUNS.get(name, {}))
        recipe |= {"teacher_server_url": server.url} if "teacher_server_url" in recipe else {}
        (folders[name] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        jobs.append((str(folders[name]), command_lines(name)))
    (shared / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "golden" / "commands.py"
    done = subprocess.run([sys.executable, str(script), str(shared / "jobs.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: result(name, folder) for name, folder in folders.items()}
    if IS_RECORDING:
        whole = {"machine": outcome.machine(), "runs": found}
        GOLDEN.write_text(json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


NAMES = ["taid compare", *RUNS, *PLANS]  # the longest first


@pytest.mark.parametrize("name", NAMES)
def test_a_run_gives_what_it_gave(name, found):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    is_same_machine = golden["machine"] == outcome.machine()
    assert not isinstance(found[name], str), f"{name}: {found[name]}"
    lines = outcome.differences(golden["runs"][name], found[name], exact=is_same_machine, where=f"{name}, ")
    assert not lines, "\n".join([f"{len(lines)} values differ:", *lines[:20]])
