"""A recipe to plan or to try, on a machine that may be another one than the run's.

Its configurations and tokenizers come from a local folder, from ``configs/<owner>--<name>/`` beside the recipe, or from
the Hub. A tokenizer that is only described there is made here, with as many tokens as the real one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ProcessorMixin
from trl import ModelConfig

from taid.config.data import DataArguments
from taid.config.parsing import configured
from taid.config.training import TAIDConfig
from taid.config.values import changed
from taid.data.files import local_files
from taid.models.loading import adapter_config, is_vision_language, load_config, load_processing_class, load_tokenizer

# A recipe with bf16 or tf32 would be refused on a machine without a GPU.
_ON_CPU = ["--use_cpu", "--tf32", "false"]
_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ message['role'] + ': ' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else %}{{ message['content'] + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
)
# A part of a message may be an image; InternVL's processor puts the rest of its tokens around the placeholder.
_VISION_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ message['role'] + ': ' }}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{%- else %}{{ part['text'] }}{%- endif %}{%- endfor %}"
    "{{ eos_token + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """The configuration of a run, the folder where it lies, and the devices that it is planned for.

    Attributes:
        model: the student's options.
        data: the data sets' options.
        args: all other options.
        folder: ``configs/<owner>--<name>/`` in it may stand for a model or data set of the Hub.
        gpus: number of GPUs that the run will have; 0 means a CPU.
        gpu_memory: memory of each GPU in GB.
    """

    model: ModelConfig
    data: DataArguments
    args: TAIDConfig
    folder: Path = Path()
    gpus: int = 1
    gpu_memory: float = 80.0

    def beside(self, name: str | None, file: str) -> Path | None:
        """Return a file beside the recipe that describes a model or data set of the Hub; None if there is none."""
        path = self.folder / "configs" / str(name).replace("/", "--") / file
        return path if path.is_file() and not Path(str(name)).expanduser().exists() else None

    def config(self, role: str) -> Any:
        """Load the configuration of the "student" or "teacher": from a local folder, beside the recipe, or the Hub.

        Raises:
            ValueError: it is in none of these; names the model and the remedy.
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
        """Load the tokenizer of the "student" or "teacher", or make one of the shape that is described beside it.

        Raises:
            ValueError: the description is wrong, or there is no tokenizer; names the file or the model.
        """
        name, origin = self._origin(role)
        if path := self.beside(name, "tokens.json"):
            try:
                return make_tokenizer(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: {error}") from error
        return load_tokenizer(name, role=role, **origin)

    def processor(self, role: str) -> Any:
        """Load the processor of a vision-language "student" or "teacher", or make one of the same shape."""
        name, origin = self._origin(role)
        if self.beside(name, "tokens.json"):
            return make_processor(self.config(role), self.tokenizer(role))
        return load_processing_class(name, role=role, has_images=True, **origin)

    def _origin(self, role: str) -> tuple[str, dict[str, Any]]:
        is_student = role == "student"
        name = self.model.model_name_or_path if is_student else self.args.teacher_model_name_or_path
        revision = self.model.model_revision if is_student else self.args.teacher_model_revision
        return str(name), {"trust_remote_code": self.args.trust_remote_code, "revision": revision}

    def is_adapter(self, role: str) -> bool:
        """Whether the "student" or "teacher" is the folder of an adapter."""
        folder = Path(self._origin(role)[0]).expanduser()
        return folder.is_dir() and adapter_config(str(folder)) is not None

    @property
    def adapter(self) -> Any:
        """peft's configuration of the adapter that is trained: a new one, or the student itself; None without one."""
        # peft imports bitsandbytes and torch's compiler, which takes longer than the rest of a plan.
        if self.model.use_peft:
            from trl import get_peft_config

            return get_peft_config(self.model)
        if not self.is_adapter("student"):
            return None
        from peft import PeftConfig

        found = PeftConfig.from_pretrained(Path(str(self.model.model_name_or_path)).expanduser())
        found.inference_mode = False
        return found

    @property
    def rows_are_here(self) -> bool:
        """Whether all rows lie on this machine and are known beforehand, so that they can be counted."""
        names = [*self.data.names, *([self.data.eval_dataset_name] if self.data.eval_dataset_name else [])]
        known = not self.data.streaming and not is_vision_language(
            self.config("student")
        )  # images take tokens of their own
        return known and all(map(self.is_here, names))

    @staticmethod
    def is_here(name: str) -> bool:
        """Whether a data set lies on this machine.

        Raises:
            FileNotFoundError: its name is that of a file which does not exist.
            ValueError: the file is empty, or of a type that is not read.
        """
        return bool(local_files(name)) or Path(name).expanduser().is_dir()


def read_recipe(
    config: Path | None, overrides: Sequence[str], command: str, *, gpus: int | None, gpu_memory: float
) -> tuple[Recipe, list[str]]:
    """Read a recipe that may be for another machine than this one.

    Args:
        config: its YAML file, or None.
        overrides: ``--option value`` pairs, which win.
        command: "plan" or "train": which options must be there.
        gpus: number of GPUs of the run; None takes the recipe's ``use_cpu``, or one GPU.
        gpu_memory: memory of each GPU in GB.

    Returns:
        The recipe, and the arguments that make it one for the CPU of this machine.

    Raises:
        ValueError: an option is unknown, missing or out of range; names it and the remedy.
        FileNotFoundError: there is no such YAML file.
    """
    arguments = [*([] if config is None else ["--config", str(config)]), *overrides]
    has_gpu = torch.accelerator.is_available()
    model, data, args = configured([*arguments, *([] if has_gpu else _ON_CPU)], command)
    in_file = {} if config is None else yaml.safe_load(config.read_text(encoding="utf-8"))

    def is_given(name: str) -> bool:
        return in_file.get(name) is not None or any(word.split("=")[0] == f"--{name}" for word in overrides)

    if gpus is None:
        gpus = 0 if args.use_cpu and is_given("use_cpu") else 1
    if gpus and not has_gpu and not any(map(is_given, ("bf16", "fp16"))):
        args = changed(args, bf16=True)  # TRL's default where there is a GPU
    folder = Path() if config is None else config.parent
    return Recipe(model, data, args, folder, gpus, gpu_memory), [*arguments, *_ON_CPU]


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Numbers of rows and tokens of a run.

    Attributes:
        number: rows of a pass over the training data, packed or not; None if it is not known.
        longest: tokens of the longest of these rows.
        tokens: tokens of such a pass.
        distinct: number of different rows and of their trained tokens, by data set; a cache holds these.
        counted: whether all this was counted; otherwise each row is taken to be `max_length` tokens long.
    """

    number: int | None
    longest: int
    tokens: int
    distinct: dict[str, tuple[int, int]]
    counted: bool


def rows_of(recipe: Recipe) -> Rows:
    """Count the rows of a recipe where they lie on this machine; otherwise bound them by their number.

    Raises:
        ValueError: the rows cannot be used; names the row and the remedy.
    """
    if not recipe.rows_are_here:
        return _bounded(recipe)
    # A run's libraries take seconds to import, and most plans are of rows that are elsewhere.
    from taid.training.run import load_datasets

    return _counted(recipe, *load_datasets(recipe.data, recipe.args))


def max_row_length(recipe: Recipe) -> int:
    """Return the largest number of tokens that a row can have."""
    return int(recipe.args.max_length or recipe.config("student").get_text_config().max_position_embeddings)


def _counted(recipe: Recipe, train_rows: Any, eval_rows: Any) -> Rows:
    trainer = _trainer_that_tokenizes(recipe, train_rows, eval_rows)
    distinct = {name: (len(keys), sum(keys.values())) for name, keys in trainer.rows.keys().items()}
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    longest = max(lengths)
    if recipe.args.samples_answers:
        longest = min(longest + int(recipe.args.sampling_max_new_tokens), recipe.args.max_length or sys.maxsize)
    return Rows(len(lengths), longest, sum(lengths), distinct, counted=True)


def _trainer_that_tokenizes(recipe: Recipe, train_rows: Any, eval_rows: Any) -> Any:
    """Build a trainer only because it tokenizes, masks and packs rows as the run will. It has no weights to speak of.

    Its student is the smallest Llama with the run's tokenizer. It has no teacher and is never trained.
    """
    from taid.training.trainer import TAIDTrainer

    tokenizer = recipe.tokenizer(recipe.args.tokenizer_from)
    smallest = LlamaForCausalLM(
        LlamaConfig(vocab_size=max(tokenizer.get_vocab().values()) + 1, hidden_size=8, intermediate_size=8,
                    num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # a trainer makes its output_dir
        args = changed(
            recipe.args, output_dir=folder, push_to_hub=False, objective="sft", tokenizer_from="student",
            sampling="none", seq_kd=False, teacher_cache=None, teacher_server_url=None,
            teacher_model_name_or_path=None,
        )  # fmt: skip
        return TAIDTrainer(
            smallest, args=args, train_dataset=train_rows, eval_dataset=eval_rows, processing_class=tokenizer
        )


def _bounded(recipe: Recipe) -> Rows:
    """Bound the tokens of rows of which only the number is known."""
    data, length = recipe.data, max_row_length(recipe)
    splits = {"train": (data.names[0], data.dataset_train_split)}
    if data.eval_dataset_name:
        splits["eval"] = data.eval_dataset_name, data.dataset_test_split
    # Neither a stream nor rows with images can be cached, and steps may be known without them.
    is_asked = not data.streaming and not (recipe.args.max_steps > 0 and is_vision_language(recipe.config("student")))
    found = {name: _number(recipe, *where) for name, where in splits.items()} if is_asked else {}
    distinct = {name: (number, number * length) for name, number in found.items() if number is not None}
    number = found.get("train")
    return Rows(number, length, (number or 0) * length, distinct if len(distinct) == len(found) else {}, counted=False)


def _number(recipe: Recipe, name: str, split: str) -> int | None:
    """Return the number of rows of a split, from beside the recipe or from the Hub; None if neither knows it."""
    if path := recipe.beside(name, "dataset_info.json"):
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise ValueError(f"{path}: data set {name} has no split {split!r}, but {', '.join(splits)}")
        return int(splits[split]["num_examples"])
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(name, recipe.data.dataset_config).info.splits or {}
    except (OSError, ValueError):
        return None
    return int(found[split].num_examples) if split in found else None


# --- tokenizers that are described only -------------------------------------------------------------------------------


def make_tokenizer(
    *, ordinary: int, special: Sequence[str], family: str = "", bos_token: str | None = None,
    eos_token: str | None = None, pad_token: str | None = None, chat_template: bool = True,
    named: Mapping[str, str] | None = None,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """Make a tokenizer of a given size: the 256 bytes, then tokens that no text contains, then special ones.

    Args:
        ordinary: number of tokens that are not special, at least 256.
        special: the special tokens in their order.
        family: tokenizers of two families differ in their ordinary tokens.
        bos_token: one of `special`, like the next two.
        eos_token: the token that ends a turn.
        pad_token: None if the model has none.
        chat_template: whether it gets a chat template, in which the assistant's part is marked.
        named: further tokens by the names that a processor asks for.

    Raises:
        ValueError: fewer than 256 ordinary tokens, or a name that is not among the special ones.
    """
    standard = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
    for name, token in {**standard, **(named or {})}.items():
        if token is not None and token not in special:
            raise ValueError(f"{name} {token!r} is not among the special tokens {list(special)[:8]}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if ordinary < len(alphabet):
        raise ValueError(f"ordinary must be {len(alphabet)} or more, one token a byte, got {ordinary}")
    # The byte 255 is in no UTF-8 text, so that nothing is ever looked for in these.
    words = [*alphabet, *(f"\u00ff{family}{number}" for number in range(len(alphabet), ordinary))]
    bpe = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, extra_special_tokens=dict(named or {}),
        **{name: token for name, token in standard.items() if token is not None},
    )  # fmt: skip
    made.chat_template = _CHAT_TEMPLATE if chat_template else None
    return made


def make_processor(config: Any, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """Make the processor of a vision-language model, from its configuration and a tokenizer of :func:`make_tokenizer`.

    Raises:
        ValueError: no processor can be made for this architecture, or a package is missing.
    """
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    if config.model_type != "internvl":
        raise ValueError(
            f"a processor in miniature is made of internvl only, not of {config.model_type}: name a folder that holds "
            "this one"
        )
    height, width = config.vision_config.image_size
    size = {"height": height, "width": width}
    try:
        of_images = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=12)
        of_videos = InternVLVideoProcessor(size=size)
    except ImportError as error:
        raise ValueError(f"vision-language models need torchvision: pip install torchvision ({error})") from error
    return InternVLProcessor(
        of_images, tokenizer, of_videos, image_seq_length=config.image_seq_length, chat_template=_VISION_CHAT_TEMPLATE
    )
