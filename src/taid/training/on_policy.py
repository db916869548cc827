r"""Answers that the student samples itself in training, or the teacher, in place of the data set's.

Of each micro-batch n of optimizer step s, all processes draw the same :math:`u \sim U(0, 1)`. Where it is below a share
:math:`\varphi`, the prompts of the data set's rows get answers sampled from the student as it is before step s, and
these are what the step trains on. Above it the data set's answers stay, or with ``seq_kd`` the teacher samples them.

**mixed** is GKD's: :math:`\varphi` is ``sampling_share`` throughout (arXiv 2306.13649).

**adaptive** is DistiLLM's (arXiv 2402.03898). The threshold :math:`\varphi` begins at 0, and each evaluation whose
held-out loss is above that of the evaluation before raises it: :math:`\varphi \leftarrow \min(\varphi + 0.1, 1)`. Below
it, in step s of N, with a buffer of the last ``sampling_buffer_size`` rows that were sampled:

.. math::
    u < \varphi (1 - s/N) \text{ or the buffer is not full}: \text{ sampled now, and kept in the buffer} \\
    \text{otherwise, } u < \varphi: \text{ rows drawn from the buffer}

so that ever fewer answers are sampled and ever more are seen again. That a buffer is filled first, and that fresh rows
are trained on themselves, is the official code's; by the paper's Algorithm 1 a step below the threshold always draws
from the buffer, full or not. That code counts as a rise one of the cross-entropy by 0.1 nats, above the loss at the
last rise or before training; here it is any rise of ``eval_loss`` above the evaluation before. Its buffer is one a
process; here all processes share one.

Nothing of a random state has to be saved: each draw is seeded by ``seed``, step and micro-batch, as in a stream.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset

from taid.config.training import TAIDConfig
from taid.models.generation import decoding, generate
from taid.models.vocabulary import Vocabulary
from taid.teachers.teacher import Teacher

logger = logging.getLogger(__name__)

FILE = "sampling.json"  # in a checkpoint
_LOOKED_AT = 100  # rows in which an end token is looked for


class Row(NamedTuple):
    """Token ids, and how many of them are the prompt; the others are trained."""

    ids: list[int]
    prompt: int


def row_of(ids: list[int], labels: list[int]) -> Row | None:
    """Split a row into prompt and answer, the last stretch of trained tokens; None if no token is trained."""
    trained = [place for place, label in enumerate(labels) if label != -100]
    if not trained:
        return None
    start = trained[-1]
    while start and labels[start - 1] != -100:
        start -= 1
    return Row(ids[: trained[-1] + 1], start)


def require_prompts(dataset: Any) -> None:
    """Raise a ValueError that names the first prepared row of which all tokens up to the answer's end are trained."""
    if not isinstance(dataset, Dataset):
        return  # of a stream, rows are looked at as they come
    number = 0
    for table in dataset.with_format("arrow").iter(1_000):
        trained = table["labels" if "labels" in table.column_names else "input_ids"]
        for ids, labels in zip(table["input_ids"], trained, strict=True):
            # Looked at as a whole only if its first token is trained: of a prompt it is not.
            if labels[0].as_py() != -100 and (row := row_of(ids.as_py(), labels.as_py())) is not None:
                _require_prompt(row, f"row {number} of the train data set")
            number += 1


def _require_prompt(row: Row, place: str) -> None:
    if row.prompt == 0:
        raise ValueError(
            f"{place} has no prompt that an answer could be sampled for, as all of its tokens are trained: give rows "
            "with prompt and completion (and completion_only_loss not false), messages with assistant_only_loss: true, "
            "or set sampling: none"
        )


@dataclass(frozen=True)
class Threshold:
    """DistiLLM's share of sampled batches, in tenths, and the evaluation that the next one is compared with."""

    rises: int = 0
    loss: float | None = None
    step: int = -1

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return min(self.rises, 10) / 10

    def after(self, loss: float, step: int) -> Threshold:
        """Return the threshold after an evaluation; a step that was evaluated before changes nothing."""
        if step <= self.step:
            return self
        return Threshold(self.rises + (self.loss is not None and loss > self.loss), loss, step)


def check_run(
    args: TAIDConfig, teacher: Teacher | None, train_rows: Any, held_out: Any, *, tensor_parallel: int
) -> None:
    """Raise a ValueError where sampled answers do not go together with a run's models or rows; names the remedy."""
    if tensor_parallel > 1:
        raise ValueError(
            "a student whose products processes compute together does not sample: leave distributed_config away "
            "(--accelerate_config fsdp2 shards it), or set sampling: none"
        )
    if args.seq_kd and (teacher is None or teacher.writer is None or teacher.is_sharded):
        raise ValueError(
            "seq_kd: true needs a teacher that each process has whole: name it as teacher_model_name_or_path, with "
            "teacher_placement: replicated or cpu"
        )
    if args.sampling == "adaptive" and isinstance(held_out, dict):
        raise ValueError(
            f"sampling: adaptive goes by one held-out loss, but there are {len(held_out)} held-out data sets: give one"
        )
    rows = args.per_device_train_batch_size * args.world_size
    if args.sampling == "adaptive" and args.sampling_buffer_size < rows:
        raise ValueError(
            f"sampling_buffer_size {args.sampling_buffer_size} is less than the {rows} rows of a micro-batch of "
            f"all processes, which are drawn from it: set at least {rows}"
        )
    require_prompts(train_rows)


def end_tokens(
    tokenizer: Any, generation_config: Any, vocabulary: Vocabulary, train_rows: Any, *, say: bool
) -> list[int]:
    """Return the ids that end an answer: the tokenizer's end token and those of the student's generation_config.json.

    Args:
        tokenizer: the student's.
        generation_config: the student's; None where it was given the teacher's tokenizer.
        vocabulary: the ids that student and teacher share.
        train_rows: of which the first are looked at.
        say: whether to warn where none of these rows' answers has such a token.

    Raises:
        ValueError: the teacher shares none of them.
    """
    listed = None if generation_config is None else generation_config.eos_token_id
    known = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    ends, names = known & set(vocabulary.ids), tokenizer.convert_ids_to_tokens(sorted(known))
    if not ends:
        raise ValueError(
            f"a sampled answer would never end: the teacher does not have the student's end token {names}. Set "
            "eos_token to one that both have"
        )
    first = (row_of(row["input_ids"], row["labels"]) for row in itertools.islice(train_rows, _LOOKED_AT))
    if say and not any(ends & set(row.ids[row.prompt :]) for row in first if row):
        logger.warning(
            f"none of the first answers of the train data set has one of the tokens {names}, which end the "
            "student's: those will be as long as sampling_max_new_tokens. Set eos_token to what ends an answer, or "
            "a larger max_length if that cuts the ends away"
        )
    return sorted(ends)


class AnswerSampler:
    """Decide which micro-batches have sampled answers, and sample them.

    Args:
        args: the options of the run.
        student: returns the student as it is now, unwrapped.
        teacher: writes answers where ``seq_kd`` is set.
        vocabulary: the ids that student and teacher share; no other is written.
        tokenizer: the student's.
        train_rows: of which the first are looked at, for a token that ends an answer.
        collator: makes a batch of rows, as training does.
        progress: returns how many optimizer steps are done, and how many the run has.
        positions: how many tokens a row may have at most, by what both models have learned; None for any.
        together: whether each forward pass needs all processes, because they share out weights.
    """

    def __init__(
        self, args: TAIDConfig, *, student: Callable[[], Any], teacher: Teacher | None, vocabulary: Vocabulary,
        tokenizer: Any, train_rows: Any, collator: Callable[[list[Any]], dict[str, Any]],
        progress: Callable[[], tuple[int, int]], positions: int | None, together: bool,
    ) -> None:  # fmt: skip
        self.args, self.vocabulary, self.positions, self.together = args, vocabulary, positions, together
        self._student, self._teacher, self._collator, self._progress = student, teacher, collator, progress
        self.threshold, self.buffer = Threshold(), list[Row]()
        config = student().generation_config if args.tokenizer_from == "student" else None
        self.ends = end_tokens(tokenizer, config, vocabulary, train_rows, say=args.process_index == 0)
        temperature = float(self.args.sampling_temperature)
        self._decoding = decoding(self.ends, tokenizer.pad_token_id, temperature=temperature)

    # --- a step -------------------------------------------------------------------------------------------------------

    def replaced(self, batches: list[dict[str, Any]], counts: dict[str, float]) -> list[dict[str, Any]]:
        """Return the micro-batches of the coming optimizer step, some of them with sampled answers.

        Args:
            batches: of the data set, as they are collated.
            counts: to which ``micro_batches`` and, of them, those that the student ``sampled`` are added.
        """
        step, made = self._progress()[0], []
        for number, batch in enumerate(batches):
            seed = (self.args.seed, step, number)
            draws = np.random.default_rng(seed)  # the same in all processes, so that none waits for another
            u = draws.random()
            by_student = self.args.sampling != "none" and u < self.share
            if by_student:
                batch = self._by_student(batch, seed, draws, is_fresh=u < self.share * self._fresh)
            elif self.args.seq_kd:
                batch = self._collated(batch, self._sampled(batch, self._by_teacher(), seed))
            made.append(batch)
            counts["micro_batches"] += 1
            counts["sampled"] += by_student
        return made

    @property
    def share(self) -> float:
        """The share of micro-batches with the student's answers."""
        return self.threshold.value if self.args.sampling == "adaptive" else float(self.args.sampling_share)

    @property
    def _fresh(self) -> float:
        """The share of these micro-batches that is sampled anew in this step."""
        if self.args.sampling == "mixed" or len(self.buffer) < self.args.sampling_buffer_size:
            return 1.0
        step, total_steps = self._progress()
        return 1 - float(step / total_steps)

    def _by_student(
        self, batch: dict[str, Any], seed: tuple[int, ...], draws: np.random.Generator, *, is_fresh: bool
    ) -> dict[str, Any]:
        if is_fresh:
            rows = self._sampled(batch, contextlib.nullcontext(self._student()), seed)
            if self.args.sampling == "adaptive":
                known = [row for row in gather_object(rows) if row is not None]
                self.buffer = (self.buffer + known)[-self.args.sampling_buffer_size :]
            return self._collated(batch, rows)
        size, rank = len(batch["labels"]), self.args.process_index
        drawn = draws.choice(len(self.buffer), size * self.args.world_size, replace=False)
        return self._collated(batch, [self.buffer[place] for place in drawn[rank * size :][:size]])

    def _collated(self, batch: dict[str, Any], rows: list[Row | None]) -> dict[str, Any]:
        """Return a batch of rows in place of another; None is a row of which nothing is trained."""
        filler = {"input_ids": [self.ends[0]] * 2, "labels": [-100] * 2}
        made = self._collator(
            [
                filler if row is None else {"input_ids": row.ids, "labels": [-100] * row.prompt + row.ids[row.prompt :]}
                for row in rows
            ]
        )
        place = {"place": batch["place"]} if "place" in batch else {}
        return dict(send_to_device(dict(made), batch["labels"].device)) | place

    # --- generation ---------------------------------------------------------------------------------------------------

    def _sampled(
        self, batch: dict[str, Any], writer: AbstractContextManager[Any], seed: tuple[int, ...]
    ) -> list[Row | None]:
        """Return the rows of a batch with sampled answers; None where nothing was trained."""
        rows = []
        columns = (batch[name].tolist() for name in ("input_ids", "labels", "attention_mask"))
        for ids, labels, mask in zip(*columns, strict=True):
            row = row_of(ids[: sum(mask)], labels)
            rows.append(row)
            if row is not None:
                _require_prompt(row, "a row of the train data set")
        # A row of which nothing is trained gets an answer too: processes that share weights generate together.
        prompts = [row.ids[: row.prompt] if row else [self.ends[0]] for row in rows]
        answers = self._answers(prompts, writer, seed)
        return [
            row and Row(prompt + answer, len(prompt))
            for row, prompt, answer in zip(rows, prompts, answers, strict=True)
        ]

    def _answers(
        self, prompts: list[list[int]], writer: AbstractContextManager[Any], seed: tuple[int, ...]
    ) -> list[list[int]]:
        """Return an answer to each prompt, with its end token, as long as ``max_length`` leaves room for it."""
        lengths = [len(prompt) for prompt in prompts]
        longest, limit, most = max(lengths), self.args.max_length, int(self.args.sampling_max_new_tokens)
        room = [most if limit is None else min(most, max(limit - length, 1)) for length in lengths]
        most = max(room)
        if self.positions is not None:
            most = max(min(most, self.positions - longest), 1)
        own = np.random.default_rng((*seed, 1 + self.args.process_index))  # other tokens in each process
        with writer as model:
            answers = generate(
                model, prompts, self._decoding, max_new_tokens=most, vocabulary=self.vocabulary,
                seed=int(own.integers(2**63)), device=self.args.device, synced_gpus=self.together,
            )  # fmt: skip
        return [answer[:most] for answer, most in zip(answers, room, strict=True)]

    @contextlib.contextmanager
    def _by_teacher(self) -> Iterator[Any]:
        assert self._teacher is not None
        with self._teacher.autocast():
            yield self._teacher.writer

    # --- over a run ---------------------------------------------------------------------------------------------------

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Hear of an evaluation, in training."""
        if self.args.sampling == "adaptive":
            self.threshold = self.threshold.after(metrics["eval_loss"], self._progress()[0])

    def logged(self, counts: dict[str, float]) -> dict[str, float]:
        """Return what is logged: the share of sampled micro-batches since the last, and the threshold."""
        if self.args.sampling == "none":
            return {}
        shares = {"sampled": counts["sampled"] / max(counts["micro_batches"], 1)}
        return shares | ({"sampling_threshold": self.threshold.value} if self.args.sampling == "adaptive" else {})

    def save(self, folder: Path) -> None:
        """Keep in a checkpoint what the next steps depend on."""
        saved = {"threshold": asdict(self.threshold), "rows": [[row.prompt, *row.ids] for row in self.buffer]}
        (folder / FILE).write_text(json.dumps(saved), encoding="utf-8")

    def start(self, checkpoint: Path | None) -> None:
        """Begin a run, or go on with it; a checkpoint of other sampling is refused later, by its options.

        Raises:
            ValueError: the checkpoint's file is damaged, or there is none and the next steps depend on it.
        """
        self.threshold, self.buffer = Threshold(), []
        if checkpoint is None:
            return
        path = checkpoint / FILE
        if not path.is_file() and self.args.sampling != "adaptive":
            return  # nothing of a fixed share is remembered
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.threshold = Threshold(**saved["threshold"])
            self.buffer = [Row(ids, prompt) for prompt, *ids in saved["rows"]]
        except FileNotFoundError:
            raise ValueError(
                f"cannot resume: {checkpoint} has no {FILE}, with threshold and rows of sampling: adaptive; it was "
                "saved without, or the file is lost: resume another checkpoint"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"cannot resume: {path} is truncated or damaged; delete {checkpoint.name} to resume an earlier one"
            ) from error
