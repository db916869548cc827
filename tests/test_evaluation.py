"""taid evaluate: its measures are their definitions, its tasks are what lm-eval prints, its mistakes are named."""

import functools
import importlib.machinery
import importlib.util
import io
import json
import math
import random
import shutil
import subprocess
import sys
import types
from typing import get_args

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from taid import TAIDConfig, TAIDTrainer
from taid.artifacts import run_folder
from taid.artifacts.tables import held_out_tables
from taid.cli.main import main
from taid.config.options import Quantization
from taid.evaluation import lm_eval_tasks as tasks
from taid.evaluation.held_out import bytes_of, held_out
from taid.evaluation.lm_eval_tasks import PAPER, Tasks
from taid.models.loading import load_model
from test_metrics import by_hand as distributions_by_hand

WORDS = "fox dog token loss falls rises small large teacher student Paris France one time".split()


def config(folder, **options):
    options = {"objective": "sft", "max_length": 128, "bf16": False, "use_cpu": True, "report_to": "none",
               "activation_checkpointing": False, "disable_tqdm": True} | options  # fmt: skip
    return TAIDConfig(output_dir=str(folder), **options)


def evaluate(*arguments):
    return main(["evaluate", "--use_cpu", *map(str, arguments)])


# --- bytes and bits ---------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_row_are_those_of_its_trained_text(tokenizer):
    text = "One token at a time: naïve 東京 😀."
    ids = tokenizer(text)["input_ids"]
    first = len(tokenizer.decode(ids[:1]).encode())
    assert bytes_of(ids, ids, tokenizer) == len(text.encode()) - first  # nothing predicts the first token
    assert bytes_of([0, *ids], [0, *ids], tokenizer) == len(text.encode())  # special tokens decode to nothing
    assert bytes_of([0, *ids, 0], [-100, *ids, 0], tokenizer) == len(text.encode())
    assert bytes_of(ids, [-100] * len(ids), tokenizer) == 0


def test_only_trained_runs_are_counted(tokenizer):
    parts = ["The capital of France", " is Paris.", "\nAnd then", " it rises — again."]
    ids = [tokenizer(part)["input_ids"] for part in parts]
    labels = [token if number % 2 else -100 for number, part in enumerate(ids) for token in part]
    assert bytes_of([token for part in ids for token in part], labels, tokenizer) == len((parts[1] + parts[3]).encode())


def test_a_space_that_decoding_strips_is_counted_at_the_seam():
    """SentencePiece's way: a space is part of the next token, and the first of a text is not decoded."""
    backend = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "\u2581three": 2}, unk_token="\u2581one"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("one two three")["input_ids"]
    assert tokenizer.decode(ids[1:]) == "two three"
    assert bytes_of(ids, ids, tokenizer) == len(" two three")


def test_a_model_that_knows_nothing_needs_log2_v_bits_a_token(tmp_path, tokenizer, make_model, make_rows):
    model = make_model(300)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    rows = make_rows("text", 5)
    found = held_out(model, tokenizer, Dataset.from_list(rows), config(tmp_path, max_length=512))
    tokens = [tokenizer(row["text"])["input_ids"] for row in rows]
    size = sum(len(row["text"].encode()) for row in rows)
    size -= sum(len(tokenizer.decode(ids[:1])) for ids in tokens)
    assert found.bytes == size
    count = found.tokens
    assert count in (sum(map(len, tokens)) - 5, sum(map(len, tokens)))  # TRL ends each text with an end of text
    assert found.cross_entropy == pytest.approx(math.log(300), rel=1e-6)
    assert found.perplexity == pytest.approx(300, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(count * math.log2(300) / size, rel=1e-6)
    assert found.kl is None


# --- held-out measures ------------------------------------------------------------------------------------------------


def by_hand(folder, teacher_folder, tokenizer, rows, prompt_of=lambda row: row["prompt"]):
    """Cross-entropy, KL and accuracy over the completion's tokens, in float64, and their number."""
    student = AutoModelForCausalLM.from_pretrained(folder).double()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).double()
    cross_entropy = kl = correct = count = 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor(prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id])
        with torch.no_grad():
            ours, theirs = (m(input_ids=ids[None]).logits[0, :, :300].log_softmax(-1) for m in (student, teacher))
        places = torch.arange(len(prompt) - 1, len(ids) - 1)
        targets = ids[places + 1]
        cross_entropy -= ours[places, targets].sum().item()
        kl += (theirs.exp() * (theirs - ours))[places].sum().item()
        correct += (ours[places].argmax(-1) == targets).sum().item()
        count += len(places)
    return cross_entropy / count, kl / count, correct / count, count


@pytest.mark.parametrize("batch_size", [1, 4])
def test_measures_are_their_definitions(batch_size, tmp_path, student_folder, teacher_folder, tokenizer, make_rows):
    rows = make_rows("prompt", 6)
    args = config(tmp_path, per_device_eval_batch_size=batch_size, max_length=512)
    student, teacher = (AutoModelForCausalLM.from_pretrained(f) for f in (student_folder, teacher_folder))
    found = held_out(student, tokenizer, Dataset.from_list(rows), args, teacher, tokenizer)
    cross_entropy, kl, accuracy, count = by_hand(student_folder, teacher_folder, tokenizer, rows)
    assert found.cross_entropy == pytest.approx(cross_entropy, rel=2e-6)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert (found.accuracy, found.tokens) == (pytest.approx(accuracy), count)
    assert found.bytes == sum(len(row["completion"].encode()) for row in rows)
    assert found.bits_per_byte == pytest.approx(cross_entropy * count / math.log(2) / found.bytes, rel=2e-6)


def test_in_chats_only_the_assistants_tokens_count_if_asked(tmp_path, student_folder, rows):
    data = rows(tmp_path / "chats.jsonl", "messages", 5)
    counts = {}
    for name, options in {"all": (), "assistant": ("--assistant_only_loss",)}.items():
        assert evaluate(student_folder, "--data", data, "--output", tmp_path / "e.json", *options) == 0
        counts[name] = json.loads((tmp_path / "e.json").read_text())["held_out"]["student"]["bytes"]
    chats = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    said = sum(len(m["content"].encode()) + 1 for chat in chats for m in chat if m["role"] == "assistant")
    assert counts["assistant"] == said  # and the line's end behind <|im_end|>, which is a special token
    assert counts["all"] > said


def test_they_are_the_trainers_own_at_the_end_of_a_run(tmp_path, student_folder, teacher_folder, make_rows, tokenizer):
    """So the KL of students trained from a part of the teacher's distribution can be compared."""
    data = Dataset.from_list(make_rows("prompt", 8))
    args = config(tmp_path / "run", objective="taid", taid_alpha="auto", max_steps=3, learning_rate=1e-2,
                  save_strategy="no")  # fmt: skip
    trainer = TAIDTrainer(str(student_folder), str(teacher_folder), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    expected = trainer.evaluate()
    trainer.save_model()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    found = held_out(student, tokenizer, data, config(tmp_path / "e"), teacher, tokenizer)
    assert found.cross_entropy == expected["eval_cross_entropy"]
    assert found.kl == pytest.approx(expected["eval_kl"], rel=1e-7)  # in training it is a part of TAID's own sum
    assert found.accuracy == expected["eval_mean_token_accuracy"]


def test_the_table_has_a_row_for_each_model(
    tmp_path, student_folder, teacher_folder, tokenizer, make_model, rows, capsys
):
    before, output = tmp_path / "before", tmp_path / "e.json"
    make_model(300, seed=7).save_pretrained(before)
    tokenizer.save_pretrained(before)
    data = rows(tmp_path / "rows.jsonl")
    options = ("--teacher", teacher_folder, "--before", before, "--data", data, "--output", output)
    assert evaluate(student_folder, *options) == 0
    found = json.loads(output.read_text())["held_out"]
    assert list(found) == ["student before", "student", "teacher"]
    assert found["teacher"]["kl"] == 0.0
    pairs = {"student": student_folder, "student before": before}
    expected = {name: by_hand(folder, teacher_folder, tokenizer, lines(data)) for name, folder in pairs.items()}
    for name, (cross_entropy, kl, _, _) in expected.items():
        assert (found[name]["cross_entropy"], found[name]["kl"]) == pytest.approx((cross_entropy, kl), rel=1e-5)
    of_teacher, _, accuracy, _ = by_hand(teacher_folder, student_folder, tokenizer, lines(data))
    assert found["teacher"]["cross_entropy"] == pytest.approx(of_teacher, rel=2e-6)
    assert found["teacher"]["accuracy"] == pytest.approx(accuracy)
    printed = capsys.readouterr().out
    for of in found.values():
        for measure in ("cross_entropy", "bits_per_byte", "reverse_kl", "head_mass", "entropy", "calibration_error"):
            assert f"{of[measure]:.4f}" in printed
        assert f"{of['agreement']:.2%}" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_measures_of_distributions_are_their_definitions_by_the_teachers_order(
    tmp_path, student_folder, teacher_folder, tokenizer, rows
):
    data, output = rows(tmp_path / "rows.jsonl", number=20), tmp_path / "e.json"
    options = ("--teacher", teacher_folder, "--data", data, "--output", output)
    assert evaluate(student_folder, *options) == 0
    found = json.loads(output.read_text())["held_out"]
    of_student, targets = log_probs(AutoModelForCausalLM.from_pretrained(student_folder), tokenizer, lines(data))
    of_teacher, _ = log_probs(AutoModelForCausalLM.from_pretrained(teacher_folder), tokenizer, lines(data))
    assert len(targets) == found["student"]["tokens"]
    for name, pair in {"student": (of_student, of_teacher), "teacher": (of_teacher, of_teacher)}.items():
        expected = distributions_by_hand(*pair, targets)
        expected["entropy"] = -(pair[0].exp() * pair[0]).sum(-1).mean().item()
        assert {measure: found[name][measure] for measure in expected} == pytest.approx(expected, rel=2e-5, abs=1e-9)
    assert found["student"]["head_mass"] < found["teacher"]["head_mass"]
    assert found["student"]["tail_mass"] > found["teacher"]["tail_mass"]


def test_without_a_teacher_what_needs_one_is_left_open(tmp_path, student_folder, rows, capsys):
    data, output = rows(tmp_path / "rows.jsonl"), tmp_path / "e.json"
    assert evaluate(student_folder, "--data", data, "--output", output) == 0
    found = json.loads(output.read_text())["held_out"]["student"]
    assert [found[name] for name in ("kl", "reverse_kl", "agreement", "head_mass", "tail_mass")] == [None] * 5
    assert 0 < found["entropy"] < math.log(300)
    assert 0 < found["calibration_error"] < 1
    assert "Distributions on held-out tokens" in capsys.readouterr().out


def test_a_file_of_an_earlier_version_is_shown_as_far_as_it_goes(tmp_path):
    measures = {"cross_entropy": 2.0, "perplexity": 7.389, "bits_per_byte": None, "kl": 0.25, "accuracy": 0.5,
                "others_images": None, "tokens": 5, "bytes": 4}  # fmt: skip
    console = Console(width=120, file=io.StringIO())
    console.print(*(table.terminal() for table in held_out_tables({"student": measures})))
    assert "2.0000" in console.file.getvalue()


# --- a teacher in fewer bits ------------------------------------------------------------------------------------------

BITS = {
    "bnb_8bit": BitsAndBytesConfig(load_in_8bit=True),
    "bnb_4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


def log_probs(model, tokenizer, rows):
    """Return the logits of each token of the completions, over the shared ids, and which token it is."""
    found, targets = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor(prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1, :300]
        found.append(logits.double().log_softmax(-1))
        targets.append(ids[len(prompt) :])
    return torch.cat(found), torch.cat(targets)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["llama", "a head with a bias"])
def test_what_fewer_bits_change_of_a_teacher_is_what_they_change_by_hand(
    bits, kind, tmp_path, student_folder, teacher_folder, tokenizer, rows, capsys
):
    if kind != "llama":
        teacher_folder = tmp_path / "teacher"
        torch.manual_seed(0)
        model = PhiForCausalLM(
            PhiConfig(vocab_size=310, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      initializer_range=0.2)
        )  # fmt: skip
        torch.nn.init.normal_(model.lm_head.bias, std=3.0)
        model.save_pretrained(teacher_folder)
        tokenizer.save_pretrained(teacher_folder)
    data, output = rows(tmp_path / "rows.jsonl", number=40), tmp_path / "e.json"
    options = ("--teacher", teacher_folder, "--teacher_quantization", bits, "--data", data, "--output", output)
    # Which features bnb_8bit leaves in 16 bits depends on what is in a batch.
    assert evaluate(student_folder, *options, "--batch_size", 1) == 0
    found = json.loads(output.read_text())["held_out"]["teacher"]
    fewer = found["quantized"]

    whole, targets = log_probs(AutoModelForCausalLM.from_pretrained(teacher_folder), tokenizer, lines(data))
    as_ours = {"quantization_config": BITS[bits], "dtype": torch.float32, "device_map": {"": "cpu"}}
    quantized = load_model(str(teacher_folder), role="teacher", **as_ours)  # bitsandbytes packs it on some processors
    ours, _ = log_probs(quantized, tokenizer, lines(data))
    losses = [-of[torch.arange(len(targets)), targets].mean().item() for of in (whole, ours)]
    assert found["tokens"] == len(targets)
    assert found["cross_entropy"] == pytest.approx(losses[0], rel=2e-6)
    assert fewer["name"] == bits
    assert fewer["cross_entropy"] == pytest.approx(losses[1], rel=1e-5)
    assert fewer["change"] == pytest.approx(losses[1] - losses[0], abs=1e-5 * losses[0])
    assert fewer["change"] == fewer["cross_entropy"] - found["cross_entropy"]
    assert fewer["kl"] == pytest.approx((whole.exp() * (whole - ours)).sum(-1).mean().item(), rel=1e-4)
    same = (whole.argmax(-1) == ours.argmax(-1)).sum().item()
    assert fewer["agreement"] * len(targets) == pytest.approx(same, abs=1e-6)
    assert 0 < same < len(targets)
    printed = capsys.readouterr().out
    assert f"{losses[0]:.4f} -> {losses[1]:.4f} nats/token ({losses[1] - losses[0]:+.4f})" in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_in_as_many_bits_as_before_changes_by_nothing(
    dtype, tmp_path, monkeypatch, student_folder, teacher_folder, rows
):
    monkeypatch.setattr("taid.evaluation.evaluate.quantization_config", lambda name, compute: None)
    options = ("--teacher", teacher_folder, "--teacher_quantization", "bnb_4bit", "--dtype", dtype, "--batch_size", 3)
    assert evaluate(student_folder, *options, "--data", rows(tmp_path / "r.jsonl"), "--output", tmp_path / "e") == 0
    found = json.loads((tmp_path / "e").read_text())["held_out"]["teacher"]
    expected = {"name": "bnb_4bit", "cross_entropy": found["cross_entropy"], "change": 0.0, "kl": 0.0, "agreement": 1.0}
    assert found["quantized"] == expected


def test_the_ways_to_quantize_are_those_of_training(capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate("no/such/model", "--teacher_quantization", "q4")
    error = capsys.readouterr().err
    assert "--teacher_quantization: invalid choice: 'q4'" in error
    assert error.partition("choose from ")[2] == ", ".join(map(repr, get_args(Quantization))) + ")\n"


def test_a_package_that_quantizes_and_is_missing_is_named_before_a_model_is_loaded(monkeypatch, tmp_path, rows, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    options = (
        "--teacher",
        "nobody/teacher",
        "--teacher_quantization",
        "bnb_8bit",
        "--data",
        rows(tmp_path / "r.jsonl"),
    )
    assert evaluate("nobody/model", *options) == 2
    assert capsys.readouterr().err == "taid: error: bnb_8bit needs bitsandbytes: pip install bitsandbytes\n"


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_evaluated_with_its_base(dora, tmp_path, student_folder, tokenizer, rows):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "use_dora": dora}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(student_folder), LoraConfig(task_type="CAUSAL_LM", **lora)
    )
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = {}
    for name in ("adapter", "merged"):
        tokenizer.save_pretrained(tmp_path / name)
        output = tmp_path / f"{name}.json"
        assert evaluate(tmp_path / name, "--data", rows(tmp_path / "rows.jsonl"), "--output", output) == 0
        found[name] = json.loads(output.read_text())["held_out"]["student"]["cross_entropy"]
    assert found["adapter"] == pytest.approx(found["merged"], rel=1e-5)


@pytest.mark.cli
@pytest.mark.slow
def test_two_processes_share_the_rows_and_print_once(tmp_path, student_folder, teacher_folder, rows):
    data, output = rows(tmp_path / "rows.jsonl", number=7), tmp_path / "two.json"
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "taid", "evaluate", str(student_folder), "--use_cpu"]
    bits = ["--teacher_quantization", "bnb_4bit", "--generate", "5", "--samples", "2", "--max_new_tokens", "6"]
    command += [
        "--teacher",
        str(teacher_folder),
        *bits,
        "--data",
        str(data),
        "--batch_size",
        "2",
        "--output",
        str(output),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Greedy answers to 5 prompts") == done.stdout.count("distinct-1") == 1
    assert done.stdout.count("Held out") == done.stdout.count("Teacher in bnb_4bit") == 1
    options = ("--teacher", teacher_folder, *bits, "--data", data, "--output", tmp_path / "e.json")
    assert evaluate(student_folder, *options, "--batch_size", 2) == 0
    files = [json.loads(path.read_text()) for path in (output, tmp_path / "e.json")]
    two, one = (file["held_out"] for file in files)
    for name, measures in one.items():
        for measure in measures.keys() - {"others_images", "quantized"}:
            assert two[name][measure] == pytest.approx(measures[measure], rel=1e-6)
    of_two, of_one = (file["generations"]["student"] for file in files)
    assert of_two.pop("file") == str(tmp_path / "two.generations.jsonl")
    assert of_two == pytest.approx({name: of_one[name] for name in of_two}, rel=1e-6)
    answers = [(tmp_path / f"{name}.generations.jsonl").read_text() for name in ("two", "e")]
    assert answers[0] == answers[1]
    for measure in ("cross_entropy", "change", "kl", "agreement"):
        assert two["teacher"]["quantized"][measure] == pytest.approx(one["teacher"]["quantized"][measure], rel=1e-5)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "nothing": ((), "nothing to evaluate: give held-out rows as --data"),
    "teacher alone": (("--teacher", "t", "--tasks", "x"), "--teacher is compared on held-out rows"),
    "the student only, without a teacher": (
        ("--student_only", "--data", "x"), "--student_only leaves the row of a --teacher away"
    ),
    "bits of no teacher": (
        ("--teacher_quantization", "bnb_4bit", "--data", "x"),
        "--teacher_quantization changes a teacher on held-out rows: give --teacher and --data",
    ),
    "bits on no rows": (
        ("--teacher_quantization", "fp8", "--teacher", "t", "--speed"), "on held-out rows: give --teacher and --data"
    ),
    "shots alone": (("--num_fewshot", 2, "--data", "x"), "--num_fewshot is for tasks"),
    "no rows a batch": (("--batch_size", 0, "--data", "x"), "--batch_size must be positive, got 0"),
    "answers to nothing": (("--generate", 5, "--tasks", "x"), "--generate answers the prompts of held-out rows"),
    "no answers": (("--generate", 0, "--data", "x"), "--generate must be positive, got 0"),
    "answers of no token": (("--generate", 5, "--max_new_tokens", 0, "--data", "x"), "--max_new_tokens must be"),
    "less than no samples": (("--generate", 5, "--samples", -1, "--data", "x"), "--samples must be 0, for greedy"),
    "half a judge": (("--judge_url", "http://host"), "--judge_model is not set"),
    "a judge without output": (
        ("--judge_url", "http://host", "--judge_model", "x", "--prompts", "x"), "--output is not set"
    ),
    "no folder": (("--data", "x", "--output", "nowhere/e.json"), "there is no folder nowhere"),
    "no data": (("--data", "missing.jsonl"), "data file missing.jsonl does not exist"),
    "no include_path": (("--tasks", "a", "--include_path", "nowhere"), "include_path nowhere: there is no such folder"),
    "no task": (("--tasks", " ,"), "tasks is empty"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_one_line_before_a_model_is_loaded(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, message = MISTAKES[kind]
    assert evaluate("no/such/model", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("taid: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_what_was_measured_before_of_the_same_model_is_kept(
    own_tasks_only, tmp_path, student_folder, teacher_folder, task_folder, rows
):
    data, output = rows(tmp_path / "rows.jsonl"), tmp_path / "e.json"
    options = ("--teacher", teacher_folder, "--data", data, "--generate", 2, "--max_new_tokens", 4, "--output", output)
    assert evaluate(student_folder, *options) == 0
    first = json.loads(output.read_text())
    assert first["generations"]["student"]["prompts"] == 2
    tasks = ("--tasks", "tiny_choice", "--include_path", task_folder, "--output", output)
    assert evaluate(student_folder, *tasks) == 0
    both = json.loads(output.read_text())
    assert both.pop("tasks")
    assert both == first
    assert first["teacher"] == str(teacher_folder)
    assert evaluate(student_folder, "--data", data, "--output", output) == 0
    again = json.loads(output.read_text())
    assert (again["teacher"], "teacher" in again["held_out"], "tasks" in again) == (None, False, True)
    assert evaluate(teacher_folder, *tasks) == 0  # another model's are not
    assert "held_out" not in json.loads(output.read_text())


def test_rows_without_a_prompt_are_named_before_a_model_is_loaded(tmp_path, rows, capsys):
    data = rows(tmp_path / "rows.jsonl", "text")
    assert evaluate("nobody/model", "--data", data, "--generate", 5) == 2
    assert f"no row of {data} has a prompt" in capsys.readouterr().err


def test_a_file_that_is_no_evaluation_is_not_overwritten(tmp_path, student_folder, rows, capsys):
    data, output = rows(tmp_path / "rows.jsonl"), tmp_path / "e.json"
    for content in ("mine", '{"mine": 1}', "[1, 2]", "3", "\udcff"):
        output.write_text(content, errors="surrogateescape")
        assert evaluate("no/such/model", "--data", data, "--output", output) == 2
        assert "taid evaluate did not write: choose another name" in capsys.readouterr().err
        assert output.read_text(errors="surrogateescape") == content
    (tmp_path / "f.speed.md").write_text("mine")
    assert evaluate("no/such/model", "--speed", "--output", tmp_path / "f.json") == 2
    assert "f.speed.md would be overwritten: choose another name" in capsys.readouterr().err
    for name in ("f.generations.jsonl", "f.before.generations.jsonl"):
        (tmp_path / name).write_text("mine")
        options = ("--data", data, "--before", "x", "--generate", 5, "--output", tmp_path / "f.json")
        assert evaluate("no/such/model", *options) == 2
        assert f"{name} would be overwritten: choose another name" in capsys.readouterr().err
        (tmp_path / name).unlink()
    assert evaluate(student_folder, "--data", data, "--output", tmp_path) == 2
    assert "is a folder: name a file in it" in capsys.readouterr().err
    output.unlink()
    for _ in range(2):  # the second replaces the first
        assert evaluate(student_folder, "--data", data, "--output", output) == 0


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Tasks of lm-eval's three kinds of answers on 12 documents, with 30 to take shots from."""
    folder, chosen = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def text(words):
        return " ".join(chosen.choices(WORDS, k=words))

    documents = [
        {
            "question": text(5),
            "choices": [text(chosen.randint(1, 4)) for _ in range(4)],
            "answer": chosen.randrange(4),
            "text": text(9),
        }
        for _ in range(42)
    ]
    for name, part in {"test": documents[:12], "shots": documents[12:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    kinds = {
        "tiny_choice": {
            "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "answer", "doc_to_choice": "choices", "metrics": ["acc", "acc_norm"],
        },
        "tiny_last_word": {
            "output_type": "loglikelihood", "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}", "metrics": ["perplexity", "acc"],
        },
        "tiny_text": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
            "metrics": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
        },
    }  # fmt: skip
    for name, kind in kinds.items():
        write_task(folder, folder, name, kind)
    return folder


def write_task(folder, documents, name, kind, **more):
    metrics = [{"metric": metric} for metric in kind["metrics"]]
    task = {
        "task": name, "dataset_path": "json", "validation_split": "validation", "fewshot_split": "train",
        "dataset_kwargs": {
            "data_files": {"validation": str(documents / "test.jsonl"), "train": str(documents / "shots.jsonl")}
        },
        "metric_list": metrics, "metadata": {"version": 1.0},
    }  # fmt: skip
    task |= {key: value for key, value in kind.items() if key != "metrics"} | more
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


@pytest.fixture
def own_tasks_only(monkeypatch):
    """lm-eval's index of its own tasks left out."""
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(manager, include_defaults=False))


# Before either command: lm-eval takes half a minute to list the 14,683 tasks that it has.
_OWN_TASKS_ONLY = """
import functools, runpy, sys
import lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.cli
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_are_what_lm_eval_itself_prints(tmp_path, student_folder, task_folder):
    """Every metric, to the last digit, of the same folder by both commands."""
    common = ["--tasks", "tiny_choice,tiny_last_word,tiny_text", "--include_path", str(task_folder)]
    common += ["--num_fewshot", "2", "--batch_size", "4"]
    lm_eval = ["--model", "hf", "--model_args", f"pretrained={student_folder}", "--device", "cpu", "--output_path"]
    commands = [
        ["taid", "evaluate", str(student_folder), "--use_cpu", *common, "--output", str(tmp_path / "ours.json")],
        ["lm_eval", *lm_eval, str(tmp_path / "theirs.json"), *common],
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _OWN_TASKS_ONLY, *command],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    done = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [error[-3000:] for _, error in done]
    theirs = json.loads(next(tmp_path.glob("theirs*.json")).read_text())
    expected = {
        (task, metric): value
        for task, metrics in theirs["results"].items()
        for metric, value in metrics.items()
        if "," in metric and value != "N/A"
    }
    found = {}
    for row in json.loads((tmp_path / "ours.json").read_text())["tasks"]:
        assert row["n_shot"] == theirs["n-shot"][row["task"]]
        found[row["task"], f"{row['metric']},{row['filter']}"] = row["value"]
        if row["stderr"] is not None:
            found[row["task"], f"{row['metric']}_stderr,{row['filter']}"] = row["stderr"]
    assert found == expected
    assert {metric for _, metric in found} >= {"acc,none", "acc_norm,none", "perplexity,none", "bits_per_byte,none"}
    for _, value in list(found.items())[:2]:
        assert f"{value:.4f}" in done[0][0]
        assert f"{value:.4f}" in done[1][0]


def test_the_papers_set_is_six_tasks_with_shots_of_their_own(own_tasks_only, tmp_path, student_folder, task_folder):
    kind = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "answer",
            "doc_to_choice": "choices", "metrics": ["acc"]}  # fmt: skip
    for name in ("arc_challenge", "hellaswag", "winogrande", "truthfulqa_mc2", "gsm8k", "mmlu_one", "mmlu_two"):
        write_task(tmp_path, task_folder, name, kind, doc_to_choice=["a", "b", "c", "d"], num_fewshot=1)
    (tmp_path / "mmlu.yaml").write_text(json.dumps({"group": "mmlu", "task": ["mmlu_one", "mmlu_two"]}))
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(student_folder)
    found = Tasks.named(PAPER, str(tmp_path), model=str(student_folder)).run(model, tokenizer, limit=2, batch_size=2)
    assert {row["task"]: row["n_shot"] for row in found} == {
        "arc_challenge": 25, "hellaswag": 10, "winogrande": 5, "truthfulqa_mc2": 0, "gsm8k": 5, "mmlu_one": 5,
        "mmlu_two": 5,
    }  # fmt: skip


def test_an_unknown_task_is_named_before_a_model_is_loaded(own_tasks_only, task_folder, capsys):
    assert evaluate("no/such/model", "--tasks", "tiny_text,tiny_choise", "--include_path", task_folder) == 2
    error = capsys.readouterr().err
    assert "task 'tiny_choise' does not exist in lm_eval" in error
    assert "did you mean 'tiny_choice'?" in error


def test_without_lm_eval_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    assert evaluate("no/such/model", "--tasks", "lambada_openai") == 2
    assert "tasks for no/such/model need lm-eval: pip install 'taid[evaluation]'" in capsys.readouterr().err


def test_tasks_of_a_vision_language_model_go_to_lmms_eval(monkeypatch, tmp_path, student_folder, capsys):
    """To a stand-in with its signatures (0.7.3)."""
    monkeypatch.setattr(tasks, "_is_vision_language", lambda name: True)
    assert evaluate(student_folder, "--tasks", "mme") == 2
    assert "need lmms-eval: pip install lmms-eval" in capsys.readouterr().err
    given = {}

    def simple_evaluate(**options):
        given.update(options)
        metrics = {"alias": "mme", "mme_score,none": 3, "mme_score_stderr,none": "N/A"}
        return {"results": {"mme": metrics}, "n-shot": {"mme": 0}, "higher_is_better": {"mme": {"mme_score": True}}}

    manager = types.SimpleNamespace(all_tasks=["mme", "mmmu"])
    stand_in = {
        "lmms_eval": {"__spec__": importlib.machinery.ModuleSpec("lmms_eval", None)},
        "lmms_eval.tasks": {"TaskManager": lambda include_path: manager},
        "lmms_eval.evaluator": {"simple_evaluate": simple_evaluate},
    }
    for name, content in stand_in.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    assert evaluate(student_folder, "--tasks", "taid-paper") == 2
    assert "task 'taid-paper' does not exist in lmms_eval" in capsys.readouterr().err
    output = tmp_path / "e.json"
    assert evaluate(student_folder, "--tasks", "mme", "--limit", 4, "--output", output) == 0
    assert given == {
        "model": "huggingface", "model_args": f"pretrained={student_folder},device=cpu", "tasks": ["mme"],
        "num_fewshot": None, "limit": 4.0, "batch_size": 8, "log_samples": False, "task_manager": manager,
    }  # fmt: skip
    assert json.loads(output.read_text())["tasks"] == [
        {"task": "mme", "metric": "mme_score", "filter": "none", "value": 3.0, "stderr": None, "n_shot": 0,
         "higher_is_better": True}
    ]  # fmt: skip


# --- tasks of a run's student -----------------------------------------------------------------------------------------


def train(tmp_path, student_folder, rows, *more):
    data = rows(tmp_path / "rows.jsonl")
    options = {"model_name_or_path": student_folder, "dataset_name": data, "output_dir": tmp_path / "run",
               "objective": "sft", "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no",
               "report_to": "none", "bf16": "false"}  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return main(["train", "--use_cpu", *arguments, *map(str, more)])


ADAPTER = ["--use_peft", "--lora_target_modules", "all-linear"]


@pytest.mark.parametrize(
    "kind",
    [[], ADAPTER, [*ADAPTER, "--use_dora"], [*ADAPTER, "--objective", "forward_kl", "--tokenizer_from", "teacher"]],
)
def test_tasks_of_a_runs_student_stand_in_its_report(
    own_tasks_only, kind, tmp_path, student_folder, teacher_folder, task_folder, rows, capsys
):
    more = list(kind)
    if "--tokenizer_from" in kind:
        description = json.loads((shutil.copytree(teacher_folder, tmp_path / "t") / "tokenizer.json").read_text())
        vocab = description["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
        (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(description))
        more += ["--teacher_model_name_or_path", tmp_path / "t"]
    assert train(tmp_path, student_folder, rows, *more) == 0
    folder = tmp_path / "run"
    options = ("--tasks", "tiny_choice,tiny_text", "--num_fewshot", 1, "--include_path", task_folder)
    assert evaluate(folder, *options, "--output", folder / "evaluation.json") == 0
    assert main(["report", str(folder)]) == 0
    found = json.loads((folder / "evaluation.json").read_text())["tasks"]
    assert {(row["task"], row["n_shot"]) for row in found} == {("tiny_choice", 1), ("tiny_text", 1)}
    page, printed = (folder / "report.html").read_text(), capsys.readouterr().out
    for row in found:
        assert f'<td class="number">{row["value"]:.4f}</td>' in page
        assert f"{row['value']:.4f}" in printed
    # It is not the student before.
    output = tmp_path / "e.json"
    assert evaluate(student_folder, *options, "--output", output) == 0
    assert json.loads(output.read_text())["tasks"] != found
    run_folder.clear(folder)
    assert not (folder / "evaluation.json").exists()
