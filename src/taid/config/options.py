"""taid's own options: name, type, choices, range, default and help of each in one place.

An annotation says what an option may be: a Literal its choices, an Annotated number its range. Nothing here imports
torch or transformers, so that the command line can show and check these options at once. :class:`TAIDConfig` adds them
to TRL's options.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from taid.config.combinations import check_combinations
from taid.config.values import in_yaml, nearest
from taid.losses.objective_table import ObjectiveName

Schedule = Literal["paper", "auto"]
Signal = Literal["kl", "cross_entropy"]
Side = Literal["student", "teacher"]
Sampling = Literal["none", "mixed", "adaptive"]
CacheFormat = Literal["hidden", "hidden_int8", "top_k", "sampled"]
Placement = Literal["auto", "sharded", "tensor_parallel", "replicated", "cpu"]
Quantization = Literal["bnb_8bit", "bnb_4bit", "torchao_int8", "torchao_int4", "fp8"]


class Range(NamedTuple):
    """The values that a number may have; `must` completes the message "OPTION must ..."."""

    must: str
    holds: Callable[[Any], bool]


_POSITIVE_COUNT = Range("be positive", lambda value: value >= 1)
_NOT_NEGATIVE = Range("be 0 or a positive number", lambda value: 0.0 <= value < math.inf)
Count = Annotated[int, _POSITIVE_COUNT]
Byte = Annotated[int, Range("lie in 1 .. 255", lambda value: 1 <= value <= 255)]
Positive = Annotated[float, Range("be a positive number", lambda value: 0.0 < value < math.inf)]
NotNegative = Annotated[float, _NOT_NEGATIVE]
Power = Annotated[float, Range("be 0 or at least 0.001", lambda value: value == 0.0 or 1e-3 <= value < math.inf)]
InsideUnit = Annotated[float, Range("lie strictly between 0 and 1", lambda value: 0.0 < value < 1.0)]
BelowOne = Annotated[float, Range("lie in [0, 1)", lambda value: 0.0 <= value < 1.0)]
Share = Annotated[float, Range("lie in [0, 1]", lambda value: 0.0 <= value <= 1.0)]
Finite = Annotated[float, Range("be a finite number", math.isfinite)]

# TRL's and transformers' options whose range they do not check themselves.
_UPSTREAM_RANGES = {
    "per_device_train_batch_size": _POSITIVE_COUNT,
    "per_device_eval_batch_size": _POSITIVE_COUNT,
    "gradient_accumulation_steps": _POSITIVE_COUNT,
    "max_length": Range("be positive, or null for rows of any length", lambda value: value >= 1),
    "learning_rate": _NOT_NEGATIVE,
}


@dataclass
class Options:
    """taid's own options, as a part of :class:`taid.TAIDConfig`; each field's help says what it does.

    Raises:
        ValueError: a value out of range, or an option that does not go together with another; names both and the
            remedy.
        FileNotFoundError: `chat_template_path` is a file that is not there.
    """

    objective: ObjectiveName = field(
        default="taid",
        metadata={"help": "The objective that is minimised; all but 'sft' compare the student with a teacher."},
    )
    taid_schedule: Schedule = field(
        default="paper",
        metadata={
            "help": "TAID: how t moves. 'paper' is the paper's, with the options below; 'auto' has none: from "
            "beyond the teacher to a little before it."
        },
    )
    taid_t_start: float = field(
        default=0.4,
        metadata={"help": "TAID: the first t, 0.2 to 0.4; larger for a larger gap between student and teacher."},
    )
    taid_t_end: float = field(default=1.0, metadata={"help": "TAID: the last t; 1 is the teacher itself."})
    taid_alpha: float | str | None = field(
        default=5e-4,
        metadata={
            "help": "TAID: size of the adaptive step. 'auto' (7.5 / steps) gives a short run the shape of the paper's; "
            "with 5e-4 a run of 4,000 steps or fewer is the linear schedule."
        },
    )
    taid_beta: float = field(default=0.99, metadata={"help": "TAID: momentum of the loss's relative fall."})
    taid_adaptive: bool = field(default=True, metadata={"help": "TAID: 'false' moves t on the linear ramp."})
    taid_signal: Signal = field(
        default="kl",
        metadata={
            "help": "TAID: which value drives t. 'kl' is the paper's; 'cross_entropy' is the official code's, for "
            "faithful re-runs."
        },
    )
    taid_mixture: Finite = field(
        default=1.0,
        metadata={
            "help": "TAID: the mean of student and teacher that the target is, as AMiD's alpha; 1, TAID's own, is of "
            "logits, -1 of probabilities."
        },
    )
    jsd_beta: InsideUnit = field(default=0.1, metadata={"help": "jsd: weight of the teacher in the mixture."})
    skew: BelowOne = field(
        default=0.1, metadata={"help": "skew_forward_kl and skew_reverse_kl: share of the other side, in [0, 1)."}
    )
    head_mass: InsideUnit = field(
        default=0.5,
        metadata={"help": "adaptive_kl: share of the teacher's probability that the head holds, in (0, 1)."},
    )
    dkd_alpha: NotNegative = field(
        default=1.0, metadata={"help": "dkd: weight of how likely the label is, against all other tokens."}
    )
    dkd_beta: NotNegative = field(
        default=8.0, metadata={"help": "dkd: weight of how the rest is shared out among the other tokens."}
    )
    dkd_temperature: Positive = field(
        default=4.0, metadata={"help": "dkd: temperature of both models; all three are the authors' for CIFAR-100."}
    )
    abkd_alpha: Power = field(
        default=0.2, metadata={"help": "abkd and amid: power of the teacher; with abkd_beta, (1, 0) is forward KL."}
    )
    abkd_beta: Power = field(
        default=0.7, metadata={"help": "abkd and amid: power of the student, or of the mixture; (0, 1) is reverse KL."}
    )
    amid_mixture: Finite = field(
        default=0.5, metadata={"help": "amid: the mean of student and teacher that it compares; the paper's alpha."}
    )
    amid_share: BelowOne = field(
        default=0.5, metadata={"help": "amid: share of the teacher in it, in [0, 1); the paper's lambda."}
    )
    kd_ratio: Share = field(
        default=1.0,
        metadata={"help": "Share of the objective; the rest is cross-entropy to the labels. 1 is distillation only."},
    )
    fused: bool = field(
        default=True,
        metadata={
            "help": "Compute the loss fused with both output heads, without logits in memory; 'false' uses the plain "
            "formula."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher: a folder with safetensors or a Hub name."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "The teacher's branch, tag or commit on the Hub."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of from_pretrained for the teacher, as JSON or a YAML mapping. Its dtype is "
            "that of the checkpoint in bf16 and fp16 runs and float32 otherwise, unless given here."
        },
    )
    teacher_placement: Placement = field(
        default="auto",
        metadata={
            "help": "Where a loaded teacher is: 'sharded' among the processes of a machine, whose layers are gathered; "
            "'tensor_parallel', where they compute each layer together; 'replicated' on each; 'cpu' in the CPU's "
            "memory, from where its layers come as they are needed; 'auto' shards it under FSDP and ZeRO-3."
        },
    )
    teacher_quantization: Quantization | None = field(
        default=None,
        metadata={"help": "Load the teacher in 8 or 4 bits, whole on each process; it then says something else."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder that `taid cache` wrote: what the teacher says is read from it, and no teacher is loaded."
        },
    )
    teacher_cache_format: CacheFormat | None = field(
        default=None,
        metadata={
            "help": "taid cache: 'hidden' (default) keeps the teacher's final hidden states and its head, exact; "
            "'hidden_int8' the states in 8 bits; 'top_k' the likeliest tokens and the mass of the rest; 'sampled' "
            "tokens drawn from it, for forward_kl."
        },
    )
    teacher_cache_samples: Byte | None = field(
        default=None, metadata={"help": "taid cache: how often format sampled draws a position, 50 by default."}
    )
    teacher_server_url: str | None = field(
        default=None,
        metadata={
            "help": "A vLLM server, as http://localhost:8000: the teacher is asked there, and is not loaded. Its key, "
            "if it wants one, is TEACHER_SERVER_API_KEY in the environment."
        },
    )
    teacher_server_model: str | None = field(
        default=None, metadata={"help": "The teacher's name on the server; the only one it serves by default."}
    )
    teacher_server_timeout: Positive = field(default=120.0, metadata={"help": "Seconds without a byte of its answer."})
    teacher_server_compare: bool = field(
        default=False,
        metadata={
            "help": "Load teacher_model_name_or_path once at the start, and compare what it says of one row with what "
            "the server says."
        },
    )
    teacher_top_k: Count | None = field(
        default=None,
        metadata={"help": "How many tokens a position a server is asked for and format top_k keeps, 64 by default."},
    )
    tokenizer_from: Side = field(
        default="student",
        metadata={
            "help": "'teacher' gives the student the teacher's tokenizer and resizes its embeddings; tokens known to "
            "both keep their vectors."
        },
    )
    sampling: Sampling = field(
        default="none",
        metadata={
            "help": "Train on answers that the student samples: 'mixed' in a share of the micro-batches, as GKD; "
            "'adaptive' in more of them after each rise of held-out loss, ever more of them from a buffer, as DistiLLM."
        },
    )
    sampling_share: Share = field(
        default=0.5, metadata={"help": "sampling: mixed: share of micro-batches with the student's answers."}
    )
    sampling_temperature: Positive = field(
        default=1.0, metadata={"help": "Temperature that answers are sampled at; 1 is the model as it is."}
    )
    sampling_max_new_tokens: Count = field(
        default=256, metadata={"help": "Most tokens of a sampled answer; max_length also ends it."}
    )
    sampling_buffer_size: Count = field(
        default=1_000,
        metadata={"help": "sampling: adaptive: how many sampled rows are kept, by all processes together."},
    )
    seq_kd: bool = field(
        default=False,
        metadata={"help": "Micro-batches without the student's answers have ones that the teacher samples, as SeqKD."},
    )
    train_tokens: Count | None = field(
        default=None,
        metadata={
            "help": "How many tokens to train on, in place of max_steps; with packing, where a step has about "
            "max_length tokens a row."
        },
    )
    skip_bad_images: bool = field(
        default=False,
        metadata={"help": "Leave out rows whose images cannot be read or do not fit into max_length, and say so."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the run that output_dir holds and start anew."}
    )

    def __post_init__(self) -> None:
        """Check every value, and how the values go together."""
        self.taid_alpha = _alpha(self.taid_alpha)
        for name, hint in _hints().items():
            check_value(name, getattr(self, name), hint)
        for name, allowed in _UPSTREAM_RANGES.items():
            _check_range(name, getattr(self, name), allowed)
        check_combinations(self)

    @property
    def distillation_share(self) -> float:
        """The weight of the teacher in the loss: `kd_ratio`, and 0 for sft."""
        return 0.0 if self.objective == "sft" else self.kd_ratio

    @property
    def samples_answers(self) -> bool:
        """Whether student or teacher writes answers during the run, on which the student is trained."""
        return self.sampling != "none" or self.seq_kd


def check_value(name: str, value: Any, hint: Any) -> None:
    """Check one value against the annotation of its option.

    Raises:
        ValueError: it is none of the choices, no number, or out of range; names the option and the value.
    """
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    is_optional = type(None) in alternatives
    if len(alternatives) > 1 + is_optional:
        return  # such as text or a mapping, which has a check of its own
    kind = alternatives[0]
    allowed = next((part for part in getattr(kind, "__metadata__", ()) if isinstance(part, Range)), None)
    kind = getattr(kind, "__origin__", kind) if allowed else kind
    choices = (True, False) if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
    if choices:
        choices = (None, *choices) if is_optional else choices
        if value not in choices:
            listed = ", ".join(map(in_yaml, choices))
            near = nearest(str(value), map(str, choices))
            raise ValueError(f"{name} {in_yaml(value)} does not exist{near} (choices: {listed})")
    elif kind in (int, float) and not isinstance(value, Real) and not (is_optional and value is None):
        raise ValueError(f"{name} must be a number, got {in_yaml(value)}")
    if allowed is not None:
        _check_range(name, value, allowed)


def _check_range(name: str, value: Any, allowed: Range) -> None:
    if value is not None and not allowed.holds(value):
        raise ValueError(f"{name} must {allowed.must}, got {value}")


def _alpha(value: Any) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if value is None:
        raise ValueError("taid_alpha must be a positive number or 'auto', got null; the paper's is 5e-4")
    try:
        return float(value)
    except (ValueError, TypeError):
        raise ValueError(f"taid_alpha must be a positive number or 'auto', got {value!r}") from None


@functools.cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Options, include_extras=True)
