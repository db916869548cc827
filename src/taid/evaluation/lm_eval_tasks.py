"""Benchmark tasks of lm-eval for a loaded model: found before anything is loaded, run as its own command runs them."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAPER = "taid-paper"
# Six few-shot tasks with the shots of the Open LLM Leaderboard; docs/evaluate.md says why these.
_PAPER_TASKS = {
    "arc_challenge": 25,
    "hellaswag": 10,
    "mmlu": 5,
    "truthfulqa_mc2": 0,
    "winogrande": 5,
    "gsm8k": 5,
}


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows, or for a vision-language model lmms-eval, which has the same interface.

    Attributes:
        names: of tasks, groups and tags, and :data:`PAPER`.
        manager: the package's index of them.
        package: "lm_eval" or "lmms_eval".
    """

    names: list[str]
    manager: Any
    package: str

    @classmethod
    def named(cls, listed: str, include_path: str | None = None, *, model: str) -> Tasks:
        """Find tasks, groups and tags, comma-separated, by name or glob; `taid-paper` is the paper's set.

        Raises:
            ImportError: lm-eval (lmms-eval where `model` sees images) is not installed.
            ValueError: there is no such task; names it, and one that it may be.
            FileNotFoundError: `include_path` is no folder.
        """
        package = "lmms_eval" if _is_vision_language(model) else "lm_eval"
        if importlib.util.find_spec(package) is None:
            remedy = "'taid[evaluation]'" if package == "lm_eval" else "lmms-eval"
            raise ImportError(f"tasks for {model} need {package.replace('_', '-')}: pip install {remedy}")
        if include_path is not None and not Path(include_path).expanduser().is_dir():
            raise FileNotFoundError(f"include_path {include_path}: there is no such folder")
        names = [name.strip() for name in listed.split(",") if name.strip()]
        if not names:
            raise ValueError("tasks is empty: name some, as in --tasks lambada_openai,hellaswag")
        folder = None if include_path is None else str(Path(include_path).expanduser())
        manager = importlib.import_module(f"{package}.tasks").TaskManager(include_path=folder)
        known: list[str] = []
        for name in names:
            found = [PAPER] if (name, package) == (PAPER, "lm_eval") else fnmatch.filter(manager.all_tasks, name)
            if not found:
                near = difflib.get_close_matches(name, [PAPER, *manager.all_tasks], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"task {name!r} does not exist in {package}{hint} (a folder with tasks of your own is include_path)"
                )
            known += found
        return cls(known, manager, package)

    def run(
        self, model: Any, tokenizer: Any, *, num_fewshot: int | None = None, limit: float | None = None,
        batch_size: int = 1,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Run the tasks as ``lm_eval --model hf --model_args pretrained=FOLDER`` does on the folder of `model`.

        Returns:
            A row for each metric of each task: `task`, `metric`, `filter`, `value`, `stderr` (None where lm-eval gives
            none), `n_shot` and `higher_is_better`.
        """
        if self.package == "lmms_eval":  # takes no loaded model
            evaluated = {"model": "huggingface", "model_args": f"pretrained={model.name_or_path},device={model.device}"}
        else:
            from lm_eval.models.huggingface import HFLM

            logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of being given a loaded model
            evaluated = {"model": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)}
        found = importlib.import_module(f"{self.package}.evaluator").simple_evaluate(
            **evaluated, tasks=self._loaded(), num_fewshot=num_fewshot, limit=limit, batch_size=batch_size,
            log_samples=False, task_manager=self.manager,
        )  # fmt: skip
        return rows_of(found)

    def _loaded(self) -> list[Any]:
        """Return the names, with the paper's set as its tasks, which have shots of their own.

        (Given as ``{"task": name, "num_fewshot": n}``, lm-eval 0.4.13 names all tasks of a group after the group.)
        """
        loaded: list[Any] = [name for name in self.names if name != PAPER]
        for name, shots in _PAPER_TASKS.items() if PAPER in self.names else ():
            found = self.manager.load([name])
            for task in found["tasks"].values():
                task.set_config(key="num_fewshot", value=shots)
            loaded.append(found["groups"].get(name) or found["tasks"][name])
        return loaded


def _is_vision_language(name_or_path: str) -> bool:
    """Return whether it is a vision-language model; one without a readable configuration is named when it is loaded."""
    from taid.models.loading import is_vision_language, load_config

    with contextlib.suppress(OSError, ValueError):
        return is_vision_language(load_config(name_or_path))
    return False


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics in lm-eval's results, one a row."""
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "metric": name,
                    "filter": kind,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "n_shot": found["n-shot"].get(task),
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(name),
                }
            )
    return rows
