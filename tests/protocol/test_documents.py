"""Signed documents: hashing, packing and signatures hold for every document and refuse what does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from hypothesis import given
from hypothesis import strategies as st

from protocol.eip712 import DOMAIN_NAME, DOMAIN_VERSION, Domain, camel, digest, fields_of, hash_struct
from protocol.errors import BadSignature, FieldOutOfRange, MalformedFrame
from protocol.messages import DOCUMENTS, Voucher
from protocol.packing import pack, packed_size, unpack
from protocol.signing import Signer, recover_digest, verify
from tests.protocol.documents import any_document, secrets

DOMAIN = Domain(31337, b"\x11" * 20)  # type: ignore[arg-type]
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


@given(any_document)
def test_packing_round_trips_and_is_canonical(document: Any) -> None:
    data = pack(document)
    assert len(data) == packed_size(type(document))
    again = unpack(type(document), data)
    assert again == document and pack(again) == data


@given(any_document, st.binary(max_size=700))
def test_unpacking_any_bytes_gives_a_document_or_a_typed_error(document: Any, data: bytes) -> None:
    try:
        assert pack(unpack(type(document), data)) == data
    except MalformedFrame:
        pass


@given(any_document)
def test_digest_is_what_eth_account_computes(document: Any) -> None:
    """An independent implementation of EIP-712 agrees."""
    struct = type(document)
    types = {struct.__name__: [{"name": camel(name), "type": sol} for name, sol in fields_of(struct)]}
    message = {camel(name): getattr(document, name) for name, _ in fields_of(struct)}
    signable = encode_typed_data(
        {
            "name": DOMAIN_NAME,
            "version": DOMAIN_VERSION,
            "chainId": DOMAIN.chain_id,
            "verifyingContract": "0x" + DOMAIN.verifying_contract.hex(),
        },
        types,
        message,
    )
    assert signable.body == hash_struct(document)


@given(any_document, secrets)
def test_signature_verifies_for_its_signer_only(document: Any, secret: bytes) -> None:
    signer = Signer.from_secret(secret)
    signature = signer.sign(DOMAIN, document)
    assert verify(DOMAIN, document, signature, signer.address) == digest(DOMAIN, document)
    assert Account.from_key(secret).address.lower() == "0x" + signer.address.hex()
    with pytest.raises(BadSignature):
        verify(DOMAIN, document, signature, b"\x01" * 20)  # type: ignore[arg-type]
    with pytest.raises(BadSignature):
        verify(Domain(1, DOMAIN.verifying_contract), document, signature, signer.address)


@given(any_document, secrets, st.data())
def test_changing_any_field_breaks_the_signature(document: Any, secret: bytes, data: st.DataObject) -> None:
    signer = Signer.from_secret(secret)
    signature = signer.sign(DOMAIN, document)
    name, sol = data.draw(st.sampled_from(fields_of(type(document))))
    value = getattr(document, name)
    if sol == "bool":
        other: object = not value
    else:
        other = value ^ 1 if isinstance(value, int) else bytes([value[0] ^ 1]) + value[1:]
    with pytest.raises(BadSignature):
        verify(DOMAIN, replace(document, **{name: other}), signature, signer.address)


@given(secrets, st.binary(min_size=32, max_size=32))
def test_high_s_and_odd_lengths_are_refused(secret: bytes, message_digest: bytes) -> None:
    signer = Signer.from_secret(secret)
    signature = signer.sign_digest(message_digest)  # type: ignore[arg-type]
    assert recover_digest(message_digest, signature) == signer.address  # type: ignore[arg-type]
    s = int.from_bytes(signature[32:64], "big")
    malleable = signature[:32] + (ORDER - s).to_bytes(32, "big") + bytes([55 - signature[64]])
    for bad in (malleable, signature[:64], signature + b"\0", signature[:64] + b"\0", bytes(64) + b"\x1b"):
        assert recover_digest(message_digest, bad) is None  # type: ignore[arg-type]


@given(st.binary(max_size=80), st.binary(min_size=32, max_size=32))
def test_recovering_from_any_bytes_never_raises(signature: bytes, message_digest: bytes) -> None:
    recovered = recover_digest(message_digest, signature)  # type: ignore[arg-type]
    assert recovered is None or len(recovered) == 20


@pytest.mark.parametrize("value", [-1, 1 << 96, True, "5", 1.0])
def test_values_that_do_not_fit_are_refused_by_name(value: Any) -> None:
    voucher = Voucher(b"\x01" * 20, value)  # type: ignore[arg-type]
    with pytest.raises(FieldOutOfRange, match="cumulative"):
        hash_struct(voucher)


def test_secret_never_shows() -> None:
    signer = Signer.from_secret(b"\x07" * 32)
    assert "07" * 8 not in repr(signer)


def test_every_document_is_static_and_distinct() -> None:
    names = [struct.__name__ for struct in DOCUMENTS]
    assert len(set(names)) == len(names)
    for struct in DOCUMENTS:
        assert all(sol in ("address", "bytes32", "bool") or sol.startswith("uint") for _, sol in fields_of(struct))
