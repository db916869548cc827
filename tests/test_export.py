"""taid export: the result is what its source is, and nothing else stands under its name."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from command_line import run_taid
from taid import TAIDConfig, TAIDTrainer
from taid.cli.main import main
from taid.export import MARK, NEW_TOKENS, PROMPTS, export

HERE = Path(__file__).parent
IDS = torch.tensor([[0, 5, 17, 200, 33, 4, 270]])


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, student_folder, teacher_folder, make_rows):
    """adapter(name, **lora): the folder of a really trained student as `taid train` leaves it, and the student."""
    from datasets import Dataset

    def make(name: str, *, student: Path = student_folder, teacher: Path = teacher_folder, **lora: object) -> Any:
        folder = tmp_path_factory.mktemp("adapters") / name
        arguments = {"tokenizer_from": lora.pop("tokenizer_from", "student")}
        trainer = TAIDTrainer(
            str(student), str(teacher),
            TAIDConfig(output_dir=str(folder), max_steps=2, learning_rate=5e-2, use_cpu=True, bf16=False,
                       per_device_train_batch_size=4, save_strategy="no", report_to="none", **arguments),
            Dataset.from_list(make_rows("text", 8)),
            peft_config=LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **lora),
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        return folder, trainer.model

    return make


def as_adapter(folder: Path, base: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()


def never_trained(folder: Path, base: Path, **lora: object) -> Path:
    """An adapter with random weights: TRL trains none on an output head, peft can."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **lora))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


ADAPTERS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "biases, and a head and embeddings that are trained whole and were tied": {
        "target_modules": ["v_proj"], "bias": "lora_only", "modules_to_save": ["lm_head", "embed_tokens"],
    },
    "a tied head": {"target_modules": ["q_proj", "lm_head"]},
    "tied embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:You are using 'all-linear'")
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_adapter_says_what_the_adapter_says(name, adapter, student_folder, tmp_path, capsys):
    if name == "a tied head":
        folder = never_trained(tmp_path / "run", student_folder, **ADAPTERS[name])
    else:
        folder = adapter("run", **ADAPTERS[name])[0]
    merged = export(folder, tmp_path / "merged", "merged-lora")
    assert (
        f"the same greedy text: {NEW_TOKENS * len(PROMPTS)} of {NEW_TOKENS * len(PROMPTS)}" in capsys.readouterr().out
    )

    before, base = as_adapter(folder, student_folder), AutoModelForCausalLM.from_pretrained(student_folder)
    after = AutoModelForCausalLM.from_pretrained(merged)
    expected = logits(before)
    assert (expected - logits(base)).abs().max() > 0.1, "two steps taught it something"
    torch.testing.assert_close(logits(after), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    options = {"do_sample": False, "max_new_tokens": 20}
    assert after.generate(IDS, **options).tolist() == before.generate(input_ids=IDS, **options).tolist()

    names = {path.name for path in merged.iterdir()}
    assert not [file for file in names if file.startswith("adapter")]
    assert {MARK, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (student_folder, merged)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template is not None
    assert after.generation_config.eos_token_id == base.generation_config.eos_token_id
    tied = after.get_output_embeddings().weight is after.get_input_embeddings().weight
    assert tied == (name in ("lora", "dora"))


@pytest.mark.parametrize("rows", [310, 300])
def test_a_student_that_took_its_teachers_tokenizer_is_merged_with_its_new_embeddings(
    rows, adapter, tokenizer, make_model, tmp_path
):
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)
    words = words[:3] + words[:2:-1] + [f"<{n}>" for n in range(rows - 300)]  # other ids, and some more
    bpe["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(bpe)), eos_token="<|endoftext|>",
                                    pad_token="<|endoftext|>")  # fmt: skip
    other.save_pretrained(tmp_path / "teacher")
    make_model(rows, seed=7).save_pretrained(tmp_path / "teacher")
    folder, trained = adapter(
        "run", teacher=tmp_path / "teacher", tokenizer_from="teacher", target_modules=["q_proj", "v_proj"]
    )
    merged = AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "merged", "merged-lora"))
    assert merged.get_input_embeddings().weight.shape[0] == rows
    torch.testing.assert_close(logits(merged), logits(trained.eval()), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == other.get_vocab()


def test_a_merged_model_is_stored_in_its_base_models_dtype(adapter, student_folder, tmp_path, capsys):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(student_folder).bfloat16().save_pretrained(half)
    AutoTokenizer.from_pretrained(student_folder).save_pretrained(half)
    folder = adapter("run", student=half, target_modules=["q_proj", "up_proj"])[0]
    merged = AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "merged", "merged-lora"), dtype="auto")
    assert merged.dtype == torch.bfloat16
    once = as_adapter(folder, half).merge_and_unload()  # in float32, and rounded a single time
    for name, weight in once.bfloat16().state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name]), name
    assert "KL" in capsys.readouterr().out


def test_a_merge_that_does_not_answer_alike_is_not_kept(adapter, tmp_path, monkeypatch):
    folder = adapter("run", target_modules=["q_proj", "up_proj"])[0]
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(
        ValueError, match=r"does not answer as its source does: .* where torch\.float32 explains at most"
    ):
        export(folder, tmp_path / "merged", "merged-lora")
    assert list(tmp_path.iterdir()) == []


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_gguf_by_the_converter_says_what_the_model_says(student_folder, tmp_path, capsys):
    command = [
        "export",
        str(student_folder),
        "--format",
        "gguf",
        "--output",
        str(tmp_path / "g"),
        "--llama_cpp",
        str(HERE),
    ]
    assert main(command) == 0
    told = capsys.readouterr()
    assert f"the same greedy text: {NEW_TOKENS * len(PROMPTS)} of" in told.out
    assert "how llama.cpp reads text was not tried" in told.out
    assert {path.name for path in (tmp_path / "g").iterdir()} == {MARK, "student-F32.gguf"}
    assert json.loads((tmp_path / "g" / MARK).read_text())["source"] == "student"


def test_a_gguf_that_answers_otherwise_is_not_kept(student_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN", "wrong")
    with pytest.raises(ValueError, match="does not answer as its source does: not the same greedy text"):
        export(student_folder, tmp_path / "g", "gguf", llama_cpp=HERE)
    assert list(tmp_path.iterdir()) == []


def test_what_the_converter_refuses_is_told_in_its_own_words(student_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN", "refuse")
    with pytest.raises(
        ValueError, match=r"convert_hf_to_gguf\.py failed: NotImplementedError: BPE pre-tokenizer .* by a "
    ):
        export(student_folder, tmp_path / "g", "gguf", llama_cpp=HERE)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_in_the_result_is_named(student_folder, tmp_path, monkeypatch):
    from taid import export as module

    def shifted(file):
        engine = gguf_engine(file)
        return module.Engine("an engine", lambda text: [7, *engine.tokenize(text)], engine.logits)

    gguf_engine = module._gguf_engine
    monkeypatch.setattr(module, "_gguf_engine", shifted)
    with pytest.raises(ValueError, match=r"reads 'Once upon a time' as tokens \[7, .*tokenizer\.model"):
        export(student_folder, tmp_path / "g", "gguf", llama_cpp=HERE)


def test_a_quantization_is_llama_quantizes(student_folder, tmp_path, capsys):
    tools = tmp_path / "llama.cpp"
    (tools / "build" / "bin").mkdir(parents=True)
    (tools / "convert_hf_to_gguf.py").symlink_to(HERE / "convert_hf_to_gguf.py")
    quantizer = tools / "build" / "bin" / "llama-quantize"
    quantizer.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "print('   8  or  Q8_0 : 7.96G') if '--help' in sys.argv else shutil.copy(*sys.argv[1:3])\n"
    )
    quantizer.chmod(0o755)
    path = export(student_folder, tmp_path / "g", "gguf", llama_cpp=tools, quantization="Q8_0")
    assert path == tmp_path / "g" / "student-Q8_0.gguf"
    assert {file.name for file in path.parent.iterdir()} == {MARK, path.name}, "the unquantized file is not kept"
    assert "student-Q8_0.gguf: the same greedy text" in capsys.readouterr().out
    with pytest.raises(ValueError, match="llama-quantize has no type Q99"):
        export(student_folder, tmp_path / "h", "gguf", llama_cpp=tools, quantization="Q99")


# --- the output -------------------------------------------------------------------------------------------------------


def test_only_an_earlier_export_is_replaced_and_only_when_asked(student_folder, tmp_path):
    output = tmp_path / "out"
    path = export(student_folder, output, "gguf", llama_cpp=HERE)
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="holds an earlier export: choose another folder, or add --overwrite"):
        export(student_folder, output, "gguf", llama_cpp=HERE)
    assert path.read_bytes() == b"old"
    export(student_folder, output, "gguf", llama_cpp=HERE, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years")
    with pytest.raises(ValueError, match="holds files that are no export of taid"):
        export(student_folder, tmp_path / "mine", "gguf", llama_cpp=HERE, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "ten years"

    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, which is not of the export: move it away"):
        export(student_folder, output, "gguf", llama_cpp=HERE, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"


def test_an_export_does_not_take_the_place_of_a_link(student_folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="link is a link, in whose place the export would be put"):
        export(student_folder, tmp_path / "link", "gguf", llama_cpp=HERE)
    assert (tmp_path / "link").is_symlink()


def test_no_export_goes_to_the_root_of_the_file_system(student_folder):
    with pytest.raises(ValueError, match="--output / is the root of the file system: name a folder"):
        export(student_folder, Path("/"), "gguf", llama_cpp=HERE)


def test_a_description_that_is_not_json_is_named(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"')
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON: Expecting"):
        export(tmp_path / "adapter", tmp_path / "out", "merged-lora")


def test_an_export_that_fails_leaves_the_earlier_one(student_folder, tmp_path, monkeypatch):
    path = export(student_folder, tmp_path / "out", "gguf", llama_cpp=HERE)
    before = path.read_bytes()
    monkeypatch.setenv("STAND_IN", "wrong")
    with pytest.raises(ValueError, match="does not answer"):
        export(student_folder, tmp_path / "out", "gguf", llama_cpp=HERE, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.cli
def test_a_killed_export_leaves_nothing_under_its_name_and_the_next_one_works(student_folder, tmp_path):
    command = ["export", student_folder, "--format", "gguf", "--output", tmp_path / "out", "--llama_cpp", HERE]
    assert run_taid(*command, env=os.environ | {"STAND_IN": "kill"}, timeout=120).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert run_taid(*command, timeout=120).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MARK, "student-F32.gguf"}


def test_mistakes_are_named_before_anything_is_written(adapter, student_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    lora = adapter("run", target_modules=["q_proj"])[0]
    own_code = tmp_path / "own_code"
    own_code.mkdir()
    (own_code / "config.json").write_text('{"auto_map": {"AutoConfig": "configuration.Config"}}')
    (tmp_path / "file").touch()
    for model, options, message in (
        (tmp_path / "nowhere", ["--format", "gguf"], "there is no folder"),
        (student_folder, ["--format", "merged-lora"], "there is nothing to merge"),
        (lora, ["--format", "gguf"], "is an adapter: first taid export"),
        (lora, ["--format", "merged-lora", "--quantization", "Q8_0"], "belongs to --format gguf"),
        (own_code, ["--format", "gguf"], "asks for code of its own (auto_map), which is not run"),
        (student_folder, ["--format", "gguf"], "convert_hf_to_gguf.py is not on PATH: get llama.cpp"),
        (student_folder, ["--format", "gguf", "--llama_cpp", str(tmp_path / "no")], "--llama_cpp: there is no folder"),
        (student_folder, ["--format", "gguf", "--llama_cpp", str(HERE), "--quantization", "Q8_0"],
         "llama-quantize is neither in"),
        (student_folder, ["--format", "gguf", "--output", str(tmp_path / "file")], "file is a file"),
    ):  # fmt: skip
        assert main(["export", str(model), "--output", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
