"""Documents as bytes: each field at its Solidity type's own width, big-endian, no padding, in order.

Canonical (one document, one byte string), so it serves the wire and the journal alike, and uint96 amounts, which
msgpack's 64-bit integers cannot hold, travel exactly. Same layout as Solidity's abi.encodePacked of the fields.
"""

from __future__ import annotations

from typing import Any, TypeVar

from protocol.eip712 import fields_of
from protocol.errors import FieldOutOfRange, MalformedFrame
from protocol.units import Address, Digest

T = TypeVar("T")


def _width(sol: str) -> int:
    """Bytes of a Solidity static type."""
    if sol == "address":
        return 20
    if sol == "bytes32":
        return 32
    if sol == "bool":
        return 1
    return int(sol.removeprefix("uint")) // 8


def packed_size(struct: Any) -> int:
    """Bytes that a document of this type packs to."""
    return sum(_width(sol) for _, sol in fields_of(struct))


def pack(document: Any) -> bytes:
    """Raises: FieldOutOfRange when a value does not fit its type."""
    struct: Any = type(document)
    parts = []
    for name, sol in fields_of(struct):
        value, width = getattr(document, name), _width(sol)
        if isinstance(value, bytes) and len(value) == width and sol in ("address", "bytes32"):
            parts.append(value)
        elif isinstance(value, int) and 0 <= value < 1 << (1 if sol == "bool" else 8 * width):
            parts.append(value.to_bytes(width, "big"))
        else:
            raise FieldOutOfRange(struct.__name__, name, value)
    return b"".join(parts)


def unpack(struct: type[T], data: bytes) -> T:
    """Raises: MalformedFrame when the length is wrong or a bool is neither 0 nor 1."""
    kind: Any = struct
    if len(data) != packed_size(kind):
        raise MalformedFrame(f"{struct.__name__} takes {packed_size(kind)} bytes, not {len(data)}")
    values: dict[str, Any] = {}
    at = 0
    for name, sol in fields_of(kind):
        raw = data[at : at + _width(sol)]
        at += len(raw)
        if sol == "address":
            values[name] = Address(raw)
        elif sol == "bytes32":
            values[name] = Digest(raw)
        elif sol == "bool":
            if raw not in (b"\0", b"\1"):
                raise MalformedFrame(f"{struct.__name__}.{name} is no bool")
            values[name] = raw == b"\1"
        else:
            values[name] = int.from_bytes(raw, "big")
    return struct(**values)
