"""Packing vouchers for Escrow.settle and reading its event back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.codec import VOUCHER_BYTES, decode_claims, encode_vouchers
from protocol.eip712 import Domain
from protocol.messages import Voucher
from protocol.signing import Signer
from protocol.units import Address

DOMAIN = Domain(31337, Address(b"\x05" * 20))
PROVIDER = Address(b"\x07" * 20)
secrets = st.integers(1, 2**200).map(lambda n: Signer.from_secret(n.to_bytes(32, "big")))


@given(st.lists(st.tuples(secrets, st.integers(0, 2**96 - 1)), max_size=5))
def test_items_keep_signature_and_amount(pairs: list[tuple[Signer, int]]) -> None:
    vouchers = [(amount, signer.sign(DOMAIN, Voucher(PROVIDER, amount))) for signer, amount in pairs]
    batch = encode_vouchers(vouchers)
    assert len(batch) == VOUCHER_BYTES * len(vouchers)
    for i, (amount, signature) in enumerate(vouchers):
        item = batch[i * VOUCHER_BYTES : (i + 1) * VOUCHER_BYTES]
        parity = item[32] >> 7
        assert item[:32] + bytes([item[32] & 0x7F]) + item[33:64] + bytes([27 + parity]) == signature
        assert int.from_bytes(item[64:], "big") == amount


@pytest.mark.parametrize(
    "signature",
    [b"", b"\x01" * 64, b"\x01" * 64 + b"\x00", b"\x01" * 64 + b"\x1d", b"\x01" * 32 + b"\xff" * 32 + b"\x1b"],
)
def test_other_signatures_are_refused(signature: bytes) -> None:
    with pytest.raises(ValueError, match="not a 65-byte low-s signature"):
        encode_vouchers([(1, signature)])


@pytest.mark.parametrize("amount", [-1, 2**96])
def test_amounts_outside_uint96_are_refused(amount: int) -> None:
    with pytest.raises(OverflowError):
        encode_vouchers([(amount, b"\x01" * 64 + b"\x1b")])


def test_claims_are_signer_and_total() -> None:
    signer = bytes(range(20))
    assert decode_claims([int.from_bytes(signer, "big") << 96 | 5, 2**256 - 1]) == [
        (signer, 5),
        (b"\xff" * 20, 2**96 - 1),
    ]
