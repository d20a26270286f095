"""Signed documents as bytes: the canonical, exact form in which the journal keeps them.

A document is stored as the first 4 bytes of its EIP-712 type hash, then every field in order, big-endian, in the
width of its Solidity type (abi.encodePacked of static fields). So the very document that was signed is rebuilt, a
uint96 needs no special case, and a field added to a struct later makes an old row say so instead of misreading it.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

from node.ports import StoreError
from protocol.eip712 import fields_of, type_hash
from protocol.errors import FieldOutOfRange

T = TypeVar("T")

_TAG_BYTES: Final = 4
"""Bytes of type hash before the fields. Enough to tell the versions of a dozen structs apart; it guards against
reading a row of another version, not against an attacker, who would have to write to our own disk."""


def _width(sol: str) -> int:
    """Bytes a static Solidity type takes when packed."""
    if sol == "address":
        return 20
    if sol == "bytes32":
        return 32
    return 1 if sol == "bool" else int(sol.removeprefix("uint")) // 8


def encode(document: Any) -> bytes:
    """The canonical bytes of a document of protocol.messages. Raises: FieldOutOfRange."""
    struct: Any = type(document)
    parts = [type_hash(struct)[:_TAG_BYTES]]
    for name, sol in fields_of(struct):
        value = getattr(document, name)
        width = _width(sol)
        if sol in ("address", "bytes32"):
            if not isinstance(value, bytes) or len(value) != width:
                raise FieldOutOfRange(struct.__name__, name, value)
            parts.append(value)
        else:
            if not isinstance(value, int) or not 0 <= value < 1 << (1 if sol == "bool" else 8 * width):
                raise FieldOutOfRange(struct.__name__, name, value)
            parts.append(int(value).to_bytes(width, "big"))
    return b"".join(parts)


def decode(struct: type[T], data: bytes) -> T:
    """The document `encode` wrote. Raises: StoreError when the bytes are of another struct or another version."""
    kind: Any = struct
    name, tag, fields = kind.__name__, type_hash(kind)[:_TAG_BYTES], fields_of(kind)
    expected = _TAG_BYTES + sum(_width(sol) for _, sol in fields)
    if data[:_TAG_BYTES] != tag or len(data) != expected:
        raise StoreError(
            f"a stored {name} is of another version of the protocol ({len(data)} bytes, expected {expected}); "
            f"nothing was changed: open this journal with the release of Tallystick that wrote it"
        )
    values: dict[str, Any] = {}
    at = _TAG_BYTES
    for field, sol in fields:
        raw = data[at : at + _width(sol)]
        at += len(raw)
        if sol in ("address", "bytes32"):
            values[field] = raw
        else:
            values[field] = bool(raw[0]) if sol == "bool" else int.from_bytes(raw, "big")
    return struct(**values)


def pack_tokens(token_ids: tuple[int, ...]) -> bytes:
    """Token ids as u32 big-endian. Raises: FieldOutOfRange."""
    try:
        return b"".join(token.to_bytes(4, "big") for token in token_ids)
    except OverflowError as exc:
        raise FieldOutOfRange("ReceiptVouched", "token_ids", token_ids) from exc


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """What `pack_tokens` packed."""
    return tuple(int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data), 4))
