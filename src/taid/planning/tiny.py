"""Small models of large ones' architecture, and tokenizers of a given shape: what a dry run is made of.

A model keeps its class and all that decides which code runs: its kind of attention, its norms and positions, soft
caps, experts, whether embeddings are tied, and the rows of its vocabulary. It is narrow and shallow.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

_HEADS = 4
# What architectures call the sizes beside those that all of them have: each becomes the width, or at most this number.
_WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "ffn_dim",
)  # fmt: skip
_AT_MOST = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32,
    "max_window_layers": 2,
}  # fmt: skip
_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ message['role'] + ': ' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else %}{{ message['content'] + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
)


# A part of a message may be an image; InternVL's processor puts the rest of its tokens around the placeholder.
_VISION_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ message['role'] + ': ' }}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{%- else %}{{ part['text'] }}{%- endif %}{%- endfor %}"
    "{{ eos_token + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
)


def config_like(config: Any, *, hidden_size: int = 32) -> Any:
    """The configuration of a small model that runs the code of a large one.

    Args:
        config: of a causal or vision-language model; it is left as it is.
        hidden_size: the width of the small one, a multiple of 16.

    Returns:
        The same class and flags, `hidden_size` wide, with one layer of each kind and at least two.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads, groups = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    head_size = getattr(text, "head_dim", None)
    if head_size is not None and not hasattr(text, "qk_rope_head_dim"):  # latent attention's heads stay as they are
        # Where heads together are wider than the model, they stay so.
        text.head_dim = hidden_size // _HEADS * (2 if head_size * heads > text.hidden_size else 1)
    text.hidden_size = hidden_size
    if heads is not None:
        text.num_attention_heads = _HEADS
    if groups is not None:
        text.num_key_value_heads = _HEADS if groups == heads else min(groups, 2)
    _layers(text)
    for name in _WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 2 * hidden_size)
    for name, most in _AT_MOST.items():
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, min(value, most))
    _positions(text, getattr(text, "head_dim", None) or hidden_size // _HEADS)
    if getattr(small, "vision_config", None) is not None:
        _tower(small.vision_config, hidden_size)
    return small


def _tower(config: Any, hidden_size: int) -> None:
    """Make a vision tower narrow and shallow; what it makes of an image's size stays, so that processors fit."""
    sizes = {"num_hidden_layers": 2, "depth": 2, "num_attention_heads": _HEADS, "num_heads": _HEADS}
    sizes |= {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "out_hidden_size": hidden_size}
    for name, size in (sizes | {"embed_dim": hidden_size}).items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, size)
    if hasattr(config, "fullatt_block_indexes"):
        config.fullatt_block_indexes = [1]


def _layers(config: Any) -> None:
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    config.num_hidden_layers = max(2, len(kinds))
    if kinds and "layer_types" in vars(config):  # of some kinds it follows from the number
        config.layer_types = (kinds * 2)[: config.num_hidden_layers]


def _positions(config: Any, head_size: int) -> None:
    """Cut the factors that some kinds of rotary positions have for each pair of a head's numbers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    pairs = int(head_size * parameters.get("partial_rotary_factor", 1.0)) // 2
    for name, value in parameters.items():
        if name == "mrope_section":  # how many pairs tell time, height and width
            parts = [pairs * part // sum(value) for part in value[:-1]]
            parameters[name] = [*parts, pairs - sum(parts)]
        elif isinstance(value, list):
            parameters[name] = value[:pairs]


def tokenizer(
    *, ordinary: int, special: Sequence[str], family: str = "", bos_token: str | None = None,
    eos_token: str | None = None, pad_token: str | None = None, chat_template: bool = True,
    named: Mapping[str, str] | None = None,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """A tokenizer with so many tokens: the 256 bytes, tokens that no text has, and the special ones behind them.

    Args:
        ordinary: how many tokens are not special, at least 256.
        special: the special tokens in their order.
        family: tokenizers of two families differ in their ordinary tokens.
        bos_token: one of `special`, like the next two.
        eos_token: ends a turn.
        pad_token: None where the model has none.
        chat_template: whether it has one, in which the assistant's part is marked.
        named: further tokens by the names that a processor asks for.

    Raises:
        ValueError: fewer than 256 ordinary tokens, or a name that is not among the special ones.
    """
    standard = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
    for name, token in {**standard, **(named or {})}.items():
        if token is not None and token not in special:
            raise ValueError(f"{name} {token!r} is not among the special tokens {list(special)[:8]}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if ordinary < len(alphabet):
        raise ValueError(f"ordinary must be {len(alphabet)} or more, one token a byte, got {ordinary}")
    # The byte 255 is in no UTF-8 text, so that nothing is ever looked for in these.
    words = [*alphabet, *(f"\u00ff{family}{number}" for number in range(len(alphabet), ordinary))]
    bpe = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, extra_special_tokens=dict(named or {}),
        **{name: token for name, token in standard.items() if token is not None},
    )  # fmt: skip
    made.chat_template = _CHAT_TEMPLATE if chat_template else None
    return made


def processor(config: Any, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """The processor of a vision-language model, from its configuration and a tokenizer made by :func:`tokenizer`.

    Raises:
        ValueError: of which architectures one can be made; or a package is missing.
    """
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    if config.model_type != "internvl":
        raise ValueError(
            f"a processor in miniature is made of internvl only, not of {config.model_type}: name a folder that holds "
            "this one"
        )
    height, width = config.vision_config.image_size
    size = {"height": height, "width": width}
    try:
        of_images = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=12)
        of_videos = InternVLVideoProcessor(size=size)
    except ImportError as error:
        raise ValueError(f"vision-language models need torchvision: pip install torchvision ({error})") from error
    return InternVLProcessor(
        of_images, tokenizer, of_videos, image_seq_length=config.image_seq_length, chat_template=_VISION_CHAT_TEMPLATE
    )
