"""The configuration of a run, each value of it checked; as a flat mapping without secrets."""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from trl import SFTConfig

from taid.losses.objective_table import ObjectiveName
from taid.losses.schedules import AutoSchedule, TAIDSchedule, auto_alpha, check_range
from taid.teachers.server import check_url
from taid.training import on_policy as sampling

Schedule = Literal["paper", "auto"]
Signal = Literal["kl", "cross_entropy"]
Side = Literal["student", "teacher"]
Sampling = Literal["none", "mixed", "adaptive"]
CacheFormat = Literal["hidden", "hidden_int8", "top_k", "sampled"]
Placement = Literal["auto", "sharded", "tensor_parallel", "replicated", "cpu"]
Quantization = Literal["bnb_8bit", "bnb_4bit", "torchao_int8", "torchao_int4", "fp8"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "objective": get_args(ObjectiveName),
    "taid_schedule": get_args(Schedule),
    "taid_signal": get_args(Signal),
    "tokenizer_from": get_args(Side),
    "sampling": get_args(Sampling),
    "seq_kd": (True, False),
    "teacher_placement": get_args(Placement),
    "teacher_quantization": (None, *get_args(Quantization)),
    "teacher_cache_format": (None, *get_args(CacheFormat)),
    "taid_adaptive": (True, False),
    "fused": (True, False),
    "teacher_server_compare": (True, False),
    "skip_bad_images": (True, False),
}
_NUMBERS = (
    "taid_t_start taid_t_end taid_beta jsd_beta skew head_mass dkd_alpha dkd_beta dkd_temperature kd_ratio "
    "abkd_alpha abkd_beta amid_mixture amid_share taid_mixture teacher_server_timeout sampling_share "
    "sampling_temperature sampling_max_new_tokens sampling_buffer_size"
).split()
_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps train_tokens teacher_top_k "
        "sampling_max_new_tokens sampling_buffer_size",
        "be positive",
        lambda value: value >= 1,
    ),
    ("max_length", "be positive, or null for rows of any length", lambda value: value >= 1),
    ("teacher_cache_samples", "lie in 1 .. 255", lambda value: 1 <= value <= 255),
    (
        "teacher_server_timeout dkd_temperature sampling_temperature",
        "be a positive number",
        lambda value: 0.0 < value < math.inf,
    ),
    ("learning_rate dkd_alpha dkd_beta", "be 0 or a positive number", lambda value: 0.0 <= value < math.inf),
    ("abkd_alpha abkd_beta", "be 0 or at least 0.001", lambda value: value == 0.0 or 1e-3 <= value < math.inf),
    ("jsd_beta head_mass", "lie strictly between 0 and 1", lambda value: 0.0 < value < 1.0),
    ("taid_mixture amid_mixture", "be a finite number", math.isfinite),
    ("skew amid_share", "lie in [0, 1)", lambda value: 0.0 <= value < 1.0),
    ("kd_ratio sampling_share", "lie in [0, 1]", lambda value: 0.0 <= value <= 1.0),
)


@dataclass
class TAIDConfig(SFTConfig):  # type: ignore[misc]
    """Everything that :class:`taid.TAIDTrainer` can be told, beside TRL's ``SFTConfig`` and ``TrainingArguments``.

    Each field's help says what it does. Values are checked at construction.

    Raises:
        ValueError: a value out of range or an option that TAID does not go together with; names it and the remedy.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012

    objective: ObjectiveName = field(
        default="taid",
        metadata={"help": "What the student is trained on; all but 'sft' compare it with a teacher."},
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
    taid_mixture: float = field(
        default=1.0,
        metadata={
            "help": "TAID: the mean of student and teacher that the target is, as AMiD's alpha; 1, TAID's own, is of "
            "logits, -1 of probabilities."
        },
    )
    jsd_beta: float = field(default=0.1, metadata={"help": "jsd: weight of the teacher in the mixture, in (0, 1)."})
    skew: float = field(
        default=0.1, metadata={"help": "skew_forward_kl and skew_reverse_kl: share of the other side, in [0, 1)."}
    )
    head_mass: float = field(
        default=0.5,
        metadata={"help": "adaptive_kl: share of the teacher's probability that the head holds, in (0, 1)."},
    )
    dkd_alpha: float = field(
        default=1.0, metadata={"help": "dkd: weight of how likely the label is, against all other tokens."}
    )
    dkd_beta: float = field(
        default=8.0, metadata={"help": "dkd: weight of how the rest is shared out among the other tokens."}
    )
    dkd_temperature: float = field(
        default=4.0, metadata={"help": "dkd: temperature of both models; all three are the authors' for CIFAR-100."}
    )
    abkd_alpha: float = field(
        default=0.2, metadata={"help": "abkd and amid: power of the teacher; with abkd_beta, (1, 0) is forward KL."}
    )
    abkd_beta: float = field(
        default=0.7, metadata={"help": "abkd and amid: power of the student, or of the mixture; (0, 1) is reverse KL."}
    )
    amid_mixture: float = field(
        default=0.5, metadata={"help": "amid: the mean of student and teacher that it compares; the paper's alpha."}
    )
    amid_share: float = field(
        default=0.5, metadata={"help": "amid: share of the teacher in it, in [0, 1); the paper's lambda."}
    )
    kd_ratio: float = field(
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
    teacher_cache_samples: int | None = field(
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
    teacher_server_timeout: float = field(default=120.0, metadata={"help": "Seconds without a byte of its answer."})
    teacher_server_compare: bool = field(
        default=False,
        metadata={
            "help": "Load teacher_model_name_or_path once at the start, and compare what it says of one row with what "
            "the server says."
        },
    )
    teacher_top_k: int | None = field(
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
    sampling_share: float = field(
        default=0.5, metadata={"help": "sampling: mixed: share of micro-batches with the student's answers."}
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Temperature that answers are sampled at; 1 is the model as it is."}
    )
    sampling_max_new_tokens: int = field(
        default=256, metadata={"help": "Most tokens of a sampled answer; max_length also ends it."}
    )
    sampling_buffer_size: int = field(
        default=1_000,
        metadata={"help": "sampling: adaptive: how many sampled rows are kept, by all processes together."},
    )
    seq_kd: bool = field(
        default=False,
        metadata={"help": "Micro-batches without the student's answers have ones that the teacher samples, as SeqKD."},
    )
    train_tokens: int | None = field(
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
        """Check TAID's own values, then let TRL and transformers check theirs."""
        self._check_values()
        self._check_combinations()
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16: bool | None = False  # TRL's default would be refused on a machine without an accelerator
        if self.activation_checkpointing is None:  # TRL sets only the old name, which transformers warns about
            self.activation_checkpointing: bool | None = self.gradient_checkpointing
        if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
            self.use_cpu: bool = True  # or each process would take itself for the only one
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers takes whatever does not end with "loss" for something to be maximised, a KL too.
            self.greater_is_better: bool | None = self.metric_for_best_model.endswith("accuracy")
        super().__post_init__()
        spread = (self.model_init_kwargs or {}).get("distributed_config") or {}
        if isinstance(spread, dict) and (other := spread.keys() - {"tp_size", "tp_plan"}):
            raise ValueError(
                f"model_init_kwargs: distributed_config may give tp_size and tp_plan, not {', '.join(sorted(other))}: "
                "a student is sharded by --accelerate_config fsdp2 or zero3"
            )
        if self.train_tokens is not None:
            self.max_steps: int = self._steps_for(self.train_tokens)

    def _check_values(self) -> None:
        if isinstance(self.taid_alpha, str) and self.taid_alpha != "auto":
            try:
                self.taid_alpha = float(self.taid_alpha)
            except ValueError:
                raise ValueError(f"taid_alpha must be a positive number or 'auto', got {self.taid_alpha!r}") from None
        if self.taid_alpha is None:
            raise ValueError("taid_alpha must be a positive number or 'auto', got null; the paper's is 5e-4")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                listed = ", ".join(map(in_yaml, choices))
                near = nearest(str(value), map(str, choices))
                raise ValueError(f"{name} {in_yaml(value)} does not exist{near} (choices: {listed})")
        for name in _NUMBERS:
            if not isinstance(value := getattr(self, name), Real):
                raise ValueError(f"{name} must be a number, got {in_yaml(value)}")
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            if not _is_mapping(value := getattr(self, name)):
                raise ValueError(
                    f'{name} must be a mapping, as {{dtype: bfloat16}} in YAML or \'{{"dtype": "bfloat16"}}\' on the '
                    f"command line, got {in_yaml(value)}"
                )
        check_range(
            t_start=self.taid_t_start, t_end=self.taid_t_end, alpha=self.alpha_for(total_steps=1), beta=self.taid_beta
        )
        for names, must, holds in _RANGES:
            for name in names.split():
                if (value := getattr(self, name)) is not None and not holds(value):
                    raise ValueError(f"{name} must {must}, got {value}")
        if self.teacher_server_url is not None:
            check_url(self.teacher_server_url)
        if self.teacher_cache is not None and not self.teacher_cache:
            raise ValueError("teacher_cache is empty: leave it away, or name a folder")
        template = self.chat_template_path
        if template and template.startswith(("/", ".", "~")) and not Path(template).exists():
            raise FileNotFoundError(f"chat_template_path: there is no file {template}")
        if self.max_steps == 0:
            raise ValueError("max_steps must be positive, or -1 to train for num_train_epochs, got 0")
        if self.loss_type != "nll":
            raise ValueError(f"loss_type {self.loss_type!r} is TRL's; here `objective` and `kd_ratio` define the loss")
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor is {self.label_smoothing_factor}, but no objective here smooths")
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices: false is not possible: the loss is global by contract")

    def _check_combinations(self) -> None:
        if self.objective == "taid" and self.taid_schedule == "auto" and self.taid_mixture != 1.0:
            raise ValueError(
                f"taid_schedule: auto has targets beyond the teacher, which taid_mixture: {self.taid_mixture:g} has "
                "not: leave one of the two away"
            )
        if self.abkd_alpha == self.abkd_beta == 0:
            raise ValueError("abkd_alpha and abkd_beta must not both be 0; (1, 0) is forward KL, (0, 1) reverse KL")
        sampling.check_options(self)
        if self.teacher_quantization is not None and self.teacher_placement in ("sharded", "tensor_parallel", "cpu"):
            raise ValueError(
                f"teacher_quantization: {self.teacher_quantization} and teacher_placement: {self.teacher_placement} do "
                "not go together: quantized weights are held whole by each process"
            )
        if self.train_tokens is not None and not (self.packing and self.max_length):
            raise ValueError(
                "train_tokens needs packing: true and a max_length, which give each row that many tokens; without them "
                "set max_steps"
            )
        if self.max_steps < 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"num_train_epochs must be positive where max_steps is not set, got {self.num_train_epochs}"
            )

    def _steps_for(self, tokens: int) -> int:
        """The steps that `tokens` are in rows of `max_length`: N is known before the first row is read."""
        assert self.max_length is not None
        processes = self.world_size // (self.parallelism_config.tp_size if self.parallelism_config else 1)
        a_step = self.max_length * self.train_batch_size * self.gradient_accumulation_steps * processes
        steps: int = math.ceil(tokens / a_step)
        if self.max_steps not in (-1, steps):
            raise ValueError(
                f"train_tokens {tokens:,} are {steps:,} steps of {a_step:,} tokens, but max_steps is "
                f"{self.max_steps:,}: set one of the two"
            )
        return steps

    def schedule_for(self, total_steps: int) -> TAIDSchedule | AutoSchedule:
        """How t moves in a run of `total_steps`."""
        if self.taid_schedule == "auto":
            return AutoSchedule(total_steps)
        alpha = self.alpha_for(total_steps)
        return TAIDSchedule(total_steps, self.taid_t_start, self.taid_t_end, alpha, self.taid_beta, self.taid_adaptive)

    def alpha_for(self, total_steps: int) -> float:
        """The step size of t in a run of `total_steps`."""
        return auto_alpha(total_steps) if isinstance(self.taid_alpha, str) else float(self.taid_alpha or 0.0)

    @property
    def distillation_share(self) -> float:
        """The weight of the teacher in the loss: `kd_ratio`, and 0 for sft."""
        return 0.0 if self.objective == "sft" else self.kd_ratio


@dataclass
class DataArguments:
    """Where the rows come from."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training rows: a .jsonl, .json, .parquet or .txt file (text also as .gz or .zst), a glob of them, "
            "a folder, or a Hub name; several with streaming. Rows have `messages`, `prompt` and `completion`, or "
            "`text`; .txt files are split at blank lines."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training rows as they are needed, from files larger than memory or disk; needs max_steps "
            "or train_tokens."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "With streaming: how often a row is drawn from each dataset_name, relative to the others; equally "
            "by default."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub data set."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split of a Hub data set or folder to train on."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Held-out rows, like dataset_name; evaluated at the start, at the end and as eval_strategy says."
        },
    )
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split of a Hub data set or folder to evaluate on."}
    )

    def __post_init__(self) -> None:
        """Check what the rows' options say of each other.

        Raises:
            ValueError: several names or weights without `streaming`, or weights that do not fit the names.
        """
        names = self.names
        if len(names) == 1:
            self.dataset_name = names[0]  # type: ignore[assignment]  # one is a text, as in TRL's lora_target_modules
        if not self.streaming and len(names) > 1:
            raise ValueError(f"dataset_name has {len(names)} names: several need streaming: true")
        weights = self.dataset_weights
        if weights is None:
            return
        if not self.streaming:
            raise ValueError("dataset_weights are the shares of a stream: set streaming: true, or leave them away")
        if len(weights) != len(names):
            raise ValueError(
                f"dataset_weights {weights} are {len(weights)}, but dataset_name has {len(names)} "
                f"name{'s' * (len(names) != 1)}: give one weight a name"
            )
        if not all(0.0 < weight < math.inf for weight in weights):
            raise ValueError(f"dataset_weights must be positive numbers, got {weights}: leave a name out to draw none")

    @property
    def names(self) -> list[str]:
        """The names of the training rows, one or several."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name or []


# eos_token and pad_token are words of the vocabulary.
_SECRET = re.compile(r"(?!(eos|pad)_token$)((.*_)?token|.*(password|secret).*|api_key)", re.IGNORECASE)


def resolved(*configurations: Any) -> dict[str, Any]:
    """All values of a run as one flat mapping for config.yaml, without secrets and without deprecated names."""
    values: dict[str, Any] = {}
    for configuration in configurations:
        values |= configuration.to_dict() if hasattr(configuration, "to_dict") else vars(configuration)
        for name in {"eos_token", "pad_token"} & vars(configuration).keys():
            values[name] = getattr(configuration, name)  # to_dict hides them
    values = {k: v for k, v in values.items() if not k.startswith("gradient_checkpointing")}
    plain: dict[str, Any] = json.loads(
        json.dumps(values, default=str),
        object_hook=lambda mapping: {k: v for k, v in mapping.items() if not _SECRET.fullmatch(k)},
    )
    return plain


def in_yaml(value: Any) -> str:
    """A value as a YAML file has it, for messages."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _is_mapping(value: Any) -> bool:
    """Whether it is a mapping, JSON text of one, or nothing."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return value is None or isinstance(value, dict)


def nearest(name: str, known: Any) -> str:
    """A question whether the most similar known name was meant, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def changed(configuration: Any, **values: Any) -> Any:
    """Return a copy with other values. Nothing is checked or derived anew, and the original stays as it is."""
    copied = copy.copy(configuration)
    for name, value in values.items():
        setattr(copied, name, value)
    return copied
