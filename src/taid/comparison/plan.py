"""The plan of a comparison: its methods, seeds and learning rates, checked against the recipe."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taid.config.data import DataArguments
from taid.config.parsing import parse
from taid.config.training import TAIDConfig
from taid.config.values import resolved

# Of a recipe, what makes no other comparison of it.
_NOT_COMPARED = "output_dir seed data_seed disable_tqdm overwrite_output_dir resume_from_checkpoint report_to".split()


@dataclass(frozen=True)
class ComparisonPlan:
    """The methods, seeds and learning rates of a comparison, and the recipe that all runs share.

    Attributes:
        folder: the folder of the comparison.
        arguments: the arguments of ``taid train`` that all runs share.
        recipe: the options that these arguments resolve to.
        methods: the options of each method, by its name.
        seeds: the seeds of every method.
        learning_rates: the grid from which each method gets its best; empty for the recipe's learning rate.
        select: the held-out measure by which a learning rate is chosen.
        baseline: the method from which differences are taken.
        test: rows that are evaluated once, at the end; None to report on the validation rows.
        generate: the number of their prompts that are also answered.
        processes: the number of runs at a time.
    """

    folder: Path
    arguments: list[str]
    recipe: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    seeds: list[int]
    learning_rates: list[float]
    select: str
    baseline: str
    test: str | None
    generate: int
    processes: int

    @classmethod
    def from_options(
        cls, options: argparse.Namespace, arguments: list[str], model: Any, data: DataArguments, args: TAIDConfig
    ) -> ComparisonPlan:
        """Check the options and return their plan.

        Args:
            options: the options of ``taid compare`` itself.
            arguments: the arguments of ``taid train`` that all runs share.
            model: the model options of these arguments.
            data: their data options.
            args: their training options.

        Raises:
            ValueError: an invalid value, or a method that does not work with the recipe; names it.
        """
        methods, rates = options.methods, options.learning_rates
        for name, of_method in methods.items():
            try:
                parse([*arguments, *arguments_of(of_method)], "compare")
            except ValueError as error:
                raise ValueError(f"method {name}: {error}") from error
        if data.eval_dataset_name is None and (options.test is None or len(rates) > 1):
            raise ValueError("nothing is held out: set eval_dataset_name in the recipe, or give rows as --test")
        if len(rates) > 1 and options.test is None:
            raise ValueError(
                "--learning_rates are chosen by the validation rows (eval_dataset_name), so the table needs others: "
                "give them as --test"
            )
        for name, rows in (("validation", [data.eval_dataset_name]), ("training", data.names)):
            if options.test is not None and _place(options.test) in [_place(name) for name in rows if name]:
                raise ValueError(f"--test: {options.test} are the {name} rows too: give others")
        if options.select == "kl" and not _has_teacher(args):
            raise ValueError("--select kl needs a teacher: set teacher_model_name_or_path, or --select cross_entropy")
        for name in ("push_to_hub", "trust_remote_code", "model_revision", "teacher_model_revision"):
            if getattr(args, name, getattr(model, name, None)) not in (None, False, "main"):
                raise ValueError(f"{name} is not for a comparison: leave it away, or name a folder")
        baseline = options.baseline or ("forward_kl" if "forward_kl" in methods else next(iter(methods)))
        if baseline not in methods:
            raise ValueError(f"--baseline {baseline} is none of the methods: {', '.join(methods)}")
        return cls(
            folder=Path(str(args.output_dir)), arguments=arguments, methods=methods, learning_rates=rates,
            recipe={k: v for k, v in resolved(model, data, args).items() if k not in _NOT_COMPARED},
            seeds=options.seeds, select=options.select, baseline=baseline, test=options.test,
            generate=options.generate, processes=options.processes,
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run."""

    method: str
    seed: int
    learning_rate: float | None
    options: dict[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """The name of its folder, log and result."""
        rate = self.learning_rate
        short = "" if rate is None else f"-{rate:g}" if float(f"{rate:g}") == rate else f"-{rate!r}"
        return f"{self.method}{short}-seed{self.seed}"


def arguments_of(options: dict[str, Any]) -> list[str]:
    """Return options as arguments of ``taid train``."""
    arguments: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return arguments


def _place(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _has_teacher(args: TAIDConfig) -> bool:
    return any((args.teacher_model_name_or_path, args.teacher_cache, args.teacher_server_url))
