"""taid plan says what a run takes and what taid cache will write, without a weight."""

import json
import re
import shutil

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3MoeConfig,
)  # fmt: skip

from taid.cli.main import main
from taid.planning.footprint import size


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
    caches = said.out.partition("a cache of")[2].splitlines()
    sizes = dict(line.rsplit(maxsplit=3)[:2] for line in caches if line.endswith(" MB"))
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


# --- a run ------------------------------------------------------------------------------------------------------------


def lines_of(said):
    """The lines of a plan by what stands before their first colon."""
    return dict(line.split(": ", 1) for line in said.out.splitlines() if ": " in line)


def memory_of(said):
    """The table of what a process holds: of each engine and place of the teacher, MB by what they are for."""
    names = re.search(r"^  engine +teacher +(.*)$", said.out, re.MULTILINE)[1]
    found = {}
    for engine, place, cells in re.findall(r"^  (none|ddp|zero2|zero3|fsdp2) +(\w+) +(.*)$", said.out, re.MULTILINE):
        numbers = re.findall(r"([\d.,]+) [GM]B|(-|\?)", cells)
        found[engine, place] = dict(
            zip(
                names.replace("in all", "all").split(), [n.replace(",", "") or word for n, word in numbers], strict=True
            )
        )
    return found


def test_rows_that_are_here_are_counted(options, tmp_path, capsys, student_folder):
    run_of = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    status, said = run("plan", options | run_of, tmp_path, capsys)
    assert status == 0, said.err
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    # TRL ends a completion with the end of the text
    tokens = sum(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows)
    lines = lines_of(said)
    assert lines["run"] == f"6 steps, {3 * tokens:,} tokens"  # 6 rows are 3 batches, of which the last step has one
    assert lines["a step"] == "4 rows (2 a device x 2 micro-batches x 1 device)"

    # FLOPs by hand: a Llama of two layers, width 32, two heads of four for keys, feed-forward 64
    def multiplied(width, rows):
        return (
            2 * (2 * width * width + 2 * width * width // 2 + 3 * width * 2 * width + 2 * width) + width + rows * width
        )

    attention = 2 * 2 * (tokens / 6) * (3 * 32 + 48)
    flops = 6 * multiplied(32, 300) + 2 * multiplied(48, 308) + attention
    assert lines["compute"].endswith(f"= {flops / 1e9:.3g} GFLOP a token, {flops * 3 * tokens:.3g} in all")
    hours = flops * 3 * tokens / (0.4 * 0.77e12) / 3600
    assert lines["time of taid train"].startswith(f"{hours:.2g} hours on 1 CPU at 40% of 0.77 TFLOP/s")
    status, said = run("plan", options | run_of, tmp_path, capsys, "--gpus", "2")
    assert lines_of(said)["a step"] == "8 rows (2 a device x 2 micro-batches x 2 devices)"
    assert lines_of(said)["run"] == f"3 steps, {3 * tokens:,} tokens"
    assert "hours on 2 H100 at 40% of 989 TFLOP/s (bf16 dense)" in said.out


def test_steps_that_are_given_take_as_many_rows_as_they_have(options, tmp_path, capsys):
    given = {"max_steps": 10, "per_device_train_batch_size": 3, "packing": True, "max_length": 128}
    status, said = run("plan", options | given, tmp_path, capsys)
    assert status == 0, said.err
    assert re.fullmatch(r"10 steps, about [\d,]+ tokens", lines_of(said)["run"])
    given |= {"max_steps": -1, "train_tokens": 4000, "streaming": True}
    status, said = run("plan", options | given, tmp_path, capsys)
    assert status == 0, said.err
    assert lines_of(said)["run"] == "11 steps, at most 4,224 tokens"
    assert "a cache of" not in said.out, "a stream is not cached"


def test_memory_is_that_of_the_weights_and_what_is_trained_of_them(options, tmp_path, capsys, make_model):
    weights = {
        "student": sum(p.numel() for p in make_model(300).parameters()),
        "teacher": sum(p.numel() for p in make_model(308, hidden_size=48, tied=False).parameters()),
    }

    def mb(number):
        return f"{number / 1e6:,.1f}"

    def held(**changes):
        status, said = run("plan", options | changes, tmp_path, capsys)
        assert status == 0, said.err
        ((_, parts),) = memory_of(said).items()
        return parts, said

    parts, said = held(optim="adamw_torch")
    assert lines_of(said)["student"].endswith(f", {weights['student']:,} weights")
    assert (parts["weights"], parts["gradients"]) == (mb(4 * weights["student"]),) * 2
    assert (parts["optimizer"], parts["teacher"]) == (mb(8 * weights["student"]), mb(4 * weights["teacher"]))
    assert sum(float(n) for name, n in parts.items() if name not in ("all", "buffers")) == pytest.approx(
        float(parts["all"]), abs=0.3
    )
    for optimizer, each in (("sgd", 0), ("lion_8bit", 1), ("adamw_bnb_8bit", 2)):
        parts, _ = held(optim=optimizer, dtype="bfloat16")
        assert parts["weights"] == mb(2 * weights["student"])
        assert parts["optimizer"] == (mb(each * weights["student"]) if each else "-")
    parts, said = held(optim="adafactor")
    assert (parts["optimizer"], parts["all"]) == ("?", "?")
    assert "the state of adafactor is not known here" in said.out


def test_an_adapter_is_all_that_is_trained(options, tmp_path, capsys):
    adapter = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "o_proj"], "optim": "adamw_torch"}
    status, said = run("plan", options | adapter, tmp_path, capsys)
    assert status == 0, said.err
    trained = 2 * 2 * 4 * (32 + 32)
    assert lines_of(said)["student"].endswith(f"weights, {trained:,} of an adapter are trained")
    assert memory_of(said)["none", "replicated"]["gradients"] == f"{4 * trained / 1e6:,.1f}"
    assert lines_of(said)["compute"].startswith("4 N_student (")


def test_what_the_teacher_costs_depends_on_where_it_is(options, tmp_path, capsys):
    def terms(**changes):
        status, said = run("plan", options | changes, tmp_path, capsys)
        assert status == 0, said.err
        formula = lines_of(said)["compute"].partition(" = ")[0]
        return re.sub(r" \([^)]*\)", "", formula), [line for line in lines_of(said) if line.startswith("time of")]

    train = "time of taid train"
    assert terms() == ("6 N_student + 2 N_teacher + attention", [train])
    assert terms(objective="sft") == ("6 N_student + attention", [train])
    cached = {"teacher_cache": str(tmp_path / "cache")}
    assert terms(**cached) == ("6 N_student + 2 teacher's head + attention", ["time of taid cache", train])
    assert terms(**cached, teacher_cache_format="top_k") == ("6 N_student + attention", ["time of taid cache", train])
    served = ["time of the teacher's server, if it has as many", train]
    assert terms(teacher_server_url="http://localhost:1") == ("6 N_student + attention", served)


def test_a_student_that_is_an_adapter_is_planned_trained_and_named(options, tmp_path, capsys):
    adapter = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "o_proj"], "max_steps": 2}
    first = options | adapter | {"output_dir": str(tmp_path / "first")}
    status, said = run("plan", first, tmp_path, capsys)
    expected = [line for line in said.out.splitlines() if "of an adapter are trained" in line or "time of" in line]
    assert run("train", first, tmp_path, capsys)[0] == 0
    second = options | {"model_name_or_path": str(tmp_path / "first"), "max_steps": 2}
    status, said = run("plan", second, tmp_path, capsys)
    assert status == 0, said.err
    found = [line for line in said.out.splitlines() if "of an adapter are trained" in line or "time of" in line]
    assert [line.partition(",")[2] for line in found] == [line.partition(",")[2] for line in expected]
    assert run("train", second, tmp_path, capsys)[0] == 0
    folder = tmp_path / "run"
    assert yaml.safe_load((folder / "config.yaml").read_text())["model_name_or_path"] == str(tmp_path / "first")
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in (folder, tmp_path / "first")]
    assert weights[0] != weights[1]
    status, said = run("train", second | adapter, tmp_path, capsys, "--overwrite_output_dir")
    assert (status, said.err.count("\n")) == (2, 1)
    assert "is an adapter, and is trained on as it is: leave use_peft away" in said.err
    assert (folder / "adapter_model.safetensors").read_bytes() == weights[0]


def test_windows_and_experts_cost_what_a_token_sees_of_them():
    shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    windows = size(Gemma2Config(**shape, num_hidden_layers=4, sliding_window=16))
    for length in (8, 16, 100):
        # a token at position p sees the min(p, window) before it: the mean over a long row, in a continuum
        seen = sum(min(p / 1000 * length, 16) for p in range(1000)) / 1000
        assert windows.attention(length) == pytest.approx(4 * 32 * (2 * length / 2 + 2 * seen), rel=2e-3)
        each = size(MistralConfig(**shape, num_hidden_layers=4, sliding_window=16))
        assert each.attention(length) == pytest.approx(4 * 32 * 4 * seen, rel=2e-3)
    assert size(MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1)).attention(100) == 0
    experts = size(Qwen3MoeConfig(**shape, num_hidden_layers=1, num_experts=8, num_experts_per_tok=2,
                                  moe_intermediate_size=16))  # fmt: skip
    assert experts.weights - experts.used == 100 * 32 + 6 * 3 * 32 * 16
    tied = size(LlamaConfig(**shape, num_hidden_layers=1, tie_word_embeddings=True))
    assert tied.used == tied.weights


def test_a_configuration_may_lie_beside_the_recipe(options, tmp_path, capsys, teacher_folder):
    here = tmp_path / "configs" / "someone--teacher"
    here.mkdir(parents=True)
    shutil.copy(teacher_folder / "config.json", here)
    named = options | {"teacher_model_name_or_path": "someone/teacher"}
    status, said = run("plan", named, tmp_path, capsys)
    assert status == 0, said.err
    assert "hidden states of 48 numbers" in said.out
    (tmp_path / "configs" / "someone--rows").mkdir()
    info = tmp_path / "configs" / "someone--rows" / "dataset_info.json"
    info.write_text('{"splits": {"train": {"num_examples": 100}}}')
    status, said = run("plan", named | {"dataset_name": "someone/rows", "eval_dataset_name": None}, tmp_path, capsys)
    assert status == 0, said.err
    assert lines_of(said)["run"] == "39 steps, at most 307,200 tokens"  # 3 epochs of 13 batches, 1,024 tokens a row
    assert lines_of(said)["train"] == "100 different rows, at most 102,400 trained tokens"
    status, said = run("plan", named | {"dataset_name": "someone/rows", "dataset_train_split": "no"}, tmp_path, capsys)
    assert (status, said.err) == (
        2, f"taid: error: {info}: data set someone/rows has no split 'no', but train\n"
    )  # fmt: skip


def test_rows_of_unknown_number_and_a_wrong_number_of_gpus_are_said(options, tmp_path, capsys):
    unknown = options | {"dataset_name": "nobody/nothing", "eval_dataset_name": None}
    status, said = run("plan", unknown, tmp_path, capsys)
    assert status == 0, said.err
    assert lines_of(said)["run"] == "how many rows nobody/nothing has is not known here: set max_steps to plan it"
    status, said = run("plan", unknown | {"max_steps": 5}, tmp_path, capsys)
    assert lines_of(said)["run"] == "5 steps, at most 40,960 tokens"
    status, said = run("plan", options, tmp_path, capsys, "--gpus", "many")
    assert (status, said.err) == (2, "taid: error: --gpus must be a number, 0 for a CPU, got 'many'\n")
    assert not (tmp_path / "run").exists()


# --- engines ----------------------------------------------------------------------------------------------------------


def test_each_engine_is_planned_and_the_first_that_fits_is_named(options, tmp_path, capsys):
    status, said = run("plan", options, tmp_path, capsys, "--gpus", "8")
    assert status == 0, said.err
    found = memory_of(said)
    assert list(found) == [
        (engine, place) for engine in ("ddp", "zero2", "fsdp2", "zero3") for place in ("replicated", "sharded", "cpu")
    ]
    assert said.out.count("  fits\n") == 12
    assert (
        "fits into 80 GB, of which 92% can be used: --accelerate_config ddp --teacher_placement replicated" in said.out
    )
    status, said = run("plan", options | {"teacher_placement": "sharded"}, tmp_path, capsys, "--gpus", "2")
    assert {place for _, place in memory_of(said)} == {"sharded"}
    cached = options | {"objective": "sft", "teacher_cache": str(tmp_path / "cache")}
    status, said = run("plan", cached, tmp_path, capsys, "--gpus", "2")
    assert {place for _, place in memory_of(said)} == {"elsewhere"}


def test_a_teacher_that_cannot_be_cut_is_whole_everywhere(options, tmp_path, capsys, make_model, tokenizer):
    gpt2, adapter = tmp_path / "gpt2", tmp_path / "adapter"
    GPT2LMHeadModel(GPT2Config(vocab_size=310, n_embd=32, n_head=2, n_layer=2)).save_pretrained(gpt2)
    base = make_model(310)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    for folder, alone in ((gpt2, {"replicated", "cpu"}), (adapter, {"replicated"})):
        tokenizer.save_pretrained(folder)
        given = options | {"teacher_model_name_or_path": str(folder)}
        for gpus, places in (("2", {"replicated"}), ("1", alone)):
            status, said = run("plan", given, tmp_path, capsys, "--gpus", gpus)
            assert status == 0, said.err
            assert {place for _, place in memory_of(said)} == places


def test_where_nothing_fits_it_says_what_would_help(options, tmp_path, capsys):
    given = {"activation_checkpointing": False, "max_length": 256}
    status, said = run("plan", options | given, tmp_path, capsys, "--gpus", "1", "--gpu_memory", "0.001")
    assert status == 0, said.err
    assert said.out.count("  too much\n") == 2
    held = {words: float(number) for number, words in re.findall(r"^ +([\d.]+) MB  (\S.*)$", said.out, re.MULTILINE)}
    # an adapter of such a small student would keep more than it saves
    assert list(held) == [
        "activation_checkpointing: true", "per_device_train_batch_size: 1 and gradient_accumulation_steps",
        "optim: adamw_bnb_8bit", "teacher_quantization: bnb_4bit", "teacher_cache", "all of this",
    ]  # fmt: skip
    least = min(float(parts["all"]) for parts in memory_of(said).values())
    assert held.pop("all of this") < min(held.values()) < max(held.values()) <= least


@pytest.mark.parametrize("given", ["0", "much", "-3", None])
def test_a_memory_that_is_none_is_refused(options, tmp_path, capsys, given):
    argv = ["--gpu_memory"] if given is None else ["--gpu_memory", given]
    status, said = run("plan", options, tmp_path, capsys, *argv)
    assert (status, said.err) == (
        2, f"taid: error: --gpu_memory is that of a GPU in GB, like 80, got {given!r}\n",
    )  # fmt: skip


def test_a_student_whose_memory_is_not_known_is_said(tmp_path, capsys, options, student_folder):
    folder = tmp_path / "mamba"
    shutil.copytree(student_folder, folder)
    MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2).save_pretrained(folder)
    status, said = run("plan", options | {"model_name_or_path": str(folder)}, tmp_path, capsys)
    assert status == 0, said.err
    assert f"memory: not known for {folder} (what a state-space model keeps depends on its kernels)" in said.out
