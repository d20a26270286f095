"""What the chain tests say often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from eth_hash.auto import keccak

from incentives.ledger import ChannelKey, SlotSeen
from protocol.eip712 import Domain
from protocol.messages import Tariff, Voucher
from protocol.signing import Signer
from protocol.units import Address, Digest, Wei
from tests.twins.chain_lab import ChainLab, Node

Item = tuple[Address, Wei, bytes]

PATIENCE_S = 10.0
"""What a test waits for what must happen; it takes milliseconds, or the test fails."""


def session(number: int) -> Signer:
    """A session key."""
    return Signer.from_secret(keccak(b"session key %d" % number))


def voucher(domain: Domain, key: Signer, provider: Address, cumulative: int) -> Item:
    """A voucher as the provider's journal holds it."""
    return key.address, Wei(cumulative), key.sign(domain, Voucher(provider, cumulative))


async def settle(node: Node, provider: Address, *items: Item) -> tuple[int, int]:
    """(paid, fee) of one settlement."""
    settled = await node.send_settlement(await node.prepare_settlement(provider, items))
    return settled.paid, settled.fee


def tariff(provider: Address, sequence: int, valid_from: int) -> Tariff:
    """A price sheet; the prices do not matter here."""
    times = {"valid_from": valid_from, "valid_until": valid_from + 3600}
    names = [n for n in Tariff.__slots__ if n not in ("provider", "profile_id", "sequence", *times)]
    return Tariff(provider, sequence, Digest(b"\x07" * 32), **dict.fromkeys(names, 1), **times)


class Reports:
    """What `watch_slots` said, to be waited for."""

    def __init__(self) -> None:
        self.all: list[SlotSeen] = []
        self._more = asyncio.Event()

    async def __call__(self, seen: SlotSeen) -> None:
        self.all.append(seen)
        self._more.set()

    async def until(self, wanted: Callable[[SlotSeen], bool]) -> SlotSeen:
        """The newest report that is `wanted`, or the first to come. Raises: TimeoutError."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = [seen for seen in self.all if wanted(seen)]
                if found:
                    return found[-1]
                self._more.clear()
                await self._more.wait()

    def latest(self) -> dict[ChannelKey, SlotSeen]:
        """What is believed of each channel now."""
        return {seen.key: seen for seen in self.all}


@asynccontextmanager
async def watching(node: Node, provider: Address) -> AsyncIterator[Reports]:
    """A running `watch_slots`."""
    reports = Reports()
    task = asyncio.create_task(node.watch_slots(provider, reports))
    try:
        yield reports
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def balanced(lab: ChainLab, reader: Node, keys: list[ChannelKey], providers: list[Address]) -> None:
    """Conservation, to the wei: the Escrow has what is deposited and unclaimed, earned, and due to be burned."""
    slots = [await reader.slot(key) for key in keys]
    unclaimed = sum(slot.deposit - slot.claimed for slot in slots if slot is not None)
    earned = sum([await reader.earned(provider) for provider in providers])
    assert await lab.escrow_holds() == unclaimed + earned + await lab.fees_pending()
