"""Who pays what when a stream ends: every row of the termination table on the twins; tests/faults on processes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from incentives.ledger import JobClosed, Role
from node.ports import InsufficientFunds, JobDone, JobFailed, JobStarted, JobTokens, NoProvider
from protocol.errors import Refused
from protocol.messages import WorkReceipt
from protocol.units import BPS, INCREMENT_TOKENS, WEI_PER_TALLY, FinishReason, Wei
from protocol.work import Work
from tests.spine.lab import Market, Seller, expected, idle, run, spec, until

PROMPT_COST = 4 * 10**10
TOKEN = 10**11


def stop_at(seller: Seller, index: int) -> asyncio.Event:
    """Hold the engine before token `index` until the event is set."""
    gate, reached = asyncio.Event(), asyncio.Event()

    async def pace(at: int) -> None:
        if at >= index:
            reached.set()
            await gate.wait()

    seller.engine.pace = pace
    return reached


async def settle(seller: Seller) -> int:
    settled = await seller.provider.settler.settle_due(everything=True)
    return settled.paid if settled else 0


async def closed(store: object, role: Role) -> list[FinishReason | None]:
    return [job.closed for job in await store.jobs(role)]  # type: ignore[attr-defined]


async def test_end_accepted_pays_the_metered_total() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        _, done, _ = await run(buyer, spec(70))
        assert await settle(seller) == done.cost == PROMPT_COST + 70 * TOKEN


async def test_stop_token_ends_the_job_and_is_paid() -> None:
    async with Market() as market:
        seller = await market.seller()
        seller.engine.eos_every = 20
        buyer = await market.buyer()
        tokens, done, _ = await run(buyer, spec(2000))
        assert done.finish is FinishReason.STOP and tokens[-1] == 2
        assert await settle(seller) == done.cost == PROMPT_COST + len(tokens) * TOKEN


async def test_cancelled_job_pays_what_was_delivered() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        reached = stop_at(seller, 40)
        got: list[int] = []
        job = buyer.router.run(spec(500))
        async for event in job:
            if isinstance(event, JobTokens):
                got.extend(event.token_ids)
            if len(got) >= 33:
                break
        await reached.wait()
        await job.aclose()  # type: ignore[attr-defined]
        await buyer.router.stop()
        await idle(seller)
        paid = await settle(seller)
        delivered = (paid - PROMPT_COST) // TOKEN
        assert len(got) <= delivered <= 40
        assert await closed(buyer.store, Role.CLIENT) == [FinishReason.CANCELLED]
        assert await closed(seller.store, Role.PROVIDER) == [FinishReason.CANCELLED]
        assert seller.engine.active == 0


async def test_vanished_client_pays_up_to_the_last_acknowledged_increment() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        reached = stop_at(seller, 50)

        async def follow() -> None:
            async for _ in buyer.router.run(spec(500)):
                pass

        task = asyncio.create_task(follow())
        await reached.wait()
        first_increment = PROMPT_COST + INCREMENT_TOKENS * TOKEN
        await until(lambda: seller.provider.books.channel(buyer.accounts.session.address).vouched == first_increment)
        await market.network.kill(buyer.transport.peer_id)
        with pytest.raises((JobFailed, NoProvider)):
            await task
        await until(lambda: not seller.provider.server.running)
        assert await settle(seller) == first_increment
        assert await closed(seller.store, Role.PROVIDER) == [FinishReason.CANCELLED]


async def test_dead_provider_is_paid_to_its_last_receipt_and_another_continues_exactly() -> None:
    async with Market() as market:
        first = await market.seller()
        buyer = await market.buyer()
        second = await market.seller(completion_price=2 * TOKEN)
        await buyer_learns(buyer, second)
        reached = stop_at(first, 50)
        job = spec(120)
        got: list[int] = []
        done: JobDone | None = None
        started: list[JobStarted] = []

        async def kill() -> None:
            await reached.wait()
            await until(lambda: buyer.accounts.spent == PROMPT_COST + INCREMENT_TOKENS * TOKEN)
            await market.network.kill(first.transport.peer_id)

        killer = asyncio.create_task(kill())
        async for event in buyer.router.run(job):
            if isinstance(event, JobTokens):
                got.extend(event.token_ids)
            if isinstance(event, JobStarted):
                started.append(event)
            if isinstance(event, JobDone):
                done = event
        await killer
        opened = await buyer.store.job(started[0].job_id)
        assert opened is not None and done is not None
        assert got == expected(first.engine, opened.accept.seed, job)
        assert [event.failover for event in started] == [False, True]
        paid_first = PROMPT_COST + INCREMENT_TOKENS * TOKEN
        rest = 120 - INCREMENT_TOKENS
        paid_second = (4 + INCREMENT_TOKENS) * 10**10 + rest * 2 * TOKEN
        assert done.cost == paid_first + paid_second and done.completion_tokens == 120
        assert await settle(second) == paid_second


async def buyer_learns(buyer: object, seller: Seller) -> None:
    """The buyer's directory takes in a seller that was made after it."""
    for checked in seller.provider.offering._directory.offers():
        await buyer.router._directory.consider(checked.envelope)  # type: ignore[attr-defined]


async def test_stalled_provider_without_another_is_an_explicit_error() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer(stall_s=0.3)
        stop_at(seller, 40)
        with pytest.raises(JobFailed, match="were paid"):
            await run(buyer, spec(200))
        assert buyer.accounts.spent == PROMPT_COST + INCREMENT_TOKENS * TOKEN


async def test_receipt_that_does_not_recompute_pays_nothing_more_and_keeps_evidence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        seller.cheats = True
        honest = Work.receipt

        def greedy(self: Work, finish: FinishReason, finished_at: int, vouched: Wei) -> tuple[Work, WorkReceipt]:
            work, receipt = honest(self, finish, finished_at, vouched)
            caller_is_provider = self.request.provider == seller.wallet.address and self.step == 1
            return work, replace(receipt, total=receipt.total + 1) if caller_is_provider else receipt

        real = type(seller.provider.server)
        assert real is not None
        from node.provider import delivery

        class GreedyWork(Work):
            receipt = greedy

        def start(*args: object) -> Work:
            work = Work.start(*args)  # type: ignore[arg-type]
            return GreedyWork(**{name: getattr(work, name) for name in Work.__dataclass_fields__})

        monkeypatch.setattr("node.provider.server.Work", type("W", (), {"start": staticmethod(start)}))
        assert delivery is not None
        with pytest.raises(JobFailed, match="total"):
            await run(buyer, spec(200))
        assert buyer.accounts.spent == PROMPT_COST + INCREMENT_TOKENS * TOKEN
        (job,) = await buyer.store.jobs(Role.CLIENT)
        assert await buyer.store.get_value(f"evidence/{job.job_id.hex()}/2")


async def test_missed_promise_refunds_by_formula() -> None:
    async with Market() as market:
        seller = await market.seller(standard_ttft_ms=1, standard_refund_bps=BPS // 2)
        buyer = await market.buyer()

        async def pace(index: int) -> None:
            if index == 0:
                await asyncio.sleep(0.05)

        seller.engine.pace = pace
        _, done, _ = await run(buyer, spec(40))
        metered = PROMPT_COST + 40 * TOKEN
        assert done.refund == metered // 2 and done.cost == metered - metered // 2
        assert await settle(seller) == done.cost


async def test_missed_deadline_ends_the_job_with_its_refund() -> None:
    async with Market() as market:
        promised = {"standard_ttft_ms": 100, "standard_tpot_ms": 2}
        seller = await market.seller(standard_refund_bps=BPS // 2, **promised)
        buyer = await market.buyer()
        stop_at(seller, 40)
        tokens, done, _ = await run(buyer, spec(200, deadline_s=0.6))
        assert done.finish is FinishReason.DEADLINE
        metered = PROMPT_COST + len(tokens) * TOKEN
        assert done.cost == metered - metered // 2


async def test_deadline_that_the_tier_never_promised_gives_no_refund() -> None:
    async with Market() as market:
        seller = await market.seller(standard_refund_bps=BPS)
        buyer = await market.buyer()
        stop_at(seller, 40)
        tokens, done, _ = await run(buyer, spec(200, deadline_s=0.6))
        assert done.finish is FinishReason.DEADLINE
        assert done.cost == PROMPT_COST + len(tokens) * TOKEN


async def test_over_length_request_costs_nothing() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        with pytest.raises(NoProvider, match="context"):
            await run(buyer, spec(5000))
        assert buyer.accounts.spent == 0 and await settle(seller) == 0


async def test_escrow_exhausted_stops_at_the_deposit() -> None:
    async with Market() as market:
        seller = await market.seller()
        purse = PROMPT_COST + 80 * TOKEN
        buyer = await market.buyer(tally=purse, deposit=purse)
        with pytest.raises(InsufficientFunds, match="ran out"):
            await run(buyer, spec(500))
        paid = await settle(seller)
        assert paid == buyer.accounts.spent == PROMPT_COST + 64 * TOKEN <= purse


async def test_no_escrow_at_all_is_refused_before_anything_is_served() -> None:
    async with Market() as market:
        seller = await market.seller()
        buyer = await market.buyer(tally=0, deposit=WEI_PER_TALLY)
        with pytest.raises(InsufficientFunds):
            await run(buyer, spec(100))
        assert seller.engine.emitted == 0


async def test_price_ceiling_rules_a_provider_out() -> None:
    async with Market() as market:
        await market.seller()
        buyer = await market.buyer()
        with pytest.raises(NoProvider, match="ceiling"):
            await run(buyer, spec(100, price_ceiling=Wei(10)))


async def test_busy_provider_refuses_and_says_so() -> None:
    async with Market() as market:
        seller = await market.seller()
        seller.engine.slots = 0
        buyer = await market.buyer()
        with pytest.raises(Refused, match="busy"):
            await run(buyer, spec(10))


async def test_restarted_provider_keeps_what_was_vouched_for() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        _, done, _ = await run(buyer, spec(64))
        await seller.store.write(
            JobClosed(
                Role.PROVIDER, (await seller.store.jobs(Role.PROVIDER))[0].job_id, FinishReason.LENGTH, done.cost, ""
            )
        )
        await seller.transport.stop()
        await seller.store.close()
        again = await market.seller(store=seller.store, keys=(seller.wallet, seller.node_key))
        assert await settle(again) == done.cost
