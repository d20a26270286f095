"""Merkle-sum tree: a root over receipts that also fixes what they add up to.

A node is (hash, sum); a parent hashes both children with their sums, so no receipt can be left out of the total
and no total can be inflated without changing the root. Leaves and inner nodes are hashed under different tags
(second-preimage safe, RFC 6962 2.1); an odd node is carried up unchanged. Every hash is 32 bytes and every sum at
most MAX_AMOUNT, so a sum that is negative or wraps around cannot hide inside the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eth_hash.auto import keccak

from protocol.errors import FieldOutOfRange
from protocol.units import MAX_AMOUNT, ZERO_DIGEST, Digest, Wei


@dataclass(frozen=True, slots=True)
class SumNode:
    """A subtree: its hash (32 bytes) and the wei below it."""

    hash: Digest
    total: Wei


@dataclass(frozen=True, slots=True)
class ProofStep:
    """A sibling on the way up, and on which side it stands."""

    sibling: SumNode
    sibling_is_left: bool


EMPTY = SumNode(ZERO_DIGEST, Wei(0))


def leaf(receipt: Digest, amount: Wei) -> SumNode:
    """Leaf of one receipt, by its digest, worth `amount` wei.

    Raises: FieldOutOfRange for a digest that is not 32 bytes or an amount that no voucher holds.
    """
    if len(receipt) != 32:
        raise FieldOutOfRange("SumNode", "receipt", receipt)
    if not 0 <= amount <= MAX_AMOUNT:
        raise FieldOutOfRange("SumNode", "amount", amount)
    return SumNode(Digest(keccak(b"\0" + receipt + amount.to_bytes(32, "big"))), amount)


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


def root(leaves: Sequence[SumNode]) -> SumNode:
    """Root and total of the leaves, in order; EMPTY for none. Raises: FieldOutOfRange for a total above MAX_AMOUNT."""
    level = list(leaves)
    while len(level) > 1:
        level = _level_up(level)
    return level[0] if level else EMPTY


def prove(leaves: Sequence[SumNode], index: int) -> tuple[ProofStep, ...]:
    """Inclusion proof of leaf `index`. Raises: IndexError."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    level, steps = list(leaves), []
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            steps.append(ProofStep(level[sibling], sibling_is_left=sibling < index))
        level = _level_up(level)
        index //= 2
    return tuple(steps)


def verify(receipt: Digest, amount: Wei, proof: Sequence[ProofStep], expected: SumNode) -> bool:
    """Whether `proof` leads from the receipt's leaf to the `expected` root and total, every sum on the way in range.

    The leaf is hashed here, from the receipt's digest: an inner node offered as a leaf is never one.
    """
    try:
        node = leaf(receipt, amount)
        for step in proof:
            node = _parent(step.sibling, node) if step.sibling_is_left else _parent(node, step.sibling)
    except FieldOutOfRange:
        return False
    return node == expected
