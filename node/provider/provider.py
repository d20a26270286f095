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
    Court,
    Directory,
    Engine,
    Entropy,
    ModelCard,
    Store,
    StoreError,
    Transport,
)
from node.provider.audits import Audits
from node.provider.base import SAMPLE_S
from node.provider.books import Books
from node.provider.cases import Cases
from node.provider.decoys import Decoys, Terms
from node.provider.delivery import Tools
from node.provider.epochs import Epochs
from node.provider.offering import OFFER_LIFE_S, Offering, OfferTexts
from node.provider.reservations import Reservations
from node.provider.retention import Retention
from node.provider.server import JobServer, RunningJobs
from node.provider.settler import Settler
from node.provider.staking import Staking
from node.shredding import Shredder
from protocol.frames import AUDIT_PROTOCOL, CARD_PROTOCOL, JOB_PROTOCOL
from protocol.messages import Tariff
from protocol.signing import Signer
from protocol.units import FinishReason, Wei

log = logging.getLogger("tally.provider")

RETRY_S: Final = 2.0
"""Pause before the chain is tried again. Unit: s."""

FINISH_S: Final = 10.0
"""How long a stop waits at most for the last epoch to end and be committed to. Unit: s. On a chain with long epochs the
next start does it; waiting for those would make every restart as long."""

TARIFF_LOOK_S: Final = 0.1
"""How often a starting provider looks whether its tariff is in force. Unit: s."""


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """What the operator chose. `tariff`: prices, its sequence and dates are filled in. `stake`: wei to hold staked.

    `appeal`: put up the bond by itself against a verdict of guilty that no planted error explains.
    """

    tariff: Tariff
    texts: OfferTexts
    policy: SettlePolicy
    stake: Wei
    drain_s: float
    appeal: bool = True


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
        court: Court | None = None,
    ) -> None:
        """`court` None: this deployment has none, so nothing is committed to or audited."""
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
        running = RunningJobs()
        decoys = Decoys(
            self._wallet,
            node_key,
            engine,
            court,
            store,
            chain,
            clock,
            entropy,
            card,
            self._decoy_terms,
            running.accept,
            running.close,
        )
        self.epochs = Epochs(
            self._wallet,
            card.profile,
            engine.verifiability,
            node_key,
            court,
            store,
            clock,
            entropy,
            decoys,
            running.accepted,
        )
        keeps = court is not None or settings.texts.retention_hours > 0
        self.server = JobServer(
            tools,
            engine,
            entropy,
            card,
            self.offering,
            reservations,
            self._promised,
            running,
            self.epochs,
            keeps=keeps,
        )
        self.cases = None if court is None else Cases(court, chain, store, clock, appeals=settings.appeal)
        self.audits = Audits(chain.domain, node_key, store, chain, court, entropy)
        self.staking = Staking(self._wallet, self.books, self.settler, store, chain, clock, lambda: self.epochs.rules)
        retention = Retention(court, store, self.epochs, self.cases, clock)
        self.shredder = Shredder(Role.PROVIDER, settings.texts.retention_hours, store, clock, retention.may_go)
        transport.serve(JOB_PROTOCOL, self.server.handle_job)
        transport.serve(CARD_PROTOCOL, self.server.handle_card)
        transport.serve(AUDIT_PROTOCOL, self.audits.handle)
        self.background = Background(clock)
        self._tasks: list[asyncio.Task[None]] = []
        self._renew_at = 0.0

    def _on_exit(self) -> None:
        self.settler.wake()

    def _decoy_terms(self) -> Terms | None:
        standing = self.offering.standing()
        return None if standing is None else Terms(*standing)

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
        start = self.background.start
        # Before there is anything to sell: commitments and answers are owed for what was sold before the restart.
        self._tasks = [start("committing", self.epochs.run, "what is not committed to yet is noted and tried again")]
        if self.cases is not None:
            self._tasks.append(start("watching cases", self.cases.run, "a case is looked up again"))
        while not self.offering.terms_in_force():
            await self._clock.sleep(TARIFF_LOOK_S)
        await self.offering.renew()
        self._renew_at = self._clock.monotonic() + OFFER_LIFE_S / 2
        self._tasks += [
            start("settling", self.settler.run, "vouchers are kept and due again"),
            start("following the chain", self._watch, "jobs are served up to confirmed escrow"),
            start("offering", self._keep_offering, "the present offer and tariff stand"),
            start("the base price", self._follow_base, "the present offer's multiplier stands"),
            start("watching the stake", self.staking.run, "the stake known last stands"),
            start("shredding", self.shredder.run, "content is kept until it can be"),
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
        await self.epochs.join()
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
                await self.epochs.finish(min(self._settings.drain_s, FINISH_S))
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
            "busy_s": round(stats.busy_s, 3),
            "channels": len(channels),
            "vouched_wei": str(sum(channel.vouched for channel in channels)),
            "unclaimed_wei": str(sum(max(0, channel.unclaimed) for channel in channels)),
            "settled_wei": str(totals.paid),
            "protocol_fee_wei": str(totals.fee),
            "settlements": totals.batches,
            "settlement_gas": totals.gas,
            "settlement_pairs": totals.pairs,
            "last_settlement_error": totals.last_error,
            "commitments": self.epochs.committed,
            "commitments_unposted": self.epochs.unposted,
            "commitments_why_not": self.epochs.why_not or self.epochs.conflict,
            "dossiers_shown": self.audits.dossiers,
            "convictions": 0 if self.cases is None else self.cases.convicted,
            "content_shredded": self.shredder.shredded,
            **self.staking.status(),
            "background": self.background.status(),
        }
