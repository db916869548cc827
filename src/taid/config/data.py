"""The options that say where the rows come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class DataArguments:
    """The rows of a run: names of data sets or files, and how they are read."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training rows: a .jsonl, .json, .parquet or .txt file (text also as .gz or .zst), a glob of them, "
            "a folder, or a Hub name; several with streaming. Rows have `messages`, `prompt` and `completion`, or "
            "`text`; .txt files are split at blank lines."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training rows as they are needed, from files larger than memory or disk; needs max_steps "
            "or train_tokens."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "With streaming: how often a row is drawn from each dataset_name, relative to the others; equally "
            "by default."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub data set."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split of a Hub data set or folder to train on."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Held-out rows, like dataset_name; evaluated at the start, at the end and as eval_strategy says."
        },
    )
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split of a Hub data set or folder to evaluate on."}
    )

    def __post_init__(self) -> None:
        """Check what the rows' options say of each other.

        Raises:
            ValueError: several names or weights without `streaming`, or weights that do not fit the names.
        """
        names = self.names
        if len(names) == 1:
            self.dataset_name = names[0]  # type: ignore[assignment]  # one is a text, as in TRL's lora_target_modules
        if not self.streaming and len(names) > 1:
            raise ValueError(f"dataset_name has {len(names)} names: several need streaming: true")
        weights = self.dataset_weights
        if weights is None:
            return
        if not self.streaming:
            raise ValueError("dataset_weights are the shares of a stream: set streaming: true, or leave them away")
        if len(weights) != len(names):
            raise ValueError(
                f"dataset_weights {weights} are {len(weights)}, but dataset_name has {len(names)} "
                f"name{'s' * (len(names) != 1)}: give one weight a name"
            )
        if not all(0.0 < weight < math.inf for weight in weights):
            raise ValueError(f"dataset_weights must be positive numbers, got {weights}: leave a name out to draw none")

    @property
    def names(self) -> list[str]:
        """The names of the training rows, one or several."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name or []
