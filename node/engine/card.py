"""A model directory as the card that clients fetch: tokenizer, template and special tokens, as the profile has them."""

from __future__ import annotations

from pathlib import Path

from node.engine.profile import chat_template, special_tokens
from node.engine.spec import ModelError, load_spec
from node.ports import ModelCard
from protocol.eip712 import hash_struct
from protocol.messages import Profile


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
        special=special_tokens(model_dir),
        eos_ids=load_spec(model_dir).eos_ids,
        max_context=max_context,
    )
