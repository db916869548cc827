"""The interface of a teacher, and its implementations: a loaded model, a server, or a cache.

The trainer and the objectives do not know which one it is. A teacher gets a batch and the labels of its trained tokens.
It answers with its final hidden states and head, which determine its whole distribution, or with some tokens of it
(:mod:`taid.losses.sparse_logits`).
"""

from __future__ import annotations

import logging
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, distributed, nn

from taid.losses.fused import Head, shifted
from taid.losses.sparse_logits import Sparse, TopK
from taid.models.output_head import OutputHead
from taid.models.vocabulary import Vocabulary
from taid.teachers.cache import Cache
from taid.teachers.sequences import Sequence, sequences
from taid.teachers.server import CONCURRENT, Listed, Server

logger = logging.getLogger(__name__)

_SPARE = 8
_TOKENS = 4096  # in the prompts of a request; an answer of 4,096 tokens with k = 64 is 18 MB of JSON
_ROUNDING = 1e-8  # the float32 error of 1 minus a sum of probabilities
# Total variation between a server and a local copy: bfloat16 moves the story teacher by 0.007, its student is 0.20 off.
_AGREEMENT = 0.05


class Hidden(NamedTuple):
    """Final hidden states ``[B, T, E]`` of a teacher, and its output head cut to the shared ids."""

    hidden: Tensor
    head: Head


class Teacher(ABC):
    """A frozen language model: a local one, one on a server, or a cache of its answers.

    Your subclass implements :meth:`__call__`. If its hidden states are available, extend :class:`ExactTeacher`.
    Pass it as ``TAIDTrainer(teacher_model=...)``, which captures it, trains from it and evaluates it.

    Attributes:
        kind: "exact", or the part of its distribution that its answers determine. Checkpoints record it.
        is_sharded: whether processes share its weights, so that all of them have to ask at once.
        prefetches: whether the trainer announces batches one step ahead.
        writer: the model that generates its answers (``seq_kd``), or None.
        autocast: makes the context that the teacher runs in.
        vocabulary: the token ids that student and teacher share; set by :meth:`start`.
    """

    kind = "exact"
    is_sharded = False
    prefetches = False
    writer: Any = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    vocabulary: Vocabulary

    def start(self, vocabulary: Vocabulary) -> None:
        """Set the ids that student and teacher share; the trainer calls this before any other method."""
        self.vocabulary = vocabulary

    @abstractmethod
    def __call__(self, inputs: dict[str, Any], labels: Tensor) -> Hidden | Sparse:
        """Answer for the trained tokens of a batch.

        Args:
            inputs: the arguments of a model's forward.
            labels: ``[B, T]``: the token that each position has to predict, -100 where it is not trained. Answers for
                untrained positions are not read.
        """

    def logits(self, inputs: dict[str, Any], labels: Tensor) -> Tensor | Sparse:
        """Answer for the plain formula (``fused: false``): logits ``[N, V]`` of the trained tokens over shared ids."""
        signal = self(inputs, labels)
        if isinstance(signal, Sparse):
            return signal
        return signal.head.logits(signal.hidden[labels != -100])[:, : len(self.vocabulary.ids)]

    def prefetch(self, batches: Iterable[dict[str, Any]]) -> None:  # noqa: B027
        """Announce the next batches, with labels that are not shifted yet; rows of all others may be dropped."""

    def answers(self, inputs: dict[str, Any], rows: list[Sequence]) -> Iterator[tuple[Sequence, Tensor | Sparse]]:
        """Yield rows of a batch one by one with the answers that a cache keeps: hidden states ``[N, E]``, or top k."""
        raise ValueError(f"a {type(self).__name__} cannot be captured: it gives no answer a row (Teacher.answers)")

    def properties(self, device: Any) -> dict[str, Any]:
        """Return the teacher's entries of a cache's manifest: rows of its head, width and dtype of hidden states."""
        raise ValueError(f"a {type(self).__name__} cannot be captured: it does not say what it is (Teacher.properties)")


class ExactTeacher(Teacher):
    """A teacher whose whole distribution is known, from its final hidden states and its output head."""

    @abstractmethod
    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Return the final hidden states ``[B, T, E]`` of a batch, without a gradient."""

    @abstractmethod
    def output_head(self) -> Head:
        """Return the output head over all of the teacher's ids: ``logits = head.logits(hidden)``."""

    def shared_head(self) -> Head:
        """Return the output head cut to the ids that student and teacher share."""
        return self.output_head().at(self.vocabulary.kept_ids)

    def __call__(self, inputs: dict[str, Any], labels: Tensor) -> Hidden:
        """See :class:`Teacher`."""
        hidden = self.hidden(inputs).to(labels.device)  # a teacher that device_map has spread may end on another one
        return Hidden(hidden, self.shared_head().to(labels.device))

    def example(self, device: Any) -> Tensor:
        """Return hidden states ``[1, 2, E]`` of arbitrary tokens, for their width, dtype and device."""
        return self.hidden({"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)})

    def answers(self, inputs: dict[str, Any], rows: list[Sequence]) -> Iterator[tuple[Sequence, Tensor]]:
        """Yield each row with its hidden states ``[N, E]`` at its trained tokens.

        Raises:
            ValueError: the hidden states are not finite; names the row and the remedy.
        """
        hidden = self.hidden(inputs)
        for row in rows:
            places = row.start + torch.from_numpy(row.positions).to(hidden.device)
            of_tokens = hidden[row.row, places]
            if not of_tokens.isfinite().all():
                raise ValueError(
                    f"the teacher's hidden states are not finite on the row that begins with tokens "
                    f"{row.ids[:8].tolist()}, in {str(of_tokens.dtype).removeprefix('torch.')}: float16 overflows "
                    "in many models, bfloat16 does not (teacher_model_init_kwargs' dtype, or bf16)"
                )
            yield row, of_tokens

    def properties(self, device: Any) -> dict[str, Any]:
        """See :class:`Teacher`."""
        example, rows = self.example(device), self.output_head().weight.shape[0]
        return {
            "teacher_rows": rows, "hidden_size": example.shape[-1], "dtype": str(example.dtype), "server_model": None
        }  # fmt: skip


class LocalTeacher(ExactTeacher):
    """A loaded model as the teacher.

    Args:
        model: frozen, in evaluation mode, on its device.
        vocabulary: the ids that student and teacher share.
        autocast: the context that it runs in.
        fused: whether the loss is fused, so that hidden states are needed.

    Raises:
        ValueError: its output head cannot be fused; says why and the remedy.
    """

    def __init__(
        self, model: Any, vocabulary: Vocabulary, autocast: Callable[[], AbstractContextManager[Any]], fused: bool
    ) -> None:
        self.model, self.vocabulary, self.autocast = model, vocabulary, autocast
        self.writer = model
        self.is_sharded = getattr(model, "is_distributed_loading_by_transformers", False)
        mesh = model._device_mesh["tp"] if (getattr(model, "tp_size", None) or 1) > 1 else None
        self._sharing = None if mesh is None else mesh.get_group()
        self._head = OutputHead(model, "teacher") if fused else None
        if self._head is not None and mesh is not None:
            self._head.gather()

    def output_head(self) -> Head:
        """See :class:`ExactTeacher`."""
        assert self._head is not None, "not fused"
        return self._head.head()

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Return the hidden states ``[B, T, E]``; the head itself is not computed."""
        head, hidden = self._head, list[Tensor]()
        assert head is not None, "not fused"

        def ask(inputs: dict[str, Any]) -> Tensor:
            with head.replaced_by(hidden.append):
                self.model(**inputs)
            return hidden.pop()

        return self._asked(ask, inputs)

    @torch.no_grad()
    def _asked(self, ask: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any]) -> Tensor:
        """Return ``ask(inputs)``.

        Under tensor parallelism, processes compute each product together and on the same tokens. So they take turns:
        all compute the first one's batch, then the second one's, and so on.
        """
        with self.autocast():
            if self._sharing is None:
                return ask(inputs)
            batches: list[Any] = [None] * distributed.get_world_size(self._sharing)
            distributed.all_gather_object(batches, send_to_device(inputs, "cpu"), self._sharing)
            own, answer = distributed.get_rank(self._sharing), None
            for rank, batch in enumerate(batches):
                said = ask(send_to_device(batch, self.model.device))
                answer = said if rank == own else answer
        assert answer is not None
        return answer

    def logits(self, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """See :class:`Teacher`."""
        logits = self._asked(lambda inputs: self.model(**inputs).logits, inputs)
        return self.vocabulary.select(logits[labels != -100])


class _RowTeacher(Teacher):
    """A teacher that answers row by row; threads fetch the next rows in advance."""

    prefetches = True

    def __init__(self, vocabulary: Vocabulary, threads: int) -> None:
        self.vocabulary = vocabulary
        self._threads = ThreadPool(threads)  # daemon threads: a run that stops does not wait for a server that hangs
        weakref.finalize(self, self._threads.terminate)
        self._coming: dict[bytes, AsyncResult[dict[bytes, Any]]] = {}

    @abstractmethod
    def _groups(self, rows: list[Sequence]) -> Iterator[list[Sequence]]:
        """Yield groups of rows that are fetched together."""

    @abstractmethod
    def _fetch(self, rows: list[Sequence]) -> dict[bytes, Any]:
        """Fetch the answer for each row; runs in a thread."""

    @abstractmethod
    def _joined(self, answers: list[Any], labels: Tensor) -> Hidden | Sparse:
        """Join the fetched answers of a batch's rows."""

    def _submit(self, rows: list[Sequence]) -> dict[bytes, AsyncResult[dict[bytes, Any]]]:
        answers = ((group, self._threads.apply_async(self._fetch, (group,))) for group in self._groups(rows))
        return {row.key: answer for group, answer in answers for row in group}

    def prefetch(self, batches: Iterable[dict[str, Any]]) -> None:
        """See :class:`Teacher`."""
        rows = (s for batch in batches for s in sequences(batch, shifted(batch["labels"])) if s.trained)
        wanted = {row.key: row for row in rows}
        self._coming = {key: answer for key, answer in self._coming.items() if key in wanted}
        self._coming |= self._submit([row for key, row in wanted.items() if key not in self._coming])

    def __call__(self, inputs: dict[str, Any], labels: Tensor) -> Hidden | Sparse:
        """See :class:`Teacher`."""
        rows = [s for s in sequences(inputs, labels) if s.trained]
        answers = self._coming | self._submit(list({s.key: s for s in rows if s.key not in self._coming}.values()))
        return self._joined([answers[row.key].get()[row.key] for row in rows], labels)


class CachedTeacher(_RowTeacher):
    """A cache as the teacher: it gives the same answer for the same row, whatever batch the row is in.

    Args:
        cache: a cache that was checked against the run.
        vocabulary: the ids that student and teacher share.
        device: the device of its answers.
    """

    def __init__(self, cache: Cache, vocabulary: Vocabulary, device: torch.device) -> None:
        super().__init__(vocabulary, threads=1)
        self.cache, self.kind = cache, cache.format.kind
        head = cache.head()
        self._head = None if head is None else head.at(vocabulary.kept_ids).to(device)

    def _groups(self, rows: list[Sequence]) -> Iterator[list[Sequence]]:
        yield from ([row] for row in rows)

    def _fetch(self, rows: list[Sequence]) -> dict[bytes, Any]:
        return {row.key: self.cache.read(row.key) for row in rows}

    def _joined(self, answers: list[Any], labels: Tensor) -> Hidden | Sparse:
        signal = self.cache.format.decoded(answers, labels.device)
        if isinstance(signal, Sparse):
            return signal
        assert self._head is not None
        hidden = signal.new_zeros(*labels.shape, signal.shape[-1])
        hidden[labels != -100] = signal
        return Hidden(hidden, self._head)


class ServedTeacher(_RowTeacher):
    """A served model as the teacher: the k likeliest tokens that the server lists, and the mass of the rest.

    Args:
        server: the server.
        vocabulary: the ids that student and teacher share; tokens of the teacher alone are left out, as with a local
            teacher.
        k: the number of tokens at each position.
        rows: the number of the teacher's ids, which may be more than the shared ones (own tokens, padding).
    """

    def __init__(self, server: Server, vocabulary: Vocabulary, k: int, rows: int | None = None) -> None:
        super().__init__(vocabulary, threads=CONCURRENT)
        self.server, self.k, self.rows = server, min(k, len(vocabulary.ids)), rows or len(vocabulary.ids)
        # A few more, because some of the likeliest may be tokens that only the teacher has.
        self.asked = min(self.k + _SPARE, self.rows) if self.rows > len(vocabulary.ids) else self.k
        self.kind = f"top_k {self.k}"
        self._shared = frozenset(vocabulary.ids)

    def _groups(self, rows: list[Sequence]) -> Iterator[list[Sequence]]:
        group: list[Sequence] = []
        for row in rows:
            if group and sum(len(other.ids) for other in group) + len(row.ids) > _TOKENS:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _fetch(self, rows: list[Sequence]) -> dict[bytes, Any]:
        answers = self.server.prompt_log_probs([row.ids.tolist() for row in rows], self.asked)
        return {row.key: self._top_k(row, places) for row, places in zip(rows, answers, strict=True)}

    def _top_k(self, row: Sequence, places: list[Listed], asked: int | None = None) -> TopK:
        asked = asked or self.asked
        found = [self._of_position(places[p], int(row.ids[p + 1]), asked) for p in row.positions]
        if None in found:  # the few more were not enough
            more = min(2 * asked, max(self.rows, self.k + _SPARE))
            if more == asked:
                raise ValueError(f"the teacher's server {self.server.url} lists too few tokens that the student has")
            return self._top_k(row, self.server.prompt_log_probs([row.ids.tolist()], more)[0], more)
        ids, *of_tokens = zip(*filter(None, found), strict=True)
        return TopK(self.vocabulary.position(torch.tensor(ids)), *map(torch.tensor, of_tokens))

    def _of_position(
        self, listed: Listed, label: int, asked: int
    ) -> tuple[list[int], list[float], float, float] | None:
        """Return ids, log-probabilities, log of the rest and the label's; None if fewer than k likeliest are shared."""
        shared = {i: entry["logprob"] for i, entry in listed.items() if i in self._shared}
        # One more than was asked for is the label, which is not among the likeliest.
        if len(shared) - (len(listed) > asked) < self.k:
            return None
        others = sum(math.exp(entry["logprob"]) for i, entry in listed.items() if i not in self._shared)
        log_shared = math.log(max(1 - others, _ROUNDING))
        ids = sorted(shared, key=shared.__getitem__, reverse=True)[: self.k]
        log_probs = [shared[i] - log_shared for i in ids]
        # A server tells no mass of the rest, and what it lists is rounded to float32.
        rest = max(1 - sum(map(math.exp, log_probs)), _ROUNDING)
        log_rest = -math.inf if self.k == len(self._shared) else math.log(rest)
        return ids, log_probs, log_rest, shared[label] - log_shared

    def answers(self, inputs: dict[str, Any], rows: list[Sequence]) -> Iterator[tuple[Sequence, TopK]]:
        """Yield each row with its top k, as the server answers."""
        answers = self._submit(rows)
        for row in rows:
            yield row, answers[row.key].get()[row.key]

    def properties(self, device: Any) -> dict[str, Any]:
        """Return the entries of a cache's manifest; a server's weights and options are unknown."""
        unknown = dict.fromkeys(("teacher_options", "teacher_config", "teacher_weights", "teacher_revision"))
        known = {"teacher_rows": self.rows, "hidden_size": 0, "dtype": str(torch.float32)}
        return unknown | known | {"server_model": self.server.model}

    def _joined(self, answers: list[Any], labels: Tensor) -> TopK:
        if not answers:
            none = torch.empty(0)
            answers = [TopK(none.view(0, self.k).long(), none.view(0, self.k), none, none)]
        return TopK.cat(answers).to(labels.device)

    def check(self, row: Sequence, tokenizer: Any, local: nn.Module | None) -> None:
        """Ask for one row, and compare the server's tokens and values with those of the teacher.

        Args:
            row: any row.
            tokenizer: the teacher's.
            local: a copy of the teacher to compare values with, or None.

        Raises:
            ValueError: tokens or values differ; shows both.
        """
        places = self.server.prompt_log_probs([row.ids.tolist()], self.asked)[0]
        said = {i: e["decoded_token"] for place in places for i, e in place.items() if e.get("decoded_token")}
        said = {i: text for i, text in said.items() if isinstance(text, str)}
        if not said:
            logger.warning(
                f"the teacher's server {self.server.url} does not say what its tokens are (decoded_token): whether "
                "they are those of the teacher's tokenizer is not known"
            )
        names = {i: (tokenizer.decode([i]), tokenizer.convert_ids_to_tokens(i)) for i in said}
        # A token that is a part of a letter has no text, and servers differ on blanks around words.
        others = [
            (i, names[i][0], text)
            for i, text in said.items()
            if "\ufffd" not in names[i][0] + text and text.strip() not in [str(name).strip() for name in names[i]]
        ]
        if len(others) > 0.05 * len(said):
            ids, ours, theirs = zip(*others[:8], strict=True)
            raise ValueError(
                f"the teacher's server {self.server.url} has other tokens than the tokenizer of the teacher: ids "
                f"{list(ids)} are {list(ours)} here and {list(theirs)} there. Set teacher_model_name_or_path to the "
                "model that is served"
            )
        if local is not None and places:
            self._compare(row, places, local)

    @torch.no_grad()
    def _compare(self, row: Sequence, places: list[Listed], local: nn.Module) -> None:
        device = next(local.parameters()).device
        ids = torch.from_numpy(row.ids)[None]
        log_p = local(input_ids=ids.to(device)).logits[0, :-1].float().log_softmax(-1).cpu()
        distances = []
        for p, place in zip(log_p, places, strict=True):
            listed = torch.tensor(list(place))
            theirs = torch.tensor([entry["logprob"] for entry in place.values()], dtype=torch.float32).exp()
            ours = p[listed].exp()
            distances.append(0.5 * ((ours - theirs).abs().sum() + (ours.sum() - theirs.sum()).abs()))
        mean, worst = torch.stack(distances).mean().item(), int(torch.stack(distances).argmax())
        if mean > _AGREEMENT:
            likeliest = sorted(places[worst], key=lambda i: -places[worst][i]["logprob"])[:5]
            ours_, theirs_ = ([round(float(x), 3) for x in of] for of in (
                log_p[worst, likeliest], [places[worst][i]["logprob"] for i in likeliest]))  # fmt: skip
            raise ValueError(
                f"the teacher's server {self.server.url} disagrees with the teacher here by {mean:.3f} (total "
                f"variation, a token; {_AGREEMENT} is allowed): after {worst + 1} tokens the log-probabilities of ids "
                f"{likeliest} are {ours_} here and {theirs_} there. Is it the same model, dtype and adapter?"
            )
