r"""Measures of a student's distribution, token by token, and of the texts that it generates: pure functions.

``q`` is the student's distribution, ``p`` the teacher's, both over the ids that they share (``models.vocabulary``).
Logits are ``[..., V]`` of any float dtype and are computed with in float32. The caller adds up and divides once by the
number of tokens. Sums may be added over chunks, batches and processes: :class:`TokenSums` does, in float64.

Shapes: N trained tokens, M of them in a chunk, V shared ids, D and E the widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taid.losses.fused import Head
from taid.losses.kernels.head_matmul import HeadProducts
from taid.losses.kernels.torch_rows import block_rows
from taid.losses.objectives import reverse_kl

HEAD_TOKENS = 10
BINS = 15
# The bytes of one float32 tile [M, V]. On a GPU about ten live at once. On a CPU two do, because the row work goes
# through a tile by a few rows that stay in a core's cache: with 151,936 ids it takes 8 ms a token instead of 38.
_TILE_BYTES, _TILE_BYTES_CUDA = 2**26, 2**28


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return whether both have the same likeliest token: ``[...]``, 1 or 0; of equally likely ones the first counts."""
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float()


def head_mass(logits: Tensor, order_logits: Tensor) -> Tensor:
    """Return the probability that a model gives to the ten tokens that are likeliest to another.

    Args:
        logits: ``[..., V]``, the model's.
        order_logits: ``[..., V]``: by these the tokens are ordered. The TAID paper, which asks how much mass a student
            keeps there, does not say by whose; here it is the teacher's order, so that students of one teacher are
            asked about the same tokens.

    Returns:
        ``[...]``, float32, in [0, 1]. Equally likely tokens share the places that are left for them: by a uniform
        order it is ``10 / V``.

    Reference: Shing et al., "TAID", ICLR 2025, arXiv 2501.16937, the analysis of continued pre-training.
    """
    edge = order_logits.topk(count := min(HEAD_TOKENS, order_logits.shape[-1])).values[..., -1:]
    return _mass(logits, order_logits > edge, order_logits == edge, count)


def tail_mass(logits: Tensor, order_logits: Tensor) -> Tensor:
    """Return the probability that a model gives to the tokens from the 80th to the 100th percentile of another's order.

    From the likeliest token (0) to the least likely one (100), these are the last ``floor(V / 5)``. Arguments, ties
    and reference as in :func:`head_mass`; by a uniform order it is ``floor(V / 5) / V``.
    """
    if (count := order_logits.shape[-1] // 5) == 0:
        return logits.new_zeros(logits.shape[:-1], dtype=torch.float32)
    edge = order_logits.kthvalue(count, keepdim=True).values
    return _mass(logits, order_logits < edge, order_logits == edge, count)


def calibration_bins(logits: Tensor, labels: Tensor) -> Tensor:
    """Sort tokens by how sure the model is of its likeliest token, for :func:`calibration_error`.

    Args:
        logits: ``[N, V]``.
        labels: ``[N]``, int64, places among the V.

    Returns:
        ``[3, 15]``, float64 (float32 where the device has none): the number of tokens whose largest probability lies
        in ``((b - 1) / 15, b / 15]``, the sum of these probabilities, and how many of the likeliest tokens are the
        label. May be added over chunks and processes.
    """
    confidence, likeliest = _log_probs(logits).max(-1)
    confidence = confidence.exp()
    place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    member_NB = F.one_hot(place, BINS).to(_exact(logits))
    columns = (torch.ones_like(confidence), confidence, likeliest == labels)
    return torch.stack([column.to(member_NB) @ member_NB for column in columns])


def calibration_error(bins: Tensor) -> float:
    r"""Return the expected calibration error of a model's largest probability.

    .. math:: \sum_b \frac{n_b}{N} \left| \frac{correct_b}{n_b} - \frac{confidence_b}{n_b} \right|

    over 15 bins of equal width (:func:`calibration_bins`); in [0, 1], 0 where no token is counted.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599.
    """
    count, confidence, correct = bins.double().cpu()
    return float((correct - confidence).abs().sum() / count.sum().clamp(min=1))


@torch.no_grad()
def token_sums(
    student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor, *, own_order: bool = False
) -> dict[str, Tensor]:
    """Sum all measures over N tokens, by the plain formula.

    Args:
        student_NV: the student's logits.
        teacher_NV: the teacher's, or None.
        labels_N: the tokens to predict, int64, places among the V.
        own_order: take head and tail mass by the student's own order instead of the teacher's.

    Returns:
        Sums in float64 (float32 where the device has none): ``trained``, 0-dim, the number of tokens, ``calibration``,
        ``[3, 15]``, and with a teacher, 0-dim, ``reverse_kl`` (KL(q || p), nats), ``agreement``, ``head_mass`` and
        ``tail_mass``.
    """
    exact = _exact(student_NV)
    sums = {
        "trained": student_NV.new_full((), len(student_NV), dtype=exact),
        "calibration": calibration_bins(student_NV, labels_N),
    }
    if teacher_NV is None:
        return sums
    order_NV = student_NV if own_order else teacher_NV
    of_tokens = {
        "reverse_kl": reverse_kl(student_NV, teacher_NV),
        "agreement": agreement(student_NV, teacher_NV),
        "head_mass": head_mass(student_NV, order_NV),
        "tail_mass": tail_mass(student_NV, order_NV),
    }
    return sums | {name: values.sum(dtype=exact) for name, values in of_tokens.items()}


class TokenSums:
    """Sums of :func:`token_sums` from hidden states and output heads, in chunks: only a few ``[M, V]`` tiles exist.

    The trainer's loss calls it once a batch, as its ``watch``.

    Args:
        own_order: as in :func:`token_sums`.
    """

    def __init__(self, *, own_order: bool = False) -> None:
        self.own_order = own_order
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, student_hidden: Tensor, student_head: Head, teacher_hidden: Tensor | None, teacher_head: Head | None,
        labels: Tensor, vocabulary_size: int,
    ) -> None:  # fmt: skip
        """Add the trained tokens of a batch; arguments as in :func:`taid.fused_distillation_loss`."""
        trained = labels != -100
        device = student_hidden.device.type
        rows = _chunk_rows(vocabulary_size, device)
        block = rows if device == "cuda" else block_rows(vocabulary_size)
        with torch.autocast(device, enabled=False):  # it would round the tiles
            of_student = _logits(student_hidden[trained], student_head, vocabulary_size, rows)
            of_teacher = (
                None
                if teacher_hidden is None or teacher_head is None
                else _logits(teacher_hidden[trained], teacher_head, vocabulary_size, rows)
            )
            for student_MV, labels_M in zip(of_student, torch.split(labels[trained], rows), strict=True):
                teacher_MV = None if of_teacher is None else next(of_teacher)
                for start in range(0, max(1, len(labels_M)), block):
                    part = slice(start, start + block)
                    self._add(student_MV[part], None if teacher_MV is None else teacher_MV[part], labels_M[part])

    def _add(self, student_MV: Tensor, teacher_MV: Tensor | None, labels_M: Tensor) -> None:
        for name, value in token_sums(student_MV, teacher_MV, labels_M, own_order=self.own_order).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self, accelerator: Any) -> dict[str, float]:
        """Return means over all tokens of all processes, whose sums `accelerator` adds in one small all-reduce.

        Returns:
            Means a token under the names of :func:`token_sums`, and ``calibration_error``.
        """
        names = sorted(self._sums)
        parts = [self._sums[name].flatten() for name in names]
        total = accelerator.reduce(torch.cat(parts), "sum").cpu()
        sums = dict(zip(names, torch.split(total, [len(part) for part in parts]), strict=True))
        trained = sums.pop("trained").clamp(min=1)
        error = calibration_error(sums.pop("calibration").view(3, BINS))
        return {name: float(value / trained) for name, value in sums.items()} | {"calibration_error": error}


def _logits(hidden_ND: Tensor, head: Head, size: int, rows: int) -> Iterator[Tensor]:
    """Yield float32 logits ``[M, V]`` chunk by chunk.

    All chunks share one buffer: use each before asking for the next.
    """
    products = HeadProducts(head.weight.detach(), size, None, False)  # as precise as those of the loss
    finish = head.finish(size)
    tile = products.tile(min(rows, max(1, len(hidden_ND))))
    for part in torch.split(hidden_ND, rows):
        logits_MV = products.project(products.operand(part), tile)[: len(part)].float()
        finish.apply(logits_MV)
        yield logits_MV


def _chunk_rows(V: int, device: str) -> int:
    return max(1, (_TILE_BYTES_CUDA if device == "cuda" else _TILE_BYTES) // (4 * V))


def _mass(logits: Tensor, inside: Tensor, edge: Tensor, count: int) -> Tensor:
    """Return the probability of the tokens inside, and the share of that on the edge for which a place is left."""
    probs = _log_probs(logits).exp()
    share = (count - inside.sum(-1)) / edge.sum(-1)
    return (probs * inside).sum(-1) + share * (probs * edge).sum(-1)


def _log_probs(logits: Tensor) -> Tensor:
    logits = logits.float()
    return logits - logits.logsumexp(-1, keepdim=True)  # rounds less than log_softmax (taid.objectives)


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


# --- measures of text -------------------------------------------------------------------------------------------------


def rouge_l(reference: str, answer: str) -> float | None:
    """Return ROUGE-L: 2 P R / (P + R), P and R the shares of answer and reference in their longest common subsequence.

    Words are of the letters a-z and digits, in small letters and stemmed (Porter), as in the evaluation of
    Super-NaturalInstructions. None where the reference has no such word.

    Reference: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; the package rouge-score.
    """
    from rouge_score.rouge_scorer import RougeScorer  # comes with taid[evaluation] only
    from rouge_score.tokenize import tokenize

    if not tokenize(reference, None):
        return None
    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure)


def exact_match(reference: str, answer: str) -> bool:
    """Return whether both are the same text but for blanks around it."""
    return reference.strip() == answer.strip()


def distinct(samples: Iterable[Sequence[int]], n: int) -> float | None:
    """Return distinct-n: different n-grams of tokens / all n-grams, in all samples together; None where there is none.

    It falls as there is more text, whatever it is: compare at the same prompts, samples a prompt and lengths.

    Reference: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", arXiv 1510.03055.
    """
    grams = [tuple(sample[i : i + n]) for sample in samples for i in range(len(sample) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(groups: Sequence[Sequence[Sequence[int]]]) -> float | None:
    """Return self-BLEU: the mean BLEU of each sample with the other samples of its prompt as references, in [0, 1].

    1 where all samples of a prompt are the same, near 0 where they share nothing. BLEU is sacrebleu's of a sentence, of
    tokens up to 4-grams, or up to what the sample has; None where no prompt has two samples.

    Reference: Zhu et al., "Texygen", SIGIR 2018, arXiv 1802.01886; there of all samples of a model together.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="none", effective_order=True)
    texts = [[" ".join(map(str, sample)) for sample in group] for group in groups if len(group) > 1]
    return mean(
        min(bleu.sentence_score(sample, group[:i] + group[i + 1 :]).score / 100, 1.0)
        for group in texts
        for i, sample in enumerate(group)
    )


def mean(values: Iterable[float]) -> float | None:
    """Return the mean; None of no values."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
