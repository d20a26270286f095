"""The contracts' accounting in memory: blocks of state, a pool of transactions, and faults on demand.

One `MemoryLedgerChain` is the world that any number of `MemoryChain` nodes look at. It says what the Solidity says
(errors by the same names, the same roundings), so that the contract tests of the Chain port hold for both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from eth_hash.auto import keccak

from node.chain.errors import ContractReverted
from protocol.eip712 import Domain
from protocol.units import Address, Digest
from tests.twins.memory_contracts import SettledEvent, State

GAS: Final = 100_000
"""Every transaction uses this much. Unit: gas. Only its being above zero matters to the tests."""
GAS_PRICE: Final = 10**9
"""Wei of coin a unit of gas costs."""


@dataclass(frozen=True, slots=True)
class Transaction:
    """A signed call: `run` changes a state or raises ContractReverted; a settlement returns its event."""

    hash: Digest
    sender: Address
    nonce: int
    run: Callable[[State], object]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a transaction in a block."""

    event: SettledEvent | None
    error: ContractReverted | None


@dataclass(frozen=True, slots=True)
class Block:
    """A block and the state after it."""

    number: int
    hash: Digest
    state: State
    outcomes: dict[Digest, Outcome]
    transactions: tuple[Transaction, ...]


class MemoryLedgerChain:
    """The world: a chain of blocks over one escrow, registry and token.

    `automine`: a block per transaction, as Anvil does. `down`: no node's RPC answers while it is set.
    """

    def __init__(
        self,
        domain: Domain | None = None,
        *,
        epoch_seconds: int = 60,
        exit_delay: int = 3600,
        min_stake: int = 0,
        unbond_delay: int = 1_200,
        timestamp: int = 1_800_000_000,
    ) -> None:
        self.domain = domain or Domain(31337, Address(b"\x0e" * 20))
        self.epoch_seconds, self.exit_delay = epoch_seconds, exit_delay
        self.min_stake, self.unbond_delay = min_stake, unbond_delay
        self.automine = True
        self.pool: dict[Digest, Transaction] = {}
        self._down = False
        self._tick = asyncio.Event()
        self._forks = 0
        self.blocks = [Block(0, Digest(keccak(b"genesis")), State(timestamp), {}, ())]

    # ------------------------------------------------------------------------------------------------ looking at it

    @property
    def head(self) -> Block:
        return self.blocks[-1]

    @property
    def down(self) -> bool:
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        self._down = value
        self.notify()

    def find(self, transaction: Digest) -> tuple[Block, Outcome] | None:
        """The block a transaction is in, and what it did."""
        for block in reversed(self.blocks):
            if transaction in block.outcomes:
                return block, block.outcomes[transaction]
        return None

    def next_nonce(self, sender: Address) -> int:
        """Transactions of `sender` in blocks and in the pool."""
        return self.head.state.nonces.get(sender, 0) + sum(t.sender == sender for t in self.pool.values())

    @property
    def tick(self) -> asyncio.Event:
        """Set at the next block, reorg, or change of `down`; a new one every time, so take it before looking."""
        return self._tick

    def notify(self) -> None:
        self._tick.set()
        self._tick = asyncio.Event()

    # ------------------------------------------------------------------------------------------------ moving it on

    def fund(self, account: Address, tally: int, coin: int) -> None:
        """Give wei of TALLY and of the chain's coin, in a block of its own."""
        self.mine(1)
        for pot, amount in ((self.head.state.tally, tally), (self.head.state.coin, coin)):
            pot[account] = pot.get(account, 0) + amount

    def submit(self, transaction: Transaction) -> None:
        """Put into the pool, once; mined at once when `automine`."""
        if transaction.hash in self.pool or self.find(transaction.hash):
            return
        self.pool[transaction.hash] = transaction
        if self.automine:
            self.mine(1)

    def mine(self, count: int = 1, seconds: int = 1) -> None:
        """`count` blocks, `seconds` apart; the first takes what the pool holds and its nonces allow."""
        for _ in range(count):
            state = self.head.state.copy(self.head.state.timestamp + seconds)
            outcomes: dict[Digest, Outcome] = {}
            mined = []
            for transaction in self._ready():
                outcomes[transaction.hash] = _execute(state, transaction)
                mined.append(transaction)
            number = len(self.blocks)
            seed = b"%d|%d|" % (number, self._forks) + self.head.hash + b"".join(sorted(outcomes))
            self.blocks.append(Block(number, Digest(keccak(seed)), state, outcomes, tuple(mined)))
        self.notify()

    def advance(self, seconds: int) -> None:
        """Let chain time pass, in one block."""
        self.mine(1, seconds)

    def reorg(self, depth: int, *, repool: bool = False) -> None:
        """Replace the last `depth` blocks by empty ones. `repool`: what they held waits in the pool again."""
        self._forks += 1
        orphans, self.blocks = self.blocks[-depth:], self.blocks[:-depth]
        automine, pool = self.automine, self.pool
        self.pool = {}
        self.mine(depth)
        self.automine, self.pool = automine, pool
        if repool:
            self.pool.update({t.hash: t for block in orphans for t in block.transactions})

    def drop(self, transaction: Digest) -> None:
        """The pool forgets a transaction."""
        self.pool.pop(transaction, None)

    def _ready(self) -> Iterator[Transaction]:
        """Pool transactions whose nonce is next, in order; those whose nonce was used vanish."""
        nonces = dict(self.head.state.nonces)
        for transaction in sorted(self.pool.values(), key=lambda t: t.nonce):
            expected = nonces.get(transaction.sender, 0)
            if transaction.nonce <= expected:
                del self.pool[transaction.hash]
            if transaction.nonce == expected:
                nonces[transaction.sender] = expected + 1
                yield transaction


def _execute(state: State, transaction: Transaction) -> Outcome:
    state.nonces[transaction.sender] = transaction.nonce + 1
    state.coin[transaction.sender] = state.coin.get(transaction.sender, 0) - GAS * GAS_PRICE
    trial = state.copy(state.timestamp)
    try:
        event = transaction.run(trial)
    except ContractReverted as error:
        return Outcome(None, error)
    state.become(trial)
    return Outcome(event if isinstance(event, SettledEvent) else None, None)
