"""Writes a Llama-style Hugging Face directory as a GGUF file with the same bf16 numbers, for llama.cpp.

Source of names and of the row order of queries and keys: llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Final

_WHOLE: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _interleaved(tensor: Any, heads: int) -> Any:
    """llama.cpp rotates neighbours where transformers rotates halves: the rows of each head are shuffled to match."""
    rows = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, rows // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _renamed(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def export_gguf(model_dir: Path, target: Path) -> Path:
    """Write `target`. Raises: ImportError without the gguf package; KeyError for a tensor no Llama has."""
    gguf = importlib.import_module("gguf")
    torch = importlib.import_module("torch")
    safetensors = importlib.import_module("safetensors")
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    with safetensors.safe_open(model_dir / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            tensor = file.get_tensor(name)
            if "q_proj" in name or "k_proj" in name:
                tensor = _interleaved(tensor, heads if "q_proj" in name else kv_heads)
            if tensor.ndim == 1:
                writer.add_tensor(_renamed(name), tensor.float().numpy())
            else:
                raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
                writer.add_tensor(_renamed(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
