"""A planted error on a whole market: found by who looks, answered for, and nobody honest loses by it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from node.ports import CaseRecord, CaseState
from protocol.units import WEI_PER_TALLY, AuditOutcome
from tests.spine.judged import FAST, STAKE, JudgedMarket
from tests.spine.lab import idle, run, spec
from tests.twins.memory_court import CourtWorld


def was_forced(case: CaseRecord) -> bool:
    return case.was_forced


async def test_an_error_that_was_due_is_planted_found_and_answered_for() -> None:
    async with JudgedMarket() as market:
        market.court = CourtWorld(market.world, replace(FAST, forced_bps=10_000, commit_window=2_400))
        seller = await market.seller()
        judges = await market.judges_of(4)
        buyer = await market.buyer()
        looking = asyncio.create_task(market.case_of(seller.wallet.address, was_forced))
        while not looking.done():  # the error is due in an epoch with work in it, after the one before was drawn
            await run(buyer, spec(20))
            await asyncio.sleep(0.1)
        case = await looking
        await idle(seller)
        assert (case.outcome, case.state) == (AuditOutcome.IMPROBABLE, CaseState.CLOSED)
        assert seller.provider.epochs.committed >= 2
        assert market.world.head.state.stakes[seller.wallet.address] == 100 * WEI_PER_TALLY
        assert all(judge.stake() == STAKE for judge in judges)
        assert seller.provider.cases is not None and seller.provider.cases.convicted == 0
        assert not [event for event in market.events("Appealed") if event.about == seller.wallet.address]
