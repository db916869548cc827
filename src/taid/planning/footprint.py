"""Compute the memory of a process under each engine and place of the teacher, from configurations without weights."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from taid.models.loading import is_vision_language
from taid.planning.activation_trace import Batch, Loss, Trace, trace_student

ENGINES = ("ddp", "zero2", "fsdp2", "zero3")  # the less they send, the earlier
PLACEMENTS = ("replicated", "sharded", "cpu")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Numbers that an optimizer keeps of a weight, and the bytes of each; None is the size of the weight.
STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None), "adamw_torch_fused": (2, None), "adamw_bnb_8bit": (2, 1), "paged_adamw_32bit": (2, 4),
    "paged_adamw_8bit": (2, 1), "adamw_8bit": (2, 1), "lion_32bit": (1, 4), "lion_8bit": (1, 1), "sgd": (0, None),
}  # fmt: skip
_A_MACHINE = 8  # processes, which hold one sharded teacher together
# What DeepSpeed holds unless it is told otherwise: so many gradients that wait to be reduced, and gathered weights.
_BUCKET, _LIVE = 5 * 10**8, 10**9
# Bytes of a weight of a product, with the factors of its blocks; embeddings, norms and output head stay as they are.
QUANTIZED = {"bnb_8bit": 1.0, "bnb_4bit": 0.5625, "torchao_int8": 1.0, "torchao_int4": 0.53, "fp8": 1.0}


@dataclass(frozen=True, eq=False)
class Size:
    """Numbers of weights of a model.

    Attributes:
        config: its configuration.
        peft_config: configuration of the adapter that is trained in place of the weights, or None.
        weights: all weights, without an adapter's.
        trained: weights that are trained.
        used: weights that a token is multiplied with: all but an input embedding and the experts that it skips.
        products: weights that can be quantized: those of linear layers, without the output head.
        head: weights of the output head.
        layer: weights of the largest layer.
        layers: weights of all layers.
        can_be_cut: whether transformers cuts it up by layers, as processes hold a teacher together.
    """

    config: Any
    peft_config: Any
    weights: int
    trained: int
    used: float
    products: int
    head: int
    layer: int
    layers: int
    can_be_cut: bool

    def attention(self, length: float) -> float:
        """Return the forward FLOPs a token of causal attention's two products, in a row of `length` tokens."""
        text = self.config.get_text_config()
        if getattr(text, "num_attention_heads", None) is None:  # a state-space model
            return 0.0
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        window = getattr(text, "sliding_window", None)
        each = "full_attention" if window is None else "sliding_attention"
        kinds, window = getattr(text, "layer_types", None) or [each] * text.num_hidden_layers, window or length
        seen = {
            True: length / 2,
            False: min(window, length) * (1 - min(window, length) / (2 * length)),
        }
        return float(sum(4 * text.num_attention_heads * head * seen["sliding" not in kind] for kind in kinds))


def size(config: Any, *, rows: int | None = None, peft_config: Any = None) -> Size:
    """Count the weights of a model on the meta device.

    Args:
        config: its configuration.
        rows: how many rows its vocabulary is given instead of its own.
        peft_config: of an adapter that is trained in place of the weights.
    """
    if rows is not None:
        config.get_text_config().vocab_size = rows
    model = _model(config, torch.float32)
    weights = _count(model)
    text = config.get_text_config()
    skipped = 0.0
    if experts := next((number for name in _EXPERTS if (number := getattr(text, name, None))), None):
        of_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        skipped = of_experts * (1 - text.num_experts_per_tok / experts)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    used = weights - skipped - (0 if table is head.weight else table.numel())
    products = sum(_count(m) for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    layers = [_count(m) for m in model.modules() if type(m).__name__ in (model._no_split_modules or [])]
    if peft_config is not None:
        model = _model(config, torch.float32, peft_config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Size(
        config,
        peft_config,
        weights,
        trained,
        used,
        products,
        head.weight.numel(),
        max(layers, default=weights),
        sum(layers),
        any(name.endswith(".layers") for name, _ in model.named_modules()),
    )


def _model(config: Any, dtype: torch.dtype, peft_config: Any = None) -> Any:
    kind = AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(copy.deepcopy(config), dtype=dtype)  # which would write it down
        if peft_config is None:
            return model
        from peft import get_peft_model  # imports bitsandbytes and torch's compiler, which takes seconds

        return get_peft_model(model, copy.deepcopy(peft_config))  # which would write down what it finds


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@dataclass(frozen=True)
class Layout:
    """A way to spread a run over processes.

    Attributes:
        engine: one of :data:`ENGINES`, or "none" where a process is alone.
        placement: one of :data:`PLACEMENTS`, or "elsewhere": there is no teacher, or it is on disk or on a server.
        processes: how many.
    """

    engine: str
    placement: str
    processes: int

    def share(self, *engines: str) -> float:
        """Return the share that a process holds of something that these engines cut up."""
        return 1 / self.processes if self.engine in engines else 1.0


@dataclass(frozen=True)
class Footprint:
    """Everything but the layout that decides about a run's memory.

    Attributes:
        student: its weights.
        teacher: the teacher's, or None where none is loaded.
        dtype: of the student's weights as they are read.
        teacher_dtype: of the teacher's.
        batch: a micro-batch.
        loss: at the student's head.
        optimizer: by transformers' name.
        accumulates: whether a step has several micro-batches.
        checkpoints: whether layers are computed again in the backward pass.
        offloads: whether what is kept for the backward pass goes to the CPU.
        quantized: which of :data:`QUANTIZED` the student's frozen weights are, or None.
        teacher_quantized: the same of the teacher.
        traces: those that were made.
    """

    student: Size
    teacher: Size | None
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    batch: Batch
    loss: Loss
    optimizer: str
    accumulates: bool
    checkpoints: bool
    offloads: bool
    quantized: str | None = None
    teacher_quantized: str | None = None
    traces: dict[Any, Trace] = field(default_factory=dict, compare=False)

    def held(self, layout: Layout) -> dict[str, float]:
        """Return the bytes that each process holds at the fullest moment of a step, by purpose.

        Raises:
            ValueError: the student's forward pass cannot be traced; says why.
        """
        trained, low = self.student.trained, self.batch.autocast
        is_zero, is_fsdp = layout.engine.startswith("zero"), layout.engine == "fsdp2"
        # DeepSpeed holds the student in 16 bits, FSDP2 gathers it so, and autocast rounds weights for each product.
        held_in = low if low is not None and is_zero else self.dtype
        trace = self._trace(low if is_zero or is_fsdp else None)
        part = layout.share("zero2", "zero3", "fsdp2")
        gradients = part * trained * (4 if is_fsdp else held_in.itemsize)
        # DDP's gradients lie in its buckets, which stay, and ZeRO-3's in a buffer of their own.
        accumulates = self.accumulates or layout.engine in ("ddp", "zero3")
        kept, bucket = gradients, held_in.itemsize * _BUCKET
        if self.batch.device == "cpu":  # where memory is taken when it is written to
            bucket = min(bucket, held_in.itemsize * trained)
            kept, bucket = (gradients + bucket, 0) if layout.engine == "zero2" else (gradients, bucket)
        peaks = trace.peaks(share=kept / max(trace.gradients, 1), accumulates=accumulates)
        most, buffers = max(zip(peaks, self._engine(layout, bucket), strict=True), key=sum)
        number, each = STATES.get(self.optimizer, (math.nan, None))
        state = trained * number * (each or (4 if is_zero else self.dtype.itemsize))
        parts = {
            "weights": _stored(self.student, held_in, self.quantized) * layout.share("zero3", "fsdp2"),
            "gradients": gradients,
            "optimizer": part * (state + 4 * trained * is_zero),  # DeepSpeed's, with its weights in 32 bits
            "activations": max(most - gradients, 0.0),
            "buffers": buffers,
        }
        return parts | ({} if self.teacher is None else {"teacher": self._teacher(self.teacher, layout)})

    def _trace(self, dtype: torch.dtype | None) -> Trace:
        """Trace a student in `dtype` throughout, or as it is read and with autocast if that is None."""
        student, batch = self.student, self.batch if dtype is None else replace(self.batch, autocast=None)
        key = student, batch, self.loss, dtype, self.checkpoints, self.offloads
        if key not in self.traces:
            if getattr(student.config.get_text_config(), "num_attention_heads", None) is None:
                raise ValueError("what a state-space model keeps depends on its kernels")
            build = functools.partial(_model, dtype=dtype or self.dtype, peft_config=student.peft_config)
            try:
                self.traces[key] = trace_student(
                    build, student.config, batch, self.loss, checkpoints=self.checkpoints, offloads=self.offloads
                )
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"{type(error).__name__}: {reason}") from error
        return self.traces[key]

    def _teacher(self, teacher: Size, layout: Layout) -> float:
        if layout.placement == "replicated" or self.teacher_quantized is not None:
            return _stored(teacher, self.teacher_dtype, self.teacher_quantized)
        part = (
            teacher.weights / min(layout.processes, _A_MACHINE)
            if layout.placement in ("sharded", "tensor_parallel")
            else 0
        )
        # The head is gathered; one layer is computed while the next one comes.
        layers = 2 * teacher.layer if layout.placement != "tensor_parallel" else 0
        return self.teacher_dtype.itemsize * (part + teacher.head + layers)

    def _engine(self, layout: Layout, bucket: float) -> tuple[float, float]:
        """Return the bytes that an engine gathers or has yet to reduce, early and late in the backward pass."""
        student, computed_in = self.student, (self.batch.autocast or self.dtype).itemsize
        if layout.engine == "zero2":
            return bucket, bucket
        if layout.engine == "zero3":
            gathered = bucket + computed_in * min(student.weights, _LIVE)
            return gathered, gathered
        if layout.engine == "fsdp2":  # embedding and head go together, and their gradients wait for each other
            last = student.weights - student.layers + student.layer
            early = computed_in * (last + student.layer) + 4 * last  # with the layer that comes next
            return early, early - computed_in * student.layer - layout.share("fsdp2") * 4 * last  # not yet in parts
        return 0.0, 0.0


def _stored(size: Size, dtype: torch.dtype, quantized: str | None) -> float:
    adapter = size.trained if size.peft_config is not None else 0
    if quantized is None:
        return dtype.itemsize * (size.weights + adapter)
    return dtype.itemsize * (size.weights - size.products + adapter) + QUANTIZED[quantized] * size.products
