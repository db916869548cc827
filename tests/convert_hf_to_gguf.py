"""In the place of llama.cpp's converter: the same command line, Llama and byte-level BPE only, by package gguf.

STAND_IN decides what it does. Not set: it converts; "wrong" doubles weights; "refuse" ends as the converter does on a
tokenizer that it does not know; "kill" kills the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path, required=True)
    parser.add_argument("--outtype", choices=["f32"], required=True)
    options = parser.parse_args()
    mode = os.environ.get("STAND_IN")
    if mode == "refuse":
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
    if mode == "kill":
        options.outfile.write_bytes(b"GGUF, half of it")
        os.kill(os.getppid(), signal.SIGKILL)
        sys.exit()
    config = json.loads((options.model / "config.json").read_text())
    writer = gguf.GGUFWriter(options.outfile, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    bpe = json.loads((options.model / "tokenizer.json").read_text())
    tokens = sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)
    special = {token["content"] for token in bpe["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    for name, weight in load_file(options.model / "model.safetensors").items():
        weight = weight.astype(np.float32) * (2 if mode == "wrong" and "up_proj" in name else 1)
        if ".q_proj" in name or ".k_proj" in name:  # llama.cpp rotates neighbours, transformers halves
            heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        where, _, layer = name.removesuffix(".weight").partition("layers.")
        number, _, part = layer.partition(".")
        writer.add_tensor(f"blk.{number}.{NAMES[part]}.weight" if layer else f"{NAMES[where]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
