"""What was said in a job, sealed at rest under a key of its own: destroying the key destroys the content.

XSalsa20-Poly1305 with a random nonce per row (NaCl secretbox, https://nacl.cr.yp.to/secretbox.html). The key stands in
the same file, so sealing keeps nothing from whoever reads the whole file; it makes shredding small and certain: 32
bytes are overwritten, whatever copies of the rows a page of the database, its log or the disk still holds.
"""

from __future__ import annotations

import struct

from nacl.exceptions import CryptoError
from nacl.secret import SecretBox
from nacl.utils import random

from node.ports import StoreError
from protocol.errors import FieldOutOfRange

_SALT = 32


def new_key() -> bytes:
    """32 random bytes."""
    return random(SecretBox.KEY_SIZE)


def seal(key: bytes, plaintext: bytes) -> bytes:
    """Nonce and ciphertext, 40 bytes longer."""
    return bytes(SecretBox(key).encrypt(plaintext))


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Raises: StoreError when it was altered or sealed under another key."""
    try:
        return SecretBox(key).decrypt(sealed)
    except (CryptoError, ValueError) as exc:
        raise StoreError(
            "kept content does not open under its job's key: the journal was altered. Receipts and vouchers are not "
            "affected; run `tally doctor`"
        ) from exc


def pack_prompt(salt: bytes, prompt: tuple[int, ...]) -> bytes:
    """Salt, then token ids as u32. Raises: FieldOutOfRange."""
    if len(salt) != _SALT:
        raise FieldOutOfRange("PromptKept", "salt", len(salt))
    try:
        return salt + struct.pack(f">{len(prompt)}I", *prompt)
    except struct.error as exc:
        raise FieldOutOfRange("PromptKept", "prompt", prompt[:8]) from exc


def unpack_prompt(data: bytes) -> tuple[bytes, tuple[int, ...]]:
    """Salt and token ids."""
    return data[:_SALT], struct.unpack(f">{(len(data) - _SALT) // 4}I", data[_SALT:])


def pack_content(content: tuple[bytes, ...]) -> bytes:
    """Each item behind its length as u32."""
    return b"".join(len(item).to_bytes(4, "big") + item for item in content)


def unpack_content(data: bytes) -> tuple[bytes, ...]:
    """What `pack_content` packed."""
    out, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        out.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return tuple(out)
