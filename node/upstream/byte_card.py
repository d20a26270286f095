"""A card for models that nobody in the market offers: their tokenizer is not known here, so text travels as bytes.

Token ids are then bytes of UTF-8, each a token. They are this node's own way of carrying text to a platform that takes
text and back; what the platform counts and charges is its own affair, and its usage is what is reported.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from functools import cache
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from node.ports import ModelCard
from protocol.card import special_policy_hash
from protocol.eip712 import hash_struct
from protocol.messages import Profile
from protocol.units import ZERO_DIGEST, Digest

BYTES_PER_TOKEN: Final = 8
"""How many bytes a token is taken to hold at most when a context is told in bytes. English has 4.5 on average; where a
prompt is longer in the platform's own tokens it says so itself. Doubling it lets through more that is then refused."""

TEMPLATE: Final = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
"""What a chat's length is estimated by. The platform renders the messages by the model's own template."""


_COUNTS: Final = tuple(field.name for field in fields(Profile) if not field.name.endswith(("_hash", "_root")))
"""Everything in a profile that would measure a model."""


@cache
def _tokenizer_json() -> bytes:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return str(made.to_str()).encode()


def byte_card(model: str, host: str, context: int) -> ModelCard:
    """`context`: the platform's, in its own tokens. The profile names platform and model, and measures nothing."""
    tokenizer_json = _tokenizer_json()
    profile = Profile(
        weights_root=_sha256(f"outside:{host}:{model}".encode()),
        tokenizer_hash=_sha256(tokenizer_json),
        chat_template_hash=_sha256(TEMPLATE.encode()),
        special_policy_hash=special_policy_hash({}, ()),
        dtype_hash=ZERO_DIGEST,
        kv_dtype_hash=ZERO_DIGEST,
        engine_hash=ZERO_DIGEST,
        sampler_hash=ZERO_DIGEST,
        **dict.fromkeys(_COUNTS, 0),
    )
    return ModelCard(
        model=model,
        profile_id=hash_struct(profile),
        profile=profile,
        tokenizer_json=tokenizer_json,
        chat_template=TEMPLATE,
        special={},
        eos_ids=(),
        max_context=context * BYTES_PER_TOKEN,
    )


def _sha256(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).digest())
