"""Settlement: the best voucher per payer goes to the chain in batches, journaled before it is broadcast.

A crash between journal and broadcast, or between broadcast and block, is mended at the next start: every settlement
still open is looked up on the chain by its hash, and either counted or dropped, its vouchers due again. Settling
twice pays nothing twice: the escrow pays up to a cumulative amount.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from typing import Final

from incentives.ledger import SettlementDropped, SettlementMined, SettlementSent
from incentives.settlement import SettlePolicy, due
from node.background import pause
from node.crashpoints import crash_point, declare
from node.ports import Chain, ChainError, ChainUnavailable, Clock, Settled, Store, StoreError
from node.provider.books import Books
from protocol.errors import TallyError
from protocol.units import Address, Digest, Wei

log = logging.getLogger("tally.provider.settler")

JOURNALED: Final = declare("settler.journaled")
"""A settlement is on disk; nothing was broadcast."""

BROADCAST: Final = declare("settler.broadcast")
"""A settlement is in a block; the journal does not know."""

LOOK_BACK: Final = 16
"""Dropped settlements that are looked up again. Unit: settlements. One may be mined after it was given up, and belongs
into the books then; older ones had their nonce used by a successor."""

HOLD_S: Final = 60.0
"""How long a voucher rests that was sent and paid nothing. Unit: s. The slot is looked up again at once, so it is still
due only while the RPC lags or the chain reorganises; that passes, and until then each try would only cost gas."""

PARALLEL_SLOTS: Final = 8
"""Slots looked up at a time. Unit: reads. A public endpoint refuses a hundred at once."""


@dataclass(slots=True)
class SettlementTotals:
    """What this process settled. Wei of TALLY; `gas` in gas units. `last_error`: empty once a settlement succeeds."""

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
        self._failures = 0
        self._retry_at = 0.0
        self._held: dict[Address, float] = {}  # per client, until when (monotonic)
        self._claimed: dict[Address, Wei] = {}  # what our batches brought each channel to
        self.cap: Wei | None = None
        """Most wei that may stand unsettled behind the stake; None while it is not known."""
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
                self.totals.last_error = str(exc)
                result, why = None, str(exc)
            else:
                why = reason
            if result is not None:
                await self._count(row.transaction, result, row.vouchers)
            elif row.state == "sent":
                await self._store.write(SettlementDropped(row.transaction, why))
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

        Never raises for a chain that is down or refuses: vouchers are kept and tried again, after a pause unless
        `everything` is wanted; then the fate of one that was cut off is journaled too. Raises: StoreError.
        """
        async with self._busy:
            items = self._due(everything)
            if not everything and (not items or self._clock.monotonic() < self._retry_at):
                return None
            try:
                if self._unresolved:
                    await self.resolve("not in a block when the next settlement was due")
                    items = self._due(everything)
                settled = await self._send(items) if items else None
            except ChainError as exc:
                self._failed(len(items), exc)
                return None
            except StoreError as exc:
                self._failed(len(items), exc)
                raise
            self._failures, self._retry_at = 0, 0.0
            return settled

    async def settle_rest(self) -> None:
        """Settle whatever is unclaimed, until nothing is or the chain pays no more of it. Raises: StoreError."""
        self._held.clear()
        while (settled := await self.settle_due(everything=True)) is not None and settled.paid:
            log.info("settled %d wei of what was left", settled.paid)

    def _due(self, everything: bool) -> list[tuple[Address, Wei, bytes]]:
        """What to settle now: (client, cumulative, signature)."""
        now, since_start = self._clock.now_ms() // 1000, self._clock.monotonic()
        self._held = {client: until for client, until in self._held.items() if until > since_start}
        policy = SettlePolicy(0, Wei(0), Wei(1)) if everything else self._policy
        if self.cap is not None:  # beyond it cheating would pay, so clients buy nothing more
            policy = replace(policy, value=Wei(min(policy.value, self.cap)))
        channels = [item for item in self._books.channels() if item[0].key.client not in self._held]
        signatures = {channel.key: signature for channel, signature in channels}
        chosen = due([channel for channel, _ in channels], now, self._last, policy)
        return [(channel.key.client, channel.vouched, signatures[channel.key]) for channel in chosen]

    def _failed(self, channels: int, exc: TallyError) -> None:
        self._failures += 1
        wait = pause(self._failures)
        self._retry_at = self._clock.monotonic() + wait
        self.totals.last_error = str(exc)
        level = logging.WARNING if isinstance(exc, ChainUnavailable) else logging.ERROR
        log.log(level, "settling %d channels failed, vouchers are kept; next try in %g s: %s", channels, wait, exc)

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
        self._unresolved = False
        self._last = self._clock.now_ms() // 1000
        self.totals.last_error = ""
        # one that an earlier batch of ours paid, and a lagging look at the chain sent again, is no reason to hold
        unpaid = {client for client, amount in prepared.vouchers if amount > self._claimed.get(client, 0)}
        unpaid -= {client for client, _ in settled.claimed}
        self._claimed |= dict(settled.claimed)
        if unpaid:
            self._held |= dict.fromkeys(unpaid, self._clock.monotonic() + HOLD_S)
            log.warning("the contract skipped %d of %d vouchers", len(unpaid), len(prepared.vouchers))
        await self._count(prepared.transaction, settled, prepared.vouchers)
        return settled

    async def _count(self, sent: Digest, settled: Settled, vouchers: tuple[tuple[Address, Wei], ...]) -> None:
        mined = settled.mined
        await self._store.write(SettlementMined(sent, mined.block, mined.gas, mined.gas_wei, settled.paid, settled.fee))
        self.totals.batches += 1
        self.totals.pairs += len(settled.claimed)
        self.totals.paid = Wei(self.totals.paid + settled.paid)
        self.totals.fee = Wei(self.totals.fee + settled.fee)
        self.totals.gas += mined.gas
        await self._look_at({client for client, _ in vouchers})

    async def _look_at(self, clients: set[Address]) -> None:
        """Have the books see what the chain shows of these channels now; what it does not show stands as it was."""
        gate = asyncio.Semaphore(PARALLEL_SLOTS)

        async def look(client: Address) -> None:
            async with gate:
                try:
                    await self._books.refresh(client)
                except ChainError as exc:
                    log.warning("the slot of %s could not be read, it stands as it was: %s", client.hex(), exc)

        await asyncio.gather(*(look(client) for client in clients))
