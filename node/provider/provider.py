"""The provider role whole: recovers, registers, offers, serves, settles, drains. node/app.py wires its ports.

Contract: an accepted job reaches the journal before its first token and is closed in it exactly once, whatever ends
it; what was vouched for is settled before a clean stop, and after an unclean one at the next start.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from incentives.ledger import JobClosed, Role
from incentives.prefixes import REMEMBERED, Prefixes
from incentives.settlement import SettlePolicy
from node.background import Background
from node.ports import (
    Chain,
    ChainError,
    ChainUnavailable,
    Clock,
    Directory,
    Engine,
    Entropy,
    ModelCard,
    Store,
    StoreError,
    Transport,
)
from node.provider.base import SAMPLE_S
from node.provider.books import Books
from node.provider.delivery import Tools
from node.provider.offering import OFFER_LIFE_S, Offering, OfferTexts
from node.provider.reservations import Reservations
from node.provider.server import JobServer
from node.provider.settler import Settler
from protocol.frames import CARD_PROTOCOL, JOB_PROTOCOL
from protocol.messages import Tariff
from protocol.signing import Signer
from protocol.units import FinishReason, Wei

log = logging.getLogger("tally.provider")

RETRY_S: Final = 2.0
"""Pause before the chain is tried again. Unit: s."""

TARIFF_LOOK_S: Final = 0.1
"""How often a starting provider looks whether its tariff is in force. Unit: s."""


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """What the operator chose. `tariff`: prices, its sequence and dates are filled in. `stake`: wei to hold staked."""

    tariff: Tariff
    texts: OfferTexts
    policy: SettlePolicy
    stake: Wei
    drain_s: float


class Provider:
    """One provider wallet's node. `start` returns when jobs are accepted."""

    def __init__(
        self,
        settings: ProviderSettings,
        node_key: Signer,
        engine: Engine,
        card: ModelCard,
        store: Store,
        chain: Chain,
        transport: Transport,
        directory: Directory,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._settings = settings
        self._node_key = node_key
        self._engine = engine
        self._store = store
        self._chain = chain
        self._clock = clock
        self._wallet = settings.tariff.provider
        self.books = Books(self._wallet, store, chain, self._on_exit)
        self.settler = Settler(self._wallet, self.books, store, chain, clock, settings.policy)
        self.offering = Offering(
            settings.tariff, settings.texts, node_key, engine, store, chain, transport, directory, clock, entropy
        )
        tools = Tools(chain.domain, node_key, self.books, store, clock)
        reservations = Reservations(self._wallet, card.profile_id, chain)
        self._promised = Prefixes()
        self.server = JobServer(tools, engine, entropy, card, self.offering, reservations, self._promised)
        transport.serve(JOB_PROTOCOL, self.server.handle_job)
        transport.serve(CARD_PROTOCOL, self.server.handle_card)
        self.background = Background(clock)
        self._tasks: list[asyncio.Task[None]] = []
        self._renew_at = 0.0

    def _on_exit(self) -> None:
        self.settler.wake()

    async def start(self) -> None:
        """Recover, register, log the tariff, wait until it is in force, offer.

        Raises: StoreError, ChainError.
        """
        await self.books.load()
        finals = await self._store.receipts(role=Role.PROVIDER, final_only=True, limit=REMEMBERED)
        for row in reversed(finals):  # the engine starts with an empty cache, our promises stand
            self._promised.remember(row.receipt)
        for job in await self._store.jobs(Role.PROVIDER, open_only=True):
            detail = "the provider stopped while it was running; what was vouched for is kept"
            await self._store.write(JobClosed(Role.PROVIDER, job.job_id, FinishReason.ERROR, job.owed, detail))
        caught_up = await self._join()
        while not self.offering.terms_in_force():
            await self._clock.sleep(TARIFF_LOOK_S)
        await self.offering.renew()
        self._renew_at = self._clock.monotonic() + OFFER_LIFE_S / 2
        start = self.background.start
        self._tasks = [
            start("settling", self.settler.run, "vouchers are kept and due again"),
            start("following the chain", self._watch, "jobs are served up to confirmed escrow"),
            start("offering", self._keep_offering, "the present offer and tariff stand"),
            start("the base price", self._follow_base, "the present offer's multiplier stands"),
        ]
        if not caught_up:
            self._tasks.append(start("joining", self._join_later, "jobs are served up to confirmed escrow"))

    async def _join(self) -> bool:
        """Register, log the tariff, look up open settlements; whether the chain answered.

        With the RPC down a provider that was registered and logged before serves on, up to confirmed escrow; one that
        never was waits for the chain. Raises: ChainError, StoreError.
        """
        while True:
            try:
                await self._register()
            except ChainUnavailable as exc:
                log.warning("the chain does not answer, trying again every %g s: %s", RETRY_S, exc)
                if await self.offering.recall_tariff():
                    return False
                await self._clock.sleep(RETRY_S)
            else:
                return True

    async def _register(self) -> None:
        await self._chain.register_provider(self._node_key.secret, self._settings.stake)
        await self.offering.prepare_tariff()
        await self.settler.resolve("lost in a restart")

    async def _join_later(self) -> None:
        """What `_join` left undone. Raises: ChainError, StoreError, and may then be tried again."""
        await self._clock.sleep(RETRY_S)
        await self._register()

    async def stop(self) -> None:
        """Refuse new jobs, finish or cut off running ones, settle everything, stop. Idempotent."""
        await self.server.drain(self._settings.drain_s)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if tasks:
            try:
                await self.settler.settle_rest()
            except StoreError as exc:
                log.error("the last vouchers stay for the next start: %s", exc)

    async def _watch(self) -> None:
        """Follow our escrow slots for ever. Raises: ChainError, StoreError, and may then be called again."""
        await self._chain.watch_slots(self._wallet, self.books.see_slot)

    async def _keep_offering(self) -> None:
        """Renew tariff and offer in time, for ever. Raises: StoreError, and may then be called again."""
        while True:
            await self._clock.sleep(max(0.0, self._renew_at - self._clock.monotonic()))
            try:
                await self.offering.prepare_tariff()
            except ChainError as exc:
                log.warning("the tariff could not be renewed, the present one stands: %s", exc)
            await self.offering.renew()
            self._renew_at = self._clock.monotonic() + OFFER_LIFE_S / 2

    async def _follow_base(self) -> None:
        """Offer anew when load moved the multiplier, for ever. Raises: StoreError, and may then be called again."""
        while True:
            await self._clock.sleep(SAMPLE_S)
            if await self.offering.base_moved():
                await self.offering.renew()

    async def status(self) -> dict[str, object]:
        """Plain JSON values for `tally status`; amounts as decimal strings of wei."""
        stats, totals = self._engine.stats(), self.settler.totals
        channels = [channel for channel, _ in self.books.channels()]
        return {
            "role": "provider",
            "wallet": "0x" + self._wallet.hex(),
            "model": self._settings.texts.model,
            "profile": "0x" + self._settings.tariff.profile_id.hex(),
            "jobs_running": self.server.running,
            "jobs_served": self.server.jobs_served,
            "tokens_served": self.server.tokens_served,
            "slots": stats.slots,
            "slots_active": stats.active,
            "queued": stats.queued,
            "channels": len(channels),
            "vouched_wei": str(sum(channel.vouched for channel in channels)),
            "unclaimed_wei": str(sum(max(0, channel.unclaimed) for channel in channels)),
            "settled_wei": str(totals.paid),
            "protocol_fee_wei": str(totals.fee),
            "settlements": totals.batches,
            "settlement_gas": totals.gas,
            "settlement_pairs": totals.pairs,
            "last_settlement_error": totals.last_error,
            "background": self.background.status(),
        }
