"""A Llama-family model directory as a GGUF file with its byte-level BPE tokenizer, so that token ids agree.

Source: llama.cpp, convert_hf_to_gguf.py (tensor names, the rotary permutation of query and key rows).
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file


def export(model_dir: Path, path: Path) -> None:
    """Write `path`. Weights in fp32: the exporter is for small models, and fp32 leaves greedy texts comparable."""
    config = json.loads((model_dir / "config.json").read_text())
    assert config["model_type"] == "llama"
    writer = gguf.GGUFWriter(path, "llama")
    _shape(writer, config)
    _tokenizer(writer, model_dir, config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        if name.endswith("q_proj.weight"):
            tensor = _permuted(tensor, heads)
        elif name.endswith("k_proj.weight"):
            tensor = _permuted(tensor, kv_heads)
        writer.add_tensor(_name(name), tensor.to(torch.float32).numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shape(writer: gguf.GGUFWriter, config: dict[str, object]) -> None:
    def number(name: str) -> int:
        value = config[name]
        assert isinstance(value, int)
        return value

    writer.add_context_length(number("max_position_embeddings"))
    writer.add_embedding_length(number("hidden_size"))
    writer.add_block_count(number("num_hidden_layers"))
    writer.add_feed_forward_length(number("intermediate_size"))
    writer.add_head_count(number("num_attention_heads"))
    writer.add_head_count_kv(number("num_key_value_heads"))
    writer.add_key_length(number("head_dim"))
    writer.add_value_length(number("head_dim"))
    writer.add_rope_dimension_count(number("head_dim"))
    writer.add_vocab_size(number("vocab_size"))
    writer.add_layer_norm_rms_eps(float(str(config["rms_norm_eps"])))
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _tokenizer(writer: gguf.GGUFWriter, model_dir: Path, config: dict[str, object]) -> None:
    document = json.loads((model_dir / "tokenizer.json").read_text())
    vocab = dict(document["model"]["vocab"])
    special = {token["content"]: token["id"] for token in document["added_tokens"]}
    by_id = {number: text for text, number in {**vocab, **special}.items()}
    size = config["vocab_size"]
    assert isinstance(size, int)
    control = set(special.values())
    kinds = [gguf.TokenType.CONTROL if n in control else gguf.TokenType.NORMAL for n in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id.get(number, f"[unused{number}]") for number in range(size)])
    writer.add_token_types([k if n in by_id else gguf.TokenType.UNUSED for n, k in enumerate(kinds)])
    merges = document["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    eos = config["eos_token_id"]
    assert isinstance(eos, int)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of one head from halves (Hugging Face's rotary form) to pairs (GGUF's). [rows, hidden]"""
    rows, hidden = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    parts = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name
