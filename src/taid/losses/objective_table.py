"""The table of objectives: one entry each, from which every other list of them follows. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ObjectiveName = Literal[
    "taid",
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "dkd",
    "ctkd",
    "abkd",
    "amid",
    "sft",
]


@dataclass(frozen=True)
class Objective:
    """The facts about an objective that others need beside its formula in :mod:`taid.losses.objectives`.

    Attributes:
        title: how reports call it.
        parameters: the parameters of its function, each with the option of :class:`taid.TAIDConfig` that sets it.
        moves: the one parameter that no option sets, because it moves once an optimizer step.
        schedule_options: the options that say how it moves.
        needs_labels: whether its function takes the labels as well.
        exact_from_top_k: whether :class:`taid.losses.sparse_logits.TopK` determines it.
        unbiased_from_samples: whether :class:`taid.losses.sparse_logits.Sampled` estimates it without bias.
    """

    title: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    moves: Literal["t", "temperature"] | None = None
    schedule_options: tuple[str, ...] = ()
    needs_labels: bool = False
    exact_from_top_k: bool = False
    unbiased_from_samples: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Return all options that belong to the objective."""
        return (*self.schedule_options, *self.parameters.values())


_POWERS = {"alpha": "abkd_alpha", "beta": "abkd_beta"}

# The enum of rows.c has the same order.
OBJECTIVES: Mapping[str, Objective] = {
    "taid": Objective(
        "TAID",
        {"mixture": "taid_mixture"},
        moves="t",
        schedule_options=(
            "taid_schedule",
            "taid_t_start",
            "taid_t_end",
            "taid_alpha",
            "taid_beta",
            "taid_adaptive",
            "taid_signal",
        ),
        exact_from_top_k=True,
    ),
    "forward_kl": Objective("Forward KL", exact_from_top_k=True, unbiased_from_samples=True),
    "reverse_kl": Objective("Reverse KL", exact_from_top_k=True),
    "jsd": Objective("Jensen-Shannon divergence", {"beta": "jsd_beta"}, exact_from_top_k=True),
    "tvd": Objective("Total variation distance", exact_from_top_k=True),
    "skew_forward_kl": Objective("Skew forward KL", {"skew": "skew"}, exact_from_top_k=True),
    "skew_reverse_kl": Objective("Skew reverse KL", {"skew": "skew"}, exact_from_top_k=True),
    "adaptive_kl": Objective("Adaptive KL", {"head_mass": "head_mass"}),
    "dkd": Objective(
        "Decoupled knowledge distillation",
        {"alpha": "dkd_alpha", "beta": "dkd_beta", "temperature": "dkd_temperature"},
        needs_labels=True,
    ),
    "ctkd": Objective("Curriculum temperature distillation", moves="temperature"),
    "abkd": Objective("Alpha-beta divergence", _POWERS),
    "amid": Objective("Alpha-mixture distillation", {"mixture": "amid_mixture", "share": "amid_share"} | _POWERS),
    "sft": Objective("Supervised fine-tuning", exact_from_top_k=True, unbiased_from_samples=True),
}
