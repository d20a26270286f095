"""An honest provider before a whole Court: with slow validators, hostile clients, restarts and a wrong clock."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from incentives.audit_draw import case_key
from incentives.committee import GUILTY
from incentives.ledger import Role
from node.jobstream import JobStream
from node.ports import CaseState, JobFailed, JobSpec, NoProvider, Replay, ReplayRequest
from node.provider.delivery import Delivery
from protocol.eip712 import hash_struct
from protocol.errors import Refused
from protocol.frames import VoucherFrame
from protocol.units import WEI_PER_TALLY, AuditOutcome, Digest
from tests.spine.judged import FAST, JudgedMarket
from tests.spine.lab import LabClock, Market, Seller, idle, run, spec, until
from tests.spine.test_metering import texts
from tests.twins.engine_twin import EngineTwin, profile
from tests.twins.memory_court import RULES, CourtWorld
from tests.twins.replayer_twin import ReplayerTwin

STAKE = 100 * WEI_PER_TALLY


def staked(seller: Seller) -> int:
    return seller.chain.world.head.state.stakes[seller.wallet.address]


def hurried(window: int = 4) -> JudgedMarket:
    """At the wall's own speed, with an epoch of a second: jobs are cut off after three quarters of the window."""
    market = JudgedMarket(clock=LabClock(1.0))
    market.court = CourtWorld(market.world, replace(RULES, epoch_seconds=1, commit_window=window))
    return market


class Slow(ReplayerTwin):
    """Takes so long for a text that the window closes."""

    def __init__(self, clock: LabClock, seconds: float) -> None:
        super().__init__(EngineTwin())
        self._clock, self._seconds = clock, seconds

    async def replay(self, request: ReplayRequest) -> Replay:
        await self._clock.sleep(self._seconds)
        return await super().replay(request)


@pytest.mark.slow
async def test_validators_too_slow_for_the_window_do_not_call_it_withheld() -> None:
    """Even if the provider is away when they notice: it delivered when it was asked."""
    market = JudgedMarket()
    market.court = CourtWorld(market.world, replace(FAST, epoch_seconds=20))
    async with market:
        seller = await market.seller()
        for _ in range(3):
            await market.judge(replayer=Slow(market.clock, 8.0))
        buyer = await market.buyer()
        await market.clock.sleep(20 - market.clock.now_ms() / 1000 % 20)
        for _ in range(6):
            await run(buyer, spec(10))
        await idle(seller)
        case = await market.case_of(seller.wallet.address, lambda case: case.state is CaseState.SUBMIT)
        while market.world.head.state.timestamp < case.until - FAST.submit_window + 26:
            await market.world.tick.wait()
        await seller.transport.stop()  # the fourth of six replays is under way
        await market.case_of(seller.wallet.address, lambda case: case.round > 0 or case.outcome in GUILTY)
        await seller.transport.start()
        case = await market.closed(seller.wallet.address)
        assert case.state is CaseState.UNDECIDED and case.slashed == 0 and staked(seller) == STAKE
        assert not market.events("Appealed"), "in no round was there anything to appeal against"


async def gone(seller: Seller, job: Any) -> None:
    try:
        await asyncio.wait_for(job, 15)
    except (JobFailed, NoProvider, Refused, TimeoutError):
        pass
    await idle(seller)


async def committed_in_time(market: JudgedMarket, seller: Seller) -> bool:
    assert market.court is not None
    (job,) = await seller.store.jobs(Role.PROVIDER)
    epoch = job.opened_at_ms // 1000
    key = case_key(seller.wallet.address, Digest(hash_struct(seller.engine.profile)), epoch)
    while market.world.head.state.timestamp < epoch + 1 + market.court.rules.commit_window:
        await market.world.tick.wait()
    return await seller.provider.epochs._court.commitment(key) is not None  # type: ignore[union-attr]


async def test_a_voucher_that_is_held_back_does_not_hold_up_the_commitment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client could otherwise have it slashed for a commitment that comes too late."""
    async with hurried() as market:
        seller, buyer = await market.seller(), await market.buyer(stall_s=30.0)
        send = JobStream.send

        async def never(self: JobStream, *outgoing: Any) -> None:
            if not any(isinstance(frame, VoucherFrame) for frame in outgoing):
                await send(self, *outgoing)

        monkeypatch.setattr(JobStream, "send", never)
        job = asyncio.create_task(gone(seller, run(buyer, spec(100))))
        await until(lambda: seller.provider.server.running == 1)
        assert await committed_in_time(market, seller)
        await job


@pytest.mark.slow
@pytest.mark.parametrize("job", [spec(100), texts(4, 5)])
async def test_a_client_that_reads_nothing_does_not_hold_up_the_commitment(
    job: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A send that never returns is broken off."""
    async with hurried(8) as market:
        seller, buyer = await market.seller(), await market.buyer(stall_s=30.0)
        issued, hang = Delivery._issue, asyncio.Event()

        async def stuck(self: Delivery, finish: Any) -> Any:
            made = await issued(self, finish)
            await hang.wait()
            return made

        monkeypatch.setattr(Delivery, "_issue", stuck)
        task = asyncio.create_task(gone(seller, run(buyer, job)))
        await until(lambda: seller.provider.server.running == 1)
        assert await committed_in_time(market, seller)
        await task


async def test_a_change_of_model_while_a_case_is_open_is_answered_and_passes() -> None:
    """The jobs of the former profile are committed and shown by a node that serves another."""
    async with JudgedMarket() as market:
        seller = await market.seller()
        await market.judges_of(3)
        buyer = await market.buyer()
        await run(buyer, spec(40))
        await idle(seller)
        await seller.provider.stop()
        await seller.transport.stop()
        await seller.store.close()
        engine = EngineTwin()
        engine.profile = profile(b"the next model")
        again = await market.seller(store=seller.store, keys=(seller.wallet, seller.node_key), engine=engine)
        case = await market.closed(seller.wallet.address)
        assert case.profile_id == hash_struct(EngineTwin().profile) != hash_struct(again.engine.profile)
        assert case.outcome is AuditOutcome.PASS and staked(again) == STAKE


async def test_a_machine_whose_clock_is_far_behind_sells_nothing() -> None:
    """Its jobs would fall into epochs that nobody can commit to any more."""
    async with JudgedMarket() as market:
        seller, buyer = await market.seller(), await market.buyer()
        market.clock.wrong_s = -3_600.0
        await market.clock.sleep(2 * 30.0)
        with pytest.raises((NoProvider, Refused)):
            await run(buyer, spec(10))
        assert await seller.store.jobs(Role.PROVIDER) == []


async def test_the_market_examines_what_it_leaves() -> None:
    """The check behind every spine test can fail: a receipt that was altered in the journal is found."""
    market = Market()
    await market.__aenter__()
    seller, buyer = await market.seller(), await market.buyer()
    await run(buyer, spec(40))
    await idle(seller)
    (key,) = [key for key, row in seller.store._receipts.items() if row.receipt.is_final]  # type: ignore[attr-defined]
    row = seller.store._receipts[key]  # type: ignore[attr-defined]
    altered = replace(row.receipt, completion_tokens=39)
    seller.store._receipts[key] = replace(row, receipt=altered)  # type: ignore[attr-defined]
    await market.stack.aclose()
    with pytest.raises(Exception, match="signature of WorkReceipt"):
        await market.examine_honest()
