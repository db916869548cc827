"""The loss of a micro-batch, fused with both output heads or by the plain formula; and the totals of a step."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taid.artifacts import run_folder
from taid.config.training import TAIDConfig
from taid.data import vision_collator
from taid.losses.distillation import DistillationLoss, distillation_loss
from taid.losses.fused import fused_distillation_loss
from taid.models.output_head import OutputHead
from taid.models.vocabulary import Vocabulary
from taid.teachers.teacher import Hidden, Teacher


class MicroBatchLoss:
    """The loss of a student against its teacher on a micro-batch, summed over trained tokens.

    Args:
        student: before any engine wraps it; its output head is watched from here on.
        teacher: None where nothing is distilled.
        vocabulary: the ids that both predict.
        args: objective, kd_ratio and whether it is fused.
        objective: a function of both logits instead of the one that is named; never fused.

    Attributes:
        watch: where the loss is fused, called with what it is computed of: both hidden states and heads, the places of
            the labels among the shared ids, and the number of these.

    Raises:
        ValueError: the student's output head cannot be fused; says why and the remedy.
    """

    def __init__(
        self, student: Any, teacher: Teacher | None, vocabulary: Vocabulary, args: TAIDConfig,
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.teacher, self.vocabulary, self.args, self.objective = teacher, vocabulary, args, objective
        self.watch: Callable[..., None] | None = None
        if args.fused:
            self.student_head = OutputHead(student, "student")

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, *,
        parameters: dict[str, float], with_teacher: bool, num_trained: int | None = None, **of_student: Any,
    ) -> tuple[Any, DistillationLoss]:  # fmt: skip
        """Return the student's outputs, and the loss summed over trained tokens.

        Args:
            model: the student as its engine has wrapped it.
            inputs: what both models are given (:mod:`taid.data.vision_collator` says what each takes of it).
            labels: ``[B, T]``: the token that each position has to predict, -100 where it is not trained.
            parameters: of the objective.
            with_teacher: whether the teacher is asked.
            num_trained: the number of trained tokens, if it is known.
            **of_student: what the student alone is given.
        """
        loss = self._fused if self.args.fused else self._plain
        return loss(model, inputs, labels, parameters, with_teacher, num_trained, of_student)

    def _fused(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, parameters: dict[str, float],
        with_teacher: bool, num_trained: int | None, of_student: dict[str, Any],
    ) -> tuple[Any, DistillationLoss]:  # fmt: skip
        ids = None if self.vocabulary.kept_ids is None else self.vocabulary.kept_ids.to(labels.device)
        asked = self.teacher is not None and with_teacher
        signal = self.teacher(vision_collator.for_teacher(inputs), labels) if asked else None  # type: ignore[misc]
        of_teacher = signal if isinstance(signal, Hidden) else (signal, None)
        labels = torch.where(labels == -100, labels, self.vocabulary.position(labels))
        results: list[DistillationLoss] = []

        def loss_of(student_hidden: Tensor) -> DistillationLoss:
            student, size = (student_hidden, self.student_head.head(ids)), len(self.vocabulary.ids)
            result: DistillationLoss = fused_distillation_loss(
                *student, *of_teacher, labels, self.args.objective,
                kd_ratio=self.args.distillation_share, vocabulary_size=size, num_trained=num_trained, **parameters,
            )  # fmt: skip
            if self.watch is not None:
                self.watch(*student, *of_teacher, labels, size)
            results.append(result)
            return result

        with self.student_head.replaced_by(loss_of):
            outputs = model(**vision_collator.for_student(inputs), **of_student)
        return outputs, DistillationLoss(outputs.loss, results[0].sums)

    def _plain(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, parameters: dict[str, float],
        with_teacher: bool, _: int | None, of_student: dict[str, Any],
    ) -> tuple[Any, DistillationLoss]:  # fmt: skip
        trained = labels != -100
        outputs = model(**vision_collator.for_student(inputs), **of_student)
        assert outputs.logits.shape[:2] == labels.shape
        asked = self.teacher is not None and with_teacher
        teacher_NV = self.teacher.logits(vision_collator.for_teacher(inputs), labels) if asked else None  # type: ignore[union-attr]
        return outputs, distillation_loss(
            self.vocabulary.select(outputs.logits[trained]), teacher_NV, self.vocabulary.position(labels[trained]),
            self.objective or self.args.objective, kd_ratio=self.args.distillation_share, **parameters,
        )  # fmt: skip


class TokenTotals:
    """The sums over trained tokens of the micro-batches since it was last asked, on this process.

    Args:
        accelerator: reduces over processes.
        sharing: how many processes split one model and so see the same rows.
    """

    def __init__(self, accelerator: Any, sharing: int) -> None:
        self.accelerator, self.sharing = accelerator, sharing
        self._sums: list[dict[str, Tensor]] = []

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of one more micro-batch."""
        self._sums.append(sums)

    def clear(self) -> None:
        """Forget all micro-batches."""
        self._sums = []

    def total(self) -> dict[str, float]:
        """Return the totals over all processes, and begin anew: one small all-reduce, one transfer."""
        names = sorted(self._sums[0])
        # float64 keeps long evaluations exact; Apple's GPUs have none.
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        rows = torch.stack([torch.stack([sums[name].to(dtype) for name in names]) for sums in self._sums])
        self._sums = []
        total = self.accelerator.reduce(rows.sum(0), "sum") / self.sharing
        return dict(zip(names, total.tolist(), strict=True))

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within this context other micro-batches are summed; afterwards those from before go on."""
        before, self._sums = self._sums, []
        try:
            yield
        finally:
            self._sums = before


def means(sums: dict[str, float]) -> dict[str, float]:
    """Return means a trained token, under the names that SFTTrainer logs."""
    trained = max(sums["trained"], 1.0)
    found: dict[str, float] = {
        name: sums[name] / trained
        for name in ("cross_entropy", "kl", "teacher_cross_entropy", "entropy")
        if name in sums
    }
    found["mean_token_accuracy"] = sums["correct"] / trained
    if "aux_loss" in sums:
        found["aux_loss"] = sums["aux_loss"] / sums["aux_batches"]
    return found


class StepLog:
    """Means over the optimizer steps since the last log, over all ranks, and the tokens and seconds of the whole run.

    Attributes:
        sums: by name, since the last log.
        num_tokens: read in the whole run.
    """

    def __init__(self) -> None:
        self.sums, self.num_tokens = defaultdict[str, float](float), 0
        self._begun = self._window_begun = self._seconds_before = 0.0

    def begin(self) -> None:
        """Start the clock of the run."""
        self._begun = self._window_begun = time.perf_counter()

    def add(self, sums: dict[str, float], moved: dict[str, float]) -> None:
        """Add the totals of an optimizer step, and where t or the temperature stood in it."""
        trained = max(sums["trained"], 1.0)
        self.sums["steps"] += 1
        self.sums["trained_steps"] += bool(sums["trained"])
        self.sums["mean_loss"] += sums["loss"] / trained
        for name, value in sums.items():
            self.sums[name] += value
        self.num_tokens += int(sums["num_tokens"])
        self.sums |= moved  # of the last step, not a sum

    def row(self, moved: dict[str, float]) -> dict[str, float]:
        """Return the means a token, the mean loss a step and the speed since the last row; begin the next one."""
        now, sums = time.perf_counter(), self.sums
        found = means(sums) | {
            "loss": sums["mean_loss"] / max(sums["trained_steps"], 1),
            "num_tokens": self.num_tokens,
            **{name: sums[name] for name in moved},
            "tokens_per_second": sums["num_tokens"] / max(now - self._window_begun, 1e-9),
            "seconds": self._seconds_before + now - self._begun,
        }
        self.sums, self._window_begun = defaultdict(float), now
        return found

    def saved(self) -> dict[str, Any]:
        """Return the state as a checkpoint keeps it."""
        seconds = self._seconds_before + time.perf_counter() - self._begun
        return {"window": dict(self.sums), "num_tokens": self.num_tokens, "seconds": seconds}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.sums = defaultdict(float, saved["window"])
        self.num_tokens, self._seconds_before = saved["num_tokens"], saved["seconds"]


def logged_sums(
    sums: dict[str, Tensor], share: float, signal: str, *, with_teacher: bool, training: bool
) -> dict[str, Tensor]:
    """Return the sums that are logged: the ``loss``, and ``signal``, by which t or the temperature moves.

    Args:
        sums: of the loss of a micro-batch.
        share: the weight of the objective; the rest is that of the cross-entropy.
        signal: the name of the sum that moves t or the temperature.
        with_teacher: whether the teacher was asked.
        training: whether this is training, where the teacher's cross-entropy is not logged.
    """
    names = ["trained", "cross_entropy", "entropy", "correct"]
    names += ["kl"] if with_teacher else []
    names += ["teacher_cross_entropy"] if with_teacher and not training else []
    loss = share * sums["objective"] + (1 - share) * sums["cross_entropy"]
    return {name: sums[name] for name in names} | {"loss": loss, "signal": sums[signal]}


def not_finite(
    step: int, sums: dict[str, float], grad_norm: float, output_dir: str, *, has_moved: bool
) -> FloatingPointError:
    """Return the error that ends a run whose loss or gradient is not finite: the step, both, and what to try."""
    last = run_folder.last_checkpoint(Path(output_dir))
    return FloatingPointError(
        f"step {step}: the loss is {sums['loss'] / max(sums['trained'], 1.0)} and the gradient's norm {grad_norm}. "
        f"Training stopped {'after' if has_moved else 'before'} the optimizer moved; the last good checkpoint is "
        f"{last or 'none'}. Usual remedies: a lower learning_rate, a smaller max_grad_norm, bf16 instead of fp16, "
        "a look at the rows of this step."
    )


def cross_entropies(
    loss: MicroBatchLoss, model: nn.Module, inputs: dict[str, Any], labels: Tensor, parameters: dict[str, float]
) -> dict[str, float]:
    """Return the cross-entropy of student and teacher on a batch, in nats a token, in evaluation mode.

    Args:
        loss: of the pair.
        model: the student as its engine has wrapped it.
        inputs: what both models are given, on their device.
        labels: ``[B, T]``: the token that each position has to predict, -100 where it is not trained.
        parameters: of the objective.

    Raises:
        ValueError: a model cannot take the batch; says which.
    """
    training, role = model.training, "teacher"
    model.eval()
    try:
        with torch.no_grad():
            if loss.teacher is not None and loss.args.fused:
                loss.teacher(vision_collator.for_teacher(inputs), labels)
            role = "student"
            _, (_, sums) = loss(model, inputs, labels, parameters=parameters, with_teacher=loss.teacher is not None)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise ValueError(f"the {role} cannot take what the student's processor makes of a row: {error}") from error
    finally:
        model.train(training)
    trained = max(float(sums["trained"]), 1.0)
    names = {"student": "cross_entropy"}
    names |= {"teacher": "teacher_cross_entropy"} if loss.teacher is not None else {}
    return {role: float(sums[name]) / trained for role, name in names.items()}
