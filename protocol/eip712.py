"""EIP-712 hashing of frozen dataclasses: type string, type hash, struct hash, digest.

One source: the dataclass's annotated fields give the type string; contracts/generate.py writes the Solidity struct
from the same fields. Static types only, so encoding is one 32-byte word a field.
Source: EIP-712, https://eips.ethereum.org/EIPS/eip-712
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Final, get_type_hints

from eth_hash.auto import keccak

from protocol.errors import FieldOutOfRange
from protocol.units import Address, Digest


@dataclass(frozen=True, slots=True)
class Sol:
    """The Solidity type of a field: `address`, `bool`, `bytes32`, or `uintN`."""

    name: str


U8 = Annotated[int, Sol("uint8")]
U32 = Annotated[int, Sol("uint32")]
U64 = Annotated[int, Sol("uint64")]
U96 = Annotated[int, Sol("uint96")]
Bool = Annotated[bool, Sol("bool")]
Addr = Annotated[Address, Sol("address")]
B32 = Annotated[Digest, Sol("bytes32")]

DOMAIN_NAME: Final = "Tallystick"
DOMAIN_VERSION: Final = "1"
_DOMAIN_TYPE: Final = b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"


@dataclass(frozen=True, slots=True)
class Domain:
    """One deployment: every document of it, whatever contract reads it, is signed under this domain.

    `verifying_contract` is the Escrow's address; Registry and Court are constructed with it.
    """

    chain_id: int
    verifying_contract: Address

    def separator(self) -> Digest:
        """32-byte domain separator."""
        return _separator(self.chain_id, self.verifying_contract)


@functools.lru_cache(maxsize=64)
def _separator(chain_id: int, verifying_contract: Address) -> Digest:
    return Digest(
        keccak(
            keccak(_DOMAIN_TYPE)
            + keccak(DOMAIN_NAME.encode())
            + keccak(DOMAIN_VERSION.encode())
            + chain_id.to_bytes(32, "big")
            + verifying_contract.rjust(32, b"\0")
        )
    )


def camel(name: str) -> str:
    """`valid_from` -> `validFrom`: Python's field name as Solidity spells it."""
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


@functools.cache
def fields_of(struct: type) -> tuple[tuple[str, str], ...]:
    """(python field name, Solidity type) of each field, in order.

    Raises: TypeError when a field carries no `Sol` annotation.
    """
    hints = get_type_hints(struct, include_extras=True)
    out = []
    for field in dataclasses.fields(struct):
        sols = [meta for meta in typing.get_args(hints[field.name])[1:] if isinstance(meta, Sol)]
        if len(sols) != 1:
            raise TypeError(f"{struct.__name__}.{field.name} needs exactly one Solidity type")
        out.append((field.name, sols[0].name))
    return tuple(out)


@functools.cache
def type_string(struct: type) -> str:
    """`Voucher(address provider,uint96 cumulative)`."""
    inner = ",".join(f"{sol} {camel(name)}" for name, sol in fields_of(struct))
    return f"{struct.__name__}({inner})"


@functools.cache
def type_hash(struct: type) -> Digest:
    """keccak256 of the type string."""
    return Digest(keccak(type_string(struct).encode()))


def _word(document: str, name: str, sol: str, value: Any) -> bytes:
    """One field as a 32-byte word. Raises FieldOutOfRange."""
    if sol == "address" and isinstance(value, bytes) and len(value) == 20:
        return value.rjust(32, b"\0")
    if sol == "bytes32" and isinstance(value, bytes) and len(value) == 32:
        return value
    if sol == "bool" and isinstance(value, bool):
        return int(value).to_bytes(32, "big")
    is_integer = sol.startswith("uint") and isinstance(value, int) and not isinstance(value, bool)
    if is_integer and 0 <= value < 1 << int(sol[4:]):
        return int(value).to_bytes(32, "big")
    raise FieldOutOfRange(document, name, value)


def hash_struct(message: Any) -> Digest:
    """hashStruct(message). Raises: FieldOutOfRange when a value does not fit its Solidity type."""
    struct: Any = type(message)
    words = [_word(struct.__name__, n, s, getattr(message, n)) for n, s in fields_of(struct)]
    return Digest(keccak(type_hash(struct) + b"".join(words)))


def digest(domain: Domain, message: Any) -> Digest:
    """The 32 bytes that are signed: keccak256(0x1901 || separator || hashStruct). Raises: FieldOutOfRange."""
    return Digest(keccak(b"\x19\x01" + domain.separator() + hash_struct(message)))
