"""Writes tally-moe-tiny: a mixture of experts with random weights, for audits of routing without a download.

It writes noise. What it is for is its shape: two layers choose two of eight experts for every token, so every record
carries a fingerprint of the choice, and a small replay shows whether the choice was honest. It is made by `python -m
devnet.model.moe`, the same bytes on every machine: weights are the raw words of PCG64, scaled. Its calibration.json is
measured (`tally profile calibrate --model devnet/model/tally-moe-tiny`), not written here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

HERE: Final = Path(__file__).parent
NAME: Final = "tally-moe-tiny"
TOKENIZER_OF: Final = "tally-demo-4m"
"""Whose tokenizer, chat template and end tokens it has."""

SEED: Final = 20_261_123
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 3, 4, 2, 16
EXPERTS, CHOSEN, DENSE_INNER, EXPERT_INNER = 8, 2, 128, 64

GAIN: Final = 1.5
"""Spread of a linear map's outputs over that of its inputs: enough that layers decide, not the embedding alone."""

ROUTER_GAIN, HEAD_GAIN = 2.0, 2.0  # of the routers' scores and the logits, for inputs of unit length per number


def shapes(vocab: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and gain of every tensor in the order they are drawn; gain 0: a norm, all ones."""
    yield "model.embed_tokens.weight", (vocab, HIDDEN), HIDDEN**0.5
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (HIDDEN,), 0
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{at}self_attn.{name}_proj.weight", (heads * HEAD_DIM, HIDDEN), GAIN
        for name in ("q", "k"):
            yield f"{at}self_attn.{name}_norm.weight", (HEAD_DIM,), 0
        yield at + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM), GAIN
        yield at + "post_attention_layernorm.weight", (HIDDEN,), 0
        if layer == 0:
            yield from _gated(at + "mlp.", DENSE_INNER)
            continue
        yield at + "mlp.gate.weight", (EXPERTS, HIDDEN), ROUTER_GAIN
        for expert in range(EXPERTS):
            yield from _gated(f"{at}mlp.experts.{expert}.", EXPERT_INNER)
    yield "model.norm.weight", (HIDDEN,), 0
    yield "lm_head.weight", (vocab, HIDDEN), HEAD_GAIN


def _gated(at: str, inner: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
    for name, shape in (("gate", (inner, HIDDEN)), ("up", (inner, HIDDEN)), ("down", (HIDDEN, inner))):
        yield f"{at}{name}_proj.weight", shape, GAIN


def weights(vocab: int) -> dict[str, torch.Tensor]:
    """All tensors in bf16: uniform, with a standard deviation of gain / sqrt(inputs)."""
    source = np.random.PCG64(SEED)
    made = {}
    for name, shape, gain in shapes(vocab):
        if not gain:
            made[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        words = source.random_raw(int(np.prod(shape)))  # 64 bits each; the upper half is used
        spread = (words >> np.uint64(32)).astype(np.float64) / 2.0**31 - 1.0  # [-1, 1)
        scaled = spread * gain * (3.0 / shape[-1]) ** 0.5
        made[name] = torch.from_numpy(scaled.astype(np.float32)).reshape(shape).to(torch.bfloat16)
    return made


def config(demo: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Qwen3 mixture of experts; vocabulary and token ids are the demo model's."""
    kept = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **{name: demo[name] for name in kept},
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": DENSE_INNER,
        "moe_intermediate_size": EXPERT_INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def build(target: Path) -> Path:
    """Write the model into `target`, beside what lies there. Raises: OSError."""
    demo = HERE / TOKENIZER_OF
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(demo / name, target / name)
    made = config(json.loads((demo / "config.json").read_text()))
    (target / "config.json").write_text(json.dumps(made, indent=2) + "\n")
    save_file(weights(made["vocab_size"]), target / "model.safetensors", metadata={"format": "pt"})
    return target


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=HERE / NAME, help="directory, made where it is missing")
    print(build(parser.parse_args().output))


if __name__ == "__main__":
    main()
