"""Merkle-sum tree: a root over receipts that also fixes what they add up to.

A node is (hash, sum); a parent hashes both children with their sums, so no receipt can be left out of the total
and no total can be inflated without changing the root. Leaves and inner nodes are hashed under different tags
(second-preimage safe, RFC 6962 2.1); an odd node is carried up unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eth_hash.auto import keccak

from protocol.units import ZERO_DIGEST, Digest, Wei


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
    """Leaf of one receipt worth `amount` wei. Raises: ValueError for a negative amount."""
    if amount < 0:
        raise ValueError("a receipt cannot be worth less than nothing")
    return SumNode(Digest(keccak(b"\0" + receipt + amount.to_bytes(32, "big"))), amount)


def _parent(left: SumNode, right: SumNode) -> SumNode:
    packed = left.hash + left.total.to_bytes(32, "big") + right.hash + right.total.to_bytes(32, "big")
    return SumNode(Digest(keccak(b"\1" + packed)), Wei(left.total + right.total))


def _level_up(level: Sequence[SumNode]) -> list[SumNode]:
    pairs = [_parent(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return [*pairs, level[-1]] if len(level) % 2 else pairs


def root(leaves: Sequence[SumNode]) -> SumNode:
    """Root and total of the leaves, in order; EMPTY for none."""
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


def verify(node: SumNode, proof: Sequence[ProofStep], expected: SumNode) -> bool:
    """Whether `proof` leads from leaf `node` to the `expected` root and total, with no negative sum on the way."""
    for step in proof:
        if step.sibling.total < 0:
            return False
        node = _parent(step.sibling, node) if step.sibling_is_left else _parent(node, step.sibling)
    return node == expected
