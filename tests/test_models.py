"""Loading: whole models from safetensors, and for everything else an error that names the model and its place."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from taid.config.training import TAIDConfig
from taid.models.loading import load_model, load_tokenizer, output_rows, quantization_config
from taid.training.pair import load_pair

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(student_folder, tmp_path) -> Callable[..., Path]:
    """copied(change=None): a copy of the student's folder, changed by change(folder)."""

    def copied(change: Callable[[Path], Any] | None = None) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(student_folder, folder)
        if change is not None:
            change(folder)
        return folder

    return copied


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    """A change of some values of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def cut(size: int) -> Callable[[Path], None]:
    """A change that keeps the first `size` bytes of the weights, or all but the last `-size`."""
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def without(weight: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        del weights[weight]
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return change


def half_of_two_shards(folder: Path) -> None:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (folder / WEIGHTS).rename(folder / names[0])
    index = {"metadata": {}, "weight_map": {"model.norm.weight": names[0], "model.embed_tokens.weight": names[1]}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


# --- whole models -----------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_with_its_weights_and_logits(teacher_folder, make_model):
    model = load_model(str(teacher_folder), role="teacher", dtype=torch.float32)
    made = make_model(308, hidden_size=48, tied=False, seed=2)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in made.state_dict().items()
    }
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, made(ids).logits)


def test_output_rows_count_the_padding(student_folder, teacher_folder):
    assert output_rows(load_model(str(student_folder), role="student")) == 300
    assert output_rows(load_model(str(teacher_folder), role="teacher")) == 308


def test_arguments_of_from_pretrained_reach_it(student_folder):
    model = load_model(str(student_folder), role="student", dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_a_saved_tokenizer_comes_back_with_its_tokens_and_template(student_folder, tokenizer):
    again = load_tokenizer(str(student_folder), role="student")
    text = "The capital of France is Paris.\n12345 😀<|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.chat_template, again.eos_token) == (tokenizer.chat_template, "<|endoftext|>")


def test_a_relative_path_is_a_path(student_folder, monkeypatch):
    monkeypatch.chdir(student_folder.parent)
    assert output_rows(load_model("./student", role="student")) == 300
    assert output_rows(load_model("student", role="student")) == 300


def test_a_home_path_is_expanded(student_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(student_folder.parent))
    assert output_rows(load_model("~/student", role="student")) == 300


# --- what is refused --------------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "student folder '{}' does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "student folder '{}' holds no config.json"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "student folder '{}' holds no config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"student folder '{}' holds no \*\.safetensors file"),
    "only a pickle": (
        only_a_pickle,
        r"student folder '{}' holds no \*\.safetensors file.*pickled weights can run code",
    ),
    "weights cut at the end": (cut(-100), "student weights {}/model.safetensors are truncated or damaged"),
    "weights cut in the header": (cut(40), "student weights {}/model.safetensors are truncated or damaged"),
    "weights of no size": (cut(0), "student weights {}/model.safetensors are truncated or damaged"),
    "half of two shards": (half_of_two_shards, "student '{}' could not be loaded: .*model-00002-of-00002.safetensors"),
    "a wider config": (edit("config.json", hidden_size=64), "student '{}' could not be loaded"),
    "a config of other heads": (edit("config.json", num_key_value_heads=4), "student '{}' could not be loaded"),
    "a config of more rows": (edit("config.json", vocab_size=400), "student '{}' could not be loaded"),
    "a deeper config": (
        edit("config.json", num_hidden_layers=3),
        r"student '{}' lacks 9 of its weights, the first is model\.layers\.2\.input_layernorm\.weight: .* be random",
    ),
    "an untied config": (
        edit("config.json", tie_word_embeddings=False),
        r"student '{}' lacks 1 of its weights, the first is lm_head\.weight",
    ),
    "a weight too few": (
        without("model.norm.weight"),
        r"student '{}' lacks 1 of its weights, the first is model\.norm\.weight",
    ),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "student '{}' could not be loaded: .*config.json"),
    "unknown architecture": (
        edit("config.json", model_type="quux"),
        "student '{}' could not be loaded: .*model type `quux`",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_folder_that_holds_no_whole_model_is_refused_by_role_and_place(copied, change, message):
    folder = copied(change)
    with pytest.raises(ValueError, match=f"(?s)^{message.format(folder)}"):
        load_model(str(folder), role="student")


def test_a_pickle_is_not_loaded_behind_safetensors_of_something_else(copied):
    def change(folder: Path) -> None:
        only_a_pickle(folder)
        save_file({"x": torch.zeros(1)}, folder / "optimizer.safetensors")

    folder = copied(change)
    with pytest.raises(ValueError, match=f"^student '{folder}' could not be loaded: .*model.safetensors"):
        load_model(str(folder), role="student")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_message_names_the_role_that_was_asked_for(tmp_path, role):
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=f"^{role} folder '.*absent' does not exist"):
            load(str(tmp_path / "absent"), role=role)


def test_a_config_of_fewer_layers_than_the_file_is_refused(copied):
    folder = copied(edit("config.json", num_hidden_layers=1))
    match = (
        rf"student '{folder}' holds weights that its config has no place for, 9 in all, first model\.layers\.1\.input"
    )
    with pytest.raises(ValueError, match=match):
        load_model(str(folder), role="student")


def test_a_config_of_another_size_is_refused_by_the_weight_that_does_not_fit(copied):
    with pytest.raises(
        ValueError, match=r"could not be loaded: model\.\S+weight is \[.*32.*\] in the file and \[.*64.*\]"
    ):
        load_model(str(copied(edit("config.json", hidden_size=64))), role="student")


@pytest.mark.parametrize("mask", ["attn.bias", "attn.masked_bias", "attn.attention.bias", "attention.masked_bias"])
def test_a_causal_mask_that_old_files_hold_is_no_weight(copied, mask):
    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS) | {f"model.layers.0.{mask}": torch.zeros(1)}
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    assert output_rows(load_model(str(copied(change)), role="student")) == 300


def test_a_pickle_is_not_loaded_even_where_it_is_asked_for(copied):
    folder = copied(lambda f: (only_a_pickle(f), save_file({"x": torch.zeros(1)}, f / "optimizer.safetensors")))
    with pytest.raises(ValueError, match=f"^student '{folder}' could not be loaded: .*model.safetensors"):
        load_model(str(folder), role="student", use_safetensors=False)


@pytest.mark.parametrize("values", [{"foo": 1}, {"dtype": "bfloat17"}, {"attn_implementation": "flash_attention_2"}])
def test_arguments_that_from_pretrained_cannot_follow_are_refused_by_role(student_folder, values):
    if "flash_attention_2" in values.values() and importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    with pytest.raises(ValueError, match=f"^teacher '{student_folder}' could not be loaded: ") as error:
        load_model(str(student_folder), role="teacher", **values)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_name_on_the_hub_that_cannot_be_reached_is_named_with_its_role(name):
    with pytest.raises(ValueError, match=f"^teacher '{name}' could not be loaded: "):
        load_model(name, role="teacher")
    with pytest.raises(ValueError, match=f"^the tokenizer of teacher '{name}' could not be loaded: "):
        load_tokenizer(name, role="teacher")


@pytest.mark.parametrize("path", ["./no/model", "~/no/model", "/no/model", "runs/no/model"])
def test_a_path_that_does_not_exist_never_becomes_a_question_to_the_hub(path):
    with pytest.raises(ValueError, match=f"^student folder '{path}' does not exist$"):
        load_model(path, role="student")


def test_an_attention_that_does_not_exist_is_refused_by_role(student_folder):
    with pytest.raises(ValueError, match=f"^student '{student_folder}' could not be loaded: .*foo"):
        load_model(str(student_folder), role="student", attn_implementation="foo")


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "{"), ("tokenizer.json", None)],
)
def test_a_broken_or_missing_tokenizer_is_refused_by_role_and_place(copied, name, text):
    def change(folder: Path) -> None:
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)

    folder = copied(change)
    with pytest.raises(ValueError, match=f"^the tokenizer of teacher '{folder}' could not be loaded"):
        load_tokenizer(str(folder), role="teacher")


# --- code of the model's own ------------------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path) -> tuple[str, Path]:
    """A module that leaves a trace when it runs, and the place of the trace."""
    trace = tmp_path / "it_ran"
    source = (
        f"import pathlib\npathlib.Path({str(trace)!r}).write_text('ran')\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    return source, trace


def test_a_models_own_code_is_refused_and_never_runs(copied, code):
    source, trace = code
    auto_map = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    folder = copied(edit("config.json", model_type="own", auto_map=auto_map))
    (folder / "own.py").write_text(source)
    with pytest.raises(ValueError, match=f"(?s)^student '{folder}' could not be loaded: .*trust_remote_code=True"):
        load_model(str(folder), role="student", trust_remote_code=False)
    assert not trace.exists()


def test_code_beside_a_model_that_transformers_knows_never_runs(copied, code):
    source, trace = code
    folder = copied(edit("config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}))
    (folder / "own.py").write_text(source)
    assert output_rows(load_model(str(folder), role="student", trust_remote_code=False)) == 300
    assert not trace.exists()


def test_a_tokenizers_own_code_is_refused_and_never_runs(copied, code):
    source, trace = code
    auto_map = {"AutoTokenizer": [None, "own.T"]}
    folder = copied(edit("tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map))
    (folder / "own.py").write_text(source)
    with pytest.raises(ValueError, match=f"(?s)tokenizer of student '{folder}' .*trust_remote_code=True"):
        load_tokenizer(str(folder), role="student", trust_remote_code=False)
    assert not trace.exists()


def test_a_pickle_beside_safetensors_is_never_opened(copied, tmp_path):
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "it_ran",)

    folder = copied(lambda f: torch.save(Trap(), f / "pytorch_model.bin"))
    assert output_rows(load_model(str(folder), role="student")) == 300
    assert not (tmp_path / "it_ran").exists()


# --- student and teacher together -------------------------------------------------------------------------------------


def options(**values: Any) -> TAIDConfig:
    return TAIDConfig(output_dir="out", use_cpu=True, **{"bf16": False} | values)


@pytest.fixture
def half_teacher(teacher_folder, tokenizer, tmp_path) -> str:
    """The teacher, saved in bfloat16."""
    folder = tmp_path / "half_teacher"
    load_model(str(teacher_folder), role="teacher", dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_pair_by_name_is_two_models_and_the_tokens_they_share(student_folder, teacher_folder, tokenizer):
    pair = load_pair(str(student_folder), str(teacher_folder), options(), None, None)
    assert (output_rows(pair.student), output_rows(pair.teacher)) == (300, 308)
    assert (pair.student.dtype, pair.teacher.dtype) == (torch.float32, torch.float32)
    assert pair.vocabulary.ids == tuple(range(300))
    assert pair.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert pair.names == {
        "model_name_or_path": str(student_folder),
        "teacher_model_name_or_path": str(teacher_folder),
    }


def test_what_is_already_loaded_is_taken_as_it_is(make_model, tokenizer):
    student, teacher = make_model(300), make_model(308, hidden_size=48)
    pair = load_pair(student, teacher, options(), tokenizer, tokenizer)
    assert (pair.student, pair.teacher, pair.tokenizer) == (student, teacher, tokenizer)
    assert pair.vocabulary.ids == tuple(range(300))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({"bf16": True, "teacher_model_init_kwargs": {"dtype": "float32"}}, torch.float32),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, torch.bfloat16),
    ],
)
def test_the_teacher_keeps_its_own_dtype_in_mixed_precision_only(student_folder, half_teacher, values, dtype):
    pair = load_pair(str(student_folder), half_teacher, options(**values), None, None)
    assert pair.teacher.dtype == dtype
    assert pair.student.dtype == torch.float32


def test_arguments_for_the_student_reach_the_student_alone(student_folder, teacher_folder):
    args = options(model_init_kwargs={"attn_implementation": "eager"})
    pair = load_pair(str(student_folder), str(teacher_folder), args, None, None)
    assert pair.student.config._attn_implementation == "eager"
    assert pair.teacher.config._attn_implementation != "eager"


def test_without_a_teacher_every_token_of_the_student_counts(student_folder):
    for args in (options(objective="sft"), options(kd_ratio=0.0)):
        pair = load_pair(str(student_folder), None, args, None, None)
        assert pair.teacher is None
        assert pair.vocabulary.ids == tuple(range(300))
        assert pair.names["teacher_model_name_or_path"] is None


def test_a_missing_teacher_is_refused_where_one_is_needed(student_folder):
    for objective in ("taid", "jsd"):
        with pytest.raises(
            ValueError, match=f"objective '{objective}' needs a teacher: set teacher_model_name_or_path"
        ):
            load_pair(str(student_folder), None, options(objective=objective), None, None)
    with pytest.raises(ValueError, match="tokenizer_from: teacher needs a teacher"):
        load_pair(str(student_folder), None, options(objective="sft", tokenizer_from="teacher"), None, None)


def test_a_model_made_in_memory_needs_its_tokenizer(make_model, tokenizer):
    student, teacher = make_model(seed=1), make_model(seed=2)
    with pytest.raises(ValueError, match="a student made in memory needs its tokenizer: pass processing_class"):
        load_pair(student, teacher, options(), None, tokenizer)
    with pytest.raises(ValueError, match="a teacher made in memory needs its tokenizer: pass teacher_processing_class"):
        load_pair(student, teacher, options(), tokenizer, None)


def test_one_object_cannot_teach_itself(make_model, tokenizer):
    model = make_model()
    with pytest.raises(ValueError, match="student and teacher are one object: load the teacher a second time"):
        load_pair(model, model, options(), tokenizer, tokenizer)


def test_one_name_given_twice_is_two_models(student_folder):
    name = str(student_folder)
    pair = load_pair(name, name, options(), None, None)
    assert pair.student is not pair.teacher


def test_the_teachers_tokenizer_becomes_the_students_where_asked(student_folder, teacher_folder, copied):
    folder = copied(edit("tokenizer_config.json", eos_token="<|im_end|>"))
    description = json.loads((folder / "tokenizer.json").read_text())
    vocab = description["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="first difference is token 'B', id 35 for the student and 36 for the teacher"):
        load_pair(str(folder), str(teacher_folder), options(), None, None)

    pair = load_pair(str(folder), str(teacher_folder), options(tokenizer_from="teacher"), None, None)
    assert pair.tokenizer("ABBA")["input_ids"] == [35, 36, 36, 35]
    before, after = load_model(str(student_folder), role="student"), pair.student
    a, b = (after.get_input_embeddings().weight[i] for i in (35, 36))
    assert torch.equal(a, before.get_input_embeddings().weight[36])
    assert torch.equal(b, before.get_input_embeddings().weight[35])
    assert pair.vocabulary.ids == tuple(range(300))
    assert after.generation_config.eos_token_id == 0


def test_a_tokenizer_that_would_not_be_read_back_is_not_taken_over(teacher_folder, tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # transformers opens each qwen2 folder with Qwen2Tokenizer, which takes digits one by one.
    message = (
        r"a qwen2 model with this tokenizer would be opened by transformers as one with Qwen2Tokenizer, which makes"
    )
    with pytest.raises(ValueError, match=message):
        load_pair(str(tmp_path), str(teacher_folder), options(tokenizer_from="teacher"), None, None)


def test_an_adapters_fault_is_named(student_folder, tmp_path):
    base = load_model(str(student_folder), role="student")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)teacher .* could not be loaded: Found missing adapter keys"):
        load_model(str(tmp_path), role="teacher")
    edit("adapter_config.json", base_model_name_or_path="./gone")(tmp_path)
    with pytest.raises(ValueError, match=r"the base model of teacher .*, folder './gone' does not exist"):
        load_model(str(tmp_path), role="teacher")


def test_evaluating_leaves_4_bit_weights_trainable(make_model, tmp_path):
    make_model(hidden_size=64).save_pretrained(tmp_path)
    options = {"quantization_config": quantization_config("bnb_4bit", torch.float32), "device_map": {"": "cpu"}}
    student = load_model(str(tmp_path), role="student", **options)
    student = get_peft_model(student, LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian"))
    ids = torch.arange(24)[None]

    def gradients():
        student.train().zero_grad()
        student(input_ids=ids, labels=ids).loss.backward()
        return {n: w.grad.clone() for n, w in student.named_parameters() if w.requires_grad}

    before = gradients()
    with torch.no_grad():
        student.eval()(input_ids=ids)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, before[name], rtol=0, atol=0)
