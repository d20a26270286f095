"""A libp2p peer id and an EVM address are two readings of one secp256k1 public key.

The peer id of such a key is base58btc of an identity multihash around the key's protobuf, so the key can be read back
out of it: whoever proved to own the peer id (Noise handshake, gossip signature) proved to own the address.
Source: libp2p specs, peer-ids; multiformats multihash (code 0x00).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from coincurve import PrivateKey, PublicKey

from protocol.signing import address_of
from protocol.units import Address

_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUE: Final = {character: value for value, character in enumerate(_ALPHABET)}

_KEY_HEADER: Final = bytes.fromhex("002508021221")
"""Identity multihash of 37 bytes; protobuf field 1 (type) = 2 (Secp256k1); field 2 (data), 33 bytes."""

_ID_BYTES: Final = len(_KEY_HEADER) + 33


class NotOurKey(ValueError):
    """A peer id that embeds no secp256k1 key: such a peer has no EVM address and cannot be paid or held to account."""


def peer_id_of_key(public_key: bytes) -> str:
    """Peer id of a 33-byte compressed public key."""
    raw = _KEY_HEADER + public_key
    number, text = int.from_bytes(raw, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return _ALPHABET[0] * (len(raw) - len(raw.lstrip(b"\0"))) + text


def peer_id_of_secret(secret: bytes) -> str:
    """Peer id of a 32-byte secret. Raises: ValueError when it is no valid scalar."""
    return peer_id_of_key(PrivateKey(secret).public_key.format(compressed=True))


@lru_cache(maxsize=4096)
def address_of_peer(peer_id: str) -> Address:
    """EVM address of the key a peer id embeds. Raises: NotOurKey."""
    number = 0
    try:
        for character in peer_id:
            number = number * 58 + _VALUE[character]
        raw = number.to_bytes(_ID_BYTES, "big")
        if raw[: len(_KEY_HEADER)] != _KEY_HEADER or peer_id_of_key(raw[len(_KEY_HEADER) :]) != peer_id:
            raise NotOurKey(f"peer id {peer_id!r} embeds no secp256k1 key")
        return address_of(PublicKey(raw[len(_KEY_HEADER) :]).format(compressed=False))
    except (KeyError, OverflowError) as exc:
        raise NotOurKey(f"peer id {peer_id!r} embeds no secp256k1 key") from exc
    except NotOurKey:
        raise
    except ValueError as exc:
        raise NotOurKey(f"peer id {peer_id!r} embeds no point of the curve") from exc
