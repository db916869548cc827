"""The loss of one micro-batch of a student and its teacher: fused with their output heads, or by the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taid.config.training import TAIDConfig
from taid.data import vision_collator
from taid.losses.distillation import DistillationLoss, distillation_loss
from taid.losses.fused import fused_distillation_loss
from taid.models.output_head import OutputHead
from taid.models.vocabulary import Vocabulary
from taid.teachers.teacher import Hidden, Teacher


class PairLoss:
    """What a student loses against a teacher.

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
        """The student's outputs, and the loss summed over trained tokens.

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
        ids = None if self.vocabulary.holes is None else self.vocabulary.holes.to(labels.device)
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
