"""One job through the whole node on the twins: served, receipted, vouched, settled; and every way it can go wrong."""

from __future__ import annotations

import asyncio

from incentives.ledger import Role
from node.ports import JobPaid, JobStarted
from protocol.units import FinishReason
from tests.spine.lab import Market, expected, idle, run, spec


async def test_a_job_is_served_receipted_paid_and_settled() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        tokens, done, events = await run(buyer, spec(100))
        (job,) = await buyer.store.jobs(Role.CLIENT)
        assert tokens == expected(seller.engine, job.accept.seed, spec(100))
        assert done.completion_tokens == 100 and done.finish is FinishReason.LENGTH
        assert done.cost == 4 * 10**10 + 100 * 10**11
        assert isinstance(events[0], JobStarted)
        assert [e.total for e in events if isinstance(e, JobPaid)][-1] == done.cost
        await idle(seller)
        settled = await seller.provider.settler.settle_due(everything=True)
        assert settled is not None and settled.paid == done.cost
        assert settled.fee == done.cost * 12 // 100
        assert await seller.chain.earned(seller.wallet.address) == done.cost - settled.fee
        receipts = await seller.store.receipts(role=Role.PROVIDER, job_id=job.job_id)
        assert len(receipts) == 4 and all(row.voucher for row in receipts)
        assert (await seller.store.jobs(Role.PROVIDER))[0].closed is FinishReason.LENGTH


async def test_eight_jobs_at_once_share_one_channel() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        results = await asyncio.gather(*(run(buyer, spec(64 + i)) for i in range(8)))
        total = sum(done.cost for _, done, _ in results)
        assert buyer.accounts.spent == total
        await idle(seller)
        settled = await seller.provider.settler.settle_due(everything=True)
        assert settled is not None and settled.paid == total
