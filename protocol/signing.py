"""secp256k1 signatures over EIP-712 digests: 65 bytes r || s || v, v in {27, 28}, low s only.

Deterministic (RFC 6979), so signing a journaled document again after a crash gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from coincurve import PrivateKey, PublicKey
from eth_hash.auto import keccak

from protocol.eip712 import Domain, digest
from protocol.errors import BadSignature
from protocol.units import Address, Digest

_HALF_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141 // 2


def address_of(public_key: bytes) -> Address:
    """EVM address of an uncompressed (65-byte) or compressed (33-byte) public key."""
    raw = public_key if len(public_key) == 65 else PublicKey(public_key).format(compressed=False)
    return Address(keccak(raw[1:])[-20:])


@dataclass(frozen=True, slots=True)
class Signer:
    """A secp256k1 secret and its address. `repr` never shows the secret."""

    secret: bytes = field(repr=False)
    address: Address

    @classmethod
    def from_secret(cls, secret: bytes) -> Signer:
        """`secret`: 32 bytes. Raises: ValueError when it is no valid scalar."""
        return cls(secret, address_of(PrivateKey(secret).public_key.format(compressed=False)))

    def sign_digest(self, message_digest: Digest) -> bytes:
        """65-byte signature of a 32-byte digest."""
        raw: bytes = PrivateKey(self.secret).sign_recoverable(message_digest, hasher=None)
        return raw[:64] + bytes([27 + raw[64]])

    def sign(self, domain: Domain, message: Any) -> bytes:
        """65-byte signature of an EIP-712 document. Raises: FieldOutOfRange."""
        return self.sign_digest(digest(domain, message))


def recover_digest(message_digest: Digest, signature: bytes) -> Address | None:
    """Address that signed, or None for a malformed or malleable signature."""
    # SPEC 1.5: s in the lower half of the order; any other form is refused
    if len(signature) != 65 or signature[64] not in (27, 28):
        return None
    if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
        return None
    try:
        key = PublicKey.from_signature_and_message(
            signature[:64] + bytes([signature[64] - 27]), message_digest, hasher=None
        )
    except Exception:  # noqa: BLE001 - coincurve raises a bare Exception for r or s out of range
        return None
    return address_of(key.format(compressed=False))


def verify(domain: Domain, message: Any, signature: bytes, expected: Address) -> Digest:
    """Check that `expected` signed `message`; returns the digest.

    Raises: BadSignature, FieldOutOfRange.
    """
    message_digest = digest(domain, message)
    recovered = recover_digest(message_digest, signature)
    if recovered != expected:
        raise BadSignature(type(message).__name__, expected, recovered)
    return message_digest
