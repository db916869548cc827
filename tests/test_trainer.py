"""The trainer: one number a step, whatever way the rows are split, and nothing of SFTTrainer lost."""

import json
import math
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)  # fmt: skip
from trl import SFTConfig, SFTTrainer

from taid import TAIDConfig, TAIDSchedule, TAIDTrainer, objectives
from taid.artifacts import run_folder
from taid.losses.objective_table import OBJECTIVES
from taid.losses.schedules import AutoSchedule, CurriculumTemperature
from taid.training import resume, upstream
from taid.training.callbacks import StepProgress

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen; the hallway smelt of boiled cabbage."
PROMPT_COMPLETION = Dataset.from_list(
    [{"prompt": TEXT[: 4 + 3 * i], "completion": TEXT[4 + 3 * i : 20 + 9 * i]} for i in range(8)]
)
HELD_OUT = Dataset.from_list(
    [{"prompt": TEXT[i : i + 9], "completion": TEXT[i + 9 : i + 30 + 7 * i]} for i in range(7)]
)


def config(folder, **options):
    options = {
        "objective": "taid", "taid_alpha": 0.8, "taid_beta": 0.5, "max_steps": 4, "per_device_train_batch_size": 8,
        "learning_rate": 0.3, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "max_length": 256,
        "bf16": False, "activation_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    } | options  # fmt: skip
    return TAIDConfig(output_dir=str(folder), **options)


def train(folder, student, teacher, data=PROMPT_COMPLETION, held_out=None, model_options=None, **options):
    trainer = TAIDTrainer(
        str(student) if isinstance(student, Path) else student,
        str(teacher) if isinstance(teacher, Path) else teacher,
        config(folder, **options),
        train_dataset=data,
        eval_dataset=held_out,
        **(model_options or {}),
    )
    trainer.train()
    rows = run_folder.read_metrics(Path(folder))
    return trainer, [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def relative(a, b):
    return abs(a - b) / max(abs(b), 1e-12)


# --- a teacher in fewer bits ------------------------------------------------------------------------------------------


def test_a_quantized_teacher_says_something_else_the_fewer_bits_the_more(tmp_path, student_folder, teacher_folder):
    """Against the whole teacher as its own student, what is left of the KL is what fewer bits have changed."""

    def kl(student, bits):
        options = {"teacher_quantization": bits, "eval_on_start": True, "max_steps": 1}
        _, _, held_out = train(
            tmp_path / f"{student.name} {bits}", student, teacher_folder, held_out=HELD_OUT, **options
        )
        return held_out[0]["eval_kl"]

    assert kl(teacher_folder, None) < 1e-12
    assert 1e-8 < kl(teacher_folder, "bnb_8bit") < kl(teacher_folder, "bnb_4bit") < kl(student_folder, None)


# --- an objective of one's own ----------------------------------------------------------------------------------------


def my_kl(student_logits, teacher_logits):
    teacher_log_probs = teacher_logits.log_softmax(-1)
    return F.kl_div(student_logits.log_softmax(-1), teacher_log_probs, log_target=True, reduction="none").sum(-1)


def test_an_objective_of_ones_own_trains_like_the_one_that_it_is(tmp_path, student_folder, teacher_folder):
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "kd_ratio": 0.7}
    options = {"objective": my_kl}
    own, rows, _ = train(tmp_path / "own", student_folder, teacher_folder, model_options=options, **split)
    _, expected, _ = train(tmp_path / "named", student_folder, teacher_folder, objective="forward_kl", **split)
    for a, b in zip(rows, expected, strict=True):
        assert max(relative(a[name], b[name]) for name in ("loss", "grad_norm", "kl", "cross_entropy")) < 1e-5
    assert own.configuration["objective"] == "my_kl"
    assert "t" not in rows[0]


def test_the_name_of_an_objective_is_no_function(tmp_path, student_folder, teacher_folder):
    with pytest.raises(TypeError, match="objective is a function of both logits, not 'forward_kl'"):
        train(tmp_path, student_folder, teacher_folder, model_options={"objective": "forward_kl"})


@pytest.mark.parametrize("wrong", [lambda z, p: z.sum(), lambda z, p: z - p, lambda z, p: None])
def test_an_objective_that_gives_no_value_a_token_is_named(tmp_path, student_folder, teacher_folder, wrong):
    with pytest.raises(ValueError, match=r"an objective gives one value a token, \[\d+\]; yours gave"):
        train(tmp_path, student_folder, teacher_folder, model_options={"objective": wrong})


def test_an_objective_without_a_gradient_is_named(tmp_path, student_folder, teacher_folder):
    options = {"objective": lambda z, p: my_kl(z.detach(), p)}
    with pytest.raises(ValueError, match="has no gradient: it must not detach the student's logits"):
        train(tmp_path, student_folder, teacher_folder, model_options=options)


# --- one number a step ------------------------------------------------------------------------------------------------

SPLITS = {
    "4 rows twice": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "1 row eight times": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "padding-free": {"padding_free": True, "max_length": None},
    "padding-free, 4 rows twice": {
        "padding_free": True, "max_length": None, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    },
    "packed": {"packing": True, "max_length": 256},
    "activation checkpointing": {"activation_checkpointing": True},
}  # fmt: skip


@pytest.fixture(scope="module", params=["taid", "forward_kl"])
def whole(request, tmp_path_factory, student_folder, teacher_folder):
    """Eight padded rows at once: what every other split is compared with."""
    folder = tmp_path_factory.mktemp("whole")
    return request.param, train(folder, student_folder, teacher_folder, objective=request.param)[1]


@pytest.mark.parametrize("split", SPLITS)
def test_loss_gradient_norm_and_t_do_not_depend_on_how_the_rows_are_split(
    split, whole, tmp_path, student_folder, teacher_folder
):
    objective, expected = whole
    _, steps, _ = train(tmp_path, student_folder, teacher_folder, objective=objective, **SPLITS[split])
    assert len(steps) == len(expected) == 4
    for row, reference in zip(steps, expected, strict=True):
        for name in ("loss", "grad_norm", "kl", "cross_entropy", "entropy", *(["t"] if objective == "taid" else [])):
            assert relative(row[name], reference[name]) < 1e-5, (name, row["step"])
        assert row["num_tokens"] == reference["num_tokens"]
        if objective == "taid" and row["step"] > 2:  # else t would say nothing about the loss
            assert row["t"] > 1.001 * TAIDSchedule(4).linear(row["step"] - 2)
        assert row["mean_token_accuracy"] == reference["mean_token_accuracy"]


def test_the_first_loss_is_the_objective_summed_over_trained_tokens_and_divided_once(
    tmp_path, student_folder, teacher_folder, tokenizer
):
    _, steps, _ = train(tmp_path, student_folder, teacher_folder, max_steps=1)
    student, teacher = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (student_folder, teacher_folder))
    total, kl, count = 0.0, 0.0, 0
    with torch.no_grad():
        for row in PROMPT_COMPLETION:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
            start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            x, shared = torch.tensor([ids]), len(tokenizer)
            logits = [model(x).logits[0, start - 1 : -1, :shared] for model in (student, teacher)]
            total += objectives.taid(*logits, t=0.4).double().sum().item()
            kl += objectives.forward_kl(*logits).double().sum().item()
            count += len(ids) - start
    assert relative(steps[0]["loss"], total / count) < 1e-5
    assert relative(steps[0]["kl"], kl / count) < 1e-5


def test_a_step_whose_tokens_are_all_untrained_gives_zero_and_leaves_t(tmp_path, student_folder, teacher_folder):
    ids = [5, 6, 7, 8, 9]
    data = Dataset.from_list([{"input_ids": ids, "labels": [5, -100, -100, -100, -100]} for _ in range(8)])
    as_it_is = {"skip_prepare_dataset": True}  # or the rows would be refused
    trainer, steps, _ = train(tmp_path, student_folder, teacher_folder, data=data, max_steps=3, dataset_kwargs=as_it_is)
    assert [row["loss"] for row in steps] == [0.0] * 3
    assert [row["grad_norm"] for row in steps] == [0.0] * 3
    assert trainer.t == 0.4


# --- t ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["kl", "cross_entropy"])
def test_t_follows_the_schedule_fed_with_the_losses_of_the_run(signal, tmp_path, student_folder, teacher_folder):
    trainer, steps, _ = train(tmp_path, student_folder, teacher_folder, max_steps=6, taid_signal=signal)
    schedule = TAIDSchedule(6, alpha=0.8, beta=0.5)
    state = schedule.initial_state()
    for row in steps:
        assert row["t"] == state.t
        # The logged loss is the KL; only that signal can be replayed from the log.
        state = schedule.advance(state, row["loss"]) if signal == "kl" else state
        if signal == "cross_entropy":
            break
    else:
        assert trainer.t == state.t
    assert trainer.t > 0.4


def test_the_cross_entropy_signal_moves_t_and_not_the_gradient(tmp_path, student_folder, teacher_folder):
    runs = {
        signal: train(tmp_path / signal, student_folder, teacher_folder, taid_signal=signal, taid_beta=0.0)[1]
        for signal in ("kl", "cross_entropy")
    }
    for name in ("loss", "grad_norm"):
        assert runs["kl"][0][name] == runs["cross_entropy"][0][name]
    assert runs["kl"][2]["momentum"] != runs["cross_entropy"][2]["momentum"]


def test_auto_moves_t_by_the_losses_of_the_run_and_is_evaluated_as_forward_kl(tmp_path, student_folder, teacher_folder):
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "taid_schedule": "auto"}
    trainer, steps, held_out = train(tmp_path, student_folder, teacher_folder, held_out=HELD_OUT, **options)
    schedule = AutoSchedule(6)
    state = schedule.initial_state()
    for row in steps:
        assert row["t"] == state.t
        assert "momentum" not in row
        state = schedule.advance(state, row["loss"])
    assert trainer.t == state.t == pytest.approx(0.95)
    for row in held_out:
        assert row["eval_loss"] == pytest.approx(row["eval_kl"], rel=1e-6)


def test_auto_goes_on_from_a_checkpoint_and_not_from_one_of_the_papers_schedule(
    tmp_path, student_folder, teacher_folder
):
    options = {"taid_schedule": "auto", "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    _, alone, _ = train(tmp_path / "auto", student_folder, teacher_folder, **options)
    args = config(tmp_path / "auto", **options)
    trainer = TAIDTrainer(str(student_folder), str(teacher_folder), args, train_dataset=PROMPT_COMPLETION)
    trainer.train(resume_from_checkpoint=str(tmp_path / "auto" / "checkpoint-2"))
    again = [row for row in trainer.state.log_history if "t" in row]
    assert [(row["t"], row["loss"]) for row in again] == [(row["t"], row["loss"]) for row in alone]

    train(tmp_path / "paper", student_folder, teacher_folder, **(options | {"taid_schedule": "paper"}))
    args = config(tmp_path / "paper", **options)
    trainer = TAIDTrainer(str(student_folder), str(teacher_folder), args, train_dataset=PROMPT_COMPLETION)
    with pytest.raises(ValueError, match="taid_schedule was 'paper', is 'auto'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "paper" / "checkpoint-2"))


def test_a_checkpoint_from_before_there_was_a_choice_of_schedules_is_one_of_the_papers():
    resume.require_same({"taid_alpha": 0.5}, {"taid_schedule": "paper", "taid_alpha": 0.5})
    with pytest.raises(ValueError, match=r"another run: taid_schedule was 'paper', is 'auto'\. Resume"):
        resume.require_same({"taid_alpha": 0.5}, {"taid_schedule": "auto", "taid_alpha": 0.5})


def test_evaluation_does_not_move_t(tmp_path, student_folder, teacher_folder):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    _, plain, _ = train(tmp_path / "a", student_folder, teacher_folder)
    _, evaluated, held_out = train(tmp_path / "b", student_folder, teacher_folder, held_out=HELD_OUT, **options)
    assert len(held_out) == 5
    for name in ("t", "momentum", "loss", "grad_norm"):
        assert [row[name] for row in plain] == [row[name] for row in evaluated]


# --- what the loss is made of -----------------------------------------------------------------------------------------


def test_sft_is_trl_s_own_sft(tmp_path, student_folder, teacher_folder):
    _, ours, _ = train(tmp_path / "a", student_folder, None, objective="sft")
    options = vars(config(tmp_path / "b")) | {"objective": "sft"}
    names = {f for f in SFTConfig.__dataclass_fields__ if SFTConfig.__dataclass_fields__[f].init}
    args = SFTConfig(**{k: v for k, v in options.items() if k in names and not k.startswith("gradient_checkp")})
    args.dataloader_pin_memory = False
    trainer = SFTTrainer(str(student_folder), args, train_dataset=PROMPT_COMPLETION)
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
            assert relative(a[name], b[name]) < 1e-5, name


def test_kd_ratio_mixes_the_objective_with_the_labels(tmp_path, student_folder, teacher_folder):
    _, steps, _ = train(tmp_path, student_folder, teacher_folder, objective="forward_kl", kd_ratio=0.7)
    for row in steps:
        assert relative(row["loss"], 0.7 * row["kl"] + 0.3 * row["cross_entropy"]) < 1e-6
    pure = {name: train(tmp_path / name, student_folder, teacher_folder, objective=name, max_steps=1)[1][0]["grad_norm"]
            for name in ("forward_kl", "sft")}  # fmt: skip
    assert steps[0]["grad_norm"] < 0.7 * pure["forward_kl"] + 0.3 * pure["sft"]


WITH_A_TEACHER = [name for name in OBJECTIVES if name != "sft"]


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("objective", WITH_A_TEACHER)
def test_the_fused_loss_trains_like_the_plain_formula(objective, kd_ratio, tmp_path, student_folder, teacher_folder):
    options = {"objective": objective, "kd_ratio": kd_ratio, "max_steps": 3, "learning_rate": 0.03}
    runs = [
        train(
            tmp_path / str(fused),
            student_folder,
            teacher_folder,
            held_out=HELD_OUT,
            fused=fused,
            eval_strategy="steps",
            eval_steps=3,
            **options,
        )
        for fused in (True, False)
    ]
    for kind in (1, 2):
        for row, reference in zip(runs[0][kind], runs[1][kind], strict=True):
            assert row.keys() == reference.keys()
            for name in row.keys() - {"seconds", "tokens_per_second"}:
                # Momentum is a difference of losses by one of them: what they are off relatively, it is off absolutely.
                allowed = 1e-6 if name == "momentum" else 1e-5 * abs(reference[name])
                assert abs(row[name] - reference[name]) <= allowed, (name, row["step"])


def test_ctkd_learns_its_temperature_and_keeps_it(tmp_path, student_folder, teacher_folder):
    options = {"objective": "ctkd", "max_steps": 6, "learning_rate": 0.01}
    trainer, steps, _ = train(tmp_path / "whole", student_folder, teacher_folder, **options)
    temperatures = [row["temperature"] for row in steps]
    start = CurriculumTemperature(6).temperature(CurriculumTemperature(6).initial_state())
    assert temperatures[:2] == [start, start]  # lambda is 0 in the first step
    assert len(set(temperatures)) == 5
    assert trainer.objective_state.temperature != temperatures[-1]

    saving = {**options, "save_strategy": "steps", "save_steps": 2}
    train(tmp_path / "resumed", student_folder, teacher_folder, **saving)
    resumed = TAIDTrainer(str(student_folder), str(teacher_folder), config(tmp_path / "resumed", **saving),
                          train_dataset=PROMPT_COMPLETION)  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    rows = [row for row in run_folder.read_metrics(tmp_path / "resumed") if "loss" in row]
    assert [row["temperature"] for row in rows] == temperatures
    assert resumed.objective_state.temperature == trainer.objective_state.temperature


def test_the_temperature_goes_up_the_loss(tmp_path, student_folder, teacher_folder):
    """The gradient is that of the mean loss over the step's tokens, by finite differences in float64."""
    trainer, _, _ = train(tmp_path, student_folder, teacher_folder, objective="ctkd", max_steps=2, learning_rate=1e-30)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(f).double().eval() for f in (student_folder, teacher_folder)
    )
    schedule = CurriculumTemperature(2)
    state = schedule.initial_state()
    total, count = {-1: 0.0, 1: 0.0}, 0
    with torch.no_grad():
        for row in trainer.train_dataset:
            x, y = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            z_q, z_p = (model(x).logits[0, :-1, :300][y != -100] for model in (student, teacher))
            for sign in total:
                T = schedule.temperature(state) + sign * 1e-4
                log_q, log_p = (z_q / T).log_softmax(-1), (z_p / T).log_softmax(-1)
                total[sign] += T * T * (log_p.exp() * (log_p - log_q)).sum().item()
            count += len(z_q)
    gradient = (total[1] - total[-1]) / 2e-4 / count
    for _ in range(2):
        state = schedule.advance(state, gradient)
    assert abs(trainer.objective_state.state.theta - state.theta) < 1e-4 * abs(state.theta - schedule.initial)


@pytest.mark.parametrize(
    "objective", [name for name, known in OBJECTIVES.items() if not known.moves and name not in ("forward_kl", "sft")]
)
def test_every_objective_falls_under_training(objective, tmp_path, student_folder, teacher_folder):
    _, steps, _ = train(tmp_path, student_folder, teacher_folder, objective=objective, max_steps=8, learning_rate=1.0)
    assert steps[-1]["loss"] < 0.999 * steps[0]["loss"]


def test_held_out_figures_are_means_over_all_held_out_tokens(tmp_path, student_folder, teacher_folder, tokenizer):
    trainer, _, _ = train(
        tmp_path, student_folder, teacher_folder, held_out=HELD_OUT, per_device_eval_batch_size=3, max_steps=1
    )
    metrics = trainer.evaluate()
    student, teacher = trainer.model.eval(), trainer.teacher.model
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            kept, shared = labels != -100, len(tokenizer)
            q, p = (m(ids).logits[0, :-1, :shared][kept].double().log_softmax(-1) for m in (student, teacher))
            entropies = [F.nll_loss(x, labels[kept], reduction="sum") for x in (q, p)]
            sums += torch.stack([*entropies, (p.exp() * (p - q)).sum(), kept.sum()])
    means = (sums / sums[3]).tolist()
    assert metrics["eval_tokens"] == sums[3]
    names = ("eval_cross_entropy", "eval_teacher_cross_entropy", "eval_kl")
    for name, mean in zip(names, means, strict=False):
        assert relative(metrics[name], mean) < 1e-5, name
    assert relative(metrics["eval_loss"], means[2]) < 1e-5  # TAID is evaluated at t_end = 1


def test_rows_that_are_no_token_get_no_probability_and_no_gradient(tmp_path, teacher_folder, tokenizer):
    """The student's head is padded far beyond the vocabulary, with large weights that would drown all tokens."""
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_pretrained(teacher_folder)
    student.resize_token_embeddings(len(tokenizer) + 40, mean_resizing=False)
    with torch.no_grad():
        student.lm_head.weight[len(tokenizer) :] = 100.0
    before = student.lm_head.weight.detach().clone()
    _, steps, _ = train(tmp_path, student, teacher_folder, objective="forward_kl",
                        model_options={"processing_class": tokenizer})  # fmt: skip
    assert steps[0]["kl"] < 1e-6
    assert torch.equal(student.lm_head.weight[len(tokenizer) :], before[len(tokenizer) :])


def make_mixture(tokenizer):
    torch.manual_seed(0)
    shape = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5,
    )  # fmt: skip
    return MixtralForCausalLM(shape)


def test_a_mixture_of_experts_is_resumed_and_its_best_checkpoint_loaded(tmp_path, teacher_folder, tokenizer):
    """Experts have other names on disk than in memory, by which transformers loads: it would begin anew."""
    options = {"max_steps": 6, "per_device_train_batch_size": 3, "optim": "adamw_torch", "learning_rate": 1e-3,
               "save_strategy": "steps", "save_steps": 2, "model_options": {"processing_class": tokenizer}}  # fmt: skip
    train(tmp_path / "alone", make_mixture(tokenizer), teacher_folder, **options)
    shutil.copytree(tmp_path / "alone" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    shutil.copy(tmp_path / "alone" / "metrics.jsonl", tmp_path / "again")
    settings = config(tmp_path / "again", **{k: v for k, v in options.items() if k != "model_options"})
    again = TAIDTrainer(make_mixture(tokenizer), str(teacher_folder), settings, PROMPT_COMPLETION,
                        processing_class=tokenizer)  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    weights = [(tmp_path / name / "checkpoint-6" / "model.safetensors").read_bytes() for name in ("alone", "again")]
    assert weights[0] == weights[1]

    options |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 3.0}
    trainer, _, _ = train(tmp_path / "best", make_mixture(tokenizer), teacher_folder, held_out=HELD_OUT, **options)
    shown = {"eval_loss": 1.0, "eval_cross_entropy": 2.0, "eval_kl": 1.0, "eval_teacher_cross_entropy": 1.5,
             "eval_aux_loss": 3.0}  # fmt: skip
    StepProgress().on_log(None, trainer.state, None, logs=shown)  # no data set is called "aux"
    best = MixtralForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert all(torch.equal(weight, trainer.model.state_dict()[name]) for name, weight in best.state_dict().items())


def test_the_router_loss_of_a_mixture_of_experts_is_kept(tmp_path, teacher_folder, tokenizer):
    make_mixture(tokenizer).save_pretrained(tmp_path / "moe")
    runs = []
    for coefficient in (0.5, 0.0):
        student = MixtralForCausalLM.from_pretrained(tmp_path / "moe")
        _, steps, _ = train(
            tmp_path / str(coefficient), student, teacher_folder, objective="forward_kl",
            router_aux_loss_coef=coefficient, model_options={"processing_class": tokenizer},
        )  # fmt: skip
        runs.append(steps)
    assert 1.0 < runs[0][0]["aux_loss"] < 8.0
    assert "aux_loss" not in runs[1][0]
    assert relative(runs[0][0]["kl"], runs[1][0]["kl"]) < 1e-6
    assert relative(runs[0][0]["grad_norm"], runs[1][0]["grad_norm"]) > 1e-4


def test_the_teacher_is_frozen_without_dropout_and_never_saved(tmp_path, student_folder, teacher_folder):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, attention_dropout=0.5)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    trainer, steps, _ = train(
        tmp_path, student_folder, teacher.train(), learning_rate=0.0, objective="forward_kl",
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    assert max(row["kl"] for row in steps) / min(row["kl"] for row in steps) < 1 + 1e-6
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert all(weight.grad is None for weight in teacher.parameters())
    trainer.save_model()
    student_size = sum(w.numel() for w in trainer.model.parameters())
    for saved in tmp_path.rglob("*.safetensors"):
        assert sum(w.numel() for w in load_file(saved).values()) <= student_size
    assert not list(tmp_path.rglob("training_args.bin"))


def test_bf16_stays_near_float32(tmp_path, student_folder, teacher_folder):
    _, exact, _ = train(tmp_path / "a", student_folder, teacher_folder, max_steps=1)
    _, rounded, _ = train(tmp_path / "b", student_folder, teacher_folder, max_steps=1, bf16=True)
    assert relative(rounded[0]["loss"], exact[0]["loss"]) < 0.05
    assert relative(rounded[0]["cross_entropy"], exact[0]["cross_entropy"]) < 1e-3


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_chat_and_plain_text_train_on_every_token(kind, tmp_path, student_folder, teacher_folder, tokenizer):
    talk = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "Nobody at all."}]
    data = Dataset.from_list([{"messages": talk} if kind == "messages" else {"text": TEXT}] * 8)
    trainer, steps, _ = train(tmp_path, student_folder, teacher_folder, data=data, max_steps=2)
    ids = trainer.train_dataset[0]["input_ids"]
    assert trainer.train_dataset[0]["labels"] == ids
    assert steps[0]["num_tokens"] == 8 * len(ids)
    assert steps[1]["loss"] < 1.5 * steps[0]["loss"]


# --- adapters, saving, resuming ---------------------------------------------------------------------------------------


def test_a_lora_student_trains_saves_loads_and_generates(tmp_path, student_folder, teacher_folder, tokenizer):
    trainer, steps, _ = train(
        tmp_path, student_folder, teacher_folder, learning_rate=5.0, max_steps=6, objective="forward_kl",
        model_options={"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])},
    )  # fmt: skip
    assert steps[-1]["loss"] < steps[0]["loss"]
    trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student_folder), tmp_path).eval()
    inputs = tokenizer("It was", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits, atol=1e-6)
    assert loaded.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["down_proj"]}])
def test_an_adapter_is_trained_on_and_resumed(kind, tmp_path, student_folder, teacher_folder):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", **kind)
    options = {"learning_rate": 5.0, "objective": "forward_kl", "save_strategy": "steps", "save_steps": 2}
    first, _, evaluated = train(
        tmp_path / "first", student_folder, teacher_folder, held_out=HELD_OUT, eval_strategy="steps", eval_steps=4,
        model_options={"peft_config": lora}, **options,
    )  # fmt: skip
    first.save_model()
    whole, steps, again = train(
        tmp_path / "second", tmp_path / "first", teacher_folder, held_out=HELD_OUT, eval_strategy="steps", eval_steps=4,
        eval_on_start=True, **options,
    )  # fmt: skip
    assert again[0]["eval_cross_entropy"] == evaluated[-1]["eval_cross_entropy"]  # it begins where the first ended
    assert all(row["grad_norm"] > 0 for row in steps)
    assert again[-1]["eval_kl"] < again[0]["eval_kl"]
    assert not (tmp_path / "second" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(student_folder).state_dict()
    for name, weight in whole.model.get_base_model().state_dict().items():
        if "lora_" not in name and "modules_to_save" not in name:
            assert torch.equal(weight, base[name.replace(".base_layer", "").replace(".original_module", "")])
    whole.save_model()
    expected = (tmp_path / "second" / "adapter_model.safetensors").read_bytes()
    assert expected != (tmp_path / "first" / "adapter_model.safetensors").read_bytes()
    args = config(tmp_path / "second", eval_strategy="steps", eval_steps=4, eval_on_start=True, **options)
    resumed = TAIDTrainer(
        str(tmp_path / "first"), str(teacher_folder), args, train_dataset=PROMPT_COMPLETION, eval_dataset=HELD_OUT
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-2"))
    resumed.save_model()
    assert (tmp_path / "second" / "adapter_model.safetensors").read_bytes() == expected


def test_an_adapter_is_not_given_another(tmp_path, student_folder, teacher_folder):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    train(tmp_path / "first", student_folder, teacher_folder, model_options={"peft_config": lora})[0].save_model()
    with pytest.raises(ValueError, match=r"student .*first' is an adapter, and is trained on as it is: leave use_peft"):
        train(tmp_path / "b", tmp_path / "first", teacher_folder, model_options={"peft_config": lora})
    with pytest.raises(ValueError, match=r"tokenizer_from: teacher .* student .*first' is an adapter: merge it first"):
        train(tmp_path / "b", tmp_path / "first", teacher_folder, tokenizer_from="teacher")


def test_a_student_of_which_nothing_is_trained_is_an_error(tmp_path, student_folder, teacher_folder, tokenizer):
    student = AutoModelForCausalLM.from_pretrained(student_folder).requires_grad_(False)
    with pytest.raises(ValueError, match="no weight of the student can be trained"):
        train(tmp_path, student, teacher_folder, model_options={"processing_class": tokenizer})


def test_the_student_folder_is_an_ordinary_one(tmp_path, student_folder, teacher_folder, tokenizer):
    trainer, _, _ = train(tmp_path, student_folder, teacher_folder)
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    inputs = tokenizer("It was", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)
    assert loaded.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"objective": "forward_kl"}, "objective was 'taid', is 'forward_kl'"),
        ({"max_steps": 5}, "total_steps was 4, is 5"),
        ({"taid_t_start": 0.2}, "taid_t_start was 0.4, is 0.2"),
        ({"taid_alpha": "auto"}, "taid_alpha was 0.8, is 'auto'"),
        ({"kd_ratio": 0.5}, "kd_ratio was 1.0, is 0.5"),
        ({"learning_rate": 0.1}, "learning_rate was 0.3, is 0.1"),
        ({"gradient_accumulation_steps": 2, "max_steps": 4}, "rows_per_step was 8, is 16"),
        ({"optim": "adamw_torch"}, "optim was 'sgd', is 'adamw_torch'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    changed, named, tmp_path, student_folder, teacher_folder
):
    train(tmp_path, student_folder, teacher_folder, save_strategy="steps", save_steps=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    args = config(tmp_path, **({"save_strategy": "steps", "save_steps": 2} | changed))
    trainer = TAIDTrainer(str(student_folder), str(teacher_folder), args, train_dataset=PROMPT_COMPLETION)
    with pytest.raises(ValueError, match=named):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("full", ["torch.save", "safetensors.torch.save_file"])
def test_a_checkpoint_that_cannot_be_written_is_named_and_the_one_before_goes_on(
    full, tmp_path, student_folder, teacher_folder, monkeypatch
):
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    alone, _, _ = train(tmp_path / "alone", student_folder, teacher_folder, **options)

    def refuse(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\n")

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                monkeypatch.setattr(full, refuse)
                monkeypatch.setattr("transformers.modeling_utils.safe_save_file", refuse)

    with pytest.raises(
        OSError, match=r"could not be written \(.*unexpected pos 64 vs 0\): is the disk full\? Make room"
    ):
        train(tmp_path / "full", student_folder, teacher_folder, model_options={"callbacks": [Fill()]}, **options)
    monkeypatch.undo()
    last = run_folder.last_checkpoint(tmp_path / "full")
    assert last.name == "checkpoint-2"
    args = config(tmp_path / "full", **options)
    again = TAIDTrainer(str(student_folder), str(teacher_folder), args, train_dataset=PROMPT_COMPLETION)
    again.train(resume_from_checkpoint=str(last))
    expected = alone.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.model.state_dict().items())


class Poison(TrainerCallback):
    """Breaks one weight of the student after a given step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.get_output_embeddings().weight.data[0, 0] = math.nan


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path, student_folder, teacher_folder):
    args = config(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    trainer = TAIDTrainer(
        str(student_folder), str(teacher_folder), args, train_dataset=PROMPT_COMPLETION, callbacks=[Poison(3)]
    )
    with pytest.raises(FloatingPointError, match=r"step 4: .*nan.*checkpoint-2"):
        trainer.train()
    assert trainer.state.global_step == 3
    weights = trainer.model.state_dict()
    finite = {n for n, w in weights.items() if torch.isfinite(w).all()}
    assert len(finite) >= len(weights) - 2  # the poisoned weight, and its twin where the head is tied
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


# --- rows and models that do not fit ----------------------------------------------------------------------------------


def test_rows_without_a_trained_token_are_counted_and_an_empty_rest_is_an_error(
    tmp_path, student_folder, teacher_folder, caplog
):
    long_prompt = {"prompt": TEXT, "completion": " yes"}
    data = Dataset.from_list([long_prompt, *PROMPT_COMPLETION.select(range(3)), long_prompt])
    args = config(tmp_path / "a", max_length=24)
    TAIDTrainer(str(student_folder), str(teacher_folder), args, train_dataset=data)
    assert "2 of 5 rows of the train data set are left out" in caplog.text
    with pytest.raises(ValueError, match="every trained token of all 2 rows of the train data set"):
        TAIDTrainer(str(student_folder), str(teacher_folder), args, train_dataset=Dataset.from_list([long_prompt] * 2))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_rows_longer_than_learned_positions_are_named(role, tmp_path, make_model, tokenizer):
    short = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    pair = {"student": make_model(300, seed=1), "teacher": make_model(300, seed=2)} | {role: short}
    options = {"processing_class": tokenizer, "teacher_processing_class": tokenizer}
    with pytest.raises(
        ValueError, match=rf"train data set has \d\d tokens, but the {role} has learned 16 positions: set"
    ):
        train(tmp_path, pair["student"], pair["teacher"], model_options=options)
    train(tmp_path, pair["student"], pair["teacher"], model_options=options, max_length=16)


def test_a_row_whose_only_label_is_on_its_first_token_trains_nothing(tmp_path, student_folder, teacher_folder):
    with pytest.raises(ValueError, match="every trained token of all 8 rows"):
        train(tmp_path, student_folder, teacher_folder, data=Dataset.from_list([{"text": TEXT}] * 8), max_length=1)


def test_a_finished_run_resumes_to_itself(tmp_path, student_folder, teacher_folder):
    first, _, _ = train(tmp_path, student_folder, teacher_folder, save_strategy="steps", save_steps=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    args = config(tmp_path, save_strategy="steps", save_steps=2)
    again = TAIDTrainer(str(student_folder), str(teacher_folder), args, train_dataset=PROMPT_COMPLETION)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_conversations_need_a_chat_template(tmp_path, student_folder, teacher_folder, tokenizer):
    plain = AutoTokenizer.from_pretrained(student_folder)
    plain.chat_template = None
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    with pytest.raises(ValueError, match="set chat_template_path"):
        train(tmp_path, student_folder, teacher_folder, data=Dataset.from_list([{"messages": talk}] * 8),
              model_options={"processing_class": plain})  # fmt: skip


def test_options_that_do_not_go_together_are_refused(tmp_path, student_folder, teacher_folder):
    student = AutoModelForCausalLM.from_pretrained(student_folder)
    args = config(tmp_path)
    with pytest.raises(ValueError, match="objective 'taid' needs a teacher"):
        TAIDTrainer(str(student_folder), None, args, train_dataset=PROMPT_COMPLETION)
    with pytest.raises(ValueError, match="one object"):
        TAIDTrainer(student, student, args, train_dataset=PROMPT_COMPLETION)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    teacher.config._name_or_path = ""
    with pytest.raises(ValueError, match="pass teacher_processing_class"):
        TAIDTrainer(student, teacher, args, train_dataset=PROMPT_COMPLETION)


def test_a_student_with_another_tokenizer_is_refused_or_given_the_teacher_s(
    tmp_path, teacher_folder, tokenizer, make_model
):
    other = tokenizer.train_new_from_iterator([TEXT] * 3, vocab_size=280)
    folder = tmp_path / "student"
    make_model(len(other), seed=3).save_pretrained(folder)
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match="different tokenizers: the first difference is token"):
        train(tmp_path / "a", folder, teacher_folder)
    trainer, steps, _ = train(tmp_path / "b", folder, teacher_folder, tokenizer_from="teacher", max_steps=8)
    assert steps[-1]["kl"] < steps[0]["kl"]
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").lm_head.weight.shape[0] == len(tokenizer)


def test_after_its_last_row_a_stream_goes_on_with_its_first(tmp_path, student_folder, teacher_folder):
    options = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    stream = PROMPT_COMPLETION.to_iterable_dataset()
    _, found, _ = train(tmp_path / "stream", student_folder, teacher_folder, stream, **options)
    rows = PROMPT_COMPLETION.select([*range(8), *range(4)])
    _, expected, _ = train(tmp_path / "rows", student_folder, teacher_folder, rows, **options)
    for row, reference in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "cross_entropy"):
            assert row[name] == reference[name]


def test_prompts_that_end_within_a_token_are_warned_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(upstream._SEAM_ONCE, "is_said", False)
    models = {name: str(resources.files("taid") / "assets" / name) for name in ("student", "teacher")}
    seams = [("def wri", "te(self):"), ("    retu", "rn self"), ("impo", "rt os, sys"), ("class Te", "st:")]
    rows = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in seams])
    TAIDTrainer(models["student"], models["teacher"], config(tmp_path), train_dataset=rows, eval_dataset=rows)

    assert sum("not a prefix of the tokenized prompt" in record.getMessage() for record in caplog.records) == 1
