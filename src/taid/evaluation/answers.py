"""What a student answers to held-out prompts: beside references, beside each other, and to the teacher.

Answers come from transformers' ``generate``, in batches padded on the left: greedy ones for ROUGE-L and exact match,
samples at temperature 1 for their variety and for the teacher's opinion of them. Only ids that student and teacher
share are generated. A model's own sampling settings (generation_config.json) are set aside, because they are not its
distribution; what ends an answer is kept.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from taid.data import loading
from taid.data.images import has_images

if TYPE_CHECKING:
    from taid.config.training import TAIDConfig

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
    """What :func:`generate` returns.

    Attributes:
        numbers: the measures by name, and of what they are.
        answers: a row for each prompt: the text that the model was shown, the reference, the greedy answer with its
            measures, and the samples.
    """

    numbers: dict[str, Any]
    answers: list[dict[str, Any]]


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompted(rows: Any, number: int, name: str) -> list[Prompted]:
    """The first rows that have a prompt: ``prompt`` and ``completion``, or ``messages`` that end with the assistant's.

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
    """The ids that the model is shown, as training makes them of a prompt."""
    if isinstance(asked.prompt, str):
        return list(tokenizer(asked.prompt)["input_ids"])
    shown = tokenizer.apply_chat_template(asked.prompt, add_generation_prompt=True, return_dict=True, **asked.template)
    return list(shown["input_ids"])


def require_room(max_new_tokens: int, *models: Any) -> None:
    """Raise a ValueError where a model has not learned as many positions as an answer may have tokens."""
    from taid.models.loading import positions

    most = min((p for model in models if (p := positions(model)) is not None), default=None)
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
        teacher: what gives its opinion of the samples; None for none.
        teacher_tokenizer: the teacher's.
        samples: how many are drawn a prompt; 0 for greedy answers alone.
        max_new_tokens: of an answer; what has not ended by then is cut off.

    Returns:
        ``rouge_l`` (:func:`rouge_l`), ``exact_match`` (:func:`exact_match`), the mean number of ``answer_tokens`` and
        the share that ``finished``, of greedy answers; ``distinct_1`` to ``distinct_4`` (:func:`distinct`),
        ``self_bleu`` (:func:`self_bleu`), mean ``sample_tokens`` and ``generation_loss``, the mean of -log p of the
        teacher p over all tokens of all samples, in nats a token, of samples; and ``prompts``, ``samples``,
        ``max_new_tokens`` and ``seed``. None where there is nothing to measure. Tokens of answers include their end.

    Raises:
        ValueError: no prompt is short enough, or student and teacher have different tokenizers.
    """
    from taid.models.loading import tokenizer_of

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
        "rouge_l": _mean_rouge_l(answers, args), "exact_match": _mean(row["exact_match"] for row in answers),
        "answer_tokens": _mean(map(len, greedy)), "finished": _mean(map(answering.is_finished, greedy)),
        **{f"distinct_{n}": distinct((sample for _, sample in flat), n) for n in ORDERS},
        "self_bleu": self_bleu(drawn), "sample_tokens": _mean(len(sample) for _, sample in flat),
        "generation_loss": _loss_of_teacher(flat, student, tokenizer, args, teacher, teacher_tokenizer),
    }  # fmt: skip
    return Generations(numbers, answers)


def _answer(
    asked: Prompted, tokenizer: Any, shown: list[int], greedy: list[int], drawn: list[list[int]]
) -> dict[str, Any]:
    """What is kept of a prompt, for a reader."""
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
    return _mean(scores)


def _short_enough(
    prompts: Sequence[Prompted], tokenizer: Any, args: TAIDConfig, max_new_tokens: int, *models: Any
) -> list[tuple[Prompted, list[int]]]:
    from taid.models.loading import positions

    room = [p - max_new_tokens for model in models if (p := positions(model)) is not None]
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
    """A model that continues prompts with ids that it shares with the teacher."""

    def __init__(
        self, model: Any, tokenizer: Any, args: TAIDConfig, teacher: Any, teacher_tokenizer: Any, max_new_tokens: int
    ) -> None:
        from taid.models.loading import output_rows, tokenizer_of
        from taid.models.vocabulary import Vocabulary

        self.model, self.args, self.max_new_tokens = model.to(args.device).eval(), args, max_new_tokens
        size = output_rows(model)
        self.vocabulary = (
            Vocabulary.of(tokenizer, size)
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
        """Whether it ended by itself."""
        return answer[-1] in self.ends

    def __call__(
        self, prompts: list[list[int]], number: int, *, temperature: float | None = None
    ) -> list[list[list[int]]]:
        """Return `number` answers to each prompt, as tokens up to their end: samples, or greedy without a temperature.

        Batches are dealt to the processes, and each has a seed of its own, so that samples do not depend on how many
        processes there are. They do depend on the batch size.
        """
        from accelerate.utils import gather_object

        from taid.models import generation

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


def _loss_of_teacher(
    sampled: list[tuple[list[int], list[int]]], student: Any, tokenizer: Any, args: TAIDConfig, teacher: Any,
    teacher_tokenizer: Any,
) -> float | None:  # fmt: skip
    """-log p of what was sampled behind prompts, nats a token: the trainer's evaluation of it as rows."""
    from datasets import Dataset

    from taid.evaluation.held_out import trainer_of

    if teacher is None or not sampled:
        return None
    rows = Dataset.from_list(
        [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in sampled]
    )
    args = copy.copy(args)
    args.max_length, args.assistant_only_loss, args.chat_template_path = None, False, None
    trainer = trainer_of(student, tokenizer, rows, args, teacher, teacher_tokenizer)
    return float(trainer.evaluate(trainer.train_dataset)["eval_teacher_cross_entropy"])


# --- measures of text -------------------------------------------------------------------------------------------------


def rouge_l(reference: str, answer: str) -> float | None:
    """ROUGE-L: 2 P R / (P + R) with P and R the share of answer and reference that their longest common subsequence is.

    Of words of the letters a-z and digits, in small letters and stemmed (Porter), as Super-NaturalInstructions'
    evaluation has it; None where the reference has no such word.

    Reference: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; the package rouge-score.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenize import tokenize

    if not tokenize(reference, None):
        return None
    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure)


def exact_match(reference: str, answer: str) -> bool:
    """Whether both are the same text but for blanks around it."""
    return reference.strip() == answer.strip()


def distinct(samples: Iterable[Sequence[int]], n: int) -> float | None:
    """distinct-n: different n-grams of tokens / all n-grams, in all samples together; None where there is none.

    Falls as there is more text, whatever it is: compare at the same prompts, samples a prompt and lengths.

    Reference: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", arXiv 1510.03055.
    """
    grams = [tuple(sample[i : i + n]) for sample in samples for i in range(len(sample) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(groups: Sequence[Sequence[Sequence[int]]]) -> float | None:
    """self-BLEU: the mean BLEU of each sample with the other samples of its prompt as references, in [0, 1].

    1 where all samples of a prompt are the same, near 0 where they share nothing. BLEU is sacrebleu's of a sentence, of
    tokens up to 4-grams, or up to what the sample has; None where no prompt has two samples.

    Reference: Zhu et al., "Texygen", SIGIR 2018, arXiv 1802.01886; there of all samples of a model together.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="none", effective_order=True)
    texts = [[" ".join(map(str, sample)) for sample in group] for group in groups if len(group) > 1]
    return _mean(
        min(bleu.sentence_score(sample, group[:i] + group[i + 1 :]).score / 100, 1.0)
        for group in texts
        for i, sample in enumerate(group)
    )


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
