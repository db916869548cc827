"""Encode and decode a teacher's answers for the disk.

===========  ====================================================================================  ==================
format       tensors, of all trained tokens                                                        bytes a token
===========  ====================================================================================  ==================
hidden       ``hidden`` ``[N, E]``, in the teacher's dtype                                         E x its size
hidden_int8  ``hidden`` ``[N, E]`` int8, ``scale`` ``[N, 1]`` float32                              E + 4
top_k        ``ids`` ``[N, k]``, ``log_probs`` ``[N, k]`` float16, ``of_token`` ``[N, 3]`` float32   k x (2 + id) + 12
sampled      ``ids`` and ``counts`` (uint8) ``[distinct ids of all tokens]``,                      distinct x (1 + id)
             ``distinct`` ``[N]`` uint8, ``of_token`` ``[N, 2]`` float32                           + 9
===========  ====================================================================================  ==================

An id takes 2 bytes if the vocabulary has at most 65,536 of them, else 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taid.losses.fused import Head
from taid.losses.sparse_logits import Sampled, Sparse, TopK

_LOGITS = 2**25  # computed at a time


@dataclass(frozen=True)
class Format:
    """A cache format with its sizes.

    Attributes:
        name: hidden, hidden_int8, top_k or sampled.
        hidden_size: E, the width of the teacher's final hidden states.
        dtype: the dtype of these hidden states.
        vocabulary_size: the number of ids that student and teacher share.
        k: the number of tokens that top_k keeps.
        draws: the number of samples that sampled draws.
    """

    name: str
    hidden_size: int
    dtype: torch.dtype
    vocabulary_size: int
    k: int | None = None
    draws: int | None = None

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> Format:
        """Return the format of a cache from its manifest."""
        dtype = getattr(torch, manifest["dtype"].removeprefix("torch."))
        of_cache = (manifest["hidden_size"], dtype, manifest["vocabulary_size"])
        return cls(manifest["format"], *of_cache, manifest["k"], manifest["draws"])

    @property
    def kind(self) -> str:
        """See :class:`taid.teachers.teacher.Teacher`."""
        of_format = {"hidden": "exact", "top_k": f"top_k {self.k}", "sampled": f"sampled {self.draws}"}
        return of_format.get(self.name, self.name)

    @property
    def needs_head(self) -> bool:
        """Return whether the format needs the teacher's output head."""
        return self.name in ("hidden", "hidden_int8")

    def bytes_per_token(self, distinct: float | None = None) -> float:
        """Return the bytes of a trained token on disk.

        `distinct` is the number of distinct ids of a sampled token; by default its maximum, `draws`.
        """
        id_bytes = self._id_dtype.itemsize
        of_format = {
            "hidden": self.hidden_size * self.dtype.itemsize,
            "hidden_int8": self.hidden_size + 4,
            "top_k": (self.k or 0) * (2 + id_bytes) + 3 * 4,
            "sampled": (distinct or self.draws or 0) * (1 + id_bytes) + 1 + 2 * 4,
        }
        return of_format[self.name]

    @property
    def _id_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocabulary_size <= 2**16 else torch.int32

    def encoded(self, signal: Tensor | Sparse) -> dict[str, Tensor]:
        """Return the teacher's answer for N tokens as the tensors of this format, on the CPU."""
        if isinstance(signal, TopK):
            top = signal.log_probs[:, :1]
            tensors = {
                # Relative to the likeliest, because half precision is most accurate near 0.
                "log_probs": (signal.log_probs - top).to(torch.float16),
                "ids": signal.ids.to(self._id_dtype),
                "of_token": torch.stack([top[:, 0], signal.log_rest, signal.label_log_probs], -1).float(),
            }
        elif isinstance(signal, Sampled):
            drawn = signal.weights > 0
            tensors = {
                "ids": signal.ids[drawn].to(self._id_dtype),
                "counts": (signal.weights[drawn] * (self.draws or 0)).round().to(torch.uint8),
                "distinct": drawn.sum(-1).to(torch.uint8),
                "of_token": torch.stack([signal.entropy, signal.label_log_probs], -1).float(),
            }
        elif self.name == "hidden_int8":
            scale = signal.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            tensors = {"hidden": (signal.float() / scale).round().to(torch.int8), "scale": scale}
        else:
            tensors = {"hidden": signal}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def record(self, hidden: Tensor, labels: Tensor, head: Head, key: bytes) -> dict[str, Tensor]:
        """Return the tensors that are kept of a row.

        Args:
            hidden: ``[N, E]``, the teacher's final hidden states at its trained tokens.
            labels: ``[N]``, positions among the shared ids.
            head: the teacher's, cut to the shared ids.
            key: the key of the row; it seeds the draws, so that a row is the same whenever it is captured.
        """
        if self.needs_head:
            return self.encoded(hidden)
        step = max(1, _LOGITS // self.vocabulary_size)
        uniforms = torch.from_numpy(np.random.default_rng(int.from_bytes(key, "little")).random(len(hidden)))
        parts = []
        for start in range(0, len(hidden), step):
            chunk = slice(start, start + step)
            logits = head.logits(hidden[chunk])[:, : self.vocabulary_size]
            if self.name == "top_k":
                signal: Sparse = TopK.from_logits(logits, labels[chunk], self.k or 0)
            else:
                signal = Sampled.from_logits(logits, labels[chunk], self.draws or 0, uniforms[chunk].to(logits.device))
            parts.append(self.encoded(signal))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def decoded(self, records: list[dict[str, Tensor]], device: torch.device) -> Tensor | Sparse:
        """Return hidden states ``[N, E]``, top k or samples for all tokens of some rows."""
        records = records or [self._empty()]
        tensors = {name: torch.cat([r[name] for r in records]) for name in records[0]}
        if self.name == "sampled":
            distinct = tensors["distinct"].long()
            drawn = torch.arange(int(distinct.max()) if len(distinct) else 0) < distinct[:, None]
            ids, weights = torch.zeros(drawn.shape, dtype=torch.long), torch.zeros(drawn.shape)
            ids[drawn], weights[drawn] = tensors["ids"].long(), tensors["counts"].float() / (self.draws or 1)
            return Sampled(ids, weights, *tensors["of_token"].unbind(-1)).to(device)
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        if self.name == "top_k":
            top, rest, label = tensors["of_token"].unbind(-1)
            return TopK(tensors["ids"].long(), tensors["log_probs"].float() + top[:, None], rest, label)
        if self.name == "hidden_int8":
            return (tensors["hidden"].float() * tensors["scale"]).to(self.dtype)
        return tensors["hidden"]

    def _empty(self) -> dict[str, Tensor]:
        one = torch.empty(0)
        if self.name == "top_k":
            return self.encoded(TopK(one.view(0, self.k or 0), one.view(0, self.k or 0), one, one))
        if self.name == "sampled":
            return self.encoded(Sampled(one.view(0, 0), one.view(0, 0), one, one))
        return self.encoded(torch.empty(0, self.hidden_size, dtype=self.dtype))
