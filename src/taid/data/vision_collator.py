"""Vision-language batches: what both models are shown, what is not trained, and whether they look at it."""

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
_LOOKED_AT, _SHOWN = 256, 4  # rows
_NOTICED = 1e-6  # a relative change of the loss; a model that gets no pixels gives the same bits
# What a text model takes too; all else in a batch is of its images.
_TEXT = frozenset("input_ids attention_mask token_type_ids mm_token_type_ids labels position_ids".split())


class Collator:
    """Rows to a batch of both models: TRL's collator for each processor, images decoded here and never trained on.

    Args:
        collator: TRL's ``DataCollatorForVisionLanguageModeling``, with the student's processor.
        teacher: the teacher's processor, if there is a teacher; where it makes other pixels of an image than the
            student's, both are asked.
        vocabulary: the ids that both models mean alike.
        skip: rows whose images cannot be read or do not fit into ``max_length`` are not trained on; else an error.

    Attributes:
        exchange: whether the rows of a batch are shown each other's images, as :func:`check_images_matter` does.
    """

    def __init__(self, collator: Any, teacher: ProcessorMixin | None, vocabulary: Vocabulary, *, skip: bool) -> None:
        # Cut here instead: a processor that cuts may do so within an image, some without a word.
        self.max_length, self.collator = collator.max_length, copy.copy(collator)
        self.collator.max_length = None
        self.teacher = None
        if teacher is not None and not _same_pixels(collator.processor, teacher):
            self.teacher = copy.copy(self.collator)
            # The template stands in both: TRL takes it from the processor for prompts and completions.
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
        """A batch as both models take it, its ``labels`` -100 where nothing is trained."""
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
        batch["labels"][self.of_images(batch["input_ids"])] = -100
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
            for row, place in zip(rows, places, strict=True):  # find the one
                self._collated(collator, [row], [place], role)
            raise

    def of_images(self, ids: Tensor) -> Tensor:
        """Which of the tokens ``[B, T]`` stand for images: placeholders, special tokens that touch these, and new lines
        between the rows of an image's tiles."""
        special, image = torch.isin(ids, self.special_ids), torch.isin(ids, torch.tensor(self.image_ids))
        runs = torch.diff(special.int(), dim=1, prepend=special[:, :1].int()).abs().cumsum(1)
        runs = runs + torch.arange(len(ids))[:, None] * (ids.shape[1] + 1)
        found = special & torch.isin(runs, runs[image])
        new_line = torch.isin(ids, self.new_line_ids)
        others = (~found & ~new_line).int().cumsum(1)  # grows where neither stands
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
        """The rows of which `max_length` would cut an image away."""
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
    """Stands in for a row that is left out, in its form; none of its tokens is trained."""
    said = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    messages = {"messages": said, "prompt": said[:1], "completion": said[1:]}
    columns = {column: value for column, value in row.items() if column not in (*images.COLUMNS, images.PLACE)}
    return {
        column: "." if isinstance(value, str) else messages.get(column, value) for column, value in columns.items()
    } | {"images": []}


def check_images_matter(
    rows: Iterable[dict[str, Any]], collator: Collator, measure: Callable[[dict[str, Tensor]], dict[str, float]]
) -> None:
    """Show both models the images of other rows, and see that they notice.

    A model that is trained blind has a healthy loss: it learns the language of the answers. So the cross-entropy of the
    first rows is measured with their own images and with each other's, in the same sizes, where nothing else differs;
    and in negative, where that changes nothing, as among rows of one text.

    Args:
        rows: as a data set gives them; the first with images are taken.
        collator: that of the run.
        measure: a batch to the cross-entropy of "student" and "teacher", in nats a token.

    Raises:
        ValueError: a row cannot be read, a model cannot take it, or a model does not notice.
    """
    looked_at = list(itertools.islice(rows, _LOOKED_AT))
    usable = (
        row for row in _readable(looked_at, skip=collator.skip) if (collator([row])["labels"][:, 1:] != -100).any()
    )
    first = list(itertools.islice(usable, _SHOWN))
    if not first:
        with_images = sum(bool(images.of(row)) for row in looked_at)
        if with_images:
            raise ValueError(
                f"of the first {with_images} rows with images none can be trained on: their images cannot be read, or "
                f"max_length {collator.max_length} cuts their trained tokens away"
            )
        logger.warning(f"none of the first {_LOOKED_AT} rows has an image: whether the models see is not tested")
        return
    own, others = measure(collator(first)), measure(collator(images.exchanged(first)))
    negative: dict[str, float] = {}
    for role, loss in own.items():
        logger.info(f"{role}: {loss:.4f} nats a token on {len(first)} rows, {others[role]:.4f} with other rows' images")
        if abs(loss - others[role]) <= _NOTICED * abs(loss):
            negative = negative or measure(collator(images.inverted(first)))
        if abs(loss - (negative or others)[role]) <= _NOTICED * abs(loss):
            raise ValueError(
                f"the {role} is blind: its loss of the first {len(first)} rows is {loss:.6f} nats a token with their "
                "own images and the same with others. Do its attention mask, processor and weights take the images in?"
            )


def _readable(rows: Iterable[dict[str, Any]], *, skip: bool) -> Iterator[dict[str, Any]]:
    """Of some rows those with images, decoded; raises a ValueError where one cannot be read, unless it is skipped."""
    for row in rows:
        try:
            if images.of(row):
                yield images.decoded(row)
        except ValueError:
            if not skip:
                raise


def _without_absent(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose parts hold only what they had: Arrow gives each part the keys of all, and templates read keys."""
    if not isinstance(message.get("content"), list):
        return message
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    return message | {"content": parts}


def _require_bare(messages: list[dict[str, Any]], place: str) -> None:
    """Images lie in their column: processors would fetch one that a part names from wherever that is."""
    for message in messages:
        parts = message["content"] if isinstance(message.get("content"), list) else []
        for part in parts:
            if part.get("type") not in ("text", "image") or (part["type"] == "image" and len(part) > 1):
                raise ValueError(
                    f"{place}: a part of a message is text, or {{'type': 'image'}} where an image of the `images` "
                    f"column stands; got {part!r:.80}"
                )


def image_token_ids(processor: ProcessorMixin) -> list[int]:
    """The ids that a processor puts in an image's place."""
    return [i for i in (*processor.image_token_ids, *processor.video_token_ids) if i is not None]


def _same_pixels(student: ProcessorMixin, teacher: ProcessorMixin) -> bool:
    """Whether two processors make the same of an image, whatever it is."""
    if type(student) is not type(teacher):
        return False
    of_student, of_teacher = (processor.image_processor.to_dict() for processor in (student, teacher))
    return bool(of_student == of_teacher and image_token_ids(student) == image_token_ids(teacher))


def for_student(batch: dict[str, Any]) -> dict[str, Any]:
    """What the student's forward takes of a batch."""
    return {name: value for name, value in batch.items() if not name.startswith(_TEACHER)}


def for_teacher(batch: dict[str, Any]) -> dict[str, Any]:
    """What the teacher's forward takes of a batch: its own pixels where it has other ones than the student."""
    own = {name.removeprefix(_TEACHER): value for name, value in batch.items() if name.startswith(_TEACHER)}
    if not own:
        return batch
    return {name: value for name, value in batch.items() if name in _TEXT or name == "use_cache"} | own
