"""Small vision-language models and their real processors, of the architectures that people distil; random weights."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

ARCHITECTURES = ("internvl", "qwen2_vl", "qwen2_5_vl", "smolvlm", "idefics3", "llava")

_SIZE = 16  # pixels a side of a tile
_SPECIAL = {
    "internvl": ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
    "qwen2_vl": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
    "smolvlm": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    + [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)],
    "llava": ["<image>"],
}
_SPECIAL |= {"qwen2_5_vl": _SPECIAL["qwen2_vl"], "idefics3": _SPECIAL["smolvlm"]}
_PLACEHOLDER = {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{ 'PLACEHOLDER' }}{%- else %}{{ part['text'] }}{%- endif %}{%- endfor %}"
    "{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def make_processor(architecture: str, *, tokens: int = 300, size: int = _SIZE, tiles: int = 4) -> Any:
    """A byte-level tokenizer of `tokens` tokens beside the architecture's image tokens, and its image processor."""
    special = _SPECIAL[architecture]
    named = {}
    if architecture == "internvl":
        names = ("context_image_token", "start_image_token", "end_image_token", "video_token")
        named = dict(zip(names, special, strict=True))
    tokenizer = _tokenizer(tokens, special, named)
    template = _TEMPLATE.replace("PLACEHOLDER", _PLACEHOLDER.get(architecture, special[0]))
    if architecture.startswith("qwen2"):
        images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=size * size, max_pixels=4 * size * size)
        videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
        kind = Qwen2VLProcessor if architecture == "qwen2_vl" else Qwen2_5_VLProcessor
        return kind(images, tokenizer, videos, chat_template=template)
    if architecture == "internvl":
        square = {"height": size, "width": size}
        images = GotOcr2ImageProcessor(size=square, crop_to_patches=tiles > 1, min_patches=1, max_patches=tiles)
        videos = InternVLVideoProcessor(size=square)
        length = (size // 4) ** 2 // 4
        return InternVLProcessor(images, tokenizer, videos, image_seq_length=length, chat_template=template)
    if architecture == "llava":
        images = CLIPImageProcessor(size={"height": size, "width": size}, do_center_crop=False)
        return LlavaProcessor(
            images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=template,
        )  # fmt: skip
    options = {"size": {"longest_edge": 2 * size}, "max_image_size": {"longest_edge": size}}
    length = (size // 4) ** 2 // 4
    if architecture == "idefics3":
        images = Idefics3ImageProcessor(**options, do_image_splitting=tiles > 1)
        return Idefics3Processor(images, tokenizer, image_seq_len=length, chat_template=template)
    images = SmolVLMImageProcessor(**options, do_image_splitting=tiles > 1)
    videos = SmolVLMVideoProcessor(**options, num_frames=2, fps=1)
    return SmolVLMProcessor(images, tokenizer, videos, image_seq_len=length, chat_template=template)


def make_vision_model(
    architecture: str, processor: Any, *, hidden_size: int = 32, layers: int = 2, vision_size: int = 32,
    vision_layers: int = 2, size: int = _SIZE, seed: int = 0, padded_to: int | None = None, spread: float = 0.2,
) -> Any:  # fmt: skip
    """A random model for a processor made by :func:`make_processor`, of `size` pixels a tile.

    `spread` is that of its weights: with the usual 0.02 every distribution is uniform, and every divergence zero.
    """
    tokenizer = processor.tokenizer
    text: dict[str, Any] = {
        "vocab_size": padded_to or len(tokenizer), "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        "initializer_range": spread, "tie_word_embeddings": False,
    }  # fmt: skip
    image_id = processor.image_token_id
    vision = {
        "hidden_size": vision_size, "intermediate_size": 2 * vision_size, "num_hidden_layers": vision_layers,
        "num_attention_heads": 4, "image_size": size, "patch_size": 4, "initializer_range": spread,
    }  # fmt: skip
    ids = {"image_token_id": image_id, "tie_word_embeddings": False}
    if architecture.startswith("qwen2"):
        rope = {"rope_type": "default", "mrope_section": [hidden_size // 32, hidden_size // 32, 2 * hidden_size // 32]}
        rope["mrope_section"][2] = hidden_size // 8 - 2 * (hidden_size // 32)
        start, end, video = (tokenizer.convert_tokens_to_ids(t) for t in _SPECIAL[architecture][1:])
        ids |= {"vision_start_token_id": start, "vision_end_token_id": end, "video_token_id": video}
        text["rope_parameters"] = {**rope, "rope_theta": 10_000.0}
        if architecture == "qwen2_vl":
            tower = {"embed_dim": vision_size, "hidden_size": hidden_size, "depth": vision_layers, "num_heads": 4,
                     "patch_size": 4, "spatial_merge_size": 2, "mlp_ratio": 2, "initializer_range": spread}  # fmt: skip
            config: Any = Qwen2VLConfig(text_config=text, vision_config=tower, **ids)
        else:
            tower = {"hidden_size": vision_size, "out_hidden_size": hidden_size, "depth": vision_layers,
                     "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "intermediate_size": 2 * vision_size,
                     "window_size": 16, "fullatt_block_indexes": [vision_layers - 1],
                     "initializer_range": spread}  # fmt: skip
            config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids)
    elif architecture == "internvl":
        vision |= {"image_size": [size, size], "patch_size": [4, 4]}
        config = InternVLConfig(text_config=Qwen2Config(**text), vision_config=vision,
                                image_seq_length=(size // 4) ** 2 // 4, downsample_ratio=0.5, **ids)  # fmt: skip
    elif architecture == "llava":
        tower = CLIPVisionConfig(**vision, projection_dim=vision_size)
        config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(**text), vision_feature_layer=-1,
                             image_seq_length=(size // 4) ** 2, **ids)  # fmt: skip
    else:
        kind = Idefics3Config if architecture == "idefics3" else SmolVLMConfig
        config = kind(text_config=LlamaConfig(**text), vision_config=vision, scale_factor=2,
                      pad_token_id=0, **ids)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config).eval()


def _tokenizer(tokens: int, special: list[str], named: dict[str, str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=tokens + len(special), special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(
        ["Which character is this? It is the letter alpha, beta or gamma of the alphabet."], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[2], pad_token=special[0],
        model_max_length=2048, extra_special_tokens=named,
    )  # fmt: skip
