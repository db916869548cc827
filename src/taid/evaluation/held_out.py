"""Measures of a model on held-out rows, with a teacher or without: means over their trained tokens.

:meth:`taid.TAIDTrainer.evaluate` makes the pass, so that a trained token is the same as in training. Measures that it
lacks are summed on the way (:mod:`taid.evaluation.metrics`), so that each model runs once.

The trainers here never train. :func:`_evaluating` builds one; each function below says in whose place its models stand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from taid.config.training import TAIDConfig
from taid.config.values import changed
from taid.data import vision_collator
from taid.evaluation.metrics import TokenSums
from taid.models.loading import tokenizer_of
from taid.training.trainer import TAIDTrainer


@dataclass(frozen=True)
class Measures:
    """Measures of a model on held-out rows; means are over their trained tokens.

    Attributes:
        cross_entropy: -log q(y), nats a token, over the ids that the student and the teacher share.
        perplexity: exp(cross_entropy).
        bits_per_byte: cross_entropy * tokens / (ln 2 * bytes), which does not depend on how the text was split into
            tokens. None where the trained tokens are no text.
        kl: KL(p || q) of the teacher p and the model q, nats a token, over the shared ids; None without a teacher.
        reverse_kl: KL(q || p), nats a token, over the shared ids; likewise.
        accuracy: the share of tokens that are the model's likeliest.
        agreement: the share of tokens where the teacher's likeliest is the model's too; None without a teacher.
        head_mass: the model's probability of the ten tokens that are likeliest to the teacher
            (:func:`taid.evaluation.metrics.head_mass`); None without a teacher.
        tail_mass: that of the fifth of the tokens that are least likely to it (:func:`.metrics.tail_mass`);
            likewise.
        entropy: -sum q log q, of the model, nats a token.
        calibration_error: how far the model's largest probability is from how often it is right, in 15 bins
            (:func:`taid.evaluation.metrics.calibration_error`).
        others_images: the cross-entropy with the images of other rows of the batch, in the sizes of a row's own (a row
            alone in its batch is shown its own in negative); None for rows without. Where it is no larger, the model
            does not use what it sees.
        tokens: the number of trained tokens.
        bytes: of the text that they decode to (:func:`bytes_of`).
    """

    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    kl: float | None
    reverse_kl: float | None
    accuracy: float
    agreement: float | None
    head_mass: float | None
    tail_mass: float | None
    entropy: float
    calibration_error: float
    others_images: float | None
    tokens: int
    bytes: int


def bytes_of(input_ids: list[int], labels: list[int], tokenizer: Any) -> int:
    """Return the number of bytes, in UTF-8, of the text that the trained tokens of a row decode to.

    Trained are the tokens whose label is not -100; the first of a row is not, because nothing predicts it. A run of
    trained tokens is worth the bytes by which the row's text up to its end is longer than that up to its beginning, so
    that a space at the seam is counted. Special tokens, an end of text say, decode to nothing: their loss counts and
    they have no bytes. Where a run begins or ends within a character, decoding gives U+FFFD, of three bytes, for it.
    """

    def until(end: int) -> int:
        text = tokenizer.decode(input_ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode())

    trained = [False, *(label != -100 for label in labels[1:]), False]
    starts = [place for place in range(1, len(trained)) if trained[place] and not trained[place - 1]]
    ends = [place for place in range(1, len(trained)) if trained[place - 1] and not trained[place]]
    return sum(until(end) - until(start) for start, end in zip(starts, ends, strict=True))


def held_out(
    student: Any, tokenizer: Any, rows: Any, args: TAIDConfig, teacher: Any = None, teacher_tokenizer: Any = None, *,
    own_order: bool = False,
) -> Measures:  # fmt: skip
    """Evaluate a model on rows.

    Args:
        student: the model.
        tokenizer: its own; makes the rows' tokens and applies its chat template.
        rows: as :func:`taid.data.loading.load_rows` gives them.
        args: `objective` is "sft", `fused` is true; batch size, max_length and which tokens are trained.
        teacher: what it is compared with; it may differ from the student in nothing but padding and special tokens.
        teacher_tokenizer: the teacher's.
        own_order: take head and tail mass by the model's own order instead of the teacher's.

    Raises:
        ValueError: the rows have no trained token, or student and teacher have different tokenizers.
    """
    trainer = _evaluating(student, tokenizer, rows, args, teacher, teacher_tokenizer)
    found, more = _evaluated(trainer, own_order=own_order)
    size = sum(bytes_of(*row, tokenizer_of(tokenizer)) for row in _tokens(trainer))
    others_images = None
    if isinstance(trainer.data_collator, vision_collator.Collator):
        trainer.data_collator.exchange = True
        others_images = trainer.evaluate(trainer.train_dataset)["eval_cross_entropy"]
    cross_entropy, tokens = found["eval_cross_entropy"], found["eval_tokens"]
    if not math.isfinite(cross_entropy) or not math.isfinite(found.get("eval_kl", 0.0)):
        raise ValueError(
            f"the loss of a model on these rows is {cross_entropy}, the KL to the teacher {found.get('eval_kl')}: "
            "weights are not finite, or too large for this dtype (--dtype float32)"
        )
    return Measures(
        cross_entropy=cross_entropy,
        perplexity=math.exp(min(cross_entropy, 700.0)),
        bits_per_byte=cross_entropy * tokens / (math.log(2) * size) if size else None,
        kl=found.get("eval_kl"),
        reverse_kl=more.get("reverse_kl"),
        accuracy=found["eval_mean_token_accuracy"],
        agreement=more.get("agreement"),
        head_mass=more.get("head_mass"),
        tail_mass=more.get("tail_mass"),
        entropy=found["eval_entropy"],
        calibration_error=more["calibration_error"],
        others_images=others_images,
        tokens=tokens,
        bytes=size,
    )


def teacher_held_out(
    teacher: Any, tokenizer: Any, rows: Any, args: TAIDConfig, student: Any, student_tokenizer: Any
) -> dict[str, Any]:
    """Evaluate a teacher on the student's rows, by a trainer in which the two have exchanged their places.

    The student stands in the teacher's place, so that the ids are the shared ones. Head and tail mass are by the
    teacher's own order.

    Returns:
        The numbers of :class:`Measures`; the teacher agrees with itself, and its divergences from itself are 0.
    """
    found = held_out(teacher, tokenizer, rows, args, student, student_tokenizer, own_order=True)
    return asdict(found) | {"kl": 0.0, "reverse_kl": 0.0, "agreement": 1.0}


def quantization_change(
    teacher: Any, tokenizer: Any, rows: Any, args: TAIDConfig, quantized_teacher: Any, teacher_tokenizer: Any
) -> dict[str, float]:
    """Compare a teacher p with itself in fewer bits, p', by a trainer in which p stands in the student's place.

    Returns:
        Means over the trained tokens of rows, which are those of :func:`held_out`: ``cross_entropy``, -log p'(y) in
        nats; ``change``, that less the cross-entropy of p; ``kl``, KL(p || p') in nats, which a student would have that
        were p'; ``agreement``, the share where both have the same likeliest token.

    Raises:
        ValueError: the rows have no trained token, or the loss in fewer bits is not finite.
    """
    args = changed(args, objective="reverse_kl")  # that is KL(p || p'), with p in the student's place
    trainer = _evaluating(teacher, tokenizer, rows, args, quantized_teacher, teacher_tokenizer)
    found, more = _evaluated(trainer)
    cross_entropy, kl = found["eval_teacher_cross_entropy"], found["eval_loss"]
    if not math.isfinite(cross_entropy) or not math.isfinite(kl):
        raise ValueError(
            f"the loss of the quantized teacher on these rows is {cross_entropy}, its KL {kl}: choose another "
            "--teacher_quantization, or --dtype float32"
        )
    change = cross_entropy - found["eval_cross_entropy"]
    return {"cross_entropy": cross_entropy, "change": change, "kl": kl, "agreement": more["agreement"]}


def teacher_loss_of_samples(
    samples: list[tuple[list[int], list[int]]], student: Any, tokenizer: Any, args: TAIDConfig, teacher: Any,
    teacher_tokenizer: Any,
) -> float:  # fmt: skip
    """Return the mean -log p of sampled tokens behind their prompts, in nats a token, p the teacher.

    The trainer takes prompts and samples as rows of tokens, and only its teacher's cross-entropy is read.
    """
    rows = Dataset.from_list(
        [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in samples]
    )
    args = changed(args, max_length=None, assistant_only_loss=False, chat_template_path=None)
    trainer = _evaluating(student, tokenizer, rows, args, teacher, teacher_tokenizer)
    return float(trainer.evaluate(trainer.train_dataset)["eval_teacher_cross_entropy"])


def _evaluated(trainer: TAIDTrainer, *, own_order: bool = False) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the trainer's own measures of its rows, and the sums of :class:`.metrics.TokenSums`, from one pass."""
    trainer.micro_batch_loss.watch = sums = TokenSums(own_order=own_order)
    try:
        found = trainer.evaluate(trainer.train_dataset)
    finally:
        trainer.micro_batch_loss.watch = None
    return found, sums.means(trainer.accelerator)


def _evaluating(
    student: Any, tokenizer: Any, rows: Any, args: TAIDConfig, teacher: Any, teacher_tokenizer: Any
) -> TAIDTrainer:
    """Build a trainer that only evaluates, on the rows that it would train on, and prints nothing."""
    trainer = TAIDTrainer(
        student, teacher, args, train_dataset=rows, processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
    )  # fmt: skip
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _tokens(trainer: TAIDTrainer) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids and labels of each row; rows with images get them in the collator."""
    rows = trainer.train_dataset
    if "input_ids" in rows.column_names:
        yield from ((row["input_ids"], row["labels"]) for row in rows.select_columns(["input_ids", "labels"]))
        return
    for row in rows:
        batch = trainer.data_collator([row])
        yield batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
