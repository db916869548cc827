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
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset

from taid.models.generation import decoding, generate
from taid.teachers.teacher import LocalTeacher

if TYPE_CHECKING:
    from taid.training.trainer import TAIDTrainer

logger = logging.getLogger(__name__)

FILE = "sampling.json"  # in a checkpoint
_LOOKED_AT = 100  # rows in which an end token is looked for


class Row(NamedTuple):
    """Token ids, and how many of them are the prompt; the others are trained."""

    ids: list[int]
    prompt: int


def row_of(ids: list[int], labels: list[int]) -> Row | None:
    """What is prompt and what is answer: the last stretch of trained tokens, up to its end; None if none is trained."""
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
        """What it is after an evaluation; one of a step that was evaluated before changes nothing."""
        if step <= self.step:
            return self
        return Threshold(self.rises + (self.loss is not None and loss > self.loss), loss, step)


class Sampling:
    """Decides which micro-batches have sampled answers, and samples them.

    Args:
        trainer: of the run; its teacher is there.
        positions: how many tokens a row may have at the most, by what both models have learned; None for any.

    Raises:
        ValueError: no end token is shared with the teacher, or what is asked for does not go together with the run.
    """

    def __init__(self, trainer: TAIDTrainer, positions: int | None) -> None:
        self.trainer, self.args, self.positions = trainer, trainer.args, positions
        self.threshold, self.buffer = Threshold(), list[Row]()
        self._check()
        self.ends = self._end_tokens()
        self._decoding = decoding(
            self.ends, trainer.processing_class.pad_token_id, temperature=float(self.args.sampling_temperature)
        )

    def _check(self) -> None:
        trainer, args = self.trainer, self.args
        if trainer.get_tp_size() > 1:
            raise ValueError(
                "a student whose products processes compute together does not sample: leave distributed_config away "
                "(--accelerate_config fsdp2 shards it), or set sampling: none"
            )
        if args.seq_kd and (not isinstance(trainer.teacher, LocalTeacher) or trainer.teacher.is_cut):
            raise ValueError(
                "seq_kd: true needs a teacher that each process has whole: name it as teacher_model_name_or_path, with "
                "teacher_placement: replicated or cpu"
            )
        if args.sampling == "adaptive" and isinstance(trainer.eval_dataset, dict):
            raise ValueError(
                f"sampling: adaptive goes by one held-out loss, but there are {len(trainer.eval_dataset)} held-out "
                "data sets: give one"
            )
        rows = args.per_device_train_batch_size * args.world_size
        if args.sampling == "adaptive" and args.sampling_buffer_size < rows:
            raise ValueError(
                f"sampling_buffer_size {args.sampling_buffer_size} is less than the {rows} rows of a micro-batch of "
                f"all processes, which are drawn from it: set at least {rows}"
            )
        require_prompts(trainer.train_dataset)

    def _end_tokens(self) -> list[int]:
        """What ends an answer: the tokenizer's end token and those of the student's generation_config.json."""
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        of_model = trainer.model.generation_config.eos_token_id if self.args.tokenizer_from == "student" else None
        known = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])} - {None}
        ends, names = known & set(trainer.vocabulary.ids), tokenizer.convert_ids_to_tokens(sorted(known))
        if not ends:
            raise ValueError(
                f"a sampled answer would never end: the teacher does not have the student's end token {names}. Set "
                "eos_token to one that both have"
            )
        first = (row_of(row["input_ids"], row["labels"]) for row in itertools.islice(trainer.train_dataset, _LOOKED_AT))
        if self.args.process_index == 0 and not any(ends & set(row.ids[row.prompt :]) for row in first if row):
            logger.warning(
                f"none of the first answers of the train data set has one of the tokens {names}, which end the "
                "student's: those will be as long as sampling_max_new_tokens. Set eos_token to what ends an answer, or "
                "a larger max_length if that cuts the ends away"
            )
        return sorted(ends)

    # --- a step -------------------------------------------------------------------------------------------------------

    def replaced(self, batches: list[dict[str, Any]], counts: dict[str, float]) -> list[dict[str, Any]]:
        """The micro-batches of the coming optimizer step, some of them with sampled answers.

        Args:
            batches: of the data set, as they are collated.
            counts: to which ``micro_batches`` and, of them, those that the student ``sampled`` are added.
        """
        step, made = self.trainer.state.global_step, []
        for number, batch in enumerate(batches):
            seed = (self.args.seed, step, number)
            draws = np.random.default_rng(seed)  # the same in all processes, so that none waits for another
            u = draws.random()
            by_student = self.args.sampling != "none" and u < self.share
            if by_student:
                batch = self._by_student(batch, seed, draws, is_fresh=u < self.share * self._fresh)
            elif self.args.seq_kd:
                batch = self._collated(batch, self._sampled(batch, self._teacher(), seed))
            made.append(batch)
            counts["micro_batches"] += 1
            counts["sampled"] += by_student
        return made

    @property
    def share(self) -> float:
        """Of micro-batches with the student's answers."""
        return self.threshold.value if self.args.sampling == "adaptive" else float(self.args.sampling_share)

    @property
    def _fresh(self) -> float:
        """Of these, the share of those that are sampled in this step."""
        if self.args.sampling == "mixed" or len(self.buffer) < self.args.sampling_buffer_size:
            return 1.0
        return 1 - float(self.trainer.state.global_step / self.trainer.state.max_steps)

    def _by_student(
        self, batch: dict[str, Any], seed: tuple[int, ...], draws: np.random.Generator, *, is_fresh: bool
    ) -> dict[str, Any]:
        if is_fresh:
            rows = self._sampled(batch, self._student(), seed)
            if self.args.sampling == "adaptive":
                known = [row for row in gather_object(rows) if row is not None]
                self.buffer = (self.buffer + known)[-self.args.sampling_buffer_size :]
            return self._collated(batch, rows)
        size, rank = len(batch["labels"]), self.args.process_index
        drawn = draws.choice(len(self.buffer), size * self.args.world_size, replace=False)
        return self._collated(batch, [self.buffer[place] for place in drawn[rank * size :][:size]])

    def _collated(self, batch: dict[str, Any], rows: list[Row | None]) -> dict[str, Any]:
        """A batch of rows in place of another; None is a row of which nothing is trained (``data.tokenized``)."""
        filler = {"input_ids": [self.ends[0]] * 2, "labels": [-100] * 2}
        made = self.trainer.data_collator(
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
        """The rows of a batch, their answers sampled; None where nothing was trained."""
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
        """An answer to each prompt, up to and with its end token, as long as ``max_length`` leaves room for it."""
        lengths = [len(prompt) for prompt in prompts]
        longest, limit, most = max(lengths), self.args.max_length, int(self.args.sampling_max_new_tokens)
        room = [most if limit is None else min(most, max(limit - length, 1)) for length in lengths]
        most = max(room)
        if self.positions is not None:
            most = max(min(most, self.positions - longest), 1)
        own = np.random.default_rng((*seed, 1 + self.args.process_index))  # other tokens in each process
        with writer as model:
            answers = generate(
                model, prompts, self._decoding, max_new_tokens=most, vocabulary=self.trainer.vocabulary,
                seed=int(own.integers(2**63)), device=self.args.device, synced_gpus=self._is_together,
            )  # fmt: skip
        return [answer[:most] for answer, most in zip(answers, room, strict=True)]

    @property
    def _is_together(self) -> bool:
        """Whether each forward pass needs all processes, because they share out weights."""
        trainer = self.trainer
        return bool(self.args.world_size > 1 and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled))

    def _student(self) -> AbstractContextManager[Any]:
        # What TRL's unwrap_model_for_generation gives without gathering ZeRO-3's weights; it also switches activation
        # checkpointing off, by a name that transformers warns about, but in evaluation mode there is none.
        return contextlib.nullcontext(self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped))

    @contextlib.contextmanager
    def _teacher(self) -> Iterator[Any]:
        teacher = self.trainer.teacher
        assert isinstance(teacher, LocalTeacher)
        with teacher.autocast():
            yield teacher.model

    # --- over a run ---------------------------------------------------------------------------------------------------

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Hear of an evaluation, in training."""
        if self.args.sampling == "adaptive":
            self.threshold = self.threshold.after(metrics["eval_loss"], self.trainer.state.global_step)

    def logged(self, counts: dict[str, float]) -> dict[str, float]:
        """What stands in the log: the share of sampled micro-batches since the last, and the threshold."""
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
