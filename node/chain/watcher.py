"""Following a provider's channels through reorganisations.

Events only tell which slots to look at; what is reported is always read from state, at the confirmed block. The last
blocks' hashes are remembered with the channels each of them touched: when a block is no longer on the chain, its
channels are read again, so what vanished with it is reported as the chain then has it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final, Protocol

from incentives.ledger import ChannelKey, SlotSeen
from node.chain.reader import BlockRef
from node.ports import ChainError, Clock, SlotHandler
from protocol.units import ZERO_ADDRESS, Address, Digest, Wei

_log = logging.getLogger(__name__)

TRAIL_BLOCKS: Final = 64
"""Blocks remembered. Two epochs of Ethereum's finality; a reorganisation deeper than this is no error, it only makes
the watcher read everything again."""


class SlotReader(Protocol):
    """What the watcher needs of the chain."""

    async def confirmed(self) -> BlockRef: ...

    async def block(self, which: int | str | Digest) -> BlockRef: ...

    async def changes(self, provider: Address, first: int, last: int) -> dict[int, set[ChannelKey]]: ...

    async def slots(self, keys: Iterable[ChannelKey], block: int) -> dict[ChannelKey, SlotSeen | None]: ...


class SlotWatcher:
    """Calls `handler` for each slot of `provider` that opened or changed at or after block `from_block`.

    A vanished slot is reported with a zero owner and zero amounts. A handler's exception ends the watch.
    """

    def __init__(
        self,
        reader: SlotReader,
        provider: Address,
        handler: SlotHandler,
        clock: Clock,
        *,
        from_block: int,
        poll_s: float,
    ) -> None:
        self._reader, self._provider, self._handler, self._clock = reader, provider, handler, clock
        self._from_block, self._poll_s = from_block, poll_s
        self._next = from_block
        self._trail: dict[int, Digest] = {}
        self._touched: dict[int, set[ChannelKey]] = {}
        self._known: dict[ChannelKey, SlotSeen] = {}
        self._due: set[ChannelKey] = set()

    async def run(self) -> None:
        """Look, report, sleep, for ever. Whatever is wrong with the chain, it only means looking again later."""
        down = False
        while True:
            try:
                await self.step()
                if down:
                    _log.info("the chain answers again")
                down = False
            except ChainError as exc:
                if not down:
                    _log.warning("watching slots is paused: %s", exc)
                down = True
            await self._clock.sleep(self._poll_s)

    async def step(self) -> None:
        """One look at the chain. Raises: ChainUnavailable, ChainError, and what the handler raises.

        Nothing is forgotten when it fails half way: channels stay due until they were read and reported.
        """
        target = await self._reader.confirmed()
        if self._trail.get(target.number) == target.hash:
            # Nothing new, or a node behind a load balancer that lags: what it lacks is not gone.
            await self._report(target)
            return
        await self._rewind(target)
        fresh = await self._link(target)
        changes = await self._reader.changes(self._provider, self._next, target.number)
        if fresh is None or (await self._reader.block(target.number)).hash != target.hash:
            return  # reorganised while we read: the next look starts from what is true then
        for number, keys in changes.items():
            self._due |= keys
            self._touched[number] = keys
        self._trail |= fresh
        self._next = target.number + 1
        self._forget_old()
        await self._report(target)

    async def _rewind(self, target: BlockRef) -> None:
        """Drop remembered blocks that are no longer on the chain; their channels are due."""
        for number in sorted(self._trail, reverse=True):
            on_chain: Digest | None
            if number == target.number - 1:
                on_chain = target.parent
            elif number <= target.number:
                on_chain = (await self._reader.block(number)).hash
            else:
                on_chain = None
            if self._trail[number] == on_chain:
                return
            _log.info("block %d was reorganised away", number)
            self._due |= self._touched.pop(number, set())
            del self._trail[number]
            self._next = number
        if self._next > self._from_block:  # deeper than the trail, or another chain altogether
            self._due |= set(self._known)
            self._touched.clear()
            self._next = self._from_block

    async def _link(self, target: BlockRef) -> dict[int, Digest] | None:
        """Hashes of the blocks from `_next` to `target`, at most TRAIL_BLOCKS, each the parent of the next.

        None when they do not join the trail: then the chain changed since `_rewind` looked.
        """
        fresh, block = {target.number: target.hash}, target
        while block.number > self._next and len(fresh) < TRAIL_BLOCKS:
            block = await self._reader.block(block.parent)
            fresh[block.number] = block.hash
        before = self._trail.get(block.number - 1)
        return fresh if before is None or before == block.parent else None

    async def _report(self, target: BlockRef) -> None:
        if not self._due:
            return
        slots = await self._reader.slots(self._due, target.number)
        if (await self._reader.block(target.number)).hash != target.hash:
            return
        for key, seen in slots.items():
            known = self._known.get(key)
            if seen is None:
                seen = SlotSeen(key, ZERO_ADDRESS, Wei(0), Wei(0), 0, target.number)
            if known is None or _content(known) != _content(seen):
                await self._handler(seen)
                self._known[key] = seen
            self._due.discard(key)

    def _forget_old(self) -> None:
        for number in sorted(self._trail)[:-TRAIL_BLOCKS]:
            del self._trail[number]
        oldest = min(self._trail)
        self._touched = {number: keys for number, keys in self._touched.items() if number >= oldest}


def _content(seen: SlotSeen) -> tuple[Address, Wei, Wei, int]:
    return seen.owner, seen.deposit, seen.claimed, seen.exit_at
