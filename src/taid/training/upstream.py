"""Workarounds for TRL and transformers: one method a fault, with its reason and the release that ends it.

The versions are TRL 1.16 and transformers 5.23. The faults stand in ``transformers/trainer.py``
(https://github.com/huggingface/transformers) and ``trl/trainer/sft_trainer.py`` (https://github.com/huggingface/trl).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors import safe_open
from torch import nn
from trl import SFTTrainer

from taid.artifacts import run_folder
from taid.artifacts.model_card import write_card
from taid.artifacts.report import write_report
from taid.config.training import TAIDConfig
from taid.config.values import changed
from taid.data import images, stream, tokenized


class _SeamOnce(logging.Filter):
    """Let one warning of TRL's by that a prompt ends within a token: it has 600 characters for each such end."""

    is_said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether it is another message, or the first of these."""
        if "not a prefix of the tokenized prompt+completion" not in record.getMessage():
            return True
        is_first, self.is_said = not self.is_said, True
        return is_first


_SEAM_ONCE = _SeamOnce()  # of a process: a comparison and an evaluation prepare the same rows again and again


def own_arguments(asked: TAIDConfig, student: Any, *, has_images: bool) -> TAIDConfig:
    """Return a copy of the configuration for the trainer, which TRL and transformers alter as they like."""
    values: dict[str, Any] = {"model_init_kwargs": None}  # used up; TRL would warn that a loaded model ignores them
    if asked.device.type == "cpu":
        values["dataloader_pin_memory"] = False  # nothing to pin for, and torch warns
    is_mixture_of_experts = hasattr(student.config.get_text_config(), "output_router_logits")
    if asked.ddp_find_unused_parameters is None and not is_mixture_of_experts and not has_images:
        # Only experts, and an image encoder without an image, can stay unused.
        values["ddp_find_unused_parameters"] = False
    return changed(asked, **values)


def load_renamed_weights(model: Any, folder: Path) -> bool:
    """Load a checkpoint into a model whose weights have other names, or another form, on disk than in memory.

    Those of vision encoders and of experts do. transformers' Trainer loads what has the names in memory, warns, and
    goes on with what the model had before: a run that is resumed would begin anew.

    Returns:
        Whether the checkpoint is such a one; nothing is loaded otherwise.
    """
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    if names <= model.state_dict().keys():
        return False
    saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())
    return True


class UpstreamTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer without the faults that touch distillation. It knows nothing of teachers or objectives.

    Attributes:
        stream: the training rows as a stream, or None; set before ``super().__init__``.
    """

    stream: Any = None
    _name = "TAID"
    _tag_names = ["trl", "taid"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in "
        "Language Models",
        "id": "2501.16937",
    }
    _checkpoints_in: str | None = None

    # --- resuming: ends when Trainer resumes a finished run as it is, and loads renamed weights itself ---

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args)
        # A stream goes on by itself: transformers would read it again up to there, and skip.
        return epochs, 0 if self.stream else batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers takes one step too many when it resumes a run that is already at its end.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_renamed(self, folder: str) -> bool:
        engine_loads = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_peft_model(self.model)
        return not engine_loads and load_renamed_weights(self.model, Path(folder))

    # --- saving: ends when Trainer writes checkpoints whole or not at all, and pickles nothing ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        is_writer, wait = self.args.should_save, self.accelerator.wait_for_everyone
        best = self.state.best_model_checkpoint
        with run_folder.unfinished(folder, name, is_writer=is_writer, wait=wait) as made:
            self._checkpoints_in = str(made.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoints_in = None
            # transformers looks whether the folder is there, which under FSDP a faster process may have made by then.
            is_best = self.state.best_global_step == self.state.global_step
            self.state.best_model_checkpoint = str(folder / name) if is_best else best
            if is_writer:
                self.state.save_to_json(str(made / "trainer_state.json"))
                self.save_beside(made)
        if is_writer:
            run_folder.thin_out(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_beside(self, checkpoint: Path) -> None:
        """Write a subclass's own files into a checkpoint that is not finished yet; on the main process."""

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoints_in or str(super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student as an ordinary folder, gathered where FSDP has cut it up; checkpoints keep their shards."""
        is_sharded = self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if is_sharded and output_dir in (None, self.args.output_dir):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)  # which writes nothing of a model that is cut up

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if state_dict is None and self.get_tp_size() > 1:
            state_dict = model.state_dict()
        if state_dict is not None:  # gathered from processes, where tied weights no longer share their memory
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            state_dict = {name: w for name, w in state_dict.items() if tied.get(name) not in state_dict}
        with run_folder.written(output_dir or self.args.output_dir):
            super()._save(output_dir, state_dict)
        # transformers pickles its arguments beside the weights; config.yaml holds them, in the open and without tokens.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    # --- cards and the Hub: ends when TRL's card can be replaced by an argument, and nothing is uploaded unasked ---

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write README.md beside the student, from the run's files; before the first logged step there is no card.

        TRL asks for one at each checkpoint. It is made at the last, because it reads all that was logged, which would
        take time and memory that grow with the run.
        """
        if self._checkpoints_in is not None and self.state.global_step < self.state.max_steps:
            return
        folder = Path(self.args.output_dir)
        logged = run_folder.read_metrics(folder) if (folder / run_folder.METRICS).is_file() else []
        if self.is_world_process_zero() and any("loss" in row for row in logged):
            write_card(folder, model_name=model_name, tags=tags, overwrite=True)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the run folder: student, card and report; neither checkpoints nor what the optimizer holds."""
        if self.is_world_process_zero():
            write_report(Path(self.args.output_dir))
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload nothing: transformers would pickle its arguments, hub_token among them, into what it uploads."""

    def _send_telemetry(self) -> None:
        """Report nothing: TRL reports each run to its makers."""

    # --- rows: ends when TRL says how many rows max_length has emptied, and Trainer pads the last batch ---

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._is_vision_dataset and images.PLACE not in self._signature_columns:
            self._signature_columns += [images.PLACE, self.args.dataset_text_field]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        logging.getLogger("trl.trainer.sft_trainer").addFilter(_SEAM_ONCE)
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        if isinstance(dataset, Dataset) and not packing:
            return tokenized.without_untrained(prepared, len(dataset), rest[-1], args)
        return prepared

    def get_train_dataloader(self) -> Any:
        """Return the training batches.

        Those of a stream say where they end, and begin where the checkpoint's do. The last others are filled up with
        an untrained row, where accelerate would repeat the first rows.
        """
        if self.stream is None:
            return self._full_batches()
        shared = self.get_tp_size()  # ranks that split one model see the same rows
        return stream.Batches(
            self.stream, self.train_dataset, self.data_collator, size=self._train_batch_size,
            rank=self.accelerator.process_index // shared, processes=self.accelerator.num_processes // shared,
        )  # fmt: skip

    def _full_batches(self) -> Any:
        dataset, size = self.train_dataset, self._train_batch_size
        processes = self.accelerator.num_processes // self.get_tp_size()
        is_even = isinstance(dataset, Dataset) and len(dataset) % (processes * size) == 0
        if processes == 1 or is_even or not isinstance(dataset, Dataset) or self.args.dataloader_drop_last:
            return super().get_train_dataloader()
        loader = self._get_dataloader(
            dataset=tokenized.filled(dataset, 1), description="Training", batch_size=size, is_training=True,
            sampler_fn=lambda _: self._get_train_sampler(dataset),
        )  # fmt: skip
        dealt = loader.batch_sampler
        if dealt.num_processes > 1:  # or the sampler itself knows of processes
            dealt.batch_sampler = tokenized.FullBatches(dealt.batch_sampler, processes, filler=len(dataset))
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Pad the held-out rows with untrained ones to full batches on every rank, so that no row counts twice."""
        dataset = (
            self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset or self.eval_dataset
        )
        missing = -len(dataset) % (self.accelerator.num_processes * self.args.eval_batch_size)
        if isinstance(dataset, Dataset) and self.accelerator.num_processes > 1 and missing:
            dataset = tokenized.filled(dataset, missing)
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # it is meant for training
        try:
            return super().get_eval_dataloader(dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found: dict[str, float] = super()._evaluate(*args, **kwargs)
        wanted = self.args.metric_for_best_model
        if wanted and f"eval_{wanted.removeprefix('eval_')}" not in found:  # transformers says so in a traceback
            measured = ", ".join(name for name in sorted(found) if name.startswith("eval_"))
            raise ValueError(f"metric_for_best_model: {wanted!r} is not measured; there is {measured}")
        return found
