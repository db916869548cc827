"""The golden net: runs through the real command line give what they gave, to the last bit on the machine that recorded
them. tests/golden/runs.py says which runs, tests/golden/record.py how they are recorded anew.
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
    pytest.mark.slow,  # runs that are killed, and runs of several processes
    pytest.mark.skipif(not hasattr(os, "fork"), reason="its command lines run in forked processes"),
]

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "golden.json"
COMPARE = "taid compare"
NAMES = [COMPARE, *PROCESSES, *(name for name in RUNS if name not in PROCESSES), *PLANS]  # the longest first

SENTENCE = "It was a bright cold day in April, and the clocks were striking thirteen. Who is there? Nobody at all. "
WORDS = "the cat sat on a mat and saw the dog that ran to the sea".split()
LETTERS = "alpha beta gamma delta epsilon zeta eta theta".split()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_gives_what_it_gave(name, found):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    is_exact = golden["machine"] == outcome.machine()
    assert not isinstance(found[name], str), f"{name}: {found[name]}"
    lines = outcome.differences(golden["runs"][name], found[name], exact=is_exact, where=f"{name}, ")
    assert not lines, "\n".join([f"{len(lines)} differences:", *lines[:20], *["..."][: len(lines) - 20]])


def test_golden_json_holds_these_runs_and_comes_from_this_machine():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["runs"].keys() == set(NAMES)
    lines = outcome.differences(golden["machine"], outcome.machine(), exact=True)
    if lines:
        pytest.skip(f"recorded elsewhere, so numbers are compared to {outcome.TOLERANCE}, and no weights: {lines}")


@pytest.fixture(scope="module")
def found(request, shared, server, tmp_path_factory):
    """Return the outcome of each run that the tests at hand ask for."""
    asked = {item.callspec.params["name"] for item in request.session.items
             if item.path == Path(__file__) and hasattr(item, "callspec")}  # fmt: skip
    folders = {name: tmp_path_factory.mktemp("run") for name in NAMES if name in asked}
    for name, folder in folders.items():
        for path in shared.iterdir():
            (folder / path.name).symlink_to(path)
        recipe = RECIPE | (COMPARISON if name == COMPARE else RUNS.get(name, {}))
        recipe |= {"teacher_server_url": server.url} if "teacher_server_url" in recipe else {}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    jobs = tmp_path_factory.mktemp("jobs") / "jobs.json"
    jobs.write_text(json.dumps([(str(folder), command_lines(name)) for name, folder in folders.items()]))
    script = [sys.executable, str(HERE / "golden" / "commands.py"), str(jobs)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: result(name, folder) for name, folder in folders.items()}
    if os.environ.get("TAID_GOLDEN") == "record":
        golden = {"machine": outcome.machine(), "runs": found}
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def command_lines(name):
    """Those of one run, each with the checkpoint at which it is to kill itself, or None."""
    recipe = ["--config", "recipe.yaml"]
    if name == COMPARE:
        return [(["compare", *recipe, *COMPARED], None)]
    if name in PLANS:
        return [(["plan", "--config", str(HERE.parent / "recipes" / f"{name}.yaml"), "--gpus", str(PLANS[name])], None)]
    train = ["train", *recipe, *PROCESSES.get(name, [])]
    if name in KILLED:
        return [(train, KILLED[name]), ([*train, "--resume_from_checkpoint"], None)]
    return [*([(["cache", *recipe], None)] if "teacher_cache" in RUNS[name] else []), (train, None)]


def result(name, folder):
    """Return the outcome of a run, or in one text why there is none."""
    if why := commands.failure(folder):
        return why
    if name in PLANS:
        return (folder / "out0").read_text(encoding="utf-8").splitlines()
    return outcome.of_comparison(folder / "run") if name == COMPARE else outcome.of_run(folder / "run")


@pytest.fixture(scope="module")
def server(teacher_folder):
    model, tokenizer = (kind.from_pretrained(teacher_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    with PromptServer(model, tokenizer, max_logprobs=-1) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory, student_folder, teacher_folder):
    """Models and rows, which each run finds in its folder."""
    folder = tmp_path_factory.mktemp("golden")

    def write(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    (folder / "student").symlink_to(student_folder)
    (folder / "teacher").symlink_to(teacher_folder)
    cuts = [(5 + 2 * i, 20 + 7 * i) for i in range(8)]
    write("train", [{"prompt": SENTENCE[:cut], "completion": SENTENCE[cut:end]} for cut, end in cuts])
    write("held_out", [{"text": SENTENCE[3 * i : 40 + 5 * i]} for i in range(7)])
    for name, first in (("compared", 0), ("validation", 40), ("test", 60)):
        numbers = range(first, first + 16)
        write(name, [{"text": " ".join(WORDS[(i + j * i) % len(WORDS)] for j in range(9))} for i in numbers])

    processor = make_processor("idefics3")
    for name, options in {"eyes_student": {}, "eyes_teacher": {"hidden_size": 64, "seed": 1}}.items():
        make_vision_model("idefics3", processor, **options).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    (folder / "images").mkdir()
    for number in range(len(LETTERS)):
        noise = random.Random(number)
        pixels = bytes(noise.randrange(256) for _ in range(3 * 16 * 16))
        Image.frombytes("RGB", (16, 16), pixels).save(folder / "images" / f"{number}.png")
    chats = [[{"role": "user", "content": "Which?"}, {"role": "assistant", "content": word}] for word in LETTERS]
    write("images", [{"images": [f"images/{i}.png"], "messages": chat} for i, chat in enumerate(chats)])
    return folder
