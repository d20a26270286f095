"""What a model directory computes, as the profile a job names: hashes of all that decides a token, and the STE shape.

Nothing is cached: the weights are hashed at every start (about 1 GB/s), so a changed file is a changed profile.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from importlib.metadata import version
from pathlib import Path
from typing import Final

from node.engine.spec import ModelError, ModelSpec, load_spec, read_json, weight_files
from node.engine.thresholds import thresholds_of
from protocol.card import special_policy_hash
from protocol.messages import Profile
from protocol.sampling import SAMPLER_VERSION
from protocol.units import Digest

ENGINE_VERSION: Final = "tally/engine/torch-decoder/2"
"""Names the arithmetic of decoder.py and kernels.c, no further apart than torch's own kernels are; its hash is part of
the profile. A change that moves logits needs a new name."""

GRAMMAR_RULES: Final = "2"
"""Names what grammar.py asks of its library; with the library's version it is part of the sampler's hash."""

DTYPES: Final = ("auto", "bf16", "fp32")

AUTO_FP32_PARAMETERS: Final = 1_000_000_000
"""Largest model that `auto` runs in fp32 on a CPU. Unit: parameters. Up to here fp32 fits in 4 GB.
Measured on the 4M demo model, T = 0.8, top-p 0.95: between batch sizes and cuts, fp32 changed no token of 21,000; bf16
changed one in 200 (margin at most 0.04 logits, so honest all the same), and so a quarter of continued texts. Doubling
it doubles the memory of the largest such model."""

REASONING_MARKS: Final = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<reason>", "</reason>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
)
"""Texts that open and close a reasoning block: Qwen3's and DeepSeek-R1's, then those of other families (Cohere's in
capitals, Mistral's in brackets). What a template marks otherwise is metered as plain output."""

_SPECIAL: Final = ("bos_token", "eos_token", "pad_token", "unk_token")
_CHUNK: Final = 1 << 20


def resolve_dtype(dtype: str, total_parameters: int, device: str = "cpu") -> str:
    """`fp32` or `bf16`. Raises: ModelError for any other name."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    return "fp32" if device == "cpu" and total_parameters <= AUTO_FP32_PARAMETERS else "bf16"


def stored_parameters(files: list[Path]) -> int:
    """Entries of all tensors in the safetensors files, from their headers. Raises: ModelError."""
    total = 0
    for path in files:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 100_000_000)))
            total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
        except (OSError, ValueError, struct.error, KeyError, TypeError) as exc:
            raise ModelError(f"{path} is no safetensors file ({exc}): download it again") from exc
    return total


def profile_of(model_dir: Path, dtype: str = "auto", device: str = "cpu") -> Profile:
    """The profile of a model directory. Reads every weight file once. Raises: ModelError."""
    spec = load_spec(model_dir)
    reasoning_start, reasoning_end = reasoning_ids(model_dir)
    total = stored_parameters(weight_files(model_dir))
    resolved = resolve_dtype(dtype, total, device)
    kind, weights = Digest(_sha256(resolved.encode())), weights_root(model_dir)
    limits = thresholds_of(model_dir, resolved, "0x" + weights.hex(), versions())
    return Profile(
        weights_root=weights,
        tokenizer_hash=_tokenizer_hash(model_dir),
        chat_template_hash=Digest(_sha256(chat_template(model_dir).encode())),
        special_policy_hash=special_policy_hash(special_tokens(model_dir), spec.eos_ids),
        dtype_hash=kind,
        kv_dtype_hash=kind,
        engine_hash=Digest(_sha256(ENGINE_VERSION.encode())),
        sampler_hash=Digest(_sha256(f"{SAMPLER_VERSION} {grammar_version()}".encode())),
        margin_milli=limits.margin_milli,
        logprob_micro=limits.logprob_micro,
        projection_micro=limits.projection_micro,
        flag_ppm=limits.flag_ppm,
        active_parameters=total - spec.idle_parameters,
        total_parameters=total,
        reasoning_start=reasoning_start,
        reasoning_end=reasoning_end,
        **_shape(spec),
    )


def versions() -> dict[str, str]:
    """What a calibration holds for, beside weights and dtype."""
    return {"engine": ENGINE_VERSION, "sampler": SAMPLER_VERSION}


def grammar_version() -> str:
    """What decides which tokens a grammar allows: the library as installed, and how it is used here."""
    return f"llguidance/{version('llguidance')}/{GRAMMAR_RULES}"


def reasoning_ids(model_dir: Path) -> tuple[int, int]:
    """Ids of the tokens that open and close a reasoning block, (0, 0) when the model has none. Raises: ModelError.

    Both are single added tokens of tokenizer.json, and the chat template mentions one of them.
    """
    added = read_json(model_dir / "tokenizer.json", "download it").get("added_tokens")
    ids = {token.get("content"): token.get("id") for token in added or () if isinstance(token, dict)}
    template = chat_template(model_dir)
    for start, end in REASONING_MARKS:
        both = ids.get(start), ids.get(end)
        if isinstance(both[0], int) and isinstance(both[1], int) and (start in template or end in template):
            return both[0], both[1]
    return 0, 0


def _shape(spec: ModelSpec) -> dict[str, int]:
    moe = spec.moe
    return {
        "body_parameters": spec.body_parameters,
        "head_parameters": spec.head_parameters,
        "layers": spec.layers,
        "heads": spec.heads,
        "head_dim": spec.head_dim,
        "window": spec.window,
        "moe_layers": spec.layers - len(moe.dense_layers) if moe else 0,
        "experts": moe.experts if moe else 0,
        "experts_chosen": moe.chosen if moe else 0,
    }


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _file_sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()


def weights_root(model_dir: Path) -> Digest:
    """SHA-256 over (SHA-256 of name || SHA-256 of content) of weight files and the configs that steer them."""
    files = [*weight_files(model_dir), model_dir / "config.json"]
    generation = model_dir / "generation_config.json"
    files += [generation] if generation.exists() else []
    parts = [_sha256(path.name.encode()) + _file_sha256(path) for path in sorted(files)]
    return Digest(_sha256(b"".join(parts)))


def _tokenizer_hash(model_dir: Path) -> Digest:
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path} is missing: download it, or save a fast tokenizer with save_pretrained()")
    return Digest(_file_sha256(path))


def chat_template(model_dir: Path) -> str:
    """The template's text, from chat_template.jinja or tokenizer_config.json; empty when there is none.

    Raises: ModelError.
    """
    jinja = model_dir / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_bytes().decode("utf-8", errors="replace")
    path = model_dir / "tokenizer_config.json"
    template = read_json(path, "download it").get("chat_template") if path.exists() else None
    return template if isinstance(template, str) else ""


def special_tokens(model_dir: Path) -> dict[str, str]:
    """Names to texts, from tokenizer_config.json; a token may be a string or an object with its content.

    Raises: ModelError.
    """
    path = model_dir / "tokenizer_config.json"
    config = read_json(path, "download it") if path.exists() else {}
    out = {}
    for name in _SPECIAL:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            out[name] = text
    return out
