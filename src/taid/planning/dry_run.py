"""``taid train --dry_run``: a recipe in miniature, for the same code to run: small models, few and short rows.

All that a recipe says stays as it is, but for what is too large for a dry run or reaches out of it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from trl import ModelConfig

from taid.config.data import DataArguments
from taid.config.training import TAIDConfig
from taid.data import images, stream
from taid.data.loading import load_rows
from taid.models.loading import sees
from taid.planning import tiny
from taid.planning.plan import Recipe
from taid.teachers.placement import teacher_init_kwargs

_STEPS, _ROWS, _HELD_OUT, _CHARACTERS, _TOKENS, _NEW_TOKENS = 3, 16, 2, 48, 256, 16
_WIDTHS = {"student": 32, "teacher": 64}  # two, so that nothing can be right because both are the same
_WORDS = "the small student learns what the large teacher says of each token and both read the same rows".split()


@dataclass(frozen=True)
class Miniature:
    """A recipe in a temporary folder.

    Attributes:
        arguments: what replaces the recipe's own.
        needs_cache: whether the teacher has to be captured first.
        summary: what is said when all went well.
    """

    arguments: list[str]
    needs_cache: bool
    summary: str

    def released(
        self, model: ModelConfig, data: DataArguments, args: TAIDConfig
    ) -> tuple[ModelConfig, DataArguments, TAIDConfig]:
        """The same without what reaches out of a dry run or needs a GPU: servers, the Hub, kernels."""
        logging.getLogger("taid").setLevel(logging.ERROR)  # what is said of the miniature is not true of the run
        model.attn_implementation = None
        args.teacher_server_url = args.resume_from_checkpoint = None
        args.push_to_hub = args.torch_compile = args.activation_offloading = False
        if args.teacher_model_init_kwargs is not None:
            args.teacher_model_init_kwargs = {"dtype": teacher_init_kwargs(args)["dtype"]}
        return model, data, args


@contextlib.contextmanager
def miniature(recipe: Recipe) -> Iterator[Miniature]:
    """Make a recipe in miniature, and delete it afterwards.

    Raises:
        ValueError: a configuration, a tokenizer, the rows or the options of the recipe are not as they should be.
    """
    args = recipe.args
    roles = ["student"] if args.teacher_model_name_or_path is None else ["student", "teacher"]
    level = logging.getLogger("taid").level
    with tempfile.TemporaryDirectory(prefix="taid-dry-run-") as folder, contextlib.redirect_stdout(io.StringIO()):
        root = Path(folder)
        made = {role: _model(recipe, role, root / role) for role in roles}
        # What a server says is the top k of a teacher; of a stream nothing can be captured.
        has_server = args.teacher_server_url is not None and not recipe.data.streaming and not args.samples_answers
        needs_cache = args.teacher_cache is not None or has_server
        most = _TOKENS if not sees(recipe.config("student")) else 16 * _TOKENS  # images take their own number
        small = {
            "model_name_or_path": root / "student",
            "output_dir": root / "run",
            "max_steps": _STEPS,
            "per_device_train_batch_size": min(args.per_device_train_batch_size, 2),
            "per_device_eval_batch_size": min(args.per_device_eval_batch_size, 2),
            "gradient_accumulation_steps": min(args.gradient_accumulation_steps, 2),
            "report_to": "none",
            "dataloader_num_workers": 0,
            "sampling_max_new_tokens": min(args.sampling_max_new_tokens, _NEW_TOKENS),
            "sampling_buffer_size": min(args.sampling_buffer_size, _ROWS),
        }
        if "teacher" in roles:
            small["teacher_model_name_or_path"] = root / "teacher"
        if args.max_length is not None:
            small["max_length"] = min(args.max_length, most)
        if args.fp16:
            small["fp16"] = False  # which a CPU has not
        if args.train_tokens is not None:
            small["max_steps"] = -1
            rows = small["per_device_train_batch_size"] * small["gradient_accumulation_steps"]
            small["train_tokens"] = _STEPS * rows * small["max_length"]
        if needs_cache:
            small["teacher_cache"] = root / "cache"
            small["teacher_cache_format"] = "top_k" if has_server else args.teacher_cache_format or "hidden"
        arguments = [word for name, value in small.items() for word in (f"--{name}", str(value))]
        has_template = made.get(args.tokenizer_from, made["student"])[1] or args.chat_template_path is not None
        arguments += _data(recipe, root, is_chat=has_template and not recipe.data.streaming)
        try:
            yield Miniature(arguments, needs_cache, _summary(recipe, {role: name for role, (name, _) in made.items()}))
        finally:
            logging.getLogger("taid").setLevel(level)


def _model(recipe: Recipe, role: str, folder: Path) -> tuple[str, bool]:
    """Write a small model with the recipe's tokenizer; returns its class, and whether there is a chat template."""
    config = recipe.config(role)
    tokenizer = recipe.tokenizer(role)
    try:
        small = tiny.config_like(config, hidden_size=_WIDTHS[role])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(small.get_text_config(), name, getattr(tokenizer, name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = (AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM).from_config(small)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"no small {config.model_type} model could be made for the dry run of the {role} ({error}): try the "
            "recipe itself, with --max_steps 2"
        ) from error
    model.to(config.dtype or torch.float32).save_pretrained(folder)
    (recipe.processor(role) if sees(config) else tokenizer).save_pretrained(folder)
    return type(model).__name__, tokenizer.chat_template is not None


def _data(recipe: Recipe, root: Path, *, is_chat: bool) -> list[str]:
    """Write rows; returns the arguments that name them."""
    data = recipe.data
    files = [root / f"rows-{number}.jsonl" for number in range(len(data.names))]
    sources = [(path, name, data.dataset_train_split, _ROWS) for path, name in zip(files, data.names, strict=True)]
    arguments = ["--dataset_name", *map(str, files)]
    if data.eval_dataset_name:
        held_out = root / "held_out.jsonl"
        sources.append((held_out, data.eval_dataset_name, data.dataset_test_split, _HELD_OUT))
        arguments += ["--eval_dataset_name", str(held_out)]
    for path, name, split, number in sources:
        rows = _first_rows(recipe, name, split) if recipe.is_here(name) else _made_rows(recipe, is_chat)
        first = [_pictured(row, path.with_suffix(f".{place}")) for place, row in enumerate(islice(rows, number))]
        path.write_text("".join(json.dumps(row) + "\n" for row in first), encoding="utf-8")
    return arguments


def _first_rows(recipe: Recipe, name: str, split: str) -> Iterator[dict[str, Any]]:
    """The recipe's own rows, each text cut short."""
    args, config = recipe.args, recipe.data.dataset_config
    if recipe.data.streaming and name in recipe.data.names:
        rows = stream.open_stream([name], args, config=config, split=split).dataset
    else:
        rows = load_rows(name, config=config, split=split, text_field=args.dataset_text_field)
    see = images.has_images(rows)
    for row in rows:
        yield _shortened(images.decoded(row) if see else row, args.dataset_text_field)


def _pictured(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """The row with the paths of its images, which are written, in place of them."""
    if "images" not in row:
        return row
    paths = [f"{path}-{place}.png" for place in range(len(row["images"]))]
    for image, place in zip(row["images"], paths, strict=True):
        image.save(place)
    return row | {"images": paths}


def _shortened(value: Any, text_field: str, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _shortened(v, text_field, k) for k, v in value.items() if v is not None}
    if key in ("input_ids", "labels"):
        return value[-_CHARACTERS:]
    if isinstance(value, list):
        return [_shortened(item, text_field, key) for item in value]
    if isinstance(value, str) and key in ("content", "text", "prompt", "completion", text_field):
        return " ".join(value.split())[:_CHARACTERS]
    return value


def _made_rows(recipe: Recipe, is_chat: bool) -> Iterator[dict[str, Any]]:
    """Rows of the form that a recipe needs, where its own are not on this machine."""
    args, see = recipe.args, sees(recipe.config("student"))
    for start in itertools.count():
        text = " ".join(_WORDS[(start + word) % len(_WORDS)] for word in range(4))
        chat = {"messages": [{"role": role, "content": text} for role in ("user", "assistant")]}
        if see:
            yield chat | {"images": [Image.new("RGB", (64, 64), (16 * start % 256, 8 * start % 256, 128))]}
        elif args.completion_only_loss or (args.samples_answers and not args.assistant_only_loss):
            yield {"prompt": text, "completion": f" {text}"}
        elif is_chat:
            yield chat
        else:
            yield {args.dataset_text_field: text}


def _summary(recipe: Recipe, names: dict[str, str]) -> str:
    args = recipe.args
    models = " and ".join(f"a small {name} for the {role}" for role, name in names.items())
    server = " The server was not asked." if args.teacher_server_url is not None else ""
    return (
        f"dry run passed: {_STEPS} steps of {args.objective} with {models}.{server} Nothing was written to "
        f"{args.output_dir}"
    )
