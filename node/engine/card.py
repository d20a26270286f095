"""A model directory as the card that clients fetch: tokenizer, template and special tokens, as the profile has them."""

from __future__ import annotations

from pathlib import Path

from node.engine.profile import chat_template
from node.engine.spec import ModelError, load_spec, read_json
from node.ports import ModelCard
from protocol.eip712 import hash_struct
from protocol.messages import Profile

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_card(model_dir: Path, model: str, profile: Profile, max_context: int) -> ModelCard:
    """`model`: the name it is offered under. Raises: ModelError."""
    path = model_dir / "tokenizer.json"
    try:
        tokenizer_json = path.read_bytes()
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc.strerror}") from exc
    return ModelCard(
        model=model,
        profile_id=hash_struct(profile),
        profile=profile,
        tokenizer_json=tokenizer_json,
        chat_template=chat_template(model_dir),
        special=_special_tokens(model_dir),
        eos_ids=load_spec(model_dir).eos_ids,
        max_context=max_context,
    )


def _special_tokens(model_dir: Path) -> dict[str, str]:
    """Names to texts, from tokenizer_config.json; a token may be a string or an object with its content."""
    path = model_dir / "tokenizer_config.json"
    config = read_json(path, "download it") if path.exists() else {}
    out = {}
    for name in _SPECIAL:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            out[name] = text
    return out
