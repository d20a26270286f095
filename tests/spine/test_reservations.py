"""Capacity bought ahead, from the purchase on chain to the price of a job and the refusal of one too many."""

from __future__ import annotations

import pytest

from incentives.reservation import BURST_S
from node.ports import CapacityTerms, NoProvider, ReservationOrder
from protocol.eip712 import hash_struct
from protocol.errors import Refused
from protocol.units import BPS, WEI_PER_TALLY, Digest, Wei
from tests.spine.lab import Buyer, Market, Seller, idle, run, spec
from tests.spine.test_endings import PROMPT_COST, TOKEN, settle

RATE = 200
"""Micro-STE per second: the bucket of a minute holds two jobs of the twin's profile and no third."""


async def reserve(market: Market, seller: Seller, buyer: Buyer, rate: int = RATE) -> Digest:
    profile_id = hash_struct(seller.engine.profile)
    await seller.chain.offer_capacity(profile_id, CapacityTerms(10**6, Wei(10**15), 1, 10))
    period = await buyer.chain.period_seconds()
    # each block of the twin is a second later: else a right may begin in a period that the clock has not reached
    market.clock.ahead_s += max(0, (await buyer.chain.head()).timestamp + 5 - market.clock.now_ms() // 1000)
    now = market.clock.now_ms() // 1000 // period
    order = ReservationOrder(
        seller.wallet.address, profile_id, rate, now, 5, buyer.accounts.session.address, Wei(WEI_PER_TALLY)
    )
    right, _ = await buyer.chain.buy_reservation(order)
    return right


async def test_a_job_under_a_reservation_goes_to_its_seller_at_the_reserved_price() -> None:
    async with Market() as market:
        cheap = await market.seller()
        seller = await market.seller(reserved_discount_bps=2_500, completion_price=4 * TOKEN)
        buyer = await market.buyer()
        right = await reserve(market, seller, buyer, 10**6)
        _, done, _ = await run(buyer, spec(40, reservation=right))
        assert done.cost == (PROMPT_COST + 40 * 4 * TOKEN) * (BPS - 2_500) // BPS
        assert await settle(seller) == done.cost and await settle(cheap) == 0


async def test_a_right_serves_its_rate_and_no_more_and_unused_work_comes_back() -> None:
    async with Market() as market:
        seller = await market.seller(reserved_discount_bps=5_000)
        buyer = await market.buyer()
        right = await reserve(market, seller, buyer)
        seller.engine.eos_every = 1  # each job asks for much and uses one token
        for _ in range(5):
            await run(buyer, spec(40, reservation=right))
            await idle(seller)
        seller.engine.eos_every = 0
        with pytest.raises(Refused, match="fits again in"):
            for _ in range(10):
                await run(buyer, spec(40, reservation=right))
        assert (await run(buyer, spec(40)))[1].finish, "without the right it is served as ever"
        market.clock.ahead_s += BURST_S
        await run(buyer, spec(40, reservation=right))


async def test_a_right_of_somebody_else_is_refused_before_anything_is_sent() -> None:
    async with Market() as market:
        seller = await market.seller()
        owner, thief = await market.buyer(), await market.buyer()
        right = await reserve(market, seller, owner)
        for wrong in (right, Digest(b"\x07" * 32)):
            with pytest.raises(NoProvider, match="reservation"):
                await run(thief, spec(40, reservation=wrong))
        assert thief.accounts.spent == 0


async def test_a_right_that_was_given_away_serves_its_new_holder() -> None:
    async with Market() as market:
        seller = await market.seller(reserved_discount_bps=5_000)
        owner, heir = await market.buyer(), await market.buyer()
        right = await reserve(market, seller, owner, 10**6)
        await owner.chain.transfer_reservation(right, heir.wallet.address)
        await heir.chain.assign_reservation(right, heir.accounts.session.address)
        _, done, _ = await run(heir, spec(40, reservation=right))
        assert done.cost == (PROMPT_COST + 40 * TOKEN) // 2
        with pytest.raises(NoProvider):
            await run(owner, spec(40, reservation=right))
