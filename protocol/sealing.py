"""End-to-end sealing of prompts and token frames: NaCl box between the client's ephemeral key and the offer's box key.

Each side encrypts under its own direction byte and a counter, so no nonce repeats under one pair of keys; a job uses
a fresh client key. X25519 + XSalsa20-Poly1305, https://nacl.cr.yp.to/box.html
"""

from __future__ import annotations

from dataclasses import dataclass

from nacl.exceptions import CryptoError
from nacl.public import Box, PrivateKey, PublicKey

from protocol.errors import MalformedFrame

_CLIENT, _PROVIDER = b"c", b"p"


@dataclass(frozen=True, slots=True)
class BoxKey:
    """An X25519 secret; `public` is its 32-byte public key."""

    secret: PrivateKey
    public: bytes

    @classmethod
    def from_secret(cls, secret: bytes) -> BoxKey:
        """`secret`: 32 random bytes."""
        key = PrivateKey(secret)
        return cls(key, bytes(key.public_key))

    def __repr__(self) -> str:
        return f"BoxKey(public={self.public.hex()})"


class Sealed:
    """One side of a sealed conversation; counts its own messages and the peer's."""

    def __init__(self, ours: BoxKey, theirs: bytes, *, we_are_client: bool) -> None:
        """`theirs`: the peer's public key, of its choosing.

        Raises: MalformedFrame when it is not 32 bytes, or a point of low order, whose shared secret anybody knows.
        """
        try:
            self._box = Box(ours.secret, PublicKey(theirs))
        except (ValueError, RuntimeError) as exc:  # libsodium refuses the point: PyNaCl raises its RuntimeError
            raise MalformedFrame(f"0x{theirs.hex()} is no box key that keeps a secret") from exc
        self._send, self._receive = (_CLIENT, _PROVIDER) if we_are_client else (_PROVIDER, _CLIENT)
        self._sent = 0
        self._received = 0

    def seal(self, plaintext: bytes) -> bytes:
        """Ciphertext, 16 bytes longer."""
        nonce = self._send + self._sent.to_bytes(23, "big")
        self._sent += 1
        return self._box.encrypt(plaintext, nonce).ciphertext

    def unseal(self, ciphertext: bytes) -> bytes:
        """Raises: MalformedFrame when it was altered, reordered, or sealed for somebody else."""
        # SPEC 3.3: a sealed frame that is repeated, reordered or altered does not open
        nonce = self._receive + self._received.to_bytes(23, "big")
        try:
            plaintext: bytes = self._box.decrypt(ciphertext, nonce)
        except (CryptoError, ValueError) as exc:
            raise MalformedFrame("a sealed frame does not open: altered, out of order, or for another key") from exc
        self._received += 1
        return plaintext
