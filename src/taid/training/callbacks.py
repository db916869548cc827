"""Callbacks beside the steps: a progress bar or a line a logged step, the run's folder, and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from taid.artifacts import run_folder

_NOT_LOGGED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


class StepProgress(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar with the last loss and t behind it, and a line for each evaluation.

    Without a terminal there is no bar, and each logged step gets one short line.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, where bars are wanted."""
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Show no second bar for evaluations: they are short, and their result gets a line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show a logged row."""
        if not state.is_world_process_zero or logs is None:
            return
        if "loss" in logs:
            shown = f"loss {logs['loss']:.4f}" + (f", t {logs['t']:.3f}" if "t" in logs else "")
            if self.training_bar is not None:
                self.training_bar.set_postfix_str(shown)
            else:
                print(f"step {state.global_step}/{state.max_steps}: {shown}, {logs['seconds']:.0f} s", flush=True)
        means = [name for name in logs if name.startswith("eval_") and name.endswith("_cross_entropy")]
        for prefix in [name.removesuffix("cross_entropy") for name in means if "_teacher_cross" not in name]:
            line = f"step {state.global_step}: held-out cross-entropy {logs[prefix + 'cross_entropy']:.4f}"
            if f"{prefix}kl" in logs:
                line += f" (teacher {logs[prefix + 'teacher_cross_entropy']:.4f})"
                line += f", KL to the teacher {logs[prefix + 'kl']:.4f}"
            print(line, flush=True) if self.training_bar is None else self.training_bar.write(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


class RunFolder(TrainerCallback):  # type: ignore[misc]
    """Keep config.yaml, versions.json and metrics.jsonl on the main process; listen for SIGTERM on each.

    Args:
        configuration: returns all options of the run, as config.yaml will have them.
        engine: the name of the engine that the run is split by.
        begin: called before the first step: makes the schedule, or restores it from a checkpoint.
        stop: called on SIGTERM.
        is_stream: whether the rows are a stream, whose epoch transformers miscounts.
    """

    def __init__(
        self, configuration: Callable[[], dict[str, Any]], engine: str, *, begin: Callable[[], None],
        stop: Callable[..., None], is_stream: bool,
    ) -> None:  # fmt: skip
        self._configuration, self._engine, self._begin, self._stop = configuration, engine, begin, stop
        self._is_stream = is_stream
        self._before: Any = None  # the handler of SIGTERM before training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the run, write its configuration, and forget what was logged after the checkpoint."""
        self._begin()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            run_folder.start(
                folder, self._configuration(), total_steps=state.max_steps, processes=args.world_size,
                device=str(args.device), engine=self._engine,
            )  # fmt: skip
            run_folder.truncate_metrics(folder, state.global_step)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._stop)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave SIGTERM to whoever had it before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the last step logged, and count a stream's epochs."""
        if self._is_stream:  # transformers counts from where it resumed
            state.epoch = state.global_step / state.max_steps
        if state.global_step >= state.max_steps:  # or the last steps would be missing from metrics.jsonl
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Append a logged step or evaluation to metrics.jsonl."""
        logs = logs or {}
        is_step = "loss" in logs or any(name.endswith("_cross_entropy") for name in logs)
        if state.is_world_process_zero and is_step:
            row = {k: v for k, v in logs.items() if not (k.startswith("eval_") and k.endswith(_NOT_LOGGED))}
            run_folder.append_metrics(Path(args.output_dir), {"step": state.global_step, **row})
