"""Merkle-sum tree: a root over an epoch's jobs that also fixes what they add up to.

A node is (hash, sum); a parent hashes both children with their sums, so no job can be left out of the total and no
total can be inflated without changing the root. Leaves and inner nodes are hashed under different tags
(second-preimage safe, RFC 6962 2.1); an odd node is carried up unchanged. Every hash is 32 bytes and every sum at
most MAX_AMOUNT, so a sum that is negative or wraps around cannot hide inside the tree.

Leaves stand in ascending order of job id, each job once. So two neighbouring leaves prove that a job between them is
absent, and two neighbours in the wrong order prove that the tree was not built by this rule. The side of each
sibling follows from the leaf's index and the tree's count, so a proof also proves the index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from eth_hash.auto import keccak

from protocol.errors import FieldOutOfRange
from protocol.units import MAX_AMOUNT, ZERO_DIGEST, Digest, JobId, Wei


@dataclass(frozen=True, slots=True)
class Entry:
    """A job in the tree: its id, the digest of its last receipt, and what it owes in wei."""

    job_id: JobId
    receipt: Digest
    amount: Wei


@dataclass(frozen=True, slots=True)
class SumNode:
    """A subtree: its hash (32 bytes) and the wei below it."""

    hash: Digest
    total: Wei


EMPTY = SumNode(ZERO_DIGEST, Wei(0))


def leaf(entry: Entry) -> SumNode:
    """keccak256(0 || job id || receipt || amount as u256), worth `amount` wei.

    Raises: FieldOutOfRange for an id or digest that is not 32 bytes or an amount that no voucher holds.
    """
    for name in ("job_id", "receipt"):
        if len(getattr(entry, name)) != 32:
            raise FieldOutOfRange("Entry", name, getattr(entry, name))
    if not 0 <= entry.amount <= MAX_AMOUNT:
        raise FieldOutOfRange("Entry", "amount", entry.amount)
    packed = b"\0" + entry.job_id + entry.receipt + entry.amount.to_bytes(32, "big")
    return SumNode(Digest(keccak(packed)), entry.amount)


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """In the tree's order. Raises: FieldOutOfRange when a job stands twice."""
    out = sorted(entries, key=lambda entry: entry.job_id)
    for before, after in pairwise(out):
        if before.job_id == after.job_id:
            raise FieldOutOfRange("Entry", "job_id", after.job_id)
    return out


def _parent(left: SumNode, right: SumNode) -> SumNode:
    """Raises: FieldOutOfRange for a hash that is not 32 bytes, or a sum below zero or beyond MAX_AMOUNT."""
    for node in (left, right):
        if len(node.hash) != 32:
            raise FieldOutOfRange("SumNode", "hash", node.hash)
        if node.total < 0:
            raise FieldOutOfRange("SumNode", "total", node.total)
    total = Wei(left.total + right.total)
    if total > MAX_AMOUNT:
        raise FieldOutOfRange("SumNode", "total", total)
    packed = left.hash + left.total.to_bytes(32, "big") + right.hash + right.total.to_bytes(32, "big")
    return SumNode(Digest(keccak(b"\1" + packed)), total)


def _level_up(level: Sequence[SumNode]) -> list[SumNode]:
    pairs = [_parent(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return [*pairs, level[-1]] if len(level) % 2 else pairs


def root(entries: Sequence[Entry]) -> SumNode:
    """Root and total of the entries as they stand; EMPTY for none. Raises: FieldOutOfRange for a total above
    MAX_AMOUNT."""
    level = [leaf(entry) for entry in entries]
    while len(level) > 1:
        level = _level_up(level)
    return level[0] if level else EMPTY


def prove(entries: Sequence[Entry], index: int) -> tuple[SumNode, ...]:
    """The siblings of leaf `index` from the leaf up. Raises: IndexError."""
    if not 0 <= index < len(entries):
        raise IndexError(f"leaf {index} of {len(entries)}")
    level, siblings = [leaf(entry) for entry in entries], []
    while len(level) > 1:
        if index ^ 1 < len(level):
            siblings.append(level[index ^ 1])
        level = _level_up(level)
        index //= 2
    return tuple(siblings)


def verify(entry: Entry, index: int, count: int, siblings: Sequence[SumNode], expected: SumNode) -> bool:
    """Whether `entry` is leaf `index` of `count` under the `expected` root and total, every sum on the way in range.

    The leaf is hashed here, from its parts: an inner node offered as a leaf is never one.
    """
    if not 0 <= index < count:
        return False
    rest = list(siblings)
    try:
        node = leaf(entry)
        while count > 1:
            if index ^ 1 < count:
                if not rest:
                    return False
                sibling = rest.pop(0)
                node = _parent(sibling, node) if index & 1 else _parent(node, sibling)
            index, count = index // 2, (count + 1) // 2
    except FieldOutOfRange:
        return False
    return not rest and node == expected
