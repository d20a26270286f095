"""When a provider settles: on a schedule, on value, at once when its payer leaves; and with the chain away."""

from __future__ import annotations

import asyncio
import time

import pytest

from incentives.ledger import ChannelKey, Role
from incentives.settlement import LEAVING_MARGIN_S, SettlePolicy
from node.ports import PreparedSettlement, Settled
from protocol.units import WEI_PER_TALLY, Wei
from tests.spine.lab import Buyer, Market, Seller, idle, run, spec, until
from tests.twins.memory_ledger import MemoryLedgerChain

NEVER = 10**9


def key(seller: Seller, buyer: Buyer) -> ChannelKey:
    return ChannelKey(seller.wallet.address, buyer.accounts.session.address)


async def claimed(seller: Seller, buyer: Buyer) -> int:
    slot = await seller.chain.slot(key(seller, buyer))
    return slot.claimed if slot else 0


async def test_settles_when_the_payer_requests_its_exit() -> None:
    async with Market() as market:
        seller = await market.seller(policy=SettlePolicy(NEVER, Wei(1000 * WEI_PER_TALLY), Wei(1)))
        buyer = await market.buyer()
        _, done, _ = await run(buyer, spec(64))
        assert await claimed(seller, buyer) == 0
        await buyer.chain.request_exit(key(seller, buyer))
        await until(lambda: seller.provider.settler.totals.batches == 1)
        assert await claimed(seller, buyer) == done.cost


async def test_settles_on_value() -> None:
    async with Market() as market:
        seller = await market.seller(policy=SettlePolicy(NEVER, Wei(1), Wei(1)))
        buyer = await market.buyer()
        _, done, _ = await run(buyer, spec(64))
        seller.provider.settler.wake()
        await until(lambda: seller.provider.settler.totals.paid == done.cost)


async def test_settles_on_schedule() -> None:
    async with Market() as market:
        seller = await market.seller(policy=SettlePolicy(1, Wei(1000 * WEI_PER_TALLY), Wei(1)))
        buyer = await market.buyer()
        _, done, _ = await run(buyer, spec(64))
        await until(lambda: seller.provider.settler.totals.paid == done.cost)


async def test_dust_waits_unless_its_payer_s_exit_is_near() -> None:
    world = MemoryLedgerChain(epoch_seconds=0, exit_delay=LEAVING_MARGIN_S - 60, timestamp=int(time.time()) - 5)
    async with Market(world) as market:
        seller = await market.seller(policy=SettlePolicy(0, Wei(1), Wei(WEI_PER_TALLY)))
        buyer = await market.buyer()
        await run(buyer, spec(10))
        assert await seller.provider.settler.settle_due() is None
        await buyer.chain.request_exit(key(seller, buyer))
        await until(lambda: seller.provider.settler.totals.batches == 1)


async def test_with_the_chain_away_jobs_go_on_up_to_confirmed_escrow_and_are_settled_later() -> None:
    async with Market() as market:
        seller = await market.seller(policy=SettlePolicy(NEVER, Wei(1000 * WEI_PER_TALLY), Wei(1)))
        buyer = await market.buyer()
        await run(buyer, spec(32))
        seller.chain.down = buyer.chain.down = True
        _, _, _ = await run(buyer, spec(64))
        assert await seller.provider.settler.settle_due(everything=True) is None
        assert seller.provider.settler.totals.last_error != ""
        seller.chain.down = buyer.chain.down = False
        settled = await seller.provider.settler.settle_due(everything=True)
        assert settled is not None and settled.paid == buyer.accounts.spent


async def test_reorganised_settlement_is_due_again() -> None:
    async with Market() as market:
        seller = await market.seller(policy=SettlePolicy(NEVER, Wei(1000 * WEI_PER_TALLY), Wei(1)))
        buyer = await market.buyer()
        _, done, _ = await run(buyer, spec(64))
        await seller.provider.settler.settle_due(everything=True)
        market.world.reorg(1)
        await until(lambda: seller.provider.books.channel(buyer.accounts.session.address).claimed == 0)
        settled = await seller.provider.settler.settle_due(everything=True)
        assert settled is not None and settled.paid == done.cost
        assert await claimed(seller, buyer) == done.cost


async def test_restart_with_the_chain_away_serves_under_the_tariff_it_had() -> None:
    async with Market() as market:
        seller = await market.seller()
        buyer = await market.buyer()
        await run(buyer, spec(32))
        await seller.provider.stop()
        await seller.transport.stop()
        await seller.store.close()
        market.world.down = True
        again = await market.seller(store=seller.store, keys=(seller.wallet, seller.node_key))
        assert again.provider.offering.terms_in_force()
        assert len(await again.store.jobs(Role.PROVIDER)) == 1
        _, done, _ = await run(buyer, spec(32))
        assert done.completion_tokens == 32
        market.world.down = False


async def test_a_voucher_sent_again_because_the_chain_was_seen_late_does_not_hold_the_channel_back() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        await run(buyer, spec(40))
        await idle(seller)
        books, client = seller.provider.books, buyer.accounts.session.address
        before = books._channels[client]
        assert (await seller.provider.settler.settle_due(everything=True)) is not None
        books._channels[client] = before
        again = await seller.provider.settler.settle_due(everything=True)
        assert again is not None and again.paid == 0
        assert not seller.provider.settler._held


async def test_a_settlement_cut_off_while_the_chain_had_it_is_journaled_when_the_node_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slot shows it as paid, so nothing is due; its fate still has to be written down."""
    async with Market() as market:
        seller = await market.seller(policy=SettlePolicy(NEVER, Wei(1000 * WEI_PER_TALLY), Wei(1)))
        buyer = await market.buyer()
        _, done, _ = await run(buyer, spec(64))
        settler, send, mined = seller.provider.settler, seller.chain.send_settlement, asyncio.Event()

        async def lost(prepared: PreparedSettlement) -> Settled:
            await send(prepared)
            mined.set()
            return await asyncio.Event().wait()  # type: ignore[return-value]

        with monkeypatch.context() as patched:
            patched.setattr(seller.chain, "send_settlement", lost)
            cut_off = asyncio.create_task(settler.settle_due(everything=True))
            await mined.wait()
            await seller.provider.books.refresh(buyer.accounts.session.address)
            cut_off.cancel()
            await asyncio.gather(cut_off, return_exceptions=True)
        await settler.settle_rest()
        (row,) = await seller.store.settlements()
        assert (row.state, row.paid) == ("mined", done.cost)
