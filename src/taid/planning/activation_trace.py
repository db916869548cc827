"""Trace the memory of a micro-batch beside the weights: run a model without weights, and count what it allocates.

On PyTorch's meta device tensors have shapes and no numbers, so that a forward and a backward pass of any architecture
take a second. Two things are not traced but stood in for, because they are kernels: attention, and the fused loss.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taid.losses.distillation import distillation_loss
from taid.losses.kernels import cpu_matmul
from taid.losses.kernels.head_matmul import chunk_rows

_FEW = (2, 4)  # layers
# What says that layers differ.
_UNLIKE = ("first_k_dense_replace", "mlp_only_layers", "full_attention_interval", "attn_layer_period")
_OFFLOADED = 1024  # numbers; TRL leaves smaller tensors where they are
# What autocast computes in 16 bits, and what in 32.
_LOWER = {F.linear, F.conv1d, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, torch.mm, torch.einsum,
          Tensor.matmul, Tensor.__matmul__, F.scaled_dot_product_attention}  # fmt: skip
_HIGHER = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax}


@dataclass(frozen=True)
class Batch:
    """A micro-batch of rows of one length.

    Attributes:
        rows: how many.
        length: tokens of each.
        is_masked: whether attention is given a matrix of who sees whom, as it is for padded and packed rows, unless
            it is FlashAttention.
        autocast: what products are computed in, if not in the dtype of the weights.
        device: "cuda" or "cpu".
    """

    rows: int
    length: int
    is_masked: bool
    autocast: torch.dtype | None
    device: str

    def inputs(self) -> dict[str, Tensor]:
        """Return the inputs of a model, on the meta device."""
        ids = torch.zeros(self.rows, self.length, dtype=torch.long, device="meta")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Loss:
    """Sizes that decide about the memory of a micro-batch's loss.

    Attributes:
        vocabulary: the ids that both models share.
        teacher: width and dtype of the teacher's hidden states, or None where it has none.
        is_fused: whether it is formed in tiles (:mod:`taid.losses.fused`), or by the plain formula.
    """

    vocabulary: int
    teacher: tuple[int, torch.dtype] | None
    is_fused: bool


class Moment(NamedTuple):
    """Bytes that a process holds at the moment of an allocation.

    Attributes:
        held: beside the weights and the gradients that are complete.
        done: of the gradients that are complete.
        number: how many these are.
    """

    held: int
    done: int
    number: int


@dataclass(frozen=True)
class Trace:
    """The allocations of a forward and a backward pass, of a whole model or of two with few layers.

    Of layers that are alike each adds the same to what is held at the two moments that can be the fullest: when the
    backward pass begins, with all that was kept for it, and at its end, with all gradients.

    Attributes:
        layers: of the model that is meant.
        of: moments of models with so many layers.
        gradients: bytes of all gradients, of the model that is meant.
    """

    layers: int
    of: dict[int, list[Moment]]
    gradients: float

    def peaks(self, *, share: float = 1.0, accumulates: bool = False) -> tuple[float, float]:
        """Return the bytes at the fullest moment early and late in the backward pass.

        Args:
            share: share of the gradients that a process keeps.
            accumulates: whether gradients of earlier micro-batches are held all the time.
        """
        own = 0.0 if accumulates else share
        halves: tuple[dict[int, float], ...] = ({}, {})
        for layers, moments in self.of.items():
            half = moments[-1].number / 2
            for is_late, peaks in enumerate(halves):
                peaks[layers] = max((m.held + own * m.done for m in moments if (m.number > half) == is_late), default=0)
        held = share * self.gradients if accumulates else 0
        early, late = (_extended(peaks, self.layers) + held for peaks in halves)
        return early, late


def _extended(values: Mapping[int, float], at: int) -> float:
    """Extend the line through two points to `at`, or return the only point."""
    (few, low), (more, high) = min(values.items()), max(values.items())
    return low if few == more else low + (high - low) * (at - few) / (more - few)


def trace_student(
    build: Callable[[Any], Any], config: Any, batch: Batch, loss: Loss, *, checkpoints: bool, offloads: bool
) -> Trace:
    """Trace a student's forward and backward pass.

    Args:
        build: makes a model of a configuration, on the meta device.
        config: the student's.
        batch: what it is given.
        loss: what is computed at its output head.
        checkpoints: whether layers are computed again in the backward pass instead of kept.
        offloads: whether what is kept for the backward pass goes to the CPU.
    """
    layers = config.get_text_config().num_hidden_layers
    of, gradients = {}, {}
    for number in _FEW if layers > max(_FEW) and _are_alike(config) else (layers,):
        of[number], gradients[number] = _moments(build(_shortened(config, number)), batch, loss, checkpoints, offloads)
    return Trace(layers, of, _extended(gradients, layers))


def _are_alike(config: Any) -> bool:
    text = config.get_text_config()
    lists = (v for v in vars(text).values() if isinstance(v, list) and len(v) == text.num_hidden_layers)
    return not any(vars(text).get(name) for name in _UNLIKE) and all(
        len(set(map(str, values))) == 1 for values in lists
    )


def _shortened(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def _moments(model: Any, batch: Batch, loss: Loss, checkpoints: bool, offloads: bool) -> tuple[list[Moment], int]:
    """Return the moments of a forward and a backward pass, and the bytes of all gradients."""
    model.train()
    kernels, held = _Kernels(batch), _Held(model)
    if checkpoints:
        again = {"context_fn": lambda: (contextlib.nullcontext(), kernels)}  # the backward pass knows no modes
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False} | again)
        model.enable_input_require_grads()  # as transformers' Trainer does for adapters
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(held.take) for weight in trained]
    with kernels, held, _head(model, batch, loss):
        of_teacher = loss.teacher and torch.empty(
            batch.rows, batch.length, loss.teacher[0], dtype=loss.teacher[1], device="meta"
        )
        with _offloading() if offloads else contextlib.nullcontext():
            total = model(**batch.inputs(), use_cache=False).logits
        del of_teacher
        kernels.cached = None
        torch.autograd.backward(total.sum())
    for hook in hooks:
        hook.remove()
    return held.moments, held.done


class _Held(TorchDispatchMode):
    """Count the bytes of tensors from allocation until nobody holds them; the weights of `model` do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.done = self.number = 0
        self.moments: list[Moment] = []
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            self._known[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = None
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, number: int) -> None:
        self.now += number
        if number > 0:
            self.moments.append(Moment(self.now, self.done, self.number))

    def take(self, weight: Tensor) -> None:
        """Note that the gradient of a weight is complete, and drop it."""
        self.done, self.number, weight.grad = self.done + weight.nbytes, self.number + 1, None


class _Kernels(TorchFunctionMode):
    """Attention that keeps no matrix of its own, and what autocast does to other devices."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.autocast, self.is_masked = batch.autocast, batch.is_masked
        self.cached: dict[Tensor, Tensor] | None = {}  # trained weights in 16 bits, for a forward pass

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.autocast is not None and (function in _LOWER or function in _HIGHER):
            dtype = self.autocast if function in _LOWER else torch.float32
            args = [self._to(value, dtype) for value in args]
            kwargs = {name: self._to(value, dtype) for name, value in (kwargs or {}).items()}
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], (kwargs or {}).get("attn_mask"))  # type: ignore[no-untyped-call]
        if function is torch._grouped_mm:  # which autocast leaves alone
            return _Experts.apply(*args[:2])  # type: ignore[no-untyped-call]
        if function is Tensor.__bool__:
            return not self.is_masked  # models ask whether all tokens are there, and belong together
        return function(*args, **(kwargs or {}))

    def _to(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad) or self.cached is None:
            return value.to(dtype)
        if value not in self.cached:
            self.cached[value] = value.to(dtype)
        return self.cached[value]


class _Attention(torch.autograd.Function):
    """Attention that keeps its inputs and output, one number a query, and a mask in the dtype of the products."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.to(query.dtype)
        out = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)  # its heads lie beside each other
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(kept) for kept in ctx.saved_tensors[:3]), None


class _Experts(torch.autograd.Function):
    """Products of each token with the weights of its expert."""

    @staticmethod
    def forward(ctx: Any, hidden_NK: Tensor, weight_EKM: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_NK, weight_EKM)
        return hidden_NK.new_empty(len(hidden_NK), weight_EKM.shape[-1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(
            torch.empty_like(kept) if wanted else None
            for kept, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        )


@contextlib.contextmanager
def _offloading() -> Iterator[None]:
    def away(kept: Tensor) -> Any:
        is_large = kept.numel() >= _OFFLOADED and not isinstance(kept, nn.Parameter)
        return (kept.shape, kept.dtype) if is_large else kept

    def back(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else torch.empty(packed[0], dtype=packed[1], device="meta")

    with saved_tensors_hooks(away, back):
        yield


@contextlib.contextmanager
def _head(model: Any, batch: Batch, loss: Loss) -> Iterator[None]:
    """Put the loss in the place of the output head."""
    head, own = (module := model.get_output_embeddings()), module.forward

    def fused(hidden: Tensor) -> Any:
        return _Fused.apply(hidden, head.weight, batch, loss)  # type: ignore[no-untyped-call]

    def plain(hidden: Tensor) -> Tensor:
        student_NV = own(hidden).flatten(0, -2)
        labels_N = torch.zeros(len(student_NV), dtype=torch.long, device="meta")
        if loss.teacher is None:
            return distillation_loss(student_NV, None, labels_N, "sft").loss
        teacher_NV = torch.empty_like(student_NV, dtype=loss.teacher[1])
        return distillation_loss(student_NV, teacher_NV, labels_N, "forward_kl").loss

    head.forward = fused if loss.is_fused else plain
    try:
        yield
    finally:
        head.forward = own


class _Fused(torch.autograd.Function):
    """Allocate what :func:`taid.fused_distillation_loss` does; its gradients are complete after the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, batch: Batch, loss: Loss) -> Tensor:
        N, V, empty = hidden.shape[:-1].numel(), loss.vocabulary, hidden.new_empty
        operand = batch.autocast or weight.dtype
        copies = [weight.to(operand)] if batch.device == "cuda" and weight.dtype != operand else []
        tile = torch.float32 if batch.device == "cuda" else operand
        sums = empty(V, weight.shape[1], dtype=torch.float32) if weight.requires_grad else None
        ctx.gradients = [torch.empty_like(hidden), sums]
        rows = chunk_rows(N, V, tile.itemsize, batch.device)
        widths = [weight.shape[1]] + ([] if loss.teacher is None else [loss.teacher[0]])
        tiles = [empty(rows, V, dtype=tile) for _ in widths]
        beside = weight.shape[1], cpu_matmul.slab_ids(V, operand) if batch.device == "cpu" else 0
        operands = [empty(rows, width, dtype=operand) for width in (*widths, *beside)]  # and what goes back
        del tiles, operands, copies
        if sums is not None and (sums.shape, sums.dtype) != (weight.shape, weight.dtype):
            ctx.gradients[1] = torch.empty_like(weight)
        return empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients, None, None
