"""Sheets that the operator signs: served as they are, gone over to while serving, and never two under one number."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from node.config import load
from node.provider.offering import TariffElsewhere
from node.routes import tariff_routes
from node.tariff_sheet import SignedSheet, TariffSheetError, served_tariff, sheet_json, signed_text, wanted_tariff
from protocol.bundle_json import document_json
from protocol.eip712 import digest, hash_struct
from protocol.messages import Tariff
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Digest
from tests.spine.lab import Market, Seller, prices, run, spec, wallet
from tests.twins.engine_twin import EngineTwin
from tests.twins.memory_chain import MemoryChain

DAY = 86_400


def own(account: Signer, **changes: int) -> Tariff:
    """A sheet of the twin's profile, in force from now on, as its operator would have signed it."""
    start = int(time.time()) + 2
    dates = {"sequence": 5, "valid_from": start, "valid_until": start + 90 * DAY}
    return prices(account.address, hash_struct(EngineTwin().profile), **(dates | changes))


async def registered(market: Market) -> tuple[Signer, Signer]:
    """A wallet and a node key that the chain knows."""
    account, node_key = wallet(), wallet()
    market.world.fund(account.address, 1000 * WEI_PER_TALLY, 10**18)
    await MemoryChain(market.world, account).register_provider(node_key.secret, 100 * WEI_PER_TALLY)
    return account, node_key


async def logged(market: Market, keys: tuple[Signer, Signer], tariff: Tariff) -> Digest:
    chain = MemoryChain(market.world, keys[0])
    await chain.log_tariff(tariff, keys[1].sign(chain.domain, tariff))
    return digest(chain.domain, tariff)


def dates(tariff: Tariff) -> dict[str, int]:
    return {name: getattr(tariff, name) for name in ("sequence", "valid_from", "valid_until", "completion_price")}


@pytest.mark.parametrize("ahead", [True, False])
async def test_a_signed_sheet_is_served_under_as_it_is(ahead: bool) -> None:
    """Whether its operator put it into the log or left that to the node."""
    async with Market() as market:
        keys = await registered(market)
        sheet = own(keys[0], completion_price=3 * 10**11)
        if ahead:
            await logged(market, keys, sheet)
        seller = await market.seller(keys=keys, **dates(sheet))
        assert list(market.world.head.state.tariffs) == [digest(seller.chain.domain, sheet)]
        buyer = await market.buyer()
        _, done, _ = await run(buyer, spec(64))
        assert done.cost == 4 * 10**10 + 64 * 3 * 10**11


async def test_a_running_provider_goes_over_to_a_logged_sheet() -> None:
    async with Market() as market:
        keys = await registered(market)
        seller = await market.seller(keys=keys)
        offering = seller.provider.offering
        start = market.clock.now_ms() // 1000 + 60
        ahead = {"valid_from": start, "valid_until": start + 90 * DAY, "sequence": 0}
        dearer = await offering.claim(own(keys[0], completion_price=7 * 10**11, **ahead), 1)
        assert dearer.sequence == 2
        with pytest.raises(TariffElsewhere, match="not in the chain's log"):
            await offering.adopt(dearer)
        tariff_hash = await logged(market, keys, dearer)
        await tariff_routes(offering)["tariff_adopt"]({"tariff": document_json(dearer)})
        assert tariff_hash in offering.terms().tariffs and len(offering.terms().tariffs) == 2
        assert not await offering.base_moved()
        market.clock.ahead_s += 61
        assert await offering.base_moved()
        await offering.prepare_tariff()
        await offering.renew()
        assert len(market.world.head.state.tariffs) == 2 and not await offering.base_moved()
        buyer = await market.buyer()
        _, done, _ = await run(buyer, spec(32))
        assert done.cost == 4 * 10**10 + 32 * 7 * 10**11


async def test_a_number_claimed_and_not_logged_costs_nothing() -> None:
    """The node looks after its tariff every few minutes; a sheet being prepared must not make it log another."""
    async with Market() as market:
        seller = await market.seller()
        await seller.provider.offering.claim(own(seller.wallet, completion_price=9), 1)
        await seller.provider.offering.prepare_tariff()
        assert len(market.world.head.state.tariffs) == 1


async def test_no_number_is_given_twice() -> None:
    async with Market() as market:
        seller = await market.seller()
        sheets = [own(seller.wallet, completion_price=number) for number in range(5)]
        routes = tariff_routes(seller.provider.offering)
        answers = await asyncio.gather(
            *(routes["tariff_claim"]({"tariff": document_json(sheet), "least": 1}) for sheet in sheets)
        )
        numbers = [int(answer["tariff"]["sequence"]) for answer in answers]
        assert sorted(numbers) == [2, 3, 4, 5, 6]


async def test_a_sheet_of_another_wallet_or_profile_is_not_taken_up() -> None:
    async with Market() as market:
        seller: Seller = await market.seller()
        offering = seller.provider.offering
        for other in (own(wallet()), replace(own(seller.wallet), profile_id=Digest(b"\x09" * 32))):
            with pytest.raises(TariffElsewhere, match="this node serves"):
                await offering.claim(other, 1)
            with pytest.raises(TariffElsewhere, match="this node serves"):
                await offering.adopt(other)


# ------------------------------------------------------------------------------------------------------------ the file


def test_what_a_provider_serves_under_by_a_file(tmp_path: Path) -> None:
    keys = (wallet(), wallet())
    sheet, profile = own(keys[0], completion_price=3 * 10**11), hash_struct(EngineTwin().profile)
    path = tmp_path / "sheet.json"
    config = load({"home": str(tmp_path), "provider.tariff_file": str(path)}, env={})
    path.write_text(json.dumps(sheet_json(replace(sheet, sequence=0))))
    assert wanted_tariff(config, keys[0].address, profile) == replace(sheet, sequence=0)
    domain = MemoryChain(Market().world, keys[0]).domain
    path.write_text(signed_text(SignedSheet(domain, keys[1].address, sheet, keys[1].sign(domain, sheet))))
    assert wanted_tariff(config, keys[0].address, profile) == sheet
    with pytest.raises(TariffSheetError, match="this node serves as"):
        served_tariff(path, wallet().address, profile)
    with pytest.raises(TariffSheetError, match="profile_id"):
        served_tariff(path, keys[0].address, Digest(b"\x01" * 32))
    with pytest.raises(TariffSheetError, match="cannot be read"):
        served_tariff(tmp_path / "none.json", keys[0].address, profile)
