"""The shape of a decoder of any architecture, for metering and KV memory, from its transformers config and its tensors.

Module decoders (module_decoder.py) are proved at start against transformers' own forward; here only what cannot be
described truthfully is refused: experts, whose active share the files do not tell, and configs without plain sizes.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, Final

from node.engine.spec import SUPPORTED, ModelError, ModelSpec, RopeSpec, weight_files

_NOT_MATRICES: Final = ("embed", "wte", "wpe", "lm_head", "norm", "bias", "rotary")
"""Parts of the names of tensors that are looked up or added, not multiplied by."""

_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def refused(name: str, why: str) -> ModelError:
    """The error that says what is supported and what is in the way. `why`: a predicate, as in "is recurrent"."""
    return ModelError(
        f"architecture {name} is not supported; supported are {', '.join(SUPPORTED)}, and decoders whose transformers "
        f"module lets attention be replaced: this one {why}"
    )


def module_spec(model_dir: Path, name: str, eos: tuple[int, ...]) -> ModelSpec:
    """Raises: ModelError saying what is in the way."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # whatever its parsers raise over a stranger's file
        raise refused(name, f"has a config that transformers {transformers.__version__} cannot read ({exc})") from exc
    if known.get(config.model_type) != name:
        raise refused(name, f"is not what transformers makes of model type {config.model_type!r}")
    if any(getattr(config, field, None) for field in _EXPERTS):
        raise refused(name, "is a mixture of experts, whose active parameters only known shapes tell")
    try:
        return _spec(config, name, eos, model_dir)
    except (AttributeError, TypeError, ValueError) as exc:
        raise refused(name, f"has a config without plain sizes ({exc})") from exc


def _spec(config: Any, name: str, eos: tuple[int, ...], model_dir: Path) -> ModelSpec:
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    window, longest = _window(config)
    return ModelSpec(
        architecture=name,
        vocab=int(config.vocab_size),
        hidden=hidden,
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        intermediate=0,
        eps=0.0,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        qk_norm=False,
        window=window,
        max_positions=longest,
        eos_ids=eos,
        rope=RopeSpec(theta=0.0),
        moe=None,
        module_parameters=_matrix_entries(model_dir),
    )


def _window(config: Any) -> tuple[int, int]:
    """The window of all layers, and the longest context. Where only some layers have one, the context ends with it:
    the work of a token is then what metering says, and every layer sees all of it."""
    longest, window = int(config.max_position_embeddings), int(getattr(config, "sliding_window", None) or 0)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not window or kinds == {"full_attention"} or getattr(config, "use_sliding_window", True) is False:
        return 0, longest
    return (window, longest) if kinds <= {"sliding_attention"} else (0, min(window, longest))


def _matrix_entries(model_dir: Path) -> int:
    """Raises: ModelError when a file is no safetensors file."""
    total = 0
    for path in weight_files(model_dir):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header: dict[str, Any] = json.loads(file.read(length))
            shapes = {key: tensor["shape"] for key, tensor in header.items() if key != "__metadata__"}
        except (OSError, ValueError, struct.error, KeyError, TypeError) as exc:
            raise ModelError(f"{path} is no safetensors file ({exc}): download it again") from exc
        for key, shape in shapes.items():
            if len(shape) >= 2 and not any(part in key for part in _NOT_MATRICES):
                total += math.prod(shape)
    return total
