"""The journal's form of a document: exact, of fixed width, and of one version."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.ports import StoreError
from node.store.documents import decode, encode, pack_tokens, unpack_tokens
from node.store.tables import WEI_DIGITS, WeiText
from protocol.eip712 import fields_of, type_hash
from protocol.errors import FieldOutOfRange
from protocol.messages import DOCUMENTS, Accept, Voucher
from protocol.units import MAX_AMOUNT, Address


def _values(sol: str) -> st.SearchStrategy[Any]:
    if sol in ("address", "bytes32"):
        size = 20 if sol == "address" else 32
        return st.binary(min_size=size, max_size=size)
    return st.booleans() if sol == "bool" else st.integers(0, (1 << int(sol[4:])) - 1)


@st.composite
def _documents(draw: st.DrawFn) -> Any:
    struct: Any = draw(st.sampled_from(DOCUMENTS))
    return struct(**{name: draw(_values(sol)) for name, sol in fields_of(struct)})


@given(_documents())
def test_every_document_comes_back_as_it_was(document: Any) -> None:
    again = decode(type(document), encode(document))
    assert again == document
    assert [type(getattr(again, name)) for name, _ in fields_of(type(document))] == [
        type(getattr(document, name)) for name, _ in fields_of(type(document))
    ]


def test_a_document_of_another_version_or_kind_says_so() -> None:
    stored = encode(Voucher(Address(b"\x01" * 20), 5))
    assert stored == type_hash(Voucher)[:4] + b"\x01" * 20 + (5).to_bytes(12, "big")
    for wrong in (b"\0\0\0\0" + stored[4:], stored[:-1], stored + b"\0", b""):
        with pytest.raises(StoreError, match="a stored Voucher is of another version"):
            decode(Voucher, wrong)
    with pytest.raises(StoreError, match="a stored Accept is of another version"):
        decode(Accept, stored)


@pytest.mark.parametrize(("size", "amount"), [(19, 5), (20, -1), (20, 1 << 96)])
def test_what_does_not_fit_its_field_is_refused(size: int, amount: int) -> None:
    with pytest.raises(FieldOutOfRange):
        encode(Voucher(Address(b"\x01" * size), amount))


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_tokens_come_back(tokens: list[int]) -> None:
    assert list(unpack_tokens(pack_tokens(tuple(tokens)))) == tokens


def test_tokens_out_of_range_are_refused() -> None:
    for wrong in (-1, 2**32):
        with pytest.raises(FieldOutOfRange):
            pack_tokens((wrong,))


@given(st.integers(0, MAX_AMOUNT), st.integers(0, MAX_AMOUNT))
def test_amounts_sort_as_text_as_they_do_as_numbers(one: int, other: int) -> None:
    column: Any = WeiText()
    texts = [column.process_bind_param(amount, None) for amount in (one, other)]
    assert [len(text) for text in texts] == [WEI_DIGITS] * 2
    assert (texts[0] < texts[1]) == (one < other)
    assert [column.process_result_value(text, None) for text in texts] == [one, other]
