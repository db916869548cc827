"""The configuration: one set of names for YAML and command line, checked by one set of rules, and saved whole."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import SFTConfig

from taid.config.parsing import parse
from taid.config.training import TAIDConfig
from taid.config.values import resolved

# A new name here is a new promise to users: it needs a test, a recipe or example that uses it, and a changelog line.
OWN_FIELDS = """
objective taid_schedule taid_t_start taid_t_end taid_alpha taid_beta taid_adaptive taid_signal taid_mixture jsd_beta
skew head_mass dkd_alpha dkd_beta dkd_temperature abkd_alpha abkd_beta amid_mixture amid_share kd_ratio fused
teacher_model_name_or_path teacher_model_revision teacher_model_init_kwargs teacher_placement teacher_quantization
teacher_cache teacher_cache_format teacher_cache_samples teacher_server_url teacher_server_model
teacher_server_timeout teacher_server_compare teacher_top_k tokenizer_from sampling sampling_share
sampling_temperature sampling_max_new_tokens sampling_buffer_size seq_kd train_tokens skip_bad_images
overwrite_output_dir
""".split()


@pytest.fixture
def read(tmp_path):
    """read(text, *argv): parse `argv` behind a recipe with this text, on the CPU."""

    def read(text: str = "", *argv: str) -> Any:
        path = tmp_path / "recipe.yaml"
        path.write_text("use_cpu: true\noutput_dir: out\n" + text, encoding="utf-8")
        return parse(["--config", str(path), *argv])

    return read


def made(**values: Any) -> TAIDConfig:
    return TAIDConfig(output_dir="out", use_cpu=True, **values)


def help_text(capsys, option: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        parse([option])
    assert exit_info.value.code == 0
    return capsys.readouterr().out


# --- one set of names -------------------------------------------------------------------------------------------------


def test_taids_own_options_are_these_and_no_others():
    assert [f.name for f in fields(TAIDConfig) if f.name not in {f.name for f in fields(SFTConfig)}] == OWN_FIELDS


def test_the_defaults_are_the_papers():
    _, _, args = parse(["--use_cpu", "true", "--output_dir", "out"])
    assert {name: getattr(args, name) for name in OWN_FIELDS} == {
        "objective": "taid",
        "taid_schedule": "paper",
        "taid_t_start": 0.4,
        "taid_t_end": 1.0,
        "taid_alpha": 5e-4,
        "taid_beta": 0.99,
        "taid_adaptive": True,
        "taid_signal": "kl",
        "taid_mixture": 1.0,
        "jsd_beta": 0.1,
        "skew": 0.1,
        "head_mass": 0.5,
        "dkd_alpha": 1.0,
        "dkd_beta": 8.0,
        "dkd_temperature": 4.0,
        "abkd_alpha": 0.2,
        "abkd_beta": 0.7,
        "amid_mixture": 0.5,
        "amid_share": 0.5,
        "kd_ratio": 1.0,
        "fused": True,
        "teacher_model_name_or_path": None,
        "teacher_model_revision": None,
        "teacher_model_init_kwargs": None,
        "teacher_placement": "auto",
        "teacher_quantization": None,
        "teacher_cache": None,
        "teacher_cache_format": None,
        "teacher_cache_samples": None,
        "teacher_server_url": None,
        "teacher_server_model": None,
        "teacher_server_timeout": 120.0,
        "teacher_server_compare": False,
        "teacher_top_k": None,
        "tokenizer_from": "student",
        "sampling": "none",
        "sampling_share": 0.5,
        "sampling_temperature": 1.0,
        "sampling_max_new_tokens": 256,
        "sampling_buffer_size": 1000,
        "seq_kd": False,
        "train_tokens": None,
        "skip_bad_images": False,
        "overwrite_output_dir": False,
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("objective", "jsd", "jsd"),
        ("taid_schedule", "auto", "auto"),
        ("taid_t_start", "0.25", 0.25),
        ("taid_t_end", "0.9", 0.9),
        ("taid_alpha", "0.01", 0.01),
        ("taid_alpha", "1e-4", 1e-4),
        ("taid_alpha", "auto", "auto"),
        ("taid_beta", "0.5", 0.5),
        ("taid_adaptive", "false", False),
        ("taid_signal", "cross_entropy", "cross_entropy"),
        ("jsd_beta", "0.3", 0.3),
        ("skew", "0", 0.0),
        ("objective", "adaptive_kl", "adaptive_kl"),
        ("objective", "dkd", "dkd"),
        ("objective", "ctkd", "ctkd"),
        ("head_mass", "0.3", 0.3),
        ("dkd_alpha", "0", 0.0),
        ("dkd_beta", "2", 2.0),
        ("dkd_temperature", "1.5", 1.5),
        ("kd_ratio", "0.5", 0.5),
        ("fused", "false", False),
        ("teacher_model_name_or_path", "org/teacher", "org/teacher"),
        ("teacher_model_revision", "v1", "v1"),
        ("teacher_model_init_kwargs", '{"dtype": "bfloat16"}', {"dtype": "bfloat16"}),
        ("tokenizer_from", "teacher", "teacher"),
        ("skip_bad_images", "true", True),
        ("overwrite_output_dir", "true", True),
        ("learning_rate", "1e-4", 1e-4),  # YAML 1.1 reads a number without a dot as text
        ("learning_rate", "2.5e-5", 2.5e-5),
        ("num_train_epochs", "2", 2.0),
        ("max_length", "512", 512),
        ("logging_steps", "0.5", 0.5),
        ("bf16", "false", False),
        ("packing", "yes", True),
        ("dataset_text_field", "123", "123"),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
    ],
)
def test_yaml_and_the_command_line_read_a_value_alike(read, name, text, value):
    for _, _, args in (read(f"{name}: {text}\n"), read("", f"--{name}", text), read("", f"--{name}={text}")):
        assert getattr(args, name) == value
        assert type(getattr(args, name)) is type(value)


def test_student_and_data_options_stand_beside_those_of_training(read):
    text = "model_name_or_path: s\nlora_r: 4\nlora_target_modules: [q_proj, v_proj]\ndataset_name: d.jsonl\n"
    model, data, _ = read(text, "--eval_dataset_name", "e.jsonl")
    assert (model.model_name_or_path, model.lora_r, model.lora_target_modules) == ("s", 4, ["q_proj", "v_proj"])
    assert (data.dataset_name, data.eval_dataset_name) == ("d.jsonl", "e.jsonl")


def test_the_command_line_wins_over_yaml(read):
    text = "taid_beta: 0.5\nlearning_rate: 1e-3\ntaid_adaptive: false\nmax_length: null\nlora_target_modules: [a, b]\n"
    model, _, args = read(
        text, *"--taid_beta 0.7 --taid_adaptive true --max_length 64 --lora_target_modules c d e".split()
    )
    assert (args.taid_beta, args.taid_adaptive, args.max_length, args.learning_rate) == (0.7, True, 64, 1e-3)
    assert model.lora_target_modules == ["c", "d", "e"]


def test_the_command_line_wins_wherever_config_stands(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("taid_beta: 0.5\n")
    for argv in (["--taid_beta", "0.7", "--config", str(path)], [f"--config={path}", "--taid_beta=0.7"]):
        _, _, args = parse([*argv, "--use_cpu", "true", "--output_dir", "out"])
        assert args.taid_beta == 0.7


def test_a_bare_switch_is_true_and_its_no_form_false(read):
    assert read("taid_adaptive: false\n", "--taid_adaptive")[2].taid_adaptive is True
    assert read("", "--no_taid_adaptive")[2].taid_adaptive is False
    assert read("", "--overwrite_output_dir")[2].overwrite_output_dir is True


def test_resume_from_checkpoint_takes_a_path_or_stands_alone(read):
    assert read("", "--resume_from_checkpoint")[2].resume_from_checkpoint == "true"
    assert (
        read("", "--resume_from_checkpoint", "runs/a/checkpoint-3")[2].resume_from_checkpoint == "runs/a/checkpoint-3"
    )
    assert read("")[2].resume_from_checkpoint is None


def test_yaml_takes_mappings_lists_and_null(read):
    text = (
        "teacher_model_init_kwargs: {attn_implementation: eager, nested: {list: [1, null, true]}}\n"
        "lora_target_modules: []\nmax_length: null\nlora_modules_to_save: [lm_head]\n"
    )
    model, _, args = read(text)
    assert args.teacher_model_init_kwargs == {"attn_implementation": "eager", "nested": {"list": [1, None, True]}}
    assert (model.lora_target_modules, model.lora_modules_to_save) == ([], ["lm_head"])
    assert args.max_length is None


def test_a_yaml_value_may_begin_with_a_dash_or_hold_spaces(read):
    model, data, _ = read("model_name_or_path: -odd name\ndataset_name: 'a b/*.jsonl'\n")
    assert (model.model_name_or_path, data.dataset_name) == ("-odd name", "a b/*.jsonl")


def test_report_to_takes_a_list_of_two(read):
    assert read("report_to: [tensorboard, wandb]\n")[2].report_to == ["tensorboard", "wandb"]


def test_a_switch_that_also_takes_text_is_a_switch_in_yaml(read):
    assert read("fsdp: true\nactivation_checkpointing: false\n")[2].fsdp is True


def test_every_option_that_is_a_mapping_takes_one(read):
    assert read("liger_kernel_config: {rope: true}\n")[2].liger_kernel_config == {"rope": True}


# --- what is not taken ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("taid_betta", "taid_beta"),
        ("taid-beta", "taid_beta"),
        ("kd_ration", "kd_ratio"),
        ("learning_rte", "learning_rate"),
        ("model_name_or_pth", "model_name_or_path"),
        ("dataset_nam", "dataset_name"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(read, key, nearest):
    with pytest.raises(ValueError, match=rf"recipe.yaml: unknown key '{key}'; did you mean '{nearest}'\?"):
        read(f"{key}: 1\n")
    if "-" not in key:
        for argv in ([f"--{key}", "1"], [f"--{key}=1"]):
            with pytest.raises(ValueError, match=rf"unknown option '--{key}.*'; did you mean '{nearest}'\?"):
                read("", *argv)


def test_a_key_like_no_other_is_refused_without_a_suggestion(read):
    with pytest.raises(ValueError, match=r"unknown key 'zzzzzzzz'$"):
        read("zzzzzzzz: 1\n")
    with pytest.raises(ValueError, match=r"unknown key 1$"):
        read("1: 2\n")


def test_an_abbreviated_option_is_refused(read):
    with pytest.raises(ValueError, match="unknown option '--taid_bet'; did you mean 'taid_beta'"):
        read("", "--taid_bet", "0.5")


def test_a_stray_word_is_refused(read):
    with pytest.raises(ValueError, match=r"unknown option 'recipe\.yaml'"):
        read("", "recipe.yaml")


@pytest.mark.parametrize("name", ["help", "help_all", "config"])
def test_what_belongs_to_the_command_line_is_no_key_in_yaml(read, name):
    with pytest.raises(ValueError, match=f"unknown key '{name}'"):
        read(f"{name}: true\n")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("seed: abc", "seed", "abc"),
        ("seed: 1.5", "seed", "1.5"),
        ("kd_ratio: true", "kd_ratio", "true"),
        ("kd_ratio: {a: 1}", "kd_ratio", '"a": 1'),
        ("learning_rate: fast", "learning_rate", "fast"),
        ("taid_adaptive: maybe", "taid_adaptive", "maybe"),
        ("fused: maybe", "fused", "maybe"),
        ("dkd_temperature: hot", "dkd_temperature", "hot"),
        ("taid_alpha: abc", "taid_alpha", "abc"),
        ("taid_alpha: true", "taid_alpha", "true"),
        ("objective: tadi", "objective", "tadi"),
        ("taid_schedule: adaptive", "taid_schedule", "adaptive"),
        ("taid_signal: loss", "taid_signal", "loss"),
        ("tokenizer_from: both", "tokenizer_from", "both"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_name_and_value(read, text, name, value):
    option = "--" + text.replace(": ", "=", 1)
    for argv in ((text + "\n",), ("", option)):
        with pytest.raises(ValueError, match=name) as error:
            read(*argv)
        assert value in str(error.value) or "{" in option


def test_an_option_without_its_value_is_refused(read):
    with pytest.raises(ValueError, match="--seed: expected one argument"):
        read("", "--seed")


def test_a_list_for_a_single_value_is_refused_by_its_name(read):
    with pytest.raises(ValueError, match=r"recipe\.yaml: learning_rate takes one value, got the list \[1, 2\]"):
        read("learning_rate: [1, 2]\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("taid_t_start", -0.01),
        ("taid_t_start", 1.01),
        ("taid_t_start", float("nan")),
        ("taid_t_end", 0.39),  # below t_start
        ("taid_t_end", 1.01),
        ("taid_t_end", float("nan")),
        ("taid_alpha", 0.0),
        ("taid_alpha", -5e-4),
        ("taid_alpha", float("inf")),
        ("taid_alpha", float("nan")),
        ("taid_beta", -0.1),
        ("taid_beta", 1.0),
        ("taid_beta", float("nan")),
        ("jsd_beta", 0.0),
        ("jsd_beta", 1.0),
        ("jsd_beta", float("nan")),
        ("skew", -0.1),
        ("skew", 1.0),
        ("skew", float("nan")),
        ("head_mass", 0.0),
        ("head_mass", 1.0),
        ("head_mass", float("nan")),
        ("dkd_alpha", -0.1),
        ("dkd_alpha", float("inf")),
        ("dkd_alpha", float("nan")),
        ("dkd_beta", -0.1),
        ("dkd_beta", float("inf")),
        ("dkd_beta", float("nan")),
        ("dkd_temperature", 0.0),
        ("dkd_temperature", -1.0),
        ("dkd_temperature", float("inf")),
        ("dkd_temperature", float("nan")),
        ("kd_ratio", -0.1),
        ("kd_ratio", 1.1),
        ("kd_ratio", float("nan")),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_value(read, name, value):
    named = name.removeprefix("taid_")
    for attempt in (lambda: made(**{name: value}), lambda: read(f"{name}: {value}\n")):
        with pytest.raises(ValueError, match=named) as error:
            attempt()
        assert f"got {value}" in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"taid_t_start": 0.0, "taid_t_end": 0.0},
        {"taid_t_start": 1.0},
        {"taid_t_end": 0.4},
        {"taid_beta": 0.0},
        {"skew": 0.0},
        {"kd_ratio": 0.0},
        {"kd_ratio": 1.0},
        {"jsd_beta": 1e-9},
        {"head_mass": 1e-9},
        {"dkd_alpha": 0.0, "dkd_beta": 0.0},
        {"dkd_temperature": 1e-3},
    ],
)
def test_the_ends_of_a_range_that_belong_to_it_are_taken(values):
    args = made(**values)
    assert {name: getattr(args, name) for name in values} == values


def test_an_objective_that_does_not_exist_is_refused_in_python_too():
    with pytest.raises(ValueError, match="objective 'skew_foward_kl' does not exist; did you mean 'skew_forward_kl'"):
        made(objective="skew_foward_kl")


@pytest.mark.parametrize("values", [{"taid_signal": "loss"}, {"tokenizer_from": "techer"}])
def test_every_choice_that_does_not_exist_is_refused_in_python_too(values):
    ((name, value),) = values.items()
    near = {"taid_signal": r" \(choices: 'kl', 'cross_entropy'\)", "tokenizer_from": "; did you mean 'teacher'"}[name]
    with pytest.raises(ValueError, match=f"{name} '{value}' does not exist{near}"):
        made(**values)


def test_null_for_alpha_is_refused_with_the_papers_value(read):
    with pytest.raises(ValueError, match=r"taid_alpha must be a positive number or 'auto', got null; .* 5e-4"):
        read("taid_alpha: null\n")


@pytest.mark.parametrize(
    "name",
    [name for name in OWN_FIELDS if not name.startswith(("teacher_", "taid_alpha", "overwrite_", "train_tokens"))],
)
def test_null_for_an_option_that_needs_a_value_is_refused_by_its_name(read, name):
    with pytest.raises(ValueError, match=name.removeprefix("taid_")):
        read(f"{name}: null\n")
    with pytest.raises(ValueError, match=f"{name} .*null"):
        made(**{name: None})


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
@pytest.mark.parametrize("value", ["bfloat16", "{dtype: bfloat16}", "[1]", [1]])
def test_arguments_of_from_pretrained_that_are_no_mapping_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a mapping"):
        made(**{name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss_type: dft", "loss_type 'dft' is TRL's; here `objective` and `kd_ratio` define the loss"),
        ("label_smoothing_factor: 0.1", "label_smoothing_factor is 0.1, but no objective here smooths"),
        ("average_tokens_across_devices: false", "average_tokens_across_devices: false is not possible"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size must be positive, got 0"),
        ("per_device_eval_batch_size: -1", "per_device_eval_batch_size must be positive, got -1"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps must be positive, got 0"),
        ("learning_rate: .nan", "learning_rate must be 0 or a positive number, got nan"),
        ("learning_rate: -0.1", "learning_rate must be 0 or a positive number, got -0.1"),
        ("max_length: 0", "max_length must be positive, or null for rows of any length, got 0"),
    ],
)
def test_options_that_distillation_cannot_have_are_refused(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text + "\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML.*line 1"),
        ("a: b: c", "is not valid YAML.*line 1"),
        ("\tseed: 1", "is not valid YAML.*line 1"),
        ("- seed", "must hold a mapping of names to values, not a list"),
        ("seed", "must hold a mapping of names to values, not a str"),
        ("", "must hold a mapping of names to values"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_by_its_name(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)broken\.yaml {message}"):
        parse(["--config", str(path)])


def test_a_file_that_is_no_text_is_refused_by_its_name(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"run_name: caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.yaml"):
        parse(["--config", str(path)])


def test_a_key_that_stands_twice_is_refused_by_name_and_line(read):
    with pytest.raises(ValueError, match=r"(?s)recipe\.yaml is not valid YAML: 'seed' stands twice.*line 5"):
        read("seed: 1\nskew: 0.2\nseed: 2\n")
    with pytest.raises(ValueError, match="'dtype' stands twice"):
        read("teacher_model_init_kwargs: {dtype: float32, dtype: bfloat16}\n")


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        parse(["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(ValueError, match=r"--config .* is a folder: name a YAML file in it"):
        parse(["--config", str(tmp_path)])


def test_a_chat_template_that_is_no_file_is_not_looked_for_on_the_hub(read):
    with pytest.raises(FileNotFoundError, match=r"chat_template_path: there is no file \./nope\.jinja"):
        read("chat_template_path: ./nope.jinja\n")
    assert read("chat_template_path: Qwen/Qwen2.5-0.5B-Instruct\n")[2].chat_template_path.startswith("Qwen")


# --- what follows from the values -------------------------------------------------------------------------------------


def test_alpha_auto_gives_a_run_of_any_length_the_papers_shape():
    args = made(taid_alpha="auto")
    assert args.alpha_for(15_000) == 5e-4
    assert args.alpha_for(250) == 0.03
    assert made(taid_alpha=0.002).alpha_for(250) == made(taid_alpha="2e-3").alpha_for(15_000) == 0.002


def test_sft_gives_the_teacher_no_share_of_the_loss():
    assert made(objective="sft").distillation_share == 0.0
    assert made(objective="sft", kd_ratio=0.5).distillation_share == 0.0
    assert made(objective="jsd", kd_ratio=0.25).distillation_share == 0.25
    assert made().distillation_share == 1.0


def test_a_made_configuration_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()


# --- the resolved configuration ---------------------------------------------------------------------------------------

FULL = """
objective: skew_reverse_kl
skew: 0.2
taid_alpha: auto
taid_adaptive: false
kd_ratio: 0.75
teacher_model_name_or_path: org/teacher
teacher_model_init_kwargs: {attn_implementation: eager}
model_name_or_path: ./student
use_peft: true
lora_target_modules: [q_proj, v_proj]
dataset_name: rows.jsonl
learning_rate: 3e-5
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_steps: 0.1
eos_token: <|im_end|>
max_length: null
packing: true
bf16: false
eval_strategy: steps
eval_steps: 5
report_to: none
run_name: "ärger: [1]"
"""


@pytest.mark.parametrize(
    "text",
    [
        "",
        FULL,
        "gradient_checkpointing: false\n",  # the deprecated name is not written, but what it means is
        "activation_checkpointing_kwargs: {use_reentrant: false}\naccelerator_config: {split_batches: true}\n",
        "use_peft: true\nlora_target_modules: all-linear\ndtype: bfloat16\ninclude_for_metrics: [loss]\n",
    ],
    ids=["defaults", "much set", "old name", "mappings", "adapter"],
)
def test_the_resolved_configuration_comes_back_equal_through_yaml(read, tmp_path, text):
    before = read(text)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(resolved(*before), sort_keys=True, allow_unicode=True), encoding="utf-8")
    after = parse(["--config", str(path)])
    assert resolved(*after) == resolved(*before)
    for old, new in zip(before, after, strict=True):
        assert {f.name: getattr(new, f.name) for f in fields(old)} == {
            f.name: getattr(old, f.name) for f in fields(old)
        }


def test_the_resolved_configuration_holds_every_own_option(read):
    values = resolved(*read(FULL))
    assert set(OWN_FIELDS) <= set(values)
    assert (values["taid_alpha"], values["skew"], values["learning_rate"]) == ("auto", 0.2, 3e-5)
    assert (values["dataset_name"], values["model_name_or_path"]) == ("rows.jsonl", "./student")
    assert values["eos_token"] == "<|im_end|>"  # a word of the vocabulary, not a secret


def test_the_resolved_configuration_holds_no_token(read):
    values = resolved(*read("hub_token: hf_secret\n"))
    assert "hf_secret" not in str(values)
    assert "hub_token" not in values


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_the_resolved_configuration_holds_no_token_of_from_pretrained(read, name):
    assert "hf_secret" not in str(resolved(*read(f"{name}: {{token: hf_secret}}\n")))


def test_secrets_go_at_any_depth_and_words_of_the_vocabulary_stay():
    kwargs = {
        "hub": [{"api_key": "hf_1", "MY_TOKEN": "hf_2", "user": "me"}],
        "db_password": "hf_3",
        "client_secret_2": "hf_4",
        "eos_token": "<e>",
    }
    values = resolved(made(teacher_model_init_kwargs=kwargs, hub_token="hf_5", eos_token="<e>"))
    assert values["teacher_model_init_kwargs"] == {"hub": [{"user": "me"}], "eos_token": "<e>"}
    assert "hf_" not in str(values)
    assert (values["eos_token"], values["pad_token"]) == ("<e>", None)
    with pytest.warns(FutureWarning, match="pad_token"):
        assert resolved(made(pad_token="<p>"))["pad_token"] == "<p>"


def test_the_resolved_configuration_is_plain_yaml(read, tmp_path):
    text = yaml.safe_dump(resolved(*read(FULL)), allow_unicode=True)
    assert yaml.safe_load(text) == resolved(*read(FULL))
    assert "!!python" not in text


# --- help -------------------------------------------------------------------------------------------------------------


def options_in(text: str) -> list[str]:
    return [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]


def test_help_lists_taids_own_options_first(capsys):
    options = options_in(help_text(capsys, "--help"))
    assert options[:3] == ["config", "help", "help_all"]
    assert options[3 : 3 + len(OWN_FIELDS)] == OWN_FIELDS


def test_help_explains_every_own_option():
    assert all(f.metadata["help"] for f in fields(TAIDConfig) if f.name in OWN_FIELDS)


def test_help_shows_common_options_and_hides_rare_ones_until_help_all(capsys):
    short, long = help_text(capsys, "--help"), help_text(capsys, "--help_all")
    common = {"learning_rate", "max_length", "model_name_or_path", "dataset_name", "output_dir", "seed"}
    rare = {"adam_epsilon", "ddp_backend", "hub_private_repo", "torch_compile_backend"}
    assert common <= set(options_in(short))
    assert not rare & set(options_in(short))
    assert common | rare <= set(options_in(long))
    assert set(options_in(short)) <= set(options_in(long))
    assert "--no_taid_adaptive" not in short  # `--taid_adaptive false` says the same


def test_help_all_misses_no_option(capsys):
    shown = set(options_in(help_text(capsys, "--help_all")))
    assert {f.name for f in fields(TAIDConfig) if f.init} <= shown


def test_no_option_is_shown_twice(capsys):
    options = options_in(help_text(capsys, "--help_all"))
    assert len(options) == len(set(options))


def test_help_names_every_own_option_even_behind_a_recipe(read, capsys):
    with pytest.raises(SystemExit):
        read("seed: 1\n", "--help")
    assert set(OWN_FIELDS) <= set(options_in(capsys.readouterr().out))


def test_a_recipe_may_lie_anywhere(tmp_path: Path):
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "r.yaml").write_text("seed: 7\nuse_cpu: true\noutput_dir: out\n")
    assert parse(["--config", str(folder / "r.yaml")])[2].seed == 7


def test_help_shows_defaults(capsys):
    text = " ".join(help_text(capsys, "--help").split())
    for words in ("(default: taid)", "larger gap between student and teacher. (default: 0.4)", "(default: student)"):
        assert words in text


def test_a_wrong_type_in_a_recipe_names_the_recipe_and_one_on_the_command_line_does_not(read, tmp_path):
    with pytest.raises(ValueError, match=r"recipe\.yaml: learning_rate: invalid float value: 'fast'$"):
        read("learning_rate: fast\n")
    with pytest.raises(ValueError, match=r"^argument --max_steps: invalid int value: '5\.5'$"):
        read("learning_rate: 0.1\n", "--max_steps", "5.5")


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config .*gone\.yaml: there is no such file"):
        parse(["--config", str(tmp_path / "gone.yaml")])


@pytest.mark.parametrize(
    ("metric", "greater"), [("eval_kl", False), ("eval_loss", False), ("eval_mean_token_accuracy", True)]
)
def test_the_best_checkpoint_is_that_of_the_least_loss_or_kl(metric, greater):
    assert made(metric_for_best_model=metric).greater_is_better is greater
    assert made(metric_for_best_model=metric, greater_is_better=not greater).greater_is_better is not greater


@pytest.mark.parametrize("placement", ["sharded", "cpu"])
def test_a_quantized_teacher_is_not_cut_up(placement):
    with pytest.raises(ValueError, match=f"bnb_4bit and teacher_placement: {placement} do not go together"):
        made(teacher_quantization="bnb_4bit", teacher_placement=placement)


def test_auto_has_no_other_mixture():
    with pytest.raises(ValueError, match=r"taid_schedule: auto has targets beyond .* taid_mixture: -1 has not"):
        made(taid_schedule="auto", taid_mixture=-1.0)
