"""The Merkle-sum tree: every receipt proves its way to the root, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eth_hash.auto import keccak
from hypothesis import assume, given
from hypothesis import strategies as st

from protocol.errors import FieldOutOfRange
from protocol.merkle import EMPTY, ProofStep, SumNode, leaf, prove, root, verify
from protocol.units import MAX_AMOUNT, Digest, Wei
from tests.protocol.sheets import ON_SLOW_CPU

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "merkle.json").read_text())

receipts = st.binary(min_size=32, max_size=32).map(Digest)
items = st.tuples(receipts, st.integers(0, 10**24).map(Wei))
lists = st.lists(items, min_size=1, max_size=40)


def nodes(entries: list[tuple[Digest, Wei]]) -> list[SumNode]:
    return [leaf(receipt, amount) for receipt, amount in entries]


def number(entries: int) -> list[tuple[Digest, Wei]]:
    return [(Digest(bytes([i]) * 32), Wei(10 * i)) for i in range(entries)]


# --------------------------------------------------------------------------------------------------------- what holds


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33])
def test_every_leaf_of_every_size_proves_its_way_to_the_root(size: int) -> None:
    entries = number(size)
    top = root(nodes(entries))
    for index, (receipt, amount) in enumerate(entries):
        assert verify(receipt, amount, prove(nodes(entries), index), top)


@ON_SLOW_CPU
@given(lists, st.data())
def test_a_proof_of_any_leaf_verifies(entries: list[tuple[Digest, Wei]], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(entries) - 1))
    proof = prove(nodes(entries), index)
    assert verify(*entries[index], proof, root(nodes(entries)))
    assert len(proof) <= (len(entries) - 1).bit_length()


@ON_SLOW_CPU
@given(st.lists(items, max_size=40))
def test_the_roots_total_is_the_sum_of_the_receipts(entries: list[tuple[Digest, Wei]]) -> None:
    assert root(nodes(entries)).total == sum(amount for _, amount in entries)


def test_no_receipts_have_the_empty_root() -> None:
    assert root([]) == EMPTY and EMPTY.total == 0


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_proof_of_a_leaf_that_is_not_there(index: int) -> None:
    with pytest.raises(IndexError):
        prove(nodes(number(3)), index)


# ----------------------------------------------------------------------------------------------- what is not believed


@ON_SLOW_CPU
@given(lists, items, st.data())
def test_another_leaf_does_not_verify(
    entries: list[tuple[Digest, Wei]], other: tuple[Digest, Wei], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(entries) - 1))
    top, proof = root(nodes(entries)), prove(nodes(entries), index)
    receipt, amount = entries[index]
    assume(receipt != other[0] and amount != other[1])
    assert not verify(other[0], amount, proof, top)
    assert not verify(receipt, other[1], proof, top)


@ON_SLOW_CPU
@given(lists.filter(lambda entries: len(entries) > 1), st.data())
def test_an_altered_proof_does_not_verify(entries: list[tuple[Digest, Wei]], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(entries) - 1))
    top, proof = root(nodes(entries)), prove(nodes(entries), index)
    receipt, amount = entries[index]
    at = data.draw(st.integers(0, len(proof) - 1))
    step = proof[at]
    flipped = Digest(bytes([step.sibling.hash[0] ^ 1]) + step.sibling.hash[1:])
    for bent in (
        replace(step, sibling=replace(step.sibling, hash=flipped)),
        replace(step, sibling=replace(step.sibling, total=Wei(step.sibling.total + 1))),
        replace(step, sibling=replace(step.sibling, total=Wei(-step.sibling.total - 1))),
    ):
        assert not verify(receipt, amount, (*proof[:at], bent, *proof[at + 1 :]), top)
    assert not verify(receipt, amount, proof[:at] + proof[at + 1 :], top)
    assert not verify(receipt, amount, (*proof, step), top)


@ON_SLOW_CPU
@given(st.lists(items, min_size=2, max_size=40, unique_by=lambda item: item[0]), st.data())
def test_a_sibling_on_the_other_side_does_not_verify(entries: list[tuple[Digest, Wei]], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(entries) - 1))
    top, proof = root(nodes(entries)), prove(nodes(entries), index)
    at = data.draw(st.integers(0, len(proof) - 1))
    bent = replace(proof[at], sibling_is_left=not proof[at].sibling_is_left)
    assert not verify(*entries[index], (*proof[:at], bent, *proof[at + 1 :]), top)


@ON_SLOW_CPU
@given(lists, st.integers(1, 10**24), st.data())
def test_neither_root_nor_total_can_be_another(
    entries: list[tuple[Digest, Wei]], more: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(entries) - 1))
    top, proof = root(nodes(entries)), prove(nodes(entries), index)
    assert not verify(*entries[index], proof, replace(top, total=Wei(top.total + more)))
    assert not verify(*entries[index], proof, replace(top, hash=Digest(keccak(top.hash))))


@ON_SLOW_CPU
@given(lists, st.permutations(range(40)))
def test_another_order_is_another_root(entries: list[tuple[Digest, Wei]], order: list[int]) -> None:
    shuffled = [entries[i] for i in order if i < len(entries)]
    assume(shuffled != entries)
    assert root(nodes(shuffled)).hash != root(nodes(entries)).hash


def test_an_inner_node_is_no_receipt() -> None:
    """Second preimages: what a parent hashes is never what a leaf hashes, at any split of the bytes."""
    entries = number(4)
    level = nodes(entries)
    top, (own, upper) = root(level), prove(level, 0)
    inner = keccak(
        b"\1"
        + level[0].hash
        + level[0].total.to_bytes(32, "big")
        + own.sibling.hash
        + own.sibling.total.to_bytes(32, "big")
    )
    assert not verify(Digest(inner), Wei(level[0].total + own.sibling.total), (upper,), top)
    preimage = level[0].hash + level[0].total.to_bytes(32, "big") + own.sibling.hash
    with pytest.raises(FieldOutOfRange):
        leaf(Digest(preimage), own.sibling.total)


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_sibling_hash_of_another_length_does_not_verify(length: int) -> None:
    entries = number(2)
    bent = ProofStep(SumNode(Digest(b"\7" * length), Wei(10)), sibling_is_left=False)
    assert not verify(*entries[0], (bent,), root(nodes(entries)))


@pytest.mark.parametrize("total", [-1, MAX_AMOUNT + 1, 1 << 256, -(1 << 256)])
def test_a_sibling_worth_what_no_voucher_holds_does_not_verify(total: int) -> None:
    entries = number(2)
    bent = ProofStep(SumNode(leaf(*entries[1]).hash, Wei(total)), sibling_is_left=False)
    assert not verify(*entries[0], (bent,), root(nodes(entries)))
    assert not verify(entries[0][0], Wei(total), prove(nodes(entries), 0), root(nodes(entries)))


@pytest.mark.parametrize(
    ("receipt", "amount"), [(b"\1" * 32, -1), (b"\1" * 32, MAX_AMOUNT + 1), (b"\1" * 31, 1), (b"\1" * 33, 1)]
)
def test_no_leaf_of_such_a_receipt(receipt: bytes, amount: int) -> None:
    with pytest.raises(FieldOutOfRange):
        leaf(Digest(receipt), Wei(amount))


def test_a_total_beyond_a_commitment_is_refused() -> None:
    most = leaf(Digest(b"\1" * 32), Wei(MAX_AMOUNT))
    with pytest.raises(FieldOutOfRange):
        root([most, leaf(Digest(b"\2" * 32), Wei(1))])


# ------------------------------------------------------------------------------------------------------------ vectors


def entries_of(case: dict[str, Any]) -> list[tuple[Digest, Wei]]:
    return [(Digest(bytes.fromhex(receipt)), Wei(int(amount))) for receipt, amount in case["pre"]]


@pytest.mark.parametrize("case", VECTORS["root"], ids=lambda case: case["name"])
def test_root_vectors(case: dict[str, Any]) -> None:
    if "post" not in case:
        with pytest.raises(FieldOutOfRange):
            root(nodes(entries_of(case)))
        return
    top = root(nodes(entries_of(case)))
    assert (top.hash.hex(), str(top.total)) == (case["post"]["hash"], case["post"]["total"])


@pytest.mark.parametrize("case", VECTORS["proof"], ids=lambda case: case["name"])
def test_proof_vectors(case: dict[str, Any]) -> None:
    given_proof = case["input"]
    proof = [
        ProofStep(SumNode(Digest(bytes.fromhex(digest)), Wei(int(total))), side == "left")
        for side, digest, total in given_proof["steps"]
    ]
    top = SumNode(Digest(bytes.fromhex(case["pre"]["hash"])), Wei(int(case["pre"]["total"])))
    held = verify(Digest(bytes.fromhex(given_proof["receipt"])), Wei(int(given_proof["amount"])), proof, top)
    assert held == ("post" in case)
