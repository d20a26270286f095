"""A client over its providers: what they leave out costs them their stake, and what a slash owes the payer it gets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from incentives.audit_draw import case_key
from incentives.ledger import Role
from node.chain.court import FaultKind, encode_proof
from node.client.claims import Claims
from node.client.oversight import GRACE_S, TRIES, Oversight
from node.ports import CourtEvent, JobRow, StoreError
from node.provider.epochs import Epochs
from protocol import merkle
from protocol.eip712 import hash_struct
from protocol.units import WEI_PER_TALLY, Digest
from tests.spine.judged import FAST, JudgedMarket
from tests.spine.lab import Buyer, Seller, SystemEntropy, idle, run, spec
from tests.twins.memory_court import CourtWorld, MemoryCourt
from tests.twins.replayer_twin import Altering

STAKE = 100 * WEI_PER_TALLY

EPOCH_S = 20
"""A second of the wall, so that a few jobs are of one epoch."""


@asynccontextmanager
async def opened(epoch_s: int = EPOCH_S) -> AsyncIterator[JudgedMarket]:
    """A market whose Court has such epochs."""
    market = JudgedMarket()
    market.court = CourtWorld(market.world, replace(FAST, epoch_seconds=epoch_s, answer_window=4))
    async with market:
        yield market


async def beginning(market: JudgedMarket) -> None:
    """The clock goes on to where an epoch begins."""
    market.clock.ahead_s += EPOCH_S - market.clock.now_ms() / 1000 % EPOCH_S
    await market.world.tick.wait()


def overseer(market: JudgedMarket, buyer: Buyer) -> Oversight:
    """As a start of the client makes it, over what its journal holds."""
    assert market.court is not None
    court = MemoryCourt(market.court, buyer.chain)
    claims = Claims(buyer.wallet.address, buyer.store, buyer.chain, court)
    directory, transport = buyer.router._directory, buyer.transport
    ports = (buyer.store, buyer.chain, court, transport, directory, market.clock, SystemEntropy())
    return Oversight(claims, *ports, encode_proof)


async def bought(market: JudgedMarket, seller: Seller, buyer: Buyer, jobs: int = 3) -> list[JobRow]:
    """Jobs of one epoch."""
    await beginning(market)
    for _ in range(jobs):
        await run(buyer, spec(20))
    await idle(seller)
    rows = await buyer.store.jobs(Role.CLIENT)
    assert len({row.opened_at_ms // 1000 // EPOCH_S for row in rows}) == 1, "the machine is too slow for this test"
    return rows


async def pass_time(market: JudgedMarket, seconds: float) -> None:
    """The chain's time too."""
    market.clock.ahead_s += seconds
    while market.world.head.state.timestamp < market.clock.now_ms() // 1000 - 1:
        await market.world.tick.wait()


def key_of(seller: Seller, job: JobRow, epoch_s: int = EPOCH_S) -> Digest:
    profile = Digest(hash_struct(seller.engine.profile))
    return case_key(seller.wallet.address, profile, job.opened_at_ms // 1000 // epoch_s)


def proven(market: JudgedMarket, buyer: Buyer) -> list[tuple[int, int]]:
    """(kind, slashed) of every fault on chain, each shown by the buyer."""
    events: list[CourtEvent] = market.events("FaultProven")
    assert all(event.values["reporter"] == buyer.wallet.address for event in events)
    return [(int(event.values["kind"]), int(event.values["slashed"])) for event in events]  # type: ignore[arg-type]


def leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers omit their first job, whichever it is."""
    honest, first = Epochs._entry, []

    async def entry(self: Epochs, job: JobRow) -> merkle.Entry | None:
        first.append(job.job_id)
        return None if job.job_id == first[0] else await honest(self, job)

    monkeypatch.setattr(Epochs, "_entry", entry)


async def test_an_omitted_job_costs_half_of_the_stake_and_pays_who_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out(monkeypatch)
    async with opened() as market:
        seller = await market.seller()
        seller.cheats = True
        buyer = await market.buyer()
        jobs = await bought(market, seller, buyer)
        watch = overseer(market, buyer)
        await watch.look()
        assert proven(market, buyer) == [] and watch.seen.refused == 0, "nothing is due before the epoch is over"
        await market.committed(seller.wallet.address)
        before = await buyer.chain.token_balance(buyer.wallet.address)
        await watch.look()
        assert proven(market, buyer) == [(FaultKind.MISSING, STAKE // 2)]
        assert await buyer.chain.token_balance(buyer.wallet.address) == before + STAKE // 2 // 10 // 2
        found = await watch.claims.remembered(key_of(seller, jobs[0]))
        assert found is not None and found.jobs == 3 and len(found.places) == 2
        await watch.look()
        await overseer(market, buyer).look()
        assert len(proven(market, buyer)) == 1


async def test_a_crash_between_the_proof_and_the_note_of_it_proves_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_out(monkeypatch)
    async with opened() as market:
        seller = await market.seller()
        seller.cheats = True
        buyer = await market.buyer()
        jobs = await bought(market, seller, buyer)
        await market.committed(seller.wallet.address)
        keep = buyer.store.put_value

        async def full(key: str, value: bytes) -> None:
            raise StoreError("the disk is full")

        buyer.store.put_value = full  # type: ignore[method-assign]
        with pytest.raises(StoreError):
            await overseer(market, buyer).look()
        buyer.store.put_value = keep  # type: ignore[method-assign]
        assert len(proven(market, buyer)) == 1
        again = overseer(market, buyer)
        await again.look()
        assert (again.seen.proved, again.seen.refused, len(proven(market, buyer))) == (0, 1, 1)
        assert await again.claims.remembered(key_of(seller, jobs[0])) is not None


async def test_a_tree_out_of_order_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job may hide in one from a search that trusts the order."""
    honest = merkle.ordered

    def backwards(entries: Sequence[merkle.Entry]) -> list[merkle.Entry]:
        return honest(entries)[::-1]

    async with opened() as market:
        seller = await market.seller()
        seller.cheats = True
        buyer = await market.buyer()
        await bought(market, seller, buyer)
        monkeypatch.setattr(merkle, "ordered", backwards)
        await market.committed(seller.wallet.address)
        await overseer(market, buyer).look()
        assert proven(market, buyer) == [(FaultKind.UNSORTED, STAKE // 2)]


async def test_an_epoch_without_a_commitment_costs_a_tenth_and_a_late_one_is_still_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = Epochs.commit_due

    async def never(self: Epochs) -> None:
        pass

    monkeypatch.setattr(Epochs, "commit_due", never)
    async with opened() as market:
        seller = await market.seller()
        buyer = await market.buyer()
        jobs = await bought(market, seller, buyer)
        watch = overseer(market, buyer)
        await pass_time(market, EPOCH_S + FAST.commit_window + 1)
        await watch.look()
        assert proven(market, buyer) == [] and watch.seen.refused == 0, "there is time for a late one to be mined"
        await pass_time(market, GRACE_S + 1)
        await watch.look()
        await watch.look()
        assert proven(market, buyer) == [(FaultKind.UNCOMMITTED, STAKE // 10)] and watch.seen.refused == 0
        monkeypatch.setattr(Epochs, "commit_due", honest)
        await market.committed(seller.wallet.address)
        await watch.look()
        found = await watch.claims.remembered(key_of(seller, jobs[0]))
        assert found is not None and len(found.places) == 3 and len(proven(market, buyer)) == 1


async def test_nothing_is_ever_shown_of_the_honest_though_they_restart_and_come_late() -> None:
    async with opened() as market:
        seller = await market.seller()
        buyer = await market.buyer()
        watch = overseer(market, buyer)
        jobs = await bought(market, seller, buyer)
        await watch.look()
        await seller.provider.stop()
        await seller.transport.stop()
        await seller.store.close()
        market.sellers.remove(seller)
        await watch.look()
        await pass_time(market, EPOCH_S + FAST.commit_window - 10)
        await watch.look()
        again = await market.seller(store=seller.store, keys=(seller.wallet, seller.node_key))
        await market.committed(again.wallet.address)
        await watch.look()
        await pass_time(market, GRACE_S + 60)
        await watch.look()
        await overseer(market, buyer).look()
        assert proven(market, buyer) == [] and watch.seen.refused == 0
        found = await watch.claims.remembered(key_of(again, jobs[0]))
        assert found is not None and len(found.places) == found.jobs == 3


async def test_a_provider_that_shows_no_entries_is_left_to_the_committee(caplog: pytest.LogCaptureFixture) -> None:
    async with opened() as market:
        seller = await market.seller()
        buyer = await market.buyer()
        jobs = await bought(market, seller, buyer)
        await market.committed(seller.wallet.address)
        await seller.transport.stop()
        watch = overseer(market, buyer)
        for _ in range(TRIES + 3):
            await watch.look()
        assert proven(market, buyer) == [] and await watch.claims.remembered(key_of(seller, jobs[0])) is None
        said = [record for record in caplog.records if "does not show which jobs" in record.message]
        assert len(said) == 1


@pytest.mark.slow
async def test_the_payer_is_compensated_once_without_the_provider() -> None:
    async with opened(4) as market:
        seller = await market.seller(engine=Altering())
        await market.judges_of(3)
        buyer = await market.buyer()
        await run(buyer, spec(100))
        await market.committed(seller.wallet.address)
        watch = overseer(market, buyer)
        (job,) = await buyer.store.jobs(Role.CLIENT)
        await watch.look()
        early = await watch.claims.claim(key_of(seller, job, 4))
        assert early.jobs == 0 and ("is not carried out" in early.why or "not drawn" in early.why)
        case = await market.closed(seller.wallet.address)
        assert case.slashed == STAKE
        await seller.transport.stop()
        before = await buyer.chain.token_balance(buyer.wallet.address)
        restarted = overseer(market, buyer)
        await restarted.look()
        paid = await buyer.chain.token_balance(buyer.wallet.address) - before
        assert 0 < paid == job.owed and restarted.seen.compensated == 1, "the pool is larger than what was paid"
        for again in (watch, restarted, overseer(market, buyer)):
            await again.look()
        assert len(market.events("Compensated")) == 1
        assert "paid before" in (await watch.claims.claim(case.id)).why


async def test_a_case_that_closed_without_a_slash_owes_nothing() -> None:
    async with opened(4) as market:
        seller = await market.seller()
        await market.judges_of(3)
        buyer = await market.buyer()
        await run(buyer, spec(30))
        case: Any = await market.closed(seller.wallet.address)
        watch = overseer(market, buyer)
        assert "no job of this home" in (await watch.claims.claim(case.id)).why
        await watch.look()
        assert "closed as PASS" in (await watch.claims.claim(case.id)).why
        assert market.events("Compensated") == []
