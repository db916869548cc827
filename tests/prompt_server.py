"""A server on this machine that answers as vLLM does, with a real model behind it, and misbehaves when told to.

    with PromptServer(model, tokenizer, fault=status(503, times=2)) as server:
        server.spoil = too_few(3)
        ...  # ask server.url; then look at server.requests

A request meets the fault, the key, the checks, the model and the spoil, in this order; only right answers are spoilt.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Answer = dict[str, Any]
Fault = Callable[["Handler", int, dict[str, Any]], bool]
Spoil = Callable[[Answer, int], Answer | bytes | None]


class PromptServer(ThreadingHTTPServer):
    """Serves `model` as `name` from entering the `with` to leaving it; `max_logprobs=-1` is the whole vocabulary."""

    path = "/v1/completions"
    request_queue_size = 64  # connections that wait to be accepted; with the usual 5 a burst of clients stalls

    def __init__(
        self, model, tokenizer, *, name="teacher", max_logprobs=20, max_model_len=None, api_key=None, fault=None
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.name, self.api_key = model, tokenizer, name, api_key
        self.rows = model.get_input_embeddings().weight.shape[0]
        self.max_logprobs = self.rows if max_logprobs == -1 else max_logprobs
        self.max_model_len = max_model_len
        self.fault: Fault | None = fault
        self.spoil: Spoil | None = None

        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[dict[str, Any]] = []  # what `path` was sent, in the order of arrival
        self.authorizations: list[str | None] = []  # of every request, whatever its path
        self.most_at_once = 0  # completions between arrival and the first byte of their answer

        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.in_flight: set[Handler] = set()
        self.connections: set[socket.socket] = set()
        self._model_lock = threading.Lock()  # fast tokenizers raise "Already borrowed" when two threads use them
        self._texts = [tokenizer.decode([token]) for token in range(self.rows)]

    def __enter__(self) -> PromptServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):  # those that are kept alive would outlive the server
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.stopping.set()  # last, or who waits for a slow answer might still get it

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may give up, and a server be stopped
            super().handle_error(request, client_address)

    def models(self) -> tuple[int, Answer]:
        """GET /v1/models: status and answer."""
        model = {"id": self.name, "object": "model", "created": int(time.time()), "owned_by": "vllm", "root": self.name}
        model |= {"parent": None, "max_model_len": self.max_model_len, "permission": []}
        return 200, {"object": "list", "data": [model]}

    def completions(self, body: dict[str, Any]) -> tuple[int, Answer]:
        """POST /v1/completions: status and answer. One greedy token is generated, whatever `max_tokens`."""
        prompts, k = body["prompt"], body.get("prompt_logprobs")
        if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
            prompts = [prompts]
        k = self.rows if k == -1 else k
        with self._model_lock, torch.no_grad():
            encode = self.tokenizer.encode
            prompts = [encode(p, add_special_tokens=False) if isinstance(p, str) else p for p in prompts]
            if refusal := self._refusal(body, prompts, k or 0):
                return refusal
            choices = [{"index": index} | self._choice(prompt, k) for index, prompt in enumerate(prompts)]
        read, written = sum(map(len, prompts)), len(prompts)
        usage = {"prompt_tokens": read, "total_tokens": read + written, "completion_tokens": written}
        answer = {"id": f"cmpl-{time.time_ns():x}", "object": "text_completion", "created": int(time.time())}
        return 200, answer | {"model": self.name, "choices": choices, "usage": usage}

    def _refusal(self, body: dict[str, Any], prompts: list[list[int]], k: int) -> tuple[int, Answer] | None:
        if (model := body.get("model", self.name)) != self.name:
            return error(404, f"The model `{model}` does not exist.")
        if (max_tokens := body.get("max_tokens", 16)) < 1 and not body.get("echo"):
            return error(400, f"max_tokens must be at least 1, got {max_tokens}.")
        if k > self.max_logprobs:
            allowed = f"which is greater than max allowed: {self.max_logprobs}"
            return error(400, f"Requested prompt logprobs of {k}, {allowed}")
        for prompt in prompts:
            if not prompt:
                return error(400, "The decoder prompt cannot be empty")
            if unknown := [token for token in prompt if not 0 <= token < self.rows]:
                return error(400, f"Token id {unknown[0]} is out of vocabulary")
            if self.max_model_len is not None and len(prompt) + max_tokens > self.max_model_len:
                limit = f"This model's maximum context length is {self.max_model_len} tokens."
                asked = f"you requested {max_tokens} output tokens and your prompt contains {len(prompt)} input tokens"
                return error(400, f"{limit} However, {asked}. Please reduce the length of either one.")
        return None

    def _choice(self, prompt: list[int], k: int | None) -> Answer:
        tokens_T = torch.tensor(prompt, device=self.model.device)
        logits_TV = self.model(input_ids=tokens_T[None], use_cache=False).logits[0].float()
        choice = {"text": self._texts[logits_TV[-1].argmax()], "logprobs": None}
        choice |= {"finish_reason": "length", "stop_reason": None, "prompt_logprobs": None}
        if k is None:
            return choice
        logprobs_TV = logits_TV[:-1].log_softmax(-1).clamp(min=-9999.0)  # vLLM's stand-in for -inf, which JSON lacks
        sent_T1 = logprobs_TV.gather(1, tokens_T[1:, None])
        sent = zip(prompt[1:], sent_T1[:, 0].tolist(), (logprobs_TV >= sent_T1).sum(-1).tolist(), strict=True)
        top = logprobs_TV.topk(min(k, logprobs_TV.shape[1]))
        places: list[Answer | None] = [None]
        for first, tokens, logprobs in zip(sent, top.indices.tolist(), top.values.tolist(), strict=True):
            listed = [first, *zip(tokens, logprobs, range(1, len(tokens) + 1), strict=True)]
            places.append({str(i): {"logprob": p, "rank": r, "decoded_token": self._texts[i]} for i, p, r in listed})
        return choice | {"prompt_logprobs": places}


class Handler(BaseHTTPRequestHandler):
    """One connection. A fault is given it, to `send` what it likes or to set `close_connection`."""

    server: PromptServer
    protocol_version = "HTTP/1.1"  # keeps connections alive
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait 40 ms for the first

    def send(self, code: int, payload: Answer | bytes, headers: dict[str, Any] | None = None) -> None:
        """Answer; `headers` replace or join the usual two."""
        self._leave()  # before the first byte, since who reads the last one may ask again at once
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        kind = "text/html" if data.startswith(b"<") else "application/json"
        self.send_response(code)
        for header, value in ({"Content-Type": kind, "Content-Length": len(data)} | (headers or {})).items():
            self.send_header(header, str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.authorizations.append(self.headers["Authorization"])
        self.send(*self._checked("/v1/models", self.server.models))

    def do_POST(self) -> None:
        self.server.authorizations.append(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != self.server.path:
            self.send(*error(404, "Not Found"))
            return
        number = self._enter(body)
        try:
            if self.server.fault is not None and self.server.fault(self, number, body):
                return
            code, answer = self._checked(self.server.path, lambda: self.server.completions(body))
            spoilt = self.server.spoil(answer, number) if self.server.spoil is not None and code == 200 else None
            self.send(code, answer if spoilt is None else spoilt)
        finally:
            self._leave()

    def _checked(self, path: str, answer: Callable[[], tuple[int, Answer]]) -> tuple[int, Answer]:
        if self.server.api_key is not None and self.headers["Authorization"] != f"Bearer {self.server.api_key}":
            return 401, {"error": "Unauthorized"}
        return answer() if self.path == path else error(404, "Not Found")

    def _enter(self, body: dict[str, Any]) -> int:
        with self.server.lock:
            self.server.requests.append(body)
            self.server.in_flight.add(self)
            self.server.most_at_once = max(self.server.most_at_once, len(self.server.in_flight))
            return len(self.server.requests) - 1

    def _leave(self) -> None:
        with self.server.lock:
            self.server.in_flight.discard(self)

    def handle(self) -> None:
        self.server.connections.add(self.connection)
        try:
            super().handle()
        finally:
            self.server.connections.discard(self.connection)

    def log_message(self, *_) -> None:
        pass


def error(code: int, message: str) -> tuple[int, Answer]:
    """A status and vLLM's body for it."""
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(code, "InternalServerError")
    return code, {"error": {"message": message, "type": kind, "param": None, "code": code}}


# Faults, for the first `times` requests to arrive at the server, or for all. One that is sent again counts again.


def status(code: int, times: int | None = None, headers: dict[str, str] | None = None) -> Fault:
    """Answers with this status; `headers` for a Retry-After, say."""
    return _first(times, lambda handler, body: handler.send(*error(code, "A fault of the test's"), headers))


def dropped(times: int | None = None) -> Fault:
    """Closes the connection without an answer."""
    return _first(times, lambda handler, body: setattr(handler, "close_connection", True))


def cut_short(times: int | None = None) -> Fault:
    """Closes the connection in the middle of the right answer."""

    def send_half(handler: Handler, body: dict[str, Any]) -> None:
        data = json.dumps(handler.server.completions(body)[1]).encode()
        handler.close_connection = True
        handler.send(200, data[: len(data) // 2], {"Content-Length": len(data)})

    return _first(times, send_half)


def slow(seconds: float, times: int | None = None) -> Fault:
    """Waits, then lets the right answer through."""
    wait = _first(times, lambda handler, body: handler.server.stopping.wait(seconds))
    return lambda handler, number, body: wait(handler, number, body) and False


def _first(times: int | None, misbehave: Callable[[Handler, dict[str, Any]], Any]) -> Fault:
    def fault(handler: Handler, number: int, body: dict[str, Any]) -> bool:
        if times is not None and number >= times:
            return False
        misbehave(handler, body)
        return True

    return fault


# Spoils. They change the answer in place, or return what is sent instead of it.


def wrong_json(answer: Answer, number: int) -> bytes:
    """A body that is not JSON, under a status of 200."""
    return b'{"id": "cmpl-0", "choices": [}'


def an_html_page(answer: Answer, number: int) -> bytes:
    """The page of something else that listens there, under a status of 200."""
    return b"<!DOCTYPE html><html><body><h1>Welcome to nginx!</h1></body></html>"


def no_prompt_logprobs(answer: Answer, number: int) -> None:
    """The field is missing, as from a server without this extension of vLLM's."""
    for choice in answer["choices"]:
        del choice["prompt_logprobs"]


def one_choice_missing(answer: Answer, number: int) -> None:
    """The last prompt has no answer."""
    answer["choices"].pop()


def a_position_missing(answer: Answer, number: int) -> None:
    """The last token of each prompt is not listed."""
    for choice in answer["choices"]:
        choice["prompt_logprobs"].pop()


def too_few(k: int) -> Spoil:
    """The first k entries of each place: the token that was sent, then the likeliest."""
    return lambda answer, number: _each_place(answer, lambda place: dict(list(place.items())[:k]))


def other_tokens(answer: Answer, number: int) -> None:
    """Each id is one more than it should be."""
    _each_place(answer, lambda place: {str(int(i) + 1): entry for i, entry in place.items()})


def other_vocabulary(tokenizer) -> Spoil:
    """The text of each id is that of id + 7."""
    return lambda answer, number: _each_entry(answer, lambda i: {"decoded_token": tokenizer.decode([i + 7])})


def mass_above_one(answer: Answer, number: int) -> None:
    """Each logprob is -0.1."""
    _each_entry(answer, lambda i: {"logprob": -0.1})


def not_a_number(answer: Answer, number: int) -> None:
    """The very last logprob is NaN."""
    _last_entry(answer)["logprob"] = float("nan")


def positive(answer: Answer, number: int) -> None:
    """The very last logprob is 0.5."""
    _last_entry(answer)["logprob"] = 0.5


def _each_place(answer: Answer, change: Callable[[Answer], Answer]) -> None:
    for choice in answer["choices"]:
        choice["prompt_logprobs"][1:] = map(change, choice["prompt_logprobs"][1:])


def _each_entry(answer: Answer, change: Callable[[int], Answer]) -> None:
    _each_place(answer, lambda place: {i: entry | change(int(i)) for i, entry in place.items()})


def _last_entry(answer: Answer) -> Answer:
    return list(answer["choices"][-1]["prompt_logprobs"][-1].values())[-1]
