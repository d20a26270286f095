"""Packed vouchers, as `Escrow.settle` reads them and as its `Settled` event reports them.

One item is 76 bytes: r (32), s with the recovery parity in its top bit (32, EIP-2098), cumulative (12, big-endian).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

VOUCHER_BYTES: Final = 76
"""Bytes of one packed voucher. A 65-byte signature and a 32-byte amount would cost 96 gas a pair more in calldata."""


def encode_voucher(cumulative: int, signature: bytes) -> bytes:
    """Pack one voucher. `cumulative`: wei. `signature`: 65 bytes r || s || v, v in {27, 28}.

    Raises: ValueError for a signature that is not of that form or has its s in the upper half of 256 bits, and
    OverflowError for an amount that does not fit uint96.
    """
    if len(signature) != 65 or signature[64] not in (27, 28) or signature[32] >> 7:
        raise ValueError(f"not a 65-byte low-s signature: {signature.hex()}")
    parity_and_s = bytes([signature[32] | (signature[64] - 27) << 7]) + signature[33:64]
    return signature[:32] + parity_and_s + cumulative.to_bytes(12, "big")


def encode_vouchers(vouchers: Iterable[tuple[int, bytes]]) -> bytes:
    """Pack (cumulative, signature) pairs for `Escrow.settle`. Raises: ValueError, OverflowError."""
    return b"".join(encode_voucher(cumulative, signature) for cumulative, signature in vouchers)


def decode_claims(claims: Sequence[int]) -> list[tuple[bytes, int]]:
    """(signer address, the channel's new claimed total in wei) of each word of a `Settled` event."""
    return [((word >> 96).to_bytes(20, "big"), word & ((1 << 96) - 1)) for word in claims]
