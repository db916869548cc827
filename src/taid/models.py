"""From a folder or a Hub name to a loaded model and tokenizer, with errors that say which model and what to do.

Weights load from safetensors only, and remote code runs only when asked for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from taid.vocabulary import Vocabulary, adopt_tokenizer

if TYPE_CHECKING:
    from taid.cache import Cache
    from taid.config import TAIDConfig
    from taid.server import Server

# What from_pretrained raises for a folder, an argument or a package that is not as it should be.
_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, ImportError, TypeError, AttributeError, LookupError)

# Causal masks that old GPT-2, GPT-J and GPT-Neo files hold as weights; transformers itself ignores some of them only.
_MASKS = re.compile(r"\.(attn|attention)\.((masked_)?bias|causal_mask)$")


@dataclass(frozen=True)
class Pair:
    """Student and teacher, loaded and known to fit.

    Attributes:
        student: the model that is trained.
        tokenizer: the student's; the teacher's where the student was given it.
        teacher: a model; None where nothing is distilled, or where a cache or a server answers and nothing is compared.
        teacher_tokenizer: None where there is no teacher at all.
        vocabulary: the token ids that both predict.
        names: where the two came from, under the names of the configuration.
    """

    student: Any
    tokenizer: Any
    teacher: Any
    teacher_tokenizer: Any
    vocabulary: Vocabulary
    names: dict[str, str | None]


def load_pair(
    student: Any, teacher: Any, args: TAIDConfig, tokenizer: Any, teacher_tokenizer: Any,
    elsewhere: Cache | Server | None = None,
) -> Pair:  # fmt: skip
    """Load what is given by name, and match the vocabularies.

    Where a cache or a server answers for the teacher, no teacher is loaded, unless it is compared with the server.

    Raises:
        ValueError: a model cannot be loaded, a teacher is missing, or the tokenizers differ; says which and the remedy.
    """
    if teacher is None and elsewhere is None and args.distillation_share > 0:
        raise ValueError(
            f"objective {args.objective!r} needs a teacher: set teacher_model_name_or_path, teacher_cache or "
            "teacher_server_url"
        )
    if teacher is None and elsewhere is None and args.tokenizer_from == "teacher":
        raise ValueError("tokenizer_from: teacher needs a teacher: set teacher_model_name_or_path")
    if teacher is student and not isinstance(student, str):
        raise ValueError("student and teacher are one object: load the teacher a second time")
    names = {"model_name_or_path": _name(student), "teacher_model_name_or_path": _name(teacher)}
    remote = {"trust_remote_code": args.trust_remote_code}
    if isinstance(student, str):
        init_kwargs = remote | {"dtype": torch.float32} | (args.model_init_kwargs or {})
        student = load_model(student, role="student", **init_kwargs)
    args.model_init_kwargs = None  # used up; TRL would warn that a loaded model ignores them
    tokenizer = tokenizer or _tokenizer_of(names["model_name_or_path"], "student", "processing_class", **remote)
    if teacher is None and elsewhere is None:
        return Pair(student, tokenizer, None, None, Vocabulary.of(tokenizer, output_rows(student)), names)

    revision = {"revision": args.teacher_model_revision} if args.teacher_model_revision else {}
    if elsewhere is not None:
        teacher, teacher_tokenizer, teacher_rows = _elsewhere(elsewhere, teacher, args, teacher_tokenizer, revision)
    if isinstance(teacher, str):
        teacher = load_model(teacher, role="teacher", **(remote | revision | teacher_init_kwargs(args)))
    teacher_tokenizer = teacher_tokenizer or _tokenizer_of(
        names["teacher_model_name_or_path"], "teacher", "teacher_processing_class", **remote, **revision
    )
    if args.tokenizer_from == "teacher":
        adopt_tokenizer(student, tokenizer, teacher_tokenizer)
        tokenizer = teacher_tokenizer
    rows = {
        "student_rows": output_rows(student),
        "teacher_rows": output_rows(teacher) if elsewhere is None else teacher_rows,
    }
    vocabulary = Vocabulary.shared(tokenizer, teacher_tokenizer, **rows)
    return Pair(student, tokenizer, teacher, teacher_tokenizer, vocabulary, names)


def _elsewhere(
    elsewhere: Cache | Server, teacher: Any, args: TAIDConfig, tokenizer: Any, revision: dict[str, Any]
) -> tuple[Any, Any, int]:
    """Of a teacher that is not loaded: what it is compared with, its tokenizer, and how many rows its head has."""
    from taid.cache import Cache

    if isinstance(elsewhere, Cache):
        tokenizer = _load_tokenizer(str(elsewhere.folder / "tokenizer"), "teacher")
        return None, tokenizer, int(elsewhere.manifest["teacher_rows"])
    name = _name(teacher) or elsewhere.model
    try:
        tokenizer = tokenizer or _load_tokenizer(name, "teacher", trust_remote_code=args.trust_remote_code, **revision)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            "a teacher on a server needs its tokenizer here: set teacher_model_name_or_path to a folder or Hub name "
            f"that holds it ({reason})"
        ) from error
    if isinstance(teacher, str) and not args.teacher_server_compare:
        teacher = None
    return teacher, tokenizer, max(tokenizer.get_vocab().values()) + 1


def teacher_init_kwargs(args: TAIDConfig) -> dict[str, Any]:
    """What the teacher's from_pretrained is told beside where to look."""
    dtype = {"dtype": "auto" if args.bf16 or args.fp16 else torch.float32}
    return dtype | (args.teacher_model_init_kwargs or {})  # type: ignore[operator]


def load_model(name_or_path: str, *, role: str, **init_kwargs: Any) -> Any:
    """Load a causal language model whose every weight is on disk.

    Args:
        name_or_path: a folder written by ``save_pretrained``, or a Hub name.
        role: "student" or "teacher", for the messages.
        **init_kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (revision, dtype, ...).

    Raises:
        ValueError: the folder is missing, holds no safetensors, a truncated file, or weights that are not those of its
            config.json; or from_pretrained cannot do what `init_kwargs` ask.
    """
    _check_folder(name_or_path, role)
    options = init_kwargs | {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(os.path.expanduser(name_or_path), **options)
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
    return model


def load_tokenizer(name_or_path: str, *, role: str, **init_kwargs: Any) -> Any:
    """Load the tokenizer that belongs to a model; raises a ValueError that names the model."""
    _check_folder(name_or_path, role)
    return _load_tokenizer(name_or_path, role, **init_kwargs)


def _load_tokenizer(name_or_path: str, role: str, **init_kwargs: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(name_or_path), **init_kwargs)
    except _ERRORS as error:
        raise ValueError(f"the tokenizer of {role} {name_or_path!r} could not be loaded: {error}") from error


def _name(model: Any) -> str | None:
    return model if model is None or isinstance(model, str) else model.config._name_or_path


def _tokenizer_of(name: str | None, role: str, argument: str, **init_kwargs: Any) -> Any:
    if not name:
        raise ValueError(f"a {role} made in memory needs its tokenizer: pass {argument}")
    return load_tokenizer(name, role=role, **init_kwargs)


def output_rows(model: Any) -> int:
    """The number of rows of a model's output head: its tokens and their padding."""
    return int(model.get_output_embeddings().weight.shape[0])


def _check_folder(name_or_path: str, role: str) -> None:
    """Say what is wrong with a local model folder before transformers does, which would ask the Hub instead."""
    folder = Path(os.path.expanduser(name_or_path))
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
