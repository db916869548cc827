"""``taid plan``: how large a teacher's cache is for a recipe, from configurations and rows; no weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from taid import capture
from taid.cache_format import Format
from taid.config import TAIDConfig
from taid.models import load_tokenizer, teacher_init_kwargs
from taid.trainer import TAIDTrainer

_DISTINCT = 12.0  # ids of 50 draws from a large teacher, arXiv 2503.16870


def plan(student: str, revision: str | None, args: TAIDConfig, train_rows: Any, eval_rows: Any) -> str:
    """What ``taid cache`` would write for a recipe, in words; `args` are used up.

    Raises:
        ValueError: a configuration or tokenizer cannot be read, or the rows cannot be used; says which and the remedy.
    """
    teacher = str(args.teacher_model_name_or_path)
    remote = {"trust_remote_code": args.trust_remote_code}
    origin = remote | {"revision": args.teacher_model_revision}
    tokenizer = (
        load_tokenizer(student, role="student", revision=revision, **remote)
        if args.tokenizer_from == "student"
        else load_tokenizer(teacher, role="teacher", **origin)
    )
    folder = Path(teacher).expanduser()
    if teacher.startswith((".", "~", "/")) and not folder.is_dir():
        raise ValueError(f"teacher folder {teacher!r} does not exist")
    try:
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else teacher, **origin)
    except (OSError, ValueError) as error:
        raise ValueError(f"the configuration of teacher {teacher!r} could not be read: {error}") from error
    of_text = config.get_text_config()
    dtype: Any = teacher_init_kwargs(args)["dtype"]
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"teacher_model_init_kwargs: dtype {teacher_init_kwargs(args)['dtype']!r} is none of torch's")
    counts = _counts(tokenizer, args, train_rows, eval_rows)
    tokens = sum(trained for _, trained in counts.values())
    ids = min(len(set(tokenizer.get_vocab().values())), of_text.vocab_size)
    head = of_text.vocab_size * of_text.hidden_size * dtype.itemsize

    lines = [
        f"teacher: {teacher}, hidden states of {of_text.hidden_size:,} numbers in {str(dtype).removeprefix('torch.')}, "
        f"{of_text.vocab_size:,} output rows",
        *(f"{name}: {rows:,} different rows, {trained:,} trained tokens" for name, (rows, trained) in counts.items()),
        "",
        f"{'a cache of':33}{'bytes a token':>15}{'size':>12}",
    ]
    draws = args.teacher_cache_samples or 50
    for words, name, distinct in (
        ("hidden", "hidden", None),
        ("hidden_int8", "hidden_int8", None),
        (f"top_k, k = {min(args.teacher_top_k or 64, ids)}", "top_k", None),
        (f"sampled, {draws} draws, about {min(_DISTINCT, draws):g} ids", "sampled", min(_DISTINCT, draws)),
        (f"sampled, {draws} draws, at most", "sampled", None),
    ):
        format_ = Format(name, of_text.hidden_size, dtype, ids, min(args.teacher_top_k or 64, ids), draws)
        each = format_.bytes_per_token(distinct)
        size = tokens * each + (head if format_.needs_head else 0)
        lines.append(f"{words:33}{each:15,.0f}{_bytes(size):>12}")
    return "\n".join(lines)


def _counts(tokenizer: Any, args: TAIDConfig, train_rows: Any, eval_rows: Any) -> dict[str, tuple[int, int]]:
    """Of each data set the different rows and their trained tokens, made by the trainer that a run would have."""
    args.objective, args.teacher_cache, args.teacher_server_url, args.teacher_model_name_or_path = (
        "sft",
        None,
        None,
        None,
    )
    rows = max(tokenizer.get_vocab().values()) + 1
    smallest = LlamaForCausalLM(
        LlamaConfig(vocab_size=rows, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1)
    )  # fmt: skip
    args.tokenizer_from = "student"
    trainer = TAIDTrainer(
        smallest, args=args, train_dataset=train_rows, eval_dataset=eval_rows, processing_class=tokenizer
    )
    return {name: (len(keys), sum(keys.values())) for name, keys in capture.rows_of(trainer).items()}


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
