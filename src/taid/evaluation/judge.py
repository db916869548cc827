"""Another model grades a student's answers, in the manner of MT-Bench (Zheng et al., 2023, arXiv 2306.05685).

The student answers each prompt greedily, one turn after the other. A model behind an OpenAI-compatible endpoint grades
each answer from 1 to 10 and ends with ``[[7]]``. Answers and grades are written as JSON lines at once, so that a killed
run goes on where it was. An answer without a grade counts as ungraded, never as 0.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid.data import loading
from taid.models import generation
from taid.teachers import digests
from taid.teachers.server import CONCURRENT, Endpoint, Place, UnusableAnswerError, short

logger = logging.getLogger(__name__)

API_KEY = "JUDGE_API_KEY"
_AGAIN = "The same command goes on where this one stopped"
PLACE = Place(
    "the judge", "--judge_url", "--judge_model", "--judge_timeout", API_KEY, start_again=_AGAIN, busy=_AGAIN
)  # fmt: skip
_TRIES = 3  # for a grade, of an answer
_WARMER = 0.7  # temperature of the second try and later ones: at 0 a judge says the same again
_GRADE = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")

_INSTRUCTION = (
    "You are an impartial judge. You are shown what a user asked an AI assistant and what the assistant replied. Judge "
    "how good the reply is: is it helpful, relevant, correct, thorough enough, well thought out and at the right level "
    "of detail? Do not prefer a reply for its length.{reference}{turns} First explain your judgement in a few "
    "sentences. Then, on the last line, give a grade from 1 (useless) to 10 (could not be better) in double square "
    "brackets and nothing after it, like this: Grade: [[7]]"
)
_WITH_REFERENCE = " You are also given a reference reply, which is right: compare with it, and name mistakes."
_WITH_TURNS = " The conversation has several turns: judge the reply to the last one only, in view of the earlier ones."


@dataclass(frozen=True)
class Prompt:
    """A prompt for the student.

    Attributes:
        messages: the messages before the first turn; none where `turns` say all.
        turns: the user's messages, one after the other.
        references: a right reply to each turn, or none.
        category: results are also given by category.
    """

    messages: tuple[dict[str, str], ...]
    turns: tuple[str, ...]
    references: tuple[str, ...]
    category: str | None


def read_prompts(path: Path | str) -> list[Prompt]:
    """Read a ``.jsonl`` of rows with ``prompt``, ``messages`` or ``turns``, and maybe ``reference`` and ``category``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no rows, or a bad one; names file and line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: there is no such file")
    with loading.opened(path) as file:
        lines = [(f"{path}, line {n}", line) for n, line in loading.numbered_lines(file, path) if line.strip()]
    if not lines:
        raise ValueError(loading.no_rows(str(path)))
    return [_prompt(loading.json_row(line, place), place) for place, line in lines]


def _prompt(row: Any, place: str) -> Prompt:
    if not isinstance(row, dict) or not {"prompt", "messages", "turns"} & row.keys():
        raise ValueError(f"{place}: the row needs `prompt`, `messages` or `turns`")
    before: list[dict[str, str]] = []
    turns = row.get("turns", [row.get("prompt")])
    if "messages" in row:
        messages = row["messages"]
        is_chat = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not is_chat or not messages or messages[-1]["role"] != "user":
            raise ValueError(f"{place}: messages must be texts with a role, and the last one the user's")
        before, turns = messages[:-1], [messages[-1]["content"]]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise ValueError(f"{place}: what the user asks must be text, and not empty")
    references = row.get("reference") or []
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
        raise ValueError(f"{place}: reference must be text, or a list with one text a turn")
    if references and len(references) != len(turns):
        raise ValueError(f"{place}: {len(turns)} turns, but {len(references)} references: give one a turn, or none")
    category = row.get("category")
    return Prompt(tuple(before), tuple(turns), tuple(references), None if category is None else str(category))


class Judge:
    """A model behind an OpenAI-compatible endpoint, the prompts, and the file of what was answered and graded.

    Args:
        url: of the endpoint, with or without ``/v1``.
        model: the judge's name on the server.
        prompts: to the student.
        path: the file of answers and grades; those that it holds are not asked again.
        timeout: seconds to wait for a byte.
        max_new_tokens: the largest length of an answer.
        student: the student's folder or Hub name; kept answers are found by its weights.

    Raises:
        ValueError: the address is none, the server does not serve the model, or the file is another kind of file.
        ConnectionError: the server cannot be reached.
    """

    def __init__(
        self, url: str, model: str, prompts: list[Prompt], path: Path, *, timeout: float = 120.0,
        max_new_tokens: int = 1024, student: str | None = None,
    ) -> None:  # fmt: skip
        self.prompts, self.path, self.max_new_tokens, self.student = prompts, path, max_new_tokens, student
        self._kept, self._lock = _read_kept(path), threading.Lock()
        self._endpoint = Endpoint(url, model, timeout, PLACE)

    def grade(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Let the student answer, have the answers graded, and count.

        Returns:
            `score`, the mean grade (None where there is none), the same by turn and by category, how many answers were
            `graded` and how many `ungraded`, the `judge_model` and the `file`.

        Raises:
            ValueError: the tokenizer has no chat template, or the judge refuses.
            ConnectionError: it cannot be reached any more; what is done is kept.
        """
        if tokenizer.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template, so it cannot be asked: it is no chat model")
        identity = digests.model_digests(self.student, None) | {"name": self.student}
        asked: list[_Asked] = []
        for prompt in self.prompts:
            asked += self._answers(
                prompt, identity, lambda messages: answer(model, tokenizer, messages, self.max_new_tokens)
            )
            logger.info(f"answers: {len(asked)}")
        missing = {key: question for key, question, _, _ in asked if self._kept.get(key, {}).get("grade") is None}
        with ThreadPoolExecutor(CONCURRENT) as pool:
            futures = [pool.submit(self._grade, key, question) for key, question in missing.items()]
            try:
                for number, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    logger.info(f"grades: {number} of {len(futures)}")
            except BaseException:  # what is under way is still kept
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._counted([(self._kept[key]["grade"], turn, category) for key, _, turn, category in asked])

    def _answers(
        self, prompt: Prompt, identity: dict[str, Any], generate: Callable[[list[dict[str, str]]], str]
    ) -> list[_Asked]:
        """Return the student's replies to the turns of a prompt, as questions to the judge."""
        messages, asked = list(prompt.messages), []
        for turn, text in enumerate(prompt.turns):
            messages.append({"role": "user", "content": text})
            key = _key("answer", identity, self.max_new_tokens, messages)
            if key not in self._kept:
                self._keep(key, {"category": prompt.category, "messages": list(messages), "answer": generate(messages)})
            reply = {"role": "assistant", "content": self._kept[key]["answer"]}
            messages.append(reply)
            question = grading_messages(messages, prompt.references[: turn + 1])
            asked.append((_key("grade", self._endpoint.model, question), question, turn, prompt.category))
        return asked

    def _grade(self, key: str, question: list[dict[str, str]]) -> None:
        """Keep the judge's words and its grade, which is None after several tries without one."""
        said: list[str] = []
        grade: float | None = None
        while grade is None and len(said) < _TRIES:
            body = {
                "model": self._endpoint.model,
                "messages": question,
                "temperature": _WARMER if said else 0.0,
            }
            try:
                reply = self._endpoint.request("POST", "/v1/chat/completions", body)
                said.append(self._text(reply))
                grade = grade_in(said[-1])
            except UnusableAnswerError as error:
                said.append(str(error))
        if grade is None:
            logger.warning(f"the judge gave no grade in {_TRIES} tries: {short(said[-1])}")
        self._keep(key, {"question": question, "judge_model": self._endpoint.model, "said": said, "grade": grade})

    def _text(self, reply: Any) -> str:
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise self._endpoint.nonsense(f"it has no choices[0].message.content: {short(reply)}")
        return text

    def _keep(self, key: str, content: dict[str, Any]) -> None:
        line = json.dumps({"key": key} | content) + "\n"  # ASCII: a half surrogate has no place in UTF-8
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            self._kept[key] = content

    def _counted(self, grades: list[tuple[float | None, int, str | None]]) -> dict[str, Any]:
        by_turn, by_category = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        for grade, turn, category in grades:
            if grade is not None:
                by_turn[str(turn + 1)].append(grade)
                by_category[category or ""].append(grade)
        graded = [grade for grade, _, _ in grades if grade is not None]
        by_category.pop("", None)
        return {
            "score": _mean(graded),
            "by_turn": {name: _mean(values) for name, values in sorted(by_turn.items())},
            "by_category": {name: _mean(values) for name, values in sorted(by_category.items())},
            "graded": len(graded),
            "ungraded": len(grades) - len(graded),
            "judge_model": self._endpoint.model,
            "file": str(self.path),
        }


_Asked = tuple[str, list[dict[str, str]], int, str | None]
"""Key of the grade, question to the judge, turn from 0, category."""


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """Return the model's greedy reply, by its own settings but for sampling."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = generation.own_greedy_decoding(model, padding)
    (tokens,) = generation.generate(model, [prompt], config, max_new_tokens=max_new_tokens)
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def grading_messages(messages: list[dict[str, str]], references: Iterable[str]) -> list[dict[str, str]]:
    """Return the messages to the judge: the instruction, then the conversation with its last reply, and references."""
    references = list(references)
    users = [message["content"] for message in messages if message["role"] == "user"]
    instruction = _INSTRUCTION.format(
        reference=_WITH_REFERENCE if references else "", turns=_WITH_TURNS if len(users) > 1 else ""
    )
    shown = [f"[{message['role']}]\n{message['content']}" for message in messages]
    if references:
        shown.append(f"[reference reply to the last turn]\n{references[-1]}")
    return [{"role": "system", "content": instruction}, {"role": "user", "content": "\n\n".join(shown)}]


def grade_in(text: str) -> float | None:
    """Return the last grade in double square brackets, if it lies in 1 .. 10."""
    found = _GRADE.findall(text)
    grade = float(found[-1]) if found else 0.0
    return grade if 1.0 <= grade <= 10.0 else None


def _read_kept(path: Path) -> dict[str, dict[str, Any]]:
    """Read the file by its keys, and cut off a last line that a kill left unfinished."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    kept = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            is_ours = isinstance(row["key"], str) and (
                isinstance(row["answer"], str) if "answer" in row else isinstance(row["grade"], float | None)
            )
        except (ValueError, TypeError, KeyError):
            is_ours = False
        if not is_ours:
            raise ValueError(f"{path}, line {number}: taid evaluate did not write this: choose another --output")
        kept[row["key"]] = row
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return kept


def _key(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
