"""A student and its teacher: loaded, and known to fit each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import ProcessorMixin

from taid.config.training import TAIDConfig
from taid.models.loading import (
    adapter_config,
    check_folder,
    load_model,
    load_processing_class,
    open_tokenizer,
    output_rows,
    require_read_back,
    sees,
    tokenizer_of,
)
from taid.models.vocabulary import Vocabulary, adopt_tokenizer
from taid.teachers import placement
from taid.teachers.cache import Cache
from taid.teachers.server import Server


@dataclass(frozen=True)
class Pair:
    """Student and teacher, loaded and known to fit.

    Attributes:
        student: the model that is trained.
        processing_class: the student's tokenizer, or its processor if it sees images; the teacher's where the student
            was given it.
        teacher: a model; None where nothing is distilled, or where a cache or a server answers and nothing is compared.
        teacher_processing_class: None where there is no teacher at all.
        vocabulary: the token ids that both predict.
        names: where the two came from, under the names of the configuration.
    """

    student: Any
    processing_class: Any
    teacher: Any
    teacher_processing_class: Any
    vocabulary: Vocabulary
    names: dict[str, str | None]

    @property
    def tokenizer(self) -> Any:
        """The student's."""
        return tokenizer_of(self.processing_class)

    @property
    def teacher_tokenizer(self) -> Any:
        """None where there is no teacher at all."""
        return tokenizer_of(self.teacher_processing_class)


def load_pair(
    student: Any, teacher: Any, args: TAIDConfig, processing_class: Any, teacher_processing_class: Any,
    elsewhere: Cache | Server | None = None, *, see: bool = False,
) -> Pair:  # fmt: skip
    """Load what is given by name, and match the vocabularies; `see` where the rows have images.

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
    processing_class = processing_class or _processing_class_of(
        names["model_name_or_path"], "student", "processing_class", see=see, **remote
    )
    tokenizer = tokenizer_of(processing_class)
    if see:
        _require_sight(student, processing_class, "student")
    if teacher is None and elsewhere is None:
        return Pair(student, processing_class, None, None, Vocabulary.of(tokenizer, output_rows(student)), names)

    revision = {"revision": args.teacher_model_revision} if args.teacher_model_revision else {}
    if elsewhere is not None:
        teacher, teacher_processing_class, teacher_rows = _elsewhere(
            elsewhere, teacher, args, teacher_processing_class, revision
        )
    if isinstance(teacher, str):
        teacher = _load_teacher(teacher, args, remote | revision)
    teacher_processing_class = teacher_processing_class or _processing_class_of(
        names["teacher_model_name_or_path"], "teacher", "teacher_processing_class", see=see, **remote, **revision
    )
    if see:
        _require_sight(teacher, teacher_processing_class, "teacher")
    teacher_tokenizer = tokenizer_of(teacher_processing_class)
    if args.tokenizer_from == "teacher":
        if sees(student.config):
            raise ValueError(
                "tokenizer_from: teacher is for text models: a vision-language student would lose the token that "
                "stands for its images. Choose a teacher of the student's family"
            )
        if isinstance(student, PeftModel):
            raise ValueError(
                f"tokenizer_from: teacher gives whole models a tokenizer, and student {names['model_name_or_path']!r} "
                "is an adapter: merge it first (taid export --format merged-lora)"
            )
        adopt_tokenizer(student, tokenizer, teacher_tokenizer)
        require_read_back(student.config, teacher_tokenizer)
        tokenizer = processing_class = teacher_tokenizer
    rows = {
        "student_rows": output_rows(student),
        "teacher_rows": output_rows(teacher) if elsewhere is None else teacher_rows,
    }
    vocabulary = Vocabulary.shared(tokenizer, teacher_tokenizer, **rows)
    return Pair(student, processing_class, teacher, teacher_processing_class, vocabulary, names)


def _load_teacher(name: str, args: TAIDConfig, origin: dict[str, Any]) -> Any:
    check_folder(name, "teacher")
    can_be_cut = args.teacher_quantization is None and adapter_config(name, origin.get("revision")) is None
    where = placement.choose(args, can_be_cut=can_be_cut)
    if where != "replicated" and not can_be_cut:
        raise ValueError(f"teacher {name!r} is an adapter, which is not cut up: merge it first (taid export)")
    try:
        options = origin | placement.loading_options(args, where) | placement.teacher_init_kwargs(args)
        return load_model(name, role="teacher", **options)
    except ValueError as error:
        if "has no `tp_plan`" not in str(error):
            raise
        raise ValueError(
            f"transformers has no plan by which the matrices of teacher {name!r} are cut: set teacher_placement: "
            "sharded or replicated"
        ) from error


def _require_sight(model: Any, processing_class: Any, role: str) -> None:
    if not sees(model.config) or not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"the rows have images, but the {role} ({type(model).__name__} with {type(processing_class).__name__}) "
            "sees none: choose a vision-language model with its processor, or remove the images column"
        )


def _elsewhere(
    elsewhere: Cache | Server, teacher: Any, args: TAIDConfig, tokenizer: Any, revision: dict[str, Any]
) -> tuple[Any, Any, int]:
    """Of a teacher that is not loaded: what it is compared with, its tokenizer, and how many rows its head has."""
    from taid.teachers.cache import Cache

    if isinstance(elsewhere, Cache):
        tokenizer = open_tokenizer(str(elsewhere.folder / "tokenizer"), "teacher")
        return None, tokenizer, int(elsewhere.manifest["teacher_rows"])
    name = _name(teacher) or elsewhere.model
    try:
        tokenizer = tokenizer or open_tokenizer(name, "teacher", trust_remote_code=args.trust_remote_code, **revision)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            "a teacher on a server needs its tokenizer here: set teacher_model_name_or_path to a folder or Hub name "
            f"that holds it ({reason})"
        ) from error
    if isinstance(teacher, str) and not args.teacher_server_compare:
        teacher = None
    return teacher, tokenizer, max(tokenizer.get_vocab().values()) + 1


def _name(model: Any) -> str | None:
    if model is None or isinstance(model, str):
        return model
    return str(model.name_or_path if isinstance(model, PeftModel) else model.config._name_or_path)


def _processing_class_of(name: str | None, role: str, argument: str, *, see: bool, **init_kwargs: Any) -> Any:
    if not name:
        raise ValueError(f"a {role} made in memory needs its tokenizer: pass {argument}")
    return load_processing_class(name, role=role, see=see, **init_kwargs)
