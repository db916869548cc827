"""Make the two models of `taid demo`: train the teacher, and leave out layers of it for the student.

    python scripts/train_demo_models.py --out src/taid/assets
    python scripts/train_demo_models.py --out src/taid/assets --only student    # from the teacher that is there

The teacher reads the modules of the standard library that taid.demo keeps for the models, through a byte-level BPE of
2,048 entries trained on the same text. Validation loss is only printed; no other split is opened here.
The student is the teacher's first and third of five layers, with its embedding and norms, and not trained: of all
pairs of layers the one with the lowest validation loss. The demo shows distillation, not pre-training.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from taid import demo

VOCABULARY_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
WINDOW = 256  # tokens a training row
STUDENT_LAYERS = (0, 2)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Concatenate the files, each ended by END_OF_TEXT, into one row of token ids."""
    ids = [i for text in tokenizer(texts)["input_ids"] for i in [*text, tokenizer.eos_token_id]]
    return torch.tensor(ids)


def build(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, inner: int, heads: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in torch.split(rows, 16)]
    return float(torch.stack(losses).sum() / len(rows))


def train(
    model: LlamaForCausalLM,
    train_ids: torch.Tensor,
    validation_ids: torch.Tensor,
    *,
    steps: int,
    rate: float,
) -> None:
    """AdamW with cosine decay and 5 % warm-up on random windows of 16 x 256 tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min((n + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * n / steps))),
    )
    generator = torch.Generator().manual_seed(0)
    start = time.time()
    for step in range(1, steps + 1):
        offsets = torch.randint(len(train_ids) - WINDOW, (16,), generator=generator)
        batch = torch.stack([train_ids[o : o + WINDOW] for o in offsets.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0 or step == steps:
            held = mean_loss(model.eval(), validation_ids[: 200 * WINDOW])
            model.train()
            print(
                f"{step}/{steps} train {loss.item():.3f} validation {held:.3f} {time.time() - start:.0f} s",
                flush=True,
            )


def with_layers(teacher: LlamaForCausalLM, layers: Sequence[int]) -> LlamaForCausalLM:
    """Return a model of some of the teacher's layers, in their order, and all its other weights."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    weights = {}
    for name, weight in teacher.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None:
            weights[name] = weight
        elif int(layer[1]) in layers:
            weights[f"model.layers.{layers.index(int(layer[1]))}.{name[layer.end() :]}"] = weight
    student = LlamaForCausalLM(config)
    student.load_state_dict(weights)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--only", choices=("teacher", "student"), help="make one of the two")
    arguments = parser.parse_args()

    teacher_folder, student_folder = (arguments.out / name for name in ("teacher", "student"))
    if arguments.only != "student":
        train_texts = demo.read("models")
        tokenizer = train_tokenizer(train_texts)
        train_ids, validation_ids = encode(tokenizer, train_texts), encode(tokenizer, demo.read("validation"))
        print(f"{len(train_ids):,} train and {len(validation_ids):,} validation tokens", flush=True)
        torch.manual_seed(0)
        model = build(tokenizer, width=192, layers=5, inner=512, heads=6)
        train(model, train_ids, validation_ids, steps=arguments.steps, rate=3e-3)
        save(model, teacher_folder)
        tokenizer.save_pretrained(teacher_folder)
    if arguments.only != "teacher":
        teacher = LlamaForCausalLM.from_pretrained(teacher_folder)
        save(with_layers(teacher, STUDENT_LAYERS), student_folder)
        for file in teacher_folder.glob("tokenizer*.json"):
            shutil.copyfile(file, student_folder / file.name)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    print(f"{folder.name}: {model.num_parameters():,} weights", flush=True)
    model.to(torch.float16).save_pretrained(folder)


if __name__ == "__main__":
    main()
