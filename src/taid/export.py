"""``taid export``: a student as other programs want it, compared with the model it came from before it is kept.

peft merges adapters and llama.cpp writes GGUF. Ours is that nothing half-written stands under the output's name, and
that the result is known to say what its source says: at each place of the source's greedy text the result's most
probable token is looked up. Where they are the same at every place, the two greedy texts are the same.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from taid.artifacts import run_folder
from taid.models.generation import decoding, generate
from taid.models.loading import (
    load_config,
    load_model,
    load_processing_class,
    load_tokenizer,
    require_read_back,
    tokenizer_of,
)

Format = Literal["merged-lora", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)
MARK = "taid_export.json"  # what makes a folder ours
PROMPTS = ("Once upon a time", "The capital of France is", "Write a poem about the sea.", "Café, 東京 and 😀.")
NEW_TOKENS = 32
# Mean KL from source to result, nats a token, that the weights' dtype explains; a layer left out costs far more.
_ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
_GGUF_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_CONVERTER, _QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
_GET_LLAMA_CPP = "get llama.cpp (https://github.com/ggml-org/llama.cpp) and name its folder with --llama_cpp"


def export(
    model: Path,
    output: Path,
    format_: Format,
    *,
    llama_cpp: Path | None = None,
    quantization: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a student in another format to the folder `output`, once it is seen to answer as before.

    Args:
        model: a folder: for ``merged-lora`` an adapter's, for ``gguf`` a whole model's.
        output: the new folder; it appears when it is whole.
        format_: ``merged-lora`` (peft's ``merge_and_unload``, stored in the base model's dtype) or ``gguf`` (by
            llama.cpp's own converter, in the dtype of the weights).
        llama_cpp: a llama.cpp folder with ``convert_hf_to_gguf.py``; PATH is searched without it.
        quantization: a type of llama.cpp's ``llama-quantize``, as Q4_K_M.
        overwrite: replace an earlier export.

    Returns:
        The folder, or the GGUF file in it.

    Raises:
        ValueError: a folder, tool or option is not as it should be, or the result differs from its source beyond
            rounding; says what and the remedy. `output` is then as it was.
    """
    output = output.expanduser().absolute()
    partial, old = (output.parent / f"{output.name}.{end}" for end in ("partial", "old"))
    _check_arguments(model, format_, quantization)
    _check_free(output, partial, old, overwrite=overwrite)
    with run_folder.claimed(partial, "--output"):
        _clear(partial)  # what a kill left
        try:
            made = {"source": model.resolve().name, "format": format_, "quantization": quantization}
            mark: dict[str, Any] = made | {"taid": metadata.version("taid")}
            run_folder.write_atomically(partial / MARK, json.dumps(mark, indent=2) + "\n")
            file = _gguf(model, partial, llama_cpp, quantization) if format_ == "gguf" else _merge(model, partial)
            mark["files"] = sorted(path.name for path in partial.iterdir())
            run_folder.write_atomically(partial / MARK, json.dumps(mark, indent=2) + "\n")
        except Exception:
            _clear(partial)
            raise
        if output.exists():
            _clear(old)
            output.replace(old)
        partial.replace(output)
        _clear(old)
    if old.exists():
        old.rmdir()
    return output / file


def _check_arguments(model: Path, format_: Format, quantization: str | None) -> None:
    if format_ not in FORMATS:
        raise ValueError(f"format {format_!r} is none of {', '.join(FORMATS)}")
    if not model.is_dir():
        raise ValueError(f"there is no folder {model}: give a folder, as the output_dir of a run")
    is_adapter = (model / "adapter_config.json").is_file()
    if format_ == "merged-lora" and not is_adapter:
        raise ValueError(f"{model} holds no adapter_config.json: there is nothing to merge, it can be used as it is")
    if format_ == "merged-lora" and quantization:
        raise ValueError(f"--quantization {quantization} belongs to --format gguf")
    if format_ == "gguf" and is_adapter:
        raise ValueError(f"{model} is an adapter: first taid export {model} --format merged-lora --output MERGED")
    for path in (model / name for name in ("config.json", "tokenizer_config.json", "adapter_config.json")):
        if not path.is_file():
            continue
        try:
            keys = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if "auto_map" in keys:
            raise ValueError(f"{path} asks for code of its own (auto_map), which is not run")


def _check_free(output: Path, *others: Path, overwrite: bool) -> None:
    if not output.name:
        raise ValueError(f"--output {output} is the root of the file system: name a folder")
    if output.is_symlink():
        raise ValueError(f"--output: {output} is a link, in whose place the export would be put: name where it leads")
    for folder in (output, *others):
        if os.path.lexists(folder) and not folder.is_dir():
            raise ValueError(f"--output: {folder} is a file: choose another folder")
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if names and not names & {MARK, f"{MARK}.partial"}:
            raise ValueError(f"--output: {folder} holds files that are no export of taid: choose another folder")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise ValueError(f"--output: {output} holds an earlier export: choose another folder, or add --overwrite")
        ours = json.loads((output / MARK).read_text(encoding="utf-8")).get("files", ())
        if foreign := sorted({path.name for path in output.iterdir()} - {*ours, MARK}):
            raise ValueError(f"--output: {output} holds {foreign[0]}, which is not of the export: move it away")


def _clear(folder: Path) -> None:
    # The mark goes last: a kill in between leaves a folder that is still known as ours.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MARK) if folder.exists() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# --- adapters ---------------------------------------------------------------------------------------------------------


def _merge(source: Path, folder: Path) -> str:
    """Merge an adapter into its base model, in float32, and store the result in the base model's dtype."""
    config = PeftConfig.from_pretrained(source)
    name = config.base_model_name_or_path
    if config.is_prompt_learning:
        raise ValueError(
            f"{source} holds {config.peft_type} prompts, which no weights can hold: only LoRA and DoRA merge"
        )
    if getattr(load_config(name, revision=config.revision), "quantization_config", None) is not None:
        raise ValueError(f"base model {name!r} is quantized: set base_model_name_or_path in adapter_config.json to "
                         "the model it was made from")  # fmt: skip
    model = load_model(str(source), role="adapter", dtype="auto").eval()
    base = model.get_base_model()
    stored = base.dtype
    has_tokenizer = (source / "tokenizer_config.json").is_file()
    processing_class = load_processing_class(str(source if has_tokenizer else name), role="student")
    tokenizer = tokenizer_of(processing_class)
    require_read_back(base.config, tokenizer)
    answers = _answers(model.float(), tokenizer)

    head = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) or isinstance(base.get_input_embeddings(), BaseTunerLayer):
        # Tied matrices are one, and what is merged into one of them would come into the other too.
        layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*(tie_word_embeddings|no longer tied)")
        merged = model.merge_and_unload(safe_merge=True)
    merged.to(stored).save_pretrained(folder)
    processing_class.save_pretrained(folder)
    del model, base, merged
    result = load_model(str(folder), role="result", dtype=torch.float32).eval()
    engine = Engine("transformers", _tokenize(load_tokenizer(str(folder), role="result")), _logits(result))
    _require_same(answers, engine, stored)
    return ""


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _gguf(source: Path, folder: Path, llama_cpp: Path | None, quantization: str | None) -> str:
    converter = _find(_CONVERTER, llama_cpp, ("",))
    quantizer = _find(_QUANTIZER, llama_cpp, ("", "build/bin", "bin")) if quantization else None
    if quantizer and quantization not in _called([str(quantizer), "--help"]).stdout.split():
        raise ValueError(f"{_QUANTIZER} has no type {quantization}: {_QUANTIZER} --help lists them")
    model = load_model(str(source), role="model", dtype="auto").eval()
    stored = model.dtype
    if stored not in _GGUF_TYPES:
        raise ValueError(f"{source} is stored in {stored}: export takes float32, float16 and bfloat16")
    answers = _answers(model.float(), load_tokenizer(str(source), role="model"))
    del model

    name = source.resolve().name
    file = folder / f"{name}-{_GGUF_TYPES[stored].upper()}.gguf"
    command = [sys.executable, str(converter), str(source), "--outfile", str(file), "--outtype", _GGUF_TYPES[stored]]
    _write_gguf(_CONVERTER, file, command)
    engine = _gguf_engine(file)
    if engine is not None:
        _require_same(answers, engine, stored)
    if quantizer:
        whole, file = file, folder / f"{name}-{quantization}.gguf"
        _write_gguf(_QUANTIZER, file, [str(quantizer), str(whole), str(file), str(quantization)])
        whole.unlink()
        if engine is not None and (engine := _gguf_engine(file)) is not None:
            print(f"{file.name}: {_compared(answers, engine)} ({engine.name}); what the quantization costs")
    return file.name


def _find(tool: str, llama_cpp: Path | None, places: tuple[str, ...]) -> Path:
    """A program of llama.cpp's: in its folder where that is given, else on PATH."""
    if llama_cpp is not None and not llama_cpp.is_dir():
        raise ValueError(f"--llama_cpp: there is no folder {llama_cpp}")
    found = [llama_cpp / place / tool for place in places if (llama_cpp / place / tool).is_file()] if llama_cpp else []
    on_path = shutil.which(tool, mode=os.F_OK)
    if not found and on_path is None:
        where = f"neither in {llama_cpp} nor on PATH" if llama_cpp else "not on PATH"
        build = f" and build it (cmake -B build && cmake --build build -t {_QUANTIZER})" if tool == _QUANTIZER else ""
        raise ValueError(f"llama.cpp's {tool} is {where}: {_GET_LLAMA_CPP}{build}")
    return found[0] if found else Path(str(on_path))


def _called(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def _write_gguf(tool: str, file: Path, command: list[str]) -> None:
    done = _called(command)
    if done.returncode or not file.is_file():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        reason, hint = (lines or [f"it ended with status {done.returncode}"])[-1], ""
        if "pre-tokenizer was not recognized" in reason:
            hint = ". llama.cpp knows a byte-level BPE tokenizer by a digest of what it does to a test text"
        elif "No module named" in reason:
            hint = f". It runs in this Python: {sys.executable} -m pip install the package"
        raise ValueError(f"llama.cpp's {tool} failed: {reason}{hint}")


def _gguf_engine(file: Path) -> Engine | None:
    """llama.cpp itself where llama-cpp-python is installed, else transformers' reader of GGUF with package gguf."""
    if importlib.util.find_spec("llama_cpp"):
        return _llama_cpp(file)
    if not importlib.util.find_spec("gguf"):
        print(f"{file.name}: not compared with its source: pip install gguf, or llama-cpp-python")
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ValueError as error:  # an architecture or quantization that transformers does not read
        print(f"{file.name}: not compared with its source: {str(error).partition(chr(10))[0]}")
        return None
    return Engine("transformers; how llama.cpp reads text was not tried: pip install llama-cpp-python",
                  _tokenize(tokenizer), _logits(model))  # fmt: skip


def _llama_cpp(file: Path) -> Engine:
    llama_cpp = importlib.import_module("llama_cpp")
    # The key-value cache in float32 (0), as in the source: float16 is its default.
    model = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0)

    def logits(ids: list[int]) -> Tensor:
        model.reset()
        model.eval(ids)
        return torch.tensor(model.scores[: len(ids)])

    return Engine("llama.cpp", lambda text: list(model.tokenize(text.encode())), logits)


# --- the comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A model that gives the ids of a text, and logits [T, V] for T ids."""

    name: str
    tokenize: Callable[[str], list[int]]
    logits: Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Answer:
    """The source's answer: the ids of a prompt and of its greedy continuation, and the logits behind them."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Comparison:
    """Agreement on greedy tokens, `same` of `total`, and the mean KL(source ‖ result) in nats a token."""

    same: int
    total: int
    kl: float

    def __str__(self) -> str:
        text = "the same greedy text" if self.same == self.total else "not the same greedy text"
        return f"{text}: {self.same} of {self.total} tokens, KL {self.kl:.1e} nats/token"


def _tokenize(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text).input_ids)


def _logits(model: Any) -> Callable[[list[int]], Tensor]:
    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        result: Tensor = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        return result.float().cpu()

    return logits


def _answers(model: Any, tokenizer: Any) -> list[Answer]:
    """Return the source's greedy text for each prompt, which nothing ends early, and its logits."""
    logits, answers = _logits(model), []
    config = decoding(ends=(), padding=0)
    config.use_cache = False  # the logits that are compared are those of one pass, and so are these
    for prompt in PROMPTS:
        prompt_ids = _tokenize(tokenizer)(prompt)
        ids = prompt_ids + generate(model, [prompt_ids], config, max_new_tokens=NEW_TOKENS)[0]
        answers.append(Answer(prompt, prompt_ids, ids, logits(ids)[len(prompt_ids) - 1 : -1]))
    return answers


def _compared(answers: list[Answer], engine: Engine) -> Comparison:
    """Compare the result at the same places. A token that only one of the two has counts in neither distribution."""
    same, divergences = 0, []
    for answer in answers:
        if (ids := engine.tokenize(answer.prompt)) != answer.prompt_ids:
            raise ValueError(
                f"the result reads {answer.prompt!r} as tokens {ids}, its source as {answer.prompt_ids}: {engine.name} "
                "has not got the same tokenizer, and nothing was kept. llama.cpp's converter needs the tokenizer.model "
                "of a SentencePiece tokenizer, which transformers does not save: copy the base model's into the folder"
            )
        theirs = engine.logits(answer.ids)[len(answer.prompt_ids) - 1 : -1]
        shared = min(theirs.shape[-1], answer.logits.shape[-1])
        ours, theirs = (rows[:, :shared].double().log_softmax(-1) for rows in (answer.logits, theirs))
        same += int((theirs.argmax(-1) == torch.tensor(answer.ids[len(answer.prompt_ids) :])).sum())
        divergences.append((ours.exp() * (ours - theirs)).sum(-1))
    return Comparison(same, NEW_TOKENS * len(answers), float(torch.cat(divergences).mean()))


def _require_same(answers: list[Answer], engine: Engine, dtype: torch.dtype) -> None:
    comparison = _compared(answers, engine)
    allowed = _ROUNDING.get(dtype, _ROUNDING[torch.bfloat16])
    if not comparison.kl <= allowed:  # NaN too
        raise ValueError(f"the result does not answer as its source does: {comparison} where {dtype} explains at most "
                         f"{allowed:g} ({engine.name}). Nothing was kept")  # fmt: skip
    print(f"compared with its source: {comparison} ({engine.name})")
