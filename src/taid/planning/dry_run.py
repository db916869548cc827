"""``taid train --dry_run``: the code of a run tries a recipe with small random models and a few short rows.

Every option of the recipe stays as it is, unless it is too large for a dry run or reaches out of it. A small model
keeps its class and everything that decides which code runs: its kind of attention, norms and positions, soft caps,
experts, whether embeddings are tied, and the rows of its vocabulary. It is narrow and shallow.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from trl import ModelConfig

from taid.config.data import DataArguments
from taid.config.parsing import configured
from taid.config.training import TAIDConfig
from taid.config.values import changed
from taid.data import images, stream
from taid.data.loading import load_rows
from taid.models.loading import is_vision_language
from taid.planning.plan import make_plan
from taid.planning.plan_text import plan_text
from taid.planning.recipe import Recipe
from taid.teachers.placement import teacher_init_kwargs
from taid.training import run

_STEPS, _ROWS, _HELD_OUT, _CHARACTERS, _TOKENS, _NEW_TOKENS = 3, 16, 2, 48, 256, 16
_WIDTHS = {"student": 32, "teacher": 64}  # two, so that nothing can be right because both are the same
_HEADS = 4  # of attention, in a small model
# Sizes that only some architectures have, by their names: twice the width, or at most the number given.
_INNER_WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "ffn_dim",
)  # fmt: skip
_AT_MOST = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32,
    "max_window_layers": 2,
}  # fmt: skip
_WORDS = "the small student learns what the large teacher says of each token and both read the same rows".split()


@dataclass(frozen=True)
class Miniature:
    """A recipe in a temporary folder.

    Attributes:
        arguments: options that replace the recipe's own.
        needs_cache: whether the teacher has to be captured first.
        summary: a sentence to print when all went well.
    """

    arguments: list[str]
    needs_cache: bool
    summary: str


def dry_run(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Print the plan, then train small models of a recipe's architectures for a few steps, by the code of a run.

    Args:
        recipe: what is tried.
        arguments: the command line of the recipe, for the CPU.

    Raises:
        ValueError: something in the recipe would stop the run; names it and the remedy.
    """
    if recipe.args.world_size > 1:
        raise ValueError("--dry_run is for one process: start it without accelerate launch")
    print(plan_text(make_plan(recipe)), flush=True)
    logger = logging.getLogger("taid")
    level = logger.level
    with miniature(recipe) as small:
        try:
            words = [*arguments, *small.arguments]
            if small.needs_cache:
                run.cache(*_within_reach(*configured(words, "cache")))
            run.train(*_within_reach(*configured(words, "train")))
        finally:
            logger.setLevel(level)
    print(small.summary)


def _within_reach(
    model: ModelConfig, data: DataArguments, args: TAIDConfig
) -> tuple[ModelConfig, DataArguments, TAIDConfig]:
    """Leave out what reaches out of a dry run or needs a GPU: servers, the Hub, kernels."""
    logging.getLogger("taid").setLevel(logging.ERROR)  # what is said of the miniature is not true of the run
    given = args.teacher_model_init_kwargs
    return changed(model, attn_implementation=None), data, changed(
        args, teacher_server_url=None, resume_from_checkpoint=None, push_to_hub=False, torch_compile=False,
        activation_offloading=False,
        teacher_model_init_kwargs=None if given is None else {"dtype": teacher_init_kwargs(args)["dtype"]},
    )  # fmt: skip


@contextlib.contextmanager
def miniature(recipe: Recipe) -> Iterator[Miniature]:
    """Make a recipe in miniature, and delete it afterwards.

    Raises:
        ValueError: a configuration, a tokenizer, the rows or the options of the recipe are not as they should be.
    """
    args = recipe.args
    roles = ["student"] if args.teacher_model_name_or_path is None else ["student", "teacher"]
    with tempfile.TemporaryDirectory(prefix="taid-dry-run-") as folder, contextlib.redirect_stdout(io.StringIO()):
        root = Path(folder)
        made = {role: _model(recipe, role, root / role) for role in roles}
        # A server gives the top k of a teacher; the rows of a stream cannot be captured.
        has_server = args.teacher_server_url is not None and not recipe.data.streaming and not args.samples_answers
        small = _small_options(recipe, root)
        if needs_cache := args.teacher_cache is not None or has_server:
            small["teacher_cache"] = root / "cache"
            small["teacher_cache_format"] = "top_k" if has_server else args.teacher_cache_format or "hidden"
        arguments = [word for name, value in small.items() for word in (f"--{name}", str(value))]
        has_template = made.get(args.tokenizer_from, made["student"])[1] or args.chat_template_path is not None
        arguments += _data(recipe, root, is_chat=has_template and not recipe.data.streaming)
        yield Miniature(arguments, needs_cache, _summary(recipe, {role: name for role, (name, _) in made.items()}))


def _small_options(recipe: Recipe, root: Path) -> dict[str, Any]:
    """Return the options that replace those of a recipe that are too large, or that name its models."""
    args = recipe.args
    small: dict[str, Any] = {
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
    if args.teacher_model_name_or_path is not None:
        small["teacher_model_name_or_path"] = root / "teacher"
    if args.max_length is not None:
        most = (
            _TOKENS if not is_vision_language(recipe.config("student")) else 16 * _TOKENS
        )  # images take their own number
        small["max_length"] = min(args.max_length, most)
    if args.fp16:
        small["fp16"] = False  # a CPU has none
    if args.train_tokens is not None:
        small["max_steps"] = -1
        rows = small["per_device_train_batch_size"] * small["gradient_accumulation_steps"]
        small["train_tokens"] = _STEPS * rows * small["max_length"]
    return small


def _model(recipe: Recipe, role: str, folder: Path) -> tuple[str, bool]:
    """Write a small model with the recipe's tokenizer; return its class, and whether there is a chat template."""
    config = recipe.config(role)
    tokenizer = recipe.tokenizer(role)
    try:
        small = config_like(config, hidden_size=_WIDTHS[role])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(small.get_text_config(), name, getattr(tokenizer, name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = (AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM).from_config(
                small
            )
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"no small {config.model_type} model could be made for the dry run of the {role} ({error}): try the "
            "recipe itself, with --max_steps 2"
        ) from error
    model.to(config.dtype or torch.float32).save_pretrained(folder)
    (recipe.processor(role) if is_vision_language(config) else tokenizer).save_pretrained(folder)
    return type(model).__name__, tokenizer.chat_template is not None


def _data(recipe: Recipe, root: Path, *, is_chat: bool) -> list[str]:
    """Write rows; return the arguments that name them."""
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
    """Yield the recipe's own rows, with each text cut short."""
    args, config = recipe.args, recipe.data.dataset_config
    if recipe.data.streaming and name in recipe.data.names:
        rows = stream.open_stream([name], args, config=config, split=split).dataset
    else:
        rows = load_rows(name, config=config, split=split, text_field=args.dataset_text_field)
    with_images = images.has_images(rows)
    for row in rows:
        yield _shortened(images.decoded(row) if with_images else row, args.dataset_text_field)


def _pictured(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write the images of a row; return the row with their paths in place of them."""
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
    """Yield rows of the kind that a recipe needs, where its own are not on this machine."""
    args, with_images = recipe.args, is_vision_language(recipe.config("student"))
    for start in itertools.count():
        text = " ".join(_WORDS[(start + word) % len(_WORDS)] for word in range(4))
        chat = {"messages": [{"role": role, "content": text} for role in ("user", "assistant")]}
        if with_images:
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


# --- small models -----------------------------------------------------------------------------------------------------


def config_like(config: Any, *, hidden_size: int = 32) -> Any:
    """Return the configuration of a small model that runs the code of a large one.

    Args:
        config: configuration of a causal or vision-language model; it is left as it is.
        hidden_size: width of the small model, a multiple of 16.

    Returns:
        The same class and flags, `hidden_size` wide, with one layer of each kind and at least two.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads, groups = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    head_size = getattr(text, "head_dim", None)
    if head_size is not None and not hasattr(text, "qk_rope_head_dim"):  # latent attention's heads stay as they are
        # Where heads together are wider than the model, they stay so.
        text.head_dim = hidden_size // _HEADS * (2 if head_size * heads > text.hidden_size else 1)
    text.hidden_size = hidden_size
    if heads is not None:
        text.num_attention_heads = _HEADS
    if groups is not None:
        text.num_key_value_heads = _HEADS if groups == heads else min(groups, 2)
    _layers(text)
    for name in _INNER_WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 2 * hidden_size)
    for name, most in _AT_MOST.items():
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, min(value, most))
    _positions(text, getattr(text, "head_dim", None) or hidden_size // _HEADS)
    if getattr(small, "vision_config", None) is not None:
        _tower(small.vision_config, hidden_size)
    return small


def _tower(config: Any, hidden_size: int) -> None:
    """Make a vision tower narrow and shallow. Image and patch sizes stay, so that the processor fits."""
    sizes = {"num_hidden_layers": 2, "depth": 2, "num_attention_heads": _HEADS, "num_heads": _HEADS}
    sizes |= {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "out_hidden_size": hidden_size}
    for name, size in (sizes | {"embed_dim": hidden_size}).items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, size)
    if hasattr(config, "fullatt_block_indexes"):
        config.fullatt_block_indexes = [1]


def _layers(config: Any) -> None:
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    config.num_hidden_layers = max(2, len(kinds))
    if kinds and "layer_types" in vars(config):  # some architectures derive it from num_hidden_layers
        config.layer_types = (kinds * 2)[: config.num_hidden_layers]


def _positions(config: Any, head_size: int) -> None:
    """Shorten the factors that some rotary embeddings have, one for each pair of a head's dimensions."""
    parameters = getattr(config, "rope_parameters", None) or {}
    pairs = int(head_size * parameters.get("partial_rotary_factor", 1.0)) // 2
    for name, value in parameters.items():
        if name == "mrope_section":  # number of pairs for time, height and width
            parts = [pairs * part // sum(value) for part in value[:-1]]
            parameters[name] = [*parts, pairs - sum(parts)]
        elif isinstance(value, list):
            parameters[name] = value[:pairs]
