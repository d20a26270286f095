"""The Merkle-sum tree: every job proves its place and amount, absence shows between neighbours, nothing else does."""

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
from protocol.merkle import EMPTY, Entry, SumNode, leaf, ordered, prove, root, verify
from protocol.units import MAX_AMOUNT, Digest, JobId, Wei
from tests.protocol.sheets import ON_SLOW_CPU

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "merkle.json").read_text())

words = st.binary(min_size=32, max_size=32)
entries_ = st.builds(Entry, words.map(JobId), words.map(Digest), st.integers(0, 10**24).map(Wei))
trees = st.lists(entries_, min_size=1, max_size=40, unique_by=lambda entry: entry.job_id).map(ordered)


def numbered(count: int) -> list[Entry]:
    return [Entry(JobId(bytes([i]) * 32), Digest(bytes([i, 7]) * 16), Wei(10 * i)) for i in range(count)]


# --------------------------------------------------------------------------------------------------------- what holds


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33])
def test_every_leaf_of_every_size_proves_its_place(size: int) -> None:
    tree = numbered(size)
    for index, entry in enumerate(tree):
        siblings = prove(tree, index)
        assert verify(entry, index, size, siblings, root(tree))
        assert len(siblings) <= (size - 1).bit_length()
        assert [at for at in range(size) if verify(entry, at, size, siblings, root(tree))] == [index]


@ON_SLOW_CPU
@given(trees, st.data())
def test_a_proof_of_any_leaf_verifies(tree: list[Entry], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(tree) - 1))
    assert verify(tree[index], index, len(tree), prove(tree, index), root(tree))


@ON_SLOW_CPU
@given(trees)
def test_the_roots_total_is_the_sum_of_the_jobs(tree: list[Entry]) -> None:
    assert root(tree).total == sum(entry.amount for entry in tree)


def test_no_jobs_have_the_empty_root() -> None:
    assert root([]) == EMPTY and EMPTY.total == 0


@ON_SLOW_CPU
@given(trees, st.randoms(use_true_random=False))
def test_the_order_is_the_job_ids_however_they_come(tree: list[Entry], chance: Any) -> None:
    shuffled = list(tree)
    chance.shuffle(shuffled)
    assert ordered(shuffled) == tree == sorted(tree, key=lambda entry: entry.job_id)


@ON_SLOW_CPU
@given(trees)
def test_a_job_stands_once(tree: list[Entry]) -> None:
    with pytest.raises(FieldOutOfRange):
        ordered([*tree, replace(tree[0], amount=Wei(tree[0].amount + 1))])


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_proof_of_a_leaf_that_is_not_there(index: int) -> None:
    with pytest.raises(IndexError):
        prove(numbered(3), index)


@ON_SLOW_CPU
@given(trees, words)
def test_an_absent_job_has_two_neighbours_that_leave_no_room(tree: list[Entry], absent: bytes) -> None:
    """What the fault MISSING rests on: of each absent job, one or two proved leaves show that it is not there."""
    assume(absent not in [entry.job_id for entry in tree])
    count, top = len(tree), root(tree)
    after = sum(entry.job_id < absent for entry in tree)
    around = [index for index in (after - 1, after) if 0 <= index < count]
    assert all(verify(tree[index], index, count, prove(tree, index), top) for index in around)
    ids = [tree[index].job_id for index in around]
    assert sorted([*ids, absent])[1 if after else 0] == absent
    assert len(around) == 2 or after in (0, count)


# ----------------------------------------------------------------------------------------------- what is not believed


@ON_SLOW_CPU
@given(trees, entries_, st.data())
def test_another_leaf_does_not_verify(tree: list[Entry], other: Entry, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(tree) - 1))
    top, siblings, entry = root(tree), prove(tree, index), tree[index]
    assume(other.job_id != entry.job_id and other.receipt != entry.receipt and other.amount != entry.amount)
    for name in ("job_id", "receipt", "amount"):
        bent = replace(entry, **{name: getattr(other, name)})
        assert not verify(bent, index, len(tree), siblings, top)


@ON_SLOW_CPU
@given(trees, st.integers(-2, 50), st.integers(-2, 50), st.data())
def test_neither_index_nor_count_can_be_another(tree: list[Entry], index: int, count: int, data: st.DataObject) -> None:
    """At the committed count an entry has one place. The count itself is the Commitment's, not the root's."""
    own = data.draw(st.integers(0, len(tree) - 1))
    top, siblings = root(tree), prove(tree, own)
    assert verify(tree[own], index, len(tree), siblings, top) == (index == own)
    assume(not 0 <= index < count)
    assert not verify(tree[own], index, count, siblings, top)


@ON_SLOW_CPU
@given(trees.filter(lambda tree: len(tree) > 1), st.data())
def test_an_altered_proof_does_not_verify(tree: list[Entry], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(tree) - 1))
    top, siblings = root(tree), prove(tree, index)
    at = data.draw(st.integers(0, len(siblings) - 1))
    step = siblings[at]
    flipped = Digest(bytes([step.hash[0] ^ 1]) + step.hash[1:])
    for bent in (
        replace(step, hash=flipped),
        replace(step, total=Wei(step.total + 1)),
        replace(step, total=Wei(-step.total - 1)),
    ):
        assert not verify(tree[index], index, len(tree), (*siblings[:at], bent, *siblings[at + 1 :]), top)
    assert not verify(tree[index], index, len(tree), siblings[:at] + siblings[at + 1 :], top)
    assert not verify(tree[index], index, len(tree), (*siblings, step), top)


@ON_SLOW_CPU
@given(trees, st.integers(1, 10**24), st.data())
def test_neither_root_nor_total_can_be_another(tree: list[Entry], more: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(tree) - 1))
    top, siblings = root(tree), prove(tree, index)
    for bent in (replace(top, total=Wei(top.total + more)), replace(top, hash=Digest(keccak(top.hash)))):
        assert not verify(tree[index], index, len(tree), siblings, bent)


@ON_SLOW_CPU
@given(trees, st.permutations(range(40)))
def test_another_order_is_another_root(tree: list[Entry], order: list[int]) -> None:
    shuffled = [tree[i] for i in order if i < len(tree)]
    assume(shuffled != tree)
    assert root(shuffled).hash != root(tree).hash


def test_an_inner_node_is_no_leaf() -> None:
    """Second preimages: what a parent hashes is never what a leaf hashes, at any split of the bytes."""
    tree = numbered(4)
    top, (own, upper) = root(tree), prove(tree, 0)
    first = leaf(tree[0])
    inner = root(tree[:2])
    assert verify(tree[0], 0, 4, (own, upper), top)
    preimage = first.hash + first.total.to_bytes(32, "big") + own.hash + own.total.to_bytes(32, "big")
    assert keccak(b"\1" + preimage) == inner.hash
    for job_id, receipt in (
        (preimage[:32], preimage[32:64]),
        (preimage[32:64], preimage[64:96]),
        (first.hash, own.hash),
    ):
        fake = Entry(JobId(job_id), Digest(receipt), inner.total)
        assert leaf(fake).hash != inner.hash and not verify(fake, 0, 2, (upper,), top)


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_sibling_hash_of_another_length_does_not_verify(length: int) -> None:
    tree = numbered(2)
    assert not verify(tree[0], 0, 2, (SumNode(Digest(b"\7" * length), Wei(10)),), root(tree))


@pytest.mark.parametrize("total", [-1, MAX_AMOUNT + 1, 1 << 256, -(1 << 256)])
def test_a_sibling_worth_what_no_voucher_holds_does_not_verify(total: int) -> None:
    tree = numbered(2)
    assert not verify(tree[0], 0, 2, (SumNode(leaf(tree[1]).hash, Wei(total)),), root(tree))
    assert not verify(replace(tree[0], amount=Wei(total)), 0, 2, prove(tree, 0), root(tree))


def test_a_total_beyond_a_commitment_is_refused() -> None:
    first, second = numbered(2)
    with pytest.raises(FieldOutOfRange):
        root([replace(first, amount=Wei(MAX_AMOUNT)), replace(second, amount=Wei(1))])


# ------------------------------------------------------------------------------------------------------------ vectors


def entry_of(row: list[str]) -> Entry:
    return Entry(JobId(bytes.fromhex(row[0])), Digest(bytes.fromhex(row[1])), Wei(int(row[2])))


def node_of(row: list[str]) -> SumNode:
    return SumNode(Digest(bytes.fromhex(row[0])), Wei(int(row[1])))


@pytest.mark.parametrize("case", VECTORS["root"], ids=lambda case: case["name"])
def test_root_vectors(case: dict[str, Any]) -> None:
    tree = [entry_of(row) for row in case["pre"]]
    if "post" not in case:
        with pytest.raises(FieldOutOfRange):
            root(tree)
        return
    assert root(tree) == node_of(case["post"])


@pytest.mark.parametrize("case", VECTORS["proof"], ids=lambda case: case["name"])
def test_proof_vectors(case: dict[str, Any]) -> None:
    claim = case["input"]
    siblings = [node_of(row) for row in claim["siblings"]]
    held = verify(entry_of(claim["entry"]), claim["index"], claim["count"], siblings, node_of(case["pre"]))
    assert held == ("post" in case)


def test_leaf_and_parent_by_hand() -> None:
    """The formulas of the README, byte by byte, so that vectors and code cannot drift together."""
    one, two = numbered(2)
    hashes = [keccak(b"\0" + entry.job_id + entry.receipt + entry.amount.to_bytes(32, "big")) for entry in (one, two)]
    packed = b"".join(found + entry.amount.to_bytes(32, "big") for found, entry in zip(hashes, (one, two), strict=True))
    assert root([one, two]) == SumNode(Digest(keccak(b"\1" + packed)), Wei(one.amount + two.amount))
