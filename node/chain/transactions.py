"""Transactions as bytes and as the chain knows them: signed ones, their receipts, and whether they count yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from node.chain.fees import Fees
from node.chain.rpc import Rpc
from node.ports import ChainError
from protocol.units import Address, Digest

Receipt = Mapping[str, Any]
"""A transaction receipt, as web3 formats it."""


@dataclass(frozen=True, slots=True)
class Call:
    """What to do. `action`: for messages. `to` None deploys. `value`: wei of coin. `gas_floor`: least gas limit."""

    action: str
    to: Address | None
    data: bytes = b""
    value: int = 0
    gas_floor: int = 0


@dataclass(frozen=True, slots=True)
class Signed:
    """A signed transaction."""

    hash: Digest
    raw: bytes
    nonce: int
    fees: Fees
    gas: int
    call: Call


def parse_signed(action: str, raw: bytes) -> Signed:
    """A signed type-2 transaction from its bytes. Raises: ChainError."""
    import rlp  # type: ignore[import-untyped]
    from eth_hash.auto import keccak

    try:
        fields = rlp.decode(raw[1:])
        _, nonce, tip, cap, gas, to, value, data = fields[:8]
    except (rlp.DecodingError, ValueError, TypeError) as exc:
        raise ChainError(f"{action}: these {len(raw)} bytes are no signed transaction") from exc
    call = Call(action, Address(to) if to else None, data, int.from_bytes(value, "big"))
    number = int.from_bytes
    fees = Fees(number(cap, "big"), number(tip, "big"))
    return Signed(Digest(keccak(raw)), raw, number(nonce, "big"), fees, number(gas, "big"), call)


async def find_receipt(rpc: Rpc, transaction: Digest) -> Receipt | None:
    """The receipt of a transaction that is in a block, else None. Raises: ChainUnavailable, ChainError."""
    from web3.exceptions import TransactionNotFound

    async def ask(w3: Any) -> Receipt | None:
        try:
            receipt: Receipt = await w3.eth.get_transaction_receipt(transaction)
        except TransactionNotFound:
            return None
        return receipt

    return await rpc.read(ask)


async def counts(rpc: Rpc, receipt: Receipt, confirmations: int) -> bool:
    """Whether its block is `confirmations` deep, itself included. Raises: ChainUnavailable, ChainError."""
    if confirmations <= 1:
        return True
    head = int(await rpc.read(lambda w3: w3.eth.block_number))
    return head - int(receipt["blockNumber"]) + 1 >= confirmations


async def is_known(rpc: Rpc, transaction: Digest) -> bool:
    """Whether the node has it, in its pool or in a block. Raises: ChainUnavailable, ChainError."""
    from web3.exceptions import TransactionNotFound

    async def ask(w3: Any) -> bool:
        try:
            return await w3.eth.get_transaction(transaction) is not None
        except TransactionNotFound:
            return False

    return await rpc.read(ask)
