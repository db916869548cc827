"""A language model behind HTTP that says how likely each token of a prompt is: vLLM's completions with prompt_logprobs.

The wire format is that of the OpenAI API with vLLM's extension: ``POST /v1/completions`` with ``prompt_logprobs: k``
and prompts of token ids; each choice of the answer has ``prompt_logprobs``, for each token of its prompt but the first
a mapping of token ids to ``{"logprob": ..., "decoded_token": ...}``: of the token itself and the k likeliest.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any
from urllib.parse import urlsplit

import urllib3

CONCURRENT = 8  # requests at a time
API_KEY = "TEACHER_SERVER_API_KEY"
_TRIES = 7  # with the waits below, two minutes, in which a server can be started again
_BACKOFF, _LONGEST_WAIT = 1.0, 60.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)

Listed = dict[int, dict[str, Any]]
"""Of one token of a prompt: by token id, what the server says of it; ``logprob`` is a number."""


def check_url(url: str) -> None:
    """Raise a ValueError for what is no address of a server, or holds a secret."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"teacher_server_url holds credentials, which would be saved with the run: put the key into the "
            f"environment as {API_KEY}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"teacher_server_url must be like http://localhost:8000, got {url!r}")


class Server:
    """A server that is there.

    Args:
        url: with or without ``/v1``.
        model: its name on the server; the only one that is served if None.
        timeout: seconds to wait for an answer.

    Raises:
        ValueError: the address is none, or the model is not served.
        ConnectionError: it cannot be reached.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 120.0) -> None:
        check_url(url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self._key = os.environ.get(API_KEY)
        if self._key and not (self._key.isascii() and self._key.isprintable() and " " not in self._key):
            raise ValueError(f"{API_KEY} in the environment holds characters that no key has")
        retries = urllib3.Retry(
            _TRIES, allowed_methods=None, status_forcelist=_BUSY, raise_on_status=False, redirect=0,
            backoff_factor=_BACKOFF, backoff_max=_LONGEST_WAIT,
        )  # fmt: skip
        self._pool = urllib3.PoolManager(
            maxsize=CONCURRENT, retries=retries, timeout=urllib3.Timeout(connect=min(timeout, 10.0), read=timeout)
        )
        self.model = self._served(model)

    def _served(self, model: str | None) -> str:
        answer = self._request("GET", "/v1/models")
        entries = answer.get("data") if isinstance(answer, dict) else None
        names = [entry.get("id") for entry in entries or () if isinstance(entry, dict)]
        if model is None and len(names) == 1:
            return str(names[0])
        if model not in names:
            asked = "has several models: set teacher_server_model" if model is None else f"does not serve {model!r}"
            raise ValueError(f"the teacher's server {self.url} {asked} (it serves: {', '.join(map(str, names))})")
        return str(model)

    def prompt_log_probs(self, prompts: list[list[int]], k: int) -> list[list[Listed]]:
        """For each prompt and each of its tokens but the first: the token itself and the k likeliest.

        Raises:
            ValueError: the server refuses, or its answer is not of these prompts or no probabilities.
            ConnectionError: it cannot be reached, or gave no answer after several tries.
        """
        body = {"model": self.model, "prompt": prompts, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        answer = self._request("POST", "/v1/completions", body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != len(prompts):
            raise self._nonsense(f"{len(prompts)} prompts were sent, the answer is {_short(answer)}")
        found = []
        for prompt, choice in zip(prompts, sorted(choices, key=lambda choice: choice["index"]), strict=True):
            places = choice.get("prompt_logprobs")
            if places is None:
                raise self._nonsense("it has no prompt_logprobs, which vLLM gives and few others do")
            if not isinstance(places, list) or len(places) != len(prompt):
                raise self._nonsense(f"a prompt of {len(prompt)} tokens has prompt_logprobs {_short(places)}")
            found.append([self._listed(place, token, k) for place, token in zip(places[1:], prompt[1:], strict=True)])
        return found

    def _listed(self, place: Any, token: int, k: int) -> Listed:
        try:
            listed = {int(name): {**entry, "logprob": float(entry["logprob"])} for name, entry in place.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._nonsense(f"the log-probabilities of a token are {_short(place)}") from None
        log_probs = [entry["logprob"] for entry in listed.values()]
        if any(math.isnan(x) or x > 1e-3 for x in log_probs) or sum(map(math.exp, log_probs)) > 1.001:
            raise self._nonsense(f"these are no log-probabilities: {_short(place)}")
        if token not in listed:
            raise self._nonsense(
                f"it says nothing of token {token}, which was sent, but of {_short(sorted(listed))}: it has another "
                "tokenizer or changes prompts"
            )
        if len(listed) < k:
            raise self._nonsense(
                f"{k} tokens a position were asked for, it gives {len(listed)}: start it with --max-logprobs {k}, or "
                "lower teacher_top_k"
            )
        return listed

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            answer = self._pool.request(method, self.url + path, json=body, headers=headers, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(
                f"the teacher's server {self.url} gave no answer in {_TRIES + 1} tries ({self._reason(error)}). Start "
                "it again; a run continues with --resume_from_checkpoint, a capture with the same command"
            ) from None  # the chain would repeat the request
        if answer.status != 200:
            raise self._refusal(answer)
        try:
            return answer.json()
        except ValueError:
            raise self._nonsense(f"it is no JSON: {_short(answer.data[:200].decode(errors='replace'))}") from None

    def _reason(self, error: Exception) -> str:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, urllib3.exceptions.ReadTimeoutError):
            return f"not within {self.timeout:g} s; teacher_server_timeout waits longer"
        return self._without_key(str(getattr(reason, "args", [reason])[-1]))

    def _refusal(self, answer: Any) -> Exception:
        text = answer.data.decode(errors="replace")
        try:
            error = json.loads(text)["error"]
            text = error["message"] if isinstance(error, dict) else str(error)
        except (ValueError, KeyError, TypeError):
            pass  # then it is the text itself
        said = f"the teacher's server {self.url} answers {answer.status}: {self._without_key(text.strip()[:400])}"
        if answer.status in (401, 403):
            return ValueError(f"{said}. Put its key into the environment as {API_KEY}")
        if answer.status in _BUSY:
            return ConnectionError(f"{said}, {_TRIES + 1} times. A run continues with --resume_from_checkpoint")
        if "logprobs" in text:
            return ValueError(f"{said}. Start it with a larger --max-logprobs, or lower teacher_top_k")
        return ValueError(said)

    def _nonsense(self, what: str) -> ValueError:
        return ValueError(f"the answer of the teacher's server {self.url} cannot be used: {self._without_key(what)}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
