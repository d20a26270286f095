"""A profile and card for weights that another server holds: what a model directory without weights can honestly say.

Tokenizer, template and special tokens are this directory's, bound by their hashes as in any profile. The weights are
the server's, so `weights_root` is no hash of files but of a name, "upstream:" and the model as the server calls it, and
the engine's and sampler's hashes say that neither is ours: no such profile is taken for one that can be replayed.
The STE shape follows from config.json by the formula of the usual decoder; experts are counted, and what they chose is
not seen, so no routing is promised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from node.engine.profile import chat_template, reasoning_ids, special_tokens
from node.engine.spec import ModelError, read_json
from node.engine.thresholds import ANY_FLAG_PPM
from node.ports import ModelCard
from protocol.card import special_policy_hash
from protocol.eip712 import hash_struct
from protocol.messages import Profile
from protocol.units import Digest

ENGINE_NAME: Final = "tally/engine/upstream/1"
SAMPLER_NAME: Final = "tally/sampler/upstream/1"
"""Names of an engine and a sampling rule that are not known here; their hashes are part of the profile."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A model directory read without its weights. `eos_ids`: the one that ends a turn first. `bos_id`: None for none.

    `context`: tokens the model was made for. `tokenizer_json`: the file.
    """

    directory: Path
    config: Mapping[str, Any]
    tokenizer_json: bytes
    eos_ids: tuple[int, ...]
    bos_id: int | None
    context: int


def read_declared(model_dir: Path) -> Declared:
    """Raises: ModelError naming the file and what to do."""
    config = _text_config(read_json(model_dir / "config.json", "give the directory of a Hugging Face model"))
    generation_path = model_dir / "generation_config.json"
    generation = read_json(generation_path, "download it again") if generation_path.exists() else {}
    path = model_dir / "tokenizer.json"
    try:
        tokenizer_json = path.read_bytes()
    except OSError as exc:
        raise ModelError(f"{path} cannot be read ({exc.strerror}): download it") from exc
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = tuple(dict.fromkeys(eos if isinstance(eos, list) else [] if eos is None else [eos]))
    if not eos_ids or any(type(number) is not int or number < 0 for number in eos_ids):
        raise ModelError(
            f"{model_dir} does not say which token ends a text: set eos_token_id in generation_config.json"
        )
    bos = config.get("bos_token_id")
    context = _size(config, ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"), model_dir)
    return Declared(model_dir, config, tokenizer_json, eos_ids, bos if type(bos) is int else None, context)


def declared_profile(declared: Declared, served: str, *, ids_shown: bool) -> Profile:
    """The profile of the model that a server calls `served`. Raises: ModelError.

    `ids_shown`: it names the tokens it writes; otherwise a reasoning block cannot be told from text that looks so.
    """
    directory = declared.directory
    start, end = reasoning_ids(directory) if ids_shown else (0, 0)
    unknown = Digest(_sha256(b"unknown"))
    return Profile(
        weights_root=Digest(_sha256(f"upstream:{served}".encode())),
        tokenizer_hash=Digest(_sha256(declared.tokenizer_json)),
        chat_template_hash=Digest(_sha256(chat_template(directory).encode())),
        special_policy_hash=special_policy_hash(special_tokens(directory), declared.eos_ids),
        dtype_hash=unknown,
        kv_dtype_hash=unknown,
        engine_hash=Digest(_sha256(ENGINE_NAME.encode())),
        sampler_hash=Digest(_sha256(SAMPLER_NAME.encode())),
        margin_milli=0,
        logprob_micro=0,
        projection_micro=0,
        flag_ppm=ANY_FLAG_PPM,  # no margin can be computed for a foreign sampler
        **_shape(declared.config, directory),
        moe_layers=0,
        experts=0,
        experts_chosen=0,
        reasoning_start=start,
        reasoning_end=end,
    )


def declared_card(declared: Declared, model: str, profile: Profile, max_context: int) -> ModelCard:
    """`model`: the name it is offered under. Raises: ModelError."""
    return ModelCard(
        model=model,
        profile_id=hash_struct(profile),
        profile=profile,
        tokenizer_json=declared.tokenizer_json,
        chat_template=chat_template(declared.directory),
        special=special_tokens(declared.directory),
        eos_ids=declared.eos_ids,
        max_context=max_context,
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Models that read pictures too keep their decoder's shape in a part of its own."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _size(config: Mapping[str, Any], names: tuple[str, ...], model_dir: Path, default: int | None = None) -> int:
    """The first of `names` that is there. Raises: ModelError when none is and there is no default."""
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    if default is None:
        raise ModelError(f"{model_dir / 'config.json'} does not state {names[0]}: download the model's own file")
    return default


def _shape(config: Mapping[str, Any], model_dir: Path) -> dict[str, int]:
    """Parameters and layer shape: gated MLPs, grouped-query attention, routed and shared experts."""
    hidden = _size(config, ("hidden_size", "n_embd"), model_dir)
    layers = _size(config, ("num_hidden_layers", "n_layer"), model_dir)
    heads = _size(config, ("num_attention_heads", "n_head"), model_dir)
    kv_heads = _size(config, ("num_key_value_heads",), model_dir, heads)
    head_dim = _size(config, ("head_dim",), model_dir, hidden // heads)
    inner = _size(config, ("intermediate_size", "n_inner"), model_dir, 4 * hidden)
    vocab = _size(config, ("vocab_size",), model_dir)
    attention = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden
    experts = _size(config, ("num_local_experts", "num_experts", "n_routed_experts"), model_dir, 0)
    sparse = sum(map(_routed(config), range(layers))) if experts else 0
    chosen = _size(config, ("num_experts_per_tok",), model_dir, 1)
    expert = 3 * hidden * _size(config, ("moe_intermediate_size",), model_dir, inner)
    shared = _size(config, ("n_shared_experts",), model_dir, 0) * expert
    dense = (layers - sparse) * 3 * hidden * inner
    body = layers * attention + dense + sparse * (experts * hidden + shared + chosen * expert)
    head = vocab * hidden
    active = body + head + (0 if config.get("tie_word_embeddings") else head)
    window = _size(config, ("sliding_window",), model_dir, 0) if config.get("use_sliding_window", True) else 0
    alike = len(set(config.get("layer_types") or ["one"])) == 1
    return {
        "active_parameters": active,
        "total_parameters": active + sparse * (experts - chosen) * expert,
        "body_parameters": body,
        "head_parameters": head,
        "layers": layers,
        "heads": heads,
        "head_dim": head_dim,
        "window": window if alike else 0,
    }


def _routed(config: Mapping[str, Any]) -> Callable[[int], bool]:
    """Whether a layer chooses experts, in a model that has some: some families leave layers dense."""
    first, step = int(config.get("first_k_dense_replace") or 0), int(config.get("decoder_sparse_step") or 1)
    dense = frozenset(config.get("mlp_only_layers") or ())
    return lambda layer: layer >= first and layer not in dense and (layer + 1) % step == 0


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
