"""One progress bar with the loss and t in it; without a terminal, one short line a logged step."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback


class StepProgress(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar with the last loss and t behind it, and a line for each evaluation."""

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
        """No second bar for evaluations: they are short, and their result gets a line."""

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
