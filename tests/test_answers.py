"""Answers to held-out prompts: which rows ask, and what is generated."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from taid import TAIDConfig
from taid.cli.main import main
from taid.data.loading import load_rows
from taid.evaluation import answers as generation
from taid.evaluation.answers import generate, prompted
from taid.evaluation.evaluate import measure


@pytest.fixture
def args(tmp_path):
    return TAIDConfig(
        output_dir=str(tmp_path / "args"), objective="sft", bf16=False, use_cpu=True, report_to="none",
        activation_checkpointing=False, disable_tqdm=True, per_device_eval_batch_size=3,
    )  # fmt: skip


def asked(rows, number=100):
    return prompted(Dataset.from_list(rows), number, "rows.jsonl")


def chat(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, texts, strict=False)]


# --- which rows ask ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_what_stands_before_the_last_answer():
    found = asked([{"messages": chat("One?", "1", "Two?", "2")}, {"messages": chat("Three?", "3")}])
    assert [(f.row, f.prompt, f.reference) for f in found] == [
        (0, chat("One?", "1", "Two?"), "2"),
        (1, chat("Three?"), "3"),
    ]
    assert asked([{"prompt": "One", "completion": " two"}])[0][:3] == (0, "One", " two")
    conversation = {"prompt": chat("One?"), "completion": [{"role": "assistant", "content": "1"}]}
    assert asked([conversation])[0][:3] == (0, chat("One?"), "1")


def test_rows_that_do_not_end_with_the_assistant_are_passed_over():
    rows = [
        {"messages": chat("One?", "1", "Two?")},
        {"messages": [{"role": "assistant", "content": "Hello."}]},
        {"messages": chat("Three?", "3")},
        {"messages": chat("Four?", "4")},
    ]
    assert [f.row for f in asked(rows)] == [2, 3]
    assert [f.row for f in asked(rows, number=1)] == [2]


@pytest.mark.parametrize("row", [{"text": "One."}, {"input_ids": [1, 2]}, {"messages": chat("One?")}])
def test_data_without_a_prompt_is_named_with_its_columns(row):
    with pytest.raises(ValueError, match=f"no row of rows.jsonl has a prompt.*these have `{next(iter(row))}`"):
        asked([row])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--generate needs rouge-score: pip install 'taid\[evaluation\]'"):
        asked([{"prompt": "One", "completion": " two"}])


# --- what is generated ------------------------------------------------------------------------------------------------


def greedy_by_hand(model, ids, allowed, end, tokens):
    """The likeliest token of the allowed ones, one after the other, without cache, padding or batch."""
    found = []
    while len(found) < tokens and found[-1:] != [end]:
        logits = model(input_ids=torch.tensor([ids + found])).logits[0, -1, :allowed]
        found.append(int(logits.argmax()))
    return found


def test_greedy_answers_are_the_likeliest_tokens_whatever_batch_and_settings(args, make_model, tokenizer, make_rows):
    """Also where generation_config.json asks for something else, and the head has rows that are no token."""
    model = make_model(308, seed=4)
    with torch.no_grad():
        model.get_output_embeddings().weight[300:] *= 5  # likely, were they allowed
    model.generation_config.update(repetition_penalty=1.8, temperature=0.3, top_k=2, do_sample=True, max_length=7)
    rows = make_rows("prompt", 7)
    with torch.no_grad():
        expected = [
            greedy_by_hand(model, tokenizer(row["prompt"])["input_ids"], 300, tokenizer.eos_token_id, 12)
            for row in rows
        ]
    assert len({len(tokenizer(row["prompt"])["input_ids"]) for row in rows}) > 3
    for batch_size in (1, 3, 7):
        args.per_device_eval_batch_size = batch_size
        numbers, answers = generate(model, tokenizer, asked(rows), args, samples=0, max_new_tokens=12)
        assert [row["answer"] for row in answers] == [tokenizer.decode(x, skip_special_tokens=True) for x in expected]
        assert numbers["answer_tokens"] == pytest.approx(sum(map(len, expected)) / 7)
    assert model.generation_config.repetition_penalty == 1.8
    assert [row["row"] for row in answers] == list(range(7))
    assert [row["prompt"] for row in answers] == [row["prompt"] for row in rows]
    assert [numbers[name] for name in ("self_bleu", "distinct_1", "sample_tokens", "generation_loss")] == [None] * 4


def test_an_adapter_answers_as_the_model_that_it_is_merged_into(args, make_model, tokenizer, make_rows):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(make_model(300, seed=4), LoraConfig(task_type="CAUSAL_LM", **lora)).eval()
    model.generation_config.update(repetition_penalty=1.8)
    prompts, options = asked(make_rows("prompt", 4)), {"samples": 2, "max_new_tokens": 12}
    found = generate(model, tokenizer, prompts, args, **options)
    assert model.generation_config.repetition_penalty == 1.8
    assert generate(model.merge_and_unload(), tokenizer, prompts, args, **options) == found


def test_chats_are_answered_behind_the_assistants_turn(args, make_model, tokenizer):
    model = make_model(300, seed=4)
    _, answers = generate(model, tokenizer, asked([{"messages": chat("One?", "1")}]), args, samples=0, max_new_tokens=5)
    assert answers[0]["prompt"] == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"


def test_samples_are_drawn_from_the_students_own_distribution(args, make_model, tokenizer):
    """At temperature 1, without the 50 likeliest tokens of transformers' default, or what the model's settings ask."""
    model = make_model(308, seed=4)
    model.generation_config.update(temperature=0.1, top_p=0.5, min_p=0.2, do_sample=True)
    ids = tokenizer("One token at a time.")["input_ids"]
    answering = generation._Answering(model, tokenizer, args, None, None, 1)
    drawn = Counter(answer[0] for answer in answering([ids], 20_000, temperature=1.0)[0])
    with torch.no_grad():
        q = model(input_ids=torch.tensor([ids])).logits[0, -1, :300].softmax(-1)
    share = torch.tensor([drawn[i] / 20_000 for i in range(300)])
    assert 0.5 * (share - q).abs().sum() < 0.06  # of draws from q itself, 0.04
    assert q.topk(50).values.sum() < 0.9
    assert sum(drawn.values()) == 20_000


def test_the_same_seed_draws_the_same_and_leaves_other_draws_alone(args, make_model, tokenizer, make_rows):
    model, prompts = make_model(300, seed=4), asked(make_rows("prompt", 4))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate(model, tokenizer, prompts, args, samples=2, max_new_tokens=6)
    assert torch.equal(torch.rand(3), expected)
    assert generate(model, tokenizer, prompts, args, samples=2, max_new_tokens=6) == first
    args.seed += 1
    assert generate(model, tokenizer, prompts, args, samples=2, max_new_tokens=6).answers != first.answers


def test_references_without_latin_letters_are_in_no_mean_and_said_so(args, make_model, tokenizer, caplog):
    rows = [{"prompt": "One", "completion": text} for text in (" 東京です。", " 日本", " token")]
    numbers, answers = generate(make_model(300), tokenizer, asked(rows), args, samples=0, max_new_tokens=4)
    assert [row["rouge_l"] is None for row in answers] == [True, True, False]
    assert numbers["rouge_l"] == answers[2]["rouge_l"]
    assert "2 of 3 references have neither Latin letters nor digits" in caplog.text


def test_a_collapsed_student_is_seen(args, make_model, tokenizer, make_rows):
    """One whose logits are so large that it has one thing to say."""
    prompts, found = asked(make_rows("prompt", 4)), {}
    for name, factor in {"as it is": 1.0, "collapsed": 50.0}.items():
        model = make_model(300, seed=4, tied=False)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(factor)
        found[name] = generate(model, tokenizer, prompts, args, samples=4, max_new_tokens=12).numbers
    assert found["collapsed"]["self_bleu"] > 0.9 > 0.3 > found["as it is"]["self_bleu"]
    for n in (1, 2, 3, 4):
        assert found["collapsed"][f"distinct_{n}"] < found["as it is"][f"distinct_{n}"]


def test_the_generation_loss_is_the_teachers_of_every_sampled_token(args, make_model, tokenizer, make_rows):
    """Compute it by hand in float64, over the shared ids, the end of an answer included and the prompt left out."""
    student, teacher = make_model(300, seed=1), make_model(308, hidden_size=48, seed=2)
    rows = make_rows("prompt", 5)
    numbers, _ = generate(
        student, tokenizer, asked(rows), args, teacher, tokenizer, samples=3, max_new_tokens=40
    )  # fmt: skip
    answering = generation._Answering(student, tokenizer, args, teacher, tokenizer, 40)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    drawn = answering(prompts, 3, temperature=1.0)
    assert any(sample[-1] == tokenizer.eos_token_id for several in drawn for sample in several)
    total = count = 0
    exact = teacher.double()
    for prompt, several in zip(prompts, drawn, strict=True):
        for sample in several:
            with torch.no_grad():
                log_p = exact(input_ids=torch.tensor([prompt + sample])).logits[0, :, :300].log_softmax(-1)
            total -= log_p[len(prompt) - 1 : -1].gather(-1, torch.tensor(sample)[:, None]).sum().item()
            count += len(sample)
    assert numbers["generation_loss"] == pytest.approx(total / count, rel=1e-5)
    assert numbers["sample_tokens"] == pytest.approx(count / 15)


def test_prompts_that_are_too_long_are_left_out_and_said_so(args, make_model, tokenizer, make_rows, caplog):
    rows, model = make_rows("prompt", 8), make_model(300)
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    args.max_length = sorted(lengths)[4]
    numbers, answers = generate(model, tokenizer, asked(rows), args, samples=0, max_new_tokens=2)
    kept = [place for place, length in enumerate(lengths) if length <= args.max_length]
    assert [row["row"] for row in answers] == kept
    assert numbers["prompts"] == len(kept) < 8
    assert f"{8 - len(kept)} of 8 prompts are left out: longer than {args.max_length} tokens" in caplog.text
    args.max_length = 1
    with pytest.raises(ValueError, match="each of the 8 prompts is longer than 1 tokens: raise --max_length"):
        generate(model, tokenizer, asked(rows), args, samples=0, max_new_tokens=2)


def test_answers_stay_within_the_positions_that_a_model_has_learned(args, tokenizer, make_rows, caplog):
    rows = make_rows("prompt", 8)
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    most = sorted(lengths)[4] + 10
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=most, n_embd=32, n_layer=1, n_head=2))
    numbers, _ = generate(model, tokenizer, asked(rows), args, samples=2, max_new_tokens=10)
    assert numbers["prompts"] == sum(length <= most - 10 for length in lengths)
    with pytest.raises(
        ValueError, match=f"--max_new_tokens {most} leaves no room for a prompt in the {most} positions"
    ):
        measure(model, tokenizer, Dataset.from_list(rows), args, prompts=asked(rows), max_new_tokens=most)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_measures_answers_and_keeps_them(
    tmp_path, student_folder, teacher_folder, tokenizer, rows, args, capsys
):
    data, output = rows(tmp_path / "rows.jsonl", "messages", 8), tmp_path / "e.json"
    options = ["--teacher", teacher_folder, "--before", teacher_folder, "--data", data, "--generate", 5, "--samples", 2]
    options += ["--max_new_tokens", 7, "--batch_size", 4, "--output", output, "--use_cpu"]
    assert main([*map(str, ["evaluate", student_folder, *options])]) == 0
    found = json.loads(output.read_text())["generations"]
    assert list(found) == ["student before", "student"]
    printed = capsys.readouterr().out
    for name, file in {"student": "e.generations.jsonl", "student before": "e.before.generations.jsonl"}.items():
        of = found[name]
        assert (of["prompts"], of["samples"], of["max_new_tokens"], of["seed"]) == (5, 2, 7, 42)
        assert of["file"] == str(tmp_path / file)
        lines = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
        assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
        assert [len(line["samples"]) for line in lines] == [2] * 5
        chats = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
        assert [line["reference"] for line in lines] == [chat[-1]["content"] for chat in chats[:5]]
        assert of["rouge_l"] == pytest.approx(sum(line["rouge_l"] for line in lines) / 5)
        for number in (of["rouge_l"], of["distinct_2"], of["self_bleu"], of["generation_loss"]):
            assert f"{number:.4f}" in printed
    assert max(map(len, printed.splitlines())) <= 120

    student, teacher = (AutoModelForCausalLM.from_pretrained(f) for f in (student_folder, teacher_folder))
    read = load_rows(str(data))
    args.per_device_eval_batch_size = 4
    again = measure(student, tokenizer, read, args, teacher, tokenizer, prompts=prompted(read, 5, "rows"), samples=2,
                    max_new_tokens=7)  # fmt: skip
    assert again["generations"] | {"file": found["student"]["file"]} == found["student"]
    assert again["held_out"] == json.loads(output.read_text())["held_out"]["student"]

    # Other rows' measures make these stale.
    assert main(["evaluate", str(student_folder), "--data", str(data), "--use_cpu", "--output", str(output)]) == 0
    assert "generations" not in json.loads(output.read_text())
