"""From a folder or a Hub name to a loaded model and tokenizer, with errors that say which model and what to do.

Weights load from safetensors only, and remote code runs only when asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_model(name_or_path: str, *, role: str, **init_kwargs: Any) -> Any:
    """Load a causal language model whose every weight is on disk.

    Args:
        name_or_path: a folder written by ``save_pretrained``, or a Hub name.
        role: "student" or "teacher", for the messages.
        **init_kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (revision, dtype, ...).

    Raises:
        ValueError: the folder is missing, holds no safetensors, a truncated file, or a model with missing weights.
    """
    _check_folder(name_or_path, role)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path, use_safetensors=True, output_loading_info=True, **init_kwargs
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{role} {name_or_path!r} could not be loaded: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{role} {name_or_path!r} lacks {len(missing)} of its weights, the first is {missing[0]}: they would be "
            "random. The folder is incomplete or its config.json belongs to another model."
        )
    return model


def load_tokenizer(name_or_path: str, *, role: str, **init_kwargs: Any) -> Any:
    """Load the tokenizer that belongs to a model; raises a ValueError that names the model."""
    _check_folder(name_or_path, role)
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **init_kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer of {role} {name_or_path!r} could not be loaded: {error}") from error


def output_rows(model: Any) -> int:
    """The number of rows of a model's output head: its tokens and their padding."""
    return int(model.get_output_embeddings().weight.shape[0])


def _check_folder(name_or_path: str, role: str) -> None:
    """Say what is wrong with a local model folder before transformers does, which would ask the Hub instead."""
    folder = Path(name_or_path).expanduser()
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1 or os.sep != "/"
    if not folder.exists():
        if looks_local and "/" in name_or_path:
            raise ValueError(f"{role} folder {name_or_path!r} does not exist")
        return
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{role} folder {name_or_path!r} holds no config.json: it is not a folder written by save_pretrained"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(
            f"{role} folder {name_or_path!r} holds no *.safetensors file. Other formats are not loaded, because "
            "pickled weights can run code: convert with model.save_pretrained(folder)."
        )
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{role} weights {path} are truncated or damaged ({error}): copy the file again"
            ) from error
