"""Settlement: the best voucher per payer goes to the chain in batches, journaled before it is broadcast.

A crash between journal and broadcast, or between broadcast and block, is mended at the next start: every settlement
still open is looked up on the chain by its hash, and either counted or dropped, its vouchers due again. Settling
twice pays nothing twice: the escrow pays up to a cumulative amount.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from incentives.ledger import SettlementDropped, SettlementMined, SettlementSent
from incentives.settlement import SettlePolicy, due
from node.crashpoints import crash_point, declare
from node.ports import Chain, ChainError, ChainUnavailable, Clock, Settled, Store
from node.provider.books import Books
from protocol.units import Address, Digest, Wei

log = logging.getLogger("tally.provider.settler")

JOURNALED: Final = declare("settler.journaled")
"""A settlement is on disk; nothing was broadcast."""

BROADCAST: Final = declare("settler.broadcast")
"""A settlement is in a block; the journal does not know."""

LOOK_BACK: Final = 16
"""Dropped settlements that are looked up again. Unit: settlements. One may be mined after it was given up, and belongs
into the books then; older ones had their nonce used by a successor."""


@dataclass(slots=True)
class SettlementTotals:
    """What this process settled. Wei of TALLY; `gas` in gas units."""

    batches: int = 0
    pairs: int = 0
    paid: Wei = field(default=Wei(0))
    fee: Wei = field(default=Wei(0))
    gas: int = 0
    last_error: str = ""


class Settler:
    """Decides when (incentives.settlement), journals, sends, and counts what came back."""

    def __init__(
        self, provider: Address, books: Books, store: Store, chain: Chain, clock: Clock, policy: SettlePolicy
    ) -> None:
        self._provider = provider
        self._books = books
        self._store = store
        self._chain = chain
        self._clock = clock
        self._policy = policy
        self._wake = asyncio.Event()
        self._busy = asyncio.Lock()
        self._last = clock.now_ms() // 1000
        self._unresolved = False
        self.totals = SettlementTotals()

    def wake(self) -> None:
        """Look now instead of at the next tick: a payer leaves, or value has piled up."""
        self._wake.set()

    async def resolve(self, reason: str) -> None:
        """Look up every settlement still open; one that is in no block is dropped, and its vouchers are due again.

        Dropping one that is mined later costs gas only: the escrow pays a cumulative amount once; it is found and
        counted here the next time. Raises: StoreError, ChainUnavailable.
        """
        dropped = await self._store.settlements(state="dropped", limit=LOOK_BACK)
        for row in (*await self._store.settlements(state="sent"), *dropped):
            try:
                result = await self._chain.settlement_result(row.transaction)
            except ChainUnavailable:
                raise
            except ChainError as exc:
                log.error(
                    "settlement 0x%s failed in its block, its vouchers are due again: %s", row.transaction.hex(), exc
                )
                result, reason = None, str(exc)
            if result is not None:
                await self._count(row.transaction, result)
            elif row.state == "sent":
                await self._store.write(SettlementDropped(row.transaction, reason))
        self._unresolved = False

    async def run(self) -> None:
        """Settle whenever it is due, until cancelled."""
        tick = max(0.2, min(5.0, self._policy.interval_s / 4))
        while True:
            try:
                async with asyncio.timeout(tick):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await self.settle_due()

    async def settle_due(self, *, everything: bool = False) -> Settled | None:
        """One batch if one is due (`everything`: whatever is unclaimed); None when there was nothing to do.

        Never raises for a chain that is down: vouchers are kept and tried again.
        """
        async with self._busy:
            now = self._clock.now_ms() // 1000
            policy = SettlePolicy(0, Wei(0), Wei(1)) if everything else self._policy
            signatures = {channel.key: signature for channel, signature in self._books.channels()}
            chosen = due([channel for channel, _ in self._books.channels()], now, self._last, policy)
            if not chosen:
                return None
            items = [(channel.key.client, channel.vouched, signatures[channel.key]) for channel in chosen]
            try:
                if self._unresolved:
                    await self.resolve("not in a block when the next settlement was due")
                return await self._send(items)
            except ChainUnavailable as exc:
                self.totals.last_error = str(exc)
                log.warning("settlement of %d channels waits, vouchers are kept: %s", len(items), exc)
            except ChainError as exc:
                self.totals.last_error = str(exc)
                log.error("settlement of %d channels failed, vouchers are kept: %s", len(items), exc)
            return None

    async def _send(self, items: list[tuple[Address, Wei, bytes]]) -> Settled:
        prepared = await self._chain.prepare_settlement(self._provider, items)
        self._unresolved = True  # until its fate is known, also when we are cancelled: looked up before the next one
        await self._store.write(SettlementSent(prepared.transaction, self._provider, prepared.vouchers))
        crash_point(JOURNALED)
        try:
            settled = await self._chain.send_settlement(prepared)
        except ChainUnavailable:
            raise
        except ChainError as exc:
            await self._store.write(SettlementDropped(prepared.transaction, str(exc)))
            raise
        crash_point(BROADCAST)
        await self._count(prepared.transaction, settled)
        self._unresolved = False
        self._last = self._clock.now_ms() // 1000
        return settled

    async def _count(self, sent: Digest, settled: Settled) -> None:
        mined = settled.mined
        await self._store.write(SettlementMined(sent, mined.block, mined.gas, mined.gas_wei, settled.paid, settled.fee))
        for client, _ in settled.claimed:
            await self._books.refresh(client)
        self.totals.batches += 1
        self.totals.pairs += len(settled.claimed)
        self.totals.paid = Wei(self.totals.paid + settled.paid)
        self.totals.fee = Wei(self.totals.fee + settled.fee)
        self.totals.gas += mined.gas
        self.totals.last_error = ""
