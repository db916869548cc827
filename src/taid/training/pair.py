"""A student and its teacher: loaded, known to fit each other, and who answers for the teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from transformers import ProcessorMixin

from taid.config.training import TAIDConfig
from taid.models.folder import check_folder
from taid.models.loading import (
    adapter_config,
    is_vision_language,
    load_model,
    load_processing_class,
    open_tokenizer,
    output_rows,
    require_read_back,
    tokenizer_of,
)
from taid.models.vocabulary import Vocabulary, adopt_tokenizer
from taid.teachers import placement
from taid.teachers.cache import Cache
from taid.teachers.server import Server
from taid.teachers.teacher import CachedTeacher, ExactTeacher, LocalTeacher, ServedTeacher, Teacher
from taid.training import cache_check
from taid.training.cache_check import AskedTeacher, RunRows


@dataclass(frozen=True)
class Pair:
    """Student and teacher, loaded and known to fit.

    Attributes:
        student: the model that is trained.
        processing_class: the student's tokenizer, or its processor if it is a vision-language model; the teacher's
            where the student was given it.
        teacher: a model, a :class:`taid.Teacher`, or None: where nothing is distilled, and where a cache or a server
            answers and nothing is compared.
        teacher_processing_class: None where there is no teacher at all.
        vocabulary: the token ids that both predict.
        names: where the two came from, under the names of the configuration.
        source: the cache or server that answers for the teacher; None where the teacher itself does.
    """

    student: Any
    processing_class: Any
    teacher: Any
    teacher_processing_class: Any
    vocabulary: Vocabulary
    names: dict[str, str | None]
    source: Cache | Server | None = None

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return tokenizer_of(self.processing_class)

    @property
    def teacher_tokenizer(self) -> Any:
        """The teacher's tokenizer; None where there is no teacher at all."""
        return tokenizer_of(self.teacher_processing_class)


def load_pair(
    student: Any, teacher: Any, args: TAIDConfig, processing_class: Any, teacher_processing_class: Any, *,
    has_images: bool = False,
) -> Pair:  # fmt: skip
    """Load what is given by name, and match the vocabularies.

    Where a cache or a server answers for the teacher, no teacher is loaded, unless it is compared with the server.

    Args:
        student: a loaded model or a name.
        teacher: a loaded model, a name, a :class:`taid.Teacher` or None.
        args: the options of the run: teacher_cache, teacher_server_url, tokenizer_from and how models are loaded.
        processing_class: the student's; loaded with the student if None.
        teacher_processing_class: the teacher's; likewise.
        has_images: whether the rows have images, so that both must be vision-language models.

    Raises:
        ValueError: a model cannot be loaded, a teacher is missing, or the tokenizers differ; says which and the remedy.
    """
    source = _source(args)
    _require_teacher(student, teacher, source, args)
    names = {"model_name_or_path": _name(student), "teacher_model_name_or_path": _name(teacher)}
    student, processing_class = _load_student(student, processing_class, args, has_images=has_images)
    tokenizer = tokenizer_of(processing_class)
    if teacher is None and source is None:
        return Pair(
            student, processing_class, None, None, Vocabulary.from_tokenizer(tokenizer, output_rows(student)), names
        )
    if isinstance(teacher, Teacher):
        teacher_processing_class = teacher_processing_class or processing_class
    elif source is not None:
        teacher, teacher_processing_class = _beside(source, teacher, args, teacher_processing_class)
    teacher, teacher_processing_class = _load_teacher(
        teacher, names["teacher_model_name_or_path"], teacher_processing_class, args, has_images=has_images
    )
    teacher_tokenizer = tokenizer_of(teacher_processing_class)
    if args.tokenizer_from == "teacher":
        _give_tokenizer(student, tokenizer, teacher_tokenizer, names["model_name_or_path"])
        tokenizer = processing_class = teacher_tokenizer
    teacher_rows = _rows(teacher, teacher_tokenizer, source) or output_rows(student)
    vocabulary = Vocabulary.shared(
        tokenizer, teacher_tokenizer, student_rows=output_rows(student), teacher_rows=teacher_rows
    )
    return Pair(student, processing_class, teacher, teacher_processing_class, vocabulary, names, source)


def require_trainable(pair: Pair, peft_config: Any) -> None:
    """Raise a ValueError where an adapter cannot be trained on this student."""
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(f"{type(peft_config).__name__} adds virtual tokens that the teacher has not: use LoRA")
    if peft_config is not None and is_peft_model(pair.student):
        raise ValueError(
            f"student {pair.names['model_name_or_path']!r} is an adapter, and is trained on as it is: leave "
            "use_peft away, or make a model of it first (taid export --format merged-lora)"
        )


def make_teacher(pair: Pair, args: TAIDConfig, autocast: Callable[[], AbstractContextManager[Any]]) -> Teacher | None:
    """Return who answers for the teacher: a cache, a server, the model in its place, or None.

    Raises:
        ValueError: the teacher's output head cannot be fused, or the model cannot be cut up as asked.
    """
    if isinstance(pair.source, Cache):
        return CachedTeacher(pair.source, pair.vocabulary, args.device)
    if isinstance(pair.teacher, Teacher):
        pair.teacher.start(pair.vocabulary)
        return pair.teacher
    if pair.teacher is not None:
        pair.teacher.requires_grad_(False).eval()
        placement.place(pair.teacher, args)
    if isinstance(pair.source, Server):
        ids = max(pair.teacher_tokenizer.get_vocab().values()) + 1
        return ServedTeacher(pair.source, pair.vocabulary, args.teacher_top_k or 64, ids)
    return pair.teacher and LocalTeacher(pair.teacher, pair.vocabulary, autocast, args.fused)


def check_teacher(pair: Pair, teacher: Teacher | None, asked: AskedTeacher, rows: RunRows) -> dict[str, str]:
    """See that a cache or a server fits the run; return what the configuration then knows better.

    Raises:
        ValueError: the cache is of another run or lacks rows, or the server has other tokens or values.
    """
    named = pair.names["teacher_model_name_or_path"] is not None
    if isinstance(pair.source, Cache):
        cache_check.require(pair.source, asked, rows)
        known = {"teacher_cache_format": pair.source.format.name}
        return known if named else known | {"teacher_model_name_or_path": pair.source.manifest["teacher"]}
    if isinstance(pair.source, Server):
        assert isinstance(teacher, ServedTeacher)
        cache_check.check_format("top_k", asked.args)
        teacher.check(rows.first(), pair.teacher_tokenizer, pair.teacher)
        return {} if named else {"teacher_model_name_or_path": pair.source.model}
    return {}


def _source(args: TAIDConfig) -> Cache | Server | None:
    if args.teacher_cache is not None:
        return Cache(Path(args.teacher_cache).expanduser())
    if args.teacher_server_url is not None:
        return Server(args.teacher_server_url, args.teacher_server_model, args.teacher_server_timeout)
    return None


def _require_teacher(student: Any, teacher: Any, source: Cache | Server | None, args: TAIDConfig) -> None:
    if teacher is None and source is None and args.distillation_share > 0:
        raise ValueError(
            f"objective {args.objective!r} needs a teacher: set teacher_model_name_or_path, teacher_cache or "
            "teacher_server_url"
        )
    if teacher is None and source is None and args.tokenizer_from == "teacher":
        raise ValueError("tokenizer_from: teacher needs a teacher: set teacher_model_name_or_path")
    if teacher is student and not isinstance(student, str):
        raise ValueError("student and teacher are one object: load the teacher a second time")


def _load_student(student: Any, processing_class: Any, args: TAIDConfig, *, has_images: bool) -> tuple[Any, Any]:
    name, remote = _name(student), {"trust_remote_code": args.trust_remote_code}
    if isinstance(student, str):
        init_kwargs = remote | {"dtype": torch.float32} | (args.model_init_kwargs or {})
        student = load_model(student, role="student", **init_kwargs)
    processing_class = processing_class or _load_processing_class(
        name, "student", "processing_class", has_images=has_images, **remote
    )
    if has_images:
        _require_vision_language(student, processing_class, "student")
    return student, processing_class


def _load_teacher(
    teacher: Any, name: str | None, processing_class: Any, args: TAIDConfig, *, has_images: bool
) -> tuple[Any, Any]:
    origin = {"trust_remote_code": args.trust_remote_code} | _revision(args)
    if isinstance(teacher, str):
        teacher = _load_teacher_model(teacher, args, origin)
    processing_class = processing_class or _load_processing_class(
        name, "teacher", "teacher_processing_class", has_images=has_images, **origin
    )
    if has_images and not isinstance(teacher, Teacher):
        _require_vision_language(teacher, processing_class, "teacher")
    return teacher, processing_class


def _revision(args: TAIDConfig) -> dict[str, str]:
    return {"revision": args.teacher_model_revision} if args.teacher_model_revision else {}


def _give_tokenizer(student: Any, tokenizer: Any, teacher_tokenizer: Any, name: str | None) -> None:
    """Give the student the teacher's tokenizer, and embeddings of its size."""
    if is_vision_language(student.config):
        raise ValueError(
            "tokenizer_from: teacher is for text models: a vision-language student would lose the token that "
            "stands for its images. Choose a teacher of the student's family"
        )
    if isinstance(student, PeftModel):
        raise ValueError(
            f"tokenizer_from: teacher gives whole models a tokenizer, and student {name!r} "
            "is an adapter: merge it first (taid export --format merged-lora)"
        )
    adopt_tokenizer(student, tokenizer, teacher_tokenizer)
    require_read_back(student.config, teacher_tokenizer)


def _rows(teacher: Any, tokenizer: Any, source: Cache | Server | None) -> int | None:
    """Return the number of ids that the teacher predicts; None where a teacher of the user's does not say."""
    if isinstance(source, Cache):
        return int(source.manifest["teacher_rows"])
    if isinstance(source, Server):
        return int(max(tokenizer.get_vocab().values())) + 1
    if isinstance(teacher, ExactTeacher):
        return len(teacher.output_head().weight)
    return None if isinstance(teacher, Teacher) else output_rows(teacher)


def _load_teacher_model(name: str, args: TAIDConfig, origin: dict[str, Any]) -> Any:
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


def _require_vision_language(model: Any, processing_class: Any, role: str) -> None:
    if not is_vision_language(model.config) or not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"the rows have images, but the {role} ({type(model).__name__} with {type(processing_class).__name__}) "
            "takes none: choose a vision-language model with its processor, or remove the images column"
        )


def _beside(source: Cache | Server, teacher: Any, args: TAIDConfig, tokenizer: Any) -> tuple[Any, Any]:
    """Return what a cache or server needs of the teacher here: the model to compare with, and the tokenizer."""
    if isinstance(source, Cache):
        return None, open_tokenizer(str(source.folder / "tokenizer"), "teacher")
    origin = {"trust_remote_code": args.trust_remote_code} | _revision(args)
    try:
        tokenizer = tokenizer or open_tokenizer(_name(teacher) or source.model, "teacher", **origin)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            "a teacher on a server needs its tokenizer here: set teacher_model_name_or_path to a folder or Hub name "
            f"that holds it ({reason})"
        ) from error
    return (None if isinstance(teacher, str) and not args.teacher_server_compare else teacher), tokenizer


def _name(model: Any) -> str | None:
    if model is None or isinstance(model, str):
        return model
    if isinstance(model, Teacher):
        return type(model).__name__
    return str(model.name_or_path if isinstance(model, PeftModel) else model.config._name_or_path)


def _load_processing_class(name: str | None, role: str, argument: str, *, has_images: bool, **init_kwargs: Any) -> Any:
    if not name:
        raise ValueError(f"a {role} made in memory needs its tokenizer: pass {argument}")
    return load_processing_class(name, role=role, has_images=has_images, **init_kwargs)
