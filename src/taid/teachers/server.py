"""Query language models over HTTP, with retries, masked keys, and messages that name the server.

:class:`Endpoint` is any server with the OpenAI API. :class:`Server` asks for the probability of each token of a prompt.
It uses vLLM's extension of that API: ``POST /v1/completions`` with ``prompt_logprobs: k`` and prompts of token ids.
Each choice of the answer has ``prompt_logprobs``: for each token of its prompt but the first a mapping of token ids to
``{"logprob": ..., "decoded_token": ...}``. The mapping holds the token itself and the k likeliest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import urllib3

from taid.config.combinations import TEACHER_SERVER_KEY
from taid.config.values import check_url

logger = logging.getLogger(__name__)

CONCURRENT = 8  # requests at a time
_TRIES = 7  # with the waits below, two minutes, in which a server can be started again
_BACKOFF, _LONGEST_WAIT = 1.0, 60.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)

Listed = dict[int, dict[str, Any]]
"""Of one token of a prompt: by token id, what the server says of it; ``logprob`` is a number."""


@dataclass(frozen=True)
class Place:
    """The name of a server in messages, and the options with which the user configures it.

    Attributes:
        name: "the teacher's server".
        url: the option that holds its address; `model` and `timeout` likewise.
        api_key: the environment variable that holds its key.
        start_again: the remedy if it has died.
        busy: the remedy if it stays busy.
    """

    name: str
    url: str
    model: str
    timeout: str
    api_key: str
    start_again: str
    busy: str


TEACHER = Place(
    "the teacher's server", "teacher_server_url", "teacher_server_model", "teacher_server_timeout", TEACHER_SERVER_KEY,
    "Start it again; a run continues with --resume_from_checkpoint, a capture with the same command",
    "A run continues with --resume_from_checkpoint",
)  # fmt: skip


class UnusableAnswerError(ValueError):
    """A server gave an answer that cannot be used."""


class Endpoint:
    """A reachable server with the OpenAI API.

    Args:
        url: with or without ``/v1``.
        model: its name on the server; None for the only one that is served.
        timeout: seconds to wait for an answer.
        place: the name and options for messages.

    Raises:
        ValueError: the address is invalid, or the model is not served.
        ConnectionError: it cannot be reached.
    """

    def __init__(self, url: str, model: str | None, timeout: float, place: Place) -> None:
        check_url(url, place.url, place.api_key)
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.place = timeout, place
        self._key = os.environ.get(place.api_key)
        if self._key and not (self._key.isascii() and self._key.isprintable() and " " not in self._key):
            raise ValueError(f"{place.api_key} in the environment holds characters that no key has")
        retries = _Retry(
            _TRIES, allowed_methods=None, status_forcelist=_BUSY, raise_on_status=False, redirect=0,
            backoff_factor=_BACKOFF, backoff_max=_LONGEST_WAIT,
        )  # fmt: skip
        retries.name = place.name
        self._pool = urllib3.PoolManager(
            maxsize=CONCURRENT, retries=retries, timeout=urllib3.Timeout(connect=min(timeout, 10.0), read=timeout)
        )
        self.model = self._served(model)

    def _served(self, model: str | None) -> str:
        answer = self.request("GET", "/v1/models")
        entries = answer.get("data") if isinstance(answer, dict) else None
        entries = entries if isinstance(entries, list) else []
        names = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if model is None and len(names) == 1:
            return str(names[0])
        if model not in names:
            asked = f"does not have one model: set {self.place.model}" if model is None else f"does not serve {model!r}"
            raise ValueError(f"{self.place.name} {self.url} {asked} (it serves: {', '.join(names) or 'none'})")
        return str(model)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON of an answer.

        Raises:
            UnusableAnswerError: the answer is not JSON.
            ValueError: the server refuses the request.
            ConnectionError: it cannot be reached, or gave no answer after several tries.
        """
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            answer = self._pool.request(method, self.url + path, json=body, headers=headers, redirect=False)
            text = self._without_key(answer.data.decode(errors="replace"))
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(
                f"{self.place.name} {self.url} gave no answer in {_TRIES + 1} tries ({self._reason(error)}). "
                f"{self.place.start_again}"
            ) from None  # the chain would repeat the request
        if answer.status != 200:
            raise self._refusal(answer.status, text)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self.nonsense(f"it is no JSON: {short(text)}") from None

    def _reason(self, error: Exception) -> str:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, urllib3.exceptions.ReadTimeoutError):
            return f"not within {self.timeout:g} s; {self.place.timeout} waits longer"
        return self._without_key(str(getattr(reason, "args", [reason])[-1]))

    def _refusal(self, status: int, text: str) -> Exception:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # else it is the text itself
            error = json.loads(text)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        said = f"{self.place.name} {self.url} answers {status}: {' '.join(text.split())[:400]}"
        if 300 <= status < 400:
            return ValueError(f"{said}. It redirects, which is not followed: set {self.place.url} to where it leads")
        if status in (401, 403):
            remedy = (
                f"The key in {self.place.api_key} is refused"
                if self._key
                else f"Put its key into the environment as {self.place.api_key}"
            )
            return ValueError(f"{said}. {remedy}")
        if status in _BUSY:
            return ConnectionError(f"{said}, {_TRIES + 1} times. {self.place.busy}")
        if "logprobs" in text:
            return ValueError(f"{said}. Start it with a larger --max-logprobs, or lower teacher_top_k")
        return ValueError(said)

    def nonsense(self, what: str) -> UnusableAnswerError:
        """Return the error for an answer that does not match the request."""
        return UnusableAnswerError(f"the answer of {self.place.name} {self.url} cannot be used: {what}")

    def _without_key(self, text: str) -> str:
        """Mask the key in a text, however a server escapes it; call this before the text is shortened."""
        for form in (self._key, self._key and json.dumps(self._key)[1:-1]):
            text = text.replace(form, "***") if form else text
        return text


class Server:
    """A server with the OpenAI API and vLLM's extension for the log-probabilities of prompt tokens.

    Args:
        url: with or without ``/v1``.
        model: its name on the server; None for the only one that is served.
        timeout: seconds to wait for an answer.

    Raises:
        ValueError: the address is invalid, or the model is not served.
        ConnectionError: it cannot be reached.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 120.0) -> None:
        self._endpoint = Endpoint(url, model, timeout, TEACHER)
        self.url, self.model = self._endpoint.url, self._endpoint.model

    def prompt_log_probs(self, prompts: list[list[int]], k: int) -> list[list[Listed]]:
        """Return, for each token of each prompt but the first, the log-probabilities of the token and the k likeliest.

        Raises:
            ValueError: the server refuses, or its answer does not match the prompts or holds no probabilities.
            ConnectionError: it cannot be reached, or gave no answer after several tries.
        """
        body = {"model": self.model, "prompt": prompts, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        answer = self._endpoint.request("POST", "/v1/completions", body)
        try:
            choices = {choice["index"]: choice for choice in answer["choices"]}
            ordered = [choices[number].get("prompt_logprobs") for number in range(len(prompts))]
        except (AttributeError, KeyError, TypeError):
            raise self._endpoint.nonsense(f"{len(prompts)} prompts were sent, the answer is {short(answer)}") from None
        found = []
        for prompt, places in zip(prompts, ordered, strict=True):
            if places is None:
                raise self._endpoint.nonsense("it has no prompt_logprobs, which vLLM gives and few others do")
            if not isinstance(places, list) or len(places) != len(prompt):
                raise self._endpoint.nonsense(f"a prompt of {len(prompt)} tokens has prompt_logprobs {short(places)}")
            found.append([self._listed(place, token, k) for place, token in zip(places[1:], prompt[1:], strict=True)])
        return found

    def _listed(self, place: Any, token: int, k: int) -> Listed:
        try:
            listed = {int(name): {**entry, "logprob": float(entry["logprob"])} for name, entry in place.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._endpoint.nonsense(f"the log-probabilities of a token are {short(place)}") from None
        log_probs = [entry["logprob"] for entry in listed.values()]
        if any(math.isnan(x) or x > 1e-3 for x in log_probs) or sum(map(math.exp, log_probs)) > 1.001:
            raise self._endpoint.nonsense(f"these are no log-probabilities: {short(place)}")
        if token not in listed:
            raise self._endpoint.nonsense(
                f"it says nothing of token {token}, which was sent, but of {short(sorted(listed))}: it has another "
                "tokenizer or changes prompts"
            )
        if len(listed) < k:
            raise self._endpoint.nonsense(
                f"{k} tokens a position were asked for, it gives {len(listed)}: start it with --max-logprobs {k}, or "
                "lower teacher_top_k"
            )
        return listed


class _Retry(urllib3.Retry):
    """Retry policy that logs each retry and limits the wait; urllib3 logs some reasons only."""

    name = ""
    """Of the server."""

    def new(self, **changes: Any) -> _Retry:
        again = super().new(**changes)
        again.name = self.name
        return again

    def get_retry_after(self, response: Any) -> float | None:
        wait = super().get_retry_after(response)
        return None if wait is None else min(wait, _LONGEST_WAIT)

    def increment(self, method: str | None = None, url: str | None = None, response: Any = None,
                  error: Exception | None = None, *rest: Any, **more: Any) -> _Retry:  # fmt: skip
        again = super().increment(method, url, response, error, *rest, **more)
        reason = f"status {response.status}" if response is not None else type(error).__name__
        wait = again.get_backoff_time()
        logger.warning(f"{self.name}: {reason}; trying again in {wait:.0f} s or as it asks for")
        return again


def short(value: Any) -> str:
    """Return an answer shortened for a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
