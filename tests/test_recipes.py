"""Recipes: each can be planned and, in miniature, be run; what they and their table claim is what there is."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)  # fmt: skip

from taid.cli.main import main
from taid.config.parsing import parse
from taid.losses.objective_table import OBJECTIVES
from taid.planning.dry_run import config_like
from taid.planning.footprint import size
from taid.planning.recipe import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
CONFIGURATIONS = sorted(path.parent for path in FOLDER.glob("configs/*/config.json"))
# What the models' cards and papers say: the Hub's count of each safetensors file; Pythia's from its paper.
WEIGHTS = {
    "EleutherAI--pythia-410m": 405_334_016,
    "HuggingFaceTB--SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB--SmolLM2-360M-Instruct": 361_821_120,
    "OpenGVLab--InternVL3-2B-hf": 2_088_957_440,
    "OpenGVLab--InternVL3-8B-hf": 7_944_373_760,
    "Qwen--Qwen2-1.5B-Instruct": 1_543_714_304,
    "Qwen--Qwen2-72B-Instruct": 72_706_203_648,
    "Qwen--Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen--Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen--Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen--Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen--Qwen3-0.6B": 596_049_920,
    "Qwen--Qwen3-8B": 8_190_735_360,
    "TinyLlama--TinyLlama_v1.1": 1_100_048_384,
    "meta-llama--Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama--Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama--Llama-3.2-1B-Instruct": 1_235_814_400,
    "microsoft--Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft--Phi-3-mini-4k-instruct": 3_821_079_552,
    "stabilityai--stablelm-zephyr-3b": 2_795_443_200,
}
TOKENS = {
    "gpt-neox": {50_277}, "smollm2": {49_152}, "qwen2": {151_646, 151_665, 151_669, 151_674},
    "llama-2": {32_000, 32_011}, "llama-3": {128_256},
}  # fmt: skip
name_of = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(command, *arguments): through the command line, in an empty folder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def main_of(*arguments):
        capsys.readouterr()
        return main([str(argument) for argument in arguments]), capsys.readouterr()

    return main_of


def table() -> dict[str, list[str]]:
    """Recipe -> the other cells of its row in recipes/README.md."""
    rows = re.findall(r"^\| \[([\w.-]+)\]\(\S+\.yaml\) \|(.*)\|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def hours(plan: str) -> str:
    """Return the hours of a plan as the table has them."""
    said = re.findall(r"^time of (.+): (?:at most |about )?([\d.,]+) hours", plan, re.MULTILINE)
    words = {"taid cache": "cache ", "taid train": "", "the teacher's server, if it has as many": "server "}
    return ", ".join(words[command] + number for command, number in said)


def gpus(cells: list[str]) -> str:
    return re.match(r"\d+", cells[2])[0] if "CPU" not in cells[2] else "0"


# --- recipes ----------------------------------------------------------------------------------------------------------


@name_of
def test_a_recipe_passes_its_dry_run(recipe, run, tmp_path):
    status, said = run("train", "--config", recipe, "--dry_run")
    assert status == 0, said.err
    last = said.out.splitlines()[-1]
    assert last.startswith("dry run passed: 3 steps of taid with a small ")
    assert last.endswith(f"Nothing was written to {yaml.safe_load(recipe.read_text())['output_dir']}")
    assert list((tmp_path / "here").iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []


@name_of
def test_the_table_and_the_comments_say_what_the_plan_says(recipe, run):
    cells = table()[recipe.stem]
    status, said = run("plan", "--config", recipe, "--gpus", gpus(cells))
    assert status == 0, said.err
    assert cells[3] == hours(said.out)
    comments = " ".join(line.lstrip("# ") for line in recipe.read_text().splitlines() if line.startswith("#"))
    assert f"taid plan --gpus {gpus(cells)}: {cells[3]} hours" in comments
    steps = re.search(r"^run: (.*)$", said.out, re.MULTILINE)[1]
    assert f"hours at 40 % of the peak ({steps})" in comments
    assert re.search(r"\bOurs\b", comments), "what was chosen by us is said"


def test_every_recipe_is_in_the_table():
    assert sorted(table()) == sorted(path.stem for path in RECIPES)


@pytest.mark.parametrize(
    ("recipe", "student", "teacher", "t_start"),
    [
        ("phi-3-mini-to-tinyllama", "TinyLlama/TinyLlama_v1.1", "microsoft/Phi-3-mini-4k-instruct", 0.4),
        ("llama-2-7b-to-tinyllama", "TinyLlama/TinyLlama_v1.1", "meta-llama/Llama-2-7b-chat-hf", 0.2),
        ("stablelm-zephyr-3b-to-pythia-410m", "EleutherAI/pythia-410m", "stabilityai/stablelm-zephyr-3b", 0.2),
    ],
)
def test_the_papers_instruction_tuning_has_the_papers_values(recipe, student, teacher, t_start):
    model, data, args = parse(["--config", str(FOLDER / f"{recipe}.yaml"), "--use_cpu"])
    assert (model.model_name_or_path, args.teacher_model_name_or_path) == (student, teacher)
    assert (data.dataset_name, data.dataset_train_split) == ("HuggingFaceH4/ultrachat_200k", "train_sft")
    assert (args.objective, args.taid_t_start, args.taid_t_end) == ("taid", t_start, 1.0)
    assert (args.taid_alpha, args.taid_beta, args.taid_signal, args.kd_ratio) == (5e-4, 0.99, "kl", 1.0)
    assert (args.max_length, args.num_train_epochs, args.bf16) == (2048, 5, True)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 64
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps, args.max_grad_norm) == (1e-4, "cosine", 0, 1)
    assert not args.assistant_only_loss


def test_the_overrides_of_the_papers_methods_are_accepted():
    text = (FOLDER / "README.md").read_text()
    found = dict(re.findall(r"^\| ([^|]+) \| `(--objective [^`]+)` \|", text, re.MULTILINE))
    assert len(found) >= 11
    for override in found.values():
        parse(["--config", str(RECIPES[0]), "--use_cpu", *override.split()])
    assert {override.split()[1] for override in found.values()} == set(OBJECTIVES)


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", CONFIGURATIONS, ids=lambda path: path.name)
def test_a_configuration_has_as_many_weights_as_the_published_model(folder):
    config = AutoConfig.from_pretrained(folder)
    assert size(config).weights == WEIGHTS[folder.name]
    tokens = json.loads((folder / "tokens.json").read_text())
    number = tokens["ordinary"] + len(tokens["special"])
    assert number in TOKENS[tokens["family"]]
    assert len(set(tokens["special"])) == len(tokens["special"])
    assert number <= config.get_text_config().vocab_size


def test_configurations_are_those_that_the_recipes_use():
    used = set()
    for recipe in RECIPES:
        values = yaml.safe_load(recipe.read_text())
        used |= {values["model_name_or_path"], values["teacher_model_name_or_path"]}
    assert {name.replace("/", "--") for name in used} == {folder.name for folder in CONFIGURATIONS} == set(WEIGHTS)


# --- dry runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, student_folder, teacher_folder, rows):
    """recipe(**changes): a recipe of local models and rows."""

    def write(**changes):
        values = {
            "model_name_or_path": str(student_folder),
            "teacher_model_name_or_path": str(teacher_folder),
            "dataset_name": str(rows(tmp_path / "rows.jsonl", number=40)),
            "output_dir": str(tmp_path / "here" / "run"),
            "report_to": "none",
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}))
        return path

    return write


def test_a_dry_run_of_local_models_takes_their_tokenizers_and_the_first_rows(recipe, run, tmp_path, rows):
    held_out = rows(tmp_path / "held_out.jsonl", kind="messages", number=30)
    train = rows(tmp_path / "train.jsonl", kind="messages", number=30)
    changes = {"dataset_name": str(train), "eval_dataset_name": str(held_out), "use_cpu": True}
    status, said = run("train", "--config", recipe(**changes, assistant_only_loss=True), "--dry_run")
    assert status == 0, said.err
    assert "train: 30 different rows" in said.out
    assert said.out.splitlines()[-1].startswith("dry run passed")


def test_output_dir_is_not_touched_whatever_it_holds(recipe, run, tmp_path):
    (tmp_path / "here" / "run").mkdir()
    (tmp_path / "here" / "run" / "thesis.txt").write_text("mine")
    status, said = run("train", "--config", recipe(), "--dry_run", "--max_steps", "2")
    assert status == 0, said.err
    assert [path.name for path in (tmp_path / "here" / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("server", [False, True], ids=["cache", "server"])
def test_a_teacher_elsewhere_is_captured_in_miniature(recipe, run, server, tmp_path):
    where = {"teacher_server_url": "http://localhost:1"} if server else {"teacher_cache": str(tmp_path / "cache")}
    status, said = run("train", "--config", recipe(**where), "--dry_run")
    assert status == 0, said.err
    assert ("The server was not asked." in said.out) is server
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "option",
    [{"fp16": True}, {"tf32": True}, {"push_to_hub": True}, {"teacher_model_init_kwargs": {"device_map": "auto"}},
     {"attn_implementation": "flash_attention_2"}, {"max_length": None}, {"use_peft": True}, {"packing": True},
     {"streaming": True, "max_steps": 9}, {"resume_from_checkpoint": "true"}],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_what_needs_a_gpu_or_reaches_out_is_left_out(recipe, run, option):
    status, said = run("train", "--config", recipe(**option), "--dry_run")
    assert status == 0, said.err


def test_a_dry_run_is_of_one_process(recipe, run, monkeypatch):
    monkeypatch.setattr("taid.config.training.TAIDConfig.world_size", 2)
    status, said = run("train", "--config", recipe(), "--dry_run")
    assert (status, said.err) == (
        2, "taid: error: --dry_run is for one process: start it without accelerate launch\n"
    )  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_passes(recipe, run, objective):
    status, said = run("train", "--config", recipe(objective=objective), "--dry_run")
    assert status == 0, said.err
    assert f"3 steps of {objective} with" in said.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokeniser_from": "teacher"}, "unknown key 'tokeniser_from'; did you mean 'tokenizer_from'?"),
        (
            {"teacher_model_name_or_path": "nobody/nothing"},
            "the configuration of teacher 'nobody/nothing' could not be read",
        ),
        ({"train_tokens": 1000}, "train_tokens needs packing: true"),
        ({"dataset_name": "chats.jsonl"}, "data file chats.jsonl does not exist"),
        ({"streaming": True}, "a stream has no length: set max_steps"),
        ({"use_peft": True, "peft_type": "x"}, "unknown key 'peft_type'"),
        ({"optim": "lomo"}, "lomo"),
        ({"gpus": 8}, "unknown key 'gpus'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_with_a_recipe_is_found(recipe, run, tmp_path, changes, message):
    status, said = run("train", "--config", recipe(**changes), "--dry_run")
    assert status == 2
    assert said.err.splitlines()[-1].startswith("taid: error: ")
    assert message in said.err
    assert "dry run passed" not in said.out
    assert list((tmp_path / "here").iterdir()) == list((tmp_path / "temporary").iterdir()) == []


def test_vocabularies_that_do_not_match_are_found(run):
    given = ("--teacher_model_name_or_path", "meta-llama/Llama-3.1-8B-Instruct")
    status, said = run("train", "--config", FOLDER / "smollm2-360m-to-135m-cpu.yaml", "--dry_run", *given)
    assert status == 2
    assert "student and teacher have different tokenizers" in said.err


# --- what a dry run is made of ----------------------------------------------------------------------------------------


def shape(**changes):
    return {
        "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
        "num_attention_heads": 16, "num_key_value_heads": 4, **changes,
    }  # fmt: skip


def test_a_small_configuration_keeps_what_decides_which_code_runs():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 5e5}  # fmt: skip
    large = LlamaConfig(**shape(tie_word_embeddings=True, rope_parameters=dict(rope)))
    small = config_like(large)
    assert (large.hidden_size, large.num_hidden_layers) == (1024, 12)
    assert (small.vocab_size, small.tie_word_embeddings, small.rope_parameters) == (1000, True, rope)
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads) == (32, 4, 2)
    gemma = config_like(Gemma2Config(**shape(head_dim=256)), hidden_size=64)
    assert (gemma.final_logit_softcapping, gemma.attn_logit_softcapping, gemma.head_dim) == (30.0, 50.0, 32)
    assert gemma.layer_types == ["sliding_attention", "full_attention"]
    experts = config_like(Qwen3MoeConfig(**shape(num_experts=128, num_experts_per_tok=8)))
    assert (experts.num_experts, experts.num_experts_per_tok, experts.model_type) == (4, 2, "qwen3_moe")
    assert config_like(LlamaConfig(**shape(num_key_value_heads=16))).num_key_value_heads == 4
    assert config_like(LlamaConfig(**shape(num_key_value_heads=1))).num_key_value_heads == 1


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**shape(head_dim=256)),
        Qwen3Config(**shape(head_dim=128)),
        Qwen3MoeConfig(**shape(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=512)),
        GPT2Config(vocab_size=1000, n_embd=768, n_layer=6, n_head=12),
        OPTConfig(vocab_size=1000, hidden_size=768, ffn_dim=3072, num_attention_heads=12, word_embed_proj_dim=768),
        MambaConfig(vocab_size=1000, hidden_size=768, num_hidden_layers=4),
        DeepseekV3Config(
            **shape(num_key_value_heads=16),
            n_routed_experts=16,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=64,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
        *(AutoConfig.from_pretrained(path) for path in CONFIGURATIONS if "InternVL" not in path.name),
    ],
    ids=lambda config: f"{config.model_type}-{config.hidden_size}",
)
def test_a_small_model_runs(config):
    small = config_like(config)
    model = AutoModelForCausalLM.from_config(small).float().eval()
    logits = model(input_ids=torch.arange(40)[None]).logits
    assert logits.shape == (1, 40, config.vocab_size)
    assert torch.isfinite(logits).all()
    assert type(model).__name__ == type(AutoModelForCausalLM.from_config(small)).__name__


def test_a_tokenizer_has_the_tokens_that_are_asked_for():
    made = make_tokenizer(ordinary=1000, special=["<s>", "<|user|>"], family="a", bos_token="<s>", eos_token="<s>")
    assert len(made) == len(set(made.get_vocab().values())) == 1002
    assert (made.bos_token_id, made.pad_token_id, made.convert_tokens_to_ids("<|user|>")) == (1000, None, 1001)
    assert made.decode(made("naïve 東京 😀")["input_ids"]) == "naïve 東京 😀"
    other = make_tokenizer(ordinary=1000, special=["<s>", "<|user|>"], family="b", eos_token="<s>")
    assert other.get_vocab() != made.get_vocab()
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yes"}]
    masks = made.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    trained = [i for i, mask in zip(masks["input_ids"], masks["assistant_masks"], strict=True) if mask]
    assert made.decode(trained) == "yes<s>"


def test_a_tokenizer_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="ordinary must be 256 or more"):
        make_tokenizer(ordinary=255, special=[])
    with pytest.raises(ValueError, match="eos_token '</s>' is not among the special tokens"):
        make_tokenizer(ordinary=300, special=["<s>"], eos_token="</s>")
