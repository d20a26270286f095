"""What a profile binds of a model card beside tokenizer and template: where a stream stops, and what may be control.

The end-of-sequence ids decide when an honest provider stops, and the special tokens are texts that the chat template
may place; were either unbound, whoever answers first with a card could change them for every provider of the profile.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from protocol.errors import FieldOutOfRange
from protocol.units import Digest

SPECIAL_POLICY: Final = "tally/special-tokens/content-never-encodes-control-tokens/1"
"""User text is encoded with control tokens disabled: a `<|im_end|>` somebody typed is plain text, and billed so."""


def special_policy_hash(special: Mapping[str, str], eos_ids: Sequence[int]) -> Digest:
    """SHA-256 over the policy, the special tokens by name and the set of end-of-sequence ids (u32), with their counts.

    Texts are UTF-8 behind a u32 length, numbers big-endian; the order in which either was given does not matter.
    Raises: FieldOutOfRange when an id is no u32.
    """
    for token_id in eos_ids:
        if type(token_id) is not int or not 0 <= token_id < 1 << 32:
            raise FieldOutOfRange("ModelCard", "eos_ids", token_id)
    ids = sorted(set(eos_ids))
    parts = [_text(SPECIAL_POLICY), struct.pack(">I", len(special))]
    parts += [_text(name) + _text(special[name]) for name in sorted(special)]
    parts += [struct.pack(f">I{len(ids)}I", len(ids), *ids)]
    return Digest(hashlib.sha256(b"".join(parts)).digest())


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">I", len(raw)) + raw
