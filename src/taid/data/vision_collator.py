"""Collate vision-language batches for both models, and test before training that each model uses its images."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from taid.data import images
from taid.models.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

UNTRAINED = ""
"""The place of a row that fills a batch and is not trained on."""

_TEACHER = "teacher_"
_CANDIDATES, _TESTED = 256, 4  # rows that are searched for images, and rows whose loss is measured
_MIN_CHANGE = 1e-6  # relative change of the loss; without pixels a model repeats every bit
# The tensors that a text model takes too; all others in a batch belong to its images.
_TEXT = frozenset("input_ids attention_mask token_type_ids mm_token_type_ids labels position_ids".split())


class Collator:
    """Collate rows into a batch for both models: TRL's collator runs for each processor; image tokens are not trained.

    Args:
        collator: TRL's ``DataCollatorForVisionLanguageModeling``, with the student's processor.
        teacher: the teacher's processor, if there is a teacher. Both processors run if their pixels differ.
        vocabulary: the ids that student and teacher share.
        skip: do not train on rows whose images cannot be read or exceed ``max_length``; otherwise they are an error.

    Attributes:
        exchange: whether rows of a batch get each other's images, as :func:`check_images_matter` needs.
    """

    def __init__(self, collator: Any, teacher: ProcessorMixin | None, vocabulary: Vocabulary, *, skip: bool) -> None:
        # Truncate here instead: a processor may cut within an image, and some do so silently.
        self.max_length, self.collator = collator.max_length, copy.copy(collator)
        self.collator.max_length = None
        self.teacher = None
        if teacher is not None and not _same_pixels(collator.processor, teacher):
            self.teacher = copy.copy(self.collator)
            # Both get the template: for prompts and completions TRL takes it from the processor.
            self.teacher.chat_template = collator.chat_template or collator.processor.chat_template
            self.teacher.processor = copy.copy(teacher)
            self.teacher.processor.chat_template = self.teacher.chat_template
        self.skip, self.exchange = skip, False
        processor = collator.processor
        self.image_ids, self.shared_ids = image_token_ids(processor), vocabulary.index
        endings = {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
        lines = processor.tokenizer(["\n", "\n\n"], add_special_tokens=False)["input_ids"]
        self.new_line_ids = torch.tensor(sorted({ids[-1] for ids in lines if ids}))
        self.special_ids = torch.tensor(sorted({*processor.tokenizer.added_tokens_decoder, *self.image_ids} - endings))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch for both models, with ``labels`` -100 where nothing is trained."""
        places = [row.get(images.PLACE, f"row {number} of a batch") for number, row in enumerate(rows)]
        untrained = {number for number, place in enumerate(places) if place == UNTRAINED}
        rows = [self._decoded(row, number, places[number], untrained) for number, row in enumerate(rows)]
        rows = images.exchanged(rows) if self.exchange else rows
        batch = self._batch(rows, places)
        if too_long := self._cut_images(batch):
            self._refuse(places, too_long, int(batch["attention_mask"][min(too_long)].sum()))
            untrained |= too_long
            rows = [_nothing(row) if number in too_long else row for number, row in enumerate(rows)]
            batch = self._batch(rows, places)
        self._require_shared(batch["input_ids"], places)
        batch["labels"][self.image_tokens(batch["input_ids"])] = -100
        batch["labels"][sorted(untrained)] = -100
        if self.max_length is None:
            return batch
        cut = {name for name in _TEXT & batch.keys() if batch[name].shape == batch["input_ids"].shape}
        return {name: value[:, : self.max_length] if name in cut else value for name, value in batch.items()}

    def _decoded(self, row: dict[str, Any], number: int, place: str, untrained: set[int]) -> dict[str, Any]:
        try:
            row = {column: value for column, value in images.decoded(row).items() if column != images.PLACE}
        except ValueError as error:
            if not self.skip:
                raise
            logger.warning(f"left out: {error}")
            untrained.add(number)
            return _nothing(row)
        for column in ("messages", "prompt", "completion"):
            if isinstance(row.get(column), list):
                row[column] = [_without_absent(message) for message in row[column]]
                _require_bare(row[column], place)
        return row

    def _batch(self, rows: list[dict[str, Any]], places: list[str]) -> dict[str, Tensor]:
        batch = self._collated(self.collator, rows, places, "student")
        if self.teacher is None:
            return batch
        other = self._collated(self.teacher, rows, places, "teacher")
        for number, place in enumerate(places):
            ours, theirs = (b["input_ids"][number][b["attention_mask"][number] == 1] for b in (batch, other))
            if not torch.equal(ours, theirs):
                counts = [int(torch.isin(ids, torch.tensor(self.image_ids)).sum()) for ids in (ours, theirs)]
                raise ValueError(
                    f"{place}: the student's processor makes {len(ours)} tokens of it, {counts[0]} of them images', "
                    f"the teacher's {len(theirs)}, {counts[1]} of them images': both models have to be given the same "
                    "tokens. Choose a teacher of the student's family, or give both processors the same image settings"
                )
        return batch | {_TEACHER + name: value for name, value in other.items() if name not in _TEXT}

    def _collated(self, collator: Any, rows: list[dict[str, Any]], places: list[str], role: str) -> dict[str, Tensor]:
        try:
            return dict(collator([dict(row) for row in rows]))
        except (ValueError, IndexError, TypeError) as error:
            if len(rows) == 1:
                raise ValueError(f"{places[0]}: the {role}'s processor cannot take this row: {error}") from error
            for row, place in zip(rows, places, strict=True):  # find the bad row
                self._collated(collator, [row], [place], role)
            raise

    def image_tokens(self, ids: Tensor) -> Tensor:
        """Return a mask ``[B, T]`` of the tokens that stand for images.

        They are placeholders, special tokens next to these, and new lines between the rows of an image's tiles.
        """
        special, image = torch.isin(ids, self.special_ids), torch.isin(ids, torch.tensor(self.image_ids))
        runs = torch.diff(special.int(), dim=1, prepend=special[:, :1].int()).abs().cumsum(1)
        runs = runs + torch.arange(len(ids))[:, None] * (ids.shape[1] + 1)
        found = special & torch.isin(runs, runs[image])
        new_line = torch.isin(ids, self.new_line_ids)
        others = (~found & ~new_line).int().cumsum(1)  # grows at each token that is neither
        before = torch.where(found, others, -1).cummax(1).values
        after = torch.where(found, others, ids.shape[1] + 1).flip(1).cummin(1).values.flip(1)
        return found | (new_line & (before == after))

    def _require_shared(self, ids: Tensor, places: list[str]) -> None:
        known = torch.isin(ids, self.shared_ids)
        if not known.all():
            number, position = (~known).nonzero()[0].tolist()
            token = self.collator.processor.tokenizer.convert_ids_to_tokens(int(ids[number, position]))
            raise ValueError(
                f"{places[number]} contains token {token!r} (id {int(ids[number, position])}), which the teacher does "
                "not know by that id: choose a teacher of the student's family, or keep the token out of the rows"
            )

    def _cut_images(self, batch: dict[str, Tensor]) -> set[int]:
        """Return the rows in which `max_length` would cut off image tokens."""
        if self.max_length is None:
            return set()
        beyond = torch.isin(batch["input_ids"][:, self.max_length :], torch.tensor(self.image_ids))
        return set(beyond.any(1).nonzero().flatten().tolist())

    def _refuse(self, places: list[str], too_long: set[int], tokens: int) -> None:
        text = (
            f"{places[min(too_long)]}: max_length {self.max_length} cuts into its images; the row has {tokens} tokens: "
            "raise max_length"
        )
        if not self.skip:
            raise ValueError(f"{text}, make images smaller, or leave such rows out with skip_bad_images: true")
        logger.warning(f"left out: {text}")


def _nothing(row: dict[str, Any]) -> dict[str, Any]:
    """Return an untrained row of the same form, in place of one that is left out."""
    said = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    messages = {"messages": said, "prompt": said[:1], "completion": said[1:]}
    columns = {column: value for column, value in row.items() if column not in (*images.COLUMNS, images.PLACE)}
    return {
        column: "." if isinstance(value, str) else messages.get(column, value) for column, value in columns.items()
    } | {"images": []}


def check_images_matter(
    rows: Iterable[dict[str, Any]], collator: Collator, measure: Callable[[dict[str, Tensor]], dict[str, float]]
) -> None:
    """Check that the loss of both models changes when rows get each other's images.

    A model that does not use its images can have a healthy loss: it learns the language of the answers. So the
    cross-entropy of the first rows is measured twice, with their own images and with each other's in the same sizes. If
    it does not change, as among rows with the same text, it is measured with inverted colours too.

    Args:
        rows: rows of a data set; the first ones with images are used.
        collator: the collator of the run.
        measure: maps a batch to the cross-entropy of "student" and "teacher", in nats a token.

    Raises:
        ValueError: a row cannot be read, a model cannot take it, or a model's loss does not change.
    """
    candidates = list(itertools.islice(rows, _CANDIDATES))
    usable = (
        row for row in _readable(candidates, skip=collator.skip) if (collator([row])["labels"][:, 1:] != -100).any()
    )
    first = list(itertools.islice(usable, _TESTED))
    if not first:
        with_images = sum(bool(images.images_in(row)) for row in candidates)
        if with_images:
            raise ValueError(
                f"of the first {with_images} rows with images none can be trained on: their images cannot be read, or "
                f"max_length {collator.max_length} cuts their trained tokens away"
            )
        logger.warning(
            f"none of the first {_CANDIDATES} rows has an image: whether the models use images is not tested"
        )
        return
    own, others = measure(collator(first)), measure(collator(images.exchanged(first)))
    negative: dict[str, float] = {}
    for role, loss in own.items():
        logger.info(f"{role}: {loss:.4f} nats a token on {len(first)} rows, {others[role]:.4f} with other rows' images")
        if abs(loss - others[role]) <= _MIN_CHANGE * abs(loss):
            negative = negative or measure(collator(images.inverted(first)))
        if abs(loss - (negative or others)[role]) <= _MIN_CHANGE * abs(loss):
            raise ValueError(
                f"the {role} does not use its images: its loss of the first {len(first)} rows is {loss:.6f} "
                "nats a token with their own images and the same with others. Do its attention mask, processor and "
                "weights take the images in?"
            )


def _readable(rows: Iterable[dict[str, Any]], *, skip: bool) -> Iterator[dict[str, Any]]:
    """Yield decoded rows that have images; raise a ValueError for one that cannot be read, unless `skip` is true."""
    for row in rows:
        try:
            if images.images_in(row):
                yield images.decoded(row)
        except ValueError:
            if not skip:
                raise


def _without_absent(message: dict[str, Any]) -> dict[str, Any]:
    """Remove keys that are None from a message's parts: Arrow gives each part all keys, and templates read them."""
    if not isinstance(message.get("content"), list):
        return message
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    return message | {"content": parts}


def _require_bare(messages: list[dict[str, Any]], place: str) -> None:
    """Raise a ValueError for a part that names its image: a processor would fetch it from any address."""
    for message in messages:
        parts = message["content"] if isinstance(message.get("content"), list) else []
        for part in parts:
            if part.get("type") not in ("text", "image") or (part["type"] == "image" and len(part) > 1):
                raise ValueError(
                    f"{place}: a part of a message is text, or {{'type': 'image'}} where an image of the `images` "
                    f"column stands; got {part!r:.80}"
                )


def image_token_ids(processor: ProcessorMixin) -> list[int]:
    """Return the ids of a processor's image and video placeholders."""
    return [i for i in (*processor.image_token_ids, *processor.video_token_ids) if i is not None]


def _same_pixels(student: ProcessorMixin, teacher: ProcessorMixin) -> bool:
    """Return whether two processors turn every image into the same pixels and tokens."""
    if type(student) is not type(teacher):
        return False
    student_options, teacher_options = (processor.image_processor.to_dict() for processor in (student, teacher))
    return bool(student_options == teacher_options and image_token_ids(student) == image_token_ids(teacher))


def for_student(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a batch that the student's forward takes."""
    return {name: value for name, value in batch.items() if not name.startswith(_TEACHER)}


def for_teacher(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a batch that the teacher's forward takes, with the teacher's own pixels if they differ."""
    own = {name.removeprefix(_TEACHER): value for name, value in batch.items() if name.startswith(_TEACHER)}
    if not own:
        return batch
    return {name: value for name, value in batch.items() if name in _TEXT or name == "use_cache"} | own
