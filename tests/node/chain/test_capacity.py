"""Reservations through the Chain port, on the twin and on the contract itself."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from incentives.reservation import earned_down
from node.chain.errors import ContractReverted, NotEnoughTally, NoWallet
from node.ports import CapacityTerms, ReservationOrder, ReservationRecord
from protocol.units import ZERO_ADDRESS, ZERO_DIGEST, Digest, Wei
from tests.node.chain.helpers import session
from tests.twins.chain_lab import LAB_OPTIONS, RICH_TALLY, AnvilLab, ChainLab, MemoryLab, secret_of

PROFILE = Digest(b"\x07" * 32)
TERMS = CapacityTerms(capacity=5_000_000, price=Wei(1_000), min_periods=2, max_periods=10)
PERIOD = LAB_OPTIONS.period_seconds
RATE = 2_000_000
PER_PERIOD = 2 * PERIOD * 1_000
KEY = session(1).address


class Market:
    """A provider that sells `TERMS`, a buyer, and a bystander."""

    def __init__(self, lab: ChainLab) -> None:
        self.lab = lab

    async def open(self) -> Market:
        self.seller_wallet, self.buyer_wallet, self.other_wallet = [await self.lab.account() for _ in range(3)]
        wallets = (self.seller_wallet, self.buyer_wallet, self.other_wallet)
        self.seller, self.buyer, self.other = [await self.lab.node(wallet) for wallet in wallets]
        await self.seller.offer_capacity(PROFILE, TERMS)
        return self

    async def period(self) -> int:
        return (await self.seller.head()).timestamp // PERIOD

    def order(
        self, first: int, periods: int = 3, rate: int = RATE, max_cost: int = RICH_TALLY // 2
    ) -> ReservationOrder:
        return ReservationOrder(self.seller_wallet.address, PROFILE, rate, first, periods, KEY, Wei(max_cost))

    async def bought(self, ahead: int = 2, periods: int = 3, rate: int = RATE) -> ReservationRecord:
        right, _ = await self.buyer.buy_reservation(self.order(await self.period() + ahead, periods, rate))
        record = await self.buyer.reservation(right)
        assert record is not None
        return record

    async def gone_to(self, timestamp: int) -> None:
        await self.lab.advance(timestamp - (await self.seller.head()).timestamp)


async def test_capacity_is_offered_bought_and_read(lab: ChainLab) -> None:
    market = await Market(lab).open()
    assert await market.other.capacity(market.seller_wallet.address, PROFILE) == TERMS
    assert await market.other.capacity(market.buyer_wallet.address, PROFILE) is None
    assert await market.other.period_seconds() == PERIOD
    assert await market.other.reservation(ZERO_DIGEST) is None

    first = await market.period() + 2
    right, mined = await market.buyer.buy_reservation(market.order(first))
    assert mined.block == (await market.buyer.head()).number
    record = await market.other.reservation(right)
    assert record == ReservationRecord(
        id=right,
        provider=market.seller_wallet.address,
        profile_id=PROFILE,
        holder=market.buyer_wallet.address,
        session=KEY,
        rate=RATE,
        start=first * PERIOD,
        end=(first + 3) * PERIOD,
        notice=2,
        per_period=Wei(PER_PERIOD),
        claimed=Wei(0),
    )
    assert await market.buyer.token_balance(market.buyer_wallet.address) == RICH_TALLY - 3 * PER_PERIOD


async def test_what_cannot_be_bought_is_named_and_costs_nothing(lab: ChainLab) -> None:
    market = await Market(lab).open()
    first = await market.period() + 2
    await market.buyer.buy_reservation(market.order(first + 1, 2, 4_000_000))
    before = await market.other.token_balance(market.other_wallet.address)
    for order, name, evidence in (
        (market.order(first, rate=1_000_001), "SoldOut", {"period": first + 1, "rate": 1_000_001, "free": 1_000_000}),
        (market.order(first, 1), "TermNotSold", {"periods": 1, "minPeriods": 2, "maxPeriods": 10}),
        (market.order(first, rate=0), "ZeroRate", {}),
        (market.order(first, max_cost=9), "CostAbove", {"cost": 3 * PER_PERIOD, "maxCost": 9}),
    ):
        with pytest.raises(ContractReverted) as refused:
            await market.other.buy_reservation(order)
        assert (refused.value.name, refused.value.arguments) == (name, evidence)
    with pytest.raises(ContractReverted) as past:
        await market.other.buy_reservation(market.order(first - 3))
    assert past.value.name == "OutsideHorizon"
    with pytest.raises(ContractReverted) as shrunk:
        await market.seller.offer_capacity(PROFILE, CapacityTerms(3_999_999, Wei(1), 1, 1))
    assert (shrunk.value.name, shrunk.value.arguments["sold"]) == ("SoldAlready", 4_000_000)
    assert await market.other.token_balance(market.other_wallet.address) == before


async def test_a_purchase_needs_a_wallet_and_money(lab: ChainLab) -> None:
    market = await Market(lab).open()
    order = market.order(await market.period() + 2)
    poor = await lab.node(await lab.account(tally=5))
    with pytest.raises(NotEnoughTally):
        await poor.buy_reservation(order)
    with pytest.raises(NoWallet):
        await (await lab.node(None)).buy_reservation(order)


async def test_a_right_is_listed_by_whoever_holds_or_sold_it(lab: ChainLab) -> None:
    market = await Market(lab).open()
    later, sooner = await market.bought(ahead=6), await market.bought(ahead=2)
    assert await market.buyer.reservations(market.buyer_wallet.address) == [sooner, later]
    await market.buyer.transfer_reservation(sooner.id, market.other_wallet.address)
    assert await market.buyer.reservations(market.buyer_wallet.address) == [later]
    (given,) = await market.other.reservations(market.other_wallet.address)
    assert (given.id, given.session) == (sooner.id, ZERO_ADDRESS)
    assert [r.id for r in await market.seller.reservations(market.seller_wallet.address)] == [sooner.id, later.id]
    assert await market.seller.reservations(secret_of(99).address) == []


async def test_only_the_holder_moves_a_right(lab: ChainLab) -> None:
    market = await Market(lab).open()
    right = (await market.bought()).id
    for attempt in (
        market.other.transfer_reservation(right, market.other_wallet.address),
        market.other.assign_reservation(right, session(2).address),
        market.seller.quit_reservation(right),
    ):
        with pytest.raises(ContractReverted) as refused:
            await attempt
        assert (refused.value.name, refused.value.arguments["holder"]) == ("NotHolder", market.buyer_wallet.address)
    with pytest.raises(ContractReverted) as nobody:
        await market.buyer.transfer_reservation(right, ZERO_ADDRESS)
    assert nobody.value.name == "ZeroHolder"
    await market.buyer.assign_reservation(right, session(2).address)
    record = await market.other.reservation(right)
    assert record is not None and record.session == session(2).address


async def test_the_provider_is_paid_as_time_passes_and_a_fee_is_burned(lab: ChainLab) -> None:
    market = await Market(lab).open()
    record, provider = await market.bought(), market.seller_wallet.address
    await market.other.claim_reservation(provider, [record.id])
    assert await market.seller.token_balance(provider) == RICH_TALLY, "nothing is earned before the start"
    await market.gone_to(record.start + PERIOD // 2)
    await market.other.claim_reservation(provider, [record.id, record.id, ZERO_DIGEST])
    earned = earned_down(PER_PERIOD, (await market.seller.head()).timestamp - record.start, PERIOD)
    assert 0 < earned < PER_PERIOD
    assert await market.seller.token_balance(provider) == RICH_TALLY + earned - earned * 12 // 100
    await market.gone_to(record.end + 5)
    await market.other.claim_reservation(provider, [record.id])
    rest = 3 * PER_PERIOD - earned
    fees = earned * 12 // 100 + rest * 12 // 100
    assert await market.seller.token_balance(provider) == RICH_TALLY + 3 * PER_PERIOD - fees
    ended = await market.seller.reservation(record.id)
    assert ended is not None and ended.claimed == 3 * PER_PERIOD


async def test_quitting_costs_the_notice_and_releasing_costs_the_holder_nothing_more(lab: ChainLab) -> None:
    market = await Market(lab).open()
    quitted, released = await market.bought(periods=8), await market.bought(periods=8)
    paid = RICH_TALLY - 16 * PER_PERIOD
    await market.buyer.quit_reservation(quitted.id)
    assert await market.buyer.token_balance(market.buyer_wallet.address) == paid + 6 * PER_PERIOD
    with pytest.raises(ContractReverted) as again:
        await market.buyer.quit_reservation(quitted.id)
    assert again.value.name == "EndsAnyway"
    with pytest.raises(ContractReverted) as stranger:
        await market.buyer.release_reservation(released.id)
    assert stranger.value.name == "NotProvider"
    await market.gone_to(released.start + PERIOD + 7)
    await market.seller.release_reservation(released.id)
    after = await market.seller.reservation(released.id)
    assert after is not None and after.end == (await market.seller.head()).timestamp
    earned = earned_down(PER_PERIOD, after.end - after.start, PERIOD)
    assert await market.buyer.token_balance(market.buyer_wallet.address) == paid + 14 * PER_PERIOD - earned
    again_sold = await market.bought(ahead=3, periods=2, rate=5_000_000 - 2_000_000)
    assert again_sold.rate == 3_000_000, "what was given back is sold again"


async def test_a_right_counts_only_once_its_block_does(lab: ChainLab) -> None:
    market = await Market(lab).open()
    careful = await lab.node(None, confirmations=3)
    record = await market.bought()
    assert await careful.reservation(record.id) is None
    await lab.mine(2)
    assert await careful.reservation(record.id) == record


class Life:
    """A seller, two traders, and a die that decides what happens in each of many periods."""

    def __init__(self, lab: ChainLab, seed: int) -> None:
        self.lab, self.dice = lab, random.Random(seed)
        self.rights: list[Digest] = []

    async def begin(self) -> Life:
        self.market = await Market(self.lab).open()
        self.began = await self.market.period()
        return self

    async def steps(self, count: int) -> AsyncIterator[object]:
        """What each step said: nothing, or the name of the refusal. Each is taken ten seconds into a period."""
        for _ in range(count):
            await self.market.gone_to((await self.market.period() + 1) * PERIOD + 10)
            try:
                yield await self._step(await self.market.period())
            except ContractReverted as refused:
                yield refused.name

    async def _step(self, period: int) -> object:
        dice, market = self.dice, self.market
        trader = dice.choice([market.buyer, market.other])
        number = dice.randrange(len(self.rights)) if self.rights else 0
        match dice.choice(["offer", "buy", "buy", "buy", "buy", "transfer", "assign", "quit", "release", "claim"]):
            case "offer":
                terms = CapacityTerms(dice.randrange(8_000_000), Wei(dice.randrange(2_000)), dice.randrange(3), 12)
                await market.seller.offer_capacity(PROFILE, terms)
            case "buy":
                order = market.order(period + dice.randrange(4), dice.randrange(1, 14), dice.randrange(2_500_000))
                self.rights.append((await trader.buy_reservation(order))[0])
            case "claim":
                await trader.claim_reservation(market.seller_wallet.address, self.rights)
            case _ if not self.rights:
                return None
            case "transfer":
                await trader.transfer_reservation(self.rights[number], market.other_wallet.address)
            case "assign":
                await trader.assign_reservation(self.rights[number], session(number).address)
            case "quit":
                await trader.quit_reservation(self.rights[number])
            case "release":
                await market.seller.release_reservation(self.rights[number])
        return None

    async def books(self) -> object:
        """Every right with its times in periods since the beginning; what moves by the second is left out."""
        records = [await self.market.seller.reservation(right) for right in self.rights]
        return [
            (
                r.holder,
                r.session,
                r.rate,
                r.start // PERIOD - self.began,
                r.end // PERIOD - self.began,
                r.notice,
                r.per_period,
            )
            for r in records
            if r is not None
        ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_the_twin_and_the_contract_lead_the_same_life(seed: int, anvil_lab: AnvilLab) -> None:
    twin, real = await Life(MemoryLab(), seed).begin(), await Life(anvil_lab, seed).begin()
    said: list[object] = []
    real_steps = real.steps(60)
    async for told in twin.steps(60):
        assert await anext(real_steps) == told
        said.append(told)
    assert await twin.books() == await real.books()
    assert len(twin.rights) > 8 and len(set(said)) > 4, "a life of refusals, or of none, would prove little"
