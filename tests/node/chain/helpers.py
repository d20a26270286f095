"""What the chain tests say often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from eth_hash.auto import keccak

from incentives.ledger import ChannelKey, SlotSeen
from protocol.eip712 import Domain
from protocol.messages import Tariff, Voucher
from protocol.signing import Signer
from protocol.units import Address, Digest, Wei
from tests.twins.chain_lab import AnvilLab, ChainLab, Node

T = TypeVar("T")
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


async def eventually(check: Callable[[], Awaitable[T | None]]) -> T:
    """What `check` returns once it is not None. For what happens in another process and cannot be waited on.

    Raises: TimeoutError.
    """
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = await check()
            if found is not None:
                return found
            await asyncio.sleep(0.02)


async def pooled(lab: AnvilLab, sender: Address, count: int = 1, other_than: Digest | None = None) -> list[Digest]:
    """Hashes of `sender`'s transactions in Anvil's pool, by nonce, once there are at least `count`, and the last one
    is not `other_than`."""

    async def look() -> list[Digest] | None:
        content = await lab.ask("txpool_content")
        found: dict[int, Digest] = {}
        for part in ("pending", "queued"):
            for account, by_nonce in content[part].items():
                if bytes.fromhex(account[2:]) == sender:
                    found |= {int(n): Digest(bytes.fromhex(t["hash"][2:])) for n, t in by_nonce.items()}
        hashes = [found[nonce] for nonce in sorted(found)]
        return hashes if len(hashes) >= count and hashes[-1] != other_than else None

    return await eventually(look)


async def send_as(lab: AnvilLab, sender: Address, to: Address, data: str = "0x", **fields: str) -> Digest:
    """A transaction from outside this node, without `sender`'s key."""
    await lab.ask("anvil_impersonateAccount", "0x" + sender.hex())
    body = {"from": "0x" + sender.hex(), "to": "0x" + to.hex(), "data": data, **fields}
    return Digest(bytes.fromhex((await lab.ask("eth_sendTransaction", body))[2:]))
