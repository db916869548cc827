"""Answers that the student samples in training: GKD's share, DistiLLM's threshold and buffer, the teacher's own."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from command_line import Command
from prompt_server import PromptServer
from taid import TAIDConfig, TAIDTrainer, objectives
from taid.artifacts import report, run_folder
from taid.config.parsing import parse
from taid.training.on_policy import FILE, Row, Threshold, check_run, require_prompts, row_of

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen; the hallway smelt of boiled cabbage."
TIMING = ("tokens_per_second", "seconds")
HELD_OUT = Dataset.from_list(
    [{"prompt": TEXT[i : i + 9], "completion": TEXT[i + 9 : i + 30 + 7 * i]} for i in range(7)]
)
ENGINES = Path(__file__).parents[1] / "src" / "taid" / "assets" / "engines"
GREEDY = 1e-6  # the temperature at which a model writes what is likeliest


def rows_of(shift=0):
    """Eight rows of token ids; with another shift the same prompts with other answers, as long as before."""
    prompts = [[7 + i + j for j in range(3 + i)] for i in range(8)]
    answers = [[(50 + shift + 11 * i + j) % 290 + 3 for j in range(12 - i)] + [0] for i in range(8)]
    return Dataset.from_list(
        [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in zip(prompts, answers, strict=True)]
    )


@pytest.fixture
def make(tmp_path, student_folder, teacher_folder):
    """make(folder, data=..., held_out=..., student=..., teacher=..., **options): a trainer."""

    def make(
        name="run", data=None, held_out=HELD_OUT, student=student_folder, teacher=teacher_folder, peft=None, **options
    ):
        values = {
            "objective": "forward_kl", "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 0.3,
            "optim": "sgd", "lr_scheduler_type": "constant", "max_length": 64, "bf16": False, "logging_steps": 1,
            "activation_checkpointing": False, "save_strategy": "no", "report_to": "none", "use_cpu": True,
            "disable_tqdm": True, "sampling": "mixed", "sampling_max_new_tokens": 12,
        } | options  # fmt: skip
        names = [str(model) if isinstance(model, Path) else model for model in (student, teacher)]
        return TAIDTrainer(
            *names, TAIDConfig(output_dir=str(tmp_path / name), **values), train_dataset=data or rows_of(),
            eval_dataset=held_out, peft_config=peft,
        )  # fmt: skip

    return make


def train(trainer, resume=None):
    """Train, save, and give what is logged and the bytes of the student."""
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    logged = [{k: v for k, v in row.items() if k not in TIMING} for row in run_folder.read_metrics(folder)]
    return logged, (folder / "model.safetensors").read_bytes()


def batch_of(trainer, places=range(8)):
    return trainer.data_collator([trainer.train_dataset[place] for place in places])


def sampled(trainer, batch=None):
    """A batch with sampled answers."""
    counts = {"micro_batches": 0, "sampled": 0}
    (made,) = trainer.sampler.replaced([batch or batch_of(trainer)], counts)
    return made


def prompts_and_answers(batch):
    found = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        trained = labels != -100
        assert torch.equal(ids[trained], labels[trained])
        assert bool(mask[trained].all())
        start = int(trained.nonzero()[0])
        assert bool(trained[start : int(mask.sum())].all())
        found.append((ids[:start].tolist(), ids[trained].tolist()))
    return found


# --- what a sampled batch is ------------------------------------------------------------------------------------------


def test_the_answer_of_a_row_is_its_last_stretch_of_trained_tokens():
    assert row_of([1, 2, 3, 4], [-100, -100, 3, 4]) == Row([1, 2, 3, 4], 2)
    assert row_of([1, 2, 3, 4, 5, 6], [-100, 2, -100, 4, 5, -100]) == Row([1, 2, 3, 4, 5], 3)
    assert row_of([1, 2], [1, 2]) == Row([1, 2], 0)
    assert row_of([1, 2], [-100, -100]) is None


def test_a_sampled_batch_has_the_data_sets_prompts_and_trains_only_what_the_student_wrote_up_to_its_end_token(
    make, student_folder
):
    student = AutoModelForCausalLM.from_pretrained(student_folder)
    student.generation_config.eos_token_id = list(range(0, 300, 10))
    student.name_or_path = str(student_folder)
    trainer = make(student=student, sampling_share=1.0)
    given, made = prompts_and_answers(batch_of(trainer)), prompts_and_answers(sampled(trainer))
    assert [prompt for prompt, _ in made] == [prompt for prompt, _ in given]
    assert all(a != b for (_, a), (_, b) in zip(made, given, strict=True))
    lengths = [len(answer) for _, answer in made]
    assert min(lengths) < 12
    for _, answer in made:
        assert [token for token in answer[:-1] if token % 10 == 0] == []
        assert len(answer) == 12 or answer[-1] % 10 == 0


def test_an_answer_ends_where_max_length_does(make):
    made = prompts_and_answers(sampled(make(sampling_share=1.0, max_length=13)))
    assert [len(prompt) + len(answer) for prompt, answer in made] == [13] * 8


def test_an_answer_ends_where_the_positions_that_a_model_has_learned_do(make, tmp_path, tokenizer):
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    made = prompts_and_answers(sampled(make(student=tmp_path / "gpt2", held_out=None, sampling_share=1.0)))
    assert max(len(prompt) + len(answer) for prompt, answer in made) == 16


def test_at_a_low_temperature_answers_are_those_of_transformers_whatever_the_models_own_configuration_says(
    make, student_folder
):
    plain = AutoModelForCausalLM.from_pretrained(student_folder)
    odd = AutoModelForCausalLM.from_pretrained(student_folder)
    odd.generation_config.update(repetition_penalty=5.0, do_sample=True, min_new_tokens=3, no_repeat_ngram_size=1)
    trainer = make(student=odd, sampling_share=1.0, sampling_temperature=GREEDY)
    for prompt, answer in prompts_and_answers(sampled(trainer)):
        expected = plain.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=12
        )
        assert answer == expected[0, len(prompt) :].tolist()
    assert trainer.model.generation_config.repetition_penalty == 5.0


def test_sampling_draws_by_the_probabilities_of_the_student(make, student_folder):
    """4,000 first tokens after one prompt are as far from the student's distribution as exact draws are."""
    data = Dataset.from_list([{"input_ids": [7, 8, 9, 10], "labels": [-100, -100, 9, 10]}] * 500)
    trainer = make(data=data, sampling_share=1.0, sampling_max_new_tokens=1)
    counts, found = torch.zeros(300), {"micro_batches": 0, "sampled": 0}
    batch = batch_of(trainer, range(500))
    for made in trainer.sampler.replaced([batch] * 8, found):
        counts += torch.bincount(torch.tensor([a[0] for _, a in prompts_and_answers(made)]), minlength=300)
    logits = AutoModelForCausalLM.from_pretrained(student_folder)(torch.tensor([[7, 8]])).logits[0, -1]
    probabilities = logits.softmax(-1).detach()
    exact = torch.stack([
        torch.bincount(torch.multinomial(probabilities, 4000, replacement=True), minlength=300) for _ in range(20)
    ])  # fmt: skip
    distance = 0.5 * (counts / 4000 - probabilities).abs().sum()
    assert distance <= (0.5 * (exact / 4000 - probabilities).abs().sum(-1)).max() * 1.1


def test_no_token_is_written_that_the_teacher_does_not_share(make, student_folder, teacher_folder):
    trainer = make(student=teacher_folder, teacher=student_folder, sampling_share=1.0, sampling_temperature=100.0,
                   sampling_max_new_tokens=50)  # fmt: skip
    answers = [answer for _, answer in prompts_and_answers(sampled(trainer))]
    assert max(map(max, answers)) < 300  # of 308 rows


def test_sampling_leaves_dropout_random_numbers_and_the_models_mode_as_they_were(make, student_folder):
    student = AutoModelForCausalLM.from_pretrained(student_folder, attention_dropout=0.9)
    trainer = make(student=student, sampling_share=1.0, sampling_temperature=GREEDY)
    still = make(sampling_share=1.0, sampling_temperature=GREEDY)
    for training in (True, False):
        trainer.model.train(training)
        before = torch.get_rng_state()
        made = sampled(trainer)
        assert torch.equal(before, torch.get_rng_state())
        assert trainer.model.training is training
        assert torch.equal(made["input_ids"], sampled(still)["input_ids"])


def test_a_student_that_is_not_finite_any_more_stops_the_run_before_the_optimizer_moves(make):
    trainer = make(sampling_share=1.0, max_steps=2)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan"):
        trainer.train()


def test_steps_micro_batches_seeds_and_processes_draw_other_answers_and_the_same_ones_again(make):
    trainer = make(sampling_share=1.0)
    batch, counts = batch_of(trainer), {"micro_batches": 0, "sampled": 0}
    of_step = trainer.sampler.replaced([batch, batch], counts)
    again = trainer.sampler.replaced([batch, batch], counts)
    trainer.state.global_step = 1
    later = trainer.sampler.replaced([batch], counts)
    other_seed = make(sampling_share=1.0, seed=43).sampler.replaced([batch], counts)
    answers = [prompts_and_answers(made) for made in (*of_step, *later, *other_seed)]
    assert all(a != b for i, a in enumerate(answers) for b in answers[:i])
    assert [prompts_and_answers(made) for made in again] == answers[:2]
    assert counts == {"micro_batches": 6, "sampled": 6}


def test_a_row_of_which_nothing_is_trained_stays_one(make):
    trainer = make(sampling_share=1.0)
    filler = {"input_ids": [5, 6], "labels": [-100, -100]}
    made = sampled(trainer, trainer.data_collator([trainer.train_dataset[0], filler]))
    assert bool((made["labels"][1] == -100).all())
    assert bool((made["labels"][0] != -100).any())


@pytest.mark.parametrize("objective", ["taid", "jsd", "skew_forward_kl", "reverse_kl"])
def test_the_loss_of_a_sampled_batch_is_the_plain_formula_on_what_the_student_wrote(
    make, objective, student_folder, teacher_folder
):
    trainer = make(objective=objective, sampling_share=1.0, taid_t_start=0.4)
    (batch,), count = trainer.get_batch_samples(iter([batch_of(trainer)]), 1, torch.device("cpu"))
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    assert int(count) == int((labels != -100).sum()) == 8 * 12
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    loss.backward()
    student, teacher = (AutoModelForCausalLM.from_pretrained(f) for f in (student_folder, teacher_folder))
    mask, trained = batch["attention_mask"], labels[:, 1:] != -100
    student_NV = student(ids, attention_mask=mask).logits[:, :-1][trained][:, :300]
    teacher_NV = teacher(ids, attention_mask=mask).logits[:, :-1][trained][:, :300].detach()
    parameters = {"taid": {"t": 0.4}, "jsd": {"beta": 0.1}, "skew_forward_kl": {"skew": 0.1}}.get(objective, {})
    expected = getattr(objectives, objective)(student_NV, teacher_NV, **parameters).mean()
    expected.backward()
    assert abs(loss - expected) <= 1e-5 * expected
    for (name, ours), theirs in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-7, name


# --- which batches are sampled ----------------------------------------------------------------------------------------


def test_a_share_of_zero_trains_like_no_sampling_byte_for_byte(make):
    logged, weights = train(make("none", sampling="none"))
    logged_at_0, weights_at_0 = train(make("zero", sampling_share=0.0))
    assert weights_at_0 == weights
    assert [row.pop("sampled") for row in logged_at_0 if "loss" in row] == [0.0] * 4
    assert logged_at_0 == logged


def test_a_share_of_one_never_sees_the_data_sets_answers(make):
    logged, weights = train(make("a", sampling_share=1.0))
    assert (logged, weights) == train(make("b", data=rows_of(shift=5), sampling_share=1.0))
    assert weights != train(make("c", sampling="none"))[1]
    assert [row["sampled"] for row in logged if "loss" in row] == [1.0] * 4


@pytest.fixture
def counted(make, monkeypatch):
    """A trainer whose sampled answers are the data set's, and are counted."""

    def counted(**options):
        trainer, sampling = (made := make(**options)), made.sampler
        trainer.state.max_steps = 1_000
        sampling.times = 0

        def same(batch, writer, seed):
            sampling.times += 1
            return [Row([sampling.times] * 3, 1) for _ in batch["labels"]]

        monkeypatch.setattr(sampling, "_sampled", same)
        return trainer, {"micro_batches": 0, "sampled": 0}

    return counted


def test_the_expected_share_of_micro_batches_is_sampled(counted):
    trainer, counts = counted(sampling_share=0.3)
    batch = batch_of(trainer)
    for step in range(1_000):
        trainer.state.global_step = step
        trainer.sampler.replaced([batch, batch], counts)
    assert counts["micro_batches"] == 2_000
    assert abs(counts["sampled"] - 600) <= 4 * math.sqrt(2_000 * 0.3 * 0.7)
    assert trainer.sampler.times == counts["sampled"]


def test_the_threshold_rises_by_a_tenth_at_each_rise_of_held_out_loss_and_never_passes_one():
    threshold, found = Threshold(), []
    for step, loss in enumerate([3.0, 2.5, 2.6, 2.6, 2.7, 2.4, 2.41]):
        threshold = threshold.after(loss, step)
        found.append(threshold.value)
    assert found == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3]
    assert threshold.after(9.0, 6) == threshold  # a resumed run evaluates the step of its checkpoint again
    for step in range(7, 40):
        threshold = threshold.after(float(step), step)
    assert threshold.value == 1.0


def test_adaptive_fills_its_buffer_and_then_samples_ever_less_and_draws_the_last_rows_again(counted):
    options = {"sampling": "adaptive", "eval_strategy": "steps", "eval_steps": 1, "sampling_buffer_size": 64}
    trainer, counts = counted(**options)
    sampling, batch = trainer.sampler, batch_of(trainer)
    for step in range(20):
        trainer.state.global_step = step
        sampling.replaced([batch], counts)
    assert counts == {"micro_batches": 20, "sampled": 0}  # nothing has risen
    sampling.threshold = Threshold(rises=5, loss=1.0, step=20)
    fresh = {range(a, a + 240): 0 for a in (40, 280, 520, 760)}
    for step in range(20, 1_000):
        trainer.state.global_step, before, is_full = step, sampling.times, len(sampling.buffer) == 64
        (made,) = sampling.replaced([batch], counts)
        if made is not batch and sampling.times == before:
            assert is_full
            drawn = [ids[0] for ids, _ in prompts_and_answers(made)]
            assert all(sampling.times - 8 < number <= sampling.times for number in drawn)
        for span in fresh:
            fresh[span] += (step in span) * (sampling.times - before)
    assert abs(counts["sampled"] - 490) <= 4 * math.sqrt(980 / 4)
    for span, number in fresh.items():  # half of them sampled, of these 1 - s/N now
        expected = sum(0.5 * (1 - step / 1_000) for step in span)
        assert abs(number - expected) <= 4 * math.sqrt(expected), span
    assert len(sampling.buffer) == 64


def test_the_teachers_answers_take_the_place_of_the_data_sets_in_all_other_micro_batches(make, teacher_folder):
    trainer = make(sampling="none", seq_kd=True, sampling_temperature=GREEDY)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    for prompt, answer in prompts_and_answers(sampled(trainer)):
        mask = torch.ones(1, len(prompt))
        expected = teacher.generate(
            torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=12,
            suppress_tokens=list(range(300, 308)),
        )  # fmt: skip
        assert answer == expected[0, len(prompt) :].tolist()
    options = {"seq_kd": True, "sampling_share": 0.5, "per_device_train_batch_size": 2}
    logged, weights = train(make("a", gradient_accumulation_steps=4, **options))
    other = train(make("b", data=rows_of(shift=5), gradient_accumulation_steps=4, **options))
    assert (logged, weights) == other
    assert 0 < sum(row["sampled"] for row in logged if "loss" in row) < 4


def test_fine_tuning_on_the_teachers_answers_needs_no_share(make):
    logged, _ = train(make(objective="sft", sampling="none", seq_kd=True))
    assert "sampled" not in logged[0]


# --- what it goes together with ---------------------------------------------------------------------------------------


def test_an_adapter_samples_with_its_own_weights(make):
    peft = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make(peft=peft, sampling_share=1.0, sampling_temperature=GREEDY)
    with_adapter = prompts_and_answers(sampled(trainer))
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    for prompt, answer in with_adapter:
        mask = torch.ones(1, len(prompt))
        expected = merged.generate(torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=12)
        assert answer == expected[0, len(prompt) :].tolist()


def test_a_mixture_of_experts_samples_without_its_load_balance_and_trains_with_it(make, tmp_path, tokenizer):
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    logged, _ = train(make(student=tmp_path / "mixtral", sampling_share=1.0, max_steps=2))
    assert [row["sampled"] for row in logged if "aux_loss" in row] == [1.0, 1.0]


def test_activations_that_are_computed_again_change_nothing(make):
    options = {"sampling_share": 1.0, "max_steps": 2}
    (logged, _), (again, _) = train(make("a", **options)), train(make("b", activation_checkpointing=True, **options))
    for one, other in zip(logged, again, strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-6 * one["loss"]


def test_on_a_stream_every_row_keeps_its_turn_and_a_resumed_run_ends_alike(make):
    def stream():
        return IterableDataset.from_generator(lambda: iter(rows_of().to_list()))

    options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "sampling_share": 0.5}
    logged, weights = train(make("alone", data=stream(), **options))
    again = make("alone", data=stream(), **options)
    assert train(again, str(Path(again.args.output_dir) / "checkpoint-2")) == (logged, weights)
    assert 0 < sum(row["sampled"] for row in logged if "loss" in row) < 4


def test_a_served_teacher_is_asked_for_the_sampled_rows(make, teacher_folder):
    model, tokenizer = (cls.from_pretrained(teacher_folder) for cls in (AutoModelForCausalLM, AutoTokenizer))
    with PromptServer(model, tokenizer, max_logprobs=-1) as server:
        options = {"sampling_share": 1.0, "teacher_top_k": 300, "max_steps": 2}
        served, _ = train(make("served", held_out=None, teacher_server_url=server.url, **options))
    local, _ = train(make("local", held_out=None, sampling_share=1.0, max_steps=2))
    for one, other in zip(served, local, strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-4 * other["loss"]


def test_share_and_threshold_stand_in_the_report(make):
    trainer = make(sampling="adaptive", eval_strategy="steps", eval_steps=1, learning_rate=3.0, sampling_buffer_size=8)
    logged, _ = train(trainer)
    steps = [row for row in logged if "loss" in row]
    losses = [row["eval_loss"] for row in logged if "eval_loss" in row]
    rises = [sum(b > a for a, b in itertools.pairwise(losses[:n])) for n in range(4)]
    assert [row["sampling_threshold"] for row in steps] == [min(n / 10, 1) for n in rises]
    page = report.write_report(Path(trainer.args.output_dir)).read_text()
    assert "threshold of sampling" in page
    assert "answers of the student" in page


# --- resume -----------------------------------------------------------------------------------------------------------

ADAPTIVE = {"sampling": "adaptive", "eval_strategy": "steps", "eval_steps": 1, "sampling_buffer_size": 8}


@pytest.mark.parametrize("options", [{"sampling_share": 0.5}, ADAPTIVE], ids=["mixed", "adaptive"])
def test_a_resumed_run_ends_like_one_left_alone_byte_for_byte(make, monkeypatch, options):
    rise = [0.0]

    def after(self, loss, step, after=Threshold.after):  # a loss that rises each time: the buffer is soon in use
        rise[0] += 1
        return after(self, rise[0], step)

    monkeypatch.setattr(Threshold, "after", after)
    options = options | {"save_strategy": "steps", "save_steps": 7, "max_steps": 14, "per_device_train_batch_size": 4,
                         "optim": "adamw_torch", "learning_rate": 1e-2}  # fmt: skip
    logged, weights = train(make("run", **options))
    assert {0.0, 1.0} <= {row["sampled"] for row in logged if "loss" in row}
    rise[0] = 7.0
    again = make("run", **options)
    checkpoint = Path(again.args.output_dir) / "checkpoint-7"
    saved = json.loads((checkpoint / FILE).read_text())
    assert (len(saved["rows"]) > 0) == (options.get("sampling") == "adaptive")
    assert train(again, str(checkpoint)) == (logged, weights)


def test_a_trainer_that_begins_anew_forgets_threshold_and_buffer(make):
    trainer = make(**ADAPTIVE)
    trainer.sampler.threshold, trainer.sampler.buffer = Threshold(5, 1.0, 3), [Row([1, 2], 1)]
    trainer.sampler.start(None)
    assert (trainer.sampler.threshold, trainer.sampler.buffer) == (Threshold(), [])


def test_a_checkpoint_whose_rows_are_lost_or_damaged_is_refused(make, tmp_path):
    train(make("run", **ADAPTIVE, save_strategy="steps", save_steps=2))
    checkpoint = tmp_path / "run" / "checkpoint-4"
    for content, words in [
        ('{"threshold": {"rises": 1', "is truncated or damaged; delete checkpoint-4"),
        ("{}", "is truncated or damaged; delete checkpoint-4"),
        (None, "has no sampling.json, with threshold and rows of sampling: adaptive"),
    ]:
        (checkpoint / FILE).unlink() if content is None else (checkpoint / FILE).write_text(content)
        with pytest.raises(ValueError, match=words):
            make("run", **ADAPTIVE).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / FILE).write_text("{")
    with pytest.raises(ValueError, match="is truncated or damaged; delete checkpoint-4 to resume an earlier one"):
        run_folder.check_resumable(checkpoint)


def test_a_checkpoint_of_other_sampling_is_refused(make):
    options = {"save_strategy": "steps", "save_steps": 2}
    train(make("run", sampling_share=0.5, **options))
    for changed, words in [
        ({"sampling_share": 0.6}, "sampling_share was 0.5, is 0.6"),
        ({"sampling": "none"}, "sampling was 'mixed', is None"),
        ({"seq_kd": True}, "seq_kd was False, is True"),
    ]:
        trainer = make("run", **{"sampling_share": 0.5, **options, **changed})
        with pytest.raises(ValueError, match=words):
            trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher_cache": "cache"}, "sampling: mixed does not go together with teacher_cache: .*load the teacher"),
        ({"packing": True, "max_length": 64, "train_tokens": 100}, "with train_tokens: .*set max_steps"),
        ({"packing": True}, "with packing: .*set packing: false"),
        ({"padding_free": True}, "with padding_free: .*set padding_free: false"),
        ({"objective": "sft"}, "objective sft and kd_ratio 1.0 the student would learn its own answers"),
        ({"kd_ratio": 0.0}, "kd_ratio 0.0 the student would learn its own answers. Set sampling: none"),
        ({"sampling": "adaptive"}, "nothing is evaluated: set eval_strategy: steps and eval_steps, or"),
        ({"sampling": "none", "seq_kd": True, "packing": True}, "seq_kd: true does not go together with packing"),
        ({"seq_kd": True, "teacher_server_url": "http://localhost:1"}, "leave teacher_server_url away"),
        ({"sampling": "mixd"}, r"sampling 'mixd' does not exist; did you mean 'mixed'\?"),
        ({"sampling_share": 1.5}, r"sampling_share must lie in \[0, 1\], got 1.5"),
        ({"sampling_temperature": 0.0}, "sampling_temperature must be a positive number, got 0.0"),
        ({"sampling_max_new_tokens": 0}, "sampling_max_new_tokens must be positive, got 0"),
        ({"sampling_buffer_size": 0}, "sampling_buffer_size must be positive, got 0"),
    ],
)
def test_options_that_sampling_does_not_go_together_with_are_named_with_the_remedy(options, words):
    with pytest.raises(ValueError, match=words):
        TAIDConfig(output_dir="out", use_cpu=True, **{"sampling": "mixed", **options})


def test_rows_without_a_prompt_are_named(make):
    text = Dataset.from_list([{"text": TEXT}] * 2)
    remedy = "has no prompt .* give rows with prompt and completion .* assistant_only_loss: true, or set sampling: none"
    with pytest.raises(ValueError, match=f"row 0 of the train data set {remedy}"):
        make(data=text)
    with pytest.raises(ValueError, match=f"row 2 of the train data set {remedy}"):
        make(data=Dataset.from_list([*rows_of().to_list()[:2], {"input_ids": [1, 2], "labels": [1, 2]}]))
    with pytest.raises(ValueError, match=f"row 0 of the train data set {remedy}"):
        require_prompts(Dataset.from_list([{"input_ids": [1, 2]}]))
    stream = IterableDataset.from_generator(lambda: iter([{"text": TEXT}] * 8))
    with pytest.raises(ValueError, match=f"a row of the train data set {remedy}"):
        make(data=stream, sampling_share=1.0).train()


def test_chats_are_answered_from_their_last_turn(make):
    texts = ["Who?", "Nobody.", "One token at a time.", "Yes."]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    with pytest.raises(ValueError, match="row 0 of the train data set has no prompt"):
        make(data=Dataset.from_list([{"messages": messages}]))
    trainer = make(data=Dataset.from_list([{"messages": messages}]), assistant_only_loss=True, max_length=256,
                   eos_token="<|im_end|>", sampling_share=1.0)  # fmt: skip
    ((prompt, _),) = prompts_and_answers(sampled(trainer, batch_of(trainer, [0])))
    assert trainer.processing_class.decode(prompt).endswith("One token at a time.<|im_end|>\n<|im_start|>assistant\n")
    assert set(trainer.sampler.ends) == {0, 2}


def test_answers_that_never_end_are_warned_of(make, caplog):
    data = Dataset.from_list([{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}] * 2)
    make(data=data)
    assert "which end the student's: those will be as long as sampling_max_new_tokens. Set eos_token" in caplog.text
    caplog.clear()
    make()
    assert "sampling_max_new_tokens" not in caplog.text


def test_a_run_that_sampling_does_not_fit_is_named_with_the_remedy(make, student_folder, teacher_folder):
    with pytest.raises(ValueError, match="there are 2 held-out data sets: give one"):
        make(held_out={"a": HELD_OUT, "b": HELD_OUT}, **ADAPTIVE)
    with pytest.raises(ValueError, match=r"sampling_buffer_size 7 is less than the 8 rows .* set at least 8"):
        make(**ADAPTIVE | {"sampling_buffer_size": 7})
    with pytest.raises(ValueError, match="seq_kd: true needs a teacher that each process has whole"):
        make(objective="sft", teacher=None, sampling="none", seq_kd=True)
    images = Dataset.from_list([{"images": [Image.new("RGB", (8, 8))], "prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="answers are not sampled for rows with images: set sampling: none"):
        make(data=images)
    with pytest.raises(ValueError, match="compute together does not sample: leave distributed_config away"):
        check_run(TAIDConfig(use_cpu=True, bf16=False), None, None, None, tensor_parallel=2)


def test_a_student_with_the_teachers_tokenizer_ends_by_that_tokenizers_end_token(make):
    trainer = make(tokenizer_from="teacher", sampling_share=1.0)
    assert trainer.sampler.ends == [0]
    assert len(prompts_and_answers(sampled(trainer))) == 8


# --- through the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, student_folder, teacher_folder):
    """Write a recipe for a run in `folder` and return its path."""
    rows = [{"prompt": TEXT[: 5 + 2 * i], "completion": TEXT[5 + 2 * i : 20 + 7 * i]} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))

    def write(folder, **options):
        values = {
            "model_name_or_path": str(student_folder), "teacher_model_name_or_path": str(teacher_folder),
            "dataset_name": str(tmp_path / "train.jsonl"), "eval_dataset_name": str(tmp_path / "held_out.jsonl"),
            "output_dir": str(folder), "max_steps": 24, "per_device_train_batch_size": 4, "learning_rate": 1.0,
            "optim": "sgd", "lr_scheduler_type": "constant", "bf16": False, "activation_checkpointing": False,
            "objective": "skew_forward_kl", "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 2,
            "save_strategy": "steps", "save_steps": 4, "report_to": "none", "use_cpu": True,
            "sampling_max_new_tokens": 12, "sampling_buffer_size": 8,
        }  # fmt: skip
        path = tmp_path / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(values | options))
        return path

    return write


# The command line where every evaluation is a rise, so that a short run has a threshold and a buffer.
RISING = """
import sys
from taid.cli.main import main
from taid.training import engines, on_policy
after = on_policy.Threshold.after
on_policy.Threshold.after = lambda self, loss, step: after(self, float(step), step)
engines.leave(main(sys.argv[1:]))
"""


def command(*arguments, folder, engine=None):
    if engine is None:
        return Command(arguments, code=RISING)
    script = folder / "rising.py"
    script.write_text(RISING)
    launcher = ["accelerate.commands.launch", "--config_file", str(ENGINES / f"{engine}.yaml"), "--num_processes", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]


def metrics(folder):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run_folder.read_metrics(folder)]


@pytest.mark.cli
@pytest.mark.parametrize("sampling", ["mixed", "adaptive"])
def test_a_killed_and_resumed_run_ends_like_one_left_alone_byte_for_byte(recipe, tmp_path, sampling):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finish(command("train", "--config", recipe(alone, sampling=sampling), folder=tmp_path))
    process = command("train", "--config", recipe(killed, sampling=sampling), folder=tmp_path)
    deadline = time.time() + 300
    while not (killed / "checkpoint-8").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "model.safetensors").exists(), "the run was over before the kill"
    finish(command("train", "--config", recipe(killed, sampling=sampling), "--resume_from_checkpoint", folder=tmp_path))
    assert (killed / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert metrics(killed) == metrics(alone)
    assert any(row.get("sampled") for row in metrics(alone))


@pytest.mark.cli
@pytest.mark.slow
def test_two_processes_resume_with_the_buffer_that_they_share(recipe, tmp_path):
    run = tmp_path / "run"
    path = recipe(run, sampling="adaptive", max_steps=12)
    finish(command("train", "--config", path, folder=tmp_path, engine="ddp"))
    logged, weights = metrics(run), (run / "model.safetensors").read_bytes()
    assert len(json.loads((run / "checkpoint-8" / FILE).read_text())["rows"]) == 8
    shutil.rmtree(run / "checkpoint-12")
    finish(command("train", "--config", path, "--resume_from_checkpoint", folder=tmp_path, engine="ddp"))
    assert (metrics(run), (run / "model.safetensors").read_bytes()) == (logged, weights)


@pytest.mark.cli
@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "engine"), [("mixed", "ddp"), ("adaptive", "ddp"), ("adaptive", "fsdp2")])
def test_two_processes_sample_the_same_micro_batches_and_what_one_process_samples(recipe, tmp_path, sampling, engine):
    """The answers are the likeliest ones, so that they do not depend on which process draws them."""
    options = {"sampling": sampling, "sampling_temperature": GREEDY, "save_strategy": "no", "logging_steps": 1,
               "max_steps": 12, "eval_steps": 1}  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    path = recipe(one, **options | {"per_device_train_batch_size": 8})
    finish(command("train", "--config", path, folder=tmp_path))
    finish(command("train", "--config", recipe(two, **options), folder=tmp_path, engine=engine))
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"epoch"}:
            assert abs(a[name] - b[name]) <= 1e-4 * abs(a[name]) + 1e-9, (name, a["step"])
    assert {0.0, 1.0} <= {row["sampled"] for row in metrics(one) if "loss" in row}


def test_a_recipe_samples_in_its_dry_run(recipe, tmp_path, capsys):
    from taid.cli.main import main

    path = recipe(tmp_path / "run", sampling="adaptive", seq_kd=True, sampling_buffer_size=1000)
    _, _, args = parse(["--config", str(path)])
    assert (args.sampling, args.sampling_buffer_size) == ("adaptive", 1000)
    assert main(["train", "--config", str(path), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "dry run passed" in out
    assert "without the time in which answers are sampled" in out
