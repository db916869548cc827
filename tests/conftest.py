"""Small models, a tokenizer and rows, made in seconds without a network; shared by the tests that need them."""

from __future__ import annotations

import atexit
import base64
import gc
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before any import of triton, which transformers imports: kernels run on the CPU unless a GPU machine sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Before any import of datasets, transformers or huggingface_hub, which read these once.
_CACHE = tempfile.mkdtemp(prefix="taid-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HOME": _CACHE,
    "HF_DATASETS_CACHE": f"{_CACHE}/datasets",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # models this small are slower on two threads
}

import pytest  # noqa: E402
import torch  # noqa: E402

# Before transformers looks for torchvision.
import torchvision_cpu  # noqa: E402, F401

# isort: split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A small student learns from a large teacher.",
    "One token at a time.",
    "def f(x):\n    return x ** 2\n",
    "The capital of France is Paris.",
    "The loss falls, then it rises again.",
    "12345 and 3.14 are numbers.",
    "Yes.",
)
_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{%- else %}{{ message['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


# Files that take long though they have few tests; the Makefile lets each worker take the next file in this order.
_FIRST = (
    "comparison engines vision runs sampling evaluation cache triton_rows trainer stream recipes kernels docs examples"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": i for i, name in enumerate(_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """Every collection of garbage would go through all that the libraries have made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """TrainingArguments and the command line set variables that would reach into the next test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


_NO_PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@pytest.fixture(autouse=True, scope="module")
def _pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """A report's pictures take a second a run: they are drawn where they, or the documentation's, are looked at."""
    if request.module.__name__ in ("test_report", "test_card", "test_docs", "test_examples", "test_golden"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taid.artifacts.report.png_of", lambda figure: _NO_PICTURE)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; bos = eos = pad = <|endoftext|> (id 0), and a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[0], pad_token=special[0], model_max_length=512
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    """make_model(rows=300, *, hidden_size=32, tied=True, seed=0, **config): a new random Llama of two layers."""

    def make(
        rows: int = 300, *, hidden_size: int = 32, tied: bool = True, seed: int = 0, **config: Any
    ) -> LlamaForCausalLM:
        values: dict[str, Any] = {
            "vocab_size": rows,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,  # with the usual 0.02 every distribution is uniform, and every divergence zero
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**values | config)).eval()

    return make


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory, tokenizer, make_model) -> Path:
    """A saved student: width 32, tied embeddings, 300 rows for 300 tokens. Do not write into it."""
    return _save(tmp_path_factory.mktemp("models") / "student", tokenizer, make_model(300, seed=1))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tokenizer, make_model) -> Path:
    """A saved teacher: width 48, untied embeddings, 308 rows for the same 300 tokens. Do not write into it."""
    teacher = make_model(308, hidden_size=48, tied=False, seed=2)
    return _save(tmp_path_factory.mktemp("models") / "teacher", tokenizer, teacher)


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    """make_rows(kind="prompt", number=8, seed=0): "prompt", "messages" or "text" rows of 1 to 4 sentences a text."""

    def make(kind: str = "prompt", number: int = 8, seed: int = 0) -> list[dict[str, Any]]:
        chosen = random.Random(seed)

        def text() -> str:
            return " ".join(chosen.choices(_SENTENCES, k=chosen.randint(1, 4)))

        def messages() -> list[dict[str, str]]:
            return [
                {"role": role, "content": text()} for _ in range(chosen.randint(1, 2)) for role in ("user", "assistant")
            ]

        kinds: dict[str, Callable[[], dict[str, Any]]] = {
            "prompt": lambda: {"prompt": text(), "completion": " " + text()},
            "messages": lambda: {"messages": messages()},
            "text": lambda: {"text": text()},
        }
        return [kinds[kind]() for _ in range(number)]

    return make


@pytest.fixture(scope="session")
def rows(make_rows) -> Callable[..., Path]:
    """rows(path, kind="prompt", number=8, seed=0): write make_rows(...) to a .jsonl file and return its path."""

    def write(path: Path, kind: str = "prompt", number: int = 8, seed: int = 0) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(kind, number, seed)), encoding="utf-8")
        return path

    return write


def _save(folder: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
