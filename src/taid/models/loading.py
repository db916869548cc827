"""Load models and tokenizers from a folder or a Hub name; errors name the model and the remedy.

Weights load from safetensors only. Remote code runs only if it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.utils import cached_file, find_adapter_config_file

from taid.models.folder import check_folder
from taid.models.vocabulary import adopt_special_tokens, split_differently

if TYPE_CHECKING:
    pass

# What from_pretrained raises for a folder, an argument or a package that is not as it should be.
_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, ImportError, TypeError, AttributeError, LookupError)

_ORIGIN = ("revision", "trust_remote_code")

# Causal masks that old GPT-2, GPT-J and GPT-Neo files hold as weights; transformers itself ignores some of them only.
_MASKS = re.compile(r"\.(attn|attention)\.((masked_)?bias|causal_mask)$")


def require_read_back(config: Any, tokenizer: Any) -> None:
    """Check that transformers opens a folder with this configuration and tokenizer as this tokenizer.

    For some model types transformers chooses the type's own tokenizer class instead.

    Raises:
        ValueError: it opens as another tokenizer; shows a text that it splits differently.
    """
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
    if found := split_differently(tokenizer, again):
        text, ours, theirs = found
        raise ValueError(
            f"a {config.model_type} model with this tokenizer would be opened by transformers as one with "
            f"{type(again).__name__}, which makes {theirs} of {text!r} instead of {ours}: choose a student of another "
            "type, or a teacher of the student's family"
        )


def is_vision_language(config: Any) -> bool:
    """Return whether a configuration belongs to a vision-language model."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and getattr(config, "vision_config", None) is not None


def tokenizer_of(processing_class: Any) -> Any:
    """Return the tokenizer of a processor; a tokenizer is returned unchanged."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def load_model(name_or_path: str, *, role: str, **init_kwargs: Any) -> Any:
    """Load a causal or vision-language model whose every weight is on disk.

    An adapter is loaded as a ``PeftModel`` on its base model; only the adapter's weights are trainable.

    Args:
        name_or_path: a folder written by ``save_pretrained``, also that of an adapter, or a Hub name.
        role: "student" or "teacher", for the messages.
        **init_kwargs: passed to ``from_pretrained`` of transformers' auto classes (revision, dtype, ...).

    Raises:
        ValueError: the folder is missing, holds no safetensors, a truncated file, or weights that do not match its
            config.json; or `init_kwargs` cannot be satisfied.
    """
    check_folder(name_or_path, role)
    if (adapter := adapter_config(name_or_path, init_kwargs.get("revision"))) is not None:
        return _load_adapter(name_or_path, adapter, role, init_kwargs)
    options = init_kwargs | {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    origin = {name: init_kwargs[name] for name in _ORIGIN if name in init_kwargs}
    try:
        kind = (
            AutoModelForImageTextToText
            if is_vision_language(load_config(name_or_path, **origin))
            else AutoModelForCausalLM
        )
        with read_whole():
            model, info = kind.from_pretrained(os.path.expanduser(name_or_path), **options)
    except _ERRORS as error:
        raise ValueError(f"{role} {name_or_path!r} could not be loaded: {error}") from error
    remedy = "The folder is incomplete or its config.json belongs to another model."
    for name, in_file, in_model in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{role} {name_or_path!r} could not be loaded: {name} is {list(in_file)} in the file and {list(in_model)} "
            f"by the config. {remedy}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{role} {name_or_path!r} lacks {len(missing)} of its weights, the first is {missing[0]}: they would be "
            f"random. {remedy}"
        )
    if unexpected := sorted(name for name in info["unexpected_keys"] if not _MASKS.search(name)):
        raise ValueError(
            f"{role} {name_or_path!r} holds weights that its config has no place for, {len(unexpected)} in all, first "
            f"{unexpected[0]}: the model would be cut. {remedy}"
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes (0.50.2) would pack 4-bit weights for good at the first evaluation on such a CPU, in a form
            # that passes no gradients on, and fail where they are small.
            module.support_avx512bf16_for_cpu = False
    return model


def _load_adapter(name_or_path: str, config: dict[str, Any], role: str, init_kwargs: dict[str, Any]) -> PeftModel:
    base = load_model(
        config["base_model_name_or_path"], role=f"the base model of {role} {name_or_path!r},",
        **init_kwargs | {"revision": config.get("revision")},
    )  # fmt: skip
    try:
        folder, revision = os.path.expanduser(name_or_path), init_kwargs.get("revision")
        weights = Path(cached_file(folder, "adapter_model.safetensors", revision=revision))
        if PeftConfig.from_pretrained(weights.parent).is_prompt_learning:
            raise ValueError("it adds virtual tokens, which another model has not: use LoRA")
        holds_embeddings = _fit_embeddings(base, weights)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, weights.parent, is_trainable=True)
    except (*_ERRORS, UserWarning) as error:
        raise ValueError(f"{role} {name_or_path!r} could not be loaded: {error}") from error
    model.name_or_path = name_or_path  # its configuration names the base model
    if holds_embeddings and not isinstance(base.get_input_embeddings(), ModulesToSaveWrapper):
        keep_embeddings(model)
    return model


def keep_embeddings(model: PeftModel) -> None:
    """Let an adapter be saved with its embeddings: peft saves resized ones, but not those whose rows have moved."""
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=True)


def _fit_embeddings(base: Any, weights: Path) -> bool:
    """Resize the embeddings of `base` to those in the adapter's file, if it holds any (tokenizer_from: teacher)."""
    name = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    with safe_open(weights, framework="pt") as file:
        keys = [key for key in file.keys() if f".{name}." in key and key.endswith("weight") and "lora_" not in key]  # noqa: SIM118
        rows = {file.get_slice(key).get_shape()[0] for key in keys}
    if not rows:
        return False
    if rows != {base.get_input_embeddings().weight.shape[0]}:
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)
    if (weights.parent / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(weights.parent)
        if tokenizer.get_vocab() != AutoTokenizer.from_pretrained(base.name_or_path).get_vocab():
            adopt_special_tokens(base, tokenizer)
    return True


def load_config(name_or_path: str, **origin: Any) -> Any:
    """Return the configuration of a model; for an adapter that of its base model."""
    if (adapter := adapter_config(name_or_path, origin.get("revision"))) is not None:
        name_or_path = adapter["base_model_name_or_path"]
        origin |= {"revision": adapter.get("revision")}
    return AutoConfig.from_pretrained(os.path.expanduser(name_or_path), **origin)


def adapter_config(name_or_path: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return the content of adapter_config.json; None if there is none, or if there is a whole model."""
    name_or_path = os.path.expanduser(name_or_path)
    if (Path(name_or_path) / "config.json").is_file():
        return None
    path = find_adapter_config_file(name_or_path, revision=revision)
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("base_model_name_or_path"), str):
        raise ValueError(f"{path} names no base model (base_model_name_or_path)")
    return config


def load_tokenizer(name_or_path: str, *, role: str, **init_kwargs: Any) -> Any:
    """Load the tokenizer of a model; a ValueError names the model."""
    check_folder(name_or_path, role)
    return open_tokenizer(name_or_path, role, **init_kwargs)


def load_processing_class(name_or_path: str, *, role: str, has_images: bool = False, **init_kwargs: Any) -> Any:
    """Load the processor of a vision-language model, or the tokenizer of another.

    Args:
        name_or_path: a folder or a Hub name.
        role: "student" or "teacher", for the messages.
        has_images: whether the rows have images, which need the processor; otherwise a tokenizer will do.
        **init_kwargs: passed to ``from_pretrained`` (revision, trust_remote_code).

    Raises:
        ValueError: it cannot be loaded; names the model, and the package that it needs.
    """
    check_folder(name_or_path, role)
    try:
        if is_vision_language(load_config(name_or_path, **init_kwargs)):
            return AutoProcessor.from_pretrained(os.path.expanduser(name_or_path), **init_kwargs)
    except _ERRORS as error:
        if has_images:
            raise ValueError(
                f"the processor of {role} {name_or_path!r} could not be loaded: {error}. (Most need torchvision, some "
                "num2words: pip install torchvision num2words)"
            ) from error
    return open_tokenizer(name_or_path, role, **init_kwargs)


def open_tokenizer(name_or_path: str, role: str, **init_kwargs: Any) -> Any:
    """Load a tokenizer from a Hub name, or from a folder that may hold nothing else; `role` is for messages."""
    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(name_or_path), **init_kwargs)
    except _ERRORS as error:
        raise ValueError(f"the tokenizer of {role} {name_or_path!r} could not be loaded: {error}") from error


def output_rows(model: Any) -> int:
    """Return the number of rows of a model's output head: its tokens and their padding."""
    return int(model.get_output_embeddings().weight.shape[0])


def learned_positions(model: Any) -> int | None:
    """Return the size of the learned position embedding (GPT-2, OPT); None if positions are computed, as with RoPE."""
    if not hasattr(model, "config"):
        return None  # no teacher, or one of the user's
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = (module for name, module in model.named_modules() if re.search(r"wpe$|embed_positions$", name))
    return most if any(isinstance(table, torch.nn.Embedding) for table in tables) else None


@contextlib.contextmanager
def read_whole() -> Iterator[None]:
    """Let transformers load whole models within this context; ZeRO-3 would split them."""
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref  # noqa: SLF001
    deepspeed._hf_deepspeed_config_weak_ref = None  # noqa: SLF001
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before  # noqa: SLF001


def quantization_config(name: str, compute: torch.dtype) -> Any:
    """Return the configuration with which transformers quantizes a model as it loads; 4 bits compute in `compute`.

    Raises:
        ValueError: its package is not installed.
    """
    from transformers import BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig

    package = {"bnb": "bitsandbytes", "torchao": "torchao"}.get(name.partition("_")[0])
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"{name} needs {package}: pip install {package}")
    if name == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "bnb_4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    if name == "fp8":
        return FineGrainedFP8Config()
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if name == "torchao_int8" else Int4WeightOnlyConfig())
