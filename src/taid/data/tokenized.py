"""Check prepared rows for training: trained tokens, tokens that the teacher shares, lengths; and fill up batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, concatenate_datasets

from taid.config.training import TAIDConfig
from taid.data import images, vision_collator
from taid.models.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def require_chat_template(processing_class: Any, args: TAIDConfig, dataset: Any) -> None:
    """Raise a ValueError if rows are conversations and there is no chat template."""
    row: dict[str, Any] = next(iter(dataset or [{}]), {})
    is_chat = "messages" in row or isinstance(row.get("prompt"), list)
    if is_chat and processing_class.chat_template is None and args.chat_template_path is None:
        raise ValueError(
            "the rows are conversations, but the student's tokenizer has no chat template: set chat_template_path to "
            "a Jinja file or to a model with the template you want"
        )


def without_untrained(prepared: Dataset, count: int, name: str, args: TAIDConfig) -> Dataset:
    """Leave out rows without a trained token, and log how many of the `count` that TRL was given.

    Raises:
        ValueError: no row is left.
    """
    # TRL leaves most of them out itself, silently, but keeps one whose only label is on its first token, which no
    # token predicts.
    kept = prepared.filter(lambda row: any(label != -100 for label in row["labels"][1:]))
    dropped = count - len(kept)
    if dropped and not len(kept):
        raise ValueError(
            f"max_length {args.max_length} cuts away every trained token of all {dropped} rows of the {name} data set: "
            "raise max_length or shorten the prompts"
        )
    if dropped and args.process_index == 0:
        logger.warning(
            f"{dropped} of {count} rows of the {name} data set are left out: max_length {args.max_length} cuts "
            "away all their trained tokens"
        )
    return kept


def checked(
    train: Any, held_out: Any, vocabulary: Vocabulary, tokenizer: Any, positions: dict[str, int | None], *,
    is_stream: bool,
) -> Any:  # fmt: skip
    """Check prepared rows and return the training rows; rows of a stream are checked as they come.

    Args:
        train: prepared training rows.
        held_out: prepared held-out rows, a dict of several, or None.
        vocabulary: the ids that student and teacher share.
        tokenizer: the student's.
        positions: the size of each model's learned position embedding; None for no limit.
        is_stream: whether `train` is a stream, of which the first chunk is checked now.

    Raises:
        ValueError: a data set has no trained token, a token that the teacher does not share, or too long a row.
    """
    if is_stream:
        train = require_usable(train, "train", vocabulary, tokenizer)
    named = held_out if isinstance(held_out, dict) else {"eval": held_out}
    for name, dataset in {"train": train, **named}.items():
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            require_usable(dataset, name, vocabulary, tokenizer)
            for role, most in positions.items():
                require_positions(dataset, name, most, role)
    return train


def require_usable(dataset: Any, name: str, vocabulary: Vocabulary, tokenizer: Any) -> Any:
    """Check that some token is trained, and that the teacher shares all of them.

    Args:
        dataset: prepared rows, or the current chunk of a stream, whose later chunks are checked as they come.
        name: the name of the data set.
        vocabulary: the ids that student and teacher share.
        tokenizer: the student's.

    Raises:
        ValueError: no token is trained, or the teacher does not know a token; names the first.
    """
    if not any(label != -100 for row in dataset for label in row["labels"][1:]):
        raise ValueError(
            f"the {name} data set has no trained token: every row is shorter than two tokens, or all of its labels are "
            "-100"
        )
    if set(tokenizer.get_vocab().values()) <= set(vocabulary.ids):
        return dataset

    def checked(row: dict[str, Any]) -> dict[str, Any]:
        vocabulary.require_shared([row["input_ids"]], tokenizer, "the stream's chunk in hand")
        return row

    if not isinstance(dataset, Dataset):
        return dataset.map(checked)
    vocabulary.require_shared(dataset["input_ids"], tokenizer, f"the {name} data set")
    return dataset


def require_positions(dataset: Any, name: str, most: int | None, role: str) -> None:
    """Raise a ValueError if a prepared row is longer than the learned position embedding (None: no limit)."""
    if most is not None and (longest := max(map(len, dataset["input_ids"]))) > most:
        raise ValueError(
            f"a row of the {name} data set has {longest} tokens, but the {role} has learned {most} positions: set "
            f"max_length: {most}"
        )


class FullBatches:
    """Batches of an epoch, the same number for each process and all of one size.

    The last ones are filled up with an untrained row. Accelerate would repeat the first rows of the epoch instead.

    Args:
        batches: a torch ``BatchSampler``.
        processes: the number of processes that share the batches.
        filler: the index of the untrained row.
    """

    def __init__(self, batches: Any, processes: int, filler: int) -> None:
        self.batches, self.processes, self.filler = batches, processes, filler
        self.batch_size, self.drop_last, self.sampler = batches.batch_size, False, batches.sampler

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch + [self.filler] * (self.batch_size - len(batch))
        for _ in range(len(self) - len(self.batches)):
            yield [self.filler] * self.batch_size


def filled(dataset: Dataset, missing: int) -> Dataset:
    """Append `missing` two-token rows with all labels -100, so that the last batch is full."""
    is_of_images = images.PLACE in dataset.column_names

    def untrained(row: dict[str, Any]) -> dict[str, Any]:
        if is_of_images:
            return {images.PLACE: vision_collator.UNTRAINED}
        short = {name: value[:2] for name, value in row.items() if isinstance(value, list)}
        return short | {"labels": [-100, -100]} | ({"seq_lengths": [2]} if "seq_lengths" in row else {})

    return concatenate_datasets([dataset, dataset.select([0] * missing).map(untrained).cast(dataset.features)])
