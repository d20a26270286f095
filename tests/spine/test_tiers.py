"""What a tier is worth: on the shipped model and the real scheduler, a priority job's first token under a flood."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from devnet.cluster import MODEL_DIR
from incentives.ledger import Role
from node.engine.card import load_card
from node.engine.engine import TorchEngine
from node.ports import JobTokens
from protocol.options import JobOptions
from protocol.units import BPS, JobKind, Tier
from tests.spine.lab import MODEL, Buyer, Market, Seller, run, spec, until
from tests.twins.engine_twin import EngineTwin

SLOTS = 4
FLOOD = 24
PROMISE_MS = 1_500
"""Ten times what the shipped model needs for a first token on a quiet machine, and a tenth of what the flood takes."""


@asynccontextmanager
async def crowded() -> AsyncIterator[tuple[Market, Seller, Buyer, list[asyncio.Task[object]]]]:
    """A market whose one provider is full of flex jobs, with more waiting."""
    engine = TorchEngine(MODEL_DIR, slots=SLOTS, max_queue=256)
    await engine.start()
    try:
        async with Market() as market:
            card = load_card(MODEL_DIR, MODEL, engine.profile, engine.max_context)
            seller = await market.seller(
                engine=cast(EngineTwin, engine),
                card=card,
                priority_bps=2 * BPS,
                priority_ttft_ms=PROMISE_MS,
                priority_refund_bps=BPS // 2,
            )
            buyer = await market.buyer(stall_s=120.0)
            await run(buyer, spec(1))  # the channel is open and the weights are warm
            long = JobOptions(min_tokens=400)
            flood = [
                asyncio.create_task(run(buyer, spec(400, tuple(range(40, 90)), tier=Tier.FLEX, options=long)))
                for _ in range(FLOOD)
            ]
            await until(lambda: engine.stats().active == SLOTS and engine.stats().queued > 0)
            try:
                yield market, seller, buyer, cast(list[asyncio.Task[object]], flood)
            finally:
                for task in flood:
                    task.cancel()
                await asyncio.gather(*flood, return_exceptions=True)
                await until(lambda: not seller.provider.server.running)
    finally:
        await engine.stop()


@pytest.mark.slow
async def test_priority_keeps_its_promise_under_a_flood_of_flex_and_batch_jobs() -> None:
    async with crowded() as (_, seller, buyer, flood):
        for _ in range(5):
            tokens, done, _ = await run(buyer, spec(40, tuple(range(40, 240)), tier=Tier.PRIORITY))
            (row,) = await buyer.store.receipts(role=Role.CLIENT, job_id=done.job_ids[0], final_only=True)
            waited = row.receipt.first_token_at - row.receipt.received_at
            assert tokens and waited <= PROMISE_MS and done.refund == 0
        assert not any(task.done() for task in flood), "the flood was still on: none of it is done"
        assert seller.engine.stats().preempted_total >= 1


@pytest.mark.slow
async def test_what_was_displaced_goes_on_and_loses_no_token() -> None:
    async with crowded() as (_, seller, buyer, flood):
        await run(buyer, spec(10, tier=Tier.PRIORITY))
        first, *_ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        tokens, _, _ = cast(tuple[list[int], object, object], next(iter(first)).result())
        assert len(tokens) == 400 and seller.engine.stats().preempted_total >= 1


@pytest.mark.slow
async def test_batch_work_gives_way_and_is_finished_when_the_rest_is_done() -> None:
    async with crowded() as (_, _, buyer, flood):
        batch = asyncio.create_task(run(buyer, spec(5, kind=JobKind.BATCH, tier=Tier.FLEX)))
        standard: list[int] = []
        async for event in buyer.router.run(spec(20)):
            if isinstance(event, JobTokens):
                standard += event.token_ids
        assert standard and not batch.done()
        for task in flood:
            task.cancel()
        tokens, _, _ = await asyncio.wait_for(batch, 60)
        assert tokens
