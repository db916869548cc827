"""Engines on several processes, through the real command line: each gives what one process gives on the same rows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import BatchSampler
from transformers import GPT2Config, GPT2LMHeadModel

from taid.artifacts import run_folder
from taid.cli import launch
from taid.cli.main import main
from taid.data import tokenized
from taid.teachers import placement
from taid.teachers.cache import Cache
from taid.training import engines, resume

pytestmark = pytest.mark.cli

ROOT = Path(__file__).parents[1]
DEEPSPEED = ROOT / ".venv" / "deepspeed"  # by `make dev`, apart: it would speak in every other test
SENTENCE = "It was a bright cold day in April, and the clocks were striking thirteen. Who is there? Nobody at all. "
TIMING = ("tokens_per_second", "seconds", "epoch")
PROCESSES = int(os.environ.get("TAID_TEST_PROCESSES", "2"))  # 2 or 4
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
# What each case changes.
PLACES = ("model_name_or_path", "teacher_model_name_or_path", "teacher_cache", "dataset_name")
CASES = {
    "packed rows": {"packing": True, "max_length": 24},
    "LoRA, an optimizer with state": {
        "use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"],
        "optim": "adamw_torch", "learning_rate": 0.01,
    },
    "DoRA, activations computed again": {
        "use_peft": True, "use_dora": True, "lora_r": 4, "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "up_proj"], "activation_checkpointing": True,
    },
    "QLoRA": {
        "use_peft": True, "load_in_4bit": True, "lora_r": 4, "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"],
    },
    "a cache, and a last batch that is empty on a rank": {
        "teacher_cache": "cache", "dataset_name": "five.jsonl", "num_train_epochs": 2, "max_steps": -1,
    },
    "tied heads, a teacher in the memory of the CPU": {"model_name_or_path": "tied", "teacher_placement": "cpu"},
    "the best checkpoint, which is the last but one": {
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_kl", "greater_is_better": True,
    },
    "answers that the student samples, of which the likeliest are": {
        "sampling": "mixed", "sampling_share": 1.0, "sampling_temperature": 1e-6, "sampling_max_new_tokens": 8,
        "use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "up_proj"],
    },
    "a teacher whose products are computed together": {
        "teacher_model_name_or_path": "four_heads", "teacher_placement": "tensor_parallel",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, tokenizer, student_folder, teacher_folder):
    """Models, rows and a recipe."""
    root = tmp_path_factory.mktemp("engines")
    make_model(300, tied=False).save_pretrained(root / "student")
    tokenizer.save_pretrained(root / "student")
    make_model(310, hidden_size=48, seed=1, num_key_value_heads=4).save_pretrained(root / "four_heads")
    tokenizer.save_pretrained(root / "four_heads")
    (root / "tied").symlink_to(student_folder)
    all_rows = [{"prompt": SENTENCE[: 5 + 2 * i], "completion": SENTENCE[5 + 2 * i : 20 + 7 * i]} for i in range(8)]
    for name, some in {"train": all_rows, "five": all_rows[:5]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (root / "held_out.jsonl").write_text(
        "".join(json.dumps({"text": SENTENCE[3 * i : 40 + 5 * i]}) + "\n" for i in range(7))
    )
    recipe = {
        "model_name_or_path": str(root / "student"), "teacher_model_name_or_path": str(teacher_folder),
        "dataset_name": str(root / "train.jsonl"), "eval_dataset_name": str(root / "held_out.jsonl"), "max_steps": 4,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "learning_rate": 0.3, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.5, "bf16": False, "activation_checkpointing": False,
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "taid_alpha": 0.8, "taid_beta": 0.5,
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def environment():
    path = os.pathsep.join([str(DEEPSPEED), str(ROOT / "src")])
    programs = os.pathsep.join([str(DEEPSPEED / "bin"), os.environ["PATH"]])  # ninja, which builds a part of DeepSpeed
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PATH": programs, "DS_ACCELERATOR": "cpu"}


def arguments_of(root, case, output, *more):
    options = {name: str(root / value) if name in PLACES else value for name, value in CASES[case].items()}
    given = [f"--{name}={value}" for name, value in options.items() if not isinstance(value, list)]
    listed = [word for name, value in options.items() if isinstance(value, list) for word in (f"--{name}", *value)]
    return ["train", "--config", str(root / "recipe.yaml"), "--output_dir", str(output), *given, *more, *listed]


def require_deepspeed(engine):
    if engine.startswith("zero") and not DEEPSPEED.is_dir():
        pytest.skip("DeepSpeed is not there: `make dev` puts it into .venv/deepspeed")


def run(runs, root, engine=None, processes=2):
    """One run after another in the processes of one engine, or in one process."""
    path = root / f"{engine}-{processes}.json"
    path.write_text(json.dumps(runs))
    file = engine and f"{ROOT / 'src' / 'taid' / 'assets' / 'engines' / engine}.yaml"
    launcher = (
        ["accelerate.commands.launch", "--config_file", file, "--num_processes", str(processes)] if engine else []
    )
    command = [
        sys.executable,
        *(["-m", *launcher] if engine else []),
        str(ROOT / "tests" / "engine_runs.py"),
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment())
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def metrics(folder):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run_folder.read_metrics(folder)]


def weights(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def require_equal(one, other):
    """Loss, gradient norm, t and everything else that is logged, and the final weights: to 1e-5.

    An adapter on a quantized model, which TRL holds in bfloat16: to the rounding of that in each of four steps.
    """
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    is_half = {weight.dtype for weight in expected.values()} == {torch.bfloat16}
    relative = 4 * 2**-8 if is_half else 1e-5
    for name, weight in expected.items():
        assert (weight.float() - found[name].float()).norm() <= relative * weight.float().norm(), name
    pairs = list(zip(metrics(one), metrics(other), strict=True))
    assert {"loss", "grad_norm", "t", "kl", "eval_kl"} <= set().union(*(row for row, _ in pairs))
    for a, b in pairs:
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert abs(value - b[name]) <= relative * abs(value) + 1e-9, (name, a["step"], value, b[name])


@pytest.fixture(scope="module")
def alone(folder):
    """Return what one process gives in each case, and a cache of the teacher."""
    recipe = ["--config", str(folder / "recipe.yaml")]
    runs = [
        ["cache", *recipe, "--teacher_cache", str(folder / "cache"), "--output_dir", str(folder / "unused")],
        *(arguments_of(folder, case, folder / "one" / str(i)) for i, case in enumerate(CASES)),
    ]
    run(runs, folder)
    return folder / "one"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_processes_of_an_engine_give_what_one_process_gives(engine, folder, alone):
    require_deepspeed(engine)
    more = ["--per_device_train_batch_size=1", f"--gradient_accumulation_steps={4 // PROCESSES}"]
    runs = [arguments_of(folder, case, folder / engine / str(i), *more) for i, case in enumerate(CASES)]
    run(runs, folder, engine, PROCESSES)
    for i in range(len(CASES)):
        require_equal(alone / str(i), folder / engine / str(i))
    versions = json.loads((folder / engine / "0" / "versions.json").read_text())
    assert (versions["engine"], versions["processes"]) == (engine, PROCESSES)


@pytest.mark.slow
def test_a_student_whose_products_are_computed_together_gives_what_one_process_gives(folder, alone):
    together = '--model_init_kwargs={"distributed_config": {"tp_size": 2}}'
    cases = [
        "packed rows", "a cache, and a last batch that is empty on a rank",
        "tied heads, a teacher in the memory of the CPU", "a teacher whose products are computed together",
    ]  # fmt: skip
    run([arguments_of(folder, case, folder / "tp" / case, together) for case in cases], folder, "ddp")
    for case in cases:
        require_equal(alone / str(list(CASES).index(case)), folder / "tp" / case)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["sharded", "tensor_parallel"])
def test_processes_that_hold_one_teacher_capture_what_one_process_does(placement, folder, alone):
    options = [f"--teacher_placement={placement}", "--per_device_train_batch_size=1", "--per_device_eval_batch_size=1"]
    recipe = ["cache", "--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / "unused"), *options]
    five = [f"--dataset_name={folder / 'five.jsonl'}", "--teacher_cache", str(folder / placement)]
    # The second has three rows of eight to ask for: the processes come to them at different times.
    runs = [[*recipe, *five], [*recipe, "--teacher_cache", str(folder / placement)]]
    int8 = ["--teacher_cache_format=hidden_int8", "--teacher_cache", str(folder / f"{placement}_int8")]
    run([*runs, [*recipe, *int8]], folder, "ddp")
    one, together, rounded = (Cache(folder / name) for name in ("cache", placement, f"{placement}_int8"))
    assert set(one) == set(together) == set(rounded)
    for key in one:
        expected, found = one.read(key)["hidden"], together.read(key)["hidden"]
        assert (expected - found).norm() <= 1e-6 * expected.norm()


def command(root, output, *more, engine="fsdp2", processes=2):
    """The command line as a user gives it, in the background."""
    words = ["train", "--config", root / "recipe.yaml", "--output_dir", output, *more]
    words += ["--accelerate_config", engine, "--num_processes", processes] if engine else []
    return subprocess.Popen(
        [sys.executable, "-m", "taid", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), start_new_session=True,
    )  # fmt: skip


def ranks_of(process):
    """The processes that a launcher has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def wait_for(condition, process):
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.time() < deadline
        time.sleep(0.02)


def last_step(folder):
    path = run_folder.last_checkpoint(folder) if folder.exists() else None
    return int(path.name.split("-")[1]) if path else 0


LONG = ["--max_steps=40", "--save_strategy=steps", "--save_steps=4", "--eval_strategy=no", "--logging_steps=10",
        "--optim=adamw_torch", "--learning_rate=0.001"]  # fmt: skip
TWO_ROWS = ["--per_device_train_batch_size=2", *LONG]


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def long_alone(folder):
    finish(command(folder, folder / "long", "--per_device_train_batch_size=4", *LONG, engine=None))
    return folder / "long"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_sharded_runs_stop_on_sigterm_and_go_on_also_on_fewer_processes(engine, folder, long_alone):
    require_deepspeed(engine)
    stopped = folder / f"stopped-{engine}"
    process = command(folder, stopped, *TWO_ROWS, engine=engine)
    wait_for(lambda: last_step(stopped) >= 8, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    saved = last_step(stopped)
    assert f"saved checkpoint-{saved} in {stopped}: go on with --resume_from_checkpoint" in err
    assert not (stopped / "model.safetensors").exists()
    assert not (stopped / run_folder.UNFINISHED).exists()
    shards = {"fsdp2": "pytorch_model_fsdp_0/*.distcp", "zero3": "global_step*/*_optim_states.pt"}[engine]
    assert len(list((stopped / f"checkpoint-{saved}").glob(shards))) == 2

    more = ["--per_device_train_batch_size=4", *LONG, "--resume_from_checkpoint"]
    finish(command(folder, stopped, *more, engine=engine, processes=1))
    require_close(long_alone, stopped)


def require_close(one, other):
    for name, weight in weights(one).items():
        assert (weight - weights(other)[name]).norm() <= 1e-5 * weight.norm(), name
    states = [json.loads((f / "checkpoint-40" / "trainer_state.json").read_text()) for f in (one, other)]
    schedules = [state["stateful_callbacks"]["TAIDTrainer"]["schedule"] for state in states]
    assert schedules[0].keys() == schedules[1].keys()
    assert schedules[0]["t"] == pytest.approx(schedules[1]["t"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_loses_a_process_stops_everywhere_and_says_so(folder):
    lost = folder / "lost"
    process = command(folder, lost, *TWO_ROWS)
    wait_for(lambda: last_step(lost) >= 4, process)
    ranks = ranks_of(process)
    os.kill(ranks[-1], signal.SIGKILL)
    begun = time.time()
    _, err = process.communicate(timeout=90)
    assert time.time() - begun < 60
    assert process.returncode == 128 + signal.SIGKILL
    assert "was ended by SIGKILL, and the others with it: go on from the last checkpoint with" in err
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert run_folder.last_checkpoint(lost) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--accelerate_config", "zero9"],
            "--accelerate_config zero9: neither a file nor one of ddp, fsdp2, zero2, zero3",
        ),
        (["--accelerate_config"], "--accelerate_config needs a value"),
        (["--accelerate_config", "ddp"], "without a GPU say how many processes --accelerate_config starts"),
        (
            ["--num_processes", "2"],
            "'--num_processes': processes are started on the command line, by --accelerate_config",
        ),
        (["--accelerate_config=ddp", "--num_processes", "two"], "--num_processes must be a positive number, got 'two'"),
    ],
)
def test_a_start_that_cannot_be_made_is_named(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["foo: [", "[1, 2]", "", "distributed_type: NOPE\n"])
def test_a_file_that_is_none_of_accelerates_is_named(text, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert main(["train", f"--accelerate_config={path}", "--num_processes=2"]) == 2
    assert capsys.readouterr().err.startswith(f"taid: error: --accelerate_config {path}: ")


@pytest.mark.slow
def test_a_teacher_whose_products_cannot_be_cut_is_named(folder, tmp_path, make_model, tokenizer):
    heads, gpt2 = tmp_path / "heads", tmp_path / "gpt2"
    make_model(310, num_key_value_heads=1).save_pretrained(heads)
    GPT2LMHeadModel(GPT2Config(vocab_size=310, n_embd=32, n_head=2, n_layer=2)).save_pretrained(gpt2)
    for path, message in ((heads, "the teacher's num_key_value_heads are 1"), (gpt2, "no plan by which the matrices")):
        tokenizer.save_pretrained(path)
        more = [f"--teacher_model_name_or_path={path}", "--teacher_placement=tensor_parallel"]
        process = command(folder, tmp_path / "run", *more, engine="ddp")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert message in err
        assert "set teacher_placement: sharded" in err


def test_a_student_is_not_sharded_as_it_is_read(folder, capsys):
    more = '--model_init_kwargs={"distributed_config": {"fsdp_size": 2}}'
    assert main(["train", "--config", str(folder / "recipe.yaml"), "--output_dir", "unused", more]) == 2
    assert "may give tp_size and tp_plan, not fsdp_size: a student is sharded by" in capsys.readouterr().err


def test_a_student_by_tensor_parallelism_is_for_ddp():
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=None)
    parallelism = SimpleNamespace(cp_enabled=False, sp_enabled=False, tp_enabled=True)
    with pytest.raises(ValueError, match="needs --accelerate_config ddp, not fsdp2"):
        engines.check(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), parallelism_config=parallelism))


def test_zero_without_deepspeed_is_named(capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda _: None)
    assert main(["train", "--accelerate_config", "zero3", "--num_processes", "2"]) == 2
    assert capsys.readouterr().err == "taid: error: zero3 needs DeepSpeed: pip install 'taid[zero]'\n"


def test_a_recipe_does_not_start_processes(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("accelerate_config: fsdp2\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "unknown key 'accelerate_config': processes are started on the command line" in capsys.readouterr().err


@pytest.mark.parametrize(("files", "written"), [(["pytorch_model_fsdp_0/x"], "fsdp2"),
                                                (["pytorch_model_fsdp.bin"], "fsdp2"), (["latest"], "zero2 or zero3"),
                                                ([], "one process or ddp")])  # fmt: skip
@pytest.mark.parametrize("engine", ["none", "ddp", "fsdp2", "zero2", "zero3"])
def test_a_checkpoint_of_another_engine_is_named(files, written, engine, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    plugins = {"fsdp2": {"fsdp_plugin": SimpleNamespace(fsdp_version=2)}} | {
        f"zero{stage}": {"deepspeed_plugin": SimpleNamespace(zero_stage=stage)} for stage in (2, 3)
    }
    state = SimpleNamespace(**plugins.get(engine, {}))
    accelerator = SimpleNamespace(state=state, num_processes=1 if engine == "none" else 2)
    if engine.removesuffix("2").removesuffix("3") in written or (engine in ("none", "ddp") and not files):
        resume.check_checkpoint(tmp_path, accelerator)
        return
    with pytest.raises(ValueError, match=f"was written by {written}, and this run's engine is {engine}: resume it"):
        resume.check_checkpoint(tmp_path, accelerator)


def test_heads_that_cannot_be_dealt_out_are_named(make_model):
    model = make_model()
    model._tp_size = 3
    with pytest.raises(
        ValueError, match=r"a machine's 3 processes as many heads, but the teacher's num_attention_heads"
    ):
        placement._require_cut(model)


def test_a_process_that_was_started_starts_no_others(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "--accelerate_config", "ddp"]) == 2
    assert "--accelerate_config starts processes of `taid train` and" in capsys.readouterr().err


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize(("size", "processes"), [(1, 2), (2, 2), (3, 4)])
def test_full_batches_give_each_row_once_and_each_process_as_much(count, size, processes):
    batches = tokenized.FullBatches(BatchSampler(range(count), size, drop_last=False), processes, filler=count)
    given = list(batches)
    assert len(given) == len(batches)
    assert {len(batch) for batch in given} == {size}
    assert len(given) % processes == 0
    dealt = [i for batch in given for i in batch]
    assert dealt[:count] == list(range(count))
    assert set(dealt[count:]) <= {count}
    assert len(dealt) - count < size * processes


def test_a_checkpoint_has_its_name_when_it_is_whole_and_replaces_one_of_its_step(tmp_path):
    for content in ("first", "second"):
        with run_folder.unfinished(tmp_path, "checkpoint-4", is_writer=True, wait=lambda: None) as made:
            (made / "global_step4").mkdir(parents=True)
            (made / "global_step4" / "weights").write_text(content)
            (made / "trainer_state.json").write_text("{}")
            before = run_folder.last_checkpoint(tmp_path)
            assert before == (None if content == "first" else tmp_path / "checkpoint-4")
        assert run_folder.last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
        assert (tmp_path / "checkpoint-4" / "global_step4" / "weights").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_checkpoint_that_fails_leaves_the_one_before_and_is_cleared_away(tmp_path):
    def save(content, error=None):
        with run_folder.unfinished(tmp_path, "checkpoint-4", is_writer=True, wait=lambda: None) as made:
            made.mkdir(parents=True)
            (made / "trainer_state.json").write_text(content)
            if error:
                raise error

    save("{}")
    with pytest.raises(OSError, match="no room"):
        save('{"half": 1}', OSError("no room"))
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").read_text() == "{}"
    save('{"whole": 1}')
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").read_text() == '{"whole": 1}'


def test_one_of_several_processes_ends_with_its_status_and_is_not_taken_apart():
    program = (
        "import atexit, sys; from taid import __main__; from taid.cli import main as cli\n"
        "class Held:\n    def __del__(self): print('taken apart')\n"
        "held = Held(); atexit.register(print, 'at exit'); cli.main = lambda _: 3; print('done')\n"
        "sys.exit(__main__.run([]))"
    )
    for more, after in (({"LOCAL_RANK": "0"}, ""), ({}, "taken apart\n")):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment() | more)
        assert (done.returncode, done.stdout) == (3, "done\nat exit\n" + after), done.stderr


def test_fsdp_rounds_neither_the_loss_nor_what_gradients_are_summed_in():
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)  # as accelerate sets it
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=policy)
    state = SimpleNamespace(fsdp_plugin=plugin)
    engines.check(SimpleNamespace(state=state, parallelism_config=None, ddp_handler=None))
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    assert plugin.mixed_precision_policy.output_dtype is None


def test_the_first_fsdp_is_refused():
    plugin = SimpleNamespace(fsdp_version=1, mixed_precision_policy=None)
    with pytest.raises(ValueError, match="set fsdp_version: 2"):
        engines.check(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), parallelism_config=None))
