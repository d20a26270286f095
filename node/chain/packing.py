"""Which vouchers can enter a settlement's compact calldata."""

from __future__ import annotations


def is_packable(signature: bytes) -> bool:
    """Whether a voucher's signature has the form the Escrow reads: 65 bytes, v in {27, 28}, s below 2**255.

    One that has not could never pay, so it is left out rather than let it fail the batch it is in.
    """
    return len(signature) == 65 and signature[64] in (27, 28) and not signature[32] >> 7
