"""Read the output head of a model, and replace it by a function within one forward pass.

A fused loss needs the input of the output head, the head's weight, and the transformation of the logits after it. The
model's own forward runs, whatever its architecture, and calls the head. So hooks of DDP, FSDP and ZeRO fire as usual,
and the head's weights are gathered.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from taid.losses.distillation import DistillationLoss
from taid.losses.fused import Head

# What architectures call the number that logits are multiplied by (or, under the same name, divided), and the cap.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")

_REMEDY = "Set fused: false to compute the loss from this model's logits."


class OutputHead:
    """The output head of one model.

    Args:
        model: a causal language model, with or without a peft adapter around it.
        role: "student" or "teacher", for the messages.

    Raises:
        ValueError: only the head's own forward can compute it (quantized, an adapter with dropout), or the model
            transforms its logits in an unknown way; names which, and the remedy.
    """

    def __init__(self, model: Any, role: str) -> None:
        self.role = role
        # A folder that holds an adapter loads as its base model with the adapter inside, and has a peft_config too.
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.module: Any = base.get_output_embeddings()
        self._replacement: Callable[[Tensor], Tensor] | None = None
        self._result: DistillationLoss | None = None
        self._loss: Tensor | None = None
        self._whole: tuple[Tensor, Tensor | None] | None = None
        own_forward, model_forward = self.module.forward, base.forward

        def head_forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._replacement(hidden) if self._replacement else own_forward(hidden, *args, **kwargs)

        @functools.wraps(model_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = model_forward(*args, **kwargs)
            if self._loss is not None:
                # The loss has to be among the outputs: FSDP finds its way back through them.
                outputs.logits, outputs.loss = None, self._loss
            return outputs

        self.module.forward, base.forward = head_forward, forward
        self._hook = self.module.register_forward_hook(self._take_loss)
        self.weights()
        self.scale, self.softcap = self._probe(base)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the effective weight and bias, including those of a LoRA adapter."""
        if self._whole is not None:
            return self._whole
        module = self.module
        if isinstance(module, ModulesToSaveWrapper):
            saved, original = module.modules_to_save, module.original_module
            module = original if module.disable_adapters else saved[module.active_adapter]
        if isinstance(module, LoraLinear):
            return self._merged(module)
        if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
            raise ValueError(
                f"the {self.role}'s output head is a {type(module).__name__}, not a plain linear layer. {_REMEDY}"
            )
        return module.weight, module.bias

    def gather(self) -> None:
        """Gather and keep the whole of a frozen head that is split among processes; all of them have to call this."""
        weight, bias = self.weights()
        self._whole = _whole(weight), None if bias is None else _whole(bias)

    def _merged(self, module: LoraLinear) -> tuple[Tensor, Tensor | None]:
        base, weight = module.get_base_layer(), module.get_base_layer().weight
        adapters = (
            []
            if module.disable_adapters or module.merged
            else [a for a in module.active_adapters if a in module.lora_A]
        )
        plain = isinstance(base, nn.Linear) and weight.is_floating_point()
        for adapter in adapters:
            if not plain or module.use_dora.get(adapter) or module.lora_bias.get(adapter):
                raise ValueError(f"the {self.role}'s output head has an adapter that is no plain LoRA. {_REMEDY}")
            if not isinstance(module.lora_dropout[adapter], nn.Identity):
                raise ValueError(
                    f"the {self.role}'s output head has a LoRA adapter with dropout, which is not a matrix: set "
                    f"lora_dropout: 0, or take the head out of lora_target_modules. {_REMEDY}"
                )
            weight = weight + module.get_delta_weight(adapter)
        return weight, base.bias

    def head(self, ids: Tensor | None = None) -> Head:
        """Return the head for the fused loss, cut to `ids` if they are given."""
        return Head(*self.weights(), self.scale, self.softcap).at(ids)

    @contextlib.contextmanager
    def replaced_by(self, function: Callable[[Tensor], DistillationLoss | None]) -> Iterator[None]:
        """Call ``function(hidden)`` in place of the model's head within this context.

        If it returns a loss, the model returns it as ``outputs.loss``, without logits.
        """

        def replacement(hidden: Tensor) -> Tensor:
            self._result = function(hidden)
            if self._result is None:
                return hidden.detach()[..., :1]
            # ZeRO-3 and FSDP fetch the head's weight for the backward pass when one begins at what the head gave.
            return self._result.loss.repeat(*hidden.shape[:-1], 1)

        self.module._forward_hooks.move_to_end(self._hook.id)  # behind those of an engine that came later
        self._replacement = replacement
        try:
            yield
        finally:
            self._replacement = self._result = self._loss = None

    def _take_loss(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        """Extract the loss from the head's output, where the model expects logits."""
        if self._result is None:
            return None
        self._loss = output[(0,) * output.dim()].clone()
        return output.detach()

    @torch.no_grad()
    def _probe(self, model: Any) -> tuple[float, float | None]:
        """Find the factor and the soft cap that the model applies to its logits, by probing it with known ones."""
        seen: list[Tensor] = []
        weight = self.weights()[0]
        given = torch.tensor(
            [-100.0, -20.0, -3.0, -0.5, 0.0, 0.25, 4.0, 30.0], dtype=weight.dtype, device=weight.device
        )

        def replacement(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return given.expand(*hidden.shape[:-1], -1)

        self._replacement = replacement
        training = model.training
        model.eval()
        try:
            device = model.get_input_embeddings().weight.device
            device = weight.device if device.type == "meta" else device  # offloaded, and fetched when it is used
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            self._replacement = None
            model.train(training)
        if not seen or logits.shape[-1] != len(given) or seen[0].shape[-1] != weight.shape[1]:
            raise ValueError(
                f"the {self.role} ({type(model).__name__}) does not compute its logits by its output head. {_REMEDY}"
            )
        config = model.config.get_text_config()
        scales = [float(value) for name in _SCALES if (value := getattr(config, name, None))]
        softcaps = [float(value) for name in _SOFTCAPS if (value := getattr(config, name, None))]
        tolerance = 4 * torch.finfo(weight.dtype).eps
        for softcap in (None, *softcaps):
            for scale in (1.0, *scales, *(1 / scale for scale in scales)):
                expected = given.double() * scale
                expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
                if torch.allclose(logits[0, -1].double(), expected, rtol=tolerance, atol=tolerance):
                    return scale, softcap
        raise ValueError(
            f"the {self.role} ({type(model).__name__}) does something to its logits that is neither a factor nor a "
            f"soft cap of its configuration. {_REMEDY}"
        )


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
