"""A student's answers to held-out prompts, measured against references, each other and the teacher's probabilities.

Greedy answers serve for ROUGE-L and exact match. Samples at temperature 1 serve for their variety and for the teacher's
loss of them. Only ids that student and teacher share are generated. A model's own sampling settings
(generation_config.json) are set aside, because they are not its distribution; the tokens that end an answer are kept.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate.utils import gather_object

from taid.config.training import TAIDConfig
from taid.data import loading
from taid.data.images import has_images
from taid.evaluation.held_out import teacher_loss_of_samples
from taid.evaluation.metrics import distinct, exact_match, mean, rouge_l, self_bleu
from taid.models import generation
from taid.models.loading import learned_positions, output_rows, tokenizer_of
from taid.models.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

ORDERS = (1, 2, 3, 4)


class Prompted(NamedTuple):
    """A held-out row that asks for an answer.

    Attributes:
        row: its number in the data, from 0.
        prompt: text, or the messages before the answer.
        reference: the answer that the row has.
        template: what the row tells a chat template: ``tools``, and its ``chat_template_kwargs``.
    """

    row: int
    prompt: str | list[dict[str, Any]]
    reference: str
    template: dict[str, Any]


class Generations(NamedTuple):
    """Measured answers.

    Attributes:
        numbers: the measures by name, with the numbers of prompts and samples.
        answers: a row for each prompt: the text that the model was shown, the reference, the greedy answer with its
            measures, and the samples.
    """

    numbers: dict[str, Any]
    answers: list[dict[str, Any]]


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompted(rows: Any, number: int, name: str) -> list[Prompted]:
    """Return the first rows with ``prompt`` and ``completion``, or with ``messages`` that end with the assistant's.

    Raises:
        ImportError: a package that measures answers is not installed.
        ValueError: no row has a prompt, or they have images; names `name`, the data.
    """
    for package in ("rouge_score", "sacrebleu"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"--generate needs {package.replace('_', '-')}: pip install 'taid[evaluation]'")
    if has_images(rows):
        raise ValueError(f"--generate is for text, and the rows of {name} have images: leave it away")
    asked = (_prompted(place, loading.without_none(row)) for place, row in enumerate(rows))
    found = list(itertools.islice(filter(None, asked), number))
    if not found:
        raise ValueError(
            f"--generate: no row of {name} has a prompt. It takes rows with `prompt` and `completion`, or with "
            f"`messages` of which the last is the assistant's; these have {', '.join(f'`{c}`' for c in rows[0])}"
        )
    if len(found) < number:
        logger.info(f"{name} has {len(found)} rows with a prompt: --generate takes them all")
    return found


def _prompted(place: int, row: dict[str, Any]) -> Prompted | None:
    if "input_ids" in row or not ("messages" in row or {"prompt", "completion"} <= row.keys()):
        return None
    if isinstance(row.get("prompt"), str):
        return Prompted(place, row["prompt"], row["completion"], {}) if row["prompt"] else None
    messages = [loading.without_none(message) for message in row.get("messages") or row["prompt"] + row["completion"]]
    reference = loading.text_of(messages[-1].get("content"))
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not (reference or "").strip():
        return None
    tools = row.get("tools")
    template = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    return Prompted(place, messages[:-1], str(reference), template | row.get("chat_template_kwargs", {}))


def _tokens(asked: Prompted, tokenizer: Any) -> list[int]:
    """Return the ids of a prompt, as training makes them."""
    if isinstance(asked.prompt, str):
        return list(tokenizer(asked.prompt)["input_ids"])
    shown = tokenizer.apply_chat_template(asked.prompt, add_generation_prompt=True, return_dict=True, **asked.template)
    return list(shown["input_ids"])


def require_room(max_new_tokens: int, *models: Any) -> None:
    """Raise a ValueError if an answer may have more tokens than a model has learned positions."""
    most = min((p for model in models if (p := learned_positions(model)) is not None), default=None)
    if most is not None and max_new_tokens >= most:
        raise ValueError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt in the {most} positions that a model has "
            f"learned: set one well below {most}"
        )


# --- answers ----------------------------------------------------------------------------------------------------------


def generate(
    student: Any, tokenizer: Any, prompts: Sequence[Prompted], args: TAIDConfig, teacher: Any = None,
    teacher_tokenizer: Any = None, *, samples: int = 4, max_new_tokens: int = 1024,
) -> Generations:  # fmt: skip
    """Let a model answer prompts, and measure its answers. On several processes they share the prompts.

    Args:
        student: the model.
        tokenizer: its own, with the chat template that its prompts are shown in.
        prompts: of :func:`prompted`. Those that are longer than `args.max_length`, or leave no room for an answer in
            the positions that a model has learned, are left out.
        args: batch size, max_length and seed.
        teacher: gives ``generation_loss``; None for none.
        teacher_tokenizer: the teacher's.
        samples: the number drawn a prompt; 0 for greedy answers alone.
        max_new_tokens: the largest length of an answer, which is cut off there.

    Returns:
        ``rouge_l`` (:func:`rouge_l`), ``exact_match`` (:func:`exact_match`), the mean number of ``answer_tokens`` and
        the share that ``finished``, of greedy answers; ``distinct_1`` to ``distinct_4`` (:func:`distinct`),
        ``self_bleu`` (:func:`self_bleu`), mean ``sample_tokens`` and ``generation_loss``, the mean of -log p of the
        teacher p over all tokens of all samples, in nats a token, of samples; and ``prompts``, ``samples``,
        ``max_new_tokens`` and ``seed``. None where there is nothing to measure. Tokens of answers include their end.

    Raises:
        ValueError: no prompt is short enough, or student and teacher have different tokenizers.
    """
    require_room(max_new_tokens, student, teacher)
    tokenizer = tokenizer_of(tokenizer)
    shown = _short_enough(prompts, tokenizer, args, max_new_tokens, student, teacher)
    ids = [tokens for _, tokens in shown]
    answering = _Answering(student, tokenizer, args, teacher, teacher_tokenizer, max_new_tokens)
    greedy = [answer for (answer,) in answering(ids, 1)]
    drawn = answering(ids, samples, temperature=1.0) if samples else [[] for _ in ids]

    flat = [(tokens, sample) for tokens, several in zip(ids, drawn, strict=True) for sample in several]
    answers = [
        _answer(asked, tokenizer, tokens, answer, several)
        for (asked, tokens), answer, several in zip(shown, greedy, drawn, strict=True)
    ]
    numbers = {
        "prompts": len(shown), "samples": samples, "max_new_tokens": max_new_tokens, "seed": args.seed,
        "rouge_l": _mean_rouge_l(answers, args), "exact_match": mean(row["exact_match"] for row in answers),
        "answer_tokens": mean(map(len, greedy)), "finished": mean(map(answering.is_finished, greedy)),
        **{f"distinct_{n}": distinct((sample for _, sample in flat), n) for n in ORDERS},
        "self_bleu": self_bleu(drawn), "sample_tokens": mean(len(sample) for _, sample in flat),
        "generation_loss": None if teacher is None or not flat else teacher_loss_of_samples(
            flat, student, tokenizer, args, teacher, teacher_tokenizer
        ),
    }  # fmt: skip
    return Generations(numbers, answers)


def _answer(
    asked: Prompted, tokenizer: Any, shown: list[int], greedy: list[int], drawn: list[list[int]]
) -> dict[str, Any]:
    """Return the texts of a prompt and its answers, for a reader."""
    answer, *samples = (str(tokenizer.decode(of, skip_special_tokens=True)) for of in (greedy, *drawn))
    return {
        "row": asked.row, "prompt": tokenizer.decode(shown), "reference": asked.reference, "answer": answer,
        "rouge_l": rouge_l(asked.reference, answer), "exact_match": exact_match(asked.reference, answer),
        "samples": samples,
    }  # fmt: skip


def _mean_rouge_l(answers: list[dict[str, Any]], args: TAIDConfig) -> float | None:
    scores = [row["rouge_l"] for row in answers if row["rouge_l"] is not None]
    if len(scores) < len(answers) and args.process_index == 0:
        logger.warning(
            f"{len(answers) - len(scores)} of {len(answers)} references have neither Latin letters nor digits, and "
            "ROUGE-L counts nothing else: they are not in its mean"
        )
    return mean(scores)


def _short_enough(
    prompts: Sequence[Prompted], tokenizer: Any, args: TAIDConfig, max_new_tokens: int, *models: Any
) -> list[tuple[Prompted, list[int]]]:
    room = [p - max_new_tokens for model in models if (p := learned_positions(model)) is not None]
    most = min([*room, *([] if args.max_length is None else [args.max_length])], default=None)
    shown = [(asked, _tokens(asked, tokenizer)) for asked in prompts]
    kept = [(asked, tokens) for asked, tokens in shown if tokens and (most is None or len(tokens) <= most)]
    if not kept:
        raise ValueError(
            f"--generate: each of the {len(shown)} prompts is longer than {most} tokens: raise --max_length, or lower "
            "--max_new_tokens where a model has learned few positions"
        )
    if len(kept) < len(shown) and args.process_index == 0:
        logger.warning(f"{len(shown) - len(kept)} of {len(shown)} prompts are left out: longer than {most} tokens")
    return kept


class _Answering:
    """Answers prompts in batches, with ids that the model shares with the teacher."""

    def __init__(
        self, model: Any, tokenizer: Any, args: TAIDConfig, teacher: Any, teacher_tokenizer: Any, max_new_tokens: int
    ) -> None:
        self.model, self.args, self.max_new_tokens = model.to(args.device).eval(), args, max_new_tokens
        size = output_rows(model)
        self.vocabulary = (
            Vocabulary.from_tokenizer(tokenizer, size)
            if teacher is None
            else Vocabulary.shared(
                tokenizer, tokenizer_of(teacher_tokenizer), student_rows=size, teacher_rows=output_rows(teacher)
            )
        )
        own = model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
        self.ends = sorted(ends)
        self.pad = next((i for i in (tokenizer.pad_token_id, *self.ends) if i is not None), 0)

    def is_finished(self, answer: list[int]) -> bool:
        """Return whether an answer ended by itself."""
        return answer[-1] in self.ends

    def __call__(
        self, prompts: list[list[int]], number: int, *, temperature: float | None = None
    ) -> list[list[list[int]]]:
        """Return `number` answers to each prompt, as tokens up to their end: samples, or greedy without a temperature.

        Batches are dealt to the processes, and each has a seed of its own, so that samples do not depend on how many
        processes there are. They do depend on the batch size.
        """
        size = max(1, self.args.per_device_eval_batch_size // number)
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        config = generation.decoding(self.ends, self.pad, temperature=temperature)
        found = []
        for place in range(self.args.process_index, len(batches), self.args.world_size):
            answers = generation.generate(
                self.model, batches[place], config, max_new_tokens=self.max_new_tokens, vocabulary=self.vocabulary,
                samples=number, seed=self.args.seed + place,
            )  # fmt: skip
            found.append((place, answers))
            logger.info(f"{'answers' if temperature is None else 'samples'}: batch {place + 1} of {len(batches)}")
        answers = [answer for _, of_batch in sorted(gather_object(found)) for answer in of_batch]
        return [answers[start : start + number] for start in range(0, len(answers), number)]
