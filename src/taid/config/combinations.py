"""The rules that tie one option of a run to another, and to what distillation can do at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taid.config.values import check_url, in_yaml, is_mapping
from taid.losses.schedules import auto_alpha, check_range

TEACHER_SERVER_KEY = "TEACHER_SERVER_API_KEY"  # the environment variable with the key of the teacher's server
# The options of answers that are written during a run.
SAMPLING_OPTIONS = (
    "sampling sampling_share sampling_temperature sampling_max_new_tokens sampling_buffer_size seq_kd"
).split()


def check_combinations(args: Any) -> None:
    """Check all options together, before TRL and transformers derive anything from theirs.

    Args:
        args: an object with an attribute for each option of taid, TRL and transformers.

    Raises:
        ValueError: an option has a value that distillation cannot have, or does not go together with another.
        FileNotFoundError: `chat_template_path` is a file that is not there.
    """
    _check_schedule(args)
    _check_teacher(args)
    _check_upstream(args)
    _check_sampling(args)
    _check_length(args)


def _check_schedule(args: Any) -> None:
    alpha = auto_alpha(total_steps=1) if args.taid_alpha == "auto" else args.taid_alpha
    check_range(t_start=args.taid_t_start, t_end=args.taid_t_end, alpha=alpha, beta=args.taid_beta)
    if args.objective == "taid" and args.taid_schedule == "auto" and args.taid_mixture != 1.0:
        raise ValueError(
            f"taid_schedule: auto has targets beyond the teacher, which taid_mixture: {args.taid_mixture:g} has not: "
            "leave one of the two away"
        )
    if args.abkd_alpha == args.abkd_beta == 0:
        raise ValueError("abkd_alpha and abkd_beta must not both be 0; (1, 0) is forward KL, (0, 1) reverse KL")


def _check_teacher(args: Any) -> None:
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        if not is_mapping(value := getattr(args, name)):
            raise ValueError(
                f'{name} must be a mapping, as {{dtype: bfloat16}} in YAML or \'{{"dtype": "bfloat16"}}\' on the '
                f"command line, got {in_yaml(value)}"
            )
    if args.teacher_server_url is not None:
        check_url(args.teacher_server_url, "teacher_server_url", TEACHER_SERVER_KEY)
    if args.teacher_cache is not None and not args.teacher_cache:
        raise ValueError("teacher_cache is empty: leave it away, or name a folder")
    if args.teacher_quantization is not None and args.teacher_placement in ("sharded", "tensor_parallel", "cpu"):
        raise ValueError(
            f"teacher_quantization: {args.teacher_quantization} and teacher_placement: {args.teacher_placement} do "
            "not go together: quantized weights are held whole by each process"
        )


def _check_upstream(args: Any) -> None:
    template = args.chat_template_path
    if template and template.startswith(("/", ".", "~")) and not Path(template).exists():
        raise FileNotFoundError(f"chat_template_path: there is no file {template}")
    if args.loss_type != "nll":
        raise ValueError(f"loss_type {args.loss_type!r} is TRL's; here `objective` and `kd_ratio` define the loss")
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor is {args.label_smoothing_factor}, but no objective here smooths")
    if not args.average_tokens_across_devices:
        raise ValueError("average_tokens_across_devices: false is not possible: the loss is global by contract")


def _check_sampling(args: Any) -> None:
    """Check the options that answers written during a run do not go together with."""
    if not args.samples_answers:
        return
    name = f"sampling: {args.sampling}" if args.sampling != "none" else "seq_kd: true"
    padded = "a sampled answer takes the place of one row's, in a padded batch"
    refused = {
        "teacher_cache": (
            args.teacher_cache is not None,
            "it knows the data set's answers only: load the teacher, or ask a server (teacher_server_url)",
        ),
        "train_tokens": (args.train_tokens is not None, "how long answers will be is not known: set max_steps"),
        "packing": (args.packing, f"{padded}: set packing: false"),
        "padding_free": (args.padding_free, f"{padded}: set padding_free: false"),
    }
    for other, (is_set, why) in refused.items():
        if is_set:
            raise ValueError(f"{name} does not go together with {other}: {why}")
    if args.seq_kd and args.teacher_server_url is not None:
        raise ValueError(
            "seq_kd: true lets the teacher write, which it does here only: leave teacher_server_url away, or let the "
            "server write the data set's answers beforehand"
        )
    if args.sampling != "none" and args.distillation_share == 0:
        raise ValueError(
            f"{name} needs a teacher that judges what the student writes: with objective {args.objective} and kd_ratio "
            f"{args.kd_ratio} the student would learn its own answers. Set sampling: none, or another objective"
        )
    if args.sampling == "adaptive" and args.eval_strategy == "no":
        raise ValueError(
            "sampling: adaptive samples more whenever held-out loss has risen, and nothing is evaluated: set "
            "eval_strategy: steps and eval_steps, or sampling: mixed"
        )


def _check_length(args: Any) -> None:
    if args.max_steps == 0:
        raise ValueError("max_steps must be positive, or -1 to train for num_train_epochs, got 0")
    if args.train_tokens is not None and not (args.packing and args.max_length):
        raise ValueError(
            "train_tokens needs packing: true and a max_length, which give each row that many tokens; without them "
            "set max_steps"
        )
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs must be positive where max_steps is not set, got {args.num_train_epochs}")
