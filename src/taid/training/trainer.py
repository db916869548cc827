"""TAIDTrainer: TRL's SFTTrainer with a teacher, an objective and a moving t.

One optimizer step, from the batch to t:

    get_batch_samples   gives micro-batches sampled answers; counts the trained tokens of the step: every micro-batch,
                        every rank
    compute_loss        hidden states of teacher and student -> heads and objective in one, summed over trained tokens,
                        divided by that count
    _get_grad_norm      the last place before the optimizer: sums the step over ranks, stops if it is not finite,
                        and moves t (or ctkd's temperature) by the global loss
    log                 means over the steps since the last log

What TRL and transformers make necessary beside these stands in :mod:`taid.training.upstream`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed

from taid.config.training import TAIDConfig
from taid.config.values import changed, resolved
from taid.data import images, stream, tokenized, vision_collator
from taid.losses.fused import shifted
from taid.models.loading import keep_embeddings, learned_positions
from taid.training import capture, engines, on_policy, resume
from taid.training.cache_check import AskedTeacher, RunRows
from taid.training.callbacks import RunFolder
from taid.training.objective_state import ObjectiveState
from taid.training.on_policy import AnswerSampler
from taid.training.pair import Pair, check_teacher, load_pair, make_teacher, require_trainable
from taid.training.step import MicroBatchLoss, StepLog, TokenTotals, cross_entropies, logged_sums, means, not_finite
from taid.training.upstream import UpstreamTrainer, own_arguments

logger = logging.getLogger(__name__)


class TAIDTrainer(UpstreamTrainer):
    """Distil a teacher into a student.

    The loss of an optimizer step is ``sum over trained tokens / their number``, over all micro-batches and ranks, of
    ``kd_ratio * objective + (1 - kd_ratio) * cross-entropy``; so it does not depend on how the rows are split. t moves
    once an optimizer step, in training only, by the objective's part of that loss (arXiv 2501.16937).

    Held-out evaluation gives, in nats a token over all held-out tokens: ``eval_cross_entropy``, ``eval_kl`` (forward KL
    to the teacher), ``eval_teacher_cross_entropy`` and ``eval_loss``, the training loss with TAID's target at
    ``taid_t_end``, under ``taid_schedule: auto`` at 1: a loss at a moving t could not be compared from one evaluation
    to the next.

    Args:
        model: the student, loaded or by name.
        teacher_model: the teacher, loaded, by name or as a :class:`taid.Teacher`; if None,
            ``args.teacher_model_name_or_path``. ``objective: sft`` needs none, and with one it still reports the KL to
            it when evaluating.
        args: a :class:`TAIDConfig`.
        train_dataset: rows with ``messages``, ``prompt``/``completion``, ``text`` or ``input_ids``, and with ``images``
            for vision-language models.
        eval_dataset: held-out rows, or a dict of them.
        processing_class: the student's tokenizer or processor; loaded with the student if None.
        teacher_processing_class: the teacher's; loaded with the teacher if None.
        peft_config: trains an adapter (LoRA, DoRA) instead of the student's own weights.
        callbacks, optimizers: as in transformers.
        objective: your own function instead of ``args.objective``, of the student's and the teacher's logits
            ``[N, V]`` in float32, that gives the loss of N tokens ``[N]`` in nats; differentiated by autograd.

    Raises:
        ValueError: student and teacher do not fit, no trained token is left, or an option does not go together with
            distillation; names the value and the remedy.
        FloatingPointError: loss or gradient of a step is not finite; raised before the optimizer moves.
    """

    data_collator: Any
    # compute_loss divides by the tokens of the whole step, so Trainer must not divide by the micro-batches again.
    loss_is_scaled_for_ga = True

    def __init__(
        self, model: Any, teacher_model: Any = None, args: TAIDConfig | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None, peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None, optimizers: tuple[Any, Any] = (None, None),
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        asked = _with_objective(args or TAIDConfig(), objective)
        engines.prepare(asked)
        set_seed(asked.seed)  # transformers does so too, but after an adapter is drawn
        self.stream = stream.as_stream(train_dataset, eval_dataset, asked)
        train_dataset = self.stream.dataset if self.stream else train_dataset
        has_images = images.has_images(train_dataset)
        _require_possible(asked, has_images=has_images)
        teacher_model = teacher_model or asked.teacher_model_name_or_path
        pair = load_pair(model, teacher_model, asked, processing_class, teacher_processing_class, has_images=has_images)
        require_trainable(pair, peft_config)
        own = own_arguments(asked, pair.student, has_images=has_images)
        if has_images:
            train_dataset, eval_dataset = images.prepared_sets(train_dataset, eval_dataset, skip=asked.skip_bad_images)
        tokenized.require_chat_template(pair.processing_class, own, train_dataset)
        super().__init__(
            model=pair.student, args=own, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=pair.processing_class, peft_config=peft_config, callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        engines.check(self.accelerator)
        self._connect(pair, asked, objective, has_images=has_images)

    def _connect(self, pair: Pair, asked: TAIDConfig, objective: Any, *, has_images: bool) -> None:
        """Connect the prepared rows, the pair and the loss; check that they fit."""
        args, self.vocabulary, self.teacher_tokenizer = self.args, pair.vocabulary, pair.teacher_tokenizer
        if args.tokenizer_from == "teacher" and is_peft_model(self.model):
            keep_embeddings(self.model)
        if has_images:
            self.data_collator = vision_collator.Collator(
                self.data_collator, pair.teacher_processing_class, self.vocabulary, skip=args.skip_bad_images
            )
        positions = {"student": learned_positions(pair.student), "teacher": learned_positions(pair.teacher)}
        if not self._skip_prepare_dataset:
            self.train_dataset: Any = tokenized.checked(
                self.train_dataset, self.eval_dataset, self.vocabulary, pair.tokenizer, positions,
                is_stream=self.stream is not None,
            )  # fmt: skip
        self.configuration = resolved(asked) | pair.names
        self.teacher = make_teacher(pair, args, self.accelerator.autocast)
        self.configuration |= check_teacher(pair, self.teacher, self.asked_teacher, self.rows)
        self.sampler = self._make_sampler(positions) if args.samples_answers else None
        self.micro_batch_loss = MicroBatchLoss(self.model, self.teacher, self.vocabulary, args, objective)
        self.objective_state = ObjectiveState(args)
        self.was_stopped = self._is_asked_to_stop = False
        self._epoch, self._ahead = None, list[dict[str, Any]]()  # micro-batches that were taken from it early
        self._place: dict[str, Any] | None = None  # in the stream, behind the rows of this step
        self._totals = TokenTotals(self.accelerator, self.get_tp_size())  # since the last optimizer step
        self._step_log = StepLog()  # since the last log, over all ranks
        self.add_callback(RunFolder(
            lambda: self.configuration, engines.engine_of(self.accelerator), begin=self._begin, stop=self._stop,
            is_stream=self.stream is not None,
        ))  # fmt: skip

    @property
    def rows(self) -> RunRows:
        """The prepared rows of the run, and how they become batches."""
        return RunRows(self.train_dataset, self.eval_dataset, self.data_collator, self.accelerator)

    @property
    def asked_teacher(self) -> AskedTeacher:
        """The teacher of the run, as far as a cache of it depends on it."""
        name = self.configuration.get("teacher_model_name_or_path")
        return AskedTeacher(name, self.processing_class, self.teacher_tokenizer, self.vocabulary, self.args)

    def capture(self, folder: Path, *, repair: bool = False) -> None:
        """Write what the teacher says of every row into a cache; see :func:`taid.training.capture.capture`."""
        capture.capture(
            self.teacher, self.asked_teacher, self.rows, folder, first_epoch=self._first_epoch,
            prepare=self._prepare_inputs, repair=repair,
        )  # fmt: skip

    def _first_epoch(self) -> Iterable[dict[str, Any]]:
        yield from self.get_train_dataloader()
        for dataset in self.rows.named_held_out.values():
            yield from self.get_eval_dataloader(dataset)

    def _make_sampler(self, positions: dict[str, int | None]) -> AnswerSampler:
        on_policy.check_run(
            self.args, self.teacher, self.train_dataset, self.eval_dataset, tensor_parallel=self.get_tp_size()
        )
        return AnswerSampler(
            self.args, student=lambda: self.accelerator.unwrap_model(self.model_wrapped), teacher=self.teacher,
            vocabulary=self.vocabulary, tokenizer=self.processing_class, train_rows=self.train_dataset,
            collator=lambda rows: self.data_collator(rows),
            progress=lambda: (self.state.global_step, self.state.max_steps),
            positions=min((most for most in positions.values() if most is not None), default=None),
            together=bool(self.args.world_size > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled)),
        )  # fmt: skip

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the loss of one micro-batch: its sum over trained tokens, divided by those of the whole step."""
        assert not return_outputs, "TAIDTrainer evaluates without compute_metrics"
        labels = shifted(inputs.pop("labels"))
        num_trained = inputs.pop("num_trained", None)
        inputs["use_cache"] = False
        with_teacher = self.teacher is not None and (self.args.distillation_share > 0 or not model.training)
        outputs, (loss, sums) = self.micro_batch_loss(
            model, inputs, labels, parameters=self.objective_state.parameters(training=model.training),
            with_teacher=with_teacher, num_trained=num_trained,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )  # fmt: skip
        share, signal = self.args.distillation_share, self.objective_state.signal
        sums = logged_sums(sums, share, signal, with_teacher=with_teacher, training=model.training)
        is_read = (labels != -100).any(-1, keepdim=True)  # FullBatches fills up with others
        sums["num_tokens"] = (inputs.get("attention_mask", torch.ones_like(labels)) * is_read).sum()
        if num_items_in_batch is not None:
            # DDP and FSDP average gradients over ranks; the count is that of all ranks.
            loss = loss / num_items_in_batch * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            # Unlike the rest, the router's loss is by its definition a mean over the micro-batch.
            steps = self.current_gradient_accumulation_steps if model.training else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            sums |= {"aux_loss": outputs.aux_loss.detach(), "aux_batches": torch.ones_like(outputs.aux_loss)}
        if model.training:
            sums["stops"] = torch.full_like(sums["trained"], self._is_asked_to_stop)
        self._totals.add(sums)
        return loss

    @property
    def t(self) -> float:
        """The t of TAID's target in this optimizer step."""
        return self.objective_state.t

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._run_epoch(*args, **kwargs)
        finally:
            self._epoch, self._ahead = None, []  # or a stream would prepare rows that nobody waits for

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step, and the number of trained tokens in them on all ranks."""
        if epoch_iterator is not self._epoch:
            self._epoch, self._ahead = epoch_iterator, []
        # One step more than is needed now, if what the teacher says of it is fetched while this one is computed.
        ahead = self.teacher is not None and self.teacher.prefetches and self.args.distillation_share > 0
        wanted = (2 if ahead and self.sampler is None else 1) * num_batches
        coming, _ = super().get_batch_samples(epoch_iterator, wanted - len(self._ahead), device)
        self._ahead += coming
        if self.sampler is not None:
            self._ahead = self.sampler.replaced(self._ahead, self._step_log.sums)
        if ahead and self.teacher is not None:
            self.teacher.prefetch(self._ahead)
        batches, self._ahead = self._ahead[:num_batches], self._ahead[num_batches:]
        for batch in batches:
            self._place = batch.pop("place", None)
            batch["num_trained"] = int((batch["labels"][:, 1:] != -100).sum())
        count = self.accelerator.reduce(torch.tensor(sum(b["num_trained"] for b in batches), device=device), "sum")
        return batches, (count // self.get_tp_size()).clamp(min=1)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._end_step(float(grad_norm))
        return grad_norm

    def _end_step(self, grad_norm: float) -> None:
        """Reduce the step over ranks; stop if it is not finite; move t. Runs before the optimizer does."""
        sums = self._totals.total()
        is_finite = math.isfinite(grad_norm) or self.accelerator.scaler  # which skips overflowing steps by design
        if not math.isfinite(sums["loss"]) or not is_finite:
            has_moved = self.is_deepspeed_enabled  # DeepSpeed moves the optimizer at the end of backward
            raise not_finite(self.state.global_step + 1, sums, grad_norm, self.args.output_dir, has_moved=has_moved)
        if sums.pop("stops"):  # of one rank or all: with the sums of the step, every rank hears of it in the same step
            self.control.should_save = self.control.should_training_stop = self.was_stopped = True
        self._step_log.add(sums, self.objective_state.logged())
        if sums["trained"]:  # a step without trained tokens says nothing about the student
            self.objective_state.advance(sums["signal"] / sums["trained"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over the steps since the last log; loss and KL in nats a token."""
        sums = self._step_log.sums
        if "loss" in logs and sums["steps"]:
            sampled = self.sampler.logged(sums) if self.sampler is not None else {}
            logs |= sampled | self._step_log.row(self.objective_state.logged())
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> Any:  # fmt: skip
        """Evaluate, with means over all held-out tokens instead of means of batch means."""
        with self._totals.apart():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            sums = self._totals.total()
        found = means(sums) | {"loss": sums["loss"] / max(sums["trained"], 1.0), "tokens": int(sums["trained"])}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = super()._evaluate(*args, **kwargs)
        if self.sampler is not None:
            self.sampler.evaluated(found)
        return found

    def _cross_entropies(self, batch: dict[str, Tensor]) -> dict[str, float]:
        inputs = self._prepare_inputs(batch)
        labels, parameters = shifted(inputs.pop("labels")), self.objective_state.parameters(training=False)
        with self.compute_loss_context_manager():
            return cross_entropies(self.micro_batch_loss, self.model_wrapped, inputs, labels, parameters)

    def _stop(self, *_: Any) -> None:
        self._is_asked_to_stop = True  # by SIGTERM: save after this step, and end

    def _begin(self) -> None:
        """Make the schedule, or take it up where the checkpoint left it."""
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError("no weight of the student can be trained: all have requires_grad = False")
        if isinstance(self.data_collator, vision_collator.Collator):
            vision_collator.check_images_matter(iter(self.train_dataset), self.data_collator, self._cross_entropies)
        self._step_log.begin()
        self.objective_state.start(self.state.max_steps, say=self.is_world_process_zero())
        if self.stream:
            self.stream.start = None
        if self.state.global_step == 0:
            return
        saved = self.state.stateful_callbacks.get(type(self).__name__)
        if saved is None:
            raise ValueError("the checkpoint was not written by TAIDTrainer: its schedule is unknown")
        resume.require_same(saved["identity"], self._identity())
        self.objective_state.restore(saved["schedule"])
        if self.stream:
            self.stream.start = saved["places"][self.accelerator.process_index]
        self._step_log.restore(saved)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        is_converted = False
        if resume_from_checkpoint is not None:
            resume.check_checkpoint(Path(resume_from_checkpoint), self.accelerator)
            is_converted = resume.fit_checkpoint(Path(resume_from_checkpoint), self.accelerator)
        if self.sampler is not None:
            self.sampler.start(None if resume_from_checkpoint is None else Path(resume_from_checkpoint))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if is_converted:
            resume.part_steps(self.model_wrapped.optimizer.optimizer)
        return prepared

    def _identity(self) -> dict[str, Any]:
        return resume.run_identity(
            self.args, self.configuration, options=self.objective_state.options, stream=self.stream,
            teacher_kind=None if self.teacher is None else self.teacher.kind, total_steps=self.state.max_steps,
        )  # fmt: skip

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.state.stateful_callbacks[type(self).__name__] = {
            "identity": self._identity(),
            "schedule": self.objective_state.saved(),
            "places": gather_object([self._place]) if self.stream else None,
        } | self._step_log.saved()
        super()._save_checkpoint(model, trial)

    def save_beside(self, checkpoint: Path) -> None:
        """Keep what the sampler's next steps depend on."""
        if self.sampler is not None:
            self.sampler.save(checkpoint)


def _with_objective(args: TAIDConfig, objective: Any) -> TAIDConfig:
    """Return the configuration of a run with an objective of the user's, which goes by its name and is not fused."""
    if objective is None:
        return args
    if not callable(objective):
        raise TypeError(f"objective is a function of both logits, not {objective!r}: named ones go into args")
    name = getattr(objective, "__name__", type(objective).__name__)
    return changed(args, fused=False, objective=name)


def _require_possible(args: TAIDConfig, *, has_images: bool) -> None:
    """Raise a ValueError where options do not go together with this machine or with rows with images."""
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError("activation_offloading moves activations from a GPU to the CPU, and there is no GPU here")
    if has_images and (args.teacher_cache or args.teacher_server_url or args.tokenizer_from == "teacher"):
        raise ValueError(
            "rows with images need a teacher that is loaded here and has the student's tokens: teacher_cache, "
            "teacher_server_url and tokenizer_from: teacher are for text"
        )
    if has_images and args.samples_answers:
        raise ValueError("answers are not sampled for rows with images: set sampling: none and seq_kd: false")
