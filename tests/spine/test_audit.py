"""Validators on a whole market in one process: the honest are paid and left alone, cheats and liars are slashed."""

from __future__ import annotations

import pytest

from node.ports import CaseState
from protocol.units import WEI_PER_TALLY, AuditOutcome
from tests.spine.judged import FAST, STAKE, JudgedMarket
from tests.spine.lab import Seller, idle, run, spec, wallet
from tests.twins.engine_twin import EngineTwin
from tests.twins.replayer_twin import Altering, RubberStamp

SOLD_STAKE = 100 * WEI_PER_TALLY


def staked(seller: Seller) -> int:
    return seller.chain.world.head.state.stakes[seller.wallet.address]


async def test_honest_work_passes_and_its_validators_are_credited() -> None:
    async with JudgedMarket() as market:
        seller = await market.seller()
        judges, buyer = await market.judges_of(4), await market.buyer()
        for length in (100, 64, 33):
            await run(buyer, spec(length))
        await idle(seller)
        case = await market.closed(seller.wallet.address)
        assert case.outcome is AuditOutcome.PASS and case.slashed == 0 and staked(seller) == SOLD_STAKE
        verdicts = [member.verdict for member in case.members]
        assert len(verdicts) == 3 and all(v is not None and v.flags == 0 for v in verdicts)
        members = {member.validator: member for member in case.members}
        assert all(member.credited for member in members.values())
        for judge in judges:
            credited, missed = await judge.court.credits(judge.address)
            assert (credited > 0) == (judge.address in members) and missed == 0
            assert judge.stake() == STAKE
        assert verdicts[0] is not None and 0 < verdicts[0].tokens <= 197


async def test_a_cheat_is_found_improbable_and_loses_its_stake() -> None:
    async with JudgedMarket() as market:
        seller = await market.seller(engine=Altering())
        await market.judges_of(4)
        buyer = await market.buyer()
        await run(buyer, spec(100))
        case = await market.closed(seller.wallet.address)
        assert case.outcome is AuditOutcome.IMPROBABLE
        assert case.slashed == SOLD_STAKE and staked(seller) == 0
        assert market.events("Executed")


async def test_a_liar_is_penalised_and_the_cheat_it_covers_is_slashed_all_the_same() -> None:
    async with JudgedMarket() as market:
        seller = await market.seller(engine=Altering())
        await market.judges_of(3)
        liar = await market.judge(replayer=RubberStamp(EngineTwin()))
        buyer = await market.buyer()
        await run(buyer, spec(100))
        case = await market.closed(seller.wallet.address)
        assert case.outcome is AuditOutcome.IMPROBABLE and case.slashed == SOLD_STAKE
        assert liar.address in {event.about for event in market.events("Revealed")}, "all four sit after the appeal"
        assert liar.stake() <= STAKE - FAST.validator_penalty
        assert all(judge.stake() == STAKE for judge in market.judges if judge is not liar)


@pytest.mark.slow
async def test_what_is_never_delivered_costs_a_tenth() -> None:
    async with JudgedMarket() as market:
        seller = await market.seller()
        await market.judges_of(3)
        buyer = await market.buyer()
        await run(buyer, spec(64))
        await idle(seller)
        await market.committed(seller.wallet.address)
        await seller.transport.stop()
        case = await market.closed(seller.wallet.address)
        assert case.outcome is AuditOutcome.WITHHELD
        assert case.slashed == SOLD_STAKE // 10 and staked(seller) == SOLD_STAKE - SOLD_STAKE // 10


async def test_a_provider_that_restarts_within_the_window_passes() -> None:
    async with JudgedMarket() as market:
        seller = await market.seller()
        await market.judges_of(3)
        buyer = await market.buyer()
        await run(buyer, spec(64))
        await idle(seller)
        await market.committed(seller.wallet.address)
        await seller.transport.stop()
        await market.case_of(seller.wallet.address, lambda case: case.state is CaseState.SUBMIT)
        await seller.provider.stop()
        await seller.store.close()
        market.sellers.remove(seller)
        await market.seller(store=seller.store, keys=(seller.wallet, seller.node_key))
        case = await market.closed(seller.wallet.address)
        assert case.outcome is AuditOutcome.PASS and case.slashed == 0


async def test_of_a_client_that_opts_out_only_documents_are_looked_at() -> None:
    async with JudgedMarket() as market:
        seller = await market.seller()
        judges = await market.judges_of(3)
        buyer = await market.buyer()
        await run(buyer, spec(64, private=True))
        case = await market.closed(seller.wallet.address)
        assert case.outcome is AuditOutcome.PASS
        assert all(member.verdict is not None and member.verdict.tokens == 0 for member in case.members)
        assert all(judge.replayer.replays == 0 for judge in judges)  # type: ignore[attr-defined]


@pytest.mark.slow
async def test_who_pays_for_a_job_does_not_judge_it() -> None:
    async with JudgedMarket() as market:
        seller = await market.seller()
        await market.judges_of(3)
        buyer = await market.buyer()
        payer = await market.judge(keys=(buyer.wallet, wallet()))
        await run(buyer, spec(64))
        await market.closed(seller.wallet.address)
        assert payer.address not in {event.about for event in market.events("Revealed")}
