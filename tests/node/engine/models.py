"""Model directories for the engine's tests: the shipped one, and random ones of each architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHIPPED = Path(__file__).parents[3] / "devnet" / "model" / "tally-demo-4m"

_TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": 100,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "dense": ("LlamaConfig", {"num_key_value_heads": 6}),
    "endless": ("LlamaConfig", {"eos_token_id": None}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-bias": (
        "LlamaConfig",
        {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ),
    "mistral-window": ("MistralConfig", {"sliding_window": 12}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
    ),
}
NAMES = tuple(_CONFIGS)


def save(name: str, target: Path, **overrides: Any) -> Path:
    """Write a random model of the named kind, from a fixed seed, with stand-in tokenizer files."""
    kind, extra = _CONFIGS[name]
    config = getattr(transformers, kind)(**{**_TINY, **extra, **overrides})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.2)
    model.save_pretrained(target)
    (target / "tokenizer.json").write_text("{}")
    (target / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return target


def reference(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model, for comparison."""
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy generation."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
        )
    return out[0, len(prompt) :].tolist()
