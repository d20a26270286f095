"""A multiplier on its way from a busy engine into a client's price, and offers that contradict each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from node.discovery.directory import OfferDirectory
from node.provider.offering import OFFER_LIFE_S
from protocol.base_price import base_epoch, next_base
from protocol.errors import Refused, RemoteProtocolError
from protocol.frames import OfferEnvelope
from protocol.messages import Offer
from protocol.offers import CheckedOffer, seal_offer
from protocol.units import BPS
from tests.node.discovery.test_directory import reader
from tests.spine.lab import Market, Seller, run, spec

PLAIN_COST = 4 * 10**10 + 40 * 10**11
"""What four prompt tokens and forty generated ones cost at x1. Unit: wei."""


def offered(seller: Seller) -> CheckedOffer:
    (checked,) = seller.provider.offering._directory.offers()
    assert isinstance(checked, CheckedOffer)
    return checked


def resigned(market: Market, seller: Seller, checked: CheckedOffer, **changes: Any) -> OfferEnvelope:
    """The seller's offer with other numbers, signed by the seller all the same."""
    changes = {"sequence": checked.offer.sequence + 1_000_000} | changes
    return seal_offer(
        market.world.domain,
        seller.node_key,
        replace(checked.offer, **changes),
        checked.tariff,
        checked.envelope.tariff_signature,
        peer_id=checked.peer_id,
        addresses=checked.addresses,
        model=checked.model,
        region=checked.region,
    )


async def full_for_two_minutes(market: Market, seller: Seller) -> None:
    """All slots busy; the background looks every second, and this looks at each minute's end as well."""
    seller.engine.active = seller.engine.slots
    for _ in range(2):
        await seller.provider.offering.base_moved()
        market.clock.ahead_s += 60
    if await seller.provider.offering.base_moved():
        await seller.provider.offering.renew()
    seller.engine.active = 0


async def test_a_busy_provider_offers_a_higher_multiplier_and_is_paid_by_it() -> None:
    async with Market() as market:
        seller = await market.seller(base_max_bps=2 * BPS)
        buyer = await market.buyer()
        directory = buyer.router._directory
        assert isinstance(directory, OfferDirectory)
        (early,) = directory.offers()
        before = offered(seller).offer
        assert before == early.offer and before.base_bps == BPS
        await full_for_two_minutes(market, seller)
        after = offered(seller).offer
        assert after.sequence > before.sequence and after.base_bps > BPS
        assert after.base_epoch == base_epoch(market.clock.now_ms() // 1000)
        assert after.base_bps == next_base(offered(seller).tariff, after.base_parent_bps, after.base_utilisation_bps)

        _, dear, _ = await run(buyer, spec(max_tokens=40))
        assert dear.cost == -(-PLAIN_COST * after.base_bps // BPS)
        directory._book[early.tariff.provider] = early  # as if the gossip had not come
        _, cheap, _ = await run(buyer, spec(max_tokens=40))
        assert cheap.cost == PLAIN_COST, "an offer that is alive is kept"


async def test_a_multiplier_of_no_live_offer_is_refused() -> None:
    async with Market() as market:
        seller = await market.seller(base_max_bps=2 * BPS)
        await full_for_two_minutes(market, seller)
        accepted = seller.provider.offering.terms().bases
        assert accepted == {BPS, offered(seller).offer.base_bps}
        market.clock.ahead_s += OFFER_LIFE_S + 1
        assert seller.provider.offering.terms().bases == frozenset()


async def test_offers_that_contradict_each_other_are_refused_and_kept_as_evidence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Market() as market:
        seller = await market.seller(base_max_bps=2 * BPS)
        book, _ = await reader(market, seller.peer)
        await book.refresh()
        honest = offered(seller)
        risen = {"base_bps": 11_250, "base_parent_bps": BPS, "base_utilisation_bps": BPS}
        other_in_the_same_epoch = resigned(market, seller, honest, **risen)
        with pytest.raises(RemoteProtocolError, match="contradicts"):
            await book.consider(other_in_the_same_epoch)
        next_from_elsewhere = resigned(
            market, seller, honest, base_epoch=honest.offer.base_epoch + 1, base_bps=12_656, base_parent_bps=11_250,
            base_utilisation_bps=BPS,
        )  # fmt: skip
        with pytest.raises(RemoteProtocolError, match="contradicts"):
            await book.consider(next_from_elsewhere)
        assert [checked.envelope for checked in book.offers()] == [honest.envelope]
        evidence = [record.getMessage() for record in caplog.records if "evidence" in record.getMessage()]
        assert len(evidence) == 1, "once per provider: a flood of lies fills no log"
        assert honest.envelope.offer.hex() in evidence[0] and other_in_the_same_epoch.offer.hex() in evidence[0]
        assert await book.consider(
            resigned(market, seller, honest, base_epoch=honest.offer.base_epoch + 1, sequence=_later(honest.offer))
        )


def _later(offer: Offer) -> int:
    return offer.sequence + 2_000_000


async def test_a_multiplier_that_does_not_follow_from_its_load_is_no_offer() -> None:
    async with Market() as market:
        seller = await market.seller(base_max_bps=2 * BPS)
        book, _ = await reader(market)
        with pytest.raises(RemoteProtocolError, match="base_bps"):
            await book.consider(resigned(market, seller, offered(seller), base_bps=15_000))


async def test_a_job_that_names_another_multiplier_is_refused_before_it_costs_anything() -> None:
    async with Market() as market:
        seller = await market.seller(base_max_bps=2 * BPS)
        buyer = await market.buyer()
        directory = buyer.router._directory
        assert isinstance(directory, OfferDirectory)
        (known,) = directory.offers()
        forged = replace(known, offer=replace(known.offer, base_bps=15_000))
        directory._book[known.tariff.provider] = forged
        with pytest.raises(Exception) as failed:
            await run(buyer, spec(max_tokens=8))
        assert "base multiplier" in str(failed.value) or isinstance(failed.value, Refused)
        assert seller.provider.server.jobs_served == 0
