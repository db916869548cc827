"""``taid plan``: what a run takes in memory, compute, time and disk, from configurations alone; no weight is loaded.

Rows that lie on this machine are counted. Of others their number is enough, for an upper bound.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset_builder
from peft import LoraConfig, PeftConfig
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.training_args import OptimizerNames
from trl import ModelConfig, get_peft_config

from taid.config.data import DataArguments
from taid.config.training import TAIDConfig
from taid.data.loading import local_files
from taid.models.loading import (
    adapter_config,
    load_config,
    load_processing_class,
    load_tokenizer,
    sees,
)
from taid.planning import tiny
from taid.planning.activation_trace import Batch, Loss
from taid.planning.footprint import ENGINES, PLACEMENTS, STATES, Footprint, Layout, Size, size
from taid.teachers.cache_format import Format
from taid.teachers.placement import teacher_init_kwargs
from taid.training.trainer import TAIDTrainer

_DISTINCT = 12.0  # ids of 50 draws from a large teacher, arXiv 2503.16870
_UTILISATION = 0.4  # of the peak, as well-run training of models this small reaches
_GPU = ("H100", 989e12, "bf16 dense")  # NVIDIA's data sheet of the SXM card, without sparsity
_CPU = ("CPU", 0.77e12, "float32, 8 cores with AVX2 at 3 GHz")  # 8 cores x 3e9 x 2 units x 8 numbers x 2
_WATTS = 700  # of the same
_USABLE = 0.92  # of a GPU's memory: the rest is CUDA's, NCCL's and what lies between tensors
_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "teacher")


@dataclass(frozen=True)
class Recipe:
    """What a run is made of, as :func:`taid.config.parsing.parse` gives it.

    Attributes:
        model: the student's options.
        data: where rows come from.
        args: everything else.
        folder: where the recipe lies; ``configs/<owner>--<name>/`` in it may stand for a model or data set of the Hub.
        gpus: how many the run will have; 0 is a CPU.
        gpu_memory: of each, in GB.
    """

    model: ModelConfig
    data: DataArguments
    args: TAIDConfig
    folder: Path = Path()
    gpus: int = 1
    gpu_memory: float = 80.0

    def beside(self, name: str | None, file: str) -> Path | None:
        """A file beside the recipe that describes a model or data set of the Hub."""
        path = self.folder / "configs" / str(name).replace("/", "--") / file
        return path if path.is_file() and not Path(str(name)).expanduser().exists() else None

    def config(self, role: str) -> Any:
        """The configuration of the student or the teacher: of a local folder, beside the recipe, or of the Hub.

        Raises:
            ValueError: it is in none of these; says which and the remedy.
        """
        name, origin = self._origin(role)
        path = self.beside(name, "config.json")
        folder = Path(name).expanduser()
        if path is None and name.startswith((".", "~", "/")) and not folder.is_dir():
            raise ValueError(f"{role} folder {name!r} does not exist")
        try:
            return AutoConfig.from_pretrained(path.parent) if path else load_config(name, **origin)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the configuration of {role} {name!r} could not be read: {reason} Without the Hub put its config.json "
                f"into {self.folder / 'configs' / name.replace('/', '--')}"
            ) from error

    def tokenizer(self, role: str) -> Any:
        """The tokenizer of the student or the teacher, or one of the same shape where that is described here."""
        name, origin = self._origin(role)
        if path := self.beside(name, "tokens.json"):
            try:
                return tiny.tokenizer(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: {error}") from error
        return load_tokenizer(name, role=role, **origin)

    def processor(self, role: str) -> Any:
        """The processor of a vision-language student or teacher, or one of the same shape."""
        name, origin = self._origin(role)
        if self.beside(name, "tokens.json"):
            return tiny.processor(self.config(role), self.tokenizer(role))
        return load_processing_class(name, role=role, see=True, **origin)

    def _origin(self, role: str) -> tuple[str, dict[str, Any]]:
        is_student = role == "student"
        name = self.model.model_name_or_path if is_student else self.args.teacher_model_name_or_path
        revision = self.model.model_revision if is_student else self.args.teacher_model_revision
        return str(name), {"trust_remote_code": self.args.trust_remote_code, "revision": revision}

    def is_adapter(self, role: str) -> bool:
        """Whether the student or the teacher is the folder of an adapter."""
        folder = Path(self._origin(role)[0]).expanduser()
        return folder.is_dir() and adapter_config(str(folder)) is not None

    @property
    def adapter(self) -> Any:
        """What is trained instead of the student's weights: a new adapter, or the one that the student is; or None."""
        if self.model.use_peft or not self.is_adapter("student"):
            return get_peft_config(self.model)
        found = PeftConfig.from_pretrained(Path(str(self.model.model_name_or_path)).expanduser())
        found.inference_mode = False
        return found

    @property
    def rows_are_here(self) -> bool:
        """Whether the rows lie on this machine and are known beforehand, so that they can be counted."""
        names = [*self.data.names, *([self.data.eval_dataset_name] if self.data.eval_dataset_name else [])]
        known = not self.data.streaming and not sees(self.config("student"))  # images take tokens of their own
        return known and all(map(self.is_here, names))

    @staticmethod
    def is_here(name: str) -> bool:
        """Whether a data set lies on this machine.

        Raises:
            FileNotFoundError: its name is that of a file which does not exist.
            ValueError: the file is empty, or of a type that is not read.
        """
        return bool(local_files(name)) or Path(name).expanduser().is_dir()


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of a run.

    Attributes:
        number: how many a pass over the training rows has, packed or not; None where it is not known.
        longest: the tokens of the longest of them.
        tokens: in such a pass.
        distinct: of each data set the different rows and their trained tokens, which a cache holds.
        counted: whether all this was counted; otherwise each row has at most `max_length` tokens.
    """

    number: int | None
    longest: int
    tokens: int
    distinct: dict[str, tuple[int, int]]
    counted: bool


def plan(recipe: Recipe, train_rows: Any = None, eval_rows: Any = None) -> str:
    """What a recipe takes, in words.

    Args:
        recipe: what is planned.
        train_rows: rows that lie on this machine; None where they do not.
        eval_rows: the held-out ones.

    Raises:
        ValueError: a configuration or tokenizer cannot be read, or the rows cannot be used; says which and the remedy.
    """
    args, rows_of_student, teacher = recipe.args, None, None
    if args.tokenizer_from == "teacher":
        rows_of_student = max(recipe.tokenizer("teacher").get_vocab().values()) + 1
    student = size(recipe.config("student"), rows=rows_of_student, peft_config=recipe.adapter)
    adapter = "" if recipe.adapter is None else f", {student.trained:,} of an adapter are trained"
    lines = [f"student: {recipe.model.model_name_or_path}, {student.weights:,} weights{adapter}"]
    if args.teacher_model_name_or_path is not None:
        teacher = size(recipe.config("teacher"))
        text = teacher.config.get_text_config()
        dtype = _teacher_dtype(args, teacher.config)
        lines += [
            f"teacher: {args.teacher_model_name_or_path}, {teacher.weights:,} weights, hidden states of "
            f"{text.hidden_size:,} numbers in {_name(dtype)}, {text.vocab_size:,} output rows"
        ]
    rows = _bounded(recipe) if train_rows is None else _counted(recipe, train_rows, eval_rows)
    lines += ["", *_memory(recipe, student, teacher, rows.longest), "", *_run(recipe, student, teacher, rows)]
    if teacher is not None and rows.distinct and not args.samples_answers:
        lines += ["", *_caches(recipe, teacher, rows)]
    return "\n".join(lines)


def _teacher_dtype(args: TAIDConfig, config: Any) -> torch.dtype:
    asked = teacher_init_kwargs(args)["dtype"]
    dtype = (config.dtype or torch.float32) if asked == "auto" else asked
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"teacher_model_init_kwargs: dtype {asked!r} is none of torch's")
    return dtype


# --- rows -------------------------------------------------------------------------------------------------------------


def _counted(recipe: Recipe, train_rows: Any, eval_rows: Any) -> Rows:
    """The rows as the trainer of a run would prepare them."""
    tokenizer = recipe.tokenizer(recipe.args.tokenizer_from)
    args = copy.copy(recipe.args)
    args.objective, args.tokenizer_from, args.push_to_hub = "sft", "student", False  # a trainer makes the repository
    args.sampling, args.seq_kd = "none", False
    args.teacher_cache = args.teacher_server_url = args.teacher_model_name_or_path = None
    smallest = LlamaForCausalLM(
        LlamaConfig(vocab_size=max(tokenizer.get_vocab().values()) + 1, hidden_size=8, intermediate_size=8,
                    num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as args.output_dir:  # which a trainer makes
        trainer = TAIDTrainer(
            smallest, args=args, train_dataset=train_rows, eval_dataset=eval_rows, processing_class=tokenizer
        )
    distinct = {name: (len(keys), sum(keys.values())) for name, keys in trainer.rows.keys().items()}
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    longest = max(lengths)
    if recipe.args.samples_answers:
        longest = min(longest + int(args.sampling_max_new_tokens), args.max_length or sys.maxsize)
    return Rows(len(lengths), longest, sum(lengths), distinct, counted=True)


def _bounded(recipe: Recipe) -> Rows:
    """What the number of rows alone tells."""
    data, length = recipe.data, _length(recipe)
    splits = {"train": (data.names[0], data.dataset_train_split)}
    if data.eval_dataset_name:
        splits["eval"] = data.eval_dataset_name, data.dataset_test_split
    # Neither a stream nor rows with images can be cached, and steps may be known without them.
    is_asked = not data.streaming and not (recipe.args.max_steps > 0 and sees(recipe.config("student")))
    found = {name: _number(recipe, *where) for name, where in splits.items()} if is_asked else {}
    distinct = {name: (number, number * length) for name, number in found.items() if number is not None}
    number = found.get("train")
    return Rows(number, length, (number or 0) * length, distinct if len(distinct) == len(found) else {}, counted=False)


def _number(recipe: Recipe, name: str, split: str) -> int | None:
    """How many rows a split of a data set on the Hub has, as is said beside the recipe or on the Hub."""
    if path := recipe.beside(name, "dataset_info.json"):
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise ValueError(f"{path}: data set {name} has no split {split!r}, but {', '.join(splits)}")
        return int(splits[split]["num_examples"])
    try:
        found = load_dataset_builder(name, recipe.data.dataset_config).info.splits or {}
    except (OSError, ValueError):
        return None
    return int(found[split].num_examples) if split in found else None


def _length(recipe: Recipe) -> int:
    """How many tokens a row has at most."""
    return int(recipe.args.max_length or recipe.config("student").get_text_config().max_position_embeddings)


# --- memory, time, disk -----------------------------------------------------------------------------------------------


def _memory(recipe: Recipe, student: Size, teacher: Size | None, longest: int) -> list[str]:
    """What each process holds under each engine, with the teacher in each place; which fit, and what would."""
    args, several = recipe.args, recipe.gpus > 1
    footprint = footprint_of(recipe, student, teacher, longest)
    placements: tuple[str, ...] = ("elsewhere",)
    if footprint.teacher is not None:
        placements = PLACEMENTS if several else ("replicated", "cpu")
        placements = placements if args.teacher_placement == "auto" else (args.teacher_placement,)
        is_whole = args.teacher_quantization is not None or recipe.is_adapter("teacher")
        if is_whole or not recipe.gpus or (several and not footprint.teacher.can_be_cut):
            placements = ("replicated",)  # neither cut up nor moved away
    layouts = [Layout(engine, where, max(recipe.gpus, 1))
               for engine in (ENGINES if several else ("none",)) for where in placements]  # fmt: skip
    try:
        found = {layout: footprint.held(layout) for layout in layouts}
    except ValueError as error:
        return [f"memory: not known for {recipe.model.model_name_or_path} ({error})"]
    room = recipe.gpu_memory * 1e9 * _USABLE if recipe.gpus else math.inf
    lines = ["memory of each process at the fullest moment of a step:", ""]
    if args.teacher_cache and teacher is not None:
        both = _dtype(recipe).itemsize * student.weights + footprint.teacher_dtype.itemsize * teacher.weights
        lines = [f"memory of taid cache: {_size(both)}, teacher's and student's weights", *lines]
    lines += [f"  {'engine':8}{'teacher':16}" + "".join(f"{name:>12}" for name in (*_PARTS, "in all"))]
    for layout, parts in found.items():
        total = sum(parts.values())
        cells = "".join(f"{_size(number):>12}" for number in (*(parts.get(name, 0) for name in _PARTS), total))
        verdict = "" if not recipe.gpus or math.isnan(total) else "  fits" if total <= room else "  too much"
        lines += [f"  {layout.engine:8}{layout.placement:16}{cells}{verdict}"]
    return [*lines, "", *_advice(recipe, footprint, found, room)]


def footprint_of(recipe: Recipe, student: Size, teacher: Size | None, longest: int) -> Footprint:
    """What a recipe's run needs to be held."""
    args, model = recipe.args, recipe.model
    low = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    is_read = not (args.teacher_cache or args.teacher_server_url)
    teacher_dtype = torch.float32 if teacher is None else _teacher_dtype(args, teacher.config)
    heads = [s.config.get_text_config() for s in (student, teacher) if s is not None]
    is_flash = "flash" in str(model.attn_implementation)
    rows, length = args.per_device_train_batch_size, longest
    if args.packing and args.packing_strategy == "bfd":  # TRL lays them behind each other
        rows, length = 1, rows * length
    has_hidden = is_read or args.teacher_cache_format in (None, "hidden", "hidden_int8")
    kd = teacher is not None and args.distillation_share > 0 and has_hidden and not args.teacher_server_url
    return Footprint(
        student=student, teacher=teacher if is_read else None, dtype=_dtype(recipe), teacher_dtype=teacher_dtype,
        batch=Batch(rows, length, not is_flash and (args.packing or rows > 1), low, "cuda" if recipe.gpus else "cpu"),
        loss=Loss(min(text.vocab_size for text in heads), (heads[-1].hidden_size, teacher_dtype) if kd else None,
                  args.fused),
        optimizer=OptimizerNames(args.optim).value, accumulates=args.gradient_accumulation_steps > 1,
        checkpoints=bool(args.activation_checkpointing), offloads=args.activation_offloading,
        quantized="bnb_4bit" if model.load_in_4bit else "bnb_8bit" if model.load_in_8bit else None,
        teacher_quantized=args.teacher_quantization,
    )  # fmt: skip


def _adapted(footprint: Footprint) -> Footprint:
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=0.05, target_modules="all-linear")
    student = footprint.student
    return footprint if student.peft_config else replace(footprint, student=size(student.config, peft_config=lora))


# What can be changed where nothing fits, the cheaper first.
_REMEDIES: dict[str, Callable[[Footprint], Footprint]] = {
    "activation_checkpointing: true": lambda f: replace(f, checkpoints=True),
    "per_device_train_batch_size: 1 and gradient_accumulation_steps": lambda f: (
        f if f.batch.rows == 1 else replace(f, batch=replace(f.batch, rows=1), accumulates=True)
    ),
    "optim: adamw_bnb_8bit": lambda f: replace(f, optimizer="adamw_bnb_8bit"),
    "teacher_quantization: bnb_4bit": lambda f: f if f.teacher is None else replace(f, teacher_quantized="bnb_4bit"),
    "teacher_cache": lambda f: replace(f, teacher=None),
    "use_peft: true, with lora_target_modules: all-linear": _adapted,
}


def _least(footprint: Footprint, layouts: Iterable[Layout]) -> float:
    return min(sum(footprint.held(layout).values()) for layout in layouts)


def _dtype(recipe: Recipe) -> torch.dtype:
    return getattr(torch, str(recipe.model.dtype), torch.float32)


def _advice(recipe: Recipe, footprint: Footprint, found: dict[Layout, dict[str, float]], room: float) -> list[str]:
    """The first layout that fits, or what would make one fit; and what the table leaves out."""
    lines = []
    if footprint.optimizer not in STATES:
        lines += [f"the state of {footprint.optimizer} is not known here"]
    if sees(footprint.student.config):
        lines += ["activations are those of text: what images add is not known here"]
    if not recipe.gpus or any(math.isnan(sum(parts.values())) for parts in found.values()):
        return lines
    card = f"{recipe.gpu_memory:g} GB, of which {_USABLE:.0%} can be used"
    for layout, parts in found.items():
        if sum(parts.values()) <= room:
            return [*lines, f"the first that fits into {card}: {_switches(layout)}"]
    together, now = footprint, _least(footprint, found)
    smallest = min(found, key=lambda layout: sum(found[layout].values()))
    lines += [f"none fits into {card}. The smallest of them ({_switches(smallest)}) would hold, with"]
    for words, change in _REMEDIES.items():
        if (least := _least(change(footprint), found)) < now:
            together = change(together)
            lines += [f"  {_size(least):>9}  {words}"]
    return [*lines, f"  {_size(_least(together, found)):>9}  all of this"]


def _switches(layout: Layout) -> str:
    engine = [] if layout.engine == "none" else [f"--accelerate_config {layout.engine}"]
    where = [] if layout.placement == "elsewhere" else [f"--teacher_placement {layout.placement}"]
    return " ".join(engine + where) or "one process"


def _run(recipe: Recipe, student: Size, teacher: Size | None, rows: Rows) -> list[str]:
    """Steps, tokens, FLOPs and hours."""
    args, length = recipe.args, _length(recipe)
    batch, processes = args.per_device_train_batch_size, max(recipe.gpus, 1)
    a_step = batch * args.gradient_accumulation_steps * processes
    lines = [
        f"a step: {a_step:,} rows ({batch} a device x {args.gradient_accumulation_steps} micro-batches x {processes} "
        f"device{'s' * (processes > 1)})"
    ]
    steps = _steps(args, a_step, length, processes, rows)
    if steps is None:
        return [*lines, f"run: how many rows {recipe.data.names[0]} has is not known here: set max_steps to plan it"]
    mean = rows.tokens / rows.number if rows.counted and rows.number else length
    is_passes = args.max_steps <= 0
    tokens = int(min(steps * a_step * mean, args.num_train_epochs * rows.tokens if is_passes else math.inf))
    bound = "at most " if not rows.counted else "" if is_passes and not args.dataloader_drop_last else "about "
    lines += [f"run: {steps:,} steps, {bound}{tokens:,} tokens"]
    if args.objective == "taid" and args.kd_ratio > 0:
        lines += [args.schedule_for(steps).regime()]
    terms = _flops(recipe, student, teacher, mean)
    a_token = sum(terms.values())
    forward = 0.0 if teacher is None else 2 * teacher.used + teacher.attention(mean)
    formula = " + ".join(f"{name} ({value / 1e9:.3g})" for name, value in terms.items())
    lines += [f"compute: {formula} = {a_token / 1e9:.3g} GFLOP a token, {a_token * tokens:.3g} in all"]
    if forward and args.teacher_cache is not None and rows.distinct:
        seen = sum(trained for _, trained in rows.distinct.values())
        lines += [_hours(recipe, "taid cache", forward * seen, seen, "about " if rows.counted else bound)]
    elif forward and args.teacher_server_url is not None:
        lines += [_hours(recipe, "the teacher's server, if it has as many", forward * tokens, tokens, bound)]
    lines += [_hours(recipe, "taid train", a_token * tokens, tokens, bound)]
    return (
        [*lines, "(without the time in which answers are sampled, which is not planned)"]
        if args.samples_answers
        else lines
    )


def _steps(args: TAIDConfig, a_step: int, length: int, processes: int, rows: Rows) -> int | None:
    """As transformers counts them; None where nobody knows how many rows there are."""
    if args.train_tokens is not None:
        return math.ceil(args.train_tokens / (a_step * length))
    if args.max_steps > 0:
        return int(args.max_steps)
    if rows.number is None:
        return None
    batches = rows.number / (args.per_device_train_batch_size * processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    a_pass: int = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(float(args.num_train_epochs) * a_pass)


def _flops(recipe: Recipe, student: Size, teacher: Size | None, length: float) -> dict[str, float]:
    """FLOPs of training on a token, by part: 2 a weight forward, 2 for the gradient of what goes in, 2 for its own."""
    args = recipe.args
    of_student = 6 if recipe.adapter is None else 4
    terms = {f"{of_student} N_student": of_student * student.used}
    attention = 3 * student.attention(length)
    if teacher is not None and args.distillation_share > 0:
        text = teacher.config.get_text_config()
        if args.teacher_cache is None and args.teacher_server_url is None:
            terms["2 N_teacher"] = 2 * teacher.used
            attention += teacher.attention(length)
        elif args.teacher_cache and args.teacher_cache_format in (None, "hidden", "hidden_int8"):
            terms["2 teacher's head"] = 2 * text.vocab_size * text.hidden_size
    return terms | {"attention": attention}


def _hours(recipe: Recipe, command: str, flops: float, tokens: float, bound: str) -> str:
    name, peak, precision = _GPU if recipe.gpus else _CPU
    devices = max(recipe.gpus, 1)
    hours = flops / (devices * peak * _UTILISATION) / 3600
    number = f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
    energy = f", {hours * devices * _WATTS / 1e3:,.3g} kWh at {_WATTS} W each" if recipe.gpus else ""
    return (
        f"time of {command}: {bound}{number} hours on {devices} {name} at {_UTILISATION:.0%} of "
        f"{peak / 1e12:g} TFLOP/s ({precision}), {tokens / hours / 3600:,.0f} tokens a second{energy}"
    )


def _caches(recipe: Recipe, teacher: Size, rows: Rows) -> list[str]:
    """How large a cache is in each format."""
    args, text, dtype = recipe.args, teacher.config.get_text_config(), _teacher_dtype(recipe.args, teacher.config)
    tokenizer = recipe.tokenizer(args.tokenizer_from)
    ids = min(len(set(tokenizer.get_vocab().values())), text.vocab_size)
    at_most = "" if rows.counted else "at most "
    tokens = sum(trained for _, trained in rows.distinct.values())
    head = text.vocab_size * text.hidden_size * dtype.itemsize
    lines = [
        *(f"{name}: {n:,} different rows, {at_most}{trained:,} trained tokens"
          for name, (n, trained) in rows.distinct.items()),
        "",
        f"{'a cache of' + (', at most' if at_most else ''):33}{'bytes a token':>15}{'size':>12}",
    ]  # fmt: skip
    draws, k = args.teacher_cache_samples or 50, min(args.teacher_top_k or 64, ids)
    for words, name, distinct in (
        ("hidden", "hidden", None),
        ("hidden_int8", "hidden_int8", None),
        (f"top_k, k = {k}", "top_k", None),
        (f"sampled, {draws} draws, about {min(_DISTINCT, draws):g} ids", "sampled", min(_DISTINCT, draws)),
        (f"sampled, {draws} draws, at most", "sampled", None),
    ):
        format_ = Format(name, text.hidden_size, dtype, ids, k, draws)
        each = format_.bytes_per_token(distinct)
        lines.append(f"{words:33}{each:15,.0f}{_size(tokens * each + (head if format_.needs_head else 0)):>12}")
    return lines


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(number: float) -> str:
    if not number or math.isnan(number):
        return "?" if number else "-"
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
