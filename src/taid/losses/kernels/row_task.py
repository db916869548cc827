"""The task of the row stage: the objective with its parameters, how products become logits, and the statistics."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid.losses import objectives
from taid.losses.objective_table import OBJECTIVES

COLUMNS = (
    "objective",
    "kl",
    "cross_entropy",
    "entropy",
    "correct",
    "teacher_cross_entropy",
    "target_cross_entropy",
    "temperature_gradient",
)


@dataclass(frozen=True)
class Finish:
    """The last step to logits: ``cap(scale (product + bias))`` of a product of hidden state and weight.

    ``cap(z) = c tanh(z / c)``, or z itself without a cap.

    Attributes:
        bias: ``[V]`` or None.
        scale: a factor.
        softcap: c, or None for no cap.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def apply(self, z: Tensor) -> Tensor | None:
        """Make logits of products, in place; return ``d logits / d product``, or None where it is 1."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is None:
            return None if self.scale == 1.0 else z.new_tensor(self.scale)
        tanh = z.div_(self.softcap).tanh_()
        slope = (1 - tanh * tanh).mul_(self.scale)
        z.mul_(self.softcap)
        return slope


@dataclass(frozen=True)
class RowTask:
    """The task of the row stage, the same for every row.

    Attributes:
        objective: a name of :mod:`taid.losses.objectives`, or "sft".
        kd_ratio: share of the objective; the rest is cross-entropy to the labels.
        parameters: of the objective, complete. ``t`` and ctkd's ``temperature`` may be 0-dim tensors.
        student: how the student's logits come from the products in its tile.
        teacher: likewise.
    """

    objective: str
    kd_ratio: float
    parameters: dict[str, Any]
    student: Finish
    teacher: Finish

    @classmethod
    def for_objective(
        cls, objective: str, kd_ratio: float, parameters: dict[str, Any], student: Finish, teacher: Finish
    ) -> RowTask:
        """Fill in the defaults of the objective and check what is given.

        Raises:
            ValueError: no such objective, a parameter that it does not have or lacks, or a value out of range.
        """
        if not 0.0 <= kd_ratio <= 1.0:
            raise ValueError(f"kd_ratio must lie in [0, 1], got {kd_ratio}")
        if objective == "sft":
            names: dict[str, Any] = {}
        elif objective in OBJECTIVES:
            signature = inspect.signature(getattr(objectives, objective)).parameters.values()
            names = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
        else:
            choices = ", ".join(["sft", *(name for name in OBJECTIVES if name != "sft")])
            raise ValueError(f"objective {objective!r} does not exist (choices: {choices})")
        if unknown := sorted(parameters.keys() - names.keys()):
            raise ValueError(f"{objective} has no parameter {unknown[0]!r} (it has: {', '.join(names) or 'none'})")
        complete = names | parameters
        if missing := [name for name, value in complete.items() if value is inspect.Parameter.empty]:
            raise ValueError(f"{objective} needs its parameter {missing[0]!r}")
        if names:  # the plain formula checks the ranges
            z = torch.zeros(1, 2)
            labels = {"labels": torch.zeros(1, dtype=torch.long)} if OBJECTIVES[objective].needs_labels else {}
            numbers = {n: 1.0 if isinstance(v, Tensor) else v for n, v in complete.items()}
            getattr(objectives, objective)(z, z, **labels, **numbers)
        return cls(objective, kd_ratio if objective != "sft" else 0.0, complete, student, teacher)

    @property
    def kernel(self) -> str:
        """The name by which the compiled kernels know the objective.

        Where the student has no share in a mixture, it is that of the objective without a mixture; TAID's target of
        another mixture than its own is ``mixture_taid``.
        """
        if self.parameters.get("skew") == 0.0:
            return self.objective.removeprefix("skew_")
        if self.parameters.get("share") == 0.0:
            return "abkd"
        is_mixture = self.objective == "taid" and self.parameters["mixture"] != 1.0
        return "mixture_taid" if is_mixture else self.objective
