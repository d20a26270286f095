"""The shape of a decoder, read from a model directory's config.json. No torch here.

One family has a forward pass of ours: pre-norm decoders with RMSNorm, rotary positions, grouped-query attention and
SiLU-gated MLPs, dense or mixture of experts. What differs inside the family is a field. Other architectures are
described by module_spec.py and served through their transformers module; what does not fit there is refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.errors import TallyError

SUPPORTED: Final = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)
ROPE_TYPES: Final = ("default", "linear", "llama3")
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"


class ModelError(TallyError):
    """A model directory that cannot be served; names the file and what to do."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions. `kind`: one of ROPE_TYPES; the other fields are read where the kind uses them."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of experts. `normalise`: the chosen experts' weights are made to sum to 1."""

    experts: int
    chosen: int
    intermediate: int
    normalise: bool
    dense_layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder. `window` 0: every token sees all before it. `max_positions`: tokens the model was made for.

    `module_parameters`: entries of the layers' matrices of a model that its transformers module computes, which has no
    `intermediate` or `rope` to speak of; 0 for one of SUPPORTED.
    """

    architecture: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    tied: bool
    qk_norm: bool
    window: int
    max_positions: int
    eos_ids: tuple[int, ...]
    rope: RopeSpec
    moe: MoeSpec | None
    module_parameters: int = 0

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def _mlp_parameters(self, active: bool) -> int:
        """Matrix entries of all MLPs; with `active`, those one token passes through."""
        dense = 3 * self.hidden * self.intermediate
        if self.moe is None:
            return self.layers * dense
        expert = 3 * self.hidden * self.moe.intermediate
        sparse = self.moe.experts * self.hidden + (self.moe.chosen if active else self.moe.experts) * expert
        dense_layers = len(self.moe.dense_layers)
        return dense_layers * dense + (self.layers - dense_layers) * sparse

    @property
    def body_parameters(self) -> int:
        """Entries of the matrices one token is multiplied by in the layers: no embedding, norms or biases."""
        if self.module_parameters:
            return self.module_parameters
        attention = self.hidden * self.qkv_rows + self.heads * self.head_dim * self.hidden
        return self.layers * attention + self._mlp_parameters(active=True)

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def idle_parameters(self) -> int:
        """Entries of experts that one token does not pass through."""
        if self.module_parameters:
            return 0
        return self._mlp_parameters(active=False) - self._mlp_parameters(active=True)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Raises: ModelError naming the file when it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ModelError(f"{path} is missing: {remedy}") from exc
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} cannot be read ({exc}): {remedy}") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object: {remedy}")
    return value


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files, sorted by name. Raises: ModelError."""
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir} is no directory: give the directory of a Hugging Face model")
    index = model_dir / INDEX_FILE
    if index.exists():
        weight_map = read_json(index, "download the model again").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map: download the model again")
        files = sorted({model_dir / str(name) for name in weight_map.values()})
    else:
        files = [model_dir / WEIGHTS_FILE]
    for file in files:
        if file.parent != model_dir:
            raise ModelError(f"{index} points outside its directory, at {file}: download the model again")
        if not file.is_file():
            raise ModelError(
                f"{file} is missing: only safetensors are loaded; download them, or convert with save_pretrained()"
            )
    return files


def load_spec(model_dir: Path) -> ModelSpec:
    """Read and check config.json and generation_config.json. Raises: ModelError."""
    weight_files(model_dir)
    path = model_dir / "config.json"
    config = read_json(path, "give the directory of a Hugging Face model")
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else "none"
    if config.get("quantization_config") is not None:
        raise ModelError(f"{path}: quantised checkpoints are not supported; use the bf16 or fp32 weights")
    if name not in SUPPORTED:
        from node.engine.module_spec import module_spec  # transformers takes seconds to import

        return module_spec(model_dir, name, eos_ids(model_dir, config))
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: hidden_act {config['hidden_act']!r} is not supported; supported is 'silu'")
    try:
        return _spec(model_dir, config, name)
    except (KeyError, TypeError, ValueError) as exc:
        raise ModelError(f"{path}: {exc!r} is missing or malformed: download the model again") from exc


def _spec(model_dir: Path, config: dict[str, Any], name: str) -> ModelSpec:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    layers = int(config["num_hidden_layers"])
    spec = ModelSpec(
        architecture=name,
        vocab=int(config["vocab_size"]),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate=int(config["intermediate_size"]),
        eps=float(config["rms_norm_eps"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=name.startswith("Qwen3"),
        window=_window(config, name, layers),
        max_positions=int(config["max_position_embeddings"]),
        eos_ids=eos_ids(model_dir, config),
        rope=_rope(config),
        moe=_moe(config, name, layers),
    )
    positive = (spec.vocab, spec.hidden, spec.layers, spec.kv_heads, spec.head_dim, spec.max_positions)
    if min(positive) < 1 or spec.heads % spec.kv_heads or spec.head_dim % 2:
        raise ValueError(f"heads {spec.heads}, kv_heads {spec.kv_heads}, head_dim {spec.head_dim} do not fit together")
    return spec


def _window(config: dict[str, Any], name: str, layers: int) -> int:
    """One window for all layers, or 0. Raises: ModelError when layers differ."""
    window = int(config.get("sliding_window") or 0)
    if name.startswith("Qwen"):
        if not config.get("use_sliding_window", False) or not window:
            return 0
        sliding = sum(kind == "sliding_attention" for kind in config.get("layer_types") or ["mixed"])
        if sliding != layers:
            raise ModelError(
                "config.json: windows in some layers only are not supported; all layers or none may have one"
            )
    return 0 if name == "LlamaForCausalLM" else window


def _rope(config: dict[str, Any]) -> RopeSpec:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before). Raises: ModelError."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in ROPE_TYPES:
        raise ModelError(f"config.json: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if float(scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ModelError("config.json: partial rotary positions are not supported")
    return RopeSpec(
        theta=float(scaling.get("rope_theta", config.get("rope_theta", 10_000.0))),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_context=int(
            scaling.get("original_max_position_embeddings", config.get("original_max_position_embeddings", 0))
        ),
    )


def _moe(config: dict[str, Any], name: str, layers: int) -> MoeSpec | None:
    if name == "MixtralForCausalLM":
        return MoeSpec(
            experts=int(config["num_local_experts"]),
            chosen=int(config["num_experts_per_tok"]),
            intermediate=int(config["intermediate_size"]),
            normalise=True,
            dense_layers=frozenset(),
        )
    if name == "Qwen3MoeForCausalLM":
        every = int(config.get("decoder_sparse_step", 1))
        only = {int(i) for i in config.get("mlp_only_layers") or ()}
        return MoeSpec(
            experts=int(config.get("num_experts") or config["num_local_experts"]),
            chosen=int(config["num_experts_per_tok"]),
            intermediate=int(config["moe_intermediate_size"]),
            normalise=bool(config.get("norm_topk_prob", False)),
            dense_layers=frozenset(i for i in range(layers) if i in only or (i + 1) % every),
        )
    return None


def eos_ids(model_dir: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json decides, config.json where that is silent."""
    value: Any = None
    path = model_dir / "generation_config.json"
    if path.exists():
        value = read_json(path, "download the model again").get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(sorted({int(i) for i in (value if isinstance(value, list) else [value])}))
