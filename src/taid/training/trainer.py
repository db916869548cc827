"""TAIDTrainer: TRL's SFTTrainer with a teacher, an objective and a moving t. The only file that knows TRL's inside.

One optimizer step, from the batch to t:

    get_batch_samples   gives micro-batches sampled answers; counts the trained tokens of the step: every micro-batch,
                        every rank
    compute_loss        hidden states of teacher and student -> heads and objective in one, summed over trained tokens,
                        divided by that count
    _get_grad_norm      the last place before the optimizer: sums the step over ranks, stops if it is not finite,
                        and moves t (or ctkd's temperature) by the global loss
    log                 means over the steps since the last log
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from trl import SFTTrainer

from taid.artifacts import run_folder
from taid.artifacts.model_card import write_card
from taid.artifacts.report import write_report
from taid.config.training import TAIDConfig
from taid.config.values import changed, resolved
from taid.data import images, stream, tokenized, vision_collator
from taid.losses.fused import shifted
from taid.losses.schedules import ScheduleState
from taid.losses.sparse_logits import TopK
from taid.models.loading import keep_embeddings, positions
from taid.teachers import placement
from taid.teachers.cache import Cache
from taid.teachers.server import Server
from taid.teachers.teacher import CachedTeacher, LocalTeacher, ServedTeacher, Teacher
from taid.training import capture, engines, resume
from taid.training.moving import MovingParameters
from taid.training.on_policy import Sampling
from taid.training.pair import Pair, load_pair
from taid.training.step import PairLoss
from taid.training.sums import MicroBatches, means
from taid.training.upstream import load_renamed_weights

logger = logging.getLogger(__name__)


class _SeamOnce(logging.Filter):
    """Lets one warning of TRL's by that a prompt ends within a token: it has 600 characters for each such end."""

    is_said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is another message, or the first of these."""
        if "not a prefix of the tokenized prompt+completion" not in record.getMessage():
            return True
        is_first, self.is_said = not self.is_said, True
        return is_first


_SEAM_ONCE = _SeamOnce()  # of a process: a comparison and an evaluation prepare the same rows again and again
_NOT_LOGGED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


class TAIDTrainer(SFTTrainer):  # type: ignore[misc]
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
        teacher_model: the teacher, loaded or by name; ``args.teacher_model_name_or_path`` if None. ``objective: sft``
            needs none, and with one it still reports the KL to it when evaluating.
        args: a :class:`TAIDConfig`.
        train_dataset: rows with ``messages``, ``prompt``/``completion``, ``text`` or ``input_ids``, and with ``images``
            where both models see.
        eval_dataset: held-out rows, or a dict of them.
        processing_class: the student's tokenizer or processor; loaded with the student if None.
        teacher_processing_class: the teacher's; loaded with the teacher if None.
        peft_config: trains an adapter (LoRA, DoRA) instead of the student's own weights.
        callbacks: as in transformers.
        optimizers: as in transformers.
        objective: a function of your own instead of ``args.objective``, of the student's and the teacher's logits
            ``[N, V]`` in float32, that gives the loss of N tokens ``[N]`` in nats; differentiated by autograd.

    Raises:
        ValueError: student and teacher do not fit, no trained token is left, or an option does not go together with
            distillation; names the value and the remedy.
        FloatingPointError: loss or gradient of a step is not finite; raised before the optimizer moves.
    """

    data_collator: Any
    _name = "TAID"
    _tag_names = ["trl", "taid"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in "
        "Language Models",
        "id": "2501.16937",
    }
    # compute_loss divides by the tokens of the whole step, so Trainer must not divide by the micro-batches again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: TAIDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        asked = args or TAIDConfig()
        if objective is not None and not callable(objective):
            raise TypeError(f"objective is a function of both logits, not {objective!r}: named ones go into args")
        if objective is not None:
            name: Any = getattr(objective, "__name__", type(objective).__name__)
            asked = changed(asked, fused=False, objective=name)
        args = changed(asked)  # for what transformers and TRL want otherwise; what was asked for stays as it is
        engines.prepare(args)
        set_seed(args.seed)  # transformers does so too, but after an adapter is drawn
        if args.activation_offloading and not torch.accelerator.is_available():
            raise ValueError("activation_offloading moves activations from a GPU to the CPU, and there is no GPU here")
        self._checkpoints_in: str | None = None
        self.was_stopped = self._is_asked_to_stop = False
        self.stream = stream.of(train_dataset, eval_dataset, args)
        train_dataset = self.stream.dataset if self.stream else train_dataset
        see = images.has_images(train_dataset)
        if see and (args.teacher_cache or args.teacher_server_url or args.tokenizer_from == "teacher"):
            raise ValueError(
                "rows with images need a teacher that is loaded here and has the student's tokens: teacher_cache, "
                "teacher_server_url and tokenizer_from: teacher are for text"
            )
        if see and args.samples_answers:
            raise ValueError("answers are not sampled for rows with images: set sampling: none and seq_kd: false")
        elsewhere: Cache | Server | None = None
        if args.teacher_cache is not None:
            elsewhere = Cache(Path(args.teacher_cache).expanduser())
        elif args.teacher_server_url is not None:
            elsewhere = Server(args.teacher_server_url, args.teacher_server_model, args.teacher_server_timeout)
        pair = load_pair(model, teacher_model or args.teacher_model_name_or_path, args, processing_class,
                         teacher_processing_class, elsewhere, see=see)  # fmt: skip
        args.model_init_kwargs = None  # used up; TRL would warn that a loaded model ignores them
        if getattr(peft_config, "is_prompt_learning", False):
            raise ValueError(f"{type(peft_config).__name__} adds virtual tokens that the teacher has not: use LoRA")
        if peft_config is not None and is_peft_model(pair.student):
            raise ValueError(
                f"student {pair.names['model_name_or_path']!r} is an adapter, and is trained on as it is: leave "
                "use_peft away, or make a model of it first (taid export --format merged-lora)"
            )

        if args.device.type == "cpu":  # nothing to pin for, and torch warns
            args.dataloader_pin_memory = False
        is_mixture_of_experts = hasattr(pair.student.config.get_text_config(), "output_router_logits")
        if args.ddp_find_unused_parameters is None and not is_mixture_of_experts and not see:
            args.ddp_find_unused_parameters = False  # only experts, and eyes without an image, can stay unused
        if see:
            train_dataset = images.prepared(train_dataset, "the train data set", skip=args.skip_bad_images)
            eval_dataset = tokenized.each(eval_dataset, lambda of, name: images.prepared(
                of, f"the {name} data set", skip=args.skip_bad_images))  # fmt: skip

        tokenized.require_chat_template(pair.processing_class, args, train_dataset)

        super().__init__(
            model=pair.student, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=pair.processing_class, peft_config=peft_config, callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        if args.tokenizer_from == "teacher" and is_peft_model(self.model):
            keep_embeddings(self.model)
        engines.check(self.accelerator)

        self.vocabulary, self.teacher_tokenizer = pair.vocabulary, pair.teacher_tokenizer
        self.configuration = resolved(asked) | pair.names
        if see:
            self.data_collator = vision_collator.Collator(
                self.data_collator, pair.teacher_processing_class, self.vocabulary, skip=args.skip_bad_images
            )
        self._check_rows(pair)
        self.teacher = self._teacher(pair.teacher, elsewhere)
        learned = [most for model in (pair.student, pair.teacher) if (most := positions(model)) is not None]
        self.sampling = Sampling(self, min(learned, default=None)) if args.samples_answers else None
        self.pair_loss = PairLoss(self.model, self.teacher, self.vocabulary, args, objective)
        self.moving = MovingParameters(args)
        self._epoch, self._ahead = None, list[dict[str, Any]]()  # micro-batches that were taken from it early
        self._place: dict[str, Any] | None = None  # in the stream, behind the rows of this step
        self._micro_batches = MicroBatches(self.accelerator, self.get_tp_size())  # since the last optimizer step
        self._window: dict[str, float] = defaultdict(float)  # since the last log, over all ranks
        self._train_start = self._window_start = self._seconds_before = 0.0
        self._total_train_tokens: int
        self.add_callback(_RunFolder(self))

    def _teacher(self, model: Any, elsewhere: Cache | Server | None) -> Teacher | None:
        """What answers for the teacher: a cache that fits this run, a server that fits it, or the model."""
        if isinstance(elsewhere, Cache):
            capture.require(self, elsewhere)
            self._name_teacher(elsewhere.manifest["teacher"])
            self.configuration["teacher_cache_format"] = elsewhere.format.name
            return CachedTeacher(elsewhere, self.vocabulary, self.args.device)
        if model is not None:
            model.requires_grad_(False).eval()
            placement.place(model, self.args)
        if isinstance(elsewhere, Server):
            self._name_teacher(elsewhere.model)
            ids = max(self.teacher_tokenizer.get_vocab().values()) + 1
            served = ServedTeacher(elsewhere, self.vocabulary, self.args.teacher_top_k or 64, ids)
            capture.check_sparse(TopK, self.args)
            served.check(capture.first_row(self), self.teacher_tokenizer, model)
            return served
        return model and LocalTeacher(model, self.vocabulary, self.accelerator.autocast, self.args.fused)

    def _name_teacher(self, name: str) -> None:
        """For the report and the model card, where the configuration has no name."""
        if self.configuration["teacher_model_name_or_path"] is None:
            self.configuration["teacher_model_name_or_path"] = name

    # --- the loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one micro-batch: its sum over trained tokens, divided by the trained tokens of the whole step."""
        assert not return_outputs, "TAIDTrainer evaluates without compute_metrics"
        labels = shifted(inputs.pop("labels"))
        num_trained = inputs.pop("num_trained", None)
        inputs["use_cache"] = False
        with_teacher = self.teacher is not None and (self.args.distillation_share > 0 or not model.training)
        outputs, (loss, sums) = self.pair_loss(
            model, inputs, labels, parameters=self.moving.of_step(training=model.training), with_teacher=with_teacher,
            num_trained=num_trained, **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )  # fmt: skip
        sums = self._logged(sums, with_teacher=with_teacher, training=model.training)
        is_read = (labels != -100).any(-1, keepdim=True)  # rows.FullBatches fills up with others
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
        self._micro_batches.add(sums)
        return loss

    def _logged(self, sums: dict[str, Tensor], *, with_teacher: bool, training: bool) -> dict[str, Tensor]:
        """Of all sums those that are logged, and ``signal``: what t or the temperature moves by."""
        names = ["trained", "cross_entropy", "entropy", "correct"]
        names += ["kl"] if with_teacher else []
        names += ["teacher_cross_entropy"] if with_teacher and not training else []
        share = self.args.distillation_share
        loss = share * sums["objective"] + (1 - share) * sums["cross_entropy"]
        return {name: sums[name] for name in names} | {"loss": loss, "signal": sums[self.moving.signal]}

    @property
    def t(self) -> float:
        """Where TAID's target stands in this optimizer step."""
        return self.moving.t

    # --- once an optimizer step -----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Batches of a stream say where they end and begin where the checkpoint's do; others are full on each rank."""
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

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args)
        # A stream goes on by itself: transformers would read it again up to there, and skip.
        return epochs, 0 if self.stream else batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers takes one step too many when it resumes a run that is already at its end
        try:
            if self.state.global_step < self.state.max_steps:
                super()._run_epoch(*args, **kwargs)
        finally:
            self._epoch, self._ahead = None, []  # or a stream would prepare rows that nobody waits for

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and the number of trained tokens in them on all ranks."""
        if epoch_iterator is not self._epoch:
            self._epoch, self._ahead = epoch_iterator, []
        # One step more than is needed now, if what the teacher says of it is fetched while this one is computed.
        ahead = self.teacher is not None and self.teacher.fetches and self.args.distillation_share > 0
        wanted = (2 if ahead and self.sampling is None else 1) * num_batches
        coming, _ = super().get_batch_samples(epoch_iterator, wanted - len(self._ahead), device)
        self._ahead += coming
        if self.sampling is not None:
            self._ahead = self.sampling.replaced(self._ahead, self._window)
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

    def _stop(self, *_: Any) -> None:
        """On SIGTERM, as a machine that is taken away sends it: save after this step, and end."""
        self._is_asked_to_stop = True

    def _end_step(self, grad_norm: float) -> None:
        """Reduce the step over ranks; stop if it is not finite; move t. Runs before the optimizer does."""
        sums = self._micro_batches.total()
        trained = max(sums["trained"], 1.0)
        step = self.state.global_step + 1
        # A gradient scaler (float16) skips overflowing steps by design, so there only the loss counts.
        if not math.isfinite(sums["loss"]) or not (math.isfinite(grad_norm) or self.accelerator.scaler):
            last = run_folder.last_checkpoint(Path(self.args.output_dir))
            moved = "after" if self.is_deepspeed_enabled else "before"  # DeepSpeed moves it at the end of backward
            raise FloatingPointError(
                f"step {step}: the loss is {sums['loss'] / trained} and the gradient's norm {grad_norm}. Training "
                f"stopped {moved} the optimizer moved; the last good checkpoint is {last or 'none'}. Usual remedies: "
                "a lower learning_rate, a smaller max_grad_norm, bf16 instead of fp16, a look at the rows of this step."
            )
        if sums.pop("stops"):  # of one rank or all: with the sums of the step, every rank hears of it in the same step
            self.control.should_save = self.control.should_training_stop = self.was_stopped = True
        self._window["steps"] += 1
        self._window["trained_steps"] += bool(sums["trained"])
        self._window["mean_loss"] += sums["loss"] / trained
        for name, value in sums.items():
            self._window[name] += value
        self._total_train_tokens += int(sums["num_tokens"])
        self._window |= self.moving.logged()  # of the last step, not a sum
        if sums["trained"]:  # a step without trained tokens says nothing about the student
            self.moving.advance(sums["signal"] / trained)

    # --- logs, evaluation, checkpoints ----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over the steps since the last log; loss and KL in nats a token."""
        window = self._window
        if "loss" in logs and window["steps"]:
            logs |= means(window) | {
                "loss": window["mean_loss"] / max(window["trained_steps"], 1),
                "num_tokens": self._total_train_tokens,
            }
            logs |= {name: window[name] for name in self.moving.logged()}
            logs |= self.sampling.logged(window) if self.sampling is not None else {}
            if isinstance(self.moving.state, ScheduleState):
                logs["momentum"] = self.moving.state.momentum
            now = time.perf_counter()
            logs["tokens_per_second"] = window["num_tokens"] / max(now - self._window_start, 1e-9)
            logs["seconds"] = self._seconds_before + now - self._train_start
            self._window, self._window_start = defaultdict(float), now
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate, with means over all held-out tokens instead of means of batch means."""
        with self._micro_batches.apart():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            sums = self._micro_batches.total()
        found = means(sums) | {"loss": sums["loss"] / max(sums["trained"], 1.0), "tokens": int(sums["trained"])}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found: dict[str, float] = super()._evaluate(*args, **kwargs)
        wanted = self.args.metric_for_best_model
        if wanted and f"eval_{wanted.removeprefix('eval_')}" not in found:  # transformers says so in a traceback
            measured = ", ".join(name for name in sorted(found) if name.startswith("eval_"))
            raise ValueError(f"metric_for_best_model: {wanted!r} is not measured; there is {measured}")
        if self.sampling is not None:
            self.sampling.evaluated(found)
        return found

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

    def _sees(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """The cross-entropy of student and teacher on a batch, in nats a token."""
        inputs = self._prepare_inputs(batch)
        labels = shifted(inputs.pop("labels"))
        model, training = self.model_wrapped, self.model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                if self.teacher is not None:
                    role = "teacher"
                    self.teacher(vision_collator.for_teacher(inputs), labels) if self.args.fused else None
                role = "student"
                _, (_, sums) = self.pair_loss(
                    model, inputs, labels, parameters=self.moving.of_step(training=False),
                    with_teacher=self.teacher is not None,
                )  # fmt: skip
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise ValueError(f"the {role} cannot take what the student's processor makes of a row: {error}") from error
        finally:
            model.train(training)
        trained = max(float(sums["trained"]), 1.0)
        names = {"student": "cross_entropy"}
        names |= {"teacher": "teacher_cross_entropy"} if self.teacher is not None else {}
        return {role: float(sums[name]) / trained for role, name in names.items()}

    def _begin(self) -> None:
        """Make the schedule, or take it up where the checkpoint left it."""
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError("no weight of the student can be trained: all have requires_grad = False")
        if isinstance(self.data_collator, vision_collator.Collator):
            vision_collator.check_sight(iter(self.train_dataset), self.data_collator, self._sees)
        self._train_start = self._window_start = time.perf_counter()
        self.moving.start(self.state.max_steps, say=self.is_world_process_zero())
        if self.stream:
            self.stream.start = None
        if self.state.global_step == 0:
            return
        saved = self.state.stateful_callbacks.get(type(self).__name__)
        if saved is None:
            raise ValueError("the checkpoint was not written by TAIDTrainer: its schedule is unknown")
        resume.require_same(saved["identity"], resume.of(self))
        self.moving.restore(saved["schedule"])
        if self.stream:
            self.stream.start = saved["places"][self.accelerator.process_index]
        self._window = defaultdict(float, saved["window"])
        self._total_train_tokens, self._seconds_before = saved["num_tokens"], saved["seconds"]

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        is_converted = False
        if resume_from_checkpoint is not None:
            resume.check_checkpoint(Path(resume_from_checkpoint), self.accelerator)
            is_converted = resume.fit_checkpoint(Path(resume_from_checkpoint), self.accelerator)
        if self.sampling is not None:
            self.sampling.start(None if resume_from_checkpoint is None else Path(resume_from_checkpoint))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if is_converted:
            resume.part_steps(self.model_wrapped.optimizer.optimizer)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_renamed(self, folder: str) -> bool:
        of_engine = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_peft_model(self.model)
        return not of_engine and load_renamed_weights(self.model, Path(folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.state.stateful_callbacks[type(self).__name__] = {
            "identity": resume.of(self),
            "schedule": self.moving.saved(),
            "window": dict(self._window),
            "places": gather_object([self._place]) if self.stream else None,
            "num_tokens": self._total_train_tokens,
            "seconds": self._seconds_before + time.perf_counter() - self._train_start,
        }
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
                if self.sampling is not None:
                    self.sampling.save(made)
        if is_writer:
            run_folder.thin_out(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoints_in or str(super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student as an ordinary folder, gathered where FSDP has cut it up; checkpoints keep their shards."""
        is_cut = self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if is_cut and output_dir in (None, self.args.output_dir):
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
        """Nothing: transformers would pickle its arguments, hub_token among them, into what it uploads."""

    def _send_telemetry(self) -> None:
        """TRL reports each run to its makers; taid does not."""

    # --- rows -----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._is_vision_dataset and images.PLACE not in self._signature_columns:
            self._signature_columns += [
                images.PLACE,
                self.args.dataset_text_field,
            ]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        logging.getLogger("trl.trainer.sft_trainer").addFilter(_SEAM_ONCE)
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        if isinstance(dataset, Dataset) and not packing:
            return tokenized.without_untrained(prepared, len(dataset), rest[-1], args)
        return prepared

    def _check_rows(self, pair: Pair) -> None:
        """Each data set has a trained token, no token that the teacher does not share, and fits into both models."""
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **named}.items():
            is_stream = self.stream is not None and name == "train"  # of which the first chunk is looked at
            is_known = isinstance(dataset, Dataset) and "input_ids" in dataset.column_names
            if (is_stream or is_known) and not self._skip_prepare_dataset:
                checked = tokenized.require_usable(dataset, name, self.vocabulary, pair.tokenizer)
                if is_stream:
                    self.train_dataset: Any = checked
                else:
                    tokenized.require_positions(dataset, name, positions(pair.student), "student")
                    tokenized.require_positions(dataset, name, positions(pair.teacher), "teacher")


class _RunFolder(TrainerCallback):  # type: ignore[misc]
    """Keeps config.yaml, versions.json and metrics.jsonl, on the main process; listens for SIGTERM on each."""

    def __init__(self, trainer: TAIDTrainer) -> None:
        self.trainer = trainer
        self._before: Any = None  # what was done on SIGTERM

    def on_train_begin(self, args: TAIDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            run_folder.start(
                folder, self.trainer.configuration,
                total_steps=state.max_steps, processes=args.world_size, device=str(args.device),
                engine=engines.engine_of(self.trainer.accelerator),
            )  # fmt: skip
            run_folder.truncate_metrics(folder, state.global_step)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self.trainer._stop)

    def on_train_end(self, args: TAIDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def on_step_end(self, args: TAIDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stream:  # transformers counts from where it resumed
            state.epoch = state.global_step / state.max_steps
        if state.global_step >= state.max_steps:  # or the last steps would be missing from metrics.jsonl
            control.should_log = True

    def on_log(self, args: TAIDConfig, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        is_step = "loss" in logs or any(name.endswith("_cross_entropy") for name in logs)
        if state.is_world_process_zero and is_step:
            row = {k: v for k, v in logs.items() if not (k.startswith("eval_") and k.endswith(_NOT_LOGGED))}
            run_folder.append_metrics(Path(args.output_dir), {"step": state.global_step, **row})
