"""Generate answers with a model: in training, in evaluation, for a judge and in the check of an export.

Answers come from transformers' ``generate`` in one batch that is padded on the left. The caller passes all settings:
those of a model's generation_config.json, such as a repetition penalty, apply only if they are copied.

Shapes: B prompts, T tokens of the longest prompt, V rows of the output head.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from taid.models.vocabulary import Vocabulary


def decoding(ends: Sequence[int], padding: int, *, temperature: float | None = None) -> GenerationConfig:
    """Return settings for greedy decoding, or for sampling from the whole distribution at a temperature.

    Args:
        ends: token ids that end an answer; without any, only the maximal length ends it.
        padding: token id that pads shorter prompts and answers.
        temperature: divisor of the logits; None for greedy decoding.
    """
    sampling = {} if temperature is None else {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(eos_token_id=list(ends) or None, pad_token_id=padding, use_cache=True, **sampling)


def own_greedy_decoding(model: Any, padding: int) -> GenerationConfig:
    """Return the model's own generation_config.json with sampling and beams switched off."""
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, num_beams=1, pad_token_id=padding)
    return config


def generate(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, max_new_tokens: int,
    vocabulary: Vocabulary | None = None, samples: int = 1, seed: int | None = None,
    device: torch.device | None = None, **more: Any,
) -> list[list[int]]:  # fmt: skip
    """Generate answers to prompts, without dropout and without gradients.

    Args:
        model: a causal language model or an adapter on one; its mode and settings are restored afterwards.
        prompts: the token ids of each prompt.
        config: all settings, with the ids that end and pad an answer.
        max_new_tokens: the maximal length of an answer.
        vocabulary: the ids that may be generated (:class:`VocabularyMask`); None for all.
        samples: the number of answers to each prompt.
        seed: seeds PyTorch within this call only; None continues PyTorch's own random state.
        device: the device of the inputs; None for the model's.
        more: further arguments of transformers' ``generate``, such as ``streamer`` or ``synced_gpus``.

    Returns:
        The new token ids of each answer, up to and including its end token. Answers to one prompt are adjacent.
    """
    device = model.device if device is None else device
    inputs = _padded(prompts, config.pad_token_id, device)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs["output_router_logits"] = False  # the load balance is that of a batch, not of one token more
    if vocabulary is not None:
        more["logits_processor"] = [VocabularyMask(vocabulary)]
    with _generating(model, config), contextlib.nullcontext() if seed is None else _seeded(device, seed):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, num_return_sequences=samples, **more)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [up_to_end(answer, ends) for answer in output[:, inputs["input_ids"].shape[1] :].tolist()]


def up_to_end(tokens: list[int], ends: Sequence[int | None]) -> list[int]:
    """Cut an answer after its first end token."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


class VocabularyMask:
    """Logits processor that masks every id outside the shared vocabulary, padding rows included."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[B, V]`` with minus infinity where an id is not shared."""
        shared = self.vocabulary.index.to(scores.device)
        # Weights that are no longer finite still generate something, as nothing can be drawn from NaN: the step that
        # trains on it then stops the run, on all processes together, and says what to do about it.
        known = scores.index_select(1, shared).nan_to_num(0.0, posinf=1e30, neginf=-torch.inf).clamp(max=1e30)
        return torch.full_like(scores, -torch.inf).index_copy(1, shared, known)


def _padded(prompts: Sequence[Sequence[int]], padding: int, device: torch.device) -> dict[str, Any]:
    """Return ``input_ids`` and ``attention_mask``, int64 [B, T], padded on the left."""

    def batch(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_side="left", padding_value=value).to(device)

    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    return {"input_ids": batch(rows, padding), "attention_mask": batch([torch.ones_like(row) for row in rows], 0)}


@contextlib.contextmanager
def _generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let a model generate by `config` alone within this context, in evaluation mode and without gradients."""
    base = model.get_base_model() if is_peft_model(model) else model
    # `generate` fills what its arguments leave open from the model's own configuration.
    before, training = base.generation_config, model.training
    base.generation_config = config
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        base.generation_config = before
        model.train(training)


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed PyTorch within this context, and restore its random state afterwards."""
    devices = [] if device.type in ("cpu", "mps") else [device]  # Apple's GPUs have no fork
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
