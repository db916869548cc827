"""``taid plan``: the memory, compute, time and disk of a run, computed from configurations alone; no weight is loaded.

Rows that lie on this machine are counted. For others their number is enough, and the result is an upper bound.
:mod:`taid.planning.plan_text` puts a plan into words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers.training_args import OptimizerNames

from taid.config.training import TAIDConfig
from taid.planning.activation_trace import Batch, Loss
from taid.planning.footprint import ENGINES, PLACEMENTS, Footprint, Layout, Size, size
from taid.planning.recipe import Recipe, Rows, max_row_length, rows_of
from taid.teachers.cache_format import Format
from taid.teachers.placement import teacher_init_kwargs

DISTINCT = 12.0  # ids of 50 draws from a large teacher, arXiv 2503.16870
UTILISATION = 0.4  # of the peak, as well-run training of models this small reaches
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's, NCCL's and what lies between tensors


class Device(NamedTuple):
    """A processor that a run is planned for, with its peak in FLOP/s and what that peak is of."""

    name: str
    peak: float
    precision: str


GPU = Device("H100", 989e12, "bf16 dense")  # NVIDIA's data sheet of the SXM card, without sparsity
CPU = Device("CPU", 0.77e12, "float32, 8 cores with AVX2 at 3 GHz")  # 8 cores x 3e9 x 2 units x 8 numbers x 2


@dataclass(frozen=True)
class Memory:
    """The memory of each process under each engine, with the teacher in each place.

    Attributes:
        footprint: everything but the layout that decides about memory.
        held: bytes at the fullest moment of a step by what they are for, of each layout.
        usable: bytes that a process has; infinite on a CPU.
        of_cache: bytes of the weights that ``taid cache`` loads, or None if the run has no cache.
        remedies: least bytes that a layout would hold after a change, by the change. Empty where a layout fits.
        all_remedies: the same with all of these changes together.
        untraced: why nothing is known of the student's activations; then `held` is empty.
    """

    footprint: Footprint
    held: dict[Layout, dict[str, float]] = field(default_factory=dict)
    usable: float = math.inf
    of_cache: float | None = None
    remedies: dict[str, float] = field(default_factory=dict)
    all_remedies: float = math.nan
    untraced: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether each layout's bytes are known; those of some optimizers' states are not."""
        return not any(math.isnan(sum(parts.values())) for parts in self.held.values())

    def first_that_fits(self) -> Layout | None:
        """Return the first layout that fits, or None."""
        return next((layout for layout, parts in self.held.items() if sum(parts.values()) <= self.usable), None)

    def smallest(self) -> Layout:
        """Return the layout that holds least."""
        return min(self.held, key=lambda layout: sum(self.held[layout].values()))


class Time(NamedTuple):
    """The time that a command takes.

    Attributes:
        command: its name.
        hours: of all devices working at the same time.
        tokens: how many it goes through.
        bound: "at most ", "about ", or "" if the number of tokens is exact.
    """

    command: str
    hours: float
    tokens: float
    bound: str


@dataclass(frozen=True)
class Run:
    """Steps, tokens, FLOPs and hours of training.

    Attributes:
        batch: rows of a device's micro-batch.
        accumulation: micro-batches of a step.
        devices: number of devices.
        device: their kind.
        steps: None if the number of rows is not known; then the rest is empty.
        tokens: that the run trains on or reads.
        bound: "at most ", "about ", or "" if `tokens` is exact.
        schedule: how t moves, in words, where the objective has a t.
        flops: FLOPs a token of training, by part.
        times: of each command that the run needs.
    """

    batch: int
    accumulation: int
    devices: int
    device: Device
    steps: int | None = None
    tokens: int = 0
    bound: str = ""
    schedule: str | None = None
    flops: dict[str, float] = field(default_factory=dict)
    times: tuple[Time, ...] = ()

    @property
    def rows_of_step(self) -> int:
        """Rows of an optimizer step on all devices."""
        return self.batch * self.accumulation * self.devices


class CacheSize(NamedTuple):
    """The size of a teacher cache.

    Attributes:
        format: how a token's answer lies on disk.
        distinct: number of different ids that are drawn; None for the most there can be.
        bytes_of_token: of each trained token.
        bytes_of_cache: of the whole cache, with the teacher's head where the format needs it.
    """

    format: Format
    distinct: float | None
    bytes_of_token: float
    bytes_of_cache: float


@dataclass(frozen=True)
class Plan:
    """The memory, time and disk that a recipe takes.

    Attributes:
        recipe: what was planned.
        student: the student's weights.
        teacher: the teacher's weights, or None without a teacher.
        teacher_dtype: the dtype in which it is loaded.
        rows: numbers of rows and tokens.
        memory: what each process holds.
        run: steps, tokens and hours.
        caches: the size of a teacher cache in each format; empty where the run cannot have one.
    """

    recipe: Recipe
    student: Size
    teacher: Size | None
    teacher_dtype: torch.dtype
    rows: Rows
    memory: Memory
    run: Run
    caches: tuple[CacheSize, ...]


def make_plan(recipe: Recipe) -> Plan:
    """Compute what a recipe takes.

    Raises:
        ValueError: a configuration or tokenizer cannot be read, or the rows cannot be used; names it and the remedy.
    """
    args, vocabulary_rows, teacher, dtype = recipe.args, None, None, torch.float32
    if args.tokenizer_from == "teacher":
        vocabulary_rows = max(recipe.tokenizer("teacher").get_vocab().values()) + 1
    student = size(recipe.config("student"), rows=vocabulary_rows, peft_config=recipe.adapter)
    if args.teacher_model_name_or_path is not None:
        teacher = size(recipe.config("teacher"))
        dtype = teacher_dtype_of(args, teacher.config)
    rows = rows_of(recipe)
    memory, run = _memory(recipe, student, teacher, rows.longest), _run(recipe, student, teacher, rows)
    can_be_cached = teacher is not None and rows.distinct and not args.samples_answers
    caches = _caches(recipe, teacher, rows) if teacher is not None and can_be_cached else ()
    return Plan(recipe, student, teacher, dtype, rows, memory, run, caches)


def teacher_dtype_of(args: TAIDConfig, config: Any) -> torch.dtype:
    """Return the dtype in which the teacher is loaded.

    Raises:
        ValueError: ``teacher_model_init_kwargs`` names no dtype of torch.
    """
    asked = teacher_init_kwargs(args)["dtype"]
    dtype = (config.dtype or torch.float32) if asked == "auto" else asked
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"teacher_model_init_kwargs: dtype {asked!r} is none of torch's")
    return dtype


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(recipe: Recipe, student: Size, teacher: Size | None, longest: int) -> Memory:
    footprint = footprint_of(recipe, student, teacher, longest)
    try:
        held = {layout: footprint.held(layout) for layout in _layouts(recipe, footprint)}
    except ValueError as error:
        return Memory(footprint, untraced=str(error))
    of_cache = None
    if recipe.args.teacher_cache and teacher is not None:
        of_cache = _dtype(recipe).itemsize * student.weights + footprint.teacher_dtype.itemsize * teacher.weights
    usable = recipe.gpu_memory * 1e9 * USABLE if recipe.gpus else math.inf
    memory = Memory(footprint, held, usable, of_cache)
    if not recipe.gpus or not memory.is_known or memory.first_that_fits() is not None:
        return memory
    return _with_remedies(memory)


def _layouts(recipe: Recipe, footprint: Footprint) -> list[Layout]:
    """List the engines and the places of the teacher among which a run may choose."""
    args, several = recipe.args, recipe.gpus > 1
    placements: tuple[str, ...] = ("elsewhere",)
    if footprint.teacher is not None:
        placements = PLACEMENTS if several else ("replicated", "cpu")
        placements = placements if args.teacher_placement == "auto" else (args.teacher_placement,)
        is_whole = args.teacher_quantization is not None or recipe.is_adapter("teacher")
        if is_whole or not recipe.gpus or (several and not footprint.teacher.can_be_cut):
            placements = ("replicated",)  # neither cut up nor moved away
    engines = ENGINES if several else ("none",)
    return [Layout(engine, where, max(recipe.gpus, 1)) for engine in engines for where in placements]


def footprint_of(recipe: Recipe, student: Size, teacher: Size | None, longest: int) -> Footprint:
    """Return what decides about the memory of a recipe's run, for the longest row of `longest` tokens."""
    args, model = recipe.args, recipe.model
    low = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    is_read = not (args.teacher_cache or args.teacher_server_url)
    teacher_dtype = torch.float32 if teacher is None else teacher_dtype_of(args, teacher.config)
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
    from peft import LoraConfig  # with bitsandbytes and torch's compiler: seconds

    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=0.05, target_modules="all-linear")
    student = footprint.student
    return footprint if student.peft_config else replace(footprint, student=size(student.config, peft_config=lora))


# Changes of a recipe that may help where nothing fits, the cheaper first.
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


def _with_remedies(memory: Memory) -> Memory:
    """Return the same, with what each change that helps would leave to be held, and all of them together."""
    footprint = together = memory.footprint
    now = _least(footprint, memory.held)
    remedies = {}
    for words, change in _REMEDIES.items():
        if (least := _least(change(footprint), memory.held)) < now:
            together, remedies[words] = change(together), least
    return replace(memory, remedies=remedies, all_remedies=_least(together, memory.held))


def _least(footprint: Footprint, layouts: Iterable[Layout]) -> float:
    return min(sum(footprint.held(layout).values()) for layout in layouts)


def _dtype(recipe: Recipe) -> torch.dtype:
    return getattr(torch, str(recipe.model.dtype), torch.float32)


# --- steps, tokens, FLOPs, hours --------------------------------------------------------------------------------------


def _run(recipe: Recipe, student: Size, teacher: Size | None, rows: Rows) -> Run:
    args, length = recipe.args, max_row_length(recipe)
    run = Run(
        args.per_device_train_batch_size, args.gradient_accumulation_steps, max(recipe.gpus, 1),
        GPU if recipe.gpus else CPU,
    )  # fmt: skip
    steps = _steps(args, run.rows_of_step, length, run.devices, rows)
    if steps is None:
        return run
    mean = rows.tokens / rows.number if rows.counted and rows.number else length
    is_passes = args.max_steps <= 0
    passes = args.num_train_epochs * rows.tokens if is_passes else math.inf
    tokens = int(min(steps * run.rows_of_step * mean, passes))
    bound = "at most " if not rows.counted else "" if is_passes and not args.dataloader_drop_last else "about "
    flops = _flops(recipe, student, teacher, mean)
    has_schedule = args.objective == "taid" and args.kd_ratio > 0
    run = replace(
        run, steps=steps, tokens=tokens, bound=bound, flops=flops,
        schedule=args.schedule_for(steps).regime() if has_schedule else None,
    )  # fmt: skip
    return replace(run, times=_times(args, run, 0.0 if teacher is None else _forward(teacher, mean), rows))


def _steps(args: TAIDConfig, a_step: int, length: int, processes: int, rows: Rows) -> int | None:
    """Return the number of steps as transformers counts them; None if the number of rows is not known."""
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
    """Return the FLOPs of training on a token, by part.

    A weight takes 2 forward, 2 for the gradient of its input and 2 for its own, which frozen weights do not have.
    """
    args = recipe.args
    of_student = 6 if student.peft_config is None else 4
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


def _forward(teacher: Size, length: float) -> float:
    """FLOPs of the teacher's forward pass on a token."""
    return 2 * teacher.used + teacher.attention(length)


def _times(args: TAIDConfig, run: Run, forward: float, rows: Rows) -> tuple[Time, ...]:
    """Return the time of asking the teacher beforehand or on a server, if that is done, and of training."""

    def time(command: str, flops: float, tokens: float, bound: str) -> Time:
        return Time(command, flops / (run.devices * run.device.peak * UTILISATION) / 3600, tokens, bound)

    times = [time("taid train", sum(run.flops.values()) * run.tokens, run.tokens, run.bound)]
    if forward and args.teacher_cache is not None and rows.distinct:
        trained = sum(trained for _, trained in rows.distinct.values())
        times.insert(0, time("taid cache", forward * trained, trained, "about " if rows.counted else run.bound))
    elif forward and args.teacher_server_url is not None:
        words = "the teacher's server, if it has as many"
        times.insert(0, time(words, forward * run.tokens, run.tokens, run.bound))
    return tuple(times)


# --- disk -------------------------------------------------------------------------------------------------------------


def _caches(recipe: Recipe, teacher: Size, rows: Rows) -> tuple[CacheSize, ...]:
    args, text, dtype = recipe.args, teacher.config.get_text_config(), teacher_dtype_of(recipe.args, teacher.config)
    tokenizer = recipe.tokenizer(args.tokenizer_from)
    ids = min(len(set(tokenizer.get_vocab().values())), text.vocab_size)
    tokens = sum(trained for _, trained in rows.distinct.values())
    head = text.vocab_size * text.hidden_size * dtype.itemsize
    draws, k = args.teacher_cache_samples or 50, min(args.teacher_top_k or 64, ids)
    sizes = []
    names = (
        ("hidden", None),
        ("hidden_int8", None),
        ("top_k", None),
        ("sampled", min(DISTINCT, draws)),
        ("sampled", None),
    )
    for name, distinct in names:
        format_ = Format(name, text.hidden_size, dtype, ids, k, draws)
        each = format_.bytes_per_token(distinct)
        sizes.append(CacheSize(format_, distinct, each, tokens * each + (head if format_.needs_head else 0)))
    return tuple(sizes)
